"""What the benchmarks of the model find: the fields of their JSON files."""

import dataclasses
import statistics

from bench.record import Run
from bench.roofline import Rates
from bench.timing import Quartiles


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds that one batch takes, over all batches of all rounds."""

    median: float
    p99: float


@dataclasses.dataclass(frozen=True)
class PeerFigures:
    """What one peer did in one job; None where it was not measured.

    Attributes:
        peer: its name.
        tokens_per_second: real tokens, by round; padding earns nothing.
        rows_per_second: median over the rounds.
        speedup: our rate over the peer's, paired round by round.
        peak_memory: bytes.
        memory_ratio: our peak over the peer's.
        output_difference: largest difference of its output from ours (see measure.TOLERANCE).
        problem: why it was not measured, or not to the end.
        rounds: seconds of each batch, per round.
    """

    peer: str
    tokens_per_second: Quartiles | None
    rows_per_second: float | None
    batch_seconds: Latency | None
    speedup: Quartiles | None
    peak_memory: int | None
    memory_ratio: float | None
    output_difference: float | None
    problem: str | None
    rounds: list[list[float]]


@dataclasses.dataclass(frozen=True)
class JobFigures:
    """A job, with the attributes of `jobs.Job` and `jobs.Spec`, and what its peers did, ours first."""

    name: str
    batch_size: int
    lengths: str
    train: bool
    batches: int
    rows: int
    tokens: int
    positions: int
    fill: float
    peers: list[PeerFigures]

    @property
    def rivals(self) -> list[PeerFigures]:
        """The measured peers that are not erniem_fast."""
        return [peer for peer in self.peers if peer.speedup and is_rival(peer.peer)]


def is_rival(name: str) -> bool:
    """Whether a peer is neither erniem_fast nor a model that it has optimised."""
    return not (name.startswith("erniem_fast") or name.endswith(", optimize"))


@dataclasses.dataclass
class LoadedPeer:
    """A peer that takes part; `workers.Worker` says what its figures are. Older results have no `load_memory`."""

    name: str
    versions: dict[str, str]
    load_seconds: float
    first_seconds: float | None = None
    load_memory: int | None = None


@dataclasses.dataclass
class ModelRun(Run):
    """Peers in turn on several jobs.

    Attributes:
        absent: why the other peers take no part.
        interrupted: by Ctrl-C.
    """

    peers: list[LoadedPeer]
    absent: list[str]
    interrupted: bool
    jobs: list[JobFigures]


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Accuracy at 1 of finding the translation of a sentence, in both directions."""

    from_english: float
    to_english: float

    @property
    def mean(self) -> float:
        return (self.from_english + self.to_english) / 2


@dataclasses.dataclass(frozen=True)
class PeerQuality:
    """What one peer's sentence embeddings are worth.

    Attributes:
        peer: its name.
        mean_cosine, least_cosine: over all sentences, to the embeddings of the reference.
        retrieval: by language.
    """

    peer: str
    mean_cosine: float
    least_cosine: float
    retrieval: dict[str, Retrieval]

    @property
    def mean_retrieval(self) -> float:
        """Mean over the languages."""
        return statistics.fmean(each.mean for each in self.retrieval.values())

    def differences(self, reference: "PeerQuality") -> dict[str, float]:
        """By language, how much better than `reference` it retrieves, in points; below zero where it is worse."""
        return {
            language: 100 * (each.mean - reference.retrieval[language].mean)
            for language, each in self.retrieval.items()
        }


@dataclasses.dataclass
class QualityRun(Run):
    """What rounding costs.

    Attributes:
        sentences, tokens: that every peer computes.
        pairs: of English sentences and their translations, by language.
        absent: why the other peers take no part.
        peers: the reference first, which computes in float32.
    """

    sentences: int
    tokens: int
    pairs: dict[str, int]
    absent: list[str]
    peers: list[PeerQuality]


@dataclasses.dataclass(frozen=True)
class OpTime:
    """Seconds of an op in one step, and of its floor, where it has one."""

    op: str
    seconds: float
    floor: float | None
    ratio: float | None


@dataclasses.dataclass(frozen=True)
class Reached:
    """Seconds of one step without a profiler, and the share of the product's rate that its operations reach."""

    seconds: float
    share: float


