"""Files: loading, saving, pickling."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from erniem_fast import ErnieMTokenizer
from tests import ROOT
from tests.golden.cases import TINY
from tests.tokenization.tiny import ADDED_TOKENS, MODEL_FILE, VOCAB_FILE, with_flags


def test_a_directory_saved_by_4_57_6_loads_with_auto_tokenizer(tokenizer, golden):
    loaded = AutoTokenizer.from_pretrained(TINY)
    assert type(loaded) is ErnieMTokenizer
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded(golden["odd"]["texts"])["input_ids"] == golden["odd"]["input_ids"]


def test_a_directory_from_before_added_tokens_decoder_loads(tokenizer, tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"special_tokens_map_file": None}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 2300}))
    loaded = ErnieMTokenizer.from_pretrained(tmp_path)
    assert loaded.all_special_ids == tokenizer.all_special_ids
    assert loaded("Save<new>[MASK]")["input_ids"] == [*tokenizer("Save")["input_ids"][:-1], 2300, 2299, 2]


def test_saving_and_loading(tmp_path, golden):
    saved = with_flags(do_lower_case=True, model_max_length=77, sp_model_kwargs={"num_threads": 1})
    saved.save_pretrained(tmp_path)
    loaded = ErnieMTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == saved.get_vocab()
    assert (loaded.do_lower_case, loaded.model_max_length, loaded.sp_model_kwargs) == (True, 77, {"num_threads": 1})
    assert loaded.extra_special_tokens == ["<ent>"]
    batch = golden["odd"]["texts"] + [text for text, *_ in ADDED_TOKENS]
    assert loaded(batch)["input_ids"] == saved(batch)["input_ids"]


def test_a_checkpoints_inputs_are_as_long_as_its_positions_allow(tmp_path):
    config = json.loads((TINY / "config.json").read_text())
    checkpoint = tmp_path / "subfolder"
    shutil.copytree(TINY, checkpoint)

    def longest(saved, **kwargs):
        (checkpoint / "config.json").write_text(json.dumps(saved))
        return ErnieMTokenizer.from_pretrained(tmp_path, subfolder="subfolder", **kwargs).model_max_length

    assert longest(config) == longest(config, cache_dir=None) == 512
    assert longest(config | {"max_position_embeddings": 130}) == 128
    assert longest({"model_type": "ernie_m"}) == 512
    assert longest({"model_type": "bert", "max_position_embeddings": 512}) > 1e20
    assert longest(config, model_max_length=1000) == 1000
    for rows in (None, "514", 514.0):
        with pytest.raises(ValueError, match=f"max_position_embeddings={rows!r} in the config.json of "):
            longest(config | {"max_position_embeddings": rows})
    # tokenizer_config.json of the checkpoint says 514, then 77.
    ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, model_max_length=514).save_pretrained(checkpoint)
    assert longest(config) == 512
    ErnieMTokenizer(MODEL_FILE, VOCAB_FILE, model_max_length=77).save_pretrained(checkpoint)
    assert longest(config) == 77
    (checkpoint / "config.json").unlink()
    assert ErnieMTokenizer.from_pretrained(checkpoint).model_max_length == 77
    assert ErnieMTokenizer(MODEL_FILE, VOCAB_FILE).model_max_length > 1e20


def test_long_texts_are_truncated_to_what_the_model_reads(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert len(tokenizer("a " * 600, truncation=True)["input_ids"]) == tokenizer.model_max_length == 512
    tokenizer.save_pretrained(tmp_path)
    assert ErnieMTokenizer.from_pretrained(tmp_path).model_max_length == 512


def test_saved_vocabulary_is_what_was_loaded(tokenizer, tmp_path):
    assert tokenizer.save_vocabulary(str(tmp_path)) == (str(tmp_path / "vocab.txt"),)
    for name in ("vocab.txt", "sentencepiece.bpe.model"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()
    assert tokenizer.save_vocabulary(str(tmp_path), "my") == (str(tmp_path / "my-vocab.txt"),)
    assert (tmp_path / "my-vocab.txt").read_bytes() == (TINY / "vocab.txt").read_bytes()


def test_a_vocabulary_line_is_a_token_with_its_spaces(tokenizer, tmp_path):
    (tmp_path / "vocab.txt").write_text("a\n b \n\n\u3000", encoding="utf-8")
    assert tokenizer.load_vocab(tmp_path / "vocab.txt") == {"a": 0, " b ": 1, "": 2, "\u3000": 3}


def test_saving_keeps_the_ids_of_a_vocabulary_that_repeats_a_token(tmp_path):
    tokens = (TINY / "vocab.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "repeats.txt").write_text("\n".join([*tokens[:10], *tokens[8:]]) + "\n", encoding="utf-8")
    tokenizer = ErnieMTokenizer(MODEL_FILE, str(tmp_path / "repeats.txt"))
    tokenizer.save_pretrained(tmp_path)
    loaded = ErnieMTokenizer.from_pretrained(tmp_path)
    assert {token: loaded.vocab[token] for token in tokens} == tokenizer.vocab
    assert tokenizer.vocab[tokens[-1]] == len(tokens) + 1


def test_a_pickle_needs_no_files(tmp_path, golden):
    for name in ("vocab.txt", "sentencepiece.bpe.model"):
        shutil.copy(TINY / name, tmp_path)
    paths = str(tmp_path / "sentencepiece.bpe.model"), str(tmp_path / "vocab.txt")
    tokenizer = ErnieMTokenizer(*paths, sp_model_kwargs={"reverse": True})
    tokenizer.add_tokens(["ErnieM"])
    batch = [*golden["odd"]["texts"], "ErnieM"]
    expected = tokenizer(batch)["input_ids"]
    pickled = pickle.dumps(tokenizer)
    shutil.rmtree(tmp_path)
    assert pickle.loads(pickled)(batch)["input_ids"] == expected


PICKLES = """
import hashlib
import pickle
import sys

