"""The command, its page, and the pipeline, with the tiny checkpoint."""

import argparse
import json
import re
import shutil
import subprocess

import pytest
import torch
from transformers import pipeline

from erniem_fast import ErnieMForInformationExtraction, extract
from erniem_fast.extraction import Extractor, command
from erniem_fast.extraction.html import write_page
from erniem_fast.resumable import ResumableOutput
from tests.extraction.tiny import load_tokenizer
from tests.golden.cases import TINY

TEXTS = ["Your password was changed.", "", "Log in again, please.", "<b>&amp; \ud83d 已存在一位使用该名字的用户。"] * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = ErnieMForInformationExtraction.from_pretrained(TINY)
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    (folder / "schema.json").write_text(json.dumps(["user", {"password": ["date", "mood[good,bad]"]}]))
    (folder / "in.jsonl").write_text(
        "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    )
    return folder


def run(folder, output, **options):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = {"model": folder, "schema": folder / "schema.json", "input": folder / "in.jsonl"} | options
    options |= {"output": output, "lang": "en", "threshold": 0.45}
    return command.run(parser.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in options.items()]))


@pytest.fixture(scope="module")
def results(folder):
    model, schema = (
        ErnieMForInformationExtraction.from_pretrained(folder),
        json.loads((folder / "schema.json").read_text()),
    )
    return extract(model, load_tokenizer(), TEXTS, schema, lang="en", threshold=0.45)


