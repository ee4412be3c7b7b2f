"""Whether ERNIE-M's objectives do what its paper says: small models from scratch, and the translations that they find.

Four recipes are trained on bench/data/parallel.tsv with equal numbers of tokens, several seeds each: MMLM alone; TLM
beside it; CAMLM beside both; and that for two thirds of the tokens, then BTMLM as well. Of every tenth English sentence
all translations are held out. On these are measured how often the mean of the last hidden states finds a sentence's
translation among all of its language (in both directions), and the masked-LM loss on the single sentences.

So few sentences need other numbers than the paper's: 30 % of the tokens are masked, and nothing is dropped out. The
tokenizer is trained on the same sentences. Models so small gain little from a second thread: each has one, and as
many are trained at once as there are cores. Whole runs are kept, and when started again, the command trains the rest.
At its defaults it trains 12 models on two million tokens each.
"""

import argparse
import functools
import multiprocessing
import pathlib
import signal
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from bench import INTERRUPTED
from bench.machine import available_cores
from bench.model.figures import PretrainingFigures, PretrainingPoint, PretrainingRun
from bench.model.options import add_common_options, positive
from bench.model.retrieval import embed, retrieve
from bench.model.text import Translation, read_translations
from bench.parser import make_parser
from bench.record import begin, keep, read, stem_of, write
from bench.report.pretraining import markdown, plot
from erniem_fast import ErnieMConfig, ErnieMTokenizer, create_optimizer
from erniem_fast.pretraining import (
    BTMLM,
    CAMLM,
    MMLM,
    TLM,
    ErnieMForPreTraining,
    Masking,
    Pair,
    PretrainingStream,
    Sentence,
    Task,
    pack,
)

# For each recipe its phases: the share of the tokens, and the objectives.
RECIPES = {
    "MMLM": [(1.0, (MMLM,))],
    "+ TLM": [(1.0, (MMLM, TLM))],
    "+ CAMLM": [(1.0, (MMLM, TLM, CAMLM))],
    "+ CAMLM, then BTMLM": [(2 / 3, (MMLM, TLM, CAMLM)), (1 / 3, (MMLM, TLM, CAMLM, BTMLM))],
}
HELD_OUT = 10  # one of so many English sentences
MAX_LENGTH = 128
POINTS = 8  # of a curve, after the first one
WORDS = 6000
MASKED = 0.3  # twice as much as BERT: a model sees each sentence some ten times only


def main(argv: list[str] | None = None) -> int:
    """Train and compare; returns the exit code: 0, or 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        run_and_save(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("pretraining", __doc__)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--tokens", type=positive, default=2_000_000, metavar="N", help="of each run")
    recipe.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each recipe (default: 3)")
    recipe.add_argument("--hidden", type=positive, default=128, metavar="N", help="features of a token (default: 128)")
    recipe.add_argument("--layers", type=positive, default=3, metavar="N", help="default: 3")
    recipe.add_argument("--token-budget", type=positive, default=512, metavar="N", help="of a step (default: 512)")
    recipe.add_argument("--lr", type=float, default=1e-3, help="the largest rate (default: 0.001)")
    add_common_options(parser.add_argument_group("run"))
    parser.set_defaults(dtype="float32", device="cpu", model=None)
    arguments = parser.parse_args(argv)
    arguments.size = f"{arguments.layers}x{arguments.hidden}-{arguments.tokens}"
    return arguments


def run_and_save(arguments: argparse.Namespace) -> None:
    """Train what is not in the file of results yet, and write the report."""
    run = PretrainingRun(**vars(begin("pretraining", arguments)), tokens=arguments.tokens, chance=0.0, runs=[])
    stem = stem_of(run, arguments.output)
    if stem.with_suffix(".json").exists():
        run.runs = read(PretrainingRun, stem.with_suffix(".json")).runs
    trained, held_out = split(read_translations())
    run.chance = chance(held_out)
    done = {(each.recipe, each.seed) for each in run.runs}
    # Seeds in turn, so that every recipe has as many when the command is interrupted.
    todo = [(name, seed) for seed in range(arguments.seeds) for name in RECIPES if (name, seed) not in done]
    pool = multiprocessing.get_context("spawn").Pool(arguments.threads or available_cores(), begin_process)
    with tempfile.TemporaryDirectory() as folder, pool:
        tokenizer = train_tokenizer(trained, pathlib.Path(folder))
        run_one = functools.partial(train, arguments, tokenizer, trained, held_out)
        for figures in tqdm(pool.imap_unordered(run_one, todo), total=len(todo), unit="run", disable=None):
            run.runs.append(figures)
            run.runs.sort(key=lambda each: (list(RECIPES).index(each.recipe), each.seed))
            keep(run, markdown(run), stem)
    write(run, markdown(run), stem)
    plot(run, stem.with_suffix(".png"))


def begin_process() -> None:
    """Make a process compute by one thread, and leave Ctrl-C to the process that started it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def split(rows: list[Translation]) -> tuple[list[Translation], list[Translation]]:
    """The rows to train on, and those held out: all translations of an English sentence are on one side."""
    held_out = [row for row in rows if zlib.crc32(row.english.encode()) % HELD_OUT == 0]
    return [row for row in rows if zlib.crc32(row.english.encode()) % HELD_OUT], held_out


def chance(rows: list[Translation]) -> float:
    """The accuracy of guesses, in the mean over languages."""
    sizes = {row.language: len({other.translation for other in rows if other.language == row.language}) for row in rows}
    return float(np.mean([1 / size for size in sizes.values()]))


