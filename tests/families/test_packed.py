"""Several sequences in one row: the numbers that they have in rows of their own, and one result of a head for each."""

import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening

import erniem_fast
from tests.families.tiny import COLUMNS, FAMILIES, IDS, TYPES, both, make
from tests.model.tiny import assert_close, assert_same_gradients, gradients, random_weights

LENGTHS = torch.tensor([11, 7, 1, 4])
MASK = (torch.arange(COLUMNS) < LENGTHS[:, None]).long()
ROWS = IDS[:4].clamp(min=4)
REAL = MASK.bool()
PADDED = {"input_ids": ROWS.where(REAL, 1), "attention_mask": MASK}
NAMES = {"xlm-roberta": "XLMRoberta", "roberta": "Roberta", "camembert": "Camembert", "bert": "Bert"}

every_family = pytest.mark.parametrize("family", FAMILIES)


def flattened(start=0, bounds=True):
    """As the collator makes it: positions from `start`, and the bounds of sequences or positions alone."""
    features = [{"input_ids": row[real].tolist()} for row, real in zip(ROWS, REAL, strict=True)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=bounds, position_ids_start=start)(features)
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.fixture(autouse=True)
def packed_path(monkeypatch):
    monkeypatch.setattr("erniem_fast.families.fallback.tell", lambda model, why: pytest.fail(why))


# Positions from 0 or from the model's first one, or none; and bounds, which only positions can replace.
KINDS = [(family, start, bounds) for family in FAMILIES for start in (0, 2) for bounds in (True, False)]
KINDS = [*((family, None, True) for family in FAMILIES), *(kind for kind in KINDS if kind[:2] != ("bert", 2))]


@pytest.mark.parametrize(("family", "start", "bounds"), KINDS)
def test_bare_models(family, start, bounds):
    stock, fast = both(family)
    batch = flattened(start or 0, bounds)
    if start is None:
        del batch["position_ids"]
    with torch.inference_mode():
        expected, actual = stock(**PADDED), fast(**batch)
    assert actual.last_hidden_state.shape == (1, MASK.sum(), 32)
    assert_close(actual.last_hidden_state[0], expected.last_hidden_state[REAL], atol=2e-5)
    assert_close(actual.pooler_output, expected.pooler_output, atol=2e-5)


@every_family
def test_classification(family):
    """Logits, loss and gradients, a row for each sequence."""
    found, labels = [], torch.tensor([0, 1, 1, 0])
    stock, fast = both(family, model_class=getattr(transformers, f"{NAMES[family]}ForSequenceClassification"))
    for model, batch in ((stock, PADDED), (fast, flattened())):
        output = model(**batch, labels=labels)
        output.loss.backward()
        found.append((output, gradients(model)))
    assert_close(found[1][0].logits, found[0][0].logits, atol=1e-4)
    assert_close(found[1][0].loss, found[0][0].loss, atol=2e-5)
    assert_same_gradients(found[1][1], found[0][1], rtol=1e-4)
    assert type(fast).__name__ == type(stock).__name__
    erniem_fast.restore(fast)
    assert type(fast) is type(stock)


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForMaskedLM"])
@pytest.mark.parametrize("family", ["xlm-roberta", "bert"])
def test_results_by_token(family, head):
    stock, fast = both(family, model_class=getattr(transformers, NAMES[family] + head))
    found = []
    for model, batch, real in ((stock, PADDED, REAL), (fast, flattened(), torch.ones(1, MASK.sum(), dtype=torch.bool))):
        logits = model(**batch).logits[real]
        (logits * random_weights(logits)).sum().backward()
        found.append((logits, gradients(model)))
    assert_close(found[1][0], found[0][0], atol=1e-4)
    assert_same_gradients(found[1][1], found[0][1], rtol=1e-4)


def test_token_types_and_hidden_states():
    stock, fast = both("bert")
    types = TYPES[:4]
    with torch.inference_mode():
        expected = stock(**PADDED, token_type_ids=types, output_hidden_states=True)
        actual = fast(**flattened(), token_type_ids=types[REAL][None], output_hidden_states=True)
    for result, wanted in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_close(result[0], wanted[REAL], atol=2e-5)


def test_embeds():
    stock, fast = both()
    embeds = stock.embeddings.word_embeddings(PADDED["input_ids"]).detach()
    batch = {**flattened(), "input_ids": None, "inputs_embeds": embeds[REAL][None]}
    with torch.inference_mode():
        assert_close(fast(**batch).pooler_output, stock(**PADDED).pooler_output, atol=2e-5)


def test_one_sequence_with_positions_of_its_own_is_one():
    """Positions that do not count within sequences start none."""
    stock, fast = both("bert")
    for positions in (torch.arange(COLUMNS).flip(0), torch.arange(COLUMNS) + 3, torch.tensor([0, 1, 2, 4, 5, 6, 1, 2])):
        batch = {"input_ids": ROWS[:1, : len(positions)], "position_ids": positions[None]}
        with torch.inference_mode():
            expected, actual = stock(**batch), fast(**batch)
        assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=2e-5)


