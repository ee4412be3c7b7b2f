"""Make the goldens: everything that the tests compare with, computed by the real transformers 4.57.6.

Run as `make goldens`, in the environment of bench/peers/requirements.txt, in ten seconds. It rewrites what
README.md lists, each time with the same bytes. Models run in float64 and their goldens are stored in float32, so that
neither the machine nor the order of a sum shows. Nothing of erniem_fast is imported here.
"""

import collections
import csv
import inspect
import io
import itertools
import json
import lzma
import pathlib
import tempfile

import cases
import numpy as np
import sentencepiece
import torch
import transformers
from cases import GOLDEN, TINY
from transformers.models.deprecated import ernie_m
from transformers.models.deprecated.ernie_m import ErnieMConfig, ErnieMModel, ErnieMTokenizer

PARALLEL = GOLDEN.parent.parent / "bench" / "data" / "parallel.tsv"


def read_rows():
    with PARALLEL.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def read_texts():
    """Every distinct text of parallel.tsv: the English ones first, then the translations, in the order of the file."""
    rows = read_rows()
    return list(dict.fromkeys([row["english"] for row in rows] + [row["translation"] for row in rows]))


def train_sentencepiece(texts, path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=6500,
        character_coverage=0.9995,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def write_vocabulary(texts, model_path, path, size=2300):
    """The most frequent pieces in ERNIE-M's layout: their ids are not SentencePiece's, as in real checkpoints."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    counts = collections.Counter(piece for ids in processor.encode(texts) for piece in ids if piece > 2)
    frequent = sorted(counts, key=lambda piece: (-counts[piece], piece))[: size - 5]
    pieces = [processor.id_to_piece(piece) for piece in sorted(frequent)]
    path.write_text("\n".join(["[CLS]", "[PAD]", "[SEP]", "[UNK]", *pieces, "[MASK]"]) + "\n", encoding="utf-8")


def make_tiny():
    texts = read_texts()
    with tempfile.TemporaryDirectory() as folder:
        model_path, vocab_path = pathlib.Path(folder, "sentencepiece.bpe.model"), pathlib.Path(folder, "vocab.txt")
        train_sentencepiece(texts, model_path)
        write_vocabulary(texts, model_path, vocab_path)
        ErnieMTokenizer(str(model_path), str(vocab_path)).save_pretrained(TINY)

    config = ErnieMConfig(
        vocab_size=2300,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        initializer_range=0.15,
    )
    model = ErnieMModel(config)
    # Padding rows, biases and layer norms are drawn too, so that no parameter can be left out unseen.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(centre, config.initializer_range, generator=generator)
    model.save_pretrained(TINY)


def read_odd_texts(count=800):
    """The hand-picked texts, then random ones out of their words and characters."""
    odd = json.loads((GOLDEN / "odd_texts.json").read_text(encoding="utf-8"))
    parts = [part for text in odd for part in text.split() + list(text)]
    random = np.random.RandomState(0)
    return odd + ["".join(random.choice(parts, size=random.randint(1, 24))) for _ in range(count)]


def tokens_of(tokenizer, texts):
    """One string a text: its tokens between single spaces, which no token contains."""
    lines = [tokenizer.tokenize(text) for text in texts]
    assert not any(" " in token for tokens in lines for token in tokens)
    return [" ".join(tokens) for tokens in lines]


def does_not_crash(tokenizer, text):
    """A trailing lone ▁ raises IndexError in 4.57.6."""
    try:
        tokenizer.tokenize(text)
    except IndexError:
        return False
    return True


def make_truncation(model_file, vocab_file):
    """What each strategy makes of examples that are too long, some of them too short to be cut."""
    examples = [
        ["Save and add another", None],
        ["password here", "x y z"],
        ["Your password was changed.", ""],
        ["", "x y z a b"],
        ["a", "Log in again, please: 12 日本語"],
    ]
    calls = []
    for side in ("right", "left"):
        tokenizer = ErnieMTokenizer(model_file, vocab_file, truncation_side=side)
        strategies = ("longest_first", "only_first", "only_second")
        for strategy, max_length, stride in itertools.product(strategies, (2, 4, 5, 6, 8, 11), (0, 3)):
            arguments = {"truncation": strategy, "max_length": max_length, "stride": stride}
            # 4.57.6 refuses to return the overflow of a pair that longest_first cuts.
            overflow = [strategy != "longest_first" or second is None for _, second in examples]
            outputs = [
                dict(tokenizer(first, second, return_overflowing_tokens=wanted, **arguments))
                for (first, second), wanted in zip(examples, overflow, strict=True)
            ]
            calls.append({"side": side, "arguments": arguments, "outputs": outputs})
    return {"examples": examples, "calls": calls}


def make_tokenizer():
    texts = read_texts()
    model_file, vocab_file = str(TINY / "sentencepiece.bpe.model"), str(TINY / "vocab.txt")
    cased = ErnieMTokenizer(model_file, vocab_file)
    lower = ErnieMTokenizer(model_file, vocab_file, do_lower_case=True)
    # Without a vocab.txt ids are SentencePiece's, special tokens follow, and 4.57.6 gives None for unknown pieces.
    bare = ErnieMTokenizer(model_file)
    extended = ErnieMTokenizer(model_file, vocab_file, additional_special_tokens=["<ent>"])
    extended.add_tokens(["ErnieM", "日本"])

    odd = [text for text in read_odd_texts() if all(does_not_crash(t, text) for t in (cased, lower, extended))]
    some = odd[:40] + texts[::200]
    firsts, seconds = some[: len(some) // 2], some[len(some) // 2 : len(some) // 2 * 2]
    every_field = {"return_attention_mask": True, "return_token_type_ids": True, "return_special_tokens_mask": True}
    ids = [cased(text)["input_ids"] for text in some]

    golden = {
        "texts": {"tokens": tokens_of(cased, texts), "input_ids": cased(texts)["input_ids"]},
        "texts_lower": {"tokens": tokens_of(lower, texts)},
        "odd": {
            "texts": odd,
            "tokens": [cased.tokenize(text) for text in odd],
            "input_ids": cased(odd)["input_ids"],
            "lower_tokens": [lower.tokenize(text) for text in odd],
            "extended_tokens": [extended.tokenize(text) for text in odd],
        },
        "some": {
            "texts": some,
            "decoded": [cased.decode(one) for one in ids],
            "decoded_skip_special_tokens": [cased.decode(one, skip_special_tokens=True) for one in ids],
            "tokens_to_string": [cased.convert_tokens_to_string(cased.tokenize(text)) for text in some],
            "ids_to_string": [cased.convert_ids_to_string(one) for one in ids],
            "special_tokens_mask": [cased.get_special_tokens_mask(one, already_has_special_tokens=True) for one in ids],
            "default": dict(cased(some)),
            "padded": dict(cased(some, padding=True)),
            "padded_left": dict(cased(some, padding="max_length", max_length=16, truncation=True, padding_side="left")),
            "every_field": dict(cased(some, **every_field)),
            "no_special_tokens": dict(cased(some, add_special_tokens=False)),
        },
        "pairs": {
            "firsts": firsts,
            "seconds": seconds,
            "every_field": dict(cased(firsts, seconds, **every_field)),
            "truncated": dict(
                cased(firsts, seconds, truncation=True, max_length=12, padding="max_length", **every_field)
            ),
            "only_second": dict(cased(firsts[-9:], seconds[-9:], truncation="only_second", max_length=80, stride=2)),
        },
        "truncation": make_truncation(model_file, vocab_file),
        "bare": {
            "length": len(bare),
            "vocab_size": bare.vocab_size,
            "special_ids": {token: bare.convert_tokens_to_ids(token) for token in bare.all_special_tokens},
            "texts": [text for text in some if None not in bare(text)["input_ids"]],
            "input_ids": [ids for ids in bare(some)["input_ids"] if None not in ids],
        },
        "extended": {
            "added_vocab": extended.get_added_vocab(),
            "input_ids": extended(["ErnieM reads 日本語", "<ent>ErnieM</ent> [MASK]", "a<ent> b"])["input_ids"],
            "texts": ["ErnieM reads 日本語", "<ent>ErnieM</ent> [MASK]", "a<ent> b"],
        },
    }
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    (GOLDEN / "tokenizer.json.xz").write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def in_float64(inputs):
    """Copies of the tensors, since transformers adds 2 to position_ids in place."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor.clone() for name, tensor in inputs.items()}


def make_model():
    """Outputs of ErnieMModel for every kind of mask, and for the rarer arguments under right padding."""
    model = ErnieMModel.from_pretrained(TINY).double()
    everything = {"output_hidden_states": True, "output_attentions": True}
    golden = {}
    for kind, mask in cases.MASKS.items():
        outputs = model(cases.make_input_ids(kind), attention_mask=mask, **everything)
        assert torch.equal(outputs.last_hidden_state, outputs.hidden_states[-1])
        golden[f"{kind}/hidden_states"] = torch.stack(outputs.hidden_states)
        golden[f"{kind}/attentions"] = torch.stack(outputs.attentions)
        golden[f"{kind}/pooler_output"] = outputs.pooler_output

    def answer_rare(case, inputs):
        outputs = model(**in_float64(inputs), attention_mask=cases.MASKS["right"], **everything)
        golden[f"{case}/last_hidden_state"] = outputs.last_hidden_state
        if "head" in case:
            golden[f"{case}/attentions"] = torch.stack(outputs.attentions)

    for case, inputs in cases.make_rare_inputs().items():
        answer_rare(case, inputs)
    model.prune_heads({0: [1], 1: [0]})
    model.double()
    answer_rare("prune_heads", {"input_ids": cases.make_input_ids("right")})
    return golden


def make_heads():
    """Logits, loss and gradients of every head for every kind of mask."""
    golden = {}
    for head, kind in itertools.product(cases.HEADS, cases.MASKS):
        model = cases.load(ernie_m, *cases.HEADS[head]).double()
        labels = in_float64(cases.make_labels(head, kind))
        outputs = model(**cases.make_inputs(head, kind), **labels)
        logits = {name: outputs[name] for name in outputs if name.endswith("logits")}
        golden.update({f"{head}/{kind}/{name}": tensor for name, tensor in logits.items()})

        losses = {"loss": outputs.loss} if cases.has_golden_loss(head, kind) else {}
        if head in cases.SPAN_HEADS:
            losses["real_loss"] = cases.loss_over_real_tokens(head, **logits, mask=cases.MASKS[kind], **labels)
        for name, loss in losses.items():
            model.zero_grad()
            loss.backward(retain_graph=True)
            golden[f"{head}/{kind}/{name}"] = loss
            gradients = np.concatenate(list(cases.sketch_gradients(model).values()))
            # What cancels exactly, such as the key biases' gradients, is a zero and not the last bits of a sum.
            golden[f"{head}/{kind}/{name}_gradients"] = np.where(np.abs(gradients) < 1e-12, 0.0, gradients)
    return golden


def make_interface():
    """The arguments, the parameters' names and shapes and the layout of the outputs of every class."""
    golden = {}
    for head, (name, config) in cases.MODELS.items():
        model = cases.load(ernie_m, name, config)
        outputs = []
        for labelled, hidden_states, attentions in itertools.product((False, True), repeat=3):
            inputs = cases.make_inputs(head, "right")
            if labelled and head in cases.HEADS:
                inputs |= cases.make_labels(head, "right")
            inputs |= {"output_hidden_states": hidden_states, "output_attentions": attentions}
            outputs.append(
                {
                    "labelled": labelled,
                    "hidden_states": hidden_states,
                    "attentions": attentions,
                    "keys": list(model(**inputs)),
                    # The information-extraction head raises AttributeError when it is asked for a tuple.
                    "tuple": None
                    if head == "information_extraction"
                    else cases.describe(model(**inputs, return_dict=False)),
                }
            )
        golden[head] = {
            "forward": list(inspect.signature(model.forward).parameters),
            "parameters": {key: list(parameter.shape) for key, parameter in model.state_dict().items()},
            "outputs": outputs,
        }
    return golden


def make_training():
    """The loss curve of 20 steps of 4.57.6's Trainer, which learns the languages of 32 texts."""
    languages = ["de", "ru", "ja", "tr"]
    tokenizer = ErnieMTokenizer.from_pretrained(TINY)
    columns = [[row["translation"] for row in read_rows() if row["lang"] == language] for language in languages]
    rows = [
        (tokenizer(text, truncation=True, max_length=24)["input_ids"], label)
        for texts in itertools.islice(zip(*columns, strict=False), 8)
        for label, text in enumerate(texts)
    ]
    settings = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "seed": 0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        losses = cases.train(ernie_m, rows, settings, folder, dtype=torch.float64)
    losses = [round(loss, 7) for loss in losses]
    return {"languages": languages, "settings": settings, "losses": losses, "rows": rows}


def write_arrays(name, golden):
    arrays = {key: np.asarray(torch.as_tensor(value).detach(), dtype=np.float32) for key, value in golden.items()}
    np.savez_compressed(GOLDEN / name, **arrays)


def write_json(name, golden):
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    (GOLDEN / name).write_text(text + "\n", encoding="utf-8")


def main():
    assert transformers.__version__ == "4.57.6", (
        f"goldens come from transformers 4.57.6, not {transformers.__version__}"
    )
    transformers.logging.set_verbosity_error()
    make_tiny()
    make_tokenizer()
    write_arrays("model.npz", make_model())
    write_arrays("heads.npz", make_heads())
    write_json("interface.json", make_interface())
    write_json("training.json", make_training())


if __name__ == "__main__":
    main()
