"""`python -m erniem_fast convert`: from every form to every other, with the tokenizer."""

import io
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, XLMRobertaTokenizer

from erniem_fast import (
    ErnieMConfig,
    ErnieMForInformationExtraction,
    ErnieMForMaskedLM,
    ErnieMForTokenClassification,
    ErnieMModel,
    ErnieMTokenizer,
)
from erniem_fast.__main__ import main
from erniem_fast.conversion.command import convert
from erniem_fast.conversion.paddle import PICKLE
from erniem_fast.conversion.pickles import read_pickle
from erniem_fast.pretraining import ErnieMForPreTraining
from tests.families.tiny import make
from tests.golden.cases import GOLDEN, TINY
from tests.tokenization.tiny import MODEL_FILE, VOCAB_FILE

PADDLE = GOLDEN / "paddle"
TEXTS = ["Save 12, and add 在 2019年 another", "日本 语 — “quoted”", "", "unseen ▁ 🙂", "a, b; c"]


@pytest.fixture(scope="module")
def xlm_roberta(tmp_path_factory):
    """A folder with an XLM-RoBERTa model that classifies tokens, and its tokenizer."""
    folder = tmp_path_factory.mktemp("xlm_roberta")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    make(model_class=transformers.XLMRobertaForTokenClassification, vocab_size=size + 2, num_labels=5).save_pretrained(
        folder
    )
    return folder


def test_from_xlm_roberta_and_back(xlm_roberta, tmp_path):
    """The same ids for every text, and the same function; ours by the tokens that SentencePiece cuts."""
    assert convert(xlm_roberta, tmp_path / "ours")[0].startswith("ErnieMForTokenClassification with ")
    stock = XLMRobertaTokenizer.from_pretrained(xlm_roberta)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert type(tokenizer) is ErnieMTokenizer
    expected = stock(TEXTS, padding=True, return_tensors="pt")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert tokenizer(TEXTS[:2], TEXTS[1:3])["input_ids"] == stock(TEXTS[:2], TEXTS[1:3])["input_ids"]
    assert tokenizer.mask_token_id == stock.mask_token_id
    assert tokenizer.model_max_length == 38

    models = [
        ErnieMForTokenClassification.from_pretrained(tmp_path / "ours"),
        transformers.XLMRobertaForTokenClassification.from_pretrained(xlm_roberta),
    ]
    assert convert(tmp_path / "ours", tmp_path / "theirs", to="xlm_roberta")[1:] == []
    models.append(transformers.XLMRobertaForTokenClassification.from_pretrained(tmp_path / "theirs"))
    again = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert again(TEXTS)["input_ids"] == stock(TEXTS)["input_ids"]
    real = batch["attention_mask"].bool()
    with torch.inference_mode():
        found = [model.double()(**batch).logits[real] for model in models]
    # The row for the token type was added in float32.
    for each in found:
        torch.testing.assert_close(each, found[0], rtol=0, atol=2e-6)


def test_masked_words(xlm_roberta, tmp_path):
    """The fill-mask pipeline gives the same answers there, here, and there again."""
    source = shutil.copytree(xlm_roberta, tmp_path / "source")
    (source / "model.safetensors").unlink()
    vocabulary = transformers.AutoConfig.from_pretrained(source).vocab_size
    make(model_class=transformers.XLMRobertaForMaskedLM, vocab_size=vocabulary).save_pretrained(source)
    assert convert(source, tmp_path / "ours")[0].startswith("ErnieMForMaskedLM with ")
    assert convert(tmp_path / "ours", tmp_path / "theirs", to="xlm_roberta")[1:] == []
    answers = []
    for folder in (source, tmp_path / "ours", tmp_path / "theirs"):
        fill = transformers.pipeline("fill-mask", model=str(folder))
        texts = [text.replace("M", fill.tokenizer.mask_token) for text in ("Save M, and add 在", "M 语", "a,M")]
        answers.append([answer for one in fill(texts) for answer in one])
    assert type(fill.model) is transformers.XLMRobertaForMaskedLM
    for each in answers[1:]:
        for found, wanted in zip(each, answers[0], strict=True):
            assert found["token"] == wanted["token"]
            # The row for the token type was added in float32.
            assert found["score"] == pytest.approx(wanted["score"], abs=1e-5)


