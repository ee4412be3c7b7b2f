"""What is measured: batches of real text or of random tokens, padded to their longest row."""

import dataclasses
import random
from collections.abc import Callable, Sequence

from bench.model.text import read_sentences

SEED = 10  # see text.SENTENCE_WORDS
MOST_BATCHES = 16  # in one turn; batches of one row would else take as long as all others together
SPECIAL_TOKENS = 4  # ids below are [CLS], [PAD], [SEP] and [UNK]
PAD = 1


@dataclasses.dataclass(frozen=True)
class Spec:
    """What to make a job of.

    Attributes:
        batch_size: rows in a batch.
        lengths: "text", "sorted" (text in order of length, as for encoding many documents), "fixed:N" or "modernbert".
        rows: rows in a turn; a job has at least one batch and at most MOST_BATCHES.
        rounds: timed turns of each peer.
        train: whether a turn is steps of training, and not forwards.
        masked: whether the loss of training is that of masked-language modelling.
    """

    batch_size: int
    lengths: str
    rows: int
    rounds: int
    train: bool = False
    masked: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """Batches that every peer runs, turn after turn.

    Attributes:
        spec: what they were made of.
        batches: keyword arguments of the model, nested lists (batch, length): input_ids and attention_mask.
    """

    spec: Spec
    batches: list[dict[str, list[list[int]]]]

    @property
    def name(self) -> str:
        kind = ", masked-LM training" if self.spec.masked else ", training" if self.spec.train else ""
        return f"{self.spec.batch_size} x {self.spec.lengths}{kind}"

    @property
    def rows(self) -> int:
        """Rows of all batches."""
        return sum(len(batch["input_ids"]) for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Real tokens of all batches."""
        return sum(sum(map(sum, batch["attention_mask"])) for batch in self.batches)

    @property
    def positions(self) -> int:
        """Positions of all batches, padding included."""
        return sum(len(row) for batch in self.batches for row in batch["input_ids"])

    @property
    def fill(self) -> float:
        """Share of the positions that are real tokens."""
        return self.tokens / self.positions


def make_jobs(
    specs: Sequence[Spec], encode: Callable[[list[str]], list[list[int]]] | None, vocab_size: int, max_length: int
) -> list[Job]:
    """One job for each of `specs`.

    Args:
        encode: turns texts into lists of token ids, cut at the maximum, special tokens included; only for text.
        vocab_size, max_length: of the model, in tokens.

    Raises:
        ValueError: rows of a fixed length are longer than max_length.
    """
    jobs = []
    for spec in specs:
        size = spec.batch_size
        count = min(max(1, spec.rows // size), MOST_BATCHES)
        if spec.lengths == "sorted":
            rows = _sorted_rows(count, size, encode)
        else:
            rows = _rows(spec.lengths, count * size, encode, vocab_size, max_length)
        jobs.append(Job(spec, [pad(rows[i * size : (i + 1) * size]) for i in range(count)]))
    return jobs


def pad(rows: list[list[int]]) -> dict[str, list[list[int]]]:
    """A batch of rows of token ids, padded on the right to the longest."""
    longest = max(map(len, rows))
    return {
        "input_ids": [row + [PAD] * (longest - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
    }


def _rows(lengths, count, encode, vocab_size, max_length):
    """`count` rows of token ids; the same first rows for every count."""
    rng = random.Random(SEED)
    if lengths == "text":
        return encode(rng.choices(read_sentences(), k=count))
    kind, _, length = lengths.partition(":")
    if kind == "fixed" and int(length) > max_length:
        raise ValueError(f"--lengths {lengths}: the model takes {max_length} tokens at most; choose fixed:{max_length}")
    rows = []
    for _ in range(count):
        # modernbert: the recipe of its paper for its own measurement of unpadding
        row_length = int(length) if kind == "fixed" else min(max(round(rng.gauss(256, 64)), 1), max_length)
        rows.append([rng.randrange(SPECIAL_TOKENS, vocab_size) for _ in range(row_length)])
    return rows


def _sorted_rows(count, size, encode):
    """Rows of `count` batches, which stand for the MOST_BATCHES that many sentences make when sorted by length."""
    rows = sorted(_rows("text", MOST_BATCHES * size, encode, None, None), key=len)
    chosen = [int((i + 0.5) * MOST_BATCHES / count) for i in range(count)]
    return [row for batch in chosen for row in rows[batch * size : (batch + 1) * size]]
