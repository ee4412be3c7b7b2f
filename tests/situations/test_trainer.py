"""Situations of transformers' Trainer."""

import pytest
import torch
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from erniem_fast import ErnieMForInformationExtraction, ErnieMForSequenceClassification, ErnieMForTokenClassification
from tests.golden import cases
from tests.model.tiny import ATOL, assert_close, load
from tests.situations.truths import RATES, TEXTS


class Rows(torch.utils.data.Dataset):
    """Texts of very unequal lengths with the labels that `label` makes of a row of ids."""

    def __init__(self, tokenizer, label):
        self.rows = [{"input_ids": tokenizer(" ".join(TEXTS[:1] * count))["input_ids"]} for count in (1, 3, 2, 6, 1, 9)]
        for row in self.rows:
            row |= label(row["input_ids"])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def make_trainer(model, folder, collator, rows, **options):
    options = {"save_strategy": "no", "per_device_eval_batch_size": 2, "per_device_train_batch_size": 2, **options}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, seed=5, **options)
    return Trainer(model, arguments, train_dataset=rows, data_collator=collator)


@pytest.mark.parametrize("steps", [None, 1])
def test_predictions_of_batches_of_unequal_lengths(steps, tokenizer, tmp_path):
    """Each row as it is alone, and -100 behind it."""
    model = load(ErnieMForTokenClassification, num_labels=3)
    rows = Rows(tokenizer, lambda ids: {"labels": [each % 3 for each in ids]})
    collator = DataCollatorForTokenClassification(tokenizer)
    found = make_trainer(model, tmp_path, collator, rows, eval_accumulation_steps=steps).predict(rows)
    for row, logits, labels in zip(rows, found.predictions, found.label_ids, strict=True):
        length = len(row["input_ids"])
        alone = model(torch.tensor([row["input_ids"]])).logits[0]
        assert_close(torch.from_numpy(logits[:length]), alone)
        assert labels[:length].tolist() == row["labels"]
        assert (labels[length:] == -100).all()


def test_information_extraction_is_evaluated_by_the_names_of_its_labels(tokenizer, tmp_path):
    model = load(ErnieMForInformationExtraction)
    rows = Rows(tokenizer, lambda ids: {"start_positions": 1, "end_positions": len(ids) - 2})
    names = ["start_positions", "end_positions"]
    trainer = make_trainer(model, tmp_path, DataCollatorWithPadding(tokenizer), rows, label_names=names)
    found = trainer.evaluate(rows)["eval_loss"]
    losses = []
    for start in range(0, len(rows), 2):
        batch = DataCollatorWithPadding(tokenizer)([rows[start], rows[start + 1]])
        losses.append(model(**batch).loss.item())
    assert found == pytest.approx(sum(losses) / len(losses), abs=ATOL)


def test_training_goes_on_from_a_checkpoint(tokenizer, tmp_path):
    """With the weights, the optimizer and the dropout of one that was never interrupted."""
    rows = Rows(tokenizer, lambda ids: {"labels": len(ids) % 2})

    def train(folder, steps, resume=False, **options):
        torch.manual_seed(7)
        model = ErnieMForSequenceClassification.from_pretrained(cases.TINY, **RATES)
        losses = []
        model.register_forward_hook(lambda module, arguments, output: losses.append(output.loss.item()))
        options = {"max_steps": steps, "learning_rate": 1e-3, "lr_scheduler_type": "constant", **options}
        trainer = make_trainer(model, folder, DataCollatorWithPadding(tokenizer), rows, **options)
        trainer.train(resume_from_checkpoint=resume)
        return losses

    expected = train(tmp_path / "whole", 5)
    found = train(tmp_path / "parts", 3, save_strategy="steps", save_steps=3)
    found += train(tmp_path / "parts", 5, resume=True)
    assert found == pytest.approx(expected, abs=1e-4)
