"""Token classification and question answering by Hugging Face's guides; the pipeline beside a fast tokenizer's."""

import json
import random
import shutil

import pytest
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)

from erniem_fast import ErnieMForQuestionAnswering, ErnieMForTokenClassification
from erniem_fast.conversion import from_xlm_roberta
from erniem_fast.conversion import tokenizers as conversion
from tests.families.tiny import make
from tests.golden import cases
from tests.integration.texts import TEXTS
from tests.tokenization.tiny import MODEL_FILE

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(cases.TINY)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """XLM-RoBERTa with its fast tokenizer, and the same model as ERNIE-M with ours; they read 24 tokens."""
    folder = tmp_path_factory.mktemp("xlm_roberta")
    shutil.copy(MODEL_FILE, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    fast, ours = AutoTokenizer.from_pretrained(folder), conversion.from_xlm_roberta(folder)
    fast.model_max_length = ours.model_max_length = 24
    stock = make(model_class=transformers.XLMRobertaForTokenClassification, vocab_size=len(fast), **NAMES)
    return (from_xlm_roberta(stock), ours), (stock, fast)


@pytest.fixture(scope="module")
def texts(both):
    """Texts that both tokenizers cut in the same way; some are longer than 24 tokens."""
    (_, ours), (_, fast) = both
    words = sorted({word for text in TEXTS for word in text.split()} | {"a", "b", "Save", "add", "password", "for"})
    words = [word for word in words if ours(word)["input_ids"] == fast(word)["input_ids"]]
    generator = random.Random(1)
    found = [" ".join(generator.choices(words, k=generator.randrange(1, 40))) for _ in range(20)]
    found = [text for text in found if ours(text)["input_ids"] == fast(text)["input_ids"]]
    assert len(found) > 10
    assert sum(len(ours(text)["input_ids"]) > 24 for text in found) > 5
    return found


def tag_both(both, inputs, **options):
    found = []
    for model, tokenizer in both:
        tag = pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu", ignore_labels=[])
        found.append(tag(inputs, **options))
    return found


def assert_same_entities(ours, stock):
    assert len(ours) == len(stock)
    for mine, theirs in zip(ours, stock, strict=True):
        assert [entity.keys() for entity in mine] == [entity.keys() for entity in theirs]
        for a, b in zip(mine, theirs, strict=True):
            # Of words that end in a token for a space, fast tokenizers keep the space.
            assert a | {"score": 0} == b | {"score": 0, "word": b["word"].rstrip() or b["word"]}
            assert a["score"] == pytest.approx(b["score"], abs=1e-5)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_the_pipeline_is_that_of_xlm_roberta(both, texts, strategy):
    ours, stock = tag_both(both, texts, aggregation_strategy=strategy, batch_size=4)
    assert_same_entities(ours, stock)
    for text, entities in zip(texts, ours, strict=True):
        if strategy in ("first", "average", "max"):
            assert all(f" {text}"[entity["start"]] == " " for entity in entities)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", ["simple", "first"])
def test_the_pipeline_with_a_stride(both, texts, strategy):
    ours, stock = tag_both(both, texts, aggregation_strategy=strategy, stride=5)
    assert_same_entities(ours, stock)
    longest = max(texts, key=len)
    assert ours[texts.index(longest)][-1]["end"] == len(longest)


@pytest.mark.parametrize("strategy", ["none", "simple"])
def test_the_pipeline_on_words(both, texts, strategy):
    (_, ours), _ = both
    lists = [text.split() for text in texts if len(ours(text)["input_ids"]) <= 24]
    found = tag_both(both, lists, aggregation_strategy=strategy, is_split_into_words=True)
    assert_same_entities(*found)


# ---- The guides' own code


class Rows(list):
    """A dataset of `datasets`, as far as the guides need one: `map` with `batched=True`."""

    def map(self, function, size=16):
        rows = Rows()
        for start in range(0, len(self), size):
            batch = self[start : start + size]
            columns = function({name: [row[name] for row in batch] for name in batch[0]})
            rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return rows


def people(count, seed):
    """Sentences of known words in which one word is a person, which the word before it announces."""
    generator, words = random.Random(seed), ["password", "and", "Save", "北京。", "add", "12,5"]
    for _ in range(count):
        tokens = generator.choices(words, k=generator.randrange(3, 7))
        place = generator.randrange(len(tokens) - 1)
        tokens[place : place + 2] = ["for", "confirmation"]
        yield {
            "tokens": tokens,
            "ner_tags": [int(place >= 1 and tokens[place - 1] == "for") for place in range(len(tokens))],
        }


def test_the_guide_to_token_classification(tokenizer, tmp_path):
    def tokenize_and_align_labels(examples):
        tokenized_inputs = tokenizer(examples["tokens"], truncation=True, is_split_into_words=True)
        labels = []
        for i, label in enumerate(examples["ner_tags"]):
            word_ids = tokenized_inputs.word_ids(batch_index=i)
            previous_word_idx = None
            label_ids = []
            for word_idx in word_ids:
                if word_idx is None:
                    label_ids.append(-100)
                elif word_idx != previous_word_idx:
                    label_ids.append(label[word_idx])
                else:
                    label_ids.append(-100)
                previous_word_idx = word_idx
            labels.append(label_ids)
        tokenized_inputs["labels"] = labels
        return tokenized_inputs

    examples = Rows(people(48, seed=1))
    train = examples.map(tokenize_and_align_labels)
    for example, row in zip(examples, train, strict=True):
        assert [label for label in row["labels"] if label != -100] == example["ner_tags"]
        assert len(row["labels"]) == len(row["input_ids"])
        firsts = [id_ for id_, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert firsts == [tokenizer(word)["input_ids"][1] for word in example["tokens"]]

    torch.manual_seed(0)
    model = ErnieMForTokenClassification.from_pretrained(cases.TINY, num_labels=2, **cases.NO_DROPOUT)
    losses = []
    model.register_forward_hook(
        lambda module, _, output: losses.append(output.loss.item()) if module.training else None
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, seed=5,
        max_steps=30, per_device_train_batch_size=16, learning_rate=5e-3,
    )  # fmt: skip
    collator = DataCollatorForTokenClassification(tokenizer=tokenizer)
    trainer = Trainer(model, arguments, train_dataset=train, data_collator=collator, processing_class=tokenizer)
    trainer.train()
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])

    tag = pipeline("token-classification", model=model.eval(), tokenizer=tokenizer, device="cpu")
    words = ["Save", "for", "confirmation", "and"]
    for entities in (tag(" ".join(words)), tag(words, is_split_into_words=True)[0]):
        named = {word_of(words, entity) for entity in entities if entity["entity"] == "LABEL_1"}
        assert named == {"confirmation"}


