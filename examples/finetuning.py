"""What the scripts that fine-tune on texts and contexts share."""

import argparse

import torch
from transformers import TrainingArguments


def check_length(arguments: argparse.Namespace, model) -> None:
    longest = model.base_model.longest_sequence
    if arguments.max_length > longest:
        raise SystemExit(f"--max-length {arguments.max_length} is more than the {longest} positions of the model")


def training_arguments(arguments: argparse.Namespace, folder: str, **options) -> TrainingArguments:
    """Arguments with `--batch-size` rows a step, of all GPUs and processes together."""
    common = {"report_to": "none", "use_cpu": not torch.cuda.is_available()}
    one = TrainingArguments(folder, per_device_train_batch_size=1, **common)
    world = int(one.world_size) * one.train_batch_size  # a process that sees several GPUs takes a batch for each
    if arguments.batch_size < 1 or arguments.batch_size % world:
        raise SystemExit(f"--batch-size {arguments.batch_size} is no multiple of the {world} devices, which share it")
    return TrainingArguments(
        folder,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size // world,
        warmup_steps=0.1,
        save_strategy="no",
        logging_steps=50,
        seed=arguments.seed,
        **common,
        **options,
    )