def test_language_embeddings_stay_behind(tmp_path):
    """A model of pre-training becomes one that XLM-RoBERTa, too, has."""
    model = ErnieMForPreTraining.from_pretrained(TINY, languages=["de", "zh"])
    model.save_pretrained(tmp_path / "trained")
    assert convert(tmp_path / "trained", tmp_path / "ours")[0].startswith("ErnieMForMaskedLM with ")
    plain, info = ErnieMForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())
    convert(tmp_path / "trained", tmp_path / "theirs", to="xlm_roberta")
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "theirs")) is transformers.XLMRobertaForMaskedLM
    with pytest.raises(ValueError, match=r"PaddleNLP has no ErnieMForMaskedLM; save .* model\.ernie_m"):
        convert(tmp_path / "trained", tmp_path / "paddles", to="paddle")


def test_from_paddle(tmp_path):
    """UIE-M's tokens are PaddleNLP's, and others the default, converted or not."""
    for name, way in (("extraction", "paddlenlp"), ("base", "transformers")):
        source = shutil.copytree(PADDLE / name, tmp_path / name)
        for path in (MODEL_FILE, VOCAB_FILE):
            shutil.copy(path, source)
        convert(source, tmp_path / "out" / name)
        for folder in (source, tmp_path / "out" / name):
            assert ErnieMTokenizer.from_pretrained(folder).pretokenization == way
            assert ErnieMTokenizer.from_pretrained(folder, pretokenization="original").pretokenization == "original"
    ErnieMTokenizer(MODEL_FILE, VOCAB_FILE).save_pretrained(tmp_path / "extraction")  # says how it cuts
    assert ErnieMTokenizer.from_pretrained(tmp_path / "extraction").pretokenization == "transformers"
    model = ErnieMForInformationExtraction.from_pretrained(tmp_path / "out/extraction")
    expected = ErnieMForInformationExtraction.from_pretrained(PADDLE / "extraction")
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())
    assert model.config.uie_padded_length == expected.config.uie_padded_length == 18


def test_to_paddle(tmp_path):
    """PaddleNLP's own files again, and a note on what its tokenizer does otherwise."""
    source = shutil.copytree(PADDLE / "base", tmp_path / "source")
    for path in (MODEL_FILE, VOCAB_FILE):
        shutil.copy(path, source)
    convert(source, tmp_path / "ours")
    lines = convert(tmp_path / "ours", tmp_path / "paddles", to="paddle")
    assert lines[1] == "PaddleNLP cuts some texts otherwise than pretokenization='transformers' does here."
    files = {"config.json", "model_state.pdparams", "sentencepiece.bpe.model", "tokenizer_config.json", "vocab.txt"}
    assert {path.name for path in (tmp_path / "paddles").iterdir()} == files
    for name in ("sentencepiece.bpe.model", "vocab.txt"):
        assert (tmp_path / "paddles" / name).read_bytes() == (TINY / name).read_bytes()
    expected, model = (ErnieMModel.from_pretrained(folder) for folder in (source, tmp_path / "paddles"))
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())


def test_ernie_m_s_own_ids_need_its_own_tokenizer(tmp_path):
    lines = convert(TINY, tmp_path / "out", to="xlm_roberta")
    assert lines[1].startswith("The tokenizer is ErnieMTokenizer, as XLM-RoBERTa's would give other ids")
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is transformers.XLMRobertaModel
    tokenizer = ErnieMTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXTS)["input_ids"] == ErnieMTokenizer.from_pretrained(TINY)(TEXTS)["input_ids"]


def test_a_head_that_does_not_map_can_be_left_out(tmp_path):
    make(model_class=transformers.XLMRobertaForCausalLM).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="XLMRobertaForCausalLM has a head that ERNIE-M does not have"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lines = convert(tmp_path / "source", tmp_path / "out", encoder=True)
    assert lines[0].startswith("ErnieMModel with ")
    assert lines[1].startswith("No tokenizer, because ")


def write_pdparams(folder, change):
    tensors = {name: tensor.numpy() for name, tensor in read_pickle(folder / PICKLE).items()}
    (folder / PICKLE).write_bytes(pickle.dumps(change(tensors), 4))


