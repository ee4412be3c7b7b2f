"""Graphs made for elsewhere: PyTorch's own operators alone, right for any sizes and masks, where this library is not.

`elsewhere` makes and saves all graphs, and plain_process.py runs them in one process that does not import erniem_fast.
"""

import pathlib
import re
import subprocess
import sys
import warnings
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from erniem_fast import (
    ErnieMForInformationExtraction,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMModel,
)
from tests.golden import cases
from tests.integration import plain_process

LAYERS = 2
# Graphs sum in another order: of values about 1, a hundred roundings of 1.2e-7.
ATOL = 1e-5


def load(model_class=ErnieMModel, dropout=0.0, **config):
    torch.manual_seed(7)
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "act_dropout"), dropout)
    config = {**rates, "classifier_dropout": 0.0, "return_dict": False, "num_hidden_layers": 1, **config}
    return model_class.from_pretrained(cases.TINY, **config).eval()


def assert_close(results, expected, what="graph"):
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL, msg=lambda text: f"{what}: {text}")


# ---- Inputs


def mask_of(*rows):
    """1 at the columns that a row's ranges hold."""
    columns = max(stop for row in rows for _, stop in row)
    mask = torch.zeros(len(rows), columns, dtype=torch.int64)
    for line, row in zip(mask, rows, strict=True):
        for start, stop in row:
            line[start:stop] = 1
    return mask


def ids_of(mask):
    ids = torch.randint(4, cases.VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(0))
    return ids.masked_fill(mask == 0, cases.PAD)


# No padding, right padding, left padding, holes, one token at the end, no token at all.
RAGGED = mask_of([(0, 11)], [(0, 6)], [(3, 11)], [(0, 1), (2, 4), (6, 9), (10, 11)], [(10, 11)], [])
MASKS = [
    RAGGED,
    RAGGED.flip(0, 1),
    mask_of([(0, 7)], [(0, 9)], [(0, 1)]),
    mask_of([(0, 14)]),
    mask_of([(0, 1)], [], [(0, 1)]),  # a single column
    mask_of([(0, 512)], [(300, 512)]),
]


def per_query(mask):
    """A mask for each query, `(rows, columns, columns)`, some of which attend to nothing."""
    chance = torch.rand(*mask.shape, mask.shape[1], generator=torch.Generator().manual_seed(1))
    return ((chance < 0.7) & (mask[:, None, :] == 1)).long()


def bias_of(mask):
    """What a mask for each query adds to the scores, with other values than those that forbid."""
    allowed = per_query(mask)[:, None] == 1
    noise = torch.randn(allowed.shape, generator=torch.Generator().manual_seed(2))
    return noise.masked_fill(~allowed, torch.finfo(noise.dtype).min)


def inputs_of(**made_of_mask):
    """The inputs for every mask; the first is what graphs are made with."""
    return [{"input_ids": ids_of(mask), **{k: make(mask) for k, make in made_of_mask.items()}} for mask in MASKS]


def choices():
    batch = {"input_ids": ids_of(RAGGED).view(2, 3, -1), "attention_mask": RAGGED.view(2, 3, -1)}
    return [batch, {name: value[:1, :2, :7].contiguous() for name, value in batch.items()}]


MASKED = inputs_of(attention_mask=torch.Tensor.clone)
SUBJECTS = {
    "mask": (ErnieMModel, {"num_hidden_layers": LAYERS}, MASKED),
    "ids": (ErnieMModel, {}, inputs_of()),
    "mask per query": (ErnieMModel, {}, inputs_of(attention_mask=per_query)),
    "bias": (ErnieMModel, {}, inputs_of(attention_mask=bias_of)),
    "sequence": (ErnieMForSequenceClassification, {"num_labels": 3}, MASKED),
    "choice": (ErnieMForMultipleChoice, {}, choices()),
    "token": (ErnieMForTokenClassification, {"num_labels": 5}, MASKED),
    "span": (ErnieMForQuestionAnswering, {}, MASKED),
    "extraction": (ErnieMForInformationExtraction, {}, MASKED),
    "extraction by UIE-M": (ErnieMForInformationExtraction, {"uie_padded_length": 600}, MASKED),
}


