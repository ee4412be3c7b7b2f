"""The four objectives of ERNIE-M's pre-training (Ouyang et al., arXiv 2012.15674, sections 3.1 to 3.3).

Each turns records into samples, and is also a collator: called with a list of records, it returns their samples packed,
the arguments of `ErnieMForPreTraining.forward`.
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar

import torch

from ..tokenization import ErnieMTokenizer
from .masking import Masking
from .samples import NO_LANGUAGE, Pair, Sample, Sentence, check_languages, pack, unlabelled

SPECIAL_TOKENS_OF_TEXT, SPECIAL_TOKENS_OF_PAIR = 2, 4


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What all objectives share.

    Attributes:
        tokenizer: turns texts into ids.
        masking: which tokens are to be predicted, and what stands in their place.
        max_length: tokens of a sample at most, special ones included.
        languages: the names of the rows of the model's language embeddings (`model.config.languages`); without them no
            token gets one.

    Raises:
        TypeError: the tokenizer is another one than `ErnieMTokenizer`.
        ValueError: it has no [MASK], `max_length` is below 8, or `languages` are not different names.
    """

    name: ClassVar[str]
    record: ClassVar[type]

    tokenizer: ErnieMTokenizer
    masking: Masking = field(default_factory=Masking)
    max_length: int = 512
    languages: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer, ErnieMTokenizer):
            raise TypeError(
                f"tokenizer is of type {type(self.tokenizer).__name__}; use an ErnieMTokenizer. For XLM-RoBERTa's, "
                f"`python -m erniem_fast convert` makes one with the same ids."
            )
        if self.tokenizer.mask_token_id is None:
            raise ValueError("tokenizer has no mask_token, which stands for the words to be predicted; set one.")
        check_languages(self.languages)
        if self.max_length < 8:
            raise ValueError(f"max_length={self.max_length} leaves no room for a text; use 8 or more.")

    def __call__(self, records: Iterable[object], seed: int | None = None) -> dict[str, Any]:
        """The records' samples, packed; see `pack`. Without a `seed`, one is drawn from torch's generator."""
        if isinstance(records, str):
            raise ValueError(f"records is a text, {records[:40]!r}; pass a list of records.")
        random = Random(int(torch.randint(2**62, ())) if seed is None else operator.index(seed))
        return pack([sample for each in records for sample in self.samples(self.as_record(each), random)])

    @abstractmethod
    def samples(self, record: Any, random: Random) -> list[Sample]:
        """The samples that a record makes; none if it has nothing that can be predicted."""

    def as_record(self, given: object) -> Sentence | Pair:
        """A record of what a source yields.

        Args:
            given: a record; or its fields as a tuple, as a list, or by their names; or a text.

        Raises:
            ValueError: it is nothing of that, has other fields, or what should be a text is none.
        """
        kind, fields, found = self.record, self.record._fields, None
        required = len(fields) - len(kind._field_defaults)
        if isinstance(given, str) and kind is Sentence:
            found = Sentence(given)
        elif isinstance(given, dict) and all(name in given for name in fields[:required]):
            found = kind(**{name: given[name] for name in fields if name in given})
        elif isinstance(given, (tuple, list)) and required <= len(given) <= len(fields):
            found = kind(*given)
        if found is None or not all(isinstance(text, str) for text in found[:required]):
            raise ValueError(
                f"{self.name} needs records with {', '.join(fields[:required])}, which are texts (and maybe "
                f"{', '.join(fields[required:])}), as a tuple or by name; {given!r} came."
            )
        return found

    def _encode(self, text: str) -> list[int]:
        # Not verbose: it would warn of texts longer than the model's positions, which are cut afterwards.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode_pair(self, pair: Pair) -> tuple[list[int], list[int]] | None:
        """Both sides, the longer one cut until they fit; None if one of them is empty, and so no translation."""
        source, target = self._encode(pair.source), self._encode(pair.target)
        if not source or not target:
            return None
        surplus = len(source) + len(target) + SPECIAL_TOKENS_OF_PAIR - self.max_length
        return self.tokenizer.truncate_sequences(source, target, max(0, surplus))[:2]

    def _language(self, name: str | None) -> int:
        """The row of a language's embedding; -1 without language embeddings."""
        if not self.languages:
            return NO_LANGUAGE
        if name not in self.languages:
            raise ValueError(
                f"{self.name} got a text in language {name!r}, which is none of languages={list(self.languages)}; name "
                f"the language of every record, and give the model an embedding for each."
            )
        return list(self.languages).index(name)


