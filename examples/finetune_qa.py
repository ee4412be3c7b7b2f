"""Fine-tunes a model to answer questions from contexts, and measures exact match and F1 as SQuAD and MLQA do.

    python examples/finetune_qa.py --model DIR --train train.json --test test.json --lang en --output OUT

reads SQuAD's JSON. Without arguments a small model learns from random weights, on contexts made from templates, and is
tested on other templates. Needs `pip install accelerate`.
"""

import argparse
import functools
import json
import pathlib
import sys
import tempfile

from transformers import Trainer, set_seed

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from erniem_fast import ErnieMConfig, ErnieMForQuestionAnswering, ErnieMTokenizer, extract_answer
from erniem_fast.extraction import answer_metrics
from erniem_fast.extraction.answers import answer_features, collate_answers
from extraction_templates import HELD_OUT, TEMPLATES, make_texts
from shared import check_length, text_training_arguments

TINY = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "tiny"
QUESTIONS = {"person": "Who?", "company": "Which company?", "city": "In which city?", "date": "When?"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; by default a small model with random weights")
    parser.add_argument("--train", help="SQuAD's JSON; by default made from templates")
    parser.add_argument("--test", help="SQuAD's JSON; by default made from other templates")
    parser.add_argument("--lang", default="en", help="of the answers, for the metric")
    parser.add_argument("--output", help="where the model is saved; by default nowhere")
    parser.add_argument("--texts", type=int, default=400, help="the contexts that are made from templates")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--learning-rate", type=float, help="1e-3 from random weights, 3e-5 from a checkpoint")
    parser.add_argument("--batch-size", type=int, default=16, help="of all GPUs together")
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_squad(path: str) -> list[tuple[str, str, list[tuple[int, int]]]]:
    """Questions, contexts, and the places of the answers.

    Raises:
        ValueError: an answer is not where it says.
        SystemExit: there are no questions, or the file has another form, as data without answers has.
    """
    try:
        found = _read_squad(json.loads(pathlib.Path(path).read_text(encoding="utf-8")), path)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise SystemExit(
            f"{path} is not SQuAD's JSON with answers ({error!r}): 'data' holds 'paragraphs', each with 'context' and "
            f"'qas', each with 'question' and 'answers', an empty list for none"
        ) from error
    if not found:
        raise SystemExit(f"{path} has no questions")
    return found


def _read_squad(file: dict, path: str) -> list[tuple[str, str, list[tuple[int, int]]]]:
    return [
        (
            question["question"],
            paragraph["context"],
            [place_of(answer, paragraph["context"], path) for answer in question["answers"]],
        )
        for article in file["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def place_of(answer: dict, context: str, path: str) -> tuple[int, int]:
    """Where an answer begins and ends, in characters."""
    text, start = answer["text"], answer["answer_start"]
    found = context[max(start, 0) : start + len(text)]
    if not text or found != text:
        raise ValueError(
            f"{path}: the answer {text[:40]!r} is not at answer_start={start} of {context[:40]!r}, but "
            f"{found[:40]!r}; count characters, not bytes or UTF-16, or correct the answer."
        )
    return start, start + len(text)


def make_questions(templates: list[str], count: int, seed: int) -> list[tuple[str, str, list[tuple[int, int]]]]:
    """For each context a question about each entity, and one that it does not answer where there is one."""
    return [
        (question, text.text, [(start, end) for start, end, name in text.entities if name == label])
        for text in make_texts(templates, count, seed)
        for label, question in QUESTIONS.items()
    ]


def load(arguments: argparse.Namespace) -> tuple[ErnieMForQuestionAnswering, ErnieMTokenizer]:
    tokenizer = ErnieMTokenizer.from_pretrained(arguments.model or TINY)
    if arguments.model:
        return ErnieMForQuestionAnswering.from_pretrained(arguments.model), tokenizer
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    # Larger weights than those of a large model, or a small one learns nothing for long.
    config = ErnieMConfig(vocab_size=len(tokenizer), initializer_range=0.1, **sizes, **rates)
    return ErnieMForQuestionAnswering(config), tokenizer


def main() -> None:
    arguments = parse()
    set_seed(arguments.seed)
    model, tokenizer = load(arguments)
    check_length(arguments, model)
    train = (
        read_squad(arguments.train) if arguments.train else make_questions(TEMPLATES, arguments.texts, arguments.seed)
    )
    test = read_squad(arguments.test) if arguments.test else make_questions(HELD_OUT, 60, arguments.seed + 1)
    questions, contexts, answers = zip(*train, strict=True)
    firsts = [mine[0] if mine else None for mine in answers]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            text_training_arguments(
                arguments,
                arguments.output or scratch,
                learning_rate=arguments.learning_rate or (3e-5 if arguments.model else 1e-3),
            ),
            data_collator=functools.partial(collate_answers, pad_token_id=tokenizer.pad_token_id),
            train_dataset=answer_features(tokenizer, questions, contexts, firsts, arguments.max_length),
        )
        trainer.train()
    questions, contexts, answers = (list(each) for each in zip(*test, strict=True))
    found = extract_answer(model, tokenizer, questions, contexts, no_answer=True, max_length=arguments.max_length)
    wanted = [[text[start:end] for start, end in mine] for text, mine in zip(contexts, answers, strict=True)]
    scores = answer_metrics([each[0]["text"] for each in found], wanted, arguments.lang)
    print(*(f"{name} {value:.1f}" for name, value in scores.items()))
    if arguments.output:
        model.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
