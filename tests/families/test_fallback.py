"""What the packed layout does not serve runs as in transformers, and the log says so once; all else stays packed."""

import copy
import logging
import pickle
from contextlib import suppress

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import BertModel, DynamicCache, XLMRobertaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

import erniem_fast
from tests.families.tiny import ATTENTION_MASK, EMBEDS, GRADIENTS, IDS, REAL_TOKENS, both, make
from tests.model.tiny import assert_close, assert_same_gradients, gradients

INPUTS = {"input_ids": IDS, "attention_mask": ATTENTION_MASK}
SQUARE = ATTENTION_MASK[:, None, :, None].bool() & ATTENTION_MASK[:, None, None, :].bool()


@pytest.fixture(autouse=True)
def log(caplog):
    with caplog.at_level(logging.WARNING, "erniem_fast"):
        yield caplog


def told(log):
    return [record.getMessage() for record in log.records if record.name.startswith("erniem_fast")]


def assert_told(log, *reasons):
    messages = told(log)
    assert len(messages) == len(reasons), messages
    for message, reason in zip(messages, reasons, strict=True):
        assert reason in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"output_attentions": True}, "output_attentions was given"),
        ({"attention_mask": SQUARE}, "attention_mask is of dimension 4"),
        ({"encoder_hidden_states": EMBEDS}, "encoder_hidden_states was given"),
        ({"is_causal": True}, "is_causal was given"),
    ],
)
def test_arguments(changes, reason, log):
    stock, fast = both("bert", attn_implementation="eager")
    with torch.inference_mode():
        for _ in range(2):
            actual, expected = fast(**{**INPUTS, **changes}), stock(**{**INPUTS, **changes})
            for name, value in expected.items():
                torch.testing.assert_close(actual[name], value, rtol=0, atol=0)
    assert_told(log, reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"past_key_values": DynamicCache()}, "past_key_values was given"),
        ({"attention_mask": ATTENTION_MASK[:, :3]}, "attention_mask has another shape than the input"),
        ({"inputs_embeds": EMBEDS}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS[0]}, "the input is of dimension 1"),
        ({"attention_mask": ATTENTION_MASK.numpy()}, "attention_mask is of type ndarray"),
        ({"output_hidden_states": [7]}, "output_hidden_states selects states that there are not"),
    ],
)
def test_calls_that_transformers_refuses(changes, reason, log):
    """What transformers then does, mostly to raise an error, is its own matter; the log has said why it runs."""
    with suppress(Exception):
        both("bert")[1](**{**INPUTS, **changes})
    assert_told(log, reason)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_cache": True},
        {"num_items_in_batch": 3},
        {"output_attentions": False},
        {"encoder_hidden_states": None},
        {"seq_idx": IDS},
    ],
)
def test_arguments_without_effect(changes, log):
    stock, fast = both()
    assert_close(
        fast(**INPUTS, **changes).last_hidden_state[REAL_TOKENS],
        stock(**INPUTS).last_hidden_state[REAL_TOKENS],
        atol=2e-5,
    )
    assert_told(log)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_decoder": True}, "it is a decoder"),
        ({"chunk_size_feed_forward": 4}, "runs in chunks"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_causal": True}, "is_causal"),
    ],
)
def test_configs(options, reason, log):
    stock, fast = both(**options)
    inputs = {"input_ids": IDS[:, :8]} if "chunk_size_feed_forward" in options else INPUTS
    with torch.inference_mode():
        assert torch.equal(fast(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
    assert_told(log, reason)


def test_a_decoder_generates():
    stock, fast = both(model_class=XLMRobertaForCausalLM, is_decoder=True)
    prompt = IDS[:1, :4]
    assert torch.equal(fast.generate(prompt, max_new_tokens=4), stock.generate(prompt, max_new_tokens=4))


def doubled(output):
    if isinstance(output, tuple):
        return (2 * output[0], *output[1:])
    if isinstance(output, BaseModelOutputWithPastAndCrossAttentions):
        return type(output)(last_hidden_state=2 * output.last_hidden_state)
    return 2 * output


class Doubled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments, **options):
        return doubled(self.module(*arguments, **options))


def changed(model, name, change):
    if change == "hooked":
        model.get_submodule(name).register_forward_hook(lambda module, given, output: doubled(output))
    else:
        model.set_submodule(name, Doubled(model.get_submodule(name)))
    return model


CHANGED = ["encoder.layer.1", "encoder.layer.1.attention", "encoder.layer.0.attention.self", "encoder.layer.1.output"]
CHANGED += ["encoder.layer.1.intermediate", "encoder.layer.0.attention.output"]
DROPOUTS = ["encoder.layer.0.output.dropout", "embeddings.dropout"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, "hooked") for name in [*CHANGED, *DROPOUTS, "embeddings", "encoder"]),
        *((name, "replaced") for name in [*CHANGED, *DROPOUTS]),
    ],
)
def test_changed_modules_that_would_not_be_called(name, change, log):
    stock, fast = (changed(model, name, change) for model in both())
    with torch.inference_mode():
        expected, actual = stock(**INPUTS), fast(**INPUTS)
    assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
    assert len(told(log)) == 1


