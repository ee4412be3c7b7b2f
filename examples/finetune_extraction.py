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
from transformers import Trainer, TrainingArguments, set_seed

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from extraction_templates import HELD_OUT, SCHEMA, TEMPLATES, make_texts, to_result

from erniem_fast import ErnieMConfig, ErnieMForInformationExtraction, ErnieMTokenizer, extract
from erniem_fast.extraction import (
    ExtractionCollator,
    make_examples,
    make_features,
    read_examples,
    result_metrics,
    span_metrics,
)

TINY = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "tiny"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; by default a small model with random weights")
    parser.add_argument("--tokenizer", default=None, help="by default the model's")
    parser.add_argument("--train", help="examples to train on, jsonl; by default made from templates")
    parser.add_argument("--test", help="examples to test on, jsonl; by default made from other templates")
    parser.add_argument("--output", help="where the model is saved; by default nowhere")
    parser.add_argument("--texts", type=int, default=400, help="the texts that are made from templates")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--learning-rate", type=float, help="1e-3 from random weights, 1e-5 from a checkpoint")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> tuple[ErnieMForInformationExtraction, ErnieMTokenizer]:
    tokenizer = ErnieMTokenizer.from_pretrained(arguments.tokenizer or arguments.model or TINY)
    if arguments.model:
        return ErnieMForInformationExtraction.from_pretrained(arguments.model), tokenizer
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    # Larger weights than those of a large model, or a small one learns nothing for long.
    config = ErnieMConfig(vocab_size=len(tokenizer), initializer_range=0.1, **sizes, **rates)
    return ErnieMForInformationExtraction(config), tokenizer


def main() -> None:
    arguments = parse()
    set_seed(arguments.seed)
    model, tokenizer = load(arguments)
    held_out = make_texts(HELD_OUT, 60, seed=arguments.seed + 1)
    train, test = (
        read_examples(path) if path else make_examples(texts, lang="en", seed=arguments.seed)
        for path, texts in (
            (arguments.train, make_texts(TEMPLATES, arguments.texts, seed=arguments.seed)),
            (arguments.test, held_out),
        )
    )
    features = [make_features(tokenizer, examples, arguments.max_length) for examples in (train, test)]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                arguments.output or scratch,
                num_train_epochs=arguments.epochs,
                learning_rate=arguments.learning_rate or (1e-5 if arguments.model else 1e-3),
                per_device_train_batch_size=arguments.batch_size,
                per_device_eval_batch_size=64,
                warmup_steps=0.1,
                save_strategy="no",
                logging_steps=50,
                report_to="none",
                label_names=["start_positions", "end_positions"],
                use_cpu=not torch.cuda.is_available(),
                seed=arguments.seed,
            ),
            data_collator=ExtractionCollator(tokenizer),
            train_dataset=features[0],
            eval_dataset=features[1],
            compute_metrics=span_metrics,
        )
        trainer.train()
        scores = trainer.evaluate()
    print("examples:", *(f"{name} {scores['eval_' + name]:.3f}" for name in ("precision", "recall", "f1")))
    if not arguments.test:
        found = extract(model, tokenizer, [text.text for text in held_out], SCHEMA, lang="en")
        scores = result_metrics(found, [to_result(text) for text in held_out])
        print("results by schema:", *(f"{name} {value:.3f}" for name, value in scores.items()))
    if arguments.output:
        model.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
