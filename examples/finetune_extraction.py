"""Fine-tunes a model to extract by schema, and measures it on texts that it was not trained on.

    python examples/finetune_extraction.py --model DIR --train train.jsonl --test test.jsonl --output OUT

trains a checkpoint on PaddleNLP's jsonl. Without arguments a small model learns from random weights, on texts made from
templates, and is tested on other templates. Needs `pip install accelerate`.
"""

import argparse
import pathlib
import sys
import tempfile

import torch
from transformers import Trainer, set_seed

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from erniem_fast import ErnieMConfig, ErnieMForInformationExtraction, ErnieMTokenizer, create_optimizer, extract
from erniem_fast.extraction import (
    Example,
    ExtractionCollator,
    make_examples,
    make_features,
    read_examples,
    result_metrics,
    span_metrics,
)
from extraction_templates import HELD_OUT, SCHEMA, TEMPLATES, make_texts, to_result
from shared import check_length, text_training_arguments

TINY = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "tiny"


# A checkpoint learns from few texts, but a small model with random weights has to see more.
CHECKPOINT = {"epochs": 2.0, "batch_size": 8}
RANDOM = {"epochs": 4.0, "batch_size": 16}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; by default a small model with random weights")
    parser.add_argument("--tokenizer", default=None, help="by default the model's")
    parser.add_argument("--train", help="examples to train on, jsonl; by default made from templates")
    parser.add_argument("--test", help="examples to test on, jsonl; by default made from other templates")
    parser.add_argument("--output", help="where the model is saved; by default nowhere")
    parser.add_argument("--texts", type=int, default=400, help="the texts that are made from templates")
    parser.add_argument("--epochs", type=float, help="by default 2 for a checkpoint, 4 for random weights")
    parser.add_argument(
        "--learning-rate", type=float, help="by default 1e-5 for a UIE-M, 1e-4 for another checkpoint, 1e-3 for none"
    )
    parser.add_argument(
        "--head-learning-rate", type=float, help="by default the same; 1e-2 for a checkpoint's new heads"
    )
    parser.add_argument(
        "--batch-size", type=int, help="of all GPUs together; by default 8 for a checkpoint, 16 for random weights"
    )
    parser.add_argument("--freeze-embeddings", action="store_true", help="keep the table of words as it is: faster")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    for name, value in (CHECKPOINT if arguments.model else RANDOM).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def load(arguments: argparse.Namespace) -> tuple[ErnieMForInformationExtraction, ErnieMTokenizer, tuple[float, float]]:
    """The model, its tokenizer, and the learning rates of its encoder and of its heads."""
    rate, heads = arguments.learning_rate, arguments.head_learning_rate
    tokenizer = ErnieMTokenizer.from_pretrained(arguments.tokenizer or arguments.model or TINY)
    if arguments.model:
        model, found = ErnieMForInformationExtraction.from_pretrained(arguments.model, output_loading_info=True)
        if found["missing_keys"]:
            # New heads are small, and at the encoder's rate take thousands of steps to grow.
            return model, tokenizer, (rate or 1e-4, heads or 1e-2)
        return model, tokenizer, (rate or 1e-5, heads or rate or 1e-5)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    # Larger weights than those of a large model, or a small one learns nothing for long.
    config = ErnieMConfig(vocab_size=len(tokenizer), initializer_range=0.1, **sizes, **rates)
    return ErnieMForInformationExtraction(config), tokenizer, (rate or 1e-3, heads or rate or 1e-3)


def read(path: str) -> list[Example]:
    examples = read_examples(path)
    if not examples:
        raise SystemExit(f"{path} has no examples")
    return examples


def make_optimizer(model, rate: float, of_heads: float) -> torch.optim.AdamW:
    optimizer = create_optimizer(model, rate)
    for group in optimizer.param_groups:
        if group["name"] == "head":
            group["lr"] = of_heads
    return optimizer


def train(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Trains a model; returns precision, recall and F1 of `examples` and, with texts from templates, of `results`."""
    set_seed(arguments.seed)
    model, tokenizer, rates = load(arguments)
    check_length(arguments, model)
    model.ernie_m.embeddings.word_embeddings.requires_grad_(not arguments.freeze_embeddings)
    optimizer = make_optimizer(model, *rates)
    held_out = make_texts(HELD_OUT, 60, seed=arguments.seed + 1)
    examples = [
        read(path) if path else make_examples(texts, lang="en", seed=arguments.seed)
        for path, texts in (
            (arguments.train, make_texts(TEMPLATES, arguments.texts, seed=arguments.seed)),
            (arguments.test, held_out),
        )
    ]
    features = [make_features(tokenizer, each, arguments.max_length) for each in examples]
    scores = {"examples": fit(model, tokenizer, features, optimizer, arguments)}
    if not arguments.test:
        found = extract(model, tokenizer, [text.text for text in held_out], SCHEMA, lang="en")
        scores["results"] = result_metrics(found, [to_result(text) for text in held_out])
    if arguments.output:
        model.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)
    return scores


def fit(model, tokenizer, features: list, optimizer, arguments: argparse.Namespace) -> dict[str, float]:
    """Trains on the first features; returns the scores on the second ones."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            text_training_arguments(
                arguments,
                arguments.output or scratch,
                per_device_eval_batch_size=64,
                label_names=["start_positions", "end_positions"],
            ),
            data_collator=ExtractionCollator(tokenizer),
            train_dataset=features[0],
            eval_dataset=features[1],
            compute_metrics=span_metrics,
            optimizers=(optimizer, None),
        )
        trainer.train()
        scores = trainer.evaluate()
    return {name: scores[f"eval_{name}"] for name in ("precision", "recall", "f1")}


def main() -> None:
    names = {"examples": "examples:", "results": "results by schema:"}
    for kind, scores in train(parse()).items():
        print(names[kind], *(f"{name} {value:.3f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
