# ruff: noqa: E402 (what paddlenlp lacks has to be there before it is imported)
"""Make extraction.json.xz: what PaddleNLP's Taskflow extracts with a tiny UIE-M of random weights.

Run as `python tests/golden/make_extraction.py` with paddlepaddle 2.6.2 and paddlenlp 2.8.1, in two minutes on two
cores. Nothing of erniem_fast is imported here. The seed of the heads is the first one with which no probability is
near the threshold, none at padding above it, and no answer that depends on the order of a set, so that neither
rounding nor hashes decide anything.
"""

import json
import lzma
import pathlib
import shutil
import sys
import tempfile
import types

import numpy as np
from extraction_cases import GOLDEN, SCHEMAS, texts
from safetensors.numpy import load_file

# The published aistudio_sdk has lost this module, which paddlenlp imports and does not need here.
sys.modules["aistudio_sdk.hub"] = types.ModuleType("aistudio_sdk.hub")
sys.modules["aistudio_sdk.hub"].download = None

import paddle
from paddlenlp.taskflow import information_extraction, task
from paddlenlp.transformers import UIEM, ErnieMTokenizer
from paddlenlp.utils.log import logger

task.download_file = lambda *arguments: None  # all files are there
logger.set_level("ERROR")

HEADS = {"linear_start.weight": (64, 1), "linear_start.bias": 1, "linear_end.weight": (64, 1), "linear_end.bias": 1}
THRESHOLD, MARGIN = 0.5, 1e-4
closest, padding, ordered = [], [], []


def to_paddle(name, value):
    """A weight of Hugging Face's with Paddle's name and layout."""
    name = "ernie_m." + name.replace("self_attn.self_attn", "self_attn")
    # Paddle's feed-forward networks are four times as wide as the model; the weights of the added features are zeros.
    added = 4 * 64 - 96
    if ".linear1." in name:
        value = np.pad(value, [(0, added)] + [(0, 0)] * (value.ndim - 1))
    elif name.endswith("linear2.weight"):
        value = np.pad(value, [(0, 0), (0, added)])
    is_matrix = value.ndim == 2 and "embeddings" not in name
    return name, np.ascontiguousarray(value.T) if is_matrix else value


