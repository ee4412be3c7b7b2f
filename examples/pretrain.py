"""Pre-trains ERNIE-M, or goes on pre-training it, by MMLM, TLM, CAMLM and BTMLM, on one process or many.

    python examples/pretrain.py --model ernie-m-base --text de=de.txt zh=zh.txt --pairs en-de.tsv --output out
    torchrun --nproc-per-node 8 examples/pretrain.py ... --precision bfloat16 [--fsdp]
    accelerate launch --use_fsdp --fsdp_version 2 --mixed_precision bf16 examples/pretrain.py ...

A step takes a batch of every shard of the data (--shards), whatever the number of processes, which must divide that of
shards. With the same shards, all numbers of processes compute the same up to rounding. A run that was killed goes on
from its last checkpoint when it is started again, on as many processes as before or others; on one process it then
computes what it would have computed, to the bit. Leave the files of texts as they are until then: a checkpoint holds
places in them, and that one was edited is noticed only where it has become too short. Each step adds a line to
OUTPUT/losses.jsonl. In the end OUTPUT/losses.png shows the curves, OUTPUT/languages.tsv the loss on the sentences of
--test by language, and OUTPUT/model holds the checkpoint.

The paper's recipe trains MMLM, TLM and CAMLM first (the default of --objectives) and then BTMLM as well:
`--model out/model --objectives mmlm tlm camlm btmlm --output out2`.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from erniem_fast import ErnieMConfig, ErnieMTokenizer, create_optimizer
from erniem_fast.pretraining import (
    BTMLM,
    CAMLM,
    MMLM,
    OBJECTIVES,
    TLM,
    ErnieMForPreTraining,
    Masking,
    PretrainingStream,
    Task,
    TextFiles,
    TsvFiles,
)
from shared import check_length

KINDS = {kind.name: kind for kind in (MMLM, TLM, CAMLM, BTMLM)}
COLOURS = ("black", "#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito's, safe for the colour-blind
ON_PAIRS = ("tlm", "camlm")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the checkpoint to start from, with its tokenizer")
    add("--from-scratch", action="store_true", help="take only the config and the tokenizer of --model")
    add("--output", type=Path, required=True, help="folder for checkpoints and results")
    data = parser.add_argument_group("data")
    add = data.add_argument
    add(
        "--text",
        nargs="+",
        default=[],
        metavar="LANGUAGE=FILE",
        help="a sentence a line, for mmlm and btmlm, which draw from all files alike",
    )
    add("--pairs", nargs="+", default=[], type=Path, metavar="TSV", help="translations, for tlm and camlm")
    add("--test", nargs="+", default=[], metavar="LANGUAGE=FILE", help="sentences to measure the loss of mmlm on")
    add("--source", default="source", help="column of the text")
    add("--target", default="target", help="column of the translation")
    add("--source-language", help="column with the text's language, or the language itself")
    add("--target-language", help="the same for the translation")
    languages = "give the model an embedding for each of these (default: those that --model has)"
    add("--language-embeddings", nargs="+", metavar="LANGUAGE", help=languages)
    add("--max-length", type=int, default=512, help="tokens of a sample at most")
    add("--token-budget", type=int, default=8192, help="tokens of a shard's batch at most")
    add("--shards", type=int, help="batches of a step (default: one a process)")
    add("--seed", type=int, default=0)
    recipe = parser.add_argument_group("recipe")
    add = recipe.add_argument
    add(
        "--objectives", nargs="+", default=["mmlm", "tlm", "camlm"], metavar="NAME[=WEIGHT]", help=", ".join(OBJECTIVES)
    )
    add("--mask-rate", type=float, default=0.15, help="share of the tokens that are to be predicted")
    add("--pseudo-share", type=float, default=1.0, help="pseudo tokens for each token of a text, for btmlm")
    add("--temperature", type=float, default=1.0, help="of the drawing of pseudo tokens; 0 takes the likeliest")
    add("--steps", type=int, default=100_000)
    add("--warmup", type=int, default=10_000, help="steps in which the rate rises; then it falls to 0")
    add("--lr", type=float, default=2e-4)
    add("--weight-decay", type=float, default=0.01)
    add("--clip", type=float, default=1.0, help="largest norm of all gradients")
    run = parser.add_argument_group("run")
    add = run.add_argument
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), os.environ.get("ACCELERATE_USE_FSDP", "false")
    precision = "bfloat16" if launched[0] == "bf16" else "float32"
    add("--precision", choices=["float32", "bfloat16"], default=precision, help="of products, by autocast")
    add("--gradient-checkpointing", action="store_true", help="compute activations twice to save memory")
    shards = {"action": "store_true", "default": launched[1] == "true"}
    add("--fsdp", **shards, help="shard weights, gradients and optimizer (FSDP2)")
    add("--save-every", type=int, default=1000, metavar="STEPS")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """Refuses what would otherwise be found out after hours."""
    if arguments.warmup >= arguments.steps:
        raise SystemExit(
            f"--warmup {arguments.warmup} is not below --steps {arguments.steps}, so that --lr would never be reached"
        )
    if arguments.save_every < 1:
        raise SystemExit(f"--save-every {arguments.save_every} must be at least 1")
    for _, path in named_files(arguments.test):
        if next(iter(TextFiles(path)), None) is None:
            raise SystemExit(f"--test {path} has no sentences")


@dataclass
class Process:
    """This process among all.

    Attributes:
        rank, world: its number, and how many there are.
        device: where it computes.
    """

    rank: int
    world: int
    device: torch.device

    def sum(self, number: int | Tensor) -> Tensor:
        """The sum over all processes."""
        total = torch.as_tensor(number, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def start_process() -> Iterator[Process]:
    """As torchrun describes it in the environment; alone without torchrun."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Process(rank, world, torch.device(device))
    finally:
        if world > 1:
            dist.destroy_process_group()


