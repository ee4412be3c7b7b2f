"""A stream of packed batches, drawn from several objectives and their sources, that can stop and go on anywhere."""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import islice
from random import Random
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from .. import modes
from .objectives import BTMLM, Objective
from .samples import Pair, Sample, Sentence, pack


@dataclass(frozen=True)
class Task:
    """An objective and what it is trained on.

    Attributes:
        objective: turns records into samples.
        source: yields the records, anew at each iteration: files, a list, a dataset of `datasets`. See
            `Objective.as_record` for what a record is.
        weight: how often a record is drawn from here, relative to the other tasks. The paper does not give its ratios.
    """

    objective: Objective
    source: Iterable[object]
    weight: float = 1.0


class PretrainingStream(IterableDataset):
    """Batches of samples, packed up to a number of tokens: the arguments of `ErnieMForPreTraining.forward`.

    Records are dealt to shards in turn. The batches of a shard depend on the tasks, the seed and the shard alone. A
    process may draw from several shards: as many batches as there are shards make a step, whatever the number of
    processes. In a `DataLoader` (with `batch_size=None`), each worker takes a part of the shard's records.

    It follows the convention of torchdata's `StatefulDataLoader`: after `load_state_dict(state_dict())`, the next
    iteration goes on after the last batch. The state holds numbers, strings and lists alone.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        token_budget: int = 8192,
        *,
        seed: int = 0,
        shard: int = 0,
        shards: int = 1,
        shuffle: int = 1024,
        epochs: int | None = None,
    ) -> None:
        """
        Args:
            tasks: what to draw from.
            token_budget: tokens of a batch at most. A batch ends where the next sample does not fit.
            seed: of all random choices.
            shard, shards: which part of the records this is, of how many.
            shuffle: records of a task among which the next one is drawn; 1 keeps the order of the source.
            epochs: how often a source is read; None to go on forever.

        Raises:
            ValueError: there are no tasks, a weight is not positive, or a number is out of range.
        """
        super().__init__()
        if not tasks or not all(task.weight > 0 for task in tasks):
            raise ValueError(f"tasks must be at least one, all with positive weights; {len(tasks)} came.")
        longest = max(task.objective.max_length for task in tasks)
        if token_budget < longest:
            raise ValueError(
                f"token_budget={token_budget} is less than max_length={longest} of an objective; raise it."
            )
        if any(isinstance(task.source, str) for task in tasks):
            raise ValueError("A task's source is a text, which yields letters; pass TextFiles(path) for a file.")
        if not 0 <= shard < shards or shuffle < 1 or (epochs is not None and epochs < 1):
            raise ValueError(
                f"shard={shard} must be in [0, shards={shards}), and shuffle={shuffle} and epochs={epochs} at least 1."
            )
        self.tasks, self.token_budget, self.seed = list(tasks), token_budget, seed
        self.shard, self.shards, self.shuffle, self.epochs = shard, shards, shuffle, epochs
        self._loaded: dict[str, Any] | None = None
        self._reset(None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._reset(self._loaded)
        self._loaded = None
        with_pseudo_tokens = any(isinstance(task.objective, BTMLM) for task in self.tasks)
        while samples := self._next_batch():
            yield pack(samples, with_pseudo_tokens)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: behind the batch that it yielded last."""
        if self._loaded is not None:
            return self._loaded
        version, internal, gauss = self._random.getstate()
        return {
            "objectives": [task.objective.name for task in self.tasks],
            "place": list(self._place),
            "random": [version, list(internal), gauss],
            "pending": [asdict(sample) for sample in self._pending],
            "readers": [None if reader is None else reader.state_dict() for reader in self._readers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration go on where `state` was taken.

        It raises a ValueError if the state is of a stream with other tasks, or of another part of the records.
        """
        self._loaded = deepcopy(state)

    def _reset(self, state: dict[str, Any] | None) -> None:
        worker = get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        self._place = place = self.shard * workers + index, self.shards * workers
        self._random = Random(f"{self.seed} {place}")
        self._pending: list[Sample] = []
        self._readers = [_Reader(task, place, self.shuffle, self.epochs) for task in self.tasks]
        if state is not None:
            self._check(state)
            version, internal, gauss = state["random"]
            self._random.setstate((version, tuple(internal), gauss))
            self._pending = [Sample(**each) for each in state["pending"]]
            for i, each in enumerate(state["readers"]):
                if each is None:
                    self._readers[i] = None
                else:
                    self._readers[i].load_state_dict(each)

    def _check(self, state: dict[str, Any]) -> None:
        """Refuses a state of a stream of other records."""
        here = {"objectives": [task.objective.name for task in self.tasks], "place": list(self._place)}
        for name, value in here.items():
            if state[name] != value:
                raise ValueError(
                    f"The state is of a stream with {name} {state[name]}, and this one has {value}; go on with the "
                    f"tasks, shards and workers of before. (The place is the part of the records, and of how many.)"
                )

    def _next_batch(self) -> list[Sample]:
        """The samples of the next batch; none if all sources are at their end."""
        samples, tokens = [], 0
        while self._pending or self._draw():
            if tokens + len(self._pending[0]) > self.token_budget:
                break
            tokens += len(self._pending[0])
            samples.append(self._pending.pop(0))
        return samples

    def _draw(self) -> bool:
        """Makes samples of one more record that has any; False if no source has records left."""
        while not self._pending:
            left = [i for i, reader in enumerate(self._readers) if reader is not None]
            if not left:
                return False
            (i,) = self._random.choices(left, [self.tasks[i].weight for i in left])
            record = self._readers[i].next(self._random)
            if record is None:
                self._readers[i] = None
            else:
                self._pending = self.tasks[i].objective.samples(record, self._random)
                self._readers[i].count(len(self._pending))
        return True


class _Reader:
    """A shard's records of one task, epoch after epoch, drawn from a buffer."""

    def __init__(self, task: Task, place: tuple[int, int], shuffle: int, epochs: int | None) -> None:
        self._task, self._objective = task, task.objective
        self._place, self._shuffle, self._epochs = place, shuffle, epochs
        self._stateful = hasattr(task.source, "state_dict") and hasattr(task.source, "load_state_dict")
        self._open()
        self._epoch = self._position = self._fruitless = 0
        self._size: int | None = None  # records of an epoch, known at the end of one
        self._buffer: list[Sentence | Pair] = []
        self._records = self._read()

    def next(self, random: Random) -> Sentence | Pair | None:
        """One more record; None after the last one of the last epoch."""
        while len(self._buffer) < self._shuffle and (record := next(self._records, None)) is not None:
            self._buffer.append(record)
        if not self._buffer:
            return None
        index = random.randrange(len(self._buffer))
        self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
        return self._buffer.pop()

    def count(self, samples: int) -> None:
        """Takes note of the number of samples that the last record has made, and refuses a source that makes none."""
        self._fruitless = 0 if samples else self._fruitless + 1
        # By now every record has been read. One that makes samples would also have been drawn from the buffer, except
        # with a chance of about exp(-20); of a small source the buffer holds each record several times.
        if self._size is not None and self._fruitless > self._size + 20 * min(self._size, self._shuffle):
            raise ValueError(
                f"No record of the source of {self._objective.name} makes a sample: its texts are empty or hold "
                f"nothing that can be predicted."
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "position": self._position,
            "buffer": [list(record) for record in self._buffer],
            "source": self._source.state_dict() if self._stateful and self._position else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._position = state["epoch"], state["position"]
        self._buffer = [self._objective.as_record(each) for each in state["buffer"]]
        if state["source"] is not None:
            self._source.load_state_dict(state["source"])
        self._records = self._read()

    def _read(self) -> Iterator[Sentence | Pair]:
        shard, shards = self._place
        while self._epochs is None or self._epoch < self._epochs:
            # A source without a state is read again up to here.
            for given in _read_whole(self._source, 0 if self._stateful else self._position):
                self._position += 1
                if (self._position - 1) % shards == shard:
                    yield self._objective.as_record(given)
            if self._position <= shard:
                raise ValueError(
                    f"The source of {self._objective.name} yields {self._position} records, so that shard {shard} of "
                    f"{shards} gets none; use fewer shards or more records, and a source that can be iterated again."
                )
            self._size = len(range(shard, self._position, shards))
            self._epoch, self._position = self._epoch + 1, 0
            self._open()

    def _open(self) -> None:
        """Goes to the beginning of the source; of a source with a state, each reader has a copy of its own."""
        self._source = deepcopy(self._task.source) if self._stateful else self._task.source


def _read_whole(source: Iterable[object], start: int) -> Iterator[object]:
    """What a source yields from `start` on, also in a worker of a `DataLoader`.

    An `IterableDataset` of `datasets` would leave records to the other workers, as readers do already.
    """
    with modes.outside_workers():
        records = islice(source, start, None)
    while True:
        with modes.outside_workers():
            try:
                given = next(records)
            except StopIteration:
                return
        yield given
