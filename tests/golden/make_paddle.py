"""Make the goldens in paddle/: checkpoints that PaddlePaddle and PaddleNLP wrote, and what their models answer.

    python tests/golden/make_paddle.py WHEEL

It runs in an environment of its own, with the versions in paddle-requirements.txt, in half a minute. WHEEL is that of
PaddleNLP 2.3.4, whose tokenizer works as Baidu's. Nothing of erniem_fast is imported here.
"""

import csv
import importlib.util
import io
import json
import lzma
import pathlib
import shutil
import sys
import tempfile
import types
import zipfile
import zlib

zlib.decompress(zlib.compress(b""))  # paddle exports another version's functions, so Python's are bound before
sys.modules["aistudio_sdk.hub"] = types.SimpleNamespace(download=None)  # the published one has lost it

import numpy as np  # noqa: E402
import paddle  # noqa: E402
import paddlenlp  # noqa: E402
import sentencepiece  # noqa: E402
from paddlenlp.transformers import (  # noqa: E402
    UIEM,
    ErnieMConfig,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMModel,
    ErnieMTokenizer,
)

GOLDEN = pathlib.Path(__file__).parent
FOLDER = GOLDEN / "paddle"
PARALLEL = GOLDEN.parent.parent / "bench" / "data" / "parallel.tsv"
SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 20, "initializer_range": 0.3}
SHARD = "25KB"
COMMAS = ("in 12, 13, and x5,", "x12,5 ,", "5,", "5, 12,13, x13, or, 1,")

# Baidu's names of the variables, by Paddle's of the parameters.
BAIDU = {
    "embeddings.word_embeddings.weight": "word_embedding",
    "embeddings.position_embeddings.weight": "pos_embedding",
    "embeddings.layer_norm.weight": "pre_encoder_layer_norm_scale",
    "embeddings.layer_norm.bias": "pre_encoder_layer_norm_bias",
    "pooler.dense.weight": "pooled_fc.w_0",
    "pooler.dense.bias": "pooled_fc.b_0",
}
BAIDU_LAYER = {
    "self_attn.q_proj": "multi_head_att_query_fc",
    "self_attn.k_proj": "multi_head_att_key_fc",
    "self_attn.v_proj": "multi_head_att_value_fc",
    "self_attn.out_proj": "multi_head_att_output_fc",
    "linear1": "ffn_fc_0",
    "linear2": "ffn_fc_1",
    "norm1": "post_att_layer_norm",
    "norm2": "post_ffn_layer_norm",
}


def make(model_class, seed, **fields):
    """A model in eval, all of whose parameters are random, biases and layer norms too."""
    model = model_class(ErnieMConfig(**SIZES, **fields))
    random = np.random.RandomState(seed)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.set_value((centre + 0.3 * random.randn(*parameter.shape)).astype("float32"))
    model.eval()
    return model


def inputs(choices=None):
    """(rows, 9) ids from [CLS] to [SEP], two rows with padding, and the mask."""
    random = np.random.RandomState(9)
    ids = random.randint(4, SIZES["vocab_size"], (4, 9))
    ids[:, 0] = 0
    mask = (np.arange(9) < np.array([[9], [6], [9], [3]])).astype("int64")
    ids[np.arange(4), mask.sum(1) - 1] = 2
    ids[mask == 0] = 1
    shape = (-1, 9) if choices is None else (-1, choices, 9)
    return {"input_ids": ids.reshape(shape), "attention_mask": mask.reshape(shape)}


def answers(model, choices=None):
    given = inputs(choices)
    results = model(**{name: paddle.to_tensor(value) for name, value in given.items()})
    results = results if isinstance(results, (tuple, list)) else [results]
    return {**given, **{str(index): result.numpy() for index, result in enumerate(results)}}


def answers_without_mask(model):
    """What Paddle computes if no mask is given: [CLS] is hidden, and padding, here to 18 tokens, is attended to."""
    ids, mask = inputs().values()
    ids = np.pad(ids, ((0, 0), (0, 9)), constant_values=1)
    positions = np.arange(18) * np.pad(mask, ((0, 0), (0, 9)))  # 0 at padding, as the predictor of UIE-M has it
    results = model(paddle.to_tensor(ids), position_ids=paddle.to_tensor(positions))
    return {str(index): result.numpy() for index, result in enumerate(results)}


def save_first_uie(model, folder):
    """As PaddleNLP 2.4 saved UIE-M: under the prefix of v1.0, with nested arguments in model_config.json."""
    folder.mkdir()
    state = {name.replace("ernie_m.", "encoder."): value for name, value in model.state_dict().items()}
    paddle.save(state, str(folder / "model_state.pdparams"), protocol=2)
    encoder = dict(SIZES)
    encoder |= {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1}
    encoder |= {"init_class": "ErnieMModel"}
    config = {"init_args": [encoder], "init_class": "UIEM"}
    (folder / "model_config.json").write_text(json.dumps(config, indent=1) + "\n")


def save_in_bfloat16(model, folder):
    """As uint16; the model gets the rounded values, so that its answers are in float32."""
    state = {name: value.astype("bfloat16") for name, value in model.state_dict().items()}
    model.set_state_dict({name: value.astype("float32") for name, value in state.items()})
    model.config.save_pretrained(str(folder))
    paddle.save(state, str(folder / "model_state.pdparams"))