LEAVES = ["attention.self.query", "attention.output.dense", "intermediate.dense", "intermediate.intermediate_act_fn"]
LEAVES += ["output.dense", "attention.output.LayerNorm", "output.LayerNorm"]


@pytest.mark.parametrize("name", [*(f"encoder.layer.1.{leaf}" for leaf in LEAVES), "embeddings.word_embeddings"])
@pytest.mark.parametrize("change", ["replaced", "hooked"])
def test_changed_modules_that_are_called(name, change, log):
    """As LoRA and quantised linears are: no need to fall back."""
    stock, fast = (changed(model, name, change) for model in both())
    with torch.inference_mode():
        expected, actual = stock(**INPUTS), fast(**INPUTS)
    assert_close(actual.last_hidden_state[REAL_TOKENS], expected.last_hidden_state[REAL_TOKENS], atol=3e-5)
    assert_told(log)


def test_hooks_that_transformers_leaves_do_not_matter(log):
    """It records attentions by hooks, and leaves them on the modules: later calls run packed, by one call if few."""
    _, fast = both(attn_implementation="eager")
    with torch.inference_mode():
        fast(**INPUTS, output_attentions=True)
        assert fast.encoder.layer[0]._forward_hooks
        again = fast(**INPUTS)
        assert fast.encoder.prepared is not None
        assert not again.last_hidden_state[1, 7:].any()
    erniem_fast.restore(fast)
    assert not {"fallbacks", "prepared"} & (vars(fast).keys() | vars(fast.encoder).keys())
    with torch.inference_mode():
        recorded = fast(**INPUTS, output_attentions=True, output_hidden_states=True)
    assert (len(recorded.attentions), len(recorded.hidden_states)) == (2, 3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, log):
    """It runs packed: layers once more in the backward, with the same dropout."""
    found, runs = [], []
    for checkpoints in (False, True):
        model = both(dropout=0.2)[1].train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            dense = model.encoder.layer[0].intermediate.dense
            dense.register_forward_hook(lambda _, given, __: runs.append(given[0].shape))
        torch.manual_seed(0)
        output = model(**INPUTS)
        output.pooler_output.sum().backward()
        found.append((output.last_hidden_state, gradients(model)))
    assert_close(found[1][0], found[0][0])
    assert_same_gradients(found[1][1], found[0][1], rtol=GRADIENTS)
    assert len(runs) == 2
    assert runs[0] == runs[1]
    assert len(runs[0]) == 2  # `(tokens, hidden)`
    assert_told(log)


def test_checkpointing_of_what_falls_back():
    found = []
    for model in both(attn_implementation="eager"):
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        output = model(**INPUTS, output_attentions=True)
        output.pooler_output.sum().backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0], rtol=GRADIENTS)


def test_exports(log):
    stock, fast = both()
    with torch.no_grad():
        expected = stock(**INPUTS).last_hidden_state
        exported = torch.export.export(fast, (), dict(INPUTS)).module()
        assert_close(exported(**INPUTS).last_hidden_state, expected)
        traced = torch.jit.trace(fast, (IDS, ATTENTION_MASK), strict=False)
        assert_close(traced(IDS, ATTENTION_MASK)["last_hidden_state"], expected)
    assert_told(log, "is being exported")


def test_torch_compile_runs_packed(log):
    torch.compiler.reset()
    stock, fast = both()
    compiled = torch.compile(fast, backend="aot_eager")
    states = compiled(**INPUTS).last_hidden_state
    assert_close(states[REAL_TOKENS], stock(**INPUTS).last_hidden_state[REAL_TOKENS], atol=2e-5)
    assert not states[1, 7:].any()
    assert_told(log)