@dataclasses.dataclass
class Breakdown(Run):
    """Where the time goes in a forward and in a step of training: in each by op, the total last."""

    tokens: int
    fill: float
    rates: Rates
    reached: dict[str, Reached]
    forward: list[OpTime]
    training: list[OpTime]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to compute the same.

    Attributes:
        name: of the way.
        seconds: over the rounds.
        speedup: the first way's seconds over these, round by round.
        difference: largest difference of its results from the first way's: of embeddings and scores over their root
            mean square, of probabilities as it is.
    """

    name: str
    seconds: Quartiles
    speedup: Quartiles
    difference: float


@dataclasses.dataclass(frozen=True)
class EncodeJob:
    """What the contenders do, the stock model first.

    Attributes:
        name: of the job.
        items: texts or pairs.
        tokens: of all items.
        fill: the share of real tokens in batches as sentence-transformers makes them.
    """

    name: str
    items: int
    tokens: int
    fill: float
    contenders: list[Contender]


@dataclasses.dataclass
class EncodeRun(Run):
    """A model of sentence-transformers before and after `optimize`.

    Attributes:
        absent: why other ways take no part.
    """

    absent: list[str]
    jobs: list[EncodeJob]


@dataclasses.dataclass(frozen=True)
class LinesFigures:
    """The figures of one way to embed a file of lines. Each way runs in its own process.

    Attributes:
        lines: of the file.
        way: `encode` of sentence-transformers, or `embed`.
        seconds: of each round, without loading the model.
        loaded_memory, peak_memory: bytes of the process when the model was loaded, and at most.
    """

    lines: int
    way: str
    seconds: list[float]
    loaded_memory: int
    peak_memory: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclasses.dataclass
class LinesRun(Run):
    """Many lines, by `encode` and `embed` of the same optimised model.

    Attributes:
        weights: the form of its weights; None for those of the checkpoint.
    """

    weights: str | None
    results: list[LinesFigures]


@dataclasses.dataclass(frozen=True)
class LongText:
    """The figures of extraction from one long text. Each text has its own process.

    Attributes:
        characters, tokens: of the text.
        spans: that were found.
        seconds: without loading the model.
        loaded_memory, peak_memory: bytes of the process when the model was loaded, and at most while it extracted.
    """

    characters: int
    tokens: int
    spans: int
    seconds: float
    loaded_memory: int
    peak_memory: int


@dataclasses.dataclass
class ExtractionRun(Run):
    """Extraction by schema.

    Attributes:
        rows, tokens: of prompts with texts, that all schemas have together.
        spans: that were found.
        contenders: rows padded to 512 tokens first, then rows as they are.
        long_texts: the shortest first.
    """

    rows: int
    tokens: int
    spans: int
    contenders: list[Contender]
    long_texts: list[LongText]


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A model that was fine-tuned to extract, and tested on texts from templates that it was not trained on.

    Attributes:
        seed: of the run: its texts, negative examples, new weights and order.
        seconds: of training and test.
        examples: F1 of the spans of examples, each a prompt about a text.
        results: F1 of what `extract` finds by the schema, relations included.
    """

    seed: int
    seconds: float
    examples: float
    results: float


@dataclasses.dataclass
class FineTuningRun(Run):
    """`examples/finetune_extraction.py`, with a few seeds.

    Attributes:
        options: those of the example, at their values.
        runs: by seed.
    """

    options: dict[str, float]
    runs: list[FineTuning]


@dataclasses.dataclass
class MemoryFigures:
    """A training step of a class of models.

    Attributes:
        name: of the class.
        loaded_memory, peak_memory: bytes before the step, and at most.
    """

    name: str
    loaded_memory: int
    peak_memory: int


@dataclasses.dataclass
class MemoryRun(Run):
    """A training step of the encoder, and of the encoder with the head for masked words.

    Attributes:
        tokens: of the step.
    """

    tokens: int
    results: list[MemoryFigures]


@dataclasses.dataclass
class PretrainingPoint:
    """A model during its training.

    Attributes:
        tokens: it has been trained on.
        loss: of masked-language modelling, on held-out sentences.
        accuracy: at 1 of finding held-out translations, the mean over languages.
    """

    tokens: int
    loss: float
    accuracy: float


@dataclasses.dataclass
class PretrainingFigures:
    """A run of a recipe of pre-training.

    Attributes:
        seconds: it took, measurements included.
        curve: the model on the way, and at last at its end.
        languages: the last point's accuracy by language.
    """

    recipe: str
    seed: int
    seconds: float
    curve: list[PretrainingPoint]
    languages: dict[str, float]


@dataclasses.dataclass
class PretrainingRun(Run):
    """Recipes of pre-training with equal numbers of tokens.

    Attributes:
        tokens: of each run.
        chance: the accuracy of guesses.
    """

    tokens: int
    chance: float
    runs: list[PretrainingFigures]