TOTAL = int(MASK.sum())


def ids(columns):
    return torch.arange(columns)[None].clamp(4, 99)


EMBEDS = torch.zeros(2, 3, 31)
UNFIT = {
    "list": ({"input_ids": [[5, 6]]}, "input_ids is of type list, but must be a tensor: pass return_tensors='pt'"),
    "batch": ({"input_ids": {"input_ids": ids(3)}}, r"input_ids is of type dict; call model\(\*\*batch\)"),
    "floats": ({"input_ids": ids(3).float()}, "input_ids has shape .* dtype torch.float32; it must hold integers"),
    "features": ({"inputs_embeds": EMBEDS}, r"inputs_embeds has shape \(2, 3, 31\) .*hidden_size=32"),
    "positions": (
        {"input_ids": ids(3), "position_ids": torch.arange(3)},
        r"position_ids has shape \(3,\) .* of shape \(1, 3\) like",
    ),
    "float positions": ({"input_ids": ids(3), "position_ids": torch.rand(1, 3)}, "position_ids has .*torch.float32"),
    "types": (
        {"input_ids": ids(3), "token_type_ids": torch.zeros(1, 2).long()},
        r"token_type_ids has shape \(1, 2\) .* of shape \(1, 3\) like",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), UNFIT.values(), ids=UNFIT)
def test_what_no_model_takes(arguments, message):
    with pytest.raises(ValueError, match=message):
        both("bert")[1](**arguments)


@pytest.mark.parametrize("types", [torch.tensor([1, 0, 1]), torch.tensor([[0, 1, 1]], dtype=torch.int32)])
def test_token_types_of_one_row(types):
    stock, fast = both("bert")
    batch = {"input_ids": ids(6).view(2, 3), "token_type_ids": types}
    with torch.inference_mode():
        assert_close(fast(**batch).last_hidden_state, stock(**batch).last_hidden_state, atol=2e-5)


BAD = {
    "bounds": ({"cu_seq_lens_q": torch.tensor([0, 11, 18, 19, 22])}, "cu_seq_lens_q runs from 0 to 22.*to the 23"),
    "longest": ({"max_length_q": 9}, "max_length_q=9"),
    "list": ({"cu_seq_lens_q": [0, 23]}, "cu_seq_lens_q is of type list, but must be a tensor"),
    "text": ({"max_length_q": "11"}, "max_length_q is '11'; it must be an integer"),
    "missing": ({"max_length_q": None}, "max_length_q is missing"),
    "mask": ({"attention_mask": torch.ones(1, TOTAL)}, "with attention_mask"),
    "positions": ({"position_ids": flattened(1)["position_ids"]}, r"start at 1; .*0, or from 2.*_start=2"),
    "too long": ({"max_length_q": 600}, "max_length_q is 600, but this model has positions for 38 tokens"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        both()[1](**{**flattened(), **changes})


TOO_LARGE = {
    "input": (
        "bert",
        {"input_ids": ids(41)},
        r"longest row of input_ids is 41, .*40 tokens; truncate to max_length=40",
    ),
    "counted": ("roberta", {"input_ids": ids(39)}, "longest row of input_ids is 39, but .* 38 tokens"),
    "embeds": ("roberta", {"inputs_embeds": torch.zeros(1, 50, 32)}, "row of inputs_embeds is 50, but .* 38"),
    "positions": (
        "bert",
        {"input_ids": ids(3), "position_ids": torch.tensor([[0, 1, 40]])},
        r"\[0, 2\] is 40.*40 rows",
    ),
    "ids": ("bert", {"input_ids": torch.tensor([[5, 100]])}, r"input_ids\[0, 1\] is 100, outside \[0, 100\); check"),
    "types": (
        "bert",
        {"input_ids": ids(2), "token_type_ids": torch.tensor([[2, 0]])},
        "token_type_ids.* is 2, .*size is 2",
    ),
}


@pytest.mark.parametrize(("family", "arguments", "message"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_too_large_values_are_named(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        both(family)[1](**arguments)


def test_padding_does_not_count_where_positions_count_tokens():
    """More columns than positions are served, as by transformers."""
    stock, fast = both("roberta")
    batch = {"input_ids": torch.nn.functional.pad(ids(38), (0, 9), value=1)}
    batch["attention_mask"] = (batch["input_ids"] != 1).long()
    with torch.inference_mode():
        assert_close(fast(**batch).pooler_output, stock(**batch).pooler_output, atol=2e-5)


def test_a_head_around_an_encoder_that_was_passed_alone_runs():
    head = make(model_class=transformers.XLMRobertaForSequenceClassification)
    expected = head(**PADDED).logits
    erniem_fast.optimize(head.roberta)
    assert_close(head(**PADDED).logits, expected, atol=1e-4)
