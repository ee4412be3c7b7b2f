"""Situations of threads and processes."""

import concurrent.futures

import torch
from torch.utils.data import DataLoader

from erniem_fast import ErnieMTokenizer
from tests.golden import cases
from tests.model.tiny import assert_close, assert_same_gradients, load
from tests.situations.truths import (
    IDS,
    INPUTS,
    MASK,
    ROWS,
    TEXTS,
    assert_same_as_peer,
    assert_same_results,
    gradients_of,
)


def in_threads(function, items):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(pool.map(function, items))


def test_one_model_in_several_threads():
    model = load()
    batches = [{"input_ids": IDS[row : row + 1, : int(MASK[row].sum())]} for row in range(ROWS)] + INPUTS

    @torch.inference_mode()
    def states(batch):
        return model(**batch).last_hidden_state

    expected = [states(batch) for batch in batches]
    for found, states_alone in zip(in_threads(states, batches * 20), expected * 20, strict=True):
        assert_close(found, states_alone)


def test_models_trained_in_several_threads():
    """Each by a thread of its own, whose backward PyTorch may run on yet others."""
    seeds, expected = range(4), gradients_of()
    for found in in_threads(lambda seed: gradients_of(load().train()), seeds):
        assert_same_gradients(found, expected)


def test_one_tokenizer_in_several_threads(tokenizer):
    texts = [f"{text} {number}" for number in range(300) for text in TEXTS]
    chunks = [texts[start : start + 50] for start in range(0, len(texts), 50)]
    fresh = ErnieMTokenizer.from_pretrained(cases.TINY)
    found = in_threads(lambda chunk: fresh(chunk, return_offsets_mapping=True), chunks)
    for chunk, encoded in zip(chunks, found, strict=True):
        expected = tokenizer(chunk, return_offsets_mapping=True)
        assert dict(encoded) == dict(expected)


def test_forked_workers_tokenize_and_embed(tokenizer):
    """After this process has done both, on several threads."""
    texts = TEXTS * 100
    model, expected = load(), tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**expected).pooler_output

    def collate(texts):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            return batch["input_ids"], model(**batch).pooler_output

    options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
    loaded = list(DataLoader(texts, batch_size=250, collate_fn=collate, **options))
    assert torch.equal(torch.cat([ids for ids, _ in loaded]), expected["input_ids"])
    assert_close(torch.cat([pooled for _, pooled in loaded]), states)


def test_numbers_of_threads():
    model, threads = load(), torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert_same_as_peer(model)
    finally:
        torch.set_num_threads(threads)


def test_weights_in_shared_memory():
    model = load().share_memory()
    assert model.encoder.layers[0].linear1.weight.is_shared()
    assert_same_results(model, load())
