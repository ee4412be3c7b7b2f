"""CUDA graphs of the encoder: with few tokens, the host takes longer to launch kernels than the GPU to run them.

A graph is captured for a bucket: a number of tokens, of sequences and a longest length, all rounded up. A call copies
its tokens into the bucket's memory, replays the graph, and copies the results out. The tokens that fill the bucket up
are sequences of their own behind the call's, so they change no result. All else is the code that runs without graphs.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

from . import families, flags, modes
from .batch import TokenBatch
from .families.layout import Tokens
from .inputs import EncoderInputs
from .modeling import ErnieMModel

_LEAST_TOKENS, _LEAST_LENGTH = 16, 64  # of a bucket
_FEW_TOKENS = 512  # up to so many, a bucket may compute twice the tokens of a call
_WARM_UP = 2  # forwards before a capture: kernels are compiled, and libraries allocate their memory


def use_graphs(model: nn.Module, most_tokens: int = 512) -> None:
    """Lets a model on a GPU replay CUDA graphs in inference, which lowers the latency of calls with few tokens.

    The model is called as before and returns the same. Graphs serve calls without gradients, dropout, autocast, hooks,
    head mask, mask per query, attended padding or `inputs_embeds`, that ask for neither hidden states nor attentions;
    other calls, and those of more tokens, run as without graphs. The first call of each size captures a graph, which
    takes as long as several forwards. All graphs share the memory of the largest one, and keep their own results
    besides.

    Weights may change in place. Where a weight is replaced or moved, a module replaced, or a flag changed, the next
    call captures anew. Several threads may call the model: calls take turns on the GPU. A copy of the model, pickled
    ones included, has no graphs.

    Args:
        model: an `ErnieMModel` or a model that `optimize` has taken, or any module that contains some, such as
            `ErnieMForSequenceClassification`.
        most_tokens: the most real tokens of a call that a graph serves; 0 to use no graphs any more.

    Raises:
        ValueError: the model contains no such model, or is not on a GPU; or `most_tokens` is negative.
    """
    encoders = [each for each in model.modules() if isinstance(each, ErnieMModel) or families.is_packed(each)]
    if not encoders:
        raise ValueError(
            f"model is of type {type(model).__name__}, which contains no ErnieMModel; pass one that does, or call "
            f"erniem_fast.optimize(model) first."
        )
    if most_tokens < 0:
        raise ValueError(f"most_tokens is {most_tokens}; pass the most tokens of a call, or 0 for no graphs.")
    for encoder in encoders:
        if most_tokens and encoder.device.type != "cuda":
            raise ValueError(f"model is on device {encoder.device}, but CUDA graphs need a GPU; move it there first.")
        encoder._graphs = Graphs(encoder, most_tokens) if most_tokens else None


class Bucket(NamedTuple):
    """The sizes that a graph is captured for: bounds of a call's.

    Each is a power of two, except for more than 512 tokens: the tokens that fill a bucket up are computed too, so their
    number is only rounded up to a multiple of an eighth of the power of two below it.
    """

    tokens: int
    sequences: int
    max_seqlen: int

    @classmethod
    def of(cls, batch: TokenBatch) -> "Bucket":
        sequences = batch.sequences.longest_first.shape[0]
        return cls(
            tokens=_round_up_tokens(max(batch.tokens, _LEAST_TOKENS)),
            sequences=_round_up(sequences),
            max_seqlen=_round_up(max(batch.sequences.max_seqlen, _LEAST_LENGTH)),
        )


def _round_up(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _round_up_tokens(tokens: int) -> int:
    if tokens <= _FEW_TOKENS:
        return _round_up(tokens)
    step = _round_up(tokens) // 16
    return -(-tokens // step) * step


class Recorder:
    """Captures graphs on a device that share one memory, and are replayed one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._last = torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Orders what is done with the graphs inside a `with` block after all before, on whatever streams."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._last)
            yield
            self._last.record(stream)

    def capture(self, forward: Callable[[], Output]) -> Callable[[], Output]:
        """A function that computes `forward` again, into the same memory."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            out = forward()

        def replay() -> Output:
            graph.replay()
            return out

        return replay


class Graphs:
    """The graphs of a model."""

    def __init__(
        self, model: nn.Module, most_tokens: int, recorder: Callable[[torch.device], Recorder] = Recorder
    ) -> None:
        self._model = weakref.ref(model)
        self._most_tokens = most_tokens
        self._recorder_for = recorder
        self._lock = threading.Lock()
        self._footprint, self._graphs, self._recorder = None, {}, None

    def __reduce__(self) -> tuple:
        return type(None), ()  # copies have no graphs: theirs would read this model's weights

    def encode(self, model: nn.Module, ready: EncoderInputs | Tokens) -> Output | None:
        """What `model` returns for `ready`; None where no graph can serve the call."""
        if model is not self._model():
            return None
        tokens = model.graph_inputs(ready)
        if tokens is None or not self._serves(model, tokens["input_ids"], ready.batch):
            return None
        with self._lock:
            if self._footprint is None or not self._footprint.is_current():
                footprint = modes.Footprint(model)
                if not footprint.is_plain:
                    return None  # a replay would leave out hooks
                self._footprint, self._graphs = footprint, {}
                self._recorder = self._recorder_for(model.device)
            # Later calls write into this memory, which PyTorch forbids for inference tensors outside of inference mode.
            with torch.inference_mode(False), torch.no_grad(), self._recorder.turn():
                bucket = Bucket.of(ready.batch)
                key = (bucket, *flags.snapshot().values.values(), torch.get_float32_matmul_precision())
                if key not in self._graphs:
                    self._graphs[key] = _Graph(model, list(tokens), bucket, self._recorder)
                return self._graphs[key](tokens, ready.batch)

    def _serves(self, model: nn.Module, ids: Tensor, batch: TokenBatch) -> bool:
        plain = batch.sequences.key_bias is batch.sequences.key_ranges is None
        if ids.device != model.device or not plain:
            return False
        observed = modes.is_recorded() or modes.is_transformed() or not modes.has_values(ids)
        return (
            0 < batch.tokens <= self._most_tokens
            and not (observed or torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type))
            and not model._drops()  # a replay would drop the same features again
            and not modes.is_captured()
            and flags.read(flags.VERIFY) == "0"
        )


class _Graph:
    """A forward of a bucket, and the memory of its inputs."""

    def __init__(self, model: nn.Module, names: list[str], bucket: Bucket, recorder: Recorder) -> None:
        zeros = partial(torch.zeros, device=model.device, dtype=torch.int64)
        self._tokens = {name: zeros(bucket.tokens) for name in names}
        self._cu_seqlens = zeros(bucket.sequences + 1, dtype=torch.int32)
        fillers = -(-bucket.tokens // bucket.max_seqlen)
        lengths = bucket.max_seqlen * torch.arange(1, fillers + 1, device=model.device)

        def forward() -> Output:
            filled_up = (self._cu_seqlens[-1] + lengths).clamp(max=bucket.tokens)
            cu_seqlens = torch.cat([self._cu_seqlens, filled_up.int()])
            batch = TokenBatch.from_cu_seqlens(cu_seqlens, bucket.max_seqlen, bucket.tokens)
            return model.encode_packed(batch, **self._tokens)

        try:
            self._replay = recorder.capture(forward)
        except RuntimeError as error:
            raise RuntimeError(
                f"a forward of {bucket} cannot be captured in a CUDA graph: {error}\n"
                f"`use_graphs(model, most_tokens=0)` runs the model without graphs."
            ) from error

    def __call__(self, given: dict[str, Tensor], batch: TokenBatch) -> Output:
        """Copies the input in, replays, and copies the results out, which the next replay overwrites."""
        cu_seqlens = batch.sequences.cu_seqlens
        tokens, sequences = batch.tokens, len(cu_seqlens) - 1
        # Behind them remain ids and positions of an earlier call, which do no harm.
        for name, values in self._tokens.items():
            values[:tokens].copy_(given[name])
        self._cu_seqlens[: sequences + 1].copy_(cu_seqlens)
        self._cu_seqlens[sequences + 1 :].fill_(tokens)
        out = self._replay()
        pooled = out.pooler_output
        return Output(
            last_hidden_state=batch.unpack(out.last_hidden_state[0, :tokens].clone()),
            pooler_output=None if pooled is None else pooled[:sequences].clone(),
        )