class MMLM(Objective):
    """Multilingual masked language modelling: masked tokens of a text are predicted from the rest of it.

    A text that is longer than `max_length` becomes several samples.
    """

    name, record = "mmlm", Sentence

    def samples(self, record: Sentence, random: Random) -> list[Sample]:
        ids, room = self._encode(record.text), self.max_length - SPECIAL_TOKENS_OF_TEXT
        pieces = [ids[start : start + room] for start in range(0, len(ids), room)]
        found = (self._masked(self.tokenizer.build_inputs_with_special_tokens(piece), random) for piece in pieces)
        return [sample for sample in found if sample is not None]

    def _masked(self, ids: list[int], random: Random) -> Sample | None:
        masked, labels = self.masking.apply(ids, self.tokenizer, random)
        return _with_labels(Sample(self.name, masked, labels, list(range(len(ids)))))


class TLM(Objective):
    """Translation language modelling: masked tokens of a text and of its translation are predicted from both.

    Positions count through the pair, as in `tokenizer(source, target)`. (In XLM, where TLM comes from, those of the
    translation begin at 0; ERNIE-M's paper does not say.)
    """

    name, record = "tlm", Pair

    def samples(self, record: Pair, random: Random) -> list[Sample]:
        sides = self._encode_pair(record)
        if sides is None:
            return []
        ids = self.tokenizer.build_inputs_with_special_tokens(*sides)
        masked, labels = self.masking.apply(ids, self.tokenizer, random)
        sample = _with_labels(Sample(self.name, masked, labels, list(range(len(ids)))))
        return [] if sample is None else [sample]


