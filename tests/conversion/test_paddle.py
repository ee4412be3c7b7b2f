"""Checkpoints that Paddle wrote: our models answer as Paddle's did, and are read and written without loss."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTokenClassification

import erniem_fast
from erniem_fast import (
    ErnieMConfig,
    ErnieMForInformationExtraction,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMModel,
    optimize,
)
from erniem_fast.conversion import RefusedPickleError, save_as_paddle
from erniem_fast.conversion.pickles import read_pickle, write_pickle
from erniem_fast.conversion.published import without_cls
from tests.golden.cases import GOLDEN, TINY

PADDLE = GOLDEN / "paddle"
# Two frameworks sum products of at most 64 numbers of about 0.3 in another order: seen 5e-7.
ATOL = 1e-5

# Each checkpoint's class, and its results in the order of Paddle's.
CHECKPOINTS = {
    "base": (ErnieMModel, ("last_hidden_state", "pooler_output")),
    "extraction": (ErnieMForInformationExtraction, ("start_logits", "end_logits")),
    "sequence": (ErnieMForSequenceClassification, ("logits",)),
    "token": (ErnieMForTokenClassification, ("logits",)),
    "answer": (ErnieMForQuestionAnswering, ("start_logits", "end_logits")),
    "choice": (ErnieMForMultipleChoice, ("logits",)),
    "baidu": (ErnieMModel, ("last_hidden_state", "pooler_output")),
}


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(value) for name, value in np.load(PADDLE / "answers.npz").items()}


def assert_answers(model, golden, name):
    """The model's results are Paddle's, at real tokens."""
    inputs = {key: golden[f"{name}/{key}"] for key in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        outputs = model(**inputs)
    real = inputs["attention_mask"].bool()
    for index, key in enumerate(CHECKPOINTS[name][1]):
        found, expected = outputs[key], golden[f"{name}/{index}"]
        if name == "extraction":
            found = found.sigmoid()  # Paddle answers with probabilities
        if found.shape[:2] == real.shape:
            found, expected = found[real], expected[real]
        assert expected.std() > 0.01  # it says something
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_paddle_answers_as_in_paddle(golden, name):
    # The mask is given, so that UIE-M's own is not asked for.
    options = {"uie_padded_length": None} if name == "extraction" else {}
    options |= {"output_loading_info": True, "dtype": torch.float32}
    model, info = CHECKPOINTS[name][0].from_pretrained(PADDLE / name, **options)
    # Paddle's taggers and question answering hold a pooler too, which they do not use.
    unread = {f"ernie_m.pooler.dense.{end}" for end in ("weight", "bias")} if name in ("token", "answer") else set()
    assert {key: value for key, value in info.items() if value} == ({"unexpected_keys": unread} if unread else {})
    assert not model.training
    assert model.config.name_or_path == model.name_or_path == str(PADDLE / name)
    assert (model.config.intermediate_size, model.config.pad_token_id) == (64, 1)
    assert_answers(model, golden, name)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_saved_and_written_back_it_is_the_same(golden, name, tmp_path):
    """By `save_pretrained`, and in Paddle's layout: the very tensors that Paddle wrote."""
    model = CHECKPOINTS[name][0].from_pretrained(PADDLE / name)
    model.save_pretrained(tmp_path / "ours")
    save_as_paddle(model, tmp_path / "paddles")
    for folder in ("ours", "paddles"):
        again, info = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        assert again.dtype == model.dtype
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
    if name == "answer":
        written, paddles = read_pickle(tmp_path / "paddles/model_state.pdparams"), {}
        for path in (PADDLE / name).glob("*.safetensors"):
            paddles |= load_file(path)
        assert all(torch.equal(value, paddles[key]) for key, value in written.items())
        assert {key for key in paddles if "pooler" not in key} == written.keys()
    if name in ("base", "choice"):
        written = read_pickle(tmp_path / "paddles/model_state.pdparams")
        original = read_pickle(PADDLE / name / "model_state.pdparams")
        assert written.keys() == original.keys()
        assert all(torch.equal(written[key], original[key]) for key in original)


def test_bfloat16_is_read_as_such():
    assert ErnieMForMultipleChoice.from_pretrained(PADDLE / "choice").dtype == torch.bfloat16


def test_auto_classes_load_them(golden):
    assert_answers(AutoModelForTokenClassification.from_pretrained(PADDLE / "token"), golden, "token")


