"""Extraction by schema with a UIE-M: rows as they are beside rows padded to 512 tokens, and long texts.

UIE-M's weights were trained on rows padded to 512 tokens, which attend to the padding. ERNIE-M computes one token of
that padding. Both ways run one model through one Extractor; they take turns in one process, and are timed only if they
find the same. Each long text is extracted from in a process of its own, whose memory is measured. It takes four minutes
on two cores.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from bench import INTERRUPTED, ROOT
from bench.model.figures import Contender, ExtractionRun, LongText
from bench.model.options import add_common_options, add_weights_options, checkpoint, positive
from bench.model.text import SENTENCE_WORDS, TOKENIZER, read_translations
from bench.parser import make_parser
from bench.peers.memory import peak, reset_peak
from bench.record import begin, stem_of, write
from bench.report.extraction import markdown, plot
from bench.timing import quartiles, take_turns, time_call
from erniem_fast import ErnieMForInformationExtraction, ErnieMTokenizer, Extractor, flags

LENGTH = 512
BATCH_SIZE = 16  # of padded rows, PaddleNLP's default
SCHEMAS = {
    "zh": ["用户", [{"对象": ["名称"]}, "文件"], "语气[请求,说明]"],
    "en": ["user", [{"object": ["name"]}, "file"], "mood[request,statement]"],
}
# With random heads, one token in so many starts a span, and one ends one.
SPARSITY = 20
# Of probabilities. In float32, sums over 512 keys round logits of the padded rows by 1e-5 in two layers.
LARGEST = 1e-4


def main(argv: list[str] | None = None) -> int:
    """Measures; returns the exit code: 0, or 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        run = measure(arguments)
    except ValueError as error:
        sys.exit(f"python -m bench extraction: {error}")
    except KeyboardInterrupt:
        return INTERRUPTED
    stem = stem_of(run, arguments.output)
    write(run, markdown(run), stem)
    plot(run, stem.with_suffix(".png"))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("extraction", __doc__)
    add_weights_options(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--texts", type=positive, default=8, metavar="N", help="of each schema (default: 8)")
    group.add_argument("--rounds", type=positive, default=5, metavar="N", help="timed rounds (default: 5)")
    sizes = [10_000, 30_000, 100_000]
    group.add_argument("--characters", type=positive, nargs="+", default=sizes, metavar="N", help="of long texts")
    add_common_options(group)
    parser.set_defaults(dtype="float32", device="cpu")
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace) -> ExtractionRun:
    """Both ways on the same texts, then the long texts.

    Raises:
        ValueError: the ways find different spans, or none.
    """
    head = vars(begin("extraction", arguments))
    torch.set_num_threads(head["settings"].threads)
    with checkpoint(arguments) as folder:
        run = compare(head, folder, arguments.texts, arguments.rounds)
        for characters in sorted(arguments.characters):
            print(f"a text of {characters:,} characters", file=sys.stderr)
            run.long_texts.append(in_own_process(folder, characters, run.settings.threads))
    return run


def compare(head: dict[str, object], folder: pathlib.Path, texts: int, rounds: int) -> ExtractionRun:
    model, tokenizer = load(folder)
    padded = Padded(model)
    jobs = list(make_jobs(texts))
    calls = [lambda each=each: extract_all(each, tokenizer, jobs) for each in (padded, model)]
    expected, found = (call() for call in calls)
    rows, tokens = padded.rows, padded.tokens
    off = difference(found, expected)
    print(f"{rows} rows of {tokens} tokens, padded to {rows * LENGTH}", file=sys.stderr)
    # Both have run once.
    taken = take_turns(calls, rounds, torch.device("cpu"), warm_up=0)
    seconds = [[each.seconds for each in one] for one in taken]
    contenders = [
        Contender(name, quartiles(own), quartiles(np.divide(seconds[0], own)), difference)
        for name, own, difference in zip(("padded to 512", "packed"), seconds, (0.0, off), strict=True)
    ]
    counts = {"rows": rows, "tokens": tokens, "spans": len(spans(found))}
    return ExtractionRun(**head, **counts, contenders=contenders, long_texts=[])


def load(folder: pathlib.Path) -> tuple[ErnieMForInformationExtraction, ErnieMTokenizer]:
    """The UIE-M in `folder`; of another ERNIE-M, its encoder with random heads and UIE-M's attention."""
    own = (folder / "vocab.txt").exists()
    tokenizer = ErnieMTokenizer.from_pretrained(folder if own else TOKENIZER)
    torch.manual_seed(0)
    model = ErnieMForInformationExtraction.from_pretrained(folder).eval()
    if model.config.uie_padded_length is None:
        model.config.uie_padded_length = LENGTH
        make_sparse(model, tokenizer)
    return model, tokenizer


