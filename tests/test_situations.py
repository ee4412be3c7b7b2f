"""Situations that have broken other encoders, a section for each kind.

Each is held to a truth of its own: XLM-RoBERTa with the same weights, the same computation made in another way, or
derivatives by differences.
"""

import concurrent.futures
import contextlib
import copy
import gc
import json
import shutil
import threading
import weakref

import accelerate
import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from golden import cases
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_model
from test_modeling import (
    ATOL,
    LAYOUT_CASES,
    RIGHT,
    assert_close,
    assert_same_gradients,
    gradients,
    load,
    logits_of,
    make_ids,
    random_weights,
    relative_error,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    XLMRobertaConfig,
    XLMRobertaModel,
    pipeline,
)
from transformers.activations import ACT2FN

from bench.peers import xlm_roberta
from erniem_fast import (
    ErnieMConfig,
    ErnieMForInformationExtraction,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMModel,
    ErnieMPreTrainedModel,
    ErnieMTokenizer,
)

IDS, MASK, REAL = make_ids(RIGHT), RIGHT, RIGHT.bool()
ROWS, COLUMNS = MASK.shape
FULL = IDS.clamp(min=4)  # without padding
BATCH = {"input_ids": IDS, "attention_mask": MASK}
# A batch, and one row so short that a layer is one native call.
INPUTS = [BATCH, {"input_ids": IDS[1:2, :7]}]
TEXTS = ["Your password was changed.", "Ihr Passwort wurde geändert.", "Log in again", "重新登录 now", "x"]
RATES = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "act_dropout": 0.3}


@pytest.fixture(scope="module")
def tokenizer():
    return ErnieMTokenizer.from_pretrained(cases.TINY)


def peer_of(model):
    """The XLMRobertaModel with an ErnieMModel's weights, which computes the same for rows padded on the right."""
    fields = model.config.to_dict().items()
    kept = {name: value for name, value in fields if name in XLMRobertaConfig.__dataclass_fields__}
    peer = XLMRobertaModel(XLMRobertaConfig(**{**kept, "model_type": "xlm-roberta", "type_vocab_size": 1}))
    peer.load_state_dict(xlm_roberta.remap(model.state_dict()))
    return peer.eval()


def small_config(hidden, heads, intermediate):
    return ErnieMConfig(
        vocab_size=50,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        max_position_embeddings=40,
        initializer_range=hidden**-0.5,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )


def assert_same_as_peer(model):
    """States at real tokens, of a batch and of one short row."""
    peer = peer_of(model)
    for inputs in INPUTS:
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        with torch.no_grad():
            assert_close(model(**inputs).last_hidden_state[real], peer(**inputs).last_hidden_state[real])


def cubes(model, inputs=BATCH):
    """The sum of the cubed states of real tokens."""
    hidden = model(**inputs).last_hidden_state
    return (hidden[REAL] if inputs is BATCH else hidden).pow(3).sum()


def gradients_of(model=None):
    """The gradients of `cubes`, by default of a model that has just been loaded."""
    model = load().train() if model is None else model
    cubes(model).backward()
    return gradients(model)


def assert_same_results(model, expected):
    """Of a batch and of one short row, with autograd and without."""
    for inputs in INPUTS:
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                values, others = logits_of(model(**inputs)), logits_of(expected(**inputs))
            for name, value in others.items():
                assert_close(values[name], value)


