"""ErnieMTokenizer: SentencePiece pieces, cut further at ideographs, punctuation and digits, with ids from vocab.txt.

Tokens and ids equal those of transformers 4.57.6. New are the offsets of every token in the text, and batches on
SentencePiece's threads; and every string can be tokenized.
"""

import contextlib
import functools
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import sentencepiece
from tokenizers.normalizers import Lowercase, Normalizer
from tokenizers.normalizers import Sequence as NormalizerSequence
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_python import Trie
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER, TruncationStrategy
from transformers.utils import PaddingStrategy, logging

from . import pretokenization as ways
from . import truncation
from .alignment import AlignedText, Part, align
from .configuration import RESERVED_POSITIONS, ErnieMConfig
from .conversion import paddle_config
from .conversion.files import hub_options, look
from .encodings import EncodedSequence, Encodings, Row
from .pretokenization import SPACE

logger = logging.get_logger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "vocab.txt", "sentencepiece_model_ckpt": "sentencepiece.bpe.model"}
BAIDUS_SENTENCEPIECE = "piece.model"
RESOURCE_FILES_NAMES = {"sentencepiece_model_file": "sentencepiece.bpe.model", "vocab_file": "vocab.txt"}

Tokenizer = TypeVar("Tokenizer", bound="ErnieMTokenizer")

SURROGATES = re.compile("[\ud800-\udfff]")

# Starting a thread costs as much as encoding about this many characters (2 cores, SentencePiece 0.2.0 and 0.2.3).
CHARACTERS_PER_THREAD = 2048