@torch.no_grad()
def make_sparse(model: ErnieMForInformationExtraction, tokenizer: ErnieMTokenizer) -> None:
    """Sets the biases of the heads so that one token in SPARSITY starts a span, and one ends one."""
    texts = [text for lang in SCHEMAS for text in sentences(lang)[:16]]
    batch = tokenizer(["user"] * len(texts), texts, padding=True, return_tensors="pt")
    output, words = model(**batch), batch["input_ids"] > tokenizer.unk_token_id
    for head, logits in ((model.linear_start, output.start_logits), (model.linear_end, output.end_logits)):
        head.bias -= logits[words].quantile(1 - 1 / SPARSITY)


class Padded(nn.Module):
    """A UIE-M that computes rows really padded to 512 tokens, with the same weights and kernels.

    Attributes:
        rows, tokens: that it has computed, padding not counted.
    """

    def __init__(self, model: ErnieMForInformationExtraction) -> None:
        super().__init__()
        self.config, self.device, self.rows, self.tokens = model.config, model.device, 0, 0
        with torch.device("meta"):
            plain = type(model)(type(model.config)(**{**model.config.to_dict(), "uie_padded_length": None}))
        plain.load_state_dict(model.state_dict(), assign=True)
        self.plain = plain.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> QuestionAnsweringModelOutput:
        lengths = attention_mask.sum(1, keepdim=True)
        self.rows, self.tokens = self.rows + len(lengths), self.tokens + lengths.sum().item()
        columns = input_ids.shape[1]
        ids = F.pad(input_ids, (0, LENGTH - columns), value=self.config.pad_token_id)
        place = torch.arange(LENGTH).expand_as(ids)
        positions = place.where(place < lengths, 0)
        with flags.held(flags.Settings({flags.PACKING.name: "0"})):
            outputs = [
                self.plain(one, attention_mask=(one != 0).long(), position_ids=place)
                for one, place in zip(ids.split(BATCH_SIZE), positions.split(BATCH_SIZE), strict=True)
            ]
        names = ("start_logits", "end_logits")
        return QuestionAnsweringModelOutput(**{n: torch.cat([each[n][:, :columns] for each in outputs]) for n in names})


def make_jobs(texts: int) -> Iterator[tuple[str, object, list[str]]]:
    """For each language and schema, sentences of their own."""
    for lang, schemas in SCHEMAS.items():
        found = iter(sentences(lang))
        for schema in schemas:
            yield lang, schema, [next(found) for _ in range(texts)]


def sentences(lang: str) -> list[str]:
    """Sentences of the data, in their order."""
    rows = [row for row in read_translations() if len(row.english.split()) >= SENTENCE_WORDS]
    if lang == "en":
        return list(dict.fromkeys(row.english for row in rows))
    return [row.translation for row in rows if row.language.startswith(lang)]


def extract_all(model: nn.Module, tokenizer: ErnieMTokenizer, jobs: list) -> list[dict]:
    """The results of all texts."""
    return [
        result
        for lang, schema, texts in jobs
        for result in Extractor(model, tokenizer, schema, lang=lang, progress=False)(texts)
    ]


def spans(results: list[dict]) -> list[dict]:
    """All spans, those of relations too."""
    return [
        span
        for result in results
        for found in result.values()
        for each in found
        for span in (each, *spans([each.get("relations", {})]))
    ]


def difference(found: list[dict], expected: list[dict]) -> float:
    """The largest difference of probabilities.

    Raises:
        ValueError: other spans are found, or none, or their probabilities differ by more than LARGEST.
    """
    places, right = ([(each["text"], each.get("start")) for each in spans(one)] for one in (found, expected))
    if not right or places != right:
        raise ValueError(f"of {len(right)} spans that the padded rows have, {len(places)} are found, or others")
    pairs = zip(spans(found), spans(expected), strict=True)
    off = max(abs(one["probability"] - other["probability"]) for one, other in pairs)
    if not off <= LARGEST:
        raise ValueError(f"the probabilities differ by {off:.2g}")
    return off


def in_own_process(folder: pathlib.Path, characters: int, threads: int) -> LongText:
    command = [sys.executable, "-m", "bench.model.extraction", str(folder), str(characters), str(threads)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return LongText(**json.loads(done.stdout))


def work(folder: str, characters: str, threads: str) -> dict[str, object]:
    """Extracts from a text of so many characters in this process; returns the figures."""
    torch.set_num_threads(int(threads))
    model, tokenizer = load(pathlib.Path(folder))
    extractor = Extractor(model, tokenizer, SCHEMAS["en"][0], lang="en", progress=False)
    text = long_text(int(characters))
    extractor(text[:1000])
    reset_peak()
    loaded, found = peak(), []
    seconds = time_call(lambda: found.extend(extractor(text)), torch.device("cpu")).seconds
    memory = {"loaded_memory": loaded, "peak_memory": peak()}
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return {"characters": len(text), "tokens": tokens, "spans": len(spans(found)), "seconds": seconds, **memory}


def long_text(characters: int) -> str:
    """Chinese and English sentences in turn, over and over."""
    pairs = zip(sentences("zh"), sentences("en"), strict=False)
    text = "".join(f"{zh}\n{en}\n" for zh, en in pairs)
    return (text * (characters // len(text) + 1))[:characters]


if __name__ == "__main__":
    print(json.dumps(work(*sys.argv[1:])))
