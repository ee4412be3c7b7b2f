"""bge-m3's three kinds of results from one forward: dense vectors, weights of words, and a vector for each token.

They are what FlagEmbedding's `BGEM3FlagModel.encode` returns (M3-Embedding, Chen et al., arXiv 2402.03216).
"""

from collections.abc import Iterable, Iterator, Sized
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from ..conversion.files import find_folder
from .batches import TOKENS_PER_BATCH, Steps, Tokens, run
from .hidden_states import Packed, pads, token_states
from .models import bare_model
from .pooling import pool
from .tokens import check_texts, find_limit, find_tokenizer, tokenizes

KINDS = {"dense_vecs": "return_dense", "lexical_weights": "return_sparse", "colbert_vecs": "return_colbert_vecs"}
FILES = {"lexical_weights": "sparse_linear.pt", "colbert_vecs": "colbert_linear.pt"}
# Words that have no weight.
UNWEIGHTED = ("cls_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def embed_m3(
    model: object,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    return_dense: bool = True,
    return_sparse: bool = False,
    return_colbert_vecs: bool = False,
    checkpoint: str | None = None,
    max_length: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    show_progress_bar: bool | None = None,
) -> dict[str, object] | Iterator[dict[str, object]]:
    """Turns texts into what bge-m3 makes of them; `erniem_fast.embed` describes the arguments that are not below.

    Args:
        model: the encoder, bare or in a `SentenceTransformer`.
        return_dense, return_sparse, return_colbert_vecs: what to return.
        checkpoint: the folder, or the name on the hub, that holds `sparse_linear.pt` and `colbert_linear.pt`; by
            default that which the model was loaded from.

    Returns:
        A dictionary with what was asked for, each in the order of the texts:
        `dense_vecs`, float32 `(texts, hidden)`, the first tokens at length 1;
        `lexical_weights`, for each text a dictionary from ids of tokens, as strings, to weights above 0, of an id that
        comes more than once the greatest, without special and unknown tokens;
        `colbert_vecs`, for each text float32 `(tokens - 1, dimension)`, all tokens but the first, each at length 1.
        If `texts` has no length, an iterator over such dictionaries for consecutive texts.

    Raises:
        TypeError, ValueError: as by `erniem_fast.embed`; or nothing is asked for, or the checkpoint lacks a head.
    """
    checked = check_texts(texts)
    wanted = [
        kind for kind, asked in zip(KINDS, (return_dense, return_sparse, return_colbert_vecs), strict=True) if asked
    ]
    if not wanted:
        raise ValueError(f"Nothing is to be returned; set one of {', '.join(KINDS.values())}.")
    bare = bare_model(model).eval()
    heads = {kind: load_head(bare, checkpoint, FILES[kind]) for kind in wanted if kind in FILES}
    tokenizer = find_tokenizer(model, tokenizer)
    steps = _steps(bare, tokenizer, heads, wanted, max_length)
    total = len(texts) if isinstance(texts, Sized) else None
    windows = run(checked, steps, tokens_per_batch, show_progress_bar, total)
    found = (_gather(results, wanted, bare.config.hidden_size) for _, results in windows)
    if total is None:
        return found
    parts = list(found) or [_gather([], wanted, bare.config.hidden_size)]
    return {kind: _join([part[kind] for part in parts]) for kind in wanted}


def load_head(bare: nn.Module, checkpoint: str | None, name: str) -> nn.Linear:
    """A linear layer in a file of a checkpoint, on the model's device, in float32.

    Raises:
        ValueError: there is no such file, or it is for a model of another size.
    """
    path = checkpoint or getattr(bare, "name_or_path", "")
    if not path:
        raise ValueError(f"checkpoint is None, but the model was not loaded from one; pass the folder with {name}.")
    file = Path(find_folder(path), name)
    if not file.exists():
        raise ValueError(f"{path!r} has no {name}, as bge-m3 has; pass checkpoint=, or do not ask for what it makes.")
    state = torch.load(file, map_location=bare.device, weights_only=True)
    features, hidden = state["weight"].shape
    if hidden != bare.config.hidden_size:
        raise ValueError(f"{file} is for a hidden size of {hidden}, but the model's is {bare.config.hidden_size}.")
    head = nn.Linear(hidden, features, bias="bias" in state, device=bare.device)
    head.load_state_dict(state)
    return head


def _steps(
    bare: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    heads: dict[str, nn.Linear],
    wanted: list[str],
    max_length: int | None,
) -> Steps:
    limit, padded = find_limit(bare, tokenizer, max_length), pads(bare)
    unweighted = {getattr(tokenizer, name) for name in UNWEIGHTED}

    @torch.inference_mode()
    def compute(batch: list[Tokens]) -> list[dict[str, object]]:
        packed = Packed.of(batch, bare.device)
        hidden = token_states(bare, packed, padded, tokenizer.pad_token_id).float()
        found = {}
        if "dense_vecs" in wanted:
            found["dense_vecs"] = normalize(pool(hidden, packed.cu_seqlens, "cls"), dim=-1).cpu().numpy()
        if "lexical_weights" in wanted:
            weights = heads["lexical_weights"](hidden).relu().squeeze(-1).cpu().split(packed.lengths)
            pairs = zip(batch, weights, strict=True)
            found["lexical_weights"] = [_heaviest(tokens.ids, each, unweighted) for tokens, each in pairs]
        if "colbert_vecs" in wanted:
            vectors = normalize(heads["colbert_vecs"](hidden), dim=-1).cpu().split(packed.lengths)
            found["colbert_vecs"] = [each[1:].numpy().copy() for each in vectors]  # a view would keep all of the batch
        return [dict(zip(found, each, strict=True)) for each in zip(*found.values(), strict=True)]

    return Steps(tokenizes(tokenizer, limit), compute, padded, limit)


def _heaviest(ids: Tensor, weights: Tensor, unweighted: set[int | None]) -> dict[str, float]:
    """For each id the greatest weight, if it is above 0; in the order of the text."""
    found = {}
    for id, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if id not in unweighted and weight > found.get(str(id), 0.0):
            found[str(id)] = weight
    return found


def _gather(results: list[dict[str, object]], wanted: list[str], hidden: int) -> dict[str, object]:
    """From a dictionary for each text to one for all."""
    found = {kind: [each[kind] for each in results] for kind in wanted}
    if "dense_vecs" in found:
        found["dense_vecs"] = np.stack(found["dense_vecs"]) if results else np.empty((0, hidden), np.float32)
    return found


def _join(parts: list) -> object:
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [each for part in parts for each in part]
