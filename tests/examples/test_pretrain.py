"""examples/pretrain.py: replicas and shards compute what one process does, and a killed run goes on."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.multiprocessing as mp

from bench.model.text import PARALLEL
from erniem_fast import ErnieMForMaskedLM
from erniem_fast.pretraining import ErnieMForPreTraining
from tests import ROOT
from tests.examples.scripts import import_example
from tests.golden import cases
from tests.pretraining.parallel import COLUMNS, LANGUAGES, SENTENCES

STEPS = 20
OPTIONS = {"max-length": 48, "token-budget": 160, "shards": 2, "steps": STEPS, "warmup": 5, "lr": 1e-3, "save-every": 6}


def command(folder, *more, objectives=("mmlm", "tlm", "camlm", "btmlm=0.5"), **options):
    """The arguments of the example."""
    texts = folder.parent / "texts"
    texts.write_text("\n".join(sentence.text for sentence in SENTENCES), encoding="utf-8")
    columns = [word for name, column in COLUMNS.items() for word in (f"--{name.replace('_', '-')}", column)]
    numbers = [word for name, value in {**OPTIONS, **options}.items() for word in (f"--{name}", str(value))]
    data = ["--text", f"de={texts}", "--pairs", str(PARALLEL), "--language-embeddings", *LANGUAGES]
    where = ["--model", str(folder.parent / "start"), "--output", str(folder)]
    return [*where, *data, *columns, "--objectives", *objectives, *numbers, *more]


def losses_in(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a run on one process has left its results; dropout is on."""
    folder = tmp_path_factory.mktemp("pretrain")
    torch.manual_seed(1)
    model = ErnieMForMaskedLM.from_pretrained(cases.TINY)
    model.save_pretrained(folder / "start")
    for name in ("sentencepiece.bpe.model", "vocab.txt", "tokenizer_config.json"):
        (folder / "start" / name).write_bytes((cases.TINY / name).read_bytes())
    import_example("pretrain").main(command(folder / "alone"))
    return folder


def worker(rank, port, runs):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "TRITON_INTERPRET": "1"}
    torch.set_num_threads(1)
    for index, arguments in enumerate(runs):
        os.environ["MASTER_PORT"] = str(port + index)
        import_example("pretrain").main(arguments)


def test_two_processes_compute_what_one_does(folder):
    """With replicas and with shards, by the same loss curves; the checkpoint of shards is one of replicas, too."""
    runs = {"ddp": command(folder / "ddp"), "fsdp": command(folder / "fsdp", "--fsdp")}
    mp.spawn(worker, (free_port(), list(runs.values())), nprocs=2)
    expected = losses_in(folder / "alone")
    assert len(expected) == STEPS
    for name in runs:
        for one, other in zip(losses_in(folder / name), expected, strict=True):
            assert one.pop("norm") == pytest.approx(other["norm"], rel=1e-4)
            assert one == pytest.approx({key: each for key, each in other.items() if key != "norm"}, abs=1e-5)
    assert expected[-1]["loss"] < expected[0]["loss"]
    state = ErnieMForPreTraining.from_pretrained(folder / "alone/model").state_dict()
    for name in runs:
        for key, each in ErnieMForPreTraining.from_pretrained(folder / name / "model").state_dict().items():
            if not key.endswith("k_proj.bias"):  # their gradients are zero but for rounding, which Adam enlarges
                torch.testing.assert_close(each, state[key], rtol=0, atol=1e-4)


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def test_a_killed_run_goes_on(folder):
    """With the same losses and weights, to the bit, from wherever it was."""
    killed = folder / "killed"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, ROOT / "examples/pretrain.py", *command(killed)], env=environment)
    deadline = time.monotonic() + 240
    while not (killed / "step-6").exists() or len(losses_in(killed)) < 8:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(losses_in(killed)) < STEPS
    import_example("pretrain").main(command(killed))
    assert losses_in(killed) == losses_in(folder / "alone")
    files = [(each / "model/model.safetensors").read_bytes() for each in (killed, folder / "alone")]
    assert files[0] == files[1]
    assert (killed / "losses.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fsdp"], "--fsdp shards over several processes"),
        (["--objectives", "mlm"], "--objectives mlm: it is none of mmlm, tlm, camlm, btmlm"),
        (["--objectives", "mmlm"], "--objectives mmlm needs --text"),
    ],
)
def test_what_is_refused(folder, more, message):
    arguments = command(folder / "refused", *more)
    if "mmlm" in more:
        place = arguments.index("--text")
        del arguments[place : place + 2]
    with pytest.raises(SystemExit, match=message):
        import_example("pretrain").main(arguments)
