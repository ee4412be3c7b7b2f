"""What it costs to change an op: how many places name its arguments, and how many calls lie before its kernel."""

import ast
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch

import erniem_fast
from erniem_fast import ops, use_kernels
from erniem_fast.batch import TokenBatch

PACKAGE = Path(erniem_fast.__file__).parent
DROPOUT = ["p", "seed", "columns", "sequence_ids"]
NORM = ["weight", "norm_bias", "eps"]
# The arguments of each op, without NamedTuples.
ARGUMENTS = {
    "attention": [
        *("qkv", "cu_seqlens", "max_seqlen", "longest_first", "contiguous", "key_bias", "key_ranges", "heads", "scale"),
        *DROPOUT,
    ],
    "bias_gelu": ["x", "bias", "activation", *DROPOUT],
    "add_norm": ["residual", "x", "bias", *NORM, *DROPOUT],
    "embeddings": ["ids", "positions", "word_table", "position_table", *NORM, "padding_idx", *DROPOUT],
}


def name_of(node):
    """The name that an expression ends in: `key_bias` for `sequences.key_bias` and for `"key_bias"`."""
    node = node.value if isinstance(node, ast.Starred) else node
    return getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "value", None)


def names_in(node):
    """The names that a definition, a call, a tuple, a dictionary or the fields of a class list."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    elif isinstance(node, ast.Call):
        names = [*map(name_of, node.args), *(each.arg for each in node.keywords)]
        names += [name_of(each.value) for each in node.keywords]
    elif isinstance(node, ast.Tuple):
        names = map(name_of, node.elts)
    elif isinstance(node, ast.Dict):
        names = map(name_of, (*filter(None, node.keys), *node.values))
    elif isinstance(node, ast.ClassDef):
        names = [each.target.id for each in node.body if isinstance(each, ast.AnnAssign)]
    else:
        names = []
    return {name.removesuffix("_ptr") for name in names if isinstance(name, str)}


def test_few_places_name_an_op_s_arguments():
    """Those that name at least half of them; before ops were declared once, they were 40, 91, 64 and 35."""
    places = Counter()
    for file in (*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = names_in(node)
            places.update(op for op, wanted in ARGUMENTS.items() if 2 * len(names & {*wanted}) >= len(wanted))
    assert places["attention"] <= 18
    assert places.total() <= 90
    assert all(places[op] for op in ARGUMENTS), "the count finds nothing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
def test_a_call_reaches_its_kernel_in_seven(monkeypatch):
    from erniem_fast.kernels import attention

    class Launch(Exception):
        pass

    class Kernel:
        def __getitem__(self, grid):
            return self

        def __call__(self, *arguments, **options):
            raise Launch

    monkeypatch.setattr(attention, "_forward_kernel", Kernel())
    batch = TokenBatch.from_cu_seqlens(torch.tensor([0, 5]), 5, 5)
    with use_kernels(attention="triton"), pytest.raises(Launch) as raised:
        ops.attention(torch.randn(5, 3 * 32), batch, 1, 0.2)
    _, *calls, _ = [
        frame.name for frame in traceback.extract_tb(raised.value.__traceback__)
    ]  # without test and stand-in
    assert calls == ["attention", "__call__", "_run", "_outputs", "run", "forward", "launch"]