def test_the_file_holds_the_fields_and_the_results(folder, results, tmp_path):
    assert run(folder, tmp_path / "out.jsonl", html=tmp_path / "out.html") == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"text": text, "id": i, "result": results[i]} for i, text in enumerate(TEXTS)]
    assert any(results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.jsonl"]


def test_a_run_that_was_stopped_goes_on(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "GROUP", 2)
    run(folder, tmp_path / "whole.jsonl")
    calls, extractor = [], command.Extractor

    class Stopped(extractor):
        def __call__(self, texts):
            calls.append(texts)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().__call__(texts)

    monkeypatch.setattr(command, "Extractor", Stopped)
    assert run(folder, tmp_path / "out.jsonl") == 130
    assert not (tmp_path / "out.jsonl").exists()
    with (tmp_path / "out.jsonl.partial/lines").open("a") as file:
        file.write('{"text": "half a li')
    assert run(folder, tmp_path / "out.jsonl", batch_tokens=99) == 2
    assert "batch_tokens was None and is 99" in capsys.readouterr().err
    assert run(folder, tmp_path / "out.jsonl") == 0
    assert [len(texts) for texts in calls] == [2, 2, 2, 2, 2]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


def change_model(folder):
    model = ErnieMForInformationExtraction.from_pretrained(folder)
    model.linear_start.bias.data += 1
    model.save_pretrained(folder)


CHANGES = {
    "model": (".", change_model),
    "input": ("in.jsonl", lambda path: path.write_text('{"text": "another", "id": 0}\n')),
    "schema": ("schema.json", lambda path: path.write_text('["another"]')),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_only_as_it_was_started(folder, tmp_path, monkeypatch, capsys, change):
    name, apply = CHANGES[change]
    changed = shutil.copytree(folder, tmp_path / "changed") / name
    with monkeypatch.context() as patched:
        patched.setattr(ResumableOutput, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(folder, tmp_path / "out.jsonl", **{change: changed}) == 130
    assert "start the same command again to go on" in capsys.readouterr().err
    apply(changed)
    assert run(folder, tmp_path / "out.jsonl", **{change: changed}) == 2
    assert re.search(rf"another way: {change} was [^;]* and is [^;]*\. Start", capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_page_that_cannot_be_written_costs_no_work(folder, tmp_path, monkeypatch, capsys):
    assert run(folder, tmp_path / "out.jsonl", html=tmp_path / "missing/out.html") == 2
    assert "missing/out.html" in capsys.readouterr().err
    monkeypatch.setattr(Extractor, "__call__", None)  # what computes cannot run
    assert run(folder, tmp_path / "out.jsonl", html=tmp_path / "out.html") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.jsonl"]


def test_bad_input_is_told_before_anything_is_computed(folder, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('"a"\n{"txt": 1}\n')
    assert run(folder, tmp_path / "out.jsonl", input=tmp_path / "in.jsonl") == 2
    assert "in.jsonl, line 2: no text" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text('"a"\n{"text": "a", "result": "mine"}\n')
    assert run(folder, tmp_path / "out.jsonl", input=tmp_path / "in.jsonl") == 2
    assert re.search(r"in\.jsonl, line 2: 'result' .*; rename the field", capsys.readouterr().err)
    assert run(folder, tmp_path / "out.jsonl", input=tmp_path / "none.jsonl") == 2
    assert "none.jsonl: there is no such file" in capsys.readouterr().err
    assert run(folder, tmp_path / "out.jsonl", input=tmp_path / "in.csv") == 2
    assert "in.csv: name a file that ends in .txt" in capsys.readouterr().err
    (tmp_path / "schema.json").write_text('{"a": 3}')
    assert run(folder, tmp_path / "out.jsonl", schema=tmp_path / "schema.json") == 2
    assert "schema['a'] holds 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "content", "message"),
    [
        ("schema", "schema.json", b'{"a": ', r"--schema .*schema\.json is not JSON in UTF-8: Expecting value"),
        ("schema", "schema.json", '["选手"]'.encode("gbk"), r"--schema .*schema\.json is not JSON in UTF-8: .*decode"),
        ("input", "in.txt", "选手".encode("gbk"), r"--input .*in\.txt is not UTF-8 \(.*\); save it as UTF-8"),
        ("input", "in.jsonl", '"选手"'.encode("gbk"), r"--input .*in\.jsonl is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(folder, tmp_path, capsys, option, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert run(folder, tmp_path / "out.jsonl", **{option: tmp_path / name}) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("name", "before", "behind"), [("in.txt", "", ""), ("in.jsonl", '"', '"')])
def test_the_mark_at_the_beginning_of_a_file_is_no_text(folder, tmp_path, name, before, behind):
    (tmp_path / name).write_text(f"\ufeff{before}Log in{behind}\n", encoding="utf-8")
    schema = tmp_path / "schema.json"
    schema.write_text('\ufeff["user"]', encoding="utf-8")
    assert run(folder, tmp_path / "out.jsonl", input=tmp_path / name, schema=schema) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == "Log in"


@pytest.mark.parametrize("name", ["in.txt", "out.jsonl"])
def test_a_page_does_not_take_the_place_of_another_file(folder, tmp_path, capsys, name):
    (tmp_path / "in.txt").write_text("Log in\n")
    (tmp_path / "new").mkdir()
    page = tmp_path / "new/.." / name
    assert run(folder, tmp_path / "out.jsonl", input=tmp_path / "in.txt", html=page) == 2
    assert "would take the place of another file of the command" in capsys.readouterr().err
    assert (tmp_path / "in.txt").read_text() == "Log in\n"


def test_the_pipeline_extracts_the_same(folder, results):
    pipe = pipeline("information-extraction", model=str(folder), schema="user", lang="en", threshold=0.45, device="cpu")
    schema = json.loads((folder / "schema.json").read_text())
    assert pipe(TEXTS, schema=schema) == results
    assert pipe(TEXTS[0]) == {name: spans for name, spans in results[0].items() if name == "user"}
    assert pipe(iter(TEXTS[:2]), schema=schema) == results[:2]
    with pytest.raises(ValueError, match="limit=3 is not an option"):
        pipe(TEXTS, limit=3)
    with pytest.raises(ValueError, match="schema is missing"):
        pipeline("information-extraction", model=str(folder), device="cpu")(TEXTS)


def test_the_page_renders_in_a_browser(tmp_path):
    text = "Ann & <Bob> work\nfor Acme Media."
    span = {"text": "Bob", "start": 7, "end": 10, "probability": 0.9}
    company = {"text": "Acme Media", "start": 21, "end": 31, "probability": 0.8}
    crossing = {"text": "Media.", "start": 26, "end": 32, "probability": 0.7}
    mood = {"text": "good", "probability": 0.6}
    result = {"person": [span | {"relations": {"company": [company], "mood[good,bad]": [mood]}}], "x": [crossing]}
    write_page(tmp_path / "page.html", [{"text": text, "result": result}, {"text": "none", "result": {}}])
    dom = _browse(tmp_path / "page.html")
    paragraph = dom.split("<article><p>")[1].split("</p>")[0]
    assert paragraph.count("<mark") == paragraph.count("</mark>") == 4
    assert ">Bob</mark>&gt; work\nfor " in paragraph
    assert 'data-name="company">Acme <mark' in paragraph
    assert dom.count("<article>") == 2
    assert "<li" in dom.split("<b>person</b>")[1].split("</ul>")[0]
    assert 'id="ran"' in dom


def _browse(path):
    """The page's elements after its script ran, in which an error would have left out the last line."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    page = path.read_text(encoding="utf-8")
    path.write_text(page.replace("</script>", 'document.body.id = "ran";</script>'), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={path.parent}/profile",
    ]
    done = subprocess.run(
        [chromium, *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    return done.stdout