def make_tasks(arguments: argparse.Namespace, tokenizer: ErnieMTokenizer, names: list[str]) -> list[Task]:
    """A task for each objective on pairs, and one for each objective and file of sentences.

    Args:
        names: of the model's language embeddings.
    """
    options = {"tokenizer": tokenizer, "max_length": arguments.max_length}
    own = {
        "camlm": {"masking": Masking(arguments.mask_rate, mask=1.0, random=0.0), "languages": names},
        "btmlm": {"share": arguments.pseudo_share, "temperature": arguments.temperature, "languages": names},
    }
    columns = {name: getattr(arguments, name) for name in ("source", "target", "source_language", "target_language")}
    tasks = []
    for each in arguments.objectives:
        name, _, weight = each.partition("=")
        if name not in KINDS:
            raise SystemExit(f"--objectives {each}: it is none of {', '.join(OBJECTIVES)}")
        if not is_weight(weight or "1"):
            raise SystemExit(f"--objectives {each}: its weight must be a number above 0")
        sources = [TsvFiles(*arguments.pairs, **columns)] if arguments.pairs else []
        if name not in ON_PAIRS:
            sources = [TextFiles(path, language=language) for language, path in named_files(arguments.text)]
        if not sources:
            raise SystemExit(f"--objectives {each} needs {'--pairs' if name in ON_PAIRS else '--text'}")
        objective = KINDS[name](**{**options, "masking": Masking(arguments.mask_rate), **own.get(name, {})})
        tasks += [Task(objective, source, float(weight or 1) / len(sources)) for source in sources]
    return tasks