def save_as_baidu(model, folder):
    """As PaddlePaddle 1 saved: a file for each variable."""
    names = dict(BAIDU)
    for name in model.state_dict():
        if name.startswith("encoder.layers."):
            index, part = name.removeprefix("encoder.layers.").split(".", 1)
            part, end = part.rsplit(".", 1)
            ends = {"weight": "_scale", "bias": "_bias"} if "norm" in part else {"weight": ".w_0", "bias": ".b_0"}
            names[name] = f"encoder_layer_{index}_{BAIDU_LAYER[part]}{ends[end]}"
    paddle.enable_static()
    program, scope = paddle.static.Program(), paddle.static.Scope()
    with paddle.static.program_guard(program), paddle.static.scope_guard(scope):
        for name, value in model.state_dict().items():
            shape = list(value.shape)
            variable = program.global_block().create_parameter(shape=shape, dtype="float32", name=names[name])
            scope.var(variable.name).get_tensor().set(np.array(value), paddle.CPUPlace())
        executor = paddle.static.Executor(paddle.CPUPlace())
        paddle.static.io.save_vars(
            executor, str(folder / "params"), program, list(program.global_block().vars.values())
        )
    paddle.disable_static()
    config = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, **SIZES}
    (folder / "ernie_config.json").write_text(json.dumps(config, indent=1) + "\n")


def read_texts():
    """Some of the translations, and of the odd texts; and some with what the ways to tokenize differ in."""
    with PARALLEL.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    odd = json.loads((GOLDEN / "odd_texts.json").read_text(encoding="utf-8"))
    by_hand = ["“a” \u2018b\u2019 — c", "a\u200bb\x00c\u00add", "在 2019年北京 开会", "\u3000日 本\u3000"]
    return list(dict.fromkeys([row["translation"] for row in rows][::25] + odd + by_hand))


def load_original(wheel):
    """PaddleNLP 2.3.4's class for ERNIE-M, inside of the package that is installed."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        path = archive.extract("paddlenlp/transformers/ernie_m/tokenizer.py", folder)
        spec = importlib.util.spec_from_file_location("paddlenlp.transformers.ernie_m.original", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.ErnieMTokenizer


def train_commas(path):
    """A SentencePiece model with pieces that end in a digit and a comma, as XLM-RoBERTa's has."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"in {number}, {number} and x{number}, or {number}." for number in (12, 13, 5)] * 40),
        model_writer=model,
        model_type="bpe",
        vocab_size=48,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def make_tokenizers(wheel):
    """The tokens of each text, by today's tokenizer and by the original."""
    files = str(GOLDEN / "tiny/vocab.txt"), str(GOLDEN / "tiny/sentencepiece.bpe.model")
    today = ErnieMTokenizer(*files)
    original_class = load_original(wheel)
    original = original_class.__new__(original_class)  # its constructor wants the base class of its time
    original.sp_model = today.sp_model
    texts = read_texts()
    golden = {"texts": texts, "paddlenlp": [today._tokenize(text) for text in texts]}
    golden["original"] = [original._tokenize(text) for text in texts]
    original.sp_model = train_commas(FOLDER / "commas.model")
    golden["commas"] = {text: original._tokenize(text) for text in COMMAS}
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    (FOLDER / "tokenizer.json.xz").write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    with tempfile.TemporaryDirectory() as folder:
        today.save_pretrained(folder)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the other files are those of tiny/
            shutil.copy(pathlib.Path(folder, name), FOLDER / "base")


def main(wheel):
    versions = (paddle.__version__, paddlenlp.__version__)
    assert (versions[0], versions[1][:5]) == ("2.6.2", "2.8.1"), f"goldens come from 2.6.2 and 2.8.1: {versions}"
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    saves = {
        "base": (ErnieMModel, {}, lambda model, folder: model.save_pretrained(str(folder))),
        "extraction": (UIEM, {}, save_first_uie),
        "sequence": (
            ErnieMForSequenceClassification,
            {"num_labels": 3},
            lambda model, folder: model.save_pretrained(str(folder), safe_serialization=True),
        ),
        "token": (
            ErnieMForTokenClassification,
            {"num_labels": 5},
            lambda model, folder: model.save_pretrained(str(folder), max_shard_size=SHARD),
        ),
        "answer": (
            ErnieMForQuestionAnswering,
            {},
            lambda model, folder: model.save_pretrained(str(folder), max_shard_size=SHARD, safe_serialization=True),
        ),
        "choice": (ErnieMForMultipleChoice, {"num_choices": 2}, save_in_bfloat16),
        "baidu": (ErnieMModel, {}, save_as_baidu),
    }
    golden = {}
    for seed, (name, (model_class, fields, save)) in enumerate(saves.items()):
        model = make(model_class, seed, **fields)
        save(model, FOLDER / name)
        results = answers(model, choices=2 if name == "choice" else None)
        golden |= {f"{name}/{key}": value for key, value in results.items()}
        if name in ("base", "extraction"):
            golden |= {f"{name}/unmasked/{key}": value for key, value in answers_without_mask(model).items()}
    np.savez_compressed(FOLDER / "answers.npz", **golden)
    make_tokenizers(wheel)


if __name__ == "__main__":
    main(*sys.argv[1:])