def write_checkpoint(folder):
    """The checkpoint of tiny/ as a UIE-M whose heads are zeros."""
    tiny = GOLDEN / "tiny"
    config = json.loads((tiny / "config.json").read_text()) | {"architectures": ["UIEM"]}
    for unknown in ("transformers_version", "dtype", "classifier_dropout", "act_dropout"):
        config.pop(unknown)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("vocab.txt", "sentencepiece.bpe.model"):
        shutil.copy(tiny / name, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ErnieMTokenizer"}))
    (folder / "special_tokens_map.json").write_text("{}")
    weights = dict(to_paddle(*item) for item in load_file(tiny / "model.safetensors").items())
    save(folder, weights | {name: np.zeros(size, np.float32) for name, size in HEADS.items()})


def save(folder, weights):
    paddle.save(
        {name: paddle.to_tensor(value) for name, value in weights.items()}, str(folder / "model_state.pdparams")
    )


def hidden_states(folder):
    """`(tokens, 64)` for each text with a prompt, in rows as the Taskflow makes them."""
    model, tokenizer = UIEM.from_pretrained(str(folder)), ErnieMTokenizer.from_pretrained(str(folder))
    model.eval()
    pairs = {"text": ["用户"] * len(texts()), "text_pair": [text[:400] for text in texts()]}
    rows = tokenizer(**pairs, max_length=512, padding="max_length", truncation=True)
    ids = paddle.to_tensor(rows["input_ids"])
    positions = paddle.to_tensor([list(range(n := 512 - row.count(1))) + [0] * (512 - n) for row in rows["input_ids"]])
    with paddle.no_grad():
        hidden = model.ernie_m(input_ids=ids, position_ids=positions)[0]
    return [each[row != 1].astype(np.float64) for each, row in zip(hidden.numpy(), ids.numpy(), strict=True)]


def make_heads(hidden, seed):
    """Random weights with scores far from 0, above 0 for one token in seventy, of every kind of text."""
    random, heads = np.random.RandomState(seed), {}
    means = np.linalg.svd(np.stack([each.mean(0) for each in hidden]))[2][:12]
    hidden = np.concatenate(hidden)
    for name in ("linear_start", "linear_end"):
        weight = random.normal(size=64)
        weight -= means.T @ (means @ weight)
        weight *= 20 / (hidden @ weight).std()
        heads[f"{name}.weight"] = weight.reshape(64, 1).astype(np.float32)
        heads[f"{name}.bias"] = np.float32([-np.quantile(hidden @ weight, 1 - 1 / 70)])
    return heads


def watch(above):
    """Records how near probabilities come to the threshold, and the largest at padding, which begins after the last
    token of a row: the last column is padding in all rows but full ones."""

    def watched(probabilities, limit, return_prob):
        values = np.array(probabilities)
        closest.append(np.abs(values - limit).min())
        same = values == values[:, -1:]
        padding.append(values[:, -1][same.sum(1) > 1].max(initial=0.0))
        return above(probabilities, limit=limit, return_prob=return_prob)

    return watched


def watch_order(join):
    """Records whether all is the same in whatever order the spans of a piece come: the first one of all decides
    whether answers are options, and of options the first one of each piece counts."""

    def watched(task, short_results, *arguments):
        found = [spans for spans in short_results if spans]
        kinds = {"start" in span for spans in found[:1] for span in spans}
        ordered.append(kinds == {True} or not found or (len(kinds) == 1 and all(len(spans) == 1 for spans in found)))
        return join(task, short_results, *arguments)

    return watched


def extract(folder, schema, lang):
    options = {"model": "uie-m-base", "task": "information_extraction", "task_path": str(folder), "batch_size": 32}
    run = information_extraction.UIETask(
        schema=schema, schema_lang="ch" if lang == "zh" else lang, position_prob=THRESHOLD, device_id=0, **options
    )
    return [in_order(result) for result in run([texts()])]


def in_order(found):
    """With spans by position; theirs is the order of a set."""
    return {name: [_span(span) for span in sorted(spans, key=_place)] for name, spans in found.items()}


def _place(span):
    return span.get("start", -1), span.get("end", -1), span["text"], -span["probability"]


def _span(span):
    span = span | {"probability": round(float(span["probability"]), 6)}
    return span | {"relations": in_order(span["relations"])} if "relations" in span else span


def main():
    information_extraction.get_bool_ids_greater_than = watch(information_extraction.get_bool_ids_greater_than)
    information_extraction.UIETask._auto_joiner = watch_order(information_extraction.UIETask._auto_joiner)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_checkpoint(folder)
        hidden = hidden_states(folder)
        weights = paddle.load(str(folder / "model_state.pdparams"))
        for seed in range(1000):
            heads = make_heads(hidden, seed)
            save(folder, weights | heads)
            results = try_all(folder)
            if results is not None:
                write(heads, results)
                return


def try_all(folder):
    """The results of every schema; None if rounding could decide one."""
    for watched in (closest, padding, ordered):
        watched.clear()
    results = []
    for lang, schema in SCHEMAS:
        results.append(extract(folder, schema, lang))
        print(schema, sum(map(count, results[-1])), min(closest), max(padding), all(ordered), flush=True)
        if min(closest) < MARGIN or max(padding) > THRESHOLD or not all(ordered):
            return None
    return results


def count(found):
    return sum(1 + count(span.get("relations", {})) for spans in found.values() for span in spans)


def write(heads, results):
    heads = {name: value.ravel().tolist() for name, value in heads.items()}
    golden = {"heads": heads, "threshold": THRESHOLD, "texts": texts(), "results": results}
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    (GOLDEN / "extraction.json.xz").write_bytes(lzma.compress(text.encode(), preset=9))


if __name__ == "__main__":
    main()
