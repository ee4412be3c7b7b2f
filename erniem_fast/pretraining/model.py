"""ErnieMForPreTraining: the masked-LM head, trained by all objectives of ERNIE-M at once."""

import contextlib
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from ..configuration import ErnieMConfig
from ..inputs import check_range, extremes
from ..modeling import IGNORED_LABEL, ErnieMForMaskedLM, check_classes, loss_divisor
from ..vocabulary_loss import chunks
from .samples import NO_LANGUAGE, OBJECTIVES, check_languages
from .structure import FirstStep, Structure, encode, first_step


@dataclass
class PreTrainingOutput(ModelOutput):
    """The result of `ErnieMForPreTraining`.

    Attributes:
        loss: a scalar.
        loss_sums: float32 `(4,)`, without gradient: for each of `OBJECTIVES` the sum of its tokens' losses.
        label_counts: int64 `(4,)`, the number of these tokens.
    """

    loss: Tensor | None = None
    loss_sums: Tensor | None = None
    label_counts: Tensor | None = None


class LanguageEmbeddings(nn.Embedding):
    """A row for each language, zeros at first, so that a checkpoint computes what it did without."""


class ErnieMForPreTraining(ErnieMForMaskedLM):
    """`ErnieMForMaskedLM` on samples of any objectives, packed together; it saves and loads the same weights.

    With `languages`, it has language embeddings as well, which no released checkpoint has. `without_languages` leaves
    them out, and so do all other classes when they load what this one saved.
    """

    def __init__(self, config: ErnieMConfig, languages: Sequence[str] | None = None) -> None:
        """
        Args:
            config: the model's configuration.
            languages: names of the language embeddings; by default those in the config, where they are kept.

        Raises:
            ValueError: a language is named twice, `languages` is no list, or the config has others.
        """
        super().__init__(config)
        if languages is not None:
            languages, known = check_languages(languages), getattr(config, "languages", None)
            if known and languages not in ([], known):
                raise ValueError(
                    f"languages={languages} are not the config's, {known}, whose embeddings would get other names; "
                    f"leave languages out, or drop the embeddings: load the model with languages=[] and save it."
                )
            config.languages = languages
        names = getattr(config, "languages", None)
        self.language_embeddings = LanguageEmbeddings(len(names), config.hidden_size) if names else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LanguageEmbeddings):
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)

    def without_languages(self) -> ErnieMForMaskedLM:
        """The same model, with the same parameters, as a plain `ErnieMForMaskedLM`: save this one to publish it."""
        config = deepcopy(self.config)
        if hasattr(config, "languages"):
            del config.languages
        with torch.device("meta"):
            plain = ErnieMForMaskedLM(config)
        plain.ernie_m, plain.lm_head = self.ernie_m, self.lm_head
        return plain.train(self.training)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        cu_seq_lens_q: Tensor,
        max_length_q: int,
        objective_ids: Tensor,
        key_ranges: Tensor | None = None,
        language_ids: Tensor | None = None,
        pseudo_tokens: Tensor | None = None,
        source_lengths: Tensor | None = None,
        temperatures: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> PreTrainingOutput | tuple:
        """The loss of packed samples: the mean of -log p over all tokens that are to be predicted.

        Args:
            input_ids, labels, position_ids, cu_seq_lens_q, max_length_q, objective_ids, key_ranges, language_ids,
                pseudo_tokens, source_lengths, temperatures: as `pack` makes them.
            num_items_in_batch: what the sum of the losses is divided by; by default the number of labels that count.

        Returns:
            See `PreTrainingOutput`.

        Raises:
            ValueError: as in `ErnieMModel.forward`; or there are language ids, and the model has no such embeddings.
        """
        self._check(input_ids, labels, language_ids)
        structure = Structure(position_ids, cu_seq_lens_q, max_length_q, key_ranges)
        if pseudo_tokens is not None:
            first = first_step(input_ids, labels, structure, source_lengths)
            temperatures = structure.per_token(temperatures)[pseudo_tokens[0]]
            drawn = self._predict(first, pseudo_tokens, language_ids, temperatures)
            input_ids = input_ids.masked_scatter(pseudo_tokens, drawn)
            language_ids = None if language_ids is None else language_ids.masked_fill(pseudo_tokens, NO_LANGUAGE)
        hidden = encode(self.ernie_m, self._embed(input_ids, language_ids), structure)
        counted = labels[0] != IGNORED_LABEL
        total, losses = self.lm_head.losses(hidden[counted], labels[0, counted])
        objectives = structure.per_token(objective_ids)[counted]
        sums = losses.new_zeros(len(OBJECTIVES)).index_add(0, objectives, losses)
        loss = total / loss_divisor(num_items_in_batch, losses)
        found = PreTrainingOutput(loss, sums, objectives.bincount(minlength=len(OBJECTIVES)))
        return found if return_dict is not False else found.to_tuple()

    def _check(self, input_ids: Tensor, labels: Tensor, language_ids: Tensor | None) -> None:
        if language_ids is not None and self.language_embeddings is None:
            raise ValueError(
                "The samples name languages, but the model has no language embeddings; pass languages=… to "
                "ErnieMForPreTraining.from_pretrained, or leave them out of the objectives."
            )
        check_classes(labels, self.config.vocab_size, "check that tokenizer and model belong together")
        _check_rows("input_ids", input_ids, self.config.vocab_size)
        if language_ids is not None:
            names = self.config.languages
            languages = language_ids.clamp(min=0)  # negative ones stand for none
            _check_rows("language_ids", languages, len(names), f"give the objectives languages={names}, the model's")

    def _embed(self, input_ids: Tensor, language_ids: Tensor | None) -> Tensor:
        """`(1, tokens, hidden)`. Language embeddings take part without ids too, so that all parameters are trained."""
        embeds = self.ernie_m.get_input_embeddings()(input_ids)
        if self.language_embeddings is None:
            return embeds
        ids = input_ids.new_full(input_ids.shape, NO_LANGUAGE) if language_ids is None else language_ids
        return embeds + self.language_embeddings(ids.clamp(min=0)) * (ids >= 0)[..., None]

    @torch.no_grad()
    def _predict(
        self, first: FirstStep, pseudo_tokens: Tensor, language_ids: Tensor | None, temperatures: Tensor
    ) -> Tensor:
        """The words that BTMLM's first step predicts in the place of pseudo tokens, int64 `(pseudo tokens,)`.

        Special tokens are none of them: those at the ends of samples, placeholders and padding.
        """
        places, bounds = pseudo_tokens[0, first.chosen], first.structure.cu_seqlens.long()
        ids = first.input_ids[0]
        special = torch.cat([ids[places][:1], ids[bounds[:-1]], ids[bounds[1:] - 1]]).unique()
        with _evaluating(self):
            languages = None if language_ids is None else language_ids[:, first.chosen]
            hidden = encode(self.ernie_m, self._embed(first.input_ids, languages), first.structure)[places]
            drawn = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
            for rows in chunks(len(hidden), self.config.vocab_size):
                logits = self.lm_head(hidden[rows]).float()
                logits[:, special] = logits[:, self.config.pad_token_id] = -torch.inf
                drawn[rows] = _draw(logits, temperatures[rows, None])
        return drawn


def _check_rows(name: str, ids: Tensor, rows: int, remedy: str | None = None) -> None:
    """Refuses ids that are not rows of a table, unless on a GPU: reading them would be a synchronisation."""
    if ids.device.type == "cpu":
        check_range(name, ids, rows, {of: value.item() for of, value in extremes(name, ids).items()}, remedy)


def _draw(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Words, int64 `(tokens,)`, of logits `(tokens, words)` and temperatures `(tokens, 1)`."""
    sampled = (logits / temperatures.clamp(min=1e-6)).softmax(1).multinomial(1)
    return torch.where(temperatures > 0, sampled, logits.argmax(1, keepdim=True)).squeeze(1)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