from erniem_fast import ErnieMTokenizer

tokenizer = ErnieMTokenizer.from_pretrained(sys.argv[1], additional_special_tokens=["<a>", "<b>", "<c>"])
tokenizer.add_tokens(["ErnieM", "日本", "<d>", "<e>"])
first = pickle.dumps(tokenizer)
second = pickle.dumps(pickle.loads(first))
tokenizer("ErnieM <a> of 日本 " * 200)
for pickled in (first, second, pickle.dumps(tokenizer)):
    print(hashlib.sha256(pickled).hexdigest())
"""


def test_equal_tokenizers_have_equal_pickles_in_every_process():
    """Caches such as those of `datasets` know a tokenizer by a hash of its pickle."""
    command = [sys.executable, "-c", PICKLES, str(TINY)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True
        )
        for seed in ("0", "1")
    ]
    hashes = [process.communicate(timeout=300)[0].split() for process in processes]
    assert [len(each) for each in hashes] == [3, 3]
    assert len({pickled for each in hashes for pickled in each}) == 1


def test_what_a_tokenizer_has_seen_is_in_its_cache_alone(texts):
    """`datasets` hashes the attributes, not the pickle, and leaves out the one that is called cache."""
    tokenizer = ErnieMTokenizer(MODEL_FILE, VOCAB_FILE)

    def state():
        return {name: pickle.dumps(value) for name, value in vars(tokenizer).items() if name != "cache"}

    before = state()
    tokenizer(texts[:50])
    assert len(tokenizer.cache) > 100
    assert state() == before


@pytest.mark.parametrize("name", ["vocab.txt", "sentencepiece.bpe.model"])
def test_a_checkpoint_without_a_file_is_refused(tmp_path, name):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    argument = {file: argument for argument, file in ErnieMTokenizer.vocab_files_names.items()}[name]
    message = (
        rf"{argument}: '{re.escape(str(tmp_path))}' holds no {name}: copy it from the checkpoint, or pass its path"
    )
    with pytest.raises(ValueError, match=message):
        ErnieMTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoTokenizer.from_pretrained(tmp_path)
    loaded = ErnieMTokenizer.from_pretrained(tmp_path, **{argument: str(TINY / name)})
    assert loaded.tokenize("Save") == ["▁S", "ave"]


def test_missing_and_broken_files_are_named():
    with pytest.raises(
        FileNotFoundError, match=r"sentencepiece_model_ckpt='no\.model' is not a file: give the path of"
    ):
        ErnieMTokenizer("no.model", VOCAB_FILE)
    with pytest.raises(FileNotFoundError, match=r"vocab_file='no\.txt' is not a file: give the path of vocab\.txt"):
        ErnieMTokenizer(MODEL_FILE, "no.txt")
    with pytest.raises(
        ValueError, match=r"sentencepiece_model_ckpt='.*vocab\.txt' is not a SentencePiece model: copy it"
    ):
        ErnieMTokenizer(VOCAB_FILE, VOCAB_FILE)
    with pytest.raises(ValueError, match=r"vocab_file: 'no\.txt' is not a file: copy it from the checkpoint"):
        ErnieMTokenizer.from_pretrained(TINY, vocab_file="no.txt")