def is_weight(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def named_files(values: list[str]) -> list[tuple[str, str]]:
    """Languages and files, of LANGUAGE=FILE."""
    for each in values:
        if "=" not in each:
            raise SystemExit(f"{each} names no language; write LANGUAGE={each}")
    return [(language, path) for language, _, path in (each.partition("=") for each in values)]


def make_model(arguments: argparse.Namespace) -> ErnieMForPreTraining:
    languages = {"languages": arguments.language_embeddings} if arguments.language_embeddings else {}
    torch.manual_seed(arguments.seed)
    if arguments.from_scratch:
        model = ErnieMForPreTraining(ErnieMConfig.from_pretrained(arguments.model), **languages)
    else:
        model = ErnieMForPreTraining.from_pretrained(arguments.model, **languages)
    check_length(arguments, model)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def distribute(model: nn.Module, process: Process, fsdp: bool) -> nn.Module:
    """The model on the device, as a replica or a shard if there are several processes."""
    model = model.to(process.device)
    if fsdp and process.world == 1:
        raise SystemExit("--fsdp shards over several processes; start them by torchrun, or leave it out")
    if fsdp:
        for layer in model.ernie_m.encoder.layers:
            fully_shard(layer)
        return fully_shard(model)
    if process.world > 1:
        return DistributedDataParallel(model)
    return model


class Training:
    """Model, optimizer, schedule and streams of a run, its steps and its checkpoints."""

    def __init__(self, arguments: argparse.Namespace, process: Process) -> None:
        self.arguments, self.process, self.step = arguments, process, 0
        shards = arguments.shards or process.world
        if shards % process.world:
            raise SystemExit(f"--shards {shards} is no multiple of the {process.world} processes")
        self.plain = make_model(arguments)
        names = getattr(self.plain.config, "languages", None) or []
        tasks = make_tasks(arguments, ErnieMTokenizer.from_pretrained(arguments.model), names)
        self.model = distribute(self.plain, process, arguments.fsdp)
        self.optimizer = create_optimizer(self.plain, arguments.lr, weight_decay=arguments.weight_decay)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, arguments.warmup, arguments.steps)
        options = {"token_budget": arguments.token_budget, "seed": arguments.seed, "shards": shards}
        mine = range(process.rank, shards, process.world)
        self.streams = {shard: PretrainingStream(tasks, shard=shard, **options) for shard in mine}

    def run(self) -> None:
        """All steps from the last checkpoint on."""
        arguments, losses = self.arguments, self.arguments.output / "losses.jsonl"
        self.resume()
        batches = {shard: iter(stream) for shard, stream in self.streams.items()}
        bar = tqdm(total=arguments.steps, initial=self.step, unit="step", disable=None if self.is_main else True)
        while self.step < arguments.steps:
            found = self.take_step([next(each) for each in batches.values()])
            self.step += 1
            bar.update()
            bar.set_postfix(loss=f"{found['loss']:.3f}")
            if self.is_main:
                with losses.open("a") as file:
                    print(json.dumps({"step": self.step, **found}), file=file)
            if self.step % arguments.save_every == 0 or self.step == arguments.steps:
                self.save()
        bar.close()

    @property
    def is_main(self) -> bool:
        return self.process.rank == 0

    @property
    def alone(self) -> bool:
        return self.process.world == 1

    def take_step(self, batches: list[dict]) -> dict[str, float]:
        """One step of the optimizer on the batches of all shards; returns the mean losses."""
        process, arguments = self.process, self.arguments
        count = process.sum(sum(int((batch["labels"] >= 0).sum()) for batch in batches))
        sums, counts = torch.zeros(4, device=process.device), torch.zeros(4, device=process.device)
        for (shard, stream), batch in zip(self.streams.items(), batches, strict=True):
            batch = {name: each.to(process.device) if torch.is_tensor(each) else each for name, each in batch.items()}
            # Dropouts and pseudo tokens depend on the step and the shard alone, so that no generator has to be saved.
            torch.manual_seed((arguments.seed * arguments.steps + self.step) * stream.shards + shard)
            with self.synchronising(shard == max(self.streams)), self.autocast():
                # Gradients are averaged over processes.
                output = self.model(**batch, num_items_in_batch=count / process.world)
                output.loss.backward()
            sums += output.loss_sums
            counts += output.label_counts
        norm = nn.utils.clip_grad_norm_(self.plain.parameters(), arguments.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        sums, counts = process.sum(sums), process.sum(counts)
        found = {
            "loss": (sums.sum() / counts.sum()).item(),
            "norm": whole(norm).item(),
            "lr": self.scheduler.get_last_lr()[0],
        }
        by_objective = zip(OBJECTIVES, (sums / counts).tolist(), strict=True)
        return found | {name: loss for name, loss in by_objective if loss == loss}

    @contextlib.contextmanager
    def synchronising(self, last: bool) -> Iterator[None]:
        """Leaves the exchange of gradients to the last backward of a step."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        skips = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if skips else contextlib.nullcontext():
            yield

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.process.device.type, torch.bfloat16, self.arguments.precision == "bfloat16")

    # ---- Checkpoints: OUTPUT/step-N; one that is not whole has another name

    def save(self) -> None:
        """Writes a checkpoint, and then deletes the one before it."""
        output = self.arguments.output
        partial, final = output / "partial", output / f"step-{self.step}"
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.process.barrier()
        model, optimizer = get_state_dict(self.plain, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=partial / "weights", no_dist=self.alone)
        for shard, stream in self.streams.items():
            (partial / f"stream-{shard}.json").write_text(json.dumps(stream.state_dict()), encoding="utf-8")
        self.process.barrier()
        if self.is_main:
            partial.rename(final)
            for other in set(checkpoints(output)) - {final}:
                shutil.rmtree(other)
        self.process.barrier()

    def resume(self) -> None:
        """Goes to the last checkpoint, if there is one, and drops the losses after it."""
        output = self.arguments.output
        output.mkdir(parents=True, exist_ok=True)
        found = checkpoints(output)
        if found:
            self.load(found[-1])
        losses = output / "losses.jsonl"
        if self.is_main and losses.exists():
            losses.write_text("".join(losses.read_text().splitlines(keepends=True)[: self.step]))

    def load(self, folder: Path) -> None:
        shards, now = len(list(folder.glob("stream-*.json"))), next(iter(self.streams.values())).shards
        if shards != now:
            raise SystemExit(f"{folder} is of a run with --shards {shards}, not {now}; pass --shards {shards}")
        model, optimizer = get_state_dict(self.plain, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "weights", no_dist=self.alone)
        set_state_dict(self.plain, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.step = int(folder.name.removeprefix("step-"))
        self.scheduler.last_epoch = self.step
        for shard, stream in self.streams.items():
            stream.load_state_dict(json.loads((folder / f"stream-{shard}.json").read_text(encoding="utf-8")))

    def export(self) -> None:
        """Writes OUTPUT/model: a plain checkpoint, and the language embeddings if there are any."""
        state = {name: whole(each) for name, each in self.plain.state_dict().items()}
        if self.is_main:
            with torch.device("meta"):
                model = ErnieMForPreTraining(self.plain.config)
            model.load_state_dict(state, assign=True)
            model.tie_weights()
            model.save_pretrained(self.arguments.output / "model")
            ErnieMTokenizer.from_pretrained(self.arguments.model).save_pretrained(self.arguments.output / "model")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a folder, the last one last."""
    return sorted(output.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def measure(arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """The lines of a table: for each language of --test the loss of MMLM, and the number of words that it is of."""
    model = ErnieMForPreTraining.from_pretrained(arguments.output / "model").to(device).eval()
    options = {"max_length": arguments.max_length, "masking": Masking(arguments.mask_rate)}
    objective = MMLM(tokenizer=ErnieMTokenizer.from_pretrained(arguments.model), **options)
    lines = ["language\tloss\twords"]
    for language, path in named_files(arguments.test):
        total = count = 0
        for batch in PretrainingStream([Task(objective, TextFiles(path))], arguments.token_budget, epochs=1):
            with torch.inference_mode():
                batch = {name: each.to(device) if torch.is_tensor(each) else each for name, each in batch.items()}
                output = model(**batch)
            total, count = total + output.loss_sums.sum().item(), count + int(output.label_counts.sum())
        if not count:
            raise SystemExit(f"--test {path} has no words that could be predicted")
        lines.append(f"{language}\t{total / count:.4f}\t{count}")
    return lines


def plot(losses: Path) -> None:
    """The curves of a run, beside its losses: each step's, and their running means."""
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in losses.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    window = max(1, len(rows) // 25)
    for name, colour in zip(("loss", *OBJECTIVES), COLOURS, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            steps, values = zip(*points, strict=True)
            means = [
                sum(each) / len(each) for each in (values[max(0, i - window) : i] for i in range(1, len(steps) + 1))
            ]
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
            axes.plot(steps, means, color=colour, linewidth=2, label="all" if name == "loss" else name.upper())
    axes.set(xlabel="step", ylabel="loss: mean of -log p of the masked words", title=f"Running means of {window} steps")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(losses.with_suffix(".png"), dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    check(arguments)
    with start_process() as process:
        training = Training(arguments, process)
        training.run()
        training.export()
        if training.is_main:
            plot(arguments.output / "losses.jsonl")
            if arguments.test:
                table = "\n".join(measure(arguments, process.device))
                print(table)
                (arguments.output / "languages.tsv").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
