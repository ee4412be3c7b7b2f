"""Fine-tunes ERNIE-M to classify sentence pairs, by the paper's recipe, and reports the accuracy in each language.

    python examples/finetune_classification.py --model ernie-m-base --train xnli.tsv --test test.tsv --output out
    torchrun --nproc-per-node 2 examples/finetune_classification.py ...
    accelerate launch --use_fsdp --fsdp_version 2 examples/finetune_classification.py ...

The files are tab-separated, and their first lines name the columns `language`, `premise`, `hypothesis` and `label`, as
in XNLI. With `--train-languages en` this is cross-lingual transfer; with all languages of --train, the default, it is
translate-train-all. A run that was killed goes on from its last checkpoint when it is started again. Afterwards
OUTPUT/accuracy.tsv and OUTPUT/accuracy.png show the accuracy by language, and OUTPUT/model holds the checkpoint.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from erniem_fast import ErnieMForSequenceClassification, ErnieMTokenizer, create_optimizer
from shared import check_length, rows_per_device

COLUMNS = ("language", "premise", "hypothesis", "label")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the checkpoint to start from, with its tokenizer")
    add("--train", type=Path, required=True, metavar="TSV")
    add("--test", type=Path, required=True, metavar="TSV")
    add("--output", type=Path, required=True, help="folder for checkpoints and results")
    add("--train-languages", nargs="+", metavar="LANGUAGE", help="train on these alone (default: on all)")
    recipe = parser.add_argument_group("recipe", "the defaults are the paper's for XNLI")
    add = recipe.add_argument
    add("--epochs", type=float, default=5, help="the paper has 5 for transfer, and 2 (large: 1) for all languages")
    add("--batch-size", type=int, default=32, help="of all processes together (translate-train-all: 128)")
    add("--lr", type=float, default=5e-5)
    add("--layer-decay", type=float, default=0.8, help="factor of the rate from a layer to the one before it")
    add("--weight-decay", type=float, default=0.0)
    add("--warmup", type=float, default=0.1, help="share of the steps in which the rate rises")
    add("--max-length", type=int, default=256)
    add("--seed", type=int, default=0)
    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--accumulate", type=int, default=1, help="batches of a step on each process")
    add("--bf16", action="store_true", help="products in bfloat16, by autocast")
    add("--gradient-checkpointing", action="store_true", help="compute activations twice to save memory")
    add("--save-every", type=int, default=500, metavar="STEPS")
    add("--cpu", action="store_true", help="do not use a GPU")
    return parser.parse_args(argv)


class Pairs(Dataset):
    """Rows of a file, as tokens."""

    def __init__(self, rows: Sequence[dict[str, str]], labels: Sequence[str], tokenizer, max_length: int) -> None:
        """
        Args:
            rows: the file's, by column.
            labels: the names of the classes, in their order.
        """
        self.rows, self.labels, self.tokenizer, self.max_length = rows, list(labels), tokenizer, max_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        encoded = self.tokenizer(row["premise"], row["hypothesis"], truncation=True, max_length=self.max_length)
        return {**encoded, "labels": self.labels.index(row["label"])}


def read(path: Path, languages: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The rows of a file, of all languages or of some."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        header, *lines = [line.rstrip("\r\n").split("\t") for line in file] or [[]]
    missing = set(COLUMNS) - set(header)
    if missing:
        raise SystemExit(f"{path} lacks the columns {', '.join(sorted(missing))}")
    rows = []
    for number, fields in enumerate(lines, start=2):
        if fields == [""]:
            continue
        if len(fields) != len(header):
            raise SystemExit(f"{path} has {len(fields)} columns in line {number}, and its header names {len(header)}")
        rows.append(dict(zip(header, fields, strict=True)))
        if not rows[-1]["label"]:
            raise SystemExit(f"{path} has no label in line {number}")
    absent = set(languages or ()) - {row["language"] for row in rows}
    if absent or not rows:
        raise SystemExit(f"{path} has no rows" + (f" in {', '.join(sorted(absent))}" if absent else ""))
    return [row for row in rows if languages is None or row["language"] in languages]


class LayerwiseTrainer(Trainer):
    """Trainer with the paper's rates."""

    layer_decay = 1.0

    def create_optimizer(self, *_) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rates = {"layer_decay": self.layer_decay, "weight_decay": self.args.weight_decay}
            self.optimizer = create_optimizer(self.model, self.args.learning_rate, **rates)
        return self.optimizer