def with_weights(model, change):
    """A copy of a model whose parameters are what `change` makes of each of its own."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(change(parameter.detach())))
    return model


# ---- Loading and saving


def test_heads_load_what_other_heads_have_saved(tmp_path):
    """What the file lacks is initialised, not whatever was in memory: a pooler, also one that no loss reads."""
    saved = load(ErnieMForTokenClassification, num_labels=5)
    saved.save_pretrained(tmp_path)
    for model_class, config in LAYOUT_CASES.values():
        if model_class is ErnieMForTokenClassification:
            continue
        options = {"num_labels": 2, **config, "ignore_mismatched_sizes": True}
        model, info = model_class.from_pretrained(tmp_path, **options, output_loading_info=True)
        trunk = dict(saved.ernie_m.state_dict())
        for name, weights in model.base_model.state_dict().items():
            if "pooler" not in name:
                assert torch.equal(weights, trunk.pop(name)), name
        assert not trunk
        if model.base_model.pooler is not None:
            dense = model.base_model.pooler.dense
            assert any("pooler.dense.weight" in name for name in info["missing_keys"])
            # Four standard errors of a normal distribution's standard deviation.
            assert dense.weight.std().item() == pytest.approx(0.15, rel=4 / (2 * dense.weight.numel()) ** 0.5)
            assert not dense.bias.any()


def test_a_config_of_an_older_version(tmp_path):
    fields = json.loads((cases.TINY / "config.json").read_text(encoding="utf-8"))
    del fields["dtype"]
    fields |= {"torch_dtype": "float16", "transformers_version": "4.27.0", "gradient_checkpointing": False}
    fields |= {"use_cache": True, "is_decoder": False, "position_embedding_type": "absolute", "type_vocab_size": 16}
    fields |= {"_attn_implementation_autoset": True, "torchscript": False, "tie_encoder_decoder": False}
    fields |= {"id2label": {"0": "A", "1": "B", "2": "C"}, "label2id": {"A": 0, "B": 1, "C": 2}, "bos_token_id": None}
    shutil.copytree(cases.TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    model = ErnieMForSequenceClassification.from_pretrained(tmp_path)
    assert (model.dtype, model.num_labels, model.config.id2label[2]) == (torch.float16, 3, "C")
    for name, weights in load().half().state_dict().items():
        assert torch.equal(model.ernie_m.state_dict()[name], weights), name


def test_fewer_layers():
    """By the config, or cut by hand: the states that all layers pass on the way."""
    states = load()(**BATCH, output_hidden_states=True).hidden_states
    for layers in (0, 1):
        shorter, cut = load(num_hidden_layers=layers), load()
        cut.encoder.layers = cut.encoder.layers[:layers]
        for model in (shorter, cut):
            assert_close(model(**BATCH).last_hidden_state, states[layers])


def test_more_layers():
    """Stacked by hand, in training: as a model that is made with so many, with the same dropout."""
    stacked = ErnieMModel.from_pretrained(cases.TINY, **RATES)
    stacked.encoder.layers.extend(copy.deepcopy(stacked.encoder.layers))
    made = ErnieMModel(ErnieMConfig.from_pretrained(cases.TINY, **RATES, num_hidden_layers=4))
    made.load_state_dict(stacked.state_dict())
    found = []
    for model in (stacked, made):
        torch.manual_seed(3)
        found.append(model.train()(**BATCH).last_hidden_state)
    assert_close(*found)


def from_meta(assign):
    config = load().config
    with torch.device("meta"):
        model = ErnieMModel(config)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(load_file(cases.TINY / "model.safetensors"), assign=assign)
    return model


def dispatched():
    config = load().config
    with accelerate.init_empty_weights():
        model = ErnieMModel(config)
    return accelerate.load_checkpoint_and_dispatch(model, str(cases.TINY), device_map={"": "cpu"})


def through_torch(folder):
    torch.save(load().state_dict(), folder / "state.pt")
    model = ErnieMModel(load().config)
    model.load_state_dict(torch.load(folder / "state.pt", weights_only=True, mmap=True), assign=True)
    return model


def through_safetensors(folder):
    save_model(load(), str(folder / "state.safetensors"))
    model = ErnieMModel(load().config)
    load_model(model, str(folder / "state.safetensors"))
    return model


def through_a_variant(folder):
    load().save_pretrained(folder, variant="mine")
    assert (folder / "model.mine.safetensors").exists()
    return ErnieMModel.from_pretrained(folder, variant="mine")


WAYS_TO_LOAD = {
    "meta, assigned": lambda folder: from_meta(assign=True),
    "meta, made empty": lambda folder: from_meta(assign=False),
    "accelerate": lambda folder: dispatched(),
    "torch.save, mapped": through_torch,
    "safetensors": through_safetensors,
    "variant": through_a_variant,
}


@pytest.mark.parametrize("way", WAYS_TO_LOAD.values(), ids=WAYS_TO_LOAD)
def test_ways_to_load_weights(way, tmp_path):
    """They compute, and they can be trained, also where they are mapped from a file."""
    model = way(tmp_path).eval()
    assert_same_results(model, load())
    assert_same_gradients(gradients_of(model), gradients_of())
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert (model(**BATCH).last_hidden_state - load()(**BATCH).last_hidden_state).abs().max() > 0.01


class Words(ErnieMPreTrainedModel):
    """A head of a user's own, which predicts words by the word table."""

    _tied_weights_keys = {"decoder.weight": "ernie_m.embeddings.word_embeddings.weight"}  # noqa: RUF012 (as the base)

    def __init__(self, config):
        super().__init__(config)
        self.ernie_m = ErnieMModel(config, add_pooling_layer=False)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.decoder

    def set_output_embeddings(self, value):
        self.decoder = value

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.decoder(self.ernie_m(input_ids, attention_mask=attention_mask).last_hidden_state)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_a_head_of_ones_own_that_shares_the_word_table(tmp_path):
    """The gradient is the sum of both uses'; the tie survives saving, loading and resizing."""
    model, untied = load(Words).train(), load(Words).train()
    table = "ernie_m.embeddings.word_embeddings.weight"
    assert model.decoder.weight is model.get_parameter(table)
    untied.decoder.weight = nn.Parameter(untied.decoder.weight.detach().clone())
    for each in (model, untied):
        each(**BATCH, labels=IDS.masked_fill(~REAL, -100)).backward()
    expected = gradients(untied)
    expected[table] = expected[table] + expected.pop("decoder.weight")
    assert_same_gradients(gradients(model), expected)

    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "decoder.weight" not in file.keys()  # noqa: SIM118 (it is no dict)
    again, info = Words.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    again.resize_token_embeddings(cases.VOCABULARY + 1, pad_to_multiple_of=64)
    assert again.config.vocab_size == again.decoder.out_features == 2304
    assert again.decoder.weight is again.get_parameter(table)


# ---- Batches


def test_the_order_of_rows_does_not_matter():
    order = torch.tensor([2, 0, 3, 1, 2])
    outputs, expected = load()(IDS[order], attention_mask=MASK[order]), load()(**BATCH)
    assert_close(outputs.last_hidden_state, expected.last_hidden_state[order])
    assert_close(outputs.pooler_output, expected.pooler_output[order])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_rows_that_are_no_numbers_stay_alone(value):
    """And what stands at padding is not read."""
    model = load()
    embeds = model.get_input_embeddings()(IDS).detach()
    expected = model(inputs_embeds=embeds, attention_mask=MASK).last_hidden_state
    spoilt = embeds.masked_fill(~REAL[..., None], value)
    assert_close(model(inputs_embeds=spoilt, attention_mask=MASK).last_hidden_state, expected)
    spoilt[1] = float("nan")
    outputs = model(inputs_embeds=spoilt, attention_mask=MASK).last_hidden_state
    assert outputs[1, REAL[1]].isnan().all()
    others = [0, 2, 3]
    assert_close(outputs[others], expected[others])


def batch_for(model):
    """`BATCH`, whose rows are the choices of one where a model takes choices."""
    choices = isinstance(model, ErnieMForMultipleChoice)
    return {name: each[None] if choices else each for name, each in BATCH.items()}


@pytest.mark.parametrize("head", LAYOUT_CASES)
def test_one_row_of_one_token(head):
    """No dimension is squeezed away."""
    model_class, config = LAYOUT_CASES[head]
    model, single = load(model_class, **config), slice(3, 4)
    assert RIGHT[single].sum() == 1
    batch = batch_for(model)
    alone = logits_of(model(batch["input_ids"][..., single, :1]))
    for name, value in logits_of(model(**batch)).items():
        expected = value[:, single] if head == "choice" else value[single]
        per_token = expected.dim() > 1 and expected.shape[1] == COLUMNS
        assert_close(alone[name], expected[:, :1] if per_token else expected)