# ---- Makers of graphs


def sizes_of(inputs, dynamic=lambda name, dim: Dim.DYNAMIC):
    """Every size may change but that of the heads, for which a bias holds one."""
    return {
        name: {dim: dynamic(name, dim) for dim in range(value.dim()) if (value.dim(), dim) != (4, 1)}
        for name, value in inputs.items()
    }


def traced(model, inputs, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated, and that sizes were checked in Python
        return torch.jit.trace(model, example_kwarg_inputs=inputs, **options)


def exported(model, inputs, strict=False):
    return torch.export.export(model, (), inputs, dynamic_shapes=sizes_of(inputs), strict=strict)


def save_traced(model, inputs, path):
    traced(model, inputs).save(path)


def save_exported(model, inputs, path):
    torch.export.save(exported(model, inputs), path)


def save_strictly_exported(model, inputs, path):
    torch.export.save(exported(model, inputs, strict=True), path)


def save_onnx(model, inputs, path):
    sizes = sizes_of(inputs)
    torch.onnx.export(model, (), path, kwargs=inputs, dynamic_shapes=sizes, dynamo=True, verbose=False)


def save_onnx_of_trace(model, inputs, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = sizes_of(inputs, "{}_{}".format)
        torch.onnx.export(model, (), path, kwargs=inputs, input_names=[*inputs], dynamic_axes=axes, dynamo=False)


def save_openvino(model, inputs, path):
    import openvino

    openvino.save_model(openvino.convert_model(exported(model, inputs)), path, compress_to_fp16=False)


ONNX = ("onnx", "onnxscript", "onnxruntime", "openvino")
# By how the file's name ends: what saves it, what that needs, and the subjects it is tried with.
MAKERS = {
    "traced.pt": (save_traced, (), SUBJECTS),
    "exported.pt2": (save_exported, (), SUBJECTS),
    "strict.pt2": (save_strictly_exported, (), ("mask",)),
    "dynamo.onnx": (save_onnx, ONNX, SUBJECTS),
    "traced.onnx": (save_onnx_of_trace, ONNX, ("mask",)),
    "exported.xml": (save_openvino, ("openvino",), ("mask", "ids")),
}
GRAPHS = [(subject, maker) for maker, (_, _, subjects) in MAKERS.items() for subject in subjects]


def file_of(subject, maker):
    return f"{subject.replace(' ', '-')}-{maker}"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The folder of all graphs, and what each makes of its subject's inputs, by file and runtime."""
    folder = tmp_path_factory.mktemp("graphs")
    inputs = {}
    for subject, maker in GRAPHS:
        save, needs, _ = MAKERS[maker]
        if all(find_spec(each) for each in needs):
            model_class, config, batches = SUBJECTS[subject]
            with torch.no_grad():
                save(load(model_class, **config), batches[0], str(folder / file_of(subject, maker)))
            inputs[file_of(subject, maker)] = batches
    torch.save(inputs, folder / "inputs.pt")
    command = [sys.executable, "-I", plain_process.__file__, str(folder)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return folder, torch.load(folder / "outputs.pt")


every_graph = pytest.mark.parametrize(("subject", "maker"), GRAPHS)


@every_graph
def test_a_graph_runs_elsewhere_as_the_packed_model_here(subject, maker, elsewhere):
    """All outputs, at padding too, for other sizes and masks than the graph was made with."""
    for module in MAKERS[maker][1]:
        pytest.importorskip(module)
    model_class, config, batches = SUBJECTS[subject]
    model = load(model_class, **config)
    for runtime in plain_process.RUNTIMES[pathlib.Path(maker).suffix]:
        for result, inputs in zip(elsewhere[1][file_of(subject, maker), runtime], batches, strict=True):
            with torch.no_grad():
                assert_close(result, tree_leaves(model(**inputs)), runtime)


# ---- What graphs hold


def operators_of_trace(graph):
    return Counter(node.kind() for node in graph.inlined_graph.nodes())


def operators_of_program(program):
    """Python's own operators compute sizes."""
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return Counter(str(call) for call in calls if getattr(call, "__module__", None) != "_operator")


def operators_of(path):
    """How often an operator stands in a graph, by its name with that of its namespace."""
    if path.suffix == ".pt":
        return operators_of_trace(torch.jit.load(path))
    if path.suffix == ".pt2":
        return operators_of_program(torch.export.load(path))
    model = pytest.importorskip("onnx").load(path)
    assert not model.functions
    return Counter(f"{node.domain or 'onnx'}.{node.op_type}" for node in model.graph.node)


@pytest.mark.parametrize(("subject", "maker"), [each for each in GRAPHS if not each[1].endswith(".xml")])
def test_a_graph_holds_plain_operators(subject, maker, elsewhere):
    """Of PyTorch or ONNX alone; none that copies token by token, decides by values, loops, or hides NaN."""
    for module in MAKERS[maker][1]:
        pytest.importorskip(module)
    operators = operators_of(elsewhere[0] / file_of(subject, maker))
    assert {re.split(r"[.:]+", name)[0] for name in operators} <= {"aten", "prim", "onnx"}
    unwanted = re.compile("scatter|index|nonzero|loop|scan|if$|isnan", re.IGNORECASE)
    assert not [name for name in operators if unwanted.search(name)]


@pytest.mark.parametrize("subject", ["mask", "ids"])
@pytest.mark.parametrize("maker", ["traced.pt", "exported.pt2"])
def test_attention_is_one_operator_a_layer(subject, maker, elsewhere):
    operators = operators_of(elsewhere[0] / file_of(subject, maker))
    layers = SUBJECTS[subject][1].get("num_hidden_layers", 1)
    counts = {"scaled_dot_product_attention": layers, "linear": 6 * layers + 1, "layer_norm": 2 * layers + 1}
    counts.update(dict.fromkeys(("softmax", "cat", "contiguous", "dropout"), 0))
    found = {name: sum(n for each, n in operators.items() if name in re.split(r"[.:]+", each)) for name in counts}
    assert found == counts


def test_flags_choose_what_runs_here_and_not_what_is_exported(monkeypatch):
    model, inputs = load(), MASKED[0]

    def operators():
        programs = [operators_of_program(exported(model, inputs, strict)) for strict in (False, True)]
        return [*programs, operators_of_trace(traced(model, inputs))]

    expected = operators()
    monkeypatch.setenv("ERNIEM_FAST_EMBEDDINGS", "reference")
    monkeypatch.setenv("ERNIEM_FAST_ATTENTION", "reference")
    monkeypatch.setenv("ERNIEM_FAST_BIAS_GELU", "torch")
    monkeypatch.setenv("ERNIEM_FAST_LAYERNORM", "triton")
    monkeypatch.setenv("ERNIEM_FAST_VERIFY", "1")
    monkeypatch.setenv("ERNIEM_FAST_RECOMPUTE", "1")
    assert operators() == expected


@pytest.mark.parametrize("packing", ["1", "0"])
def test_torch_compile_keeps_the_kernels(packing, monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_PACKING", packing)
    names = set()

    def backend(graph, _):
        names.update(str(node.target) for node in graph.graph.nodes)
        return graph

    packed = {"input_ids": ids_of(mask_of([(0, 9)])), "cu_seq_lens_q": torch.tensor([0, 4, 9]), "max_length_q": 5}
    torch.compiler.reset()
    torch.compile(load(), backend=backend, fullgraph=True)(**(packed if packing == "1" else MASKED[0]))
    torch.compiler.reset()
    ops = ("embeddings", "attention", "bias_gelu", "add_norm")
    assert {f"erniem_fast.{op}.default" for op in ops} <= names


# ---- Graphs of other calls of a model


def graphs_of(model, inputs, **options):
    """By their makers' names, ready to be called."""
    return {"traced": traced(model, inputs, **options), "exported": exported(model, inputs).module()}


@pytest.fixture(params=["1", "0"], ids=["packed", "padded"])
def packing(request, monkeypatch):
    monkeypatch.setenv("ERNIEM_FAST_PACKING", request.param)


@pytest.mark.parametrize("example", [0, 3], ids=["ragged", "full"])
def test_all_that_a_model_returns(example, packing):
    """Made of a batch with padding, and of one without; where padding is computed, it is shown."""
    model = load(output_attentions=True, output_hidden_states=True, num_hidden_layers=LAYERS)
    batches = [*MASKED, {name: value[:0] for name, value in MASKED[0].items()}]
    inputs = batches[example]
    # A size of 1 counts as fixed to torch.export.
    graphs = {"traced": traced(model, inputs)} if example else graphs_of(model, inputs)
    with torch.no_grad():
        for batch in batches:
            expected = tree_leaves(model(**batch))
            for maker, graph in graphs.items():
                assert_close(tree_leaves(graph(**batch)), expected, maker)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_graph_trains_as_the_model_does(dropout):
    """Values and gradients, with dropout on: of one seed the same elements are dropped."""
    model = load(dropout=dropout, num_hidden_layers=LAYERS).train()

    def run(callee, parameters, batch):
        torch.manual_seed(3)
        outputs = callee(**batch)
        grads = torch.autograd.grad(outputs[0].square().sum() + outputs[1].sum(), parameters, allow_unused=True)
        return [*outputs, *(grad / len(batch["input_ids"]) for grad in grads)]

    graphs = graphs_of(model, MASKED[0], check_trace=dropout == 0)
    names = [name for name, _ in model.named_parameters()]
    for batch in MASKED[:4]:
        expected = run(model, list(model.parameters()), batch)
        for maker, graph in graphs.items():
            parameters = dict(graph.named_parameters())
            result = run(graph, [parameters[name] for name in names], batch)
            assert_close(result[:2], expected[:2], maker)
            largest = max(grad.abs().max() for grad in expected[2:])
            assert_close([grad / largest for grad in result[2:]], [grad / largest for grad in expected[2:]], maker)


def test_packed_input_is_exported():
    """Any number of tokens and sequences, of any length."""
    model = load(num_hidden_layers=LAYERS)

    def packed(*lengths):
        ids = torch.cat([ids_of(mask_of([(0, length)])) for length in lengths], dim=1)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        return {"input_ids": ids, "cu_seq_lens_q": bounds, "max_length_q": max(lengths)}

    sizes = {"input_ids": {1: Dim.DYNAMIC}, "cu_seq_lens_q": {0: Dim.DYNAMIC}, "max_length_q": Dim.DYNAMIC}
    program = torch.export.export(model, (), packed(4, 2, 7), dynamic_shapes=sizes)
    with torch.no_grad():
        for batch in (packed(4, 2, 7), packed(30, 3), packed(5, 5, 5, 1, 9, 16)):
            assert_close(program.module()(**batch), model(**batch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_graph_in_half_precision(dtype):
    """It is as exact as the model in that precision is: at most twice as far from float32's result."""
    exact, model = load(num_hidden_layers=LAYERS), load(num_hidden_layers=LAYERS).to(dtype)
    with torch.no_grad():
        graphs = graphs_of(model, MASKED[0], check_trace=False)
        for batch in MASKED:
            truth, same = exact(**batch), model(**batch)
            for maker, graph in graphs.items():
                for ours, here, right in zip(graph(**batch), same, truth, strict=True):
                    assert ours.dtype == dtype
                    error, bound = ((each.float() - right).norm() for each in (ours, here))
                    assert error <= 2 * bound, f"{maker}: {error:.1e}, not at most twice {bound:.1e}"
