"""Encoders whose modules are not as the config makes them: without biases, cut by hand, with odd parameters."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from erniem_fast import ErnieMConfig, ErnieMModel

LAYERS, HEADS, HIDDEN, INTERMEDIATE = 2, 3, 24, 40
LENGTHS = {"few": [9, 4], "many": [80, 64]}  # of few tokens a layer can be one native call
every_length = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


def make_model(**sizes) -> ErnieMModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, **sizes}
    config = ErnieMConfig(
        vocab_size=50, num_hidden_layers=LAYERS, num_attention_heads=HEADS, layer_norm_eps=0.1, act_dropout=0.0, **sizes
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = ErnieMModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)  # biases and layer norms too, which start as zeros and ones
    return model


def make_input(lengths: list[int]) -> dict[str, Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 50, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.where(mask, 1), "attention_mask": mask.long()}


def assert_same(model: ErnieMModel, expected: ErnieMModel, lengths: list[int]) -> None:
    """In inference, and in training with the gradients of all parameters that both have.

    Roundings differ: results are of about 1, of values normalised with an epsilon of 0.1; gradients are measured by the
    largest.
    """
    inputs, found = make_input(lengths), []
    for each in (model, expected):
        each.zero_grad()
        with torch.inference_mode():
            inferred = each(**inputs)
        trained = each.train()(**inputs)
        (trained.last_hidden_state.pow(3).sum() + trained.pooler_output.sum()).backward()
        grads = {name: parameter.grad for name, parameter in each.named_parameters() if parameter.grad is not None}
        found.append((inferred.last_hidden_state, inferred.pooler_output, trained.last_hidden_state, grads))
        each.eval()
    (*results, grads), (*exact, exact_grads) = found
    torch.testing.assert_close(results, exact, rtol=0, atol=2e-5)
    scale = max(grad.abs().max() for grad in exact_grads.values())
    for name, grad in grads.items():
        assert (grad - exact_grads[name]).abs().max() <= 1e-5 * scale, name


# ---- Without parameters


def drop_norm_biases(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.bias = None


def drop_norm_bias_of_the_embeddings(model):
    model.embeddings.layer_norm = nn.LayerNorm(HIDDEN, eps=0.1, bias=False)


def drop_norm_parameters(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight = module.bias = None


def drop_linear_biases(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bias = None


def drop_all_biases(model):
    drop_norm_biases(model)
    drop_linear_biases(model)


def drop_one_bias(model):
    model.encoder.layers[0].norm1.bias = model.encoder.layers[1].self_attn.self_attn.k_proj.bias = None


class Calls(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.name())
        return function(*arguments, **(keywords or {}))


@every_length
@pytest.mark.parametrize(
    "change",
    [
        drop_norm_biases,
        drop_norm_bias_of_the_embeddings,
        drop_norm_parameters,
        drop_linear_biases,
        drop_all_biases,
        drop_one_bias,
    ],
)
def test_what_has_no_bias_computes_as_with_zeros(change, lengths, packed, kernels):
    model, expected = make_model(), make_model()
    change(model)
    with torch.no_grad():
        for (name, module), other in zip(model.named_modules(), expected.modules(), strict=True):
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                if module.weight is None:
                    other.weight.fill_(1.0)
                elif name == "embeddings.layer_norm":
                    module.weight.data.copy_(other.weight)  # of a new module
                if module.bias is None:
                    other.bias.zero_()
    assert_same(model, expected, lengths)


def test_layer_norms_without_a_bias_keep_their_kernels():
    model = make_model()
    drop_norm_biases(model)
    with Calls() as calls:
        model(**make_input([9, 4]))
    assert {"erniem_fast::embeddings", "erniem_fast::add_norm"} <= calls.names
    assert "aten::native_layer_norm" not in calls.names


# ---- Cut by hand


def cut(linear: nn.Linear, rows: slice = slice(None), columns: slice = slice(None)) -> None:
    """As pruning tools cut: the parameters alone."""
    linear.weight = nn.Parameter(linear.weight.detach()[rows, columns].clone())
    linear.bias = nn.Parameter(linear.bias.detach()[rows].clone())


@every_length
def test_a_feed_forward_network_that_is_cut_by_hand(lengths, packed, kernels):
    model, expected, kept = make_model(), make_model(intermediate_size=INTERMEDIATE - 3), slice(INTERMEDIATE - 3)
    for layer in model.encoder.layers:
        cut(layer.linear1, rows=kept)
        cut(layer.linear2, columns=kept)
        assert (layer.linear1.out_features, layer.linear2.in_features) == (INTERMEDIATE, INTERMEDIATE)
    expected.load_state_dict(model.state_dict())
    assert_same(model, expected, lengths)


@every_length
def test_a_feed_forward_network_that_is_cut_away(lengths, packed, kernels):
    """Only the bias of its second linear is left."""
    model, expected = make_model(), make_model()
    expected.load_state_dict(model.state_dict())
    for layer, other in zip(model.encoder.layers, expected.encoder.layers, strict=True):
        cut(layer.linear1, rows=slice(0))
        cut(layer.linear2, columns=slice(0))
        nn.init.zeros_(other.linear2.weight)
    inputs = make_input(lengths)
    with torch.inference_mode():
        results = [each(**inputs).last_hidden_state for each in (model, expected)]
    torch.testing.assert_close(*results, rtol=0, atol=2e-5)


@every_length
def test_heads_that_are_cut_by_hand(lengths, packed, kernels):
    model, expected, kept = make_model(), make_model(), slice(2 * HIDDEN // HEADS)
    expected.prune_heads({layer: [HEADS - 1] for layer in range(LAYERS)})
    for layer in model.encoder.layers:
        inner = layer.self_attn.self_attn
        for linear in (inner.q_proj, inner.k_proj, inner.v_proj):
            cut(linear, rows=kept)
        cut(layer.self_attn.out_proj, columns=kept)
        inner.num_attention_heads = 2
    assert_same(model, expected, lengths)


MODES = {"training": torch.enable_grad, "inference": torch.inference_mode}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@every_mode
@every_length
@pytest.mark.parametrize("name", ["linear1", "linear2", "self_attn.out_proj", "self_attn.self_attn.k_proj"])
@pytest.mark.parametrize("length", [1, -1])
def test_a_bias_of_another_length_than_the_weight_is_refused(name, length, lengths, mode, kernels):
    model = make_model()
    linear = model.encoder.layers[1].get_submodule(name)
    linear.bias = nn.Parameter(linear.bias.detach()[:length].clone())
    with mode(), pytest.raises(ValueError, match="bias"):
        model(**make_input(lengths))


@every_mode
@every_length
def test_projections_of_different_widths_are_refused(lengths, mode, kernels):
    """Also where they would add up to three equal parts."""
    for sizes, message in (((16, 24, 24), "k_weight|16, 24, 24"), ((16, 24, 32), "k_weight|16, 24, 32")):
        model = make_model()
        inner = model.encoder.layers[0].self_attn.self_attn
        for linear, size in zip((inner.q_proj, inner.k_proj, inner.v_proj), sizes, strict=True):
            linear.weight, linear.bias = nn.Parameter(torch.randn(size, HIDDEN)), nn.Parameter(torch.randn(size))
        with mode(), pytest.raises(ValueError, match=message):
            model(**make_input(lengths))


@every_mode
@every_length
def test_a_number_of_heads_that_does_not_fit_the_weights_is_refused(lengths, mode, kernels):
    model = make_model()
    model.encoder.layers[0].self_attn.self_attn.num_attention_heads = 5
    with mode(), pytest.raises(ValueError, match="qkv has 72 features, which 5 heads cannot divide"):
        model(**make_input(lengths))


@every_mode
@every_length
def test_a_weight_of_another_dtype_is_refused_for_few_tokens_as_for_many(lengths, mode, kernels):
    for name in ("linear1", "linear2", "self_attn.out_proj", "self_attn.self_attn.v_proj"):
        model = make_model()
        model.encoder.layers[0].get_submodule(name).bfloat16()
        with mode(), pytest.raises(RuntimeError, match="dtype"):
            model(**make_input(lengths))


# ---- Parameters in odd forms


def negate(parameter: Tensor) -> Tensor:
    return torch._neg_view(-parameter)


def spread(parameter: Tensor) -> Tensor:
    return torch.stack([parameter, -parameter], dim=-1)[..., 0]


def misalign(parameter: Tensor) -> Tensor:
    """As tensors of a checkpoint can lie in a file that is mapped into memory."""
    memory = np.frombuffer(bytearray(4 * parameter.numel() + 1), np.uint8, offset=1)
    return torch.from_numpy(memory).view(parameter.dtype).view(parameter.shape).copy_(parameter)


@every_length
@pytest.mark.parametrize("form", [negate, spread, misalign])
def test_parameters_in_odd_forms(form, lengths, packed, kernels):
    model, expected = make_model(), make_model()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(form(parameter.detach())))
    assert_same(model, expected, lengths)