class ErnieMTokenizer(PreTrainedTokenizer):
    """Drop-in replacement for the ErnieMTokenizer of transformers 4.57.6, for transformers 5.

    With `return_overflowing_tokens=True` a call also returns the tokens that truncation cuts off: as ids in
    `overflowing_tokens`, like transformers 4; or, with `return_tensors=` or `return_offsets_mapping=True`, as windows,
    like fast tokenizers. Then each window is a row, even for a single text; neighbours share `stride` tokens; tensors
    are padded; and `overflow_to_sample_mapping` holds the index of each row's text.

    Args:
        sentencepiece_model_ckpt (`str`): path of the SentencePiece model.
        vocab_file (`str`, *optional*): path of the vocabulary, with one token per line; a token's id is its line's
            number, counted from 0, or follows the token after a tab, as in Baidu's files. Without it the ids are
            SentencePiece's own, which no published checkpoint uses.
        do_lower_case (`bool`): lower-case everything but special tokens.
        encoding (`str`): ignored, because files are UTF-8; it keeps the order of the arguments.
        unk_token, sep_token, pad_token, cls_token, mask_token (`str`): the special tokens.
        sp_model_kwargs (`dict`, *optional*): arguments of `sentencepiece.SentencePieceProcessor`.
            `enable_sampling=True` samples the segmentation, with `alpha` (default 0.1) and `nbest_size` (default 64);
            `num_threads` limits the threads of a batch (default: one per core).
        pretokenization (`str`): how pieces become tokens: as in "transformers" 4.57.6, in "paddlenlp" (2.3.7 and later;
            UIE-M's), in Baidu's "original", or as "sentencepiece" cuts them; see `erniem_fast.pretokenization`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: `from_pretrained` does not find one of the two files, or the SentencePiece model cannot be read; or
            `pretokenization` is unknown.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    resource_files_names = RESOURCE_FILES_NAMES
    # The model has no token types.
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (an instance may set its own: the base class does)

    # Full-width forms and their ASCII characters, except the full-width tilde, which is another punctuation mark.
    SP_CHAR_MAPPING = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5E)}  # noqa: RUF012

    def __init__(
        self,
        sentencepiece_model_ckpt,
        vocab_file=None,
        do_lower_case=False,
        encoding="utf8",
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        sp_model_kwargs: dict[str, Any] | None = None,
        pretokenization: str = "transformers",
        **kwargs,
    ):
        ways.check_way(pretokenization)
        self.pretokenization = pretokenization
        if source := kwargs.get("name_or_path"):
            _require_checkpoint_files(source, sentencepiece_model_ckpt=sentencepiece_model_ckpt, vocab_file=vocab_file)
        self.sp_model_kwargs = {} if sp_model_kwargs is None else sp_model_kwargs
        self.do_lower_case = do_lower_case
        self.sentencepiece_model_ckpt = sentencepiece_model_ckpt
        self.sp_model = _load_sentencepiece(sentencepiece_model_ckpt, self.sp_model_kwargs)
        if vocab_file is None:
            self.vocab = {self.sp_model.id_to_piece(index): index for index in range(self.sp_model.get_piece_size())}
        else:
            self.vocab = self.load_vocab(vocab_file)
        self.reverse_vocab = {index: token for token, index in self.vocab.items()}
        # The tokens of known pieces. `datasets` leaves an attribute with this name out of a tokenizer's fingerprint.
        self.cache = {}
        super().__init__(
            do_lower_case=do_lower_case,
            unk_token=unk_token,
            sep_token=sep_token,
            pad_token=pad_token,
            cls_token=cls_token,
            mask_token=mask_token,
            vocab_file=vocab_file,
            encoding=encoding,
            sp_model_kwargs=self.sp_model_kwargs,
            pretokenization=pretokenization,
            **kwargs,
        )

    @classmethod
    def from_pretrained(
        cls: type[Tokenizer], pretrained_model_name_or_path: str | os.PathLike, *init_inputs, **kwargs
    ) -> Tokenizer:
        """Loads a tokenizer, with the base class's arguments, also from folders of PaddleNLP and Baidu.

        `model_max_length` is at most the number of tokens that the checkpoint's model has positions for, unless it is
        given as an argument. `pretokenization` is "paddlenlp" for a UIE-M, whose weights were trained so, unless it is
        given as an argument or by the checkpoint's tokenizer_config.json.

        Raises:
            ValueError: the checkpoint lacks a file, `max_position_embeddings` in its config.json is not an integer, or
                that config is of another model of Paddle's.
        """
        source, options = pretrained_model_name_or_path, hub_options(kwargs)
        is_folder = os.path.isdir(source) and "sentencepiece_model_ckpt" not in kwargs
        if is_folder and not look(source, VOCAB_FILES_NAMES["sentencepiece_model_ckpt"], options):
            path = look(source, BAIDUS_SENTENCEPIECE, options)
            kwargs |= {"sentencepiece_model_ckpt": path} if path else {}
        config = _read_config(source, options)
        if config.get("uie_padded_length") is not None and "pretokenization" not in kwargs:
            saved = get_tokenizer_config(source, **options)
            kwargs["pretokenization"] = saved.get("pretokenization", "paddlenlp")
        tokenizer = super().from_pretrained(source, *init_inputs, **kwargs)
        if "model_max_length" not in kwargs:
            positions = _count_positions(source, config)
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
        return tokenizer

    def __getstate__(self) -> dict:
        # The pickle holds the model itself, not its path, because the file may not exist where the pickle is read.
        # Equal tokenizers must have equal pickles. So the cache and the warnings, which depend on the texts seen so
        # far, are emptied, and the trie's set, whose order depends on the process, is sorted.
        return self.__dict__ | {
            "sp_model": self.sp_model.serialized_model_proto(),
            "tokens_trie": sorted(self.tokens_trie._tokens),
            "cache": {},
            "deprecation_warnings": {},
        }

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        self.sp_model = sentencepiece.SentencePieceProcessor(**self.sp_model_kwargs)
        self.sp_model.load_from_serialized_proto(state["sp_model"])
        self.tokens_trie = Trie(state["tokens_trie"])

    @property
    def is_fast(self) -> bool:
        """Whether calls return offsets and words, for which pipelines and others ask this."""
        return True

    @property
    def backend_tokenizer(self) -> "_Backend":
        """Holds a `normalizer`, by which sentence-transformers lower-cases."""
        return _Backend(self)

    # ---- Vocabulary

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def get_vocab(self) -> dict[str, int]:
        return self.vocab | self.added_tokens_encoder

    def load_vocab(self, filepath) -> dict[str, int]:
        """Reads a vocabulary, one token per line, and returns each token's id.

        That is its line's number, counted from 0, or what follows the token after a tab.

        Raises:
            FileNotFoundError: `filepath` is not a file.
        """
        _require_file("vocab_file", filepath)
        with open(filepath, encoding="utf-8") as lines:
            return dict(_token_and_id(line.rstrip("\n"), number) for number, line in enumerate(lines))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Writes vocab.txt and sentencepiece.bpe.model.

        Args:
            save_directory: an existing directory.
            filename_prefix: put before the name of the vocabulary, with a dash; the model keeps its name.

        Returns:
            The path of the vocabulary, in a tuple.

        Raises:
            NotADirectoryError: `save_directory` is not a directory.
        """
        if not os.path.isdir(save_directory):
            raise NotADirectoryError(f"save_directory={str(save_directory)!r} is not a directory: create it first")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        vocab_file = os.path.join(save_directory, prefix + VOCAB_FILES_NAMES["vocab_file"])
        size = max(self.reverse_vocab, default=-1) + 1
        if size != len(self.vocab):
            # An id is a line's number. An empty line for an id without a token keeps the ids of the tokens after it.
            logger.warning(f"{vocab_file}: {size - len(self.vocab)} ids have no token and become empty lines")
        with open(vocab_file, "w", encoding="utf-8") as file:
            file.writelines(f"{self.reverse_vocab.get(index, '')}\n" for index in range(size))
        with open(os.path.join(save_directory, VOCAB_FILES_NAMES["sentencepiece_model_ckpt"]), "wb") as file:
            file.write(self.sp_model.serialized_model_proto())
        return (vocab_file,)

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """The id of a token, or the ids of a list of tokens; unknown tokens have the id of [UNK]."""
        if isinstance(tokens, str):
            return super().convert_tokens_to_ids(tokens)
        # The base class does the same, but with two calls per token.
        vocab, added, unknown = self.vocab, self._added_tokens_encoder, self._convert_token_to_id(self.unk_token)
        return [added[token] if token in added else vocab.get(token, unknown) for token in tokens]

    def _convert_token_to_id(self, token: str) -> int:
        index = self.vocab.get(token)
        if index is None:
            # Without a vocab.txt, [UNK] is an added token.
            index = self.vocab.get(self.unk_token, self._added_tokens_encoder.get(self.unk_token))
        return index

    def _convert_id_to_token(self, index: int) -> str:
        return self.reverse_vocab.get(index, self.unk_token)

    # ---- Text to tokens

    def tokenize(self, text: str, split_special_tokens: bool | None = None, **kwargs) -> list[str]:
        """Cuts a text into tokens.

        Args:
            text: any string; unpaired surrogates, which UTF-8 cannot hold, count as U+FFFD.
            split_special_tokens: whether to cut special and added tokens like other text (default: the attribute).
            kwargs: ignored, as in the base class.

        Returns:
            The tokens, without [CLS] and [SEP].

        Raises:
            TypeError: `text` is not a string.
        """
        return [token for part in self._tokenize_texts([text], split_special_tokens)[0] for token in part.tokens]

    def get_offset_mapping(self, text: str | None) -> list[tuple[int, int]] | None:
        """Finds the characters that each token of `tokenize(text)` came from.

        A span has no spaces at its ends. A token that stands for nothing but a space has the span of the character
        after it, as in fast tokenizers. If normalisation expands one character (½) to several tokens, they share its
        span.

        Returns:
            A list of (start, end), both ascending, with `text[start:end]` the characters; None if `text` is None.

        Raises:
            TypeError: `text` is neither a string nor None.
            ValueError: SentencePiece's pieces do not spell the text, because of `sp_model_kwargs` or byte fallback.
        """
        return None if text is None else align(self._tokenize_texts([text])[0], self.sp_model)[0]

    def clean_text(self, text: str) -> str:
        """Replaces full-width forms by ASCII characters."""
        return text.translate(str.maketrans(self.SP_CHAR_MAPPING))

    def _tokenize_texts(self, texts: Sequence[str], split_special_tokens: bool | None = None) -> list[list[Part]]:
        """The parts of each text, with their tokens; SentencePiece gets all texts in one batch."""
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        added = () if split_special_tokens else self._added_tokens_encoder.keys()
        all_parts = [
            [
                Part(part, [part.text]) if part.text in added else Part(self._clean(part))
                for part in self._split_at_added_tokens(self._prepare(text), added)
            ]
            for text in texts
        ]
        others = [part for parts in all_parts for part in parts if part.tokens is None]
        for part, pieces in zip(others, self._encode_pieces([part.text.text for part in others]), strict=True):
            part.tokens = self._cut_pieces(pieces)
        return all_parts

    def _prepare(self, text: str) -> AlignedText:
        """Lower-cases as 4.57.6 does: character by character, and not in special tokens."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {text!r}")
        text = SURROGATES.sub("\ufffd", text)
        if not self.do_lower_case:
            return AlignedText(text, range(len(text)))
        kept = self.all_special_tokens + [
            token.content for token in self._added_tokens_decoder.values() if token.normalized and not token.special
        ]
        characters = []
        for index, part in enumerate(re.split(f"({'|'.join(map(re.escape, kept))})", text)):
            characters += part if index % 2 else map(str.lower, part)
        # The lower case of one character, İ, has two characters.
        positions = [index for index, character in enumerate(characters) for _ in character]
        return AlignedText("".join(characters), positions)

    def _clean(self, part: AlignedText) -> AlignedText:
        if self.pretokenization != "original":
            return part
        characters = list(ways.cleaned(part.text))
        positions = [part.positions[index] for index, _ in characters]
        return AlignedText("".join(character for _, character in characters), positions)

    def _split_at_added_tokens(self, text: AlignedText, added: Iterable[str]) -> list[AlignedText]:
        """Splits a text into added tokens and the text between them, without empty parts."""
        # The trie loops over the text in Python, which is slow, so use it only if the text has an added token.
        if not any(token in text.text for token in added):
            return [text] if text.text else []
        ends = itertools.accumulate(map(len, self.tokens_trie.split(text.text)))
        parts = [text[start:end] for start, end in itertools.pairwise([0, *ends])]
        for index, part in enumerate(parts):
            if part.text not in added:
                continue
            token = self._added_tokens_decoder[self._added_tokens_encoder[part.text]]
            left = parts[index - 1] if index else AlignedText("", ())
            right = parts[index + 1] if index + 1 < len(parts) else AlignedText("", ())
            if token.rstrip and right.text:
                parts[index + 1] = right.lstrip()
            if token.lstrip and left.text:
                parts[index - 1] = left.rstrip()
            if token.single_word and left.text and left.text[-1] != " ":
                parts[index - 1], parts[index] = parts[index - 1] + part, AlignedText("", ())
            elif token.single_word and right.text and right.text[0] != " ":
                parts[index + 1], parts[index] = part + parts[index + 1], AlignedText("", ())
        return [part for part in parts if part.text]

    def _encode_pieces(self, texts: list[str]) -> Iterator[list[str]]:
        """The SentencePiece pieces of each text."""
        sampling = {}
        if self.sp_model_kwargs.get("enable_sampling"):
            defaults = {"enable_sampling": True, "alpha": 0.1, "nbest_size": 64}
            sampling = {name: self.sp_model_kwargs.get(name, default) for name, default in defaults.items()}
        threads = min(self._max_threads(), sum(map(len, texts)) // CHARACTERS_PER_THREAD)
        # Every batch starts new threads, each with a random generator that begins at the seed. With sampling, they
        # would cut a text the same way each time.
        if sampling or threads < 2:
            return (self.sp_model.encode(text, out_type=str, **sampling) for text in texts)
        return iter(self.sp_model.encode(texts, out_type=str, num_threads=threads))

    def _max_threads(self) -> int:
        limit = self.sp_model_kwargs.get("num_threads", -1)
        return limit if limit > 0 else os.cpu_count() or 1

    def _cut_pieces(self, pieces: list[str]) -> list[str]:
        """The tokens of a text, from its pieces."""
        if self.pretokenization == "sentencepiece":
            return list(pieces)
        if self.pretokenization == "original":
            encode = functools.partial(self.sp_model.encode, out_type=str)
            return list(ways.without_digit_commas(pieces, encode))
        keeps_spaces = self.pretokenization == "transformers"
        tokens, cuts = [], self.cache
        for index, piece in enumerate(pieces):
            if piece != SPACE:
                tokens += cuts.get(piece) or self._cut_piece(piece)
            # Between other pieces, a lone space is a token if the next piece does not start with a space.
            elif keeps_spaces and 0 < index < len(pieces) - 1 and not pieces[index + 1].startswith(SPACE):
                tokens.append(piece)
        return tokens

    def _cut_piece(self, piece: str) -> list[str]:
        """Cuts a piece around every ideograph, punctuation mark and run of digits, and drops a space left alone."""
        cuts = {0, len(piece)}
        for index, character in enumerate(piece):
            if self.is_ch_char(character) or self.is_punct(character):
                cuts |= {index, index + 1}
            elif index and character != SPACE and character.isdigit() != piece[index - 1].isdigit():
                cuts.add(index)
        bounds = itertools.pairwise(sorted(cuts))
        tokens = [piece[start:end] for start, end in bounds if piece[start:end] != SPACE or end == len(piece)]
        # Unknown pieces are unbounded in number; cache only known ones.
        if self.sp_model.piece_to_id(piece) != self.sp_model.unk_id():
            self.cache[piece] = tokens
        return tokens

    # ---- Tokens to text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace(SPACE, " ").strip()

    def convert_ids_to_string(self, ids: list[int]) -> str:
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(ids))

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **kwargs,
    ) -> str:
        """`decode` calls this. As in transformers 4, added tokens stay separate; transformers 5 joins them."""
        tokens = self.convert_ids_to_tokens(token_ids, skip_special_tokens=skip_special_tokens)
        separate = self._added_tokens_encoder.keys() - self.all_special_tokens
        separate |= {
            token for token in self.extra_special_tokens if self.convert_tokens_to_ids(token) >= self.vocab_size
        }
        tokens = [tokens] if isinstance(tokens, str) else tokens
        texts = []
        for is_separate, group in itertools.groupby(tokens, separate.__contains__):
            group = list(group)
            texts += group if is_separate else [self.convert_tokens_to_string(group)]
        text = (" " if spaces_between_special_tokens else "").join(filter(None, texts))
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    # ---- Tokens to model inputs

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        # To count them, the base class would build an example for every example that it prepares.
        return 4 if pair else 2

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Returns `[CLS] A [SEP]`, or `[CLS] A [SEP] [SEP] B [SEP]` for a pair."""
        cls, sep = [self.cls_token_id], [self.sep_token_id]
        if token_ids_1 is None:
            return cls + token_ids_0 + sep
        return cls + token_ids_0 + sep + sep + token_ids_1 + sep

    def build_offset_mapping_with_special_tokens(self, offset_mapping_0: list, offset_mapping_1: list | None = None):
        """Returns the spans of `build_inputs_with_special_tokens`: (0, 0) for every special token."""
        special = [(0, 0)]
        if offset_mapping_1 is None:
            return special + offset_mapping_0 + special
        return special + offset_mapping_0 + special + special + offset_mapping_1 + special

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Returns 1 for [CLS], [SEP] and padding, 0 for all other tokens.

        Args:
            token_ids_0: ids of the first sequence; with `already_has_special_tokens=True`, of the whole example.
            token_ids_1: ids of the second sequence.
            already_has_special_tokens: whether `token_ids_0` includes the special tokens.

        Raises:
            ValueError: `token_ids_1` is given with `already_has_special_tokens=True`.
        """
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError(
                    "token_ids_1 must be None with already_has_special_tokens=True: token_ids_0 holds both sequences"
                )
            special = (self.sep_token_id, self.cls_token_id, self.pad_token_id)
            return [int(index in special) for index in token_ids_0]
        if token_ids_1 is None:
            return [1] + [0] * len(token_ids_0) + [1]
        return [1] + [0] * len(token_ids_0) + [1, 1] + [0] * len(token_ids_1) + [1]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Returns 0 for `[CLS] A [SEP]`; for a pair, 0 for `[CLS] A` and 1 for `[SEP] [SEP] B [SEP]`."""
        if token_ids_1 is None:
            return [0] * (len(token_ids_0) + 2)
        return [0] * (len(token_ids_0) + 1) + [1] * (len(token_ids_1) + 3)

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str | TruncationStrategy = TruncationStrategy.LONGEST_FIRST,
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Removes tokens from one or two sequences of ids that have no special tokens yet.

        Returns:
            The rest of `ids`; the rest of `pair_ids`, or None; and the tokens that were cut off, with up to `stride`
            neighbouring tokens. If longest_first cut a pair, this last list is empty.
        """
        sequences, strategy = [ids] if pair_ids is None else [ids, pair_ids], TruncationStrategy(truncation_strategy)
        lengths = [len(sequence) for sequence in sequences]
        sizes = truncation.sizes_to_keep(lengths, num_tokens_to_remove, strategy)
        side = self.truncation_side
        left = [each[truncation.kept(len(each), size, side)] for each, size in zip(sequences, sizes, strict=True)]
        if pair_ids is None:
            left.append(None)
        elif strategy == TruncationStrategy.LONGEST_FIRST:
            return *left, []
        return *left, truncation.overflow(sequences, sizes, stride, side)

    def prepare_for_model(
        self, ids: list[int], pair_ids: list[int] | None = None, return_tensors=None, prepend_batch_axis=False, **kwargs
    ) -> BatchEncoding:
        """`tokenizer(ids, pair_ids)` for one example of ids; tensors get a batch axis only if `prepend_batch_axis`."""
        encoding = self(ids, pair_ids, is_split_into_words=True, **kwargs)
        return encoding.convert_to_tensors(return_tensors, prepend_batch_axis)

    def _encode_plus(
        self,
        text,
        text_pair=None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_offsets_mapping: bool = False,
        split_special_tokens: bool | None = None,
        **kwargs,
    ) -> BatchEncoding:
        """`tokenizer(...)` and `tokenizer.encode(...)` call this; `text` is one example or a batch."""
        is_batch, examples = _as_batch(text, text_pair, is_split_into_words)
        sequences = [self._as_list(sequence, is_split_into_words) for example in examples for sequence in example]
        encoded = self._encode_sequences(sequences, split_special_tokens, is_split_into_words)
        # Overflowing ids of different lengths cannot be a tensor, and they have no offsets. Windows solve both.
        with_windows = return_overflowing_tokens and (return_tensors is not None or return_offsets_mapping)
        if with_windows and return_tensors is not None and padding_strategy == PaddingStrategy.DO_NOT_PAD:
            padding_strategy = PaddingStrategy.LONGEST
        outputs, rows = {"input_ids": []}, []
        for index, example in enumerate(examples):
            for row, fields in self._prepare_example(
                tuple(itertools.islice(encoded, len(example))),
                max_length=max_length,
                add_special_tokens=add_special_tokens,
                return_overflowing_tokens=return_overflowing_tokens,
                return_offsets_mapping=return_offsets_mapping,
                with_windows=with_windows,
                **kwargs,
            ):
                rows.append(row)
                if with_windows:
                    fields["overflow_to_sample_mapping"] = index
                for name, value in fields.items():
                    outputs.setdefault(name, []).append(value)
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        if padding_strategy != PaddingStrategy.DO_NOT_PAD:
            outputs = self.pad(
                outputs,
                padding=padding_strategy.value,
                max_length=max_length,
                pad_to_multiple_of=pad_to_multiple_of,
                padding_side=padding_side,
                return_attention_mask=return_attention_mask,
            )
        elif return_attention_mask:
            outputs["attention_mask"] = [[1] * len(ids) for ids in outputs["input_ids"]]
        lengths = [len(ids) for ids in outputs["input_ids"]]
        if "length" in outputs and not is_batch:
            outputs["length"] = lengths
        if not is_batch and not with_windows and return_tensors is None:
            outputs = {name: values[0] for name, values in outputs.items()}
        encodings = Encodings(self, rows, lengths, add_special_tokens, padding_side or self.padding_side)
        return BatchEncoding(outputs, encodings, return_tensors, n_sequences=len(examples[0]) if examples else None)

    def _as_list(self, sequence, is_split_into_words: bool) -> list[str] | list[int]:
        """A sequence as a list of words (a text is one word), or as a list of ids."""
        if isinstance(sequence, str):
            return [sequence]
        if isinstance(sequence, (list, tuple)):
            if all(isinstance(item, int) for item in sequence):
                return list(sequence)
            if all(isinstance(item, str) for item in sequence):
                return list(sequence) if is_split_into_words else self.convert_tokens_to_ids(list(sequence))
        raise ValueError(f"text and text_pair must be strings, or lists of strings or of ids, not {sequence!r}")

    def _encode_sequences(
        self, sequences: list[list], split_special_tokens: bool | None, is_split_into_words: bool
    ) -> Iterator[EncodedSequence]:
        texts = [item for sequence in sequences for item in sequence if isinstance(item, str)]
        tokenized = iter(self._tokenize_texts(texts, split_special_tokens))
        for sequence in sequences:
            if sequence and isinstance(sequence[0], int):
                yield EncodedSequence(sequence, None, is_split_into_words, self.sp_model)
                continue
            all_parts = list(itertools.islice(tokenized, len(sequence)))
            ids = self.convert_tokens_to_ids([token for parts in all_parts for part in parts for token in part.tokens])
            yield EncodedSequence(ids, all_parts, is_split_into_words, self.sp_model)

    def _prepare_example(
        self,
        sequences: tuple[EncodedSequence, ...],
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        stride: int = 0,
        add_special_tokens: bool = True,
        return_overflowing_tokens: bool = False,
        with_windows: bool = False,
        verbose: bool = True,
        **kwargs,
    ) -> Iterator[tuple[Row, dict[str, Any]]]:
        """The rows of an example of one or two sequences, not padded: one row, or one for each window."""
        ids = [sequence.ids for sequence in sequences]
        is_pair = len(ids) == 2
        if return_overflowing_tokens and is_pair and truncation_strategy == TruncationStrategy.LONGEST_FIRST:
            raise ValueError(
                "return_overflowing_tokens=True does not work with truncation='longest_first' for a pair, because both "
                "texts may overflow: use truncation='only_first' or 'only_second'"
            )
        lengths = [len(sequence) for sequence in ids]
        num_special = self.num_special_tokens_to_add(is_pair) if add_special_tokens else 0
        excess = 0 if max_length is None else sum(lengths) + num_special - max_length
        sizes = truncation.sizes_to_keep(lengths, excess if max_length else 0, truncation_strategy)
        side = self.truncation_side
        if with_windows:
            parts = [truncation.windows(*each, stride, side) for each in zip(lengths, sizes, strict=True)]
        else:
            parts = [[truncation.kept(*each, side)] for each in zip(lengths, sizes, strict=True)]
        for windows in itertools.product(*parts):
            row = Row(sequences, windows)
            fields = self.arrange(row, add_special_tokens, **kwargs)
            self._eventual_warn_about_too_long_sequence(fields["input_ids"], max_length, verbose)
            if return_overflowing_tokens and not with_windows:
                fields["overflowing_tokens"] = truncation.overflow(ids, sizes, stride, side)
                fields["num_truncated_tokens"] = excess
            yield row, fields

    def arrange(
        self,
        row: Row,
        add_special_tokens: bool,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        **kwargs,
    ) -> dict[str, Any]:
        """The fields of a row, not padded."""
        ids = [sequence.ids[window] for sequence, window in zip(row.sequences, row.windows, strict=True)]
        if add_special_tokens:
            fields = {"input_ids": self.build_inputs_with_special_tokens(*ids)}
        else:
            fields = {"input_ids": list(itertools.chain(*ids))}
        if return_token_type_ids or (return_token_type_ids is None and "token_type_ids" in self.model_input_names):
            if add_special_tokens:
                fields["token_type_ids"] = self.create_token_type_ids_from_sequences(*ids)
            else:
                fields["token_type_ids"] = [number for number, sequence in enumerate(ids) for _ in sequence]
        if return_special_tokens_mask:
            special = self.get_special_tokens_mask(*ids) if add_special_tokens else [0] * len(fields["input_ids"])
            fields["special_tokens_mask"] = special
        if return_offsets_mapping:
            spans, join = row.cut("spans"), self.build_offset_mapping_with_special_tokens
            fields["offset_mapping"] = join(*spans) if add_special_tokens else list(itertools.chain(*spans))
        if return_length:
            fields["length"] = len(fields["input_ids"])
        return fields

    def _pad(
        self,
        encoded_inputs,
        *args,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        **kwargs,
    ) -> dict:
        # A given mask may contain zeros, so it is padded even if no new mask is asked for. Rows without a mask may be
        # padded already, by tokenizers that make no mask, so they get the mask that the model would derive from ids.
        if "attention_mask" in encoded_inputs:
            return_attention_mask = True
        elif return_attention_mask is None and "attention_mask" in self.model_input_names:
            encoded_inputs["attention_mask"] = [int(id_ != self.pad_token_id) for id_ in encoded_inputs["input_ids"]]
        padded = super()._pad(
            encoded_inputs, *args, padding_side=padding_side, return_attention_mask=return_attention_mask, **kwargs
        )
        if "offset_mapping" in padded:
            spans = padded["offset_mapping"]
            padding = [(0, 0)] * (len(padded["input_ids"]) - len(spans))
            on_the_left = (padding_side or self.padding_side) == "left"
            padded["offset_mapping"] = padding + spans if on_the_left else spans + padding
        return padded

    def encode_plus(self, text, text_pair=None, **kwargs) -> BatchEncoding:
        """The name that transformers 4 had for `tokenizer(text, text_pair)`."""
        return self(text, text_pair, **kwargs)

    def batch_encode_plus(self, batch_text_or_text_pairs, **kwargs) -> BatchEncoding:
        """The name that transformers 4 had for `tokenizer(texts)`, or for a list of pairs."""
        return self(batch_text_or_text_pairs, **kwargs)

    # ---- Kinds of characters

    def is_ch_char(self, char: str) -> bool:
        """Whether `char` is a CJK unified ideograph of the basic block."""
        return "\u4e00" <= char <= "\u9fff"

    def is_alpha(self, char: str) -> bool:
        """Whether `char` is a letter of ASCII."""
        return "a" <= char <= "z" or "A" <= char <= "Z"

    def is_punct(self, char: str) -> bool:
        """Whether `char` is a punctuation mark that is a token of its own."""
        return char in ",;:.?!~，；：。？！《》【】"  # noqa: RUF001

    def is_whitespace(self, char: str) -> bool:
        """Whether `char` is a space, a tab, a line's end or another space separator of Unicode."""
        return char in (" ", "\t", "\n", "\r") or (len(char) == 1 and unicodedata.category(char) == "Zs")