def training_arguments(arguments: argparse.Namespace) -> TrainingArguments:
    folder, common = str(arguments.output), {"use_cpu": arguments.cpu, "report_to": []}
    return TrainingArguments(
        folder,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=rows_per_device(arguments.batch_size, folder, arguments.accumulate, **common),
        gradient_accumulation_steps=arguments.accumulate,
        learning_rate=arguments.lr,
        weight_decay=arguments.weight_decay,
        warmup_steps=arguments.warmup,
        max_grad_norm=1.0,
        bf16=arguments.bf16,
        ddp_find_unused_parameters=False,
        save_steps=arguments.save_every,
        save_total_limit=1,
        logging_steps=50,
        seed=arguments.seed,
        **common,
    )


def make_trainer(
    arguments: argparse.Namespace, tokenizer: ErnieMTokenizer, train: list[dict[str, str]], labels: list[str]
) -> LayerwiseTrainer:
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    model = ErnieMForSequenceClassification.from_pretrained(arguments.model, num_labels=len(labels), **names)
    check_length(arguments, model)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trainer = LayerwiseTrainer(
        model,
        training_arguments(arguments),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=Pairs(train, labels, tokenizer, arguments.max_length),
        processing_class=tokenizer,
    )
    trainer.layer_decay = arguments.layer_decay
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        raise SystemExit("accelerate shards on several GPUs only, and would train replicas here; leave out --use_fsdp")
    return trainer


def save(trainer: Trainer, tokenizer: ErnieMTokenizer, folder: Path) -> None:
    """Writes the checkpoint, gathered if it is sharded (`Trainer.save_model` may then write nothing)."""
    state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


def accuracies(trainer: Trainer, rows: list[dict[str, str]], labels: list[str], max_length: int) -> dict[str, float]:
    """The share of right answers by language, and their mean."""
    found = {}
    for language in dict.fromkeys(row["language"] for row in rows):
        own = [row for row in rows if row["language"] == language]
        predicted = trainer.predict(Pairs(own, labels, trainer.processing_class, max_length))
        found[language] = float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())
    return {**found, "mean": sum(found.values()) / len(found)}


def report(found: dict[str, float], chance: float, output: Path) -> None:
    """Prints the table, and writes it and its picture."""
    import matplotlib.pyplot as plt

    lines = ["language\taccuracy", *(f"{language}\t{accuracy:.4f}" for language, accuracy in found.items())]
    print("\n".join(lines))
    (output / "accuracy.tsv").write_text("\n".join([*lines, ""]), encoding="utf-8")
    figure, axes = plt.subplots(figsize=(max(4, 0.5 * len(found)), 3.5), layout="constrained")
    bars = axes.bar(list(found), list(found.values()), color=["tab:blue"] * (len(found) - 1) + ["tab:orange"])
    axes.bar_label(bars, fmt=lambda value: f"{100 * value:.0f}", fontsize=8)
    axes.axhline(chance, color="gray", linewidth=1, linestyle="--")
    axes.set(ylabel="accuracy", ylim=(0, 1))
    figure.savefig(output / "accuracy.png", dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    tokenizer = ErnieMTokenizer.from_pretrained(arguments.model)
    train, test = read(arguments.train, arguments.train_languages), read(arguments.test)
    labels = sorted({row["label"] for row in train})
    if len(labels) < 2:
        raise SystemExit(f"{arguments.train} has the label {labels[0]} alone; there is nothing to tell apart")
    unknown = {row["label"] for row in test} - set(labels)
    if unknown:
        raise SystemExit(f"{arguments.test} has the labels {', '.join(sorted(unknown))}, which {arguments.train} lacks")
    set_seed(arguments.seed)
    trainer = make_trainer(arguments, tokenizer, train, labels)
    trainer.train(resume_from_checkpoint=arguments.output.exists() and get_last_checkpoint(arguments.output))
    save(trainer, tokenizer, arguments.output / "model")
    found = accuracies(trainer, test, labels, arguments.max_length)
    if trainer.is_world_process_zero():
        report(found, 1 / len(labels), arguments.output)


if __name__ == "__main__":
    main()