def test_weights_are_in_memory_once():
    """What is not transposed is the memory that the file was read into."""
    found = erniem_fast.conversion.paddle.find_checkpoint(PADDLE / "base", {})
    state = erniem_fast.conversion.paddle.read_checkpoint(found, answers_questions=False)
    with torch.device("meta"):
        empty = ErnieMModel(ErnieMConfig.from_pretrained(PADDLE / "base"))
    assert state.keys() == empty.state_dict().keys()
    assert all(value.is_contiguous() for value in state.values())
    loaded = ErnieMModel.from_pretrained(None, config=empty.config, state_dict=state)
    for key, value in loaded.state_dict().items():
        assert value.data_ptr() == state[key].data_ptr(), key


def test_int8_weights_are_rounded_while_they_are_read():
    model = ErnieMModel.from_pretrained(PADDLE / "base", quantization_config=erniem_fast.ErnieMInt8Config())
    expected = erniem_fast.optimize(ErnieMModel.from_pretrained(PADDLE / "base"), weights="int8")
    assert torch.equal(model.encoder.layers[0].linear1.weight, expected.encoder.layers[0].linear1.weight)


def test_without_a_mask_paddle_hides_cls_and_attends_to_padding(golden):
    """What the converter's check compares, and what UIE-M was trained with: by a mask per query, here as there."""
    model = ErnieMModel.from_pretrained(PADDLE / "base")
    extractor = ErnieMForInformationExtraction.from_pretrained(PADDLE / "extraction", uie_padded_length=None)
    for name, each, finish in (("base", model, lambda x: x), ("extraction", extractor, torch.sigmoid)):
        ids, mask = (
            torch.nn.functional.pad(golden[f"{name}/{key}"], (0, 9), value=value)
            for key, value in (("input_ids", 1), ("attention_mask", 0))
        )
        with torch.inference_mode():
            outputs = each(ids, position_ids=torch.arange(18) * mask, attention_mask=without_cls(ids))
        for index, key in enumerate(CHECKPOINTS[name][1]):
            expected = golden[f"{name}/unmasked/{index}"]
            torch.testing.assert_close(finish(outputs[key]), expected, rtol=0, atol=ATOL)


# ---- Heads, missing and unexpected tensors


def test_heads_load_what_other_heads_have_saved():
    """The bare model, with and without the prefix, and a head that is new."""
    bare = ErnieMModel.from_pretrained(PADDLE / "token")
    head, info = ErnieMForSequenceClassification.from_pretrained(PADDLE / "base", output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    for name, folder, model in (("token", "ernie_m.", bare), ("base", "", head.ernie_m)):
        files = sorted((PADDLE / name).glob("*.pdparams"))
        paddles = {key: value for path in files for key, value in read_pickle(path).items()}
        for layer in (0, 1):
            weight = model.encoder.layers[layer].self_attn.self_attn.q_proj.weight
            assert torch.equal(weight, paddles[f"{folder}encoder.layers.{layer}.self_attn.q_proj.weight"].T)


@pytest.fixture
def copied(tmp_path):
    """A copy of the base checkpoint, and a function that changes its weights."""
    shutil.copytree(PADDLE / "base", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model_state.pdparams"

    def change(**tensors):
        write_pickle({key: value for key, value in {**read_pickle(path), **tensors}.items() if value is not None}, path)

    return tmp_path, change


def test_missing_and_unexpected_tensors_are_told(copied):
    folder, change = copied
    change(**{"pooler.dense.bias": None, "other.weight": torch.ones(2, 3), "embeddings.position_ids": torch.arange(9)})
    _, info = ErnieMModel.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"pooler.dense.bias"}
    assert info["unexpected_keys"] == {"other.weight"}


def test_a_tensor_of_another_shape_is_refused(copied):
    folder, change = copied
    change(**{"encoder.layers.1.linear1.weight": torch.ones(16, 63)})
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        ErnieMModel.from_pretrained(folder)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    shutil.copy(PADDLE / "base/model_state.pdparams", tmp_path)
    tmp_path = shutil.copytree(PADDLE / "token", tmp_path / "token")
    (tmp_path / "model_state-00002-of-00002.pdparams").unlink()
    with pytest.raises(ValueError, match=r"names 'model_state-00002-of-00002\.pdparams', which .* does not have"):
        ErnieMForTokenClassification.from_pretrained(tmp_path)
    index = tmp_path / "model_state.pdparams.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model_state.pdparams"}}))
    with pytest.raises(ValueError, match=r"names '\.\./model_state"):
        ErnieMForTokenClassification.from_pretrained(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not an index of a checkpoint's files"):
        ErnieMForTokenClassification.from_pretrained(tmp_path)


# ---- Which weights of a folder are read, and in which layout


def test_the_layout_of_safetensors_is_what_their_metadata_say(golden, tmp_path):
    shutil.copytree(PADDLE / "sequence", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")  # no metadata: Paddle's
    assert_answers(ErnieMForSequenceClassification.from_pretrained(tmp_path), golden, "sequence")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})  # PyTorch's: nothing is transposed
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ErnieMForSequenceClassification.from_pretrained(tmp_path)
    model = ErnieMForSequenceClassification.from_pretrained(PADDLE / "sequence")
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # our names: PyTorch's
    assert_answers(ErnieMForSequenceClassification.from_pretrained(tmp_path), golden, "sequence")