def test_views_as_inputs():
    """Every second column or row, transposed, repeated without a copy."""
    model, mask = load(), MASK[:1].expand(ROWS, -1)
    for ids in (IDS[:, ::2], IDS[::2], IDS.t().contiguous().t(), IDS[:1].expand(3, -1)):
        assert_close(model(ids).last_hidden_state, model(ids.clone().contiguous()).last_hidden_state)
    outputs, expected = model(FULL, attention_mask=mask), model(FULL, attention_mask=mask.contiguous())
    assert_close(outputs.last_hidden_state, expected.last_hidden_state)


def test_results_are_the_callers_to_keep():
    """Later calls, of this model and of others with other sizes, write to none of them."""
    models = [load(), ErnieMModel(small_config(96, 3, 40)).eval(), ErnieMModel(small_config(32, 2, 200)).eval()]
    kept = []
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            for columns in (6, 11, 3):
                for model in models:
                    ids = FULL[:3, :columns] % 46 + 4
                    outputs = model(ids, output_hidden_states=True, output_attentions=True)
                    results = [*outputs.hidden_states, *outputs.attentions, outputs.pooler_output]
                    kept.append((results, [each.clone() for each in results]))
                    assert all(each.is_contiguous() for each in outputs.hidden_states)
    for results, copies in kept:
        assert all(map(torch.equal, results, copies))


def test_a_longer_table_of_positions():
    """Put in by hand, as models for long texts are made."""
    model = load()
    table = nn.Embedding(1026, cases.HIDDEN, padding_idx=1)
    with torch.no_grad():
        table.weight[: model.config.max_position_embeddings] = model.embeddings.position_embeddings.weight
    model.embeddings.position_embeddings, model.config.max_position_embeddings = table, 1026
    ids = torch.randint(4, cases.VOCABULARY, (2, 700), generator=torch.Generator().manual_seed(0))
    ids[1, 600:] = cases.PAD
    with torch.no_grad():
        outputs, expected = model(ids).last_hidden_state, peer_of(model)(ids, ids != cases.PAD).last_hidden_state
    assert_close(outputs[ids != cases.PAD], expected[ids != cases.PAD])


# ---- Masks


def test_under_a_causal_mask_a_prefix_is_all_there_is():
    model, mask = load(), torch.ones(ROWS, COLUMNS, COLUMNS).tril()
    whole = model(FULL, attention_mask=mask).last_hidden_state
    for length in (1, 7):
        prefix = model(FULL[:, :length], attention_mask=mask[:, :length, :length]).last_hidden_state
        assert_close(whole[:, :length], prefix)


def test_a_bias_of_the_scores_can_be_learnt():
    model = load().double()
    shape = (1, model.config.num_attention_heads, COLUMNS, COLUMNS)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    direction = random_weights(bias).double()

    def loss_at(bias):
        return model(FULL, attention_mask=bias).last_hidden_state.pow(3).sum()

    (gradient,) = torch.autograd.grad(loss_at(bias), bias)
    with torch.no_grad():
        difference = (loss_at(bias + 1e-6 * direction) - loss_at(bias - 1e-6 * direction)) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)


# ---- Sizes and numbers


@pytest.mark.parametrize(
    "sizes",
    [(60, 4, 77), (312, 12, 1200), (20, 1, 7), (48, 16, 64), (129, 3, 33)],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
def test_sizes_that_no_published_model_has(sizes):
    """Heads of 15, 26, 20, 3 and 43 features; values and the word table's gradient."""
    torch.manual_seed(0)
    model = ErnieMModel(small_config(*sizes)).eval()
    ids = (IDS % 46 + 4).masked_fill(~REAL, cases.PAD)
    found = []
    for each in (model, peer_of(model)):
        with torch.no_grad():
            alone = each(ids[1:2, :7]).last_hidden_state
        hidden = each(ids, attention_mask=MASK).last_hidden_state[REAL]
        (hidden * random_weights(hidden)).sum().backward()
        found.append((hidden, alone, {"words": each.embeddings.word_embeddings.weight.grad}))
    assert_close(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1])
    assert_same_gradients(found[0][2], found[1][2])


