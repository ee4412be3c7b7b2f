"""Rows of a prompt and a text, and the probabilities that a model gives to their tokens as starts and ends."""

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..inputs import as_integer

# Special tokens of [CLS] prompt [SEP] [SEP] text [SEP].
SPECIAL_TOKENS = 4

# The tokens of a batch; a CPU gains nothing by more.
BATCH_TOKENS = {"cpu": 2048}
BATCH_TOKENS_ELSEWHERE = 8192

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

# A prompt has to leave room for at least this many tokens of the text.
LEAST_ROOM = 16


def tokens_of_batch(model, batch_tokens: int | None) -> int:
    """The number of tokens of a batch; None for the default on the model's device.

    Raises:
        ValueError: it is no such number.
    """
    if batch_tokens is None:
        return BATCH_TOKENS.get(model.device.type, BATCH_TOKENS_ELSEWHERE)
    return as_integer("batch_tokens", batch_tokens, 1)


def warn_if_untrained(model, remedy: str) -> None:
    """Warns if the weights that score starts and ends are random."""
    names = getattr(model, "untrained_weights", list)()
    if names:
        warnings.warn(
            f"What is found means nothing: {' and '.join(names)} of the model are random, because the checkpoint "
            f"that it was loaded from does not hold them; {remedy}.",
            stacklevel=4,
        )


def _return_freed_memory() -> None:
    """Gives the memory of freed tensors back to the system, with glibc.

    The activations of each batch have another size, so that they leave holes in the heap, in which those of the next
    find no place: the memory of the process would grow with the number of batches, to about twice what one needs.
    """
    if _TRIM is not None:
        _TRIM(0)


class Row(NamedTuple):
    """A prompt and a text, or a window of it, as ids."""

    prompt: Sequence[int]
    text: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.text) + SPECIAL_TOKENS

    def ids(self, cls: int, sep: int) -> list[int]:
        return [cls, *self.prompt, sep, sep, *self.text, sep]

    def prompt_columns(self) -> slice:
        return slice(1, 1 + len(self.prompt))

    def text_columns(self) -> slice:
        return slice(3 + len(self.prompt), 3 + len(self.prompt) + len(self.text))


class Scorer:
    """Runs a model on rows, batched by their tokens.

    Args:
        model: an `ErnieMForInformationExtraction`, or another model that returns `start_logits` and `end_logits`.
        tokenizer: its tokenizer.
        batch_tokens: the number of tokens of a batch; a single row may have more.
        progress: whether to show a bar; None for only where the standard error is a terminal.
    """

    def __init__(self, model, tokenizer, batch_tokens: int, progress: bool | None) -> None:
        self.model, self.batch_tokens = model, batch_tokens
        self.cls, self.sep, self.pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
        self.bar = tqdm(total=0, unit=" tokens", desc="extract", disable=None if progress is None else not progress)

    def __enter__(self) -> "Scorer":
        self.in_training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
        for module in self.in_training:  # parts of a model that is in training may be kept out of it
            module.training = True

    def score(
        self, rows: Sequence[Row], of: Callable[[Tensor], Tensor] = torch.sigmoid
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields each row's index in `rows` and its probabilities, `(2, tokens)`: of starts and of ends.

        `of` makes them from logits. Rows come in the order of their lengths, so that a batch has little padding.
        """
        self.bar.total += sum(map(len, rows))
        self.bar.refresh()
        for batch in self._batches(rows):
            probabilities = of(self._run([rows[index] for index in batch])).cpu().numpy()
            if self.model.device.type == "cpu":
                _return_freed_memory()
            for place, index in enumerate(batch):
                yield index, probabilities[:, place, : len(rows[index])]
                self.bar.update(len(rows[index]))

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        batch, tokens = [], 0
        for index in sorted(range(len(rows)), key=lambda index: -len(rows[index])):
            if batch and tokens + len(rows[index]) > self.batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(index)
            tokens += len(rows[index])
        if batch:
            yield batch

    @torch.inference_mode()
    def _run(self, rows: Sequence[Row]) -> Tensor:
        """Logits, float32 `(2, rows, columns)`."""
        ids = [row.ids(self.cls, self.sep) for row in rows]
        columns = max(map(len, ids))
        input_ids = torch.tensor([row + [self.pad] * (columns - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (columns - len(row)) for row in ids])
        device = self.model.device
        output = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device))
        if not hasattr(output, "start_logits"):
            raise TypeError(
                f"model is of type {type(self.model).__name__}, which has no start_logits; load the checkpoint as an "
                f"ErnieMForInformationExtraction, or for extract_answer as an ErnieMForQuestionAnswering."
            )
        return torch.stack([output.start_logits, output.end_logits]).float()
