"""examples/pretrain.py: replicas and shards compute what one process does, and a killed run goes on."""

import json
import os
import shutil
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
from tests.examples.scripts import free_port, import_example
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
    data += ["--test", f"de={texts}", f"xx={texts}"]
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


class Stopped(Exception):
    pass


# Exceptions that stopped runs. Their frames hold gloo's process groups, which must not be destroyed before the process
# ends: a destructor joins its group's threads with the GIL held, and hangs if one of them needs it.
stopped = []


def stop_at(step, arguments):
    """Starts a run that is stopped after a checkpoint, on the way to the next one."""
    training = import_example("pretrain").Training
    take_step = training.take_step

    def stop(self, batches):
        if self.step == step:
            raise Stopped
        return take_step(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "take_step", stop)
        with pytest.raises(Stopped) as raised:
            import_example("pretrain").main(arguments)
        stopped.append(raised.value)


def worker(rank, port, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "TRITON_INTERPRET": "1"}
    torch.set_num_threads(1)
    main = import_example("pretrain").main
    for run, arguments in (
        (main, command(folder / "replicas")),
        (lambda arguments: stop_at(14, arguments), command(folder / "stopped")),
        (main, command(folder / "stopped")),
        (lambda arguments: stop_at(9, arguments), command(folder / "shards", "--fsdp")),
        (main, command(folder / "shards")),
    ):
        os.environ["MASTER_PORT"] = str(port)
        port += 1
        run(arguments)
        if not rank and not (folder / "fewer").exists() and (folder / "stopped").exists():
            shutil.copytree(folder / "stopped", folder / "fewer")
        os.environ["ACCELERATE_USE_FSDP"] = str((folder / "shards").exists()).lower()


def assert_same_losses(found, expected):
    found, expected = losses_in(found), losses_in(expected)
    assert len(expected) == STEPS
    for one, other in zip(found, expected, strict=True):
        assert one.pop("norm") == pytest.approx(other["norm"], rel=1e-4)
        assert one == pytest.approx({key: each for key, each in other.items() if key != "norm"}, abs=1e-5)


def test_two_processes_compute_what_one_does(folder):
    """By the same loss curves, also if they are stopped and go on; on one process, too, but not with other shards.

    The shards are stopped in a run by torchrun, and go on in one by accelerate; the checkpoint is one of replicas, too.
    """
    mp.spawn(worker, (free_port(), folder), nprocs=2)
    assert losses_in(folder / "stopped") == losses_in(folder / "replicas")
    with pytest.raises(SystemExit, match="step-12 is of a run with --shards 2, not 1; pass --shards 2"):
        import_example("pretrain").main(command(folder / "fewer", shards=1))
    import_example("pretrain").main(command(folder / "fewer"))
    names = ("replicas", "shards", "fewer")
    for name in names:
        assert_same_losses(folder / name, folder / "alone")
    expected = losses_in(folder / "alone")
    assert expected[-1]["loss"] < expected[0]["loss"]
    state = ErnieMForPreTraining.from_pretrained(folder / "alone/model").state_dict()
    for name in names:
        for key, each in ErnieMForPreTraining.from_pretrained(folder / name / "model").state_dict().items():
            if not key.endswith("k_proj.bias"):  # their gradients are zero but for rounding, which Adam enlarges
                torch.testing.assert_close(each, state[key], rtol=0, atol=1e-4)


def test_language_embeddings_go_on(folder, monkeypatch):
    """A model that has them trains them without being told their names again."""
    arguments = command(folder / "second", objectives=["btmlm"], steps=6, shards=1)
    place = arguments.index("--language-embeddings")
    del arguments[place : place + 1 + len(LANGUAGES)]
    arguments[arguments.index("--model") + 1] = str(folder / "alone/model")
    training, seen = import_example("pretrain").Training, []
    take_step = training.take_step
    monkeypatch.setattr(
        training, "take_step", lambda self, batches: (seen.extend(batches), take_step(self, batches))[1]
    )
    import_example("pretrain").main(arguments)
    assert len(seen) == 6
    assert all((batch["language_ids"][batch["pseudo_tokens"]] >= 0).all() for batch in seen)


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
    head, de, xx = [line.split("\t") for line in (killed / "languages.tsv").read_text().splitlines()]
    assert (head, de[0], xx[0]) == (["language", "loss", "words"], "de", "xx")
    assert de[1:] == xx[1:]
    losses = [step["mmlm"] for step in losses_in(killed) if "mmlm" in step]
    assert float(de[1]) == pytest.approx(losses[-1], abs=1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fsdp"], "--fsdp shards over several processes"),
        (["--objectives", "mlm"], "--objectives mlm: it is none of mmlm, tlm, camlm, btmlm"),
        (["--objectives", "mmlm"], "--objectives mmlm needs --text"),
        (["--objectives", "tlm=many"], "--objectives tlm=many: its weight must be a number above 0"),
        (["--objectives", "tlm=0"], "--objectives tlm=0: its weight must be a number above 0"),
        (["--text", "de.txt"], "de.txt names no language; write LANGUAGE=de.txt"),
        (["--test", "de.txt"], "de.txt names no language; write LANGUAGE=de.txt"),
        (["--test", f"de={os.devnull}"], "is not a file"),
        (["--warmup", str(STEPS)], f"--warmup {STEPS} is not below --steps {STEPS}"),
        (["--save-every", "0"], "--save-every 0 must be at least 1"),
        (["--max-length", "513", "--token-budget", "513"], "--max-length 513 is more than the 512 positions of"),
    ],
)
def test_what_is_refused(folder, more, message):
    """Before anything is trained."""
    arguments = command(folder / "refused", *more)
    if "mmlm" in more:
        place = arguments.index("--text")
        del arguments[place : place + 2]
    with pytest.raises((SystemExit, FileNotFoundError), match=message):
        import_example("pretrain").main(arguments)
    assert not (folder / "refused").exists()