def train_tokenizer(rows: list[Translation], folder: pathlib.Path) -> ErnieMTokenizer:
    """A tokenizer of `WORDS` pieces, trained on both sides of the rows."""
    texts = dict.fromkeys(text for row in rows for text in (row.english, row.translation))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=WORDS,
        model_type="bpe",
        character_coverage=0.9995,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    pieces = [model.id_to_piece(index) for index in range(3, len(model))]  # after <unk>, <s> and </s>
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", *pieces, "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*words, ""]), encoding="utf-8")
    return ErnieMTokenizer(str(folder / "sentencepiece.bpe.model"), str(folder / "vocab.txt"))


def train(
    arguments: argparse.Namespace,
    tokenizer: ErnieMTokenizer,
    rows: list[Translation],
    held_out: list[Translation],
    recipe_and_seed: tuple[str, int],
) -> PretrainingFigures:
    """One run of a recipe. Its curve begins before the first step: equal tokens alone find some translations."""
    name, seed = recipe_and_seed
    languages = ["en", *dict.fromkeys(row.language for row in rows)]
    torch.manual_seed(seed)
    model = make_model(arguments, len(tokenizer), languages).train()
    optimizer = create_optimizer(model, arguments.lr, weight_decay=0.01)
    steps = arguments.tokens // arguments.token_budget
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps + steps // 10)
    figures = PretrainingFigures(name, seed, 0.0, [], {})
    start, seen = time.perf_counter(), 0
    measure(model, tokenizer, held_out, seen, figures)
    for batch in batches(name, seed, arguments, tokenizer, languages, rows):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += batch["input_ids"].shape[1]
        if seen >= arguments.tokens * len(figures.curve) / POINTS:
            measure(model, tokenizer, held_out, seen, figures)
    figures.seconds = time.perf_counter() - start
    return figures


def measure(
    model: ErnieMForPreTraining,
    tokenizer: ErnieMTokenizer,
    rows: list[Translation],
    tokens: int,
    figures: PretrainingFigures,
) -> None:
    """Add a point to the curve."""
    figures.languages = retrieval(model, tokenizer, rows)
    accuracy = float(np.mean(list(figures.languages.values())))
    figures.curve.append(PretrainingPoint(tokens, loss(model, tokenizer, rows), accuracy))


def make_model(arguments: argparse.Namespace, words: int, languages: Sequence[str]) -> ErnieMForPreTraining:
    config = ErnieMConfig(
        vocab_size=words,
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        intermediate_size=4 * arguments.hidden,
        max_position_embeddings=MAX_LENGTH + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ErnieMForPreTraining(config, languages)


def batches(
    name: str,
    seed: int,
    arguments: argparse.Namespace,
    tokenizer: ErnieMTokenizer,
    languages: Sequence[str],
    rows: list[Translation],
) -> Iterator[dict]:
    """The batches of a recipe's phases, each until it has had its tokens. All objectives are drawn equally often."""
    pairs = [Pair(row.english, row.translation, "en", row.language) for row in rows]
    sentences = [Sentence(text, language) for pair in pairs for text, language in zip(pair[:2], pair[2:], strict=True)]
    options = {"tokenizer": tokenizer, "max_length": MAX_LENGTH, "masking": Masking(MASKED)}
    camlm = {"languages": languages, "masking": Masking(MASKED, mask=1.0, random=0.0)}
    sources = {MMLM: (sentences, {}), TLM: (pairs, {})}
    sources |= {CAMLM: (pairs, camlm), BTMLM: (sentences, {"languages": languages})}
    seen, end = 0, 0.0
    for phase, (share, kinds) in enumerate(RECIPES[name]):
        tasks = [Task(kind(**(options | sources[kind][1])), sources[kind][0]) for kind in kinds]
        end += share * arguments.tokens
        for batch in PretrainingStream(tasks, arguments.token_budget, seed=100 * seed + phase):
            if seen >= end:
                break
            seen += batch["input_ids"].shape[1]
            yield batch


@torch.no_grad()
def loss(model: ErnieMForPreTraining, tokenizer: ErnieMTokenizer, rows: list[Translation]) -> float:
    """The masked-LM loss on single sentences, the same masks every time."""
    objective, random = MMLM(tokenizer=tokenizer, max_length=MAX_LENGTH), Random(0)
    samples = [each for row in rows for each in objective.samples(Sentence(row.translation), random)]
    model.eval()
    found = [model(**pack(samples[start : start + 64])) for start in range(0, len(samples), 64)]
    model.train()
    return float(sum(each.loss_sums.sum() for each in found) / sum(each.label_counts.sum() for each in found))


@torch.no_grad()
def retrieval(model: ErnieMForPreTraining, tokenizer: ErnieMTokenizer, rows: list[Translation]) -> dict[str, float]:
    """By language the accuracy at 1 between English and it, the mean of both directions."""
    texts = sorted({text for row in rows for text in (row.english, row.translation)}, key=len)
    vectors = {}
    model.eval()
    for start in range(0, len(texts), 64):
        some = texts[start : start + 64]
        batch = tokenizer(some, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        hidden, mask = model.ernie_m(**batch).last_hidden_state, batch["attention_mask"].bool()
        vectors |= dict(zip(some, embed(hidden[mask].numpy(), mask.sum(1).numpy()), strict=True))
    model.train()
    by_language = {row.language: [] for row in rows}
    for row in rows:
        by_language[row.language].append((row.english, row.translation))
    return {language: retrieve(pairs, vectors).mean for language, pairs in by_language.items()}
