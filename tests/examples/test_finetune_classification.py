"""examples/finetune_classification.py: results by language, replicas and shards, and going on after a kill."""

import csv
import json
import os

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from erniem_fast import ErnieMForSequenceClassification
from tests.examples.scripts import free_port, import_example
from tests.golden import cases
from tests.pretraining.parallel import PAIRS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs whose label tells whether the first sentence starts with a letter of the alphabet's first half."""
    path = tmp_path_factory.mktemp("classification") / "pairs.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar=None, quotechar=None)
        writer.writerow(["language", "premise", "hypothesis", "label"])
        for index, pair in enumerate(PAIRS[:48]):
            writer.writerow([("en", "xx")[index % 2], pair.source, pair.source, ("low", "high")[pair.source[0] > "M"]])
    return path


HEADER = "language\tpremise\thypothesis\tlabel"


def command(data, folder, **options):
    numbers = {"epochs": 4, "batch-size": 8, "lr": 3e-3, "max-length": 48, "save-every": 5, **options}
    words = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    files = ["--model", str(cases.TINY), "--train", str(data), "--test", str(data), "--output", str(folder)]
    return [*files, "--cpu", *words]


def test_rates_and_results(data, tmp_path, capsys):
    """It learns the rows of one language by heart; the table and the model are written."""
    example = import_example("finetune_classification")
    example.main([*command(data, tmp_path, epochs=12, accumulate=2), "--train-languages", "en"])
    rows = [line.split("\t") for line in (tmp_path / "accuracy.tsv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["language", "en", "xx", "mean"]
    assert float(rows[1][1]) > 0.9
    assert "\n".join("\t".join(row) for row in rows) in capsys.readouterr().out
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    model = ErnieMForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.label2id == {"high": 0, "low": 1}


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """The tiny checkpoint without dropout."""
    folder = tmp_path_factory.mktemp("still")
    for path in cases.TINY.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((cases.TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | cases.NO_DROPOUT | {"classifier_dropout": 0.0}))
    return folder


def command_still(data, still, folder, **options):
    words = command(data, folder, **{"epochs": 2, "lr": 1e-3, **options})
    words[words.index("--model") + 1] = str(still)
    return words


@pytest.fixture(scope="module")
def alone(data, still, tmp_path_factory):
    """What a process by itself makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    import_example("finetune_classification").main(command_still(data, still, folder))
    return folder


def assert_same_weights(found, expected, atol):
    found, expected = (load_file(folder / "model/model.safetensors") for folder in (found, expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("k_proj.bias"):  # their gradients are zero but for rounding, which Adam enlarges
            torch.testing.assert_close(found[name], value, rtol=0, atol=atol)


def learnt_by(folder, start):
    """How the word table changed, and the feed-forward networks."""
    after, before = load_file(folder / "model/model.safetensors"), load_file(start / "model.safetensors")
    names = [name for name in before if "linear" in name or "word_embeddings" in name]
    return torch.cat([(after[f"ernie_m.{name.removeprefix('ernie_m.')}"] - before[name]).flatten() for name in names])


def shard_on_cpus():
    """accelerate shards on GPUs only. Its code for that runs on a CPU as well, if its state says that it is to."""
    make = AcceleratorState.__init__

    def make_sharded(state, *arguments, fsdp_plugin=None, **options):
        make(state, *arguments, **options)
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = fsdp_plugin or FullyShardedDataParallelPlugin()

    AcceleratorState.__init__ = make_sharded


def worker(rank, port, runs):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TRITON_INTERPRET": "1"}
    torch.set_num_threads(1)
    example = import_example("finetune_classification")
    example.main(runs[0])
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    os.environ |= {
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "ErnieMEncoderLayer",
    }
    AcceleratorState._reset_state(True)
    with pytest.raises(SystemExit, match="would train replicas here"):
        example.main(runs[1])
    AcceleratorState._reset_state(True)
    shard_on_cpus()
    example.main(runs[1])


def test_two_processes_compute_what_one_does(data, still, alone, tmp_path):
    """By replicas, and by shards as accelerate makes them."""
    folders = [tmp_path / name for name in ("replicas", "shards")]
    mp.spawn(worker, (free_port(), [command_still(data, still, folder) for folder in folders]), nprocs=2)
    for folder in folders:
        assert_same_weights(folder, alone, atol=1e-4)
        found, expected = ((each / "accuracy.tsv").read_text().split() for each in (folder, alone))
        assert found[::2] == expected[::2] == ["language", "en", "xx", "mean"]
        # A row whose classes are nearly equally likely may change sides.
        assert [*map(float, found[3::2])] == pytest.approx([*map(float, expected[3::2])], abs=0.05)
    assert (tmp_path / "shards/checkpoint-12/optimizer_0").is_dir()


def test_accumulation_and_precision(data, still, alone, tmp_path):
    """Half of the batch twice is the batch; bfloat16 learns nearly the same."""
    example = import_example("finetune_classification")
    example.main(command_still(data, still, tmp_path / "halves", accumulate=2))
    assert_same_weights(tmp_path / "halves", alone, atol=1e-4)
    example.main([*command_still(data, still, tmp_path / "bf16"), "--bf16"])
    learnt, near = learnt_by(alone, still), learnt_by(tmp_path / "bf16", still)
    assert 0.001 < (near - learnt).norm() / learnt.norm() < 0.15  # seen: 0.03


def test_checkpointed_gradients_are_the_same(data, tmp_path):
    """To the bit, with dropout."""
    example = import_example("finetune_classification")
    for name, more in (("kept", []), ("again", ["--gradient-checkpointing"])):
        example.main([*command(data, tmp_path / name, epochs=1), *more])
    files = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("kept", "again")]
    assert files[0] == files[1]


def test_a_batch_is_that_of_all_gpus(data, tmp_path, monkeypatch):
    """Also if one process sees several."""
    example = import_example("finetune_classification")
    monkeypatch.setattr(example.TrainingArguments, "n_gpu", 4)
    found = example.training_arguments(example.parse_arguments(command(data, tmp_path)))
    assert (found.per_device_train_batch_size, found.train_batch_size) == (2, 8)


class Killed(Exception):
    pass


def test_a_killed_run_goes_on(data, tmp_path, monkeypatch):
    """In the middle of an epoch, with two batches a step, to the same weights, to the bit."""
    example = import_example("finetune_classification")
    example.main(command(data, tmp_path / "whole", accumulate=2))
    step = torch.optim.AdamW.step
    steps = []

    def die(*arguments, **options):
        steps.append(1)
        if len(steps) == 13:
            raise Killed
        return step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", die)
        with pytest.raises(Killed):
            example.main(command(data, tmp_path / "parts", accumulate=2))
    example.main(command(data, tmp_path / "parts", accumulate=2))
    files = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_what_is_refused(data, tmp_path):
    example = import_example("finetune_classification")
    with pytest.raises(SystemExit, match="no rows in de"):
        example.main([*command(data, tmp_path), "--train-languages", "de"])
    for accumulate in (3, 0, -1):
        with pytest.raises(SystemExit, match=f"--batch-size 8 is no multiple of 1 devices x --accumulate {accumulate}"):
            example.main(command(data, tmp_path, accumulate=accumulate))
    with pytest.raises(SystemExit, match="--batch-size 0 is no multiple"):
        example.main(command(data, tmp_path, **{"batch-size": 0}))
    with pytest.raises(SystemExit, match="no rows in fr"):
        example.main([*command(data, tmp_path), "--train-languages", "en", "fr"])
    with pytest.raises(SystemExit, match="--max-length 513 is more than the 512 positions of"):
        example.main(command(data, tmp_path, **{"max-length": 513}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("language\tpremise\n", "lacks the columns hypothesis, label"),
        ("", "lacks the columns hypothesis, label, language, premise"),
        (f"{HEADER}\n", "has no rows$"),
        (f"{HEADER}\nen\ta\tb\tlow\n\nen\ta\n", "has 2 columns in line 4, and its header names 4"),
        (f"{HEADER}\nen\ta\tb\tlow\nen\ta tab\tin it\tb\thigh\n", "has 5 columns in line 3, and its header names 4"),
        (f"{HEADER}\nen\ta\tb\t\n", "has no label in line 2"),
        (f"{HEADER}\nen\ta\tb\tlow\nen\tb\ta\tlow\n", "has the label low alone"),
    ],
)
def test_bad_files(rows, message, tmp_path):
    """Each would train something else: a cut row has its text as a label, and a single label means regression."""
    data = tmp_path / "bad.tsv"
    data.write_text(rows, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        import_example("finetune_classification").main(command(data, tmp_path))


def test_rows(tmp_path):
    """With the mark of an encoding, ends of lines as on Windows, quotes as they are, and texts of any length."""
    data, long = tmp_path / "rows.tsv", "a " * 100_000
    data.write_text(f'\ufeff{HEADER}\r\nen\t"a\t{long}\tlow\r\n\r\n', encoding="utf-8", newline="")
    expected = {"language": "en", "premise": '"a', "hypothesis": long, "label": "low"}
    assert import_example("finetune_classification").read(data) == [expected]