def test_tensors_without_values(log):
    fast = erniem_fast.optimize(make()).to("meta")
    assert fast(IDS.to("meta")).last_hidden_state.shape == (*IDS.shape, 32)
    assert_told(log, "has no values")


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed(process_group, log):
    """DDP runs packed; FSDP2 wraps layers and shards weights, and runs as in transformers."""
    stock, fast = both()
    expected = stock(**INPUTS)
    replicated = nn.parallel.DistributedDataParallel(fast)
    replicated(**INPUTS).pooler_output.sum().backward()
    expected.pooler_output.sum().backward()
    assert_same_gradients(gradients(fast), gradients(stock), rtol=GRADIENTS)
    assert_told(log)
    for layer in fast.encoder.layer:
        fully_shard(layer)
    fully_shard(fast)
    assert_close(fast(**INPUTS).last_hidden_state[REAL_TOKENS], expected.last_hidden_state[REAL_TOKENS], atol=2e-5)
    assert len(told(log)) == 1


def test_a_model_that_was_sharded_before_is_refused(process_group):
    model = make()
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=process_group)
    fully_shard(model, mesh=process_group)
    with pytest.raises(TypeError, match="FSDPXLMRobertaModel is not taken because FSDP has sharded it"):
        erniem_fast.optimize(model)


def test_tensor_parallelism(process_group, log):
    """Each process holds some of the heads, whose number the packed layout would not know."""
    stock, fast = both()
    mesh = init_device_mesh("cpu", (1,))
    for model in (stock, fast):
        parallelize_module(model.encoder.layer[1].intermediate, mesh, {"dense": ColwiseParallel()})
    with torch.no_grad():
        assert torch.equal(fast(**INPUTS).last_hidden_state, stock(**INPUTS).last_hidden_state)
    assert_told(log, "weights of layer 1 are distributed")


def test_a_model_that_is_made_of_the_packed_class_is_transformers(log):
    """Its encoder has no packed class: `optimize` gives it one."""
    kind = type(erniem_fast.optimize(make("bert")))
    model = kind(make("bert").config).eval()
    model(**INPUTS)
    assert_told(log, "its encoder was replaced")
    assert isinstance(model, BertModel)


def test_adapters_that_are_chosen_by_row(log):
    found = []
    for model in both():
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], init_lora_weights=False), "a")
        wrapped.add_adapter("b", peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
        names = ["a", "b", "__base__", "b", "a"]
        with torch.inference_mode():
            found.append(wrapped.eval()(**INPUTS, adapter_names=names).last_hidden_state)
            wrapped(**INPUTS)
    assert torch.equal(*found)
    assert_told(log, "adapter_names chooses adapters for each row")


def replaced_forward(model):
    output = model.encoder.layer[1].output
    stock = output.forward
    output.forward = lambda *arguments: 2 * stock(*arguments)
    return lambda: output.__dict__.pop("forward")


def hooked_dropout(model):
    return model.encoder.layer[0].output.dropout.register_forward_hook(lambda *_: None).remove


def replaced_layer(model):
    layers = model.encoder.layer
    layer, layers[1] = layers[1], Doubled(layers[1])

    def undo():
        layers[1] = layer

    return undo


def chunks(model):
    layer = model.encoder.layer[1]
    layer.chunk_size_feed_forward = 11

    def undo():
        layer.chunk_size_feed_forward = 0

    return undo


def decoder(model):
    model.config.is_decoder = True

    def undo():
        model.config.is_decoder = False

    return undo


def global_hook(model):
    return nn.modules.module.register_module_forward_hook(lambda *_: None).remove


CHANGES = [replaced_forward, hooked_dropout, replaced_layer, chunks, decoder, global_hook]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_between_calls_is_noticed(change, log):
    """What was found out about modules in one call is kept for the next."""
    _, fast = both()
    with torch.inference_mode():
        for _ in range(2):
            fast(**INPUTS)
            kept = vars(fast)["checked"]
            fast(**INPUTS)
            assert vars(fast)["checked"] is kept
            assert not told(log)
            undo = change(fast)
            fast(**INPUTS)
            assert len(told(log)) == 1
            log.clear()
            undo()
            fast.fallbacks.clear()


def test_copies_check_their_own_modules():
    _, fast = both()
    with torch.inference_mode():
        fast(**INPUTS)
        for other in (copy.deepcopy(fast), copy.copy(fast), pickle.loads(pickle.dumps(fast))):
            other(**INPUTS)
            assert vars(other)["checked"] is not vars(fast)["checked"]