# Those of transformers that have no parameters of their own.
ACTIVATIONS = sorted(name for name in ACT2FN if not list(ACT2FN[name].parameters()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    model = load(hidden_act=activation)
    assert_same_as_peer(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 1000.0])
@pytest.mark.parametrize("norms", ["narrow", "wide"])
def test_half_precision_loses_no_more_than_elsewhere(norms, factor, dtype):
    """Also with sums of thousands before each norm, whose squares float16 cannot hold, and with norms in float32."""
    exact = load()
    with torch.no_grad():
        for layer in exact.encoder.layers:
            for linear in (layer.linear2, layer.self_attn.out_proj):
                for parameter in linear.parameters():
                    parameter.mul_(factor)
    found = []
    for model in (exact, peer_of(exact)):
        half = copy.deepcopy(model).to(dtype)
        if norms == "wide":
            for module in half.modules():
                if isinstance(module, nn.LayerNorm):
                    module.float()
        with torch.no_grad():
            hidden, expected = (each(**BATCH).last_hidden_state[REAL] for each in (half, model.double()))
        found.append(relative_error(hidden, expected))
    assert found[0] <= 2 * found[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_not_the_models(dtype):
    model = load()
    inputs = [*INPUTS, {"input_ids": IDS, "attention_mask": MASK[:, None].expand(-1, COLUMNS, -1)}]
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            expected = [model(**each).last_hidden_state for each in inputs]
            torch.set_default_dtype(dtype)
            try:
                found = [model(**each).last_hidden_state for each in inputs]
            finally:
                torch.set_default_dtype(torch.float32)
        for hidden, other in zip(found, expected, strict=True):
            assert_close(hidden, other)


LAID_OUT = {
    "transposed": lambda parameter: parameter.mT.contiguous().mT if parameter.dim() == 2 else parameter,
    "every second": lambda parameter: torch.stack([parameter, parameter], -1)[..., 1],
    "views of one buffer": lambda parameter: (
        torch.cat([parameter.flatten()] * 3).narrow(0, parameter.numel(), parameter.numel()).view_as(parameter)
    ),
}


@pytest.mark.parametrize("change", LAID_OUT.values(), ids=LAID_OUT)
def test_layouts_of_weights(change, tmp_path):
    model = with_weights(load(), change)
    assert_same_results(model, load())
    assert_same_gradients(gradients_of(model), gradients_of())
    model.save_pretrained(tmp_path)
    assert_same_results(ErnieMModel.from_pretrained(tmp_path).eval(), load())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_a_scaled_loss(dtype):
    """A step with gradients that are no numbers is left out."""
    labels = torch.arange(ROWS) % 3
    found = []
    for enabled in (True, False):
        model = load(ErnieMForSequenceClassification, num_labels=3).train()
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", 2.0**10)
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = model(**BATCH, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found.append(gradients(model))
    for name, gradient in found[1].items():
        if "k_proj.bias" not in name:  # which cancels to zero
            assert relative_error(found[0][name], gradient) < 8 * torch.finfo(dtype).eps, name
    optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", 2.0**10)
    scaler.scale(model(**BATCH, labels=labels).loss * torch.inf).backward()
    scaler.step(optimizer)
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())


# ---- Labels

SEVERAL = torch.eye(3)[[0, 2, 1, 1]]
HEADS_AND_LABELS = {
    "classes": (ErnieMForSequenceClassification, {"num_labels": 3}, {"labels": torch.tensor([0, 2, 1, 1])}),
    "several classes": (ErnieMForSequenceClassification, {"num_labels": 3}, {"labels": SEVERAL}),
    "number": (ErnieMForSequenceClassification, {"num_labels": 1}, {"labels": torch.tensor([3.0, 0.0, 1.0, 5.0])}),
    "tokens": (ErnieMForTokenClassification, {"num_labels": 3}, {"labels": IDS % 3}),
    "columns": (ErnieMForQuestionAnswering, {}, {"start_positions": 1 - MASK[:, 1], "end_positions": MASK[:, 3]}),
    "spans": (ErnieMForInformationExtraction, {}, {"start_positions": IDS % 2, "end_positions": (IDS + 1) % 2}),
    "choice": (ErnieMForMultipleChoice, {}, {"labels": torch.tensor([2])}),
}
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("head", HEADS_AND_LABELS)
def test_labels_of_any_integers(head):
    """As NumPy makes them on some systems, or as they are packed to save memory; at padding they become -100."""
    model_class, config, labels = HEADS_AND_LABELS[head]
    model = load(model_class, **config)
    expected = model(**batch_for(model), **labels).loss
    for dtype in INTEGERS:
        given = {name: values.to(dtype) for name, values in labels.items()}
        if all(torch.equal(given[name].to(values.dtype), values) for name, values in labels.items()):
            model = load(model_class, **config)  # the first labels decide what kind of problem it is
            assert_close(model(**batch_for(model), **given).loss, expected)


def test_several_classes_at_once_by_the_config():
    """Or by the labels' shape, where there is a place for every class."""
    expected = nn.functional.binary_cross_entropy_with_logits
    for problem_type in (None, "multi_label_classification"):
        model = load(ErnieMForSequenceClassification, num_labels=3, problem_type=problem_type)
        for labels in (SEVERAL, SEVERAL.long(), SEVERAL.bool()):
            outputs = model(**BATCH, labels=labels)
            assert_close(outputs.loss, expected(outputs.logits, SEVERAL))
        assert model.config.problem_type == "multi_label_classification"


def test_classes_that_are_no_integers_are_refused_by_name():
    for model_class, labels, name in (
        (ErnieMForTokenClassification, {"labels": (IDS % 2).float()}, "labels"),
        (
            ErnieMForQuestionAnswering,
            {"start_positions": MASK[:, 0] / 2, "end_positions": MASK[:, 0]},
            "start_positions",
        ),
    ):
        with pytest.raises(ValueError, match=rf"{name} has dtype torch\.float32; it must hold integers: .*\.long\(\)"):
            load(model_class)(**BATCH, **labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head", HEADS_AND_LABELS)
def test_losses_in_other_dtypes(head, dtype):
    """Labels stay in float32: loss and gradient are right beside logits of any dtype."""
    model_class, config, labels = HEADS_AND_LABELS[head]
    found = []
    for each in (dtype, torch.float32):
        model = load(model_class, **config).to(each)
        loss = model(**batch_for(model), **labels).loss
        loss.backward()
        found.append((loss, model.get_input_embeddings().weight.grad))
    # As half precision is bound in test_modeling.py; in float64 the float32 beside it rounds.
    eps = max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
    assert relative_error(found[0][0], found[1][0]) < 4 * eps
    assert found[0][1].dtype == dtype
    assert relative_error(found[0][1], found[1][1]) < 16 * eps


# ---- Training

FROZEN = {
    "biases alone": lambda name: name.endswith("bias"),
    "norms alone": lambda name: "norm" in name,
    "the last layer alone": lambda name: "layers.1" in name,
    "attention alone": lambda name: "self_attn" in name,
    "words alone": lambda name: "word_embeddings" in name,
    "one projection alone": lambda name: name == "encoder.layers.0.self_attn.self_attn.v_proj.weight",
}


@pytest.mark.parametrize("trained", FROZEN.values(), ids=FROZEN)
def test_parts_of_a_model_are_trained(trained):
    """They get the gradients that they get where all is, and no others get any."""
    model = load().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    found, expected = gradients_of(model), gradients_of()
    assert found.keys() == set(filter(trained, expected))
    assert_same_gradients(expected | found, expected)


def accumulated(model):
    for row in range(ROWS):
        length = int(MASK[row].sum())
        cubes(model, {"input_ids": IDS[row : row + 1, :length]}).backward()


def with_inference_before_backward(model):
    loss = cubes(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(FULL)
            model(FULL[:1])
    loss.backward()


def with_results_changed_in_place(model):
    hidden = model(**BATCH).last_hidden_state
    hidden.masked_fill_(~REAL[..., None], 7.0)
    hidden.mul_(2.0)
    (hidden[REAL] / 2).pow(3).sum().backward()


def with_results_of_a_full_batch_changed_in_place(model):
    for row in range(ROWS):
        hidden = model(IDS[row : row + 1, : int(MASK[row].sum())]).last_hidden_state
        hidden.mul_(2.0)
        (hidden / 2).pow(3).sum().backward()


def in_another_thread(model):
    thread = threading.Thread(target=cubes(model).backward)
    thread.start()
    thread.join()


def with_a_retained_graph(model):
    loss = cubes(model)
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()


def with_saved_tensors_elsewhere(model):
    with torch.autograd.graph.save_on_cpu():
        loss = cubes(model)
    loss.backward()


def with_saved_tensors_packed(model):
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (tensor.dtype, tensor.detach().clone().numpy()),
        lambda packed: torch.from_numpy(packed[1]).to(packed[0]),
    ):
        loss = cubes(model)
    loss.backward()


def with_anomalies_detected(model):
    with torch.autograd.set_detect_anomaly(True):
        cubes(model).backward()


def deterministically(model):
    torch.use_deterministic_algorithms(True)
    try:
        cubes(model).backward()
    finally:
        torch.use_deterministic_algorithms(False)


def in_replicas(model):
    """As `DataParallel` makes them: their parameters are tensors that depend on the model's."""
    cubes(replica_of(model)).backward()


def replica_of(model):
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in module.named_parameters(recurse=False):
            setattr(replica, name, parameter.view_as(parameter))
    return replicas[model]


WAYS_TO_TRAIN = (
    accumulated,
    with_inference_before_backward,
    with_results_changed_in_place,
    with_results_of_a_full_batch_changed_in_place,
    in_another_thread,
    with_a_retained_graph,
    with_saved_tensors_elsewhere,
    with_saved_tensors_packed,
    with_anomalies_detected,
    deterministically,
    in_replicas,
)


@pytest.mark.parametrize("way", WAYS_TO_TRAIN, ids=lambda way: way.__name__)
def test_ways_to_train(way):
    """All give the same gradients."""
    model = load().train()
    way(model)
    assert_same_gradients(gradients(model), gradients_of())


def test_replicas_take_head_masks():
    """They have no parameters to take the dtype from."""
    model, head_mask = load(), torch.tensor([1.0, 0.25])
    outputs, expected = (each(**BATCH, head_mask=head_mask) for each in (replica_of(model), model))
    assert_close(outputs.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model(reentrant):
    """It runs the model twice, with the same dropout."""
    found = []
    for checkpointed in (True, False):
        model = ErnieMModel.from_pretrained(cases.TINY, **RATES).train()
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()

        def run(embeds, model=model):
            return model(inputs_embeds=embeds, attention_mask=MASK).last_hidden_state[REAL]

        torch.manual_seed(3)
        hidden = checkpoint(run, embeds, use_reentrant=reentrant) if checkpointed else run(embeds)
        hidden.pow(3).sum().backward()
        found.append((hidden, {"embeds": embeds.grad, **gradients(model)}))
    assert_close(found[0][0], found[1][0])
    assert_same_gradients(found[0][1], found[1][1])


def test_two_views_of_a_text_with_dropout():
    """As contrastive learning makes them: by two calls, or by one with each text twice. They differ, and both teach."""
    model = ErnieMModel.from_pretrained(cases.TINY, **RATES).train()
    torch.manual_seed(3)
    first, second = (model(**BATCH).pooler_output for _ in range(2))
    both = model(IDS.repeat(2, 1), attention_mask=MASK.repeat(2, 1)).pooler_output
    for one, other in ((first, second), both.split(ROWS)):
        assert ((one - other).abs().amax(1) > 0.1).all()
    (first - second).square().sum().backward()
    assert all(gradient.any() for gradient in gradients(model).values())


def test_two_heads_on_one_encoder():
    """The gradients of both losses add up in it."""
    sequence, token = load(ErnieMForSequenceClassification), load(ErnieMForTokenClassification)
    token.ernie_m = sequence.ernie_m
    losses = [lambda: sequence(**BATCH).logits.pow(2).sum(), lambda: token(**BATCH).logits[REAL].pow(2).sum()]
    (losses[0]() + losses[1]()).backward()
    together = gradients(sequence)
    sequence.zero_grad()
    for loss in losses:
        loss().backward()
    assert_same_gradients(gradients(sequence), together)


def test_adversarial_noise_in_the_word_table():
    """Added to the parameter's data and taken away again: the loss rises as the gradient says."""
    model = load().double().train()
    table = model.get_input_embeddings().weight
    loss = cubes(model)
    loss.backward()
    step = 1e-6 * table.grad / table.grad.norm()
    with torch.no_grad():
        table.data.add_(step)
        above = cubes(model)
        table.data.sub_(2 * step)
        below = cubes(model)
        table.data.add_(step)
        assert cubes(model).item() == pytest.approx(loss.item(), rel=1e-12)
    assert (above - below).item() / 2e-6 == pytest.approx(table.grad.norm().item(), rel=1e-6)


def test_averaged_weights():
    model = load().train()
    average, optimizer, seen = AveragedModel(model), torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(3):
        cubes(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
    expected = load()
    with torch.no_grad():
        for parameter, *states in zip(expected.parameters(), *seen, strict=True):
            parameter.copy_(torch.stack(states).mean(0))
    assert_same_results(average.module.eval(), expected)
    assert (average.module(**BATCH).last_hidden_state - model(**BATCH).last_hidden_state).abs().max() > 0.01


def test_parametrised_weights():
    """They are what their parametrisations make of others, which are trained."""
    model = load()
    for layer in model.encoder.layers:
        parametrizations.weight_norm(layer.linear1)
        parametrizations.spectral_norm(layer.linear2)
        parametrizations.orthogonal(layer.self_attn.out_proj)
        parametrizations.weight_norm(layer.self_attn.self_attn.k_proj)
    model.eval()
    expected = load()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            *path, attribute = name.split(".")
            parameter.copy_(getattr(model.get_submodule(".".join(path)), attribute))
    assert_same_results(model, expected)
    cubes(model.train()).backward()
    assert all(each.grad is not None for name, each in model.named_parameters() if "pooler" not in name)


def test_sharded_weights():
    """Each layer gathers its own when it is called, whole modules at a time."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), load().train()
        for module in (*model.encoder.layers, model):
            fully_shard(module, mesh=mesh)
        assert_same_results(model, load())
        found = gradients_of(model)
        assert_same_gradients({name: each.full_tensor() for name, each in found.items()}, gradients_of())
    finally:
        dist.destroy_process_group()


# ---- Looking inside


def test_the_gradient_of_each_row():
    """By torch.autograd in a loop and at once, and by torch.func; nothing comes from padding or from other rows."""
    model = load(ErnieMForSequenceClassification, num_labels=1)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def scores(embeds):
        return model(inputs_embeds=embeds, attention_mask=MASK).logits[:, 0]

    logits, rows = scores(embeds), torch.eye(ROWS)
    one_by_one = torch.stack([torch.autograd.grad(logits, embeds, row, retain_graph=True)[0] for row in rows])
    (at_once,) = torch.autograd.grad(logits, embeds, rows, is_grads_batched=True, retain_graph=True)
    assert_same_gradients({"at once": at_once}, {"at once": one_by_one})
    assert_same_gradients({"func": torch.func.jacrev(scores)(embeds.detach())}, {"func": one_by_one})
    own = torch.eye(ROWS, dtype=torch.bool)[:, :, None] & REAL
    assert not one_by_one[~own].any()
    assert one_by_one[own].any(-1).all()


def test_hooks_collect_what_layers_compute():
    """The real tokens of all rows, one row after another: the hidden states without padding."""
    model, seen = load(), []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
    for mode in (torch.enable_grad, torch.inference_mode):
        seen.clear()
        with mode():
            states = model(**BATCH, output_hidden_states=True).hidden_states
        for output, state in zip(seen, states[1:], strict=True):
            assert torch.equal(output, state[REAL])


def test_the_gradient_of_what_a_layer_computes():
    """Of its result as a hook sees it."""
    model, seen = load(), []
    peer = peer_of(model)
    model.encoder.layers[0].register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
    (found,) = torch.autograd.grad(cubes(model), seen[0])
    outputs = peer(**BATCH, output_hidden_states=True)
    (expected,) = torch.autograd.grad(outputs.last_hidden_state[REAL].pow(3).sum(), outputs.hidden_states[1])
    assert_same_gradients({"layer": found}, {"layer": expected[REAL]})


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("where", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
@pytest.mark.parametrize("head", ["classes", "tokens", "spans"])
def test_shapes_without_values(head, where, mode):
    """As memory and time are estimated: shapes of results and gradients, and the count of operations."""
    model_class, config, labels = HEADS_AND_LABELS[head]
    config = load(model_class, dropout=0.3, **config).config
    found = []
    for context in (where, contextlib.nullcontext):
        with context(), mode(), FlopCounterMode(display=False) as counter:
            model = model_class(config).train()
            given = {name: torch.ones(each.shape, dtype=each.dtype) for name, each in labels.items()}
            ids = torch.full((ROWS, COLUMNS), 4)
            outputs = [model(ids, **given, output_attentions=attentions).to_tuple() for attentions in (False, True)]
            if mode is torch.enable_grad:
                sum(loss for loss, *_ in outputs).backward()
        results = [each.shape for each in tree_leaves(outputs)]
        sizes = {name: each.shape for name, each in gradients(model).items()}
        found.append((results, sizes, counter.get_total_flops()))
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_an_error_on_the_way_leaves_nothing_behind(mode):
    model, expected = load(), load()
    handle = model.encoder.layers[1].linear1.register_forward_hook(lambda *_: pytest.fail("out of memory"))
    for inputs in INPUTS:
        with mode(), pytest.raises(pytest.fail.Exception, match="out of memory"):
            model(**inputs)
    handle.remove()
    assert_same_results(model, expected)


def test_a_model_that_is_let_go_is_freed():
    """Nothing keeps it or its weights: no cache, no graph, no memory of calls."""
    model = load().train()
    cubes(model).backward()
    with torch.inference_mode():
        model(**INPUTS[1])
    kept = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert not any(reference() is not None for reference in kept)


# ---- Adapters


def with_random_adapters(model, config, name="default"):
    model = peft.get_peft_model(model, config, adapter_name=name)
    torch.manual_seed(11)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


TUNERS = {
    "all linears": peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"),
    "weights in size and direction": peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS", use_dora=True),
    "biases too": peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS", bias="all"),
    "rotations": peft.OFTConfig(target_modules=["linear1", "q_proj"], task_type="SEQ_CLS"),
    "reflections": peft.HRAConfig(target_modules=["out_proj", "linear2"], task_type="SEQ_CLS"),
    "shared random matrices": peft.VeraConfig(target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("config", TUNERS.values(), ids=TUNERS)
def test_adapters_are_saved_with_their_head_and_merged(config, tmp_path):
    base = load(ErnieMForSequenceClassification)
    untouched = base(**BATCH).logits
    model = with_random_adapters(base, config)
    adapted = model(**BATCH).logits.detach()
    assert (adapted - untouched).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    other = load(ErnieMForSequenceClassification)
    nn.init.zeros_(other.classifier.weight)  # which comes with the adapter
    again = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    assert_close(again(**BATCH).logits, adapted)
    assert_close(model.merge_and_unload()(**BATCH).logits, adapted)


def test_several_adapters_in_turn():
    def config():
        return peft.LoraConfig(target_modules=["v_proj", "linear2"])

    model = with_random_adapters(load(), config(), "first")
    model.add_adapter("second", config())
    model.eval()
    first = model(**BATCH).last_hidden_state
    model.set_adapter("second")
    assert_close(model(**BATCH).last_hidden_state, load()(**BATCH).last_hidden_state)
    model.set_adapter("first")
    model.merge_adapter()
    assert_close(model(**BATCH).last_hidden_state, first)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert_close(model(**BATCH).last_hidden_state, load()(**BATCH).last_hidden_state)


def test_learnt_prompts():
    """Embeddings in front of every row, as if they were the first tokens."""
    count = 3
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=count)
    model = with_random_adapters(load(), config)
    hidden = model(**BATCH).last_hidden_state
    plain, prompts = load(), model.get_prompt(batch_size=ROWS)
    embeds = torch.cat([prompts, plain.get_input_embeddings()(IDS)], 1)
    mask = torch.cat([torch.ones(ROWS, count, dtype=torch.long), MASK], 1)
    assert_close(hidden, plain(inputs_embeds=embeds, attention_mask=mask).last_hidden_state)


# ---- Text


def test_texts_without_tokens(tokenizer):
    """Alone and beside others; whatever they are made of."""
    empty = ["", "  ", "\n", "\t \r\n", "\u200b", "\ufeff", "\u3000", "\ud800"]
    batch = tokenizer([*TEXTS, *empty], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1)[len(TEXTS) :].eq(2).all()
    with torch.no_grad():
        outputs, alone = load()(**batch), load()(**tokenizer("", return_tensors="pt"))
    for row in range(len(TEXTS), len(TEXTS) + len(empty)):
        assert_close(outputs.last_hidden_state[row, :2], alone.last_hidden_state[0])
        assert_close(outputs.pooler_output[row], alone.pooler_output[0])


def test_spellings_of_the_same_text(tokenizer):
    """Line ends and tabs are spaces; composed and decomposed characters, wide and narrow ones, are the same."""
    for text, others in (
        ("a b", ["a\nb", "a\r\nb", "a\tb", " a \n\n b ", "a\u00a0b", "a\u2003b", "a\u2028b"]),
        ("\u00e9", ["e\u0301"]),
        ("\u30ac", ["\uff76\uff9e", "\u30ab\u3099"]),
        ("ABC 12", ["\uff21\uff22\uff23\u3000\uff11\uff12"]),
    ):
        for other in others:
            assert tokenizer(other)["input_ids"] == tokenizer(text)["input_ids"], other


def test_no_padding_is_predicted(tokenizer):
    """Nor [CLS] or [SEP], whether the rows come with a mask of special tokens or without."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=1 - 1e-9)
    for options in ({}, {"return_special_tokens_mask": True}):
        rows = [tokenizer(text, **options) for text in TEXTS]
        batch = collator([{name: row[name] for name in row if options or name == "input_ids"} for row in rows])
        words = batch["attention_mask"].bool()
        for row, mask in zip(rows, words, strict=True):
            mask[[0, len(row["input_ids"]) - 1]] = False
        assert torch.equal(batch["labels"] != -100, words)
        plain = tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")["input_ids"]
        assert torch.equal(batch["labels"][words], plain[words])
        assert torch.equal(batch["input_ids"][~words], plain[~words])


def test_kinds_of_ids(tokenizer):
    """Decoded, and padded by collators: lists, arrays and tensors alike."""
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    texts = [tokenizer.decode(row) for row in rows]
    expected = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for kind in (list, np.array, torch.tensor, lambda row: np.array(row, dtype=np.int32)):
        assert [tokenizer.decode(kind(row)) for row in rows] == texts
        features = [{"input_ids": kind(row), "attention_mask": kind([1] * len(row))} for row in rows]
        batch = DataCollatorWithPadding(tokenizer)(features)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert tokenizer.batch_decode(torch.tensor(rows[:1])) == texts[:1]
    assert tokenizer(np.str_(TEXTS[0]))["input_ids"] == rows[0]
    assert tokenizer(tuple(TEXTS))["input_ids"] == rows


def test_added_tokens_from_the_tokenizer_to_the_model(tmp_path):
    """Saved after the files that they came from are gone; the table is widened to a round number of rows."""
    shutil.copytree(cases.TINY, tmp_path / "old")
    tokenizer = ErnieMTokenizer.from_pretrained(tmp_path / "old")
    shutil.rmtree(tmp_path / "old")
    tokenizer.add_tokens(["<e1>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<e2>"]})
    tokenizer.save_pretrained(tmp_path)
    loaded, text = ErnieMTokenizer.from_pretrained(tmp_path), "a <e1>b <e2>c"
    batch = loaded(text, return_tensors="pt")
    assert batch["input_ids"].tolist() == [tokenizer(text)["input_ids"]] == [copy.deepcopy(loaded)(text)["input_ids"]]
    assert {2300, 2301} < set(batch["input_ids"][0].tolist())
    assert loaded.decode(batch["input_ids"][0], skip_special_tokens=True) == "a <e1> b c"
    model = load()
    model.resize_token_embeddings(len(loaded), pad_to_multiple_of=64)
    model.save_pretrained(tmp_path)
    again = ErnieMModel.from_pretrained(tmp_path).eval()
    assert again.config.vocab_size == 2304
    assert_close(again(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_spans_in_a_pipeline(tokenizer):
    """Given along with a text, since the pipeline asks no tokenizer in Python for them."""
    model = load(ErnieMForTokenClassification, num_labels=3)
    options = {"ignore_labels": [], "aggregation_strategy": "simple"}
    tag = pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu", **options)
    for text in TEXTS:
        spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        labels = model(**tokenizer(text, return_tensors="pt")).logits[0, 1:-1].argmax(-1).tolist()
        found = tag(text, offset_mapping=[spans])
        groups = [place for place in range(len(labels)) if place == 0 or labels[place] != labels[place - 1]]
        for group, start, end in zip(found, groups, [*groups[1:], len(labels)], strict=True):
            assert group["entity_group"] == f"LABEL_{labels[start]}"
            assert (group["start"], group["end"]) == (spans[1 + start][0], spans[end][1])


def test_a_pipeline_of_long_texts(tokenizer):
    """Cut to 512 tokens if it is asked to, and otherwise refused by name."""
    model, text = load(ErnieMForSequenceClassification), "password " * 900
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    (found,) = classify(text, truncation=True)
    cut = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
    assert cut["input_ids"].shape == (1, 512)
    assert found["score"] == pytest.approx(model(**cut).logits.softmax(-1).max().item(), abs=ATOL)
    with pytest.raises(ValueError, match=r"902, but .*512 tokens; truncate to max_length=512"):
        classify(text)


# ---- Threads and processes


def in_threads(function, items):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(pool.map(function, items))


def test_one_model_in_several_threads():
    model = load()
    batches = [{"input_ids": IDS[row : row + 1, : int(MASK[row].sum())]} for row in range(ROWS)] + INPUTS

    @torch.inference_mode()
    def states(batch):
        return model(**batch).last_hidden_state

    expected = [states(batch) for batch in batches]
    for found, states_alone in zip(in_threads(states, batches * 20), expected * 20, strict=True):
        assert_close(found, states_alone)


def test_models_trained_in_several_threads():
    """Each by a thread of its own, whose backward PyTorch may run on yet others."""
    seeds, expected = range(4), gradients_of()
    for found in in_threads(lambda seed: gradients_of(load().train()), seeds):
        assert_same_gradients(found, expected)


def test_one_tokenizer_in_several_threads(tokenizer):
    texts = [f"{text} {number}" for number in range(300) for text in TEXTS]
    chunks = [texts[start : start + 50] for start in range(0, len(texts), 50)]
    fresh = ErnieMTokenizer.from_pretrained(cases.TINY)
    found = in_threads(lambda chunk: fresh(chunk, return_offsets_mapping=True), chunks)
    for chunk, encoded in zip(chunks, found, strict=True):
        expected = tokenizer(chunk, return_offsets_mapping=True)
        assert dict(encoded) == dict(expected)


def test_forked_workers_tokenize_and_embed(tokenizer):
    """After this process has done both, on several threads."""
    texts = TEXTS * 100
    model, expected = load(), tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**expected).pooler_output

    def collate(texts):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            return batch["input_ids"], model(**batch).pooler_output

    options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
    loaded = list(DataLoader(texts, batch_size=250, collate_fn=collate, **options))
    assert torch.equal(torch.cat([ids for ids, _ in loaded]), expected["input_ids"])
    assert_close(torch.cat([pooled for _, pooled in loaded]), states)


def test_numbers_of_threads():
    model, threads = load(), torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert_same_as_peer(model)
    finally:
        torch.set_num_threads(threads)


def test_weights_in_shared_memory():
    model = load().share_memory()
    assert model.encoder.layers[0].linear1.weight.is_shared()
    assert_same_results(model, load())


# ---- Trainer


class Rows(torch.utils.data.Dataset):
    """Texts of very unequal lengths with the labels that `label` makes of a row of ids."""

    def __init__(self, tokenizer, label):
        self.rows = [{"input_ids": tokenizer(" ".join(TEXTS[:1] * count))["input_ids"]} for count in (1, 3, 2, 6, 1, 9)]
        for row in self.rows:
            row |= label(row["input_ids"])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def make_trainer(model, folder, collator, rows, **options):
    options = {"save_strategy": "no", "per_device_eval_batch_size": 2, "per_device_train_batch_size": 2, **options}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, seed=5, **options)
    return Trainer(model, arguments, train_dataset=rows, data_collator=collator)


@pytest.mark.parametrize("steps", [None, 1])
def test_predictions_of_batches_of_unequal_lengths(steps, tokenizer, tmp_path):
    """Each row as it is alone, and -100 behind it."""
    model = load(ErnieMForTokenClassification, num_labels=3)
    rows = Rows(tokenizer, lambda ids: {"labels": [each % 3 for each in ids]})
    collator = DataCollatorForTokenClassification(tokenizer)
    found = make_trainer(model, tmp_path, collator, rows, eval_accumulation_steps=steps).predict(rows)
    for row, logits, labels in zip(rows, found.predictions, found.label_ids, strict=True):
        length = len(row["input_ids"])
        alone = model(torch.tensor([row["input_ids"]])).logits[0]
        assert_close(torch.from_numpy(logits[:length]), alone)
        assert labels[:length].tolist() == row["labels"]
        assert (labels[length:] == -100).all()


def test_information_extraction_is_evaluated_by_the_names_of_its_labels(tokenizer, tmp_path):
    model = load(ErnieMForInformationExtraction)
    rows = Rows(tokenizer, lambda ids: {"start_positions": 1, "end_positions": len(ids) - 2})
    names = ["start_positions", "end_positions"]
    trainer = make_trainer(model, tmp_path, DataCollatorWithPadding(tokenizer), rows, label_names=names)
    found = trainer.evaluate(rows)["eval_loss"]
    losses = []
    for start in range(0, len(rows), 2):
        batch = DataCollatorWithPadding(tokenizer)([rows[start], rows[start + 1]])
        losses.append(model(**batch).loss.item())
    assert found == pytest.approx(sum(losses) / len(losses), abs=ATOL)


def test_training_goes_on_from_a_checkpoint(tokenizer, tmp_path):
    """With the weights, the optimizer and the dropout of one that was never interrupted."""
    rows = Rows(tokenizer, lambda ids: {"labels": len(ids) % 2})

    def train(folder, steps, resume=False, **options):
        torch.manual_seed(7)
        model = ErnieMForSequenceClassification.from_pretrained(cases.TINY, **RATES)
        losses = []
        model.register_forward_hook(lambda module, arguments, output: losses.append(output.loss.item()))
        options = {"max_steps": steps, "learning_rate": 1e-3, "lr_scheduler_type": "constant", **options}
        trainer = make_trainer(model, folder, DataCollatorWithPadding(tokenizer), rows, **options)
        trainer.train(resume_from_checkpoint=resume)
        return losses

    expected = train(tmp_path / "whole", 5)
    found = train(tmp_path / "parts", 3, save_strategy="steps", save_steps=3)
    found += train(tmp_path / "parts", 5, resume=True)
    assert found == pytest.approx(expected, abs=1e-4)
