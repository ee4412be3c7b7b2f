"""What type checkers and editors know of the public functions: in the documents' examples, and of their results."""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import erniem_fast
from tests import ROOT
from tests.pasted import fenced
from tests.test_readme import DOCUMENTS

pytest.importorskip("mypy")

# Types of torch and transformers are left out: to analyse them takes minutes.
CONFIG = """
[mypy]
follow_imports = silent
ignore_missing_imports = True
[mypy-torch.*,transformers.*,numpy.*]
follow_imports = skip
"""

# Functions of a module that mypy reads beside the examples, and the types of their results.
TYPES = {
    "erniem_fast.optimize(reader)": "erniem_fast.modeling.ErnieMForQuestionAnswering",
    "erniem_fast.restore(reader)": "erniem_fast.modeling.ErnieMForQuestionAnswering",
    "ErnieMModel.from_pretrained('DIR')": "erniem_fast.modeling.ErnieMModel",
    "ErnieMTokenizer.from_pretrained('DIR')": "erniem_fast.tokenization.ErnieMTokenizer",
    "erniem_fast.embed(model, texts)": "numpy.ndarray",
    "erniem_fast.embed(model, iter(texts))": "typing.Iterator[Any]",
    "erniem_fast.score(reranker, [('a', 'b')])": "numpy.ndarray",
    "erniem_fast.verify(model)": "erniem_fast.verification.models.Verification",
    "extract(uie, tokenizer, texts, ['Name'])": "list[dict[str, list[dict[str, Any]]]]",
    "extract_answer(reader, tokenizer, 'a', 'b')": "list[dict[str, Any]]",
    "extract_answer(reader, tokenizer, ['a'], ['b'])": "list[list[dict[str, Any]]]",
}
ASKED = """
import erniem_fast
from erniem_fast import *

def ask(
    model: ErnieMModel,
    reader: ErnieMForQuestionAnswering,
    reranker: ErnieMForSequenceClassification,
    uie: ErnieMForInformationExtraction,
    tokenizer: ErnieMTokenizer,
    texts: list[str],
) -> None:
"""


def test_the_examples_have_the_types_that_editors_show(tmp_path):
    (tmp_path / "mypy.ini").write_text(CONFIG)
    documents = {pathlib.Path(name).stem.lower(): text for name, text in DOCUMENTS.items() if name != "CONTRIBUTING.md"}
    sources = {name: "\n".join(fenced("python", text)) for name, text in documents.items()}
    sources["asked"] = ASKED + "".join(f"    reveal_type({each})\n" for each in TYPES)
    for name, source in sources.items():
        (tmp_path / f"examples_{name}.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini")]
    command += ["--cache-dir", str(ROOT / "build" / "mypy"), *map(str, tmp_path.glob("*.py"))]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert " error: " not in ran.stdout, ran.stdout
    revealed = re.findall(r'Revealed type is "(.*)"', ran.stdout)
    assert len(revealed) == len(TYPES), ran.stdout + ran.stderr
    for (expression, expected), found in zip(TYPES.items(), revealed, strict=True):
        assert found.startswith(expected), (expression, found)


def test_public_names():
    """`from erniem_fast import *` gives the public names, and each says what it takes."""
    names = {}
    exec("from erniem_fast import *", names)
    assert set(erniem_fast.__all__) == names.keys() - {"__builtins__"}
    for name in erniem_fast.__all__:
        each = getattr(erniem_fast, name)
        assert each.__doc__, name
        if inspect.isfunction(each):
            parameters = inspect.signature(each).parameters.values()
            assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters), name
    assert (ROOT / "erniem_fast/py.typed").exists()
