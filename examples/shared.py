"""What the scripts share."""

import argparse

import torch
from transformers import TrainingArguments


def check_length(arguments: argparse.Namespace, model) -> None:
    longest = model.base_model.longest_sequence
    if arguments.max_length > longest:
        raise SystemExit(f"--max-length {arguments.max_length} is more than the {longest} positions of the model")


def rows_per_device(batch_size: int, folder: str, accumulate: int = 1, **common) -> int:
    """The rows of a device's batch, if all devices of all processes together take `batch_size` rows a step."""
    one = TrainingArguments(folder, per_device_train_batch_size=1, **common)
    devices = int(one.world_size) * one.train_batch_size  # a process that sees several GPUs takes a batch for each
    if accumulate < 1 or batch_size < 1 or batch_size % (devices * accumulate):
        steps = f" x --accumulate {accumulate}" if accumulate != 1 else ""
        raise SystemExit(f"--batch-size {batch_size} is no multiple of {devices} devices{steps}")
    return batch_size // (devices * accumulate)


def text_training_arguments(arguments: argparse.Namespace, folder: str, **options) -> TrainingArguments:
    """Those of the scripts that fine-tune on texts and contexts."""
    common = {"report_to": "none", "use_cpu": not torch.cuda.is_available()}
    return TrainingArguments(
        folder,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=rows_per_device(arguments.batch_size, folder, **common),
        warmup_steps=0.1,
        save_strategy="no",
        logging_steps=50,
        seed=arguments.seed,
        **common,
        **options,
    )
