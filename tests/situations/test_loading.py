"""Situations of loading and saving: heads, older configs, fewer layers, other ways to load."""

import copy
import json
import shutil

import accelerate
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from erniem_fast import (
    ErnieMConfig,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMModel,
    ErnieMPreTrainedModel,
)
from tests.golden import cases
from tests.model.tiny import LAYOUT_CASES, assert_close, assert_same_gradients, gradients, load
from tests.situations.truths import BATCH, IDS, RATES, REAL, assert_same_results, gradients_of


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


def test_an_attention_implementation_is_accepted_and_named_in_the_log(caplog):
    """Code for models of every kind asks for one; the flags choose ours."""
    with caplog.at_level("WARNING", "erniem_fast"):
        expected = load()
        assert not caplog.records
        for name in ("sdpa", "flash_attention_2"):
            model = ErnieMModel.from_pretrained(cases.TINY, attn_implementation=name).eval()
            assert [record.getMessage() for record in caplog.records] == [
                f"attn_implementation='{name}' changes nothing in ERNIE-M: the flags of erniem_fast choose the kernels."
            ]
            assert_same_results(model, expected)
            caplog.clear()