DAMAGED = {
    "other names": (
        "base",
        lambda folder: write_pdparams(folder, lambda tensors: {f"bert.{name}": each for name, each in tensors.items()}),
        r"lacks 36 tensors of ErnieMModel, 'embeddings\.layer_norm\.bias' among them, .* random; copy",
    ),
    "a layer is missing": (
        "base",
        lambda folder: write_pdparams(
            folder, lambda tensors: {name: each for name, each in tensors.items() if "layers.1.linear1" not in name}
        ),
        r"lacks 2 tensors of ErnieMModel, 'encoder\.layers\.1\.linear1\.bias' among them",
    ),
    "another shape": (
        "base",
        lambda folder: write_pdparams(
            folder, lambda tensors: tensors | {"encoder.layers.1.linear1.weight": np.ones((16, 63), np.float32)}
        ),
        r"holds 'encoder\.layers\.1\.linear1\.weight' of shape \(63, 16\), and its config asks for \(64, 16\)",
    ),
    "another config": (
        "base",
        lambda folder: (folder / "config.json").unlink(),
        r"of shape .*, and its config asks for .*; take both from the same checkpoint",
    ),
    "a head is missing": (
        "base",
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace("ErnieMModel", "ErnieMForTokenClassification")
        ),
        r"lacks 2 tensors of ErnieMForTokenClassification, 'classifier\.bias' among .* use --encoder",
    ),
    "a config is cut off": (
        "base",
        lambda folder: (folder / "config.json").write_text('{"a": '),
        r"config\.json' is not a model's config \(Expecting value.*\); copy it again",
    ),
    "a config is a list": (
        "base",
        lambda folder: (folder / "config.json").write_text("[]"),
        r"config\.json' is not a model's config",
    ),
    "a pointer in place of a file": (
        "answer",
        lambda folder: (folder / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/"),
        r"model-00001-of-00002\.safetensors' is not a whole \.safetensors file .*; copy it again",
    ),
    "a second file is cut off": (
        "answer",
        lambda folder: (folder / "model-00002-of-00002.safetensors").write_bytes(bytes(20)),
        r"model-00002-of-00002\.safetensors' is not a whole \.safetensors file",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_nothing_is_written_from_a_part_of_a_checkpoint(name, tmp_path):
    """`from_pretrained` fills what is missing with random numbers and warns, but a conversion has to be the same."""
    checkpoint, damage, message = DAMAGED[name]
    damage(shutil.copytree(PADDLE / checkpoint, tmp_path / "source"))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_xlm_roberta_has_to_be_whole_too(xlm_roberta, tmp_path):
    source = shutil.copytree(xlm_roberta, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["roberta.encoder.layer.0.output.dense.bias"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of XLMRoberta.*, 'roberta\.encoder\.layer\.0\.output"):
        convert(source, tmp_path / "out")


def test_a_check_says_that_it_is_another_model(tmp_path):
    config = ErnieMConfig(
        vocab_size=6100, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    ErnieMModel(config).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"off by \d.*, so that these are not the weights of ernie-m-base as published"
    ):
        convert(tmp_path / "other", tmp_path / "out", check=True)
    with pytest.raises(ValueError, match="is for ernie-m-base, with 250002 words, not for a model with 60"):
        convert(PADDLE / "base", tmp_path / "out", check=True)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["erniem_fast", "convert", *map(str, arguments)])
        return main(), *capsys.readouterr()

    status, out, _ = command(PADDLE / "sequence", tmp_path / "out", "--encoder")
    assert status == 0
    assert out.startswith("ErnieMModel with ")
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile/config.json").write_text(json.dumps({"model_type": "ernie_m", "paddlenlp_version": None}))
    (tmp_path / "hostile/model_state.pdparams").write_bytes(b"cposix\nsystem\n(S'touch hacked'\ntR.")
    status, out, error = command(tmp_path / "hostile", tmp_path / "other")
    assert (status, out) == (1, "")
    assert "it asks for posix.system" in error
    for source, out, message in (
        (tmp_path / "none", tmp_path / "other", "is not a folder; name the one with the checkpoint's files"),
        (TINY, tmp_path / "out", "is not empty; name a new folder"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, out)