class _Backend:
    """The one attribute of a fast tokenizer's backend that has a meaning here: a normalizer that may lower-case."""

    def __init__(self, tokenizer: ErnieMTokenizer):
        self._tokenizer = tokenizer

    @property
    def normalizer(self) -> Lowercase | None:
        return Lowercase() if self._tokenizer.do_lower_case else None

    @normalizer.setter
    def normalizer(self, normalizer: Normalizer | None):
        parts = list(normalizer) if isinstance(normalizer, NormalizerSequence) else [normalizer]
        if not all(isinstance(part, Lowercase | None) for part in parts):
            raise ValueError(
                f"backend_tokenizer.normalizer={normalizer!r}: SentencePiece normalizes the text of an "
                f"ErnieMTokenizer. Only Lowercase can be added, as by do_lower_case=True"
            )
        self._tokenizer.do_lower_case = any(part is not None for part in parts)


def _as_batch(text, text_pair, is_split_into_words: bool) -> tuple[bool, list[tuple]]:
    """Interprets the arguments of `tokenizer(text, text_pair)`.

    Returns:
        Whether they are a batch; and the examples, each a tuple of one sequence or of the two sequences of a pair.
    """
    if not _is_batch(text, is_split_into_words):
        return False, [(text,) if text_pair is None else (text, text_pair)]
    if text_pair is None:
        return True, [_as_example(item, is_split_into_words) for item in text]
    if not isinstance(text_pair, (list, tuple)) or len(text_pair) != len(text):
        raise ValueError(f"text_pair must be a list as long as text, of {len(text)} texts, but is {text_pair!r}")
    return True, list(zip(text, text_pair, strict=True))