def word_of(words, entity):
    """The word of an entity's characters."""
    before = " ".join(words)[: entity["start"]]
    return words[before.count(" ")]


def test_the_guide_to_question_answering(tokenizer):
    """With windows over long contexts, as in the example scripts: labels point at the answers."""
    context = "Save and add. " * 20 + "password for confirmation" + " and add" * 30
    answer = {"text": ["confirmation"], "answer_start": [context.index("confirmation")]}
    examples = {"question": ["  for ?"] * 2, "context": [context, context[200:]], "answers": [answer] * 2}
    examples["answers"][1] = {"text": ["confirmation"], "answer_start": [context.index("confirmation") - 200]}
    inputs = tokenizer(
        [question.strip() for question in examples["question"]],
        examples["context"],
        truncation="only_second",
        max_length=48,
        stride=12,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )
    samples, found = inputs.pop("overflow_to_sample_mapping"), {0: 0, 1: 0}
    starts, ends = [], []
    for i, offset in enumerate(inputs.pop("offset_mapping")):
        answers = examples["answers"][samples[i]]
        start_char = answers["answer_start"][0]
        end_char = start_char + len(answers["text"][0])
        sequence_ids = inputs.sequence_ids(i)
        context_start = sequence_ids.index(1)
        context_end = len(sequence_ids) - 1 - sequence_ids[::-1].index(1)
        if offset[context_start][0] > start_char or offset[context_end][1] < end_char:
            starts.append(0)
            ends.append(0)
            continue
        idx = context_start
        while idx <= context_end and offset[idx][0] <= start_char:
            idx += 1
        starts.append(idx - 1)
        idx = context_end
        while idx >= context_start and offset[idx][1] >= end_char:
            idx -= 1
        ends.append(idx + 1)
        text = examples["context"][samples[i]]
        assert text[offset[starts[-1]][0] : offset[ends[-1]][1]] == "confirmation"
        assert inputs.char_to_token(i, start_char, sequence_index=1) == starts[-1]
        found[samples[i]] += 1
    assert min(found.values()) >= 1
    inputs["start_positions"], inputs["end_positions"] = starts, ends
    model = ErnieMForQuestionAnswering.from_pretrained(cases.TINY)
    rows = [dict(zip(inputs, values, strict=True)) for values in zip(*inputs.values(), strict=True)]
    for batch in DataLoader(rows, batch_size=4, collate_fn=default_data_collator):
        assert model(**batch).loss.isfinite()


def test_whole_words_are_masked(tokenizer):
    """The collator finds words by gaps between offsets, which it takes from fast tokenizers alone."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, whole_word_mask=True, seed=1)
    encoding = tokenizer(
        "password confirmation, Save " * 6, return_offsets_mapping=True, return_special_tokens_mask=True
    )
    batch = collator([dict(encoding)])
    masked = batch["input_ids"][0] == tokenizer.mask_token_id
    by_word = {}
    for word, is_masked in zip(encoding.word_ids(), masked.tolist(), strict=True):
        by_word.setdefault(word, set()).add(is_masked)
    assert all(len(states) == 1 for states in by_word.values())
    assert set.union(*by_word.values()) == {True, False}