def test_weights_of_pytorch_win(tmp_path, golden):
    shutil.copytree(PADDLE / "base", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model_state.pdparams").write_bytes(b"")
    model = ErnieMModel.from_pretrained(PADDLE / "base")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_answers(ErnieMModel.from_pretrained(tmp_path), golden, "base")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    model.save_pretrained(tmp_path)
    assert_answers(ErnieMModel.from_pretrained(tmp_path), golden, "base")


def test_a_subfolder_a_file_and_the_folder_of_variables(golden):
    assert_answers(ErnieMModel.from_pretrained(PADDLE, subfolder="base"), golden, "base")
    extraction = ErnieMForInformationExtraction.from_pretrained(PADDLE, subfolder="extraction", uie_padded_length=None)
    assert_answers(extraction, golden, "extraction")
    config = ErnieMConfig.from_pretrained(PADDLE / "base")
    file = PADDLE / "base/model_state.pdparams"
    assert_answers(ErnieMModel.from_pretrained(file, config=config), golden, "base")
    assert_answers(ErnieMModel.from_pretrained(PADDLE / "baidu/params"), golden, "baidu")


@pytest.mark.parametrize("name", ["base", "token", "answer", "extraction"])
def test_names_on_the_hub(golden, tmp_path, name):
    """As the hub's client caches a repository, in every form of its files."""
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "models--someone--ernie-m"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(PADDLE / name, repository / "snapshots" / commit)
    options = {"uie_padded_length": None} if name == "extraction" else {}
    options |= {"cache_dir": tmp_path, "local_files_only": True}
    assert_answers(CHECKPOINTS[name][0].from_pretrained("someone/ernie-m", **options), golden, name)
    with pytest.raises(OSError, match="find them in the cached files"):
        ErnieMModel.from_pretrained("nobody/ernie-m", cache_dir=tmp_path, local_files_only=True)


def test_a_damaged_variable_is_named(tmp_path):
    shutil.copytree(PADDLE / "baidu", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "params/pooled_fc.w_0"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"pooled_fc\.w_0' is not a variable of PaddlePaddle \(1020 bytes do not make"):
        ErnieMModel.from_pretrained(tmp_path)
    (tmp_path / "params/pooled_fc.w_0_moment1_0").write_bytes(b"an optimizer's")
    shutil.copy(PADDLE / "baidu/params/pooled_fc.w_0", path.with_name("pooled_fc.w_0.master"))
    model = ErnieMModel.from_pretrained(tmp_path)
    assert torch.equal(model.pooler.dense.weight, ErnieMModel.from_pretrained(PADDLE / "baidu").pooler.dense.weight)


def test_a_hostile_file_is_not_read(copied):
    folder, _ = copied
    (folder / "model_state.pdparams").write_bytes(b"cposix\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(RefusedPickleError, match=r"model_state\.pdparams' was not read: it asks for posix\.system"):
        ErnieMModel.from_pretrained(folder)


# ---- Configs


def test_configs_of_every_form(tmp_path):
    def read(fields, name="model_config.json"):
        for each in tmp_path.iterdir():
            each.unlink()
        (tmp_path / name).write_text(json.dumps(fields))
        return ErnieMConfig.from_pretrained(tmp_path)

    encoder = {"hidden_size": 32, "num_attention_heads": 4, "init_class": "ErnieMModel", "pad_token_id": 0}
    assert read(encoder).architectures == ["ErnieMModel"]
    head = {"init_class": "ErnieMForTokenClassification"}
    forms = [
        {"init_args": [encoder, 7, 0.2], **head},
        {"init_args": [encoder], "num_classes": 7, "dropout": 0.2, **head},
        {"init_args": [], "ernie_m": encoder, "num_classes": 7, "dropout": 0.2, **head},
    ]
    for form in forms:
        config = read(form)
        assert (config.num_labels, config.classifier_dropout, config.hidden_size) == (7, 0.2, 32)
        assert (config.intermediate_size, config.pad_token_id, config.layer_norm_eps) == (128, 1, 1e-5)
        assert config.architectures == ["ErnieMForTokenClassification"]
        assert not {"init_class", "init_args", "ernie_m"} & config.to_dict().keys()
    later = {"architectures": ["UIEM"], "model_type": "ernie_m", "hidden_size": 24, "paddlenlp_version": None}
    config = read(later, "config.json")
    assert (config.intermediate_size, config.architectures) == (96, ["ErnieMForInformationExtraction"])
    assert config.uie_padded_length == 512
    assert read({"hidden_size": 1024, "num_attention_heads": 16}, "ernie_config.json").intermediate_size == 4096
    # Other configs keep our defaults.
    assert read({"hidden_size": 24, "model_type": "ernie_m"}, "config.json").intermediate_size == 3072
    with pytest.raises(ValueError, match="saved by Paddle's ErnieForTokenClassification, but erniem_fast runs ERNIE-M"):
        read({"init_args": [encoder], "init_class": "ErnieForTokenClassification"})


def test_what_paddles_model_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Paddle's ERNIE-M has intermediate_size=256 always, and this model 96"):
        save_as_paddle(ErnieMModel.from_pretrained(TINY), tmp_path)
    assert not list(tmp_path.iterdir())


def test_rounded_weights_and_adapters_are_refused(tmp_path):
    rounded = optimize(ErnieMModel.from_pretrained(PADDLE / "base", dtype=torch.float32).eval(), weights="int8")
    with pytest.raises(
        ValueError, match=r"'embeddings.word_embeddings.weight' in torch\.int8.*call erniem_fast\.restore"
    ):
        save_as_paddle(rounded, tmp_path)
    mixed = ErnieMModel.from_pretrained(PADDLE / "base", dtype=torch.float32)
    mixed.encoder.layers[0].linear1.bfloat16()
    with pytest.raises(
        ValueError, match=r"is in torch\.float32, but 'encoder\.layers\.0\.linear1\.weight' in .*bfloat16"
    ):
        save_as_paddle(mixed, tmp_path)
    adapted = ErnieMModel.from_pretrained(PADDLE / "base")
    adapted.encoder.layers[0].linear1.lora = torch.nn.Linear(2, 3)
    with pytest.raises(
        ValueError, match=r"a tensor 'encoder\.layers\.0\.linear1\.lora\.weight', which .*merge adapters"
    ):
        save_as_paddle(adapted, tmp_path)
    assert not list(tmp_path.iterdir())
    packed = optimize(ErnieMModel.from_pretrained(PADDLE / "base", dtype=torch.float32).eval(), weights="packed")
    save_as_paddle(packed, tmp_path)
    original = read_pickle(PADDLE / "base/model_state.pdparams")
    written = read_pickle(tmp_path / "model_state.pdparams")
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("length", [None, 17])
def test_an_extractor_that_treats_padding_otherwise_is_refused(length, tmp_path):
    """Paddle's config cannot say it, so that the model would find other spans there, and when it is read again."""
    model = ErnieMForInformationExtraction.from_pretrained(PADDLE / "extraction", uie_padded_length=length)
    with pytest.raises(ValueError, match=rf"as if uie_padded_length=18, and this model has {length}, .*loaded with"):
        save_as_paddle(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_attends_to_padding_is_refused(tmp_path):
    """Read again, it would not: no config of Paddle's says it but that of an extractor."""
    model = ErnieMModel.from_pretrained(PADDLE / "extraction")
    with pytest.raises(ValueError, match=r"this model's uie_padded_length=18 would be lost, .* without --encoder"):
        save_as_paddle(model, tmp_path)
    assert not list(tmp_path.iterdir())
    model.config.uie_padded_length = None
    save_as_paddle(model, tmp_path)
    ids = torch.tensor([[0, 5, 6, 2]])
    read = ErnieMModel.from_pretrained(tmp_path)
    torch.testing.assert_close(read.eval()(ids)[0], model.eval()(ids)[0], rtol=0, atol=0)