@dataclass(frozen=True, kw_only=True)
class CAMLM(Objective):
    """Cross-attention masked language modelling: masked tokens of each side are predicted from the other side alone.

    A masked token attends to the other side's unmasked tokens and to its own side's masked ones, which tell it nothing
    but their positions; an unmasked token attends to the unmasked tokens of its own side. So no token of its own side
    reaches a prediction in any layer. [CLS] and the first [SEP] are the source's, the other two [SEP] the target's.

    A sample's tokens are in this order, in which the keys of each are a range: the source's unmasked tokens, the
    target's masked ones, the source's masked ones, the target's unmasked ones. Positions are those of the pair.

    With `languages`, the embedding of its language is added to every masked token, and to no others, so that the model
    without it encodes texts as it was trained to. Where the paper adds it is not said.

    Raises:
        ValueError: `masking` does not replace all chosen tokens by [MASK]: others would show what they are.
    """

    name: ClassVar[str] = "camlm"
    record: ClassVar[type] = Pair
    masking: Masking = field(default_factory=lambda: Masking(mask=1.0, random=0.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masking.mask != 1:
            raise ValueError(
                f"masking.mask={self.masking.mask} leaves chosen tokens visible to the masked ones beside them; use "
                f"Masking(rate={self.masking.rate}, mask=1.0, random=0.0)."
            )

    def samples(self, record: Pair, random: Random) -> list[Sample]:
        sides = self._encode_pair(record)
        if sides is None:
            return []
        source, target = sides
        ids = self.tokenizer.build_inputs_with_special_tokens(source, target)
        half = len(source) + 2  # [CLS] source [SEP]
        masked_source = self.masking.choose(ids[:half], self.tokenizer, random)
        masked_target = [half + place for place in self.masking.choose(ids[half:], self.tokenizer, random)]
        languages = self._language(record.source_language), self._language(record.target_language)
        masked = set(masked_source) | set(masked_target)
        seen_source = [place for place in range(half) if place not in masked]
        seen_target = [place for place in range(half, len(ids)) if place not in masked]
        sample = self._arrange(ids, [seen_source, masked_target, masked_source, seen_target], languages)
        return [] if sample is None else [sample]

    def _arrange(self, ids: list[int], parts: list[list[int]], languages: tuple[int, int]) -> Sample | None:
        """The sample of four parts, each the places of its tokens in `ids`, in the order of the class's docstring."""
        seen_source, masked_target, masked_source, seen_target = map(len, parts)
        before_target, before_source, total = seen_source, seen_source + masked_target, len(ids)
        last = total - seen_target
        ranges = [[0, before_target]] * seen_source + [[0, before_source]] * masked_target
        ranges += [[before_source, total]] * masked_source + [[last, total]] * seen_target
        places = [place for part in parts for place in part]
        hidden = range(before_target, last)  # both sides' masked tokens
        input_ids, labels = [ids[place] for place in places], unlabelled(total)
        for index in hidden:
            labels[index], input_ids[index] = input_ids[index], self.tokenizer.mask_token_id
        language_ids = None
        if self.languages:
            none = [NO_LANGUAGE]
            language_ids = none * seen_source + [languages[1]] * masked_target + [languages[0]] * masked_source
            language_ids += none * seen_target
        return _with_labels(Sample(self.name, input_ids, labels, places, ranges, language_ids))


@dataclass(frozen=True, kw_only=True)
class BTMLM(Objective):
    """Back-translation masked language modelling: the model translates a text for itself, as far as it can.

    In a first step placeholders behind the text, which attend to it and to each other, are predicted all at once,
    without gradient and without dropout: pseudo tokens of another language. In a second step masked tokens of the text
    are predicted from the rest of it and from the pseudo tokens. The model does both in one forward; a sample is the
    second step's `[CLS] text [SEP] [SEP] placeholders [SEP]`.

    The target language is drawn from `languages`, with equal chances, and its embedding is added to the placeholders.
    Without `languages` the model is not told one. The paper gives neither the number of pseudo tokens nor how they are
    drawn.

    Attributes:
        share: number of pseudo tokens for each token of the text, at least one.
        temperature: 1 draws pseudo tokens from the model's distribution, smaller ones draw likelier tokens, 0 takes the
            likeliest.

    Raises:
        ValueError: `share` is not above 0, `temperature` is negative, one of them is no finite number, or there is a
            single language.
    """

    name: ClassVar[str] = "btmlm"
    record: ClassVar[type] = Sentence
    share: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < math.inf or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"share={self.share} must be above 0, and temperature={self.temperature} must not be negative, both "
                f"finite."
            )
        if len(self.languages) == 1:
            raise ValueError(f"languages={list(self.languages)} has no other language to translate into; name two.")

    def samples(self, record: Sentence, random: Random) -> list[Sample]:
        ids = self._encode(record.text)
        room = max(1, int((self.max_length - SPECIAL_TOKENS_OF_PAIR) / (1 + self.share)))
        found = (self._masked(ids[start : start + room], record, random) for start in range(0, len(ids), room))
        return [sample for sample in found if sample is not None]

    def _masked(self, text: list[int], record: Sentence, random: Random) -> Sample | None:
        room = self.max_length - SPECIAL_TOKENS_OF_PAIR - len(text)
        count = min(room, max(1, round(self.share * len(text))))
        placeholders = [self.tokenizer.mask_token_id] * count
        source, (rest, labels) = len(text) + 2, self.masking.apply(text, self.tokenizer, random)
        ids = self.tokenizer.build_inputs_with_special_tokens(rest, placeholders)
        labels = [*unlabelled(1), *labels, *unlabelled(len(ids) - len(text) - 1)]
        pseudo, language_ids = range(source + 1, source + 1 + count), None
        if self.languages:
            own = self._language(record.language)
            other = random.choice([each for each in range(len(self.languages)) if each != own])
            language_ids = [other if place in pseudo else NO_LANGUAGE for place in range(len(ids))]
        rest = language_ids, source, list(pseudo), self.temperature
        return _with_labels(Sample(self.name, ids, labels, list(range(len(ids))), None, *rest))


def _with_labels(sample: Sample) -> Sample | None:
    """The sample; None if it has nothing that is to be predicted."""
    return sample if any(label >= 0 for label in sample.labels) else None