def _is_batch(text, is_split_into_words: bool) -> bool:
    if not isinstance(text, (list, tuple)):
        return False
    if not text:
        return not is_split_into_words
    return isinstance(text[0], (list, tuple) if is_split_into_words else (str, list, tuple))


def _as_example(item, is_split_into_words: bool) -> tuple:
    """The example of a batch's item: one sequence; or a tuple of two, or a list of two unless lists are of words."""
    is_sequence = not isinstance(item, (list, tuple)) or not item or isinstance(item[0], int)
    if is_sequence or (is_split_into_words and not isinstance(item, tuple)):
        return (item,)
    if len(item) > 2:
        raise ValueError(f"text holds {item!r}, of {len(item)} texts: give one, or a pair, or is_split_into_words=True")
    return tuple(item)


def _token_and_id(line: str, number: int) -> tuple[str, int]:
    token, tab, id_ = line.rpartition("\t")
    return (token, int(id_)) if tab and id_.isdecimal() else (line, number)


def _read_config(source, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of the config of a checkpoint's model; none if there is no config, or it is not ERNIE-M's."""
    config = {}
    with contextlib.suppress(OSError):
        config, _ = ErnieMConfig.get_config_dict(source, **options)
    if paddle_config.is_paddles(config):
        config = paddle_config.from_paddle(config)
    return config if config.get("model_type") == ErnieMConfig.model_type else {}


def _count_positions(source, config: dict[str, Any]) -> int:
    """The number of tokens that the model of a checkpoint has positions for; a very large number if it is not known."""
    if not config:
        return VERY_LARGE_INTEGER
    rows = config.get("max_position_embeddings", ErnieMConfig.max_position_embeddings)
    if type(rows) is not int:
        raise ValueError(
            f"max_position_embeddings={rows!r} in the config.json of {str(source)!r} is not a number of positions; "
            f"write the rows of the checkpoint's position table, {ErnieMConfig.max_position_embeddings} in ERNIE-M."
        )
    return rows - RESERVED_POSITIONS


def _load_sentencepiece(path, kwargs: dict[str, Any]) -> sentencepiece.SentencePieceProcessor:
    _require_file("sentencepiece_model_ckpt", path)
    model = sentencepiece.SentencePieceProcessor(**kwargs)
    try:
        model.load(os.fspath(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"sentencepiece_model_ckpt={str(path)!r} is not a SentencePiece model: copy it from the checkpoint again"
        ) from error
    return model


def _require_file(name: str, path):
    if path is None or not os.path.isfile(path):
        raise FileNotFoundError(f"{name}={str(path)!r} is not a file: give the path of {VOCAB_FILES_NAMES[name]}")


def _require_checkpoint_files(source: str, **paths):
    """Refuses missing files, for which `from_pretrained` passes None: without vocab.txt every id would be wrong.

    The error is a ValueError, because `from_pretrained` would replace an OSError by a message that names no file.
    """
    for name, path in paths.items():
        if path is None or not os.path.isfile(path):
            where = f"{source!r} holds no {VOCAB_FILES_NAMES[name]}" if path is None else f"{str(path)!r} is not a file"
            raise ValueError(f"{name}: {where}: copy it from the checkpoint, or pass its path as {name}=...")
