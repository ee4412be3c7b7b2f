"""The embeddings op on this machine: `native` beside the PyTorch composite, interleaved in one run."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from erniem_fast import extension
from erniem_fast.batch import TokenBatch
from erniem_fast.flags import use_kernels
from erniem_fast.ops import embeddings

WORDS, POSITIONS, PADDING = 250_002, 514, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extension.build([device.type])

    print(f"{args.tokens} tokens, hidden {args.hidden}, {args.dtype} on {device}; medians of {args.repeats}, in ms")
    print(f"{'':24}{'native':>9}{'composite':>11}{'ratio':>7}")
    for label, calls in contenders(args.tokens, args.hidden, getattr(torch, args.dtype), device).items():
        native, composite = medians(calls, args.repeats, device)
        print(f"{label:24}{native * 1e3:9.3f}{composite * 1e3:11.3f}{composite / native:7.2f}")


def contenders(tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Callable, ...]]:
    """Per line of the table, the native call and the composite's, on the same tensors."""
    generator = torch.Generator(device).manual_seed(0)
    random = {"generator": generator, "device": device}
    word_table = torch.randn(WORDS, hidden, dtype=dtype, **random)
    position_table = torch.randn(POSITIONS, hidden, dtype=dtype, **random)
    weight, norm_bias = torch.randn(2, hidden, **random).to(dtype)
    ids = torch.randint(3, WORDS, (tokens,), **random)
    batch = TokenBatch.padded((-(-tokens // 512), 512), device)
    positions = batch.columns[:tokens] + 2
    batch = TokenBatch.from_cu_seqlens(torch.tensor([0, tokens], device=device), tokens, tokens)
    seed = torch.tensor([42], device=device)
    grad = torch.randn(tokens, hidden, dtype=dtype, **random)

    def native(p: float = 0.0) -> torch.Tensor:
        norm = (weight, norm_bias, 1e-5)
        dropout = (p, seed if p else None)
        with use_kernels(embeddings="native"):
            return embeddings(ids, positions, word_table, position_table, *norm, PADDING, batch, *dropout, sparse=True)

    def composite(p: float = 0.0) -> torch.Tensor:
        words = F.embedding(ids, word_table, PADDING, sparse=True)
        x = words + F.embedding(positions, position_table, PADDING)
        return F.dropout(F.layer_norm(x, (hidden,), weight, norm_bias, 1e-5), p)

    def train(forward: Callable[[float], torch.Tensor]) -> None:
        leaves = [each.requires_grad_() for each in (word_table, position_table, weight, norm_bias)]
        torch.autograd.grad(forward(0.1), leaves, grad)
        for leaf in leaves:
            leaf.requires_grad_(False)

    return {
        "forward": (native, composite),
        "forward, dropout": (lambda: native(0.1), lambda: composite(0.1)),
        "training, sparse": (lambda: train(native), lambda: train(composite)),
    }


def medians(calls: tuple[Callable, ...], repeats: int, device: torch.device) -> list[float]:
    """Seconds a call, taken in turns so that what disturbs the machine disturbs all."""
    times = [[] for _ in calls]
    for repeat in range(repeats + 3):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 3:
                taken.append(time.perf_counter() - start)
    return [statistics.median(each) for each in times]


if __name__ == "__main__":
    main()
