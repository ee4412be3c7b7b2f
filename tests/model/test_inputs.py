"""What a forward takes and what it refuses: a bad input gets an error that names argument, value and remedy."""

import pytest
import torch
from torch import nn
from transformers import BatchEncoding, BertConfig, BertModel

import erniem_fast
from tests.golden import cases
from tests.model.tiny import assert_close, load

ROWS, COLUMNS, HEADS, HIDDEN, VOCABULARY, POSITIONS = 3, 8, 2, 64, cases.VOCABULARY, 512
MASK = (torch.arange(COLUMNS) < torch.tensor([[8], [5], [2]])).long()


@pytest.fixture
def model():
    return erniem_fast.ErnieMModel.from_pretrained(cases.TINY).eval()


def make_ids(rows=ROWS, columns=COLUMNS):
    return torch.randint(4, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(0))


def with_value(tensor, value, place=(1, 3)):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def cu_seqlens(*bounds, dtype=torch.int32):
    return torch.tensor(bounds, dtype=dtype)


def packed_input(bounds, longest, tokens=COLUMNS, **others):
    return {"input_ids": make_ids(1, tokens), "cu_seq_lens_q": bounds, "max_length_q": longest, **others}


IDS, EMBEDS = make_ids(), torch.zeros(ROWS, COLUMNS, HIDDEN)
PER_QUERY = MASK[:, None, :].expand(ROWS, COLUMNS, COLUMNS)

BAD_INPUTS = {
    "no input": ({}, "input_ids or inputs_embeds; neither"),
    "both inputs": ({"input_ids": IDS, "inputs_embeds": EMBEDS}, "input_ids or inputs_embeds; both"),
    "a batch in one": (
        {"input_ids": BatchEncoding({"input_ids": IDS})},
        r"input_ids is of type BatchEncoding; call model\(\*\*",
    ),
    "a list": (
        {"input_ids": IDS.tolist()},
        "input_ids is of type list, but must be a tensor: pass return_tensors='pt'",
    ),
    "a text": ({"input_ids": "text"}, "input_ids is of type str, but must be a tensor"),
    "a mask in place of positions": (
        {"input_ids": IDS, "position_ids": MASK},
        r"position_ids holds only 0 and 1 in 8 columns, as a mask does; pass the mask by its name, attention_mask=",
    ),
    "a full mask in place of positions": (
        {"input_ids": IDS, "position_ids": MASK[:1].expand(IDS.shape)},
        "attention_mask=",
    ),
    # Ids
    "id too large": ({"input_ids": with_value(IDS, VOCABULARY)}, r"input_ids\[1, 3\] is 2300, outside \[0, 2300\)"),
    "id negative": ({"input_ids": with_value(IDS, -7, (2, 0))}, r"input_ids\[2, 0\] is -7, outside \[0, 2300\)"),
    "id of 64 bits": ({"input_ids": with_value(IDS, 2**40)}, r"input_ids\[1, 3\] is 1099511627776"),
    "id with mask": (
        {"input_ids": with_value(IDS, 9999), "attention_mask": MASK},
        r"input_ids\[1, 3\] is 9999.*resize_token_embeddings",
    ),
    "id packed": (
        packed_input(cu_seqlens(0, 8), 8, input_ids=with_value(make_ids(1), 5000, (0, 6))),
        r"input_ids\[0, 6\] is 5000",
    ),
    "ids 1-D": ({"input_ids": IDS[0]}, r"input_ids has shape \(8,\).*input_ids\[None\]"),
    "ids 3-D": ({"input_ids": IDS[None]}, r"input_ids has shape \(1, 3, 8\)"),
    "ids float": ({"input_ids": IDS.float()}, r"input_ids .* torch\.float32; it must hold integers"),
    "ids bool": ({"input_ids": IDS > 0}, r"input_ids .* torch\.bool; it must hold integers"),
    "ids empty": ({"input_ids": IDS[:, :0]}, "no columns; a sequence needs at least one token"),
    "too long": ({"input_ids": make_ids(1, 513)}, "513, but .*512 tokens; truncate to max_length=512"),
    "too long but masked": (
        {"input_ids": make_ids(1, 600), "attention_mask": torch.ones(1, 600)},
        "600, but .*512 tokens",
    ),
    # Embeddings
    "embeds 2-D": ({"inputs_embeds": EMBEDS[0]}, r"inputs_embeds has shape \(8, 64\).*hidden_size=64"),
    "embeds of another size": ({"inputs_embeds": EMBEDS[..., :63]}, r"inputs_embeds has shape \(3, 8, 63\).*=64"),
    "embeds empty": ({"inputs_embeds": EMBEDS[:, :0]}, "no columns"),
    "embeds too long": ({"inputs_embeds": torch.zeros(1, 513, HIDDEN)}, "513, but .*512 tokens"),
    "embeds of integers": ({"inputs_embeds": EMBEDS.long()}, r"inputs_embeds .*torch\.int64"),
    # Masks
    "mask 1-D": ({"input_ids": IDS, "attention_mask": MASK[0]}, r"attention_mask has shape \(8,\).*\(3, 8\)"),
    "mask of fewer rows": ({"input_ids": IDS, "attention_mask": MASK[:2]}, r"attention_mask has shape \(2, 8\)"),
    "mask too short": ({"input_ids": IDS, "attention_mask": MASK[:, :7]}, r"attention_mask has shape \(3, 7\)"),
    "mask of embeds": ({"inputs_embeds": EMBEDS, "attention_mask": MASK[:, :7]}, r"attention_mask has shape \(3, 7\)"),
    "mask transposed": ({"input_ids": IDS, "attention_mask": MASK.t()}, r"attention_mask has shape \(8, 3\)"),
    "mask 3-D": (
        {"input_ids": IDS, "attention_mask": PER_QUERY[:, :5]},
        r"attention_mask has shape \(3, 5, 8\).*\(3, 8, 8\)",
    ),
    "mask 4-D": (
        {"input_ids": IDS, "attention_mask": PER_QUERY[:, None].expand(-1, 3, -1, -1)},
        r"attention_mask has shape \(3, 3, 8, 8\).*\(3, 1 or 2, 8, 8\)",
    ),
    "mask 5-D": ({"input_ids": IDS, "attention_mask": PER_QUERY[:, None, None]}, r"shape \(3, 1, 1, 8, 8\)"),
    # The shape is checked before the mask is copied, which fails for a mask without values.
    "mask too short, meta": (
        {"input_ids": IDS, "attention_mask": MASK[:, :7].to("meta")},
        r"attention_mask has shape \(3, 7\)",
    ),
    "mask 4-D, meta": (
        {"input_ids": IDS, "attention_mask": PER_QUERY[:, None].expand(-1, 3, -1, -1).to("meta")},
        r"attention_mask has shape \(3, 3, 8, 8\)",
    ),
    "mask of 2": ({"input_ids": IDS, "attention_mask": 2 * MASK}, "attention_mask .* other than 0 and 1"),
    "mask of halves": ({"input_ids": IDS, "attention_mask": MASK / 2}, "attention_mask .* other than 0 and 1"),
    "mask of -1": ({"input_ids": IDS, "attention_mask": -MASK}, "attention_mask .* other than 0 and 1"),
    "mask with NaN": (
        {"input_ids": IDS, "attention_mask": with_value(MASK.float(), float("nan"))},
        "attention_mask .* other than 0 and 1",
    ),
    # Taken as 0 and 1, a mask to add would mean its opposite.
    "mask 2-D to add": (
        {"input_ids": IDS, "attention_mask": (1 - MASK) * -1e9},
        "attention_mask .* other than 0 and 1",
    ),
    "mask 3-D to add": (
        {"input_ids": IDS, "attention_mask": (1 - PER_QUERY) * -1e9},
        "attention_mask .* other than 0 and 1",
    ),
    "mask 4-D of 2": (
        {"input_ids": IDS, "attention_mask": 2 * PER_QUERY[:, None]},
        "attention_mask .* other than 0 and 1",
    ),
    # Positions
    "positions too large": (
        {"input_ids": IDS, "position_ids": with_value(MASK, POSITIONS)},
        r"position_ids\[1, 3\] is 512, outside \[0, 512\).*count from 0",
    ),
    "positions negative": (
        {"input_ids": IDS, "position_ids": with_value(MASK, -1, (0, 7))},
        r"position_ids\[0, 7\] is -1, outside \[0, 512\)",
    ),
    "ids and positions": (
        {"input_ids": with_value(IDS, 2300), "position_ids": with_value(MASK, 512)},
        r"input_ids\[1, 3\] is 2300",
    ),
    "positions of embeds": (
        {"inputs_embeds": EMBEDS, "position_ids": with_value(MASK, 600)},
        r"position_ids\[1, 3\] is 600",
    ),
    "positions packed": (
        packed_input(cu_seqlens(0, 8), 8, position_ids=with_value(torch.arange(8)[None], POSITIONS, (0, 7))),
        r"position_ids\[0, 7\] is 512",
    ),
    # As collators count for RoBERTa, whose positions start behind the padding's.
    "positions packed from 2": (
        packed_input(cu_seqlens(0, 3, 8), 5, position_ids=torch.tensor([[2, 3, 4, 2, 3, 4, 5, 6]])),
        r"position_ids of packed input start at 2; positions count from 0 .*position_ids_start=0",
    ),
    "positions packed from 1": (
        packed_input(cu_seqlens(0, 3, 8), 5, position_ids=torch.tensor([[1, 2, 3, 1, 2, 3, 4, 5]])),
        "position_ids of packed input start at 1; ",
    ),
    "positions packed from 2, of 512 tokens": (
        packed_input(cu_seqlens(0, 512), 512, 512, position_ids=torch.arange(512)[None] + 2),
        "position_ids of packed input start at 2; ",
    ),
    "positions of several sequences in a row from 2": (
        {"input_ids": IDS[:1], "position_ids": torch.tensor([[2, 3, 4, 5, 6, 7, 2, 3]])},
        "position_ids start anew at column 6 of a single row",
    ),
    "positions of several sequences in a row": (
        {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])},
        r"position_ids start anew at column 3 of a single row.*return_flash_attn_kwargs=True.*attention_mask of ones",
    ),
    "positions of fewer rows": ({"input_ids": IDS, "position_ids": MASK[:2]}, r"position_ids has shape \(2, 8\)"),
    "positions too short": (
        {"input_ids": IDS, "position_ids": MASK[:, :7]},
        r"position_ids has shape \(3, 7\).*\(3, 8\)",
    ),
    "positions 3-D": ({"input_ids": IDS, "position_ids": MASK[None]}, r"position_ids has shape \(1, 3, 8\)"),
    "positions float": (
        {"input_ids": IDS, "position_ids": torch.arange(8)[None] + 0.5},
        r"position_ids .*torch\.float32",
    ),
    # Packed input
    "packed without bounds": (packed_input(None, 8), "both .*cu_seq_lens_q is missing"),
    "packed without longest": (packed_input(cu_seqlens(0, 8), None), "both .*max_length_q is missing"),
    "packed with mask": (packed_input(cu_seqlens(0, 8), 8, attention_mask=MASK[:1]), "with attention_mask"),
    "packed with mask, meta": (
        packed_input(cu_seqlens(0, 8), 8, attention_mask=MASK[:1].to("meta")),
        "with attention_mask",
    ),
    "packed rows": (packed_input(cu_seqlens(0, 24), 8, input_ids=IDS), "one row .*3 rows came"),
    "packed from 1": (packed_input(cu_seqlens(1, 8), 8), "cu_seq_lens_q runs from 1 to 8.*rise from 0 to the 8"),
    "packed to 7": (packed_input(cu_seqlens(0, 4, 7), 8), "cu_seq_lens_q runs from 0 to 7.*to the 8 tokens"),
    "packed to 9": (packed_input(cu_seqlens(0, 4, 9), 8), "cu_seq_lens_q runs from 0 to 9.*to the 8 tokens"),
    "packed falling": (packed_input(cu_seqlens(0, 5, 3, 8), 8), "sequences of -2 to 5 tokens; it must rise"),
    "packed longer": (packed_input(cu_seqlens(0, 6, 8), 5), "sequences of 2 to 6 .*max_length_q=5"),
    "packed too long": (packed_input(cu_seqlens(0, 600), 600, 600), "max_length_q is 600.*512 tokens"),
    "packed sequence too long": (packed_input(cu_seqlens(0, 600), 512, 600), "of 600 to 600 .*max_length_q=512"),
    "packed of nothing": (packed_input(cu_seqlens(), 8), r"cu_seq_lens_q .*\(0,\)"),
    "packed of one bound": (packed_input(cu_seqlens(0), 8), r"cu_seq_lens_q .*\(1,\)"),
    "packed of 2-D bounds": (packed_input(cu_seqlens(0, 8)[None], 8), r"cu_seq_lens_q .*\(1, 2\)"),
    "packed of floats": (packed_input(cu_seqlens(0.0, 3.5, 8.0, dtype=torch.float32), 8), r"cu_seq_lens_q .*float32"),
    # The rest
    "past_key_values": ({"input_ids": IDS, "past_key_values": ((EMBEDS,),)}, "past_key_values=tuple .*leave it out"),
    "use_cache": ({"input_ids": IDS, "use_cache": True}, "use_cache=True .*leave it out"),
    "head mask of 3": (
        {"input_ids": IDS, "head_mask": torch.ones(3)},
        r"head_mask has shape \(3,\).*\(2,\) or \(2, 2\)",
    ),
    "head mask of 3 layers": ({"input_ids": IDS, "head_mask": torch.ones(3, 2)}, r"head_mask has shape \(3, 2\)"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_a_bad_input_is_refused_by_name(arguments, message, model, packed):
    with pytest.raises(ValueError, match=message):
        model(**arguments)
    assert model(IDS).last_hidden_state.isfinite().all(), "the model must be left in order"


def as_ids(dtype):
    return {"input_ids": IDS.clamp(max=100).to(dtype)}, {"input_ids": IDS.clamp(max=100)}


def as_mask(dtype):
    return {"input_ids": IDS, "attention_mask": MASK.to(dtype)}, {"input_ids": IDS, "attention_mask": MASK}


def as_positions(position_ids):
    return {"input_ids": IDS, "position_ids": position_ids}, {"input_ids": IDS}


DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
# What must not be refused, and the plainer input whose result it has.
GOOD_INPUTS = {
    **{f"ids {dtype}": as_ids(dtype) for dtype in [*DTYPES, *UNSIGNED]},
    **{
        f"mask {dtype}": as_mask(dtype) for dtype in [*DTYPES, torch.bool, torch.float16, torch.bfloat16, torch.float64]
    },
    "mask of one row for all": (
        {"input_ids": IDS, "attention_mask": MASK[1:2]},
        {"input_ids": IDS, "attention_mask": MASK[1:2].repeat(ROWS, 1)},
    ),
    "positions of one row for all": as_positions(torch.arange(COLUMNS)[None]),
    **{
        f"positions {dtype}": as_positions(torch.arange(COLUMNS).to(dtype)[None].expand(ROWS, -1))
        for dtype in [*DTYPES, *UNSIGNED]
    },
    # All differ, so that they are no positions of several sequences, although the least does not come first.
    "positions falling": (
        {"input_ids": IDS[:1], "position_ids": torch.arange(COLUMNS).flip(0)[None]},
        {
            "input_ids": IDS[:1],
            "position_ids": torch.arange(COLUMNS).flip(0)[None],
            "attention_mask": torch.ones(1, COLUMNS),
        },
    ),
    "ids not contiguous": ({"input_ids": IDS.t().contiguous().t()}, {"input_ids": IDS}),
    "embeds not contiguous": (
        {
            "inputs_embeds": torch.sin(torch.arange(ROWS * COLUMNS * HIDDEN))
            .view(HIDDEN, COLUMNS, ROWS)
            .permute(2, 1, 0)
        },
        {
            "inputs_embeds": torch.sin(torch.arange(ROWS * COLUMNS * HIDDEN))
            .view(HIDDEN, COLUMNS, ROWS)
            .permute(2, 1, 0)
            .contiguous()
        },
    ),
    "cu_seqlens int64": (
        packed_input(cu_seqlens(0, 3, 8, dtype=torch.int64), 5),
        packed_input(cu_seqlens(0, 3, 8), 5),
    ),
    "a packed window that goes on": (
        packed_input(cu_seqlens(0, 3, 8), 5, position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])),
        packed_input(cu_seqlens(0, 3, 8), 5, position_ids=torch.arange(8, dtype=torch.int32)[None]),
    ),
    "a loose max_length_q": (packed_input(cu_seqlens(0, 3, 8), 512), packed_input(cu_seqlens(0, 3, 8), 5)),
    "the other collator's arguments": (
        packed_input(cu_seqlens(0, 3, 8), 5, cu_seq_lens_k=cu_seqlens(0, 3, 8), max_length_k=5),
        packed_input(cu_seqlens(0, 3, 8), 5),
    ),
    "use_cache=False": ({"input_ids": IDS, "use_cache": False}, {"input_ids": IDS}),
    "head mask of bools": (
        {"input_ids": IDS, "head_mask": torch.tensor([True, False])},
        {"input_ids": IDS, "head_mask": torch.tensor([1.0, 0.0])},
    ),
}


@pytest.mark.parametrize(("arguments", "plainer"), GOOD_INPUTS.values(), ids=GOOD_INPUTS)
def test_a_good_input_is_not_refused(arguments, plainer, model, packed):
    outputs, expected = model(**arguments), model(**plainer)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(outputs.pooler_output, expected.pooler_output)


def test_the_last_row_of_each_table_can_be_used(model, packed):
    """The largest id, the largest position, and 512 tokens; the gradient says which rows were read."""
    ids = with_value(make_ids(1, POSITIONS).clamp(max=VOCABULARY - 2), VOCABULARY - 1, (0, 5))
    model(ids).last_hidden_state.square().sum().backward()
    for table in (model.embeddings.word_embeddings, model.embeddings.position_embeddings):
        assert table.weight.grad[-1].abs().sum() > 0
    assert not model.embeddings.position_embeddings.weight.grad[:2].any(), "the first position is row 2"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float16, torch.float32])
def test_embeddings_may_have_another_dtype(dtype, weights, model, packed):
    """They take that of the weights, as those of ids have."""
    model.to(weights)
    embeds = model.get_input_embeddings()(IDS).detach().to(dtype).requires_grad_()
    outputs = model(inputs_embeds=embeds, attention_mask=MASK).last_hidden_state
    assert outputs.dtype == weights
    expected = model(inputs_embeds=embeds.to(weights), attention_mask=MASK).last_hidden_state
    assert torch.equal(outputs, expected)
    outputs.float().square().sum().backward()
    assert embeds.grad.dtype == dtype
    assert embeds.grad.isfinite().all()
    assert embeds.grad.any()


def test_arguments_are_left_as_they_were(model, packed):
    """transformers 4.57.6 added 2 to `position_ids` at every call."""
    for arguments in (
        {"input_ids": IDS, "attention_mask": MASK, "position_ids": MASK.cumsum(1), "head_mask": torch.ones(HEADS)},
        {"inputs_embeds": EMBEDS, "attention_mask": PER_QUERY[:, None].float(), "position_ids": torch.arange(8)[None]},
        packed_input(cu_seqlens(0, 3, 8), 5, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])),
    ):
        given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
        first, second = (model(**arguments).last_hidden_state for _ in range(2))
        assert torch.equal(first, second)
        for name, value in given.items():
            assert torch.equal(arguments[name], value) if isinstance(value, torch.Tensor) else arguments[name] == value


def test_ids_are_held_to_the_table_that_is_there(model, packed):
    """Whether `set_input_embeddings` put in a larger or a smaller one than the config says."""
    model.set_input_embeddings(nn.Embedding(3000, HIDDEN))
    assert model(with_value(IDS, 2999)).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match=r"input_ids\[1, 3\] is 3000, outside \[0, 3000\)"):
        model(with_value(IDS, 3000))
    model.set_input_embeddings(nn.Embedding(10, HIDDEN))
    with pytest.raises(ValueError, match=r"input_ids\[1, 3\] is 10, outside \[0, 10\)"):
        model(with_value(IDS.clamp(max=9), 10))


def test_unknown_flags_and_values(model, monkeypatch):
    with monkeypatch.context() as environment:
        environment.setenv("ERNIEM_FAST_PACKIN", "0")
        with pytest.raises(ValueError, match=r"ERNIEM_FAST_PACKIN .*ERNIEM_FAST_PACKING"):
            model(IDS)
    for name, valid in (("PACKING", "1, 0"), ("ATTENTION", "auto, .*torch, .*reference"), ("VERIFY", "0, 1")):
        with monkeypatch.context() as environment:
            environment.setenv(f"ERNIEM_FAST_{name}", "maybe")
            with pytest.raises(ValueError, match=rf"ERNIEM_FAST_{name}='maybe' .*use one of {valid}"):
                model(IDS)
    with (
        pytest.raises(ValueError, match=r"attention='fast' .*use one of auto"),
        erniem_fast.use_kernels(attention="fast"),
    ):
        pass
    assert model(IDS).last_hidden_state.isfinite().all()


LABELS = torch.tensor([0, 2, 1])
# (class, its config, arguments, message)
BAD_HEAD_INPUTS = {
    "choices without a dimension": (
        "ErnieMForMultipleChoice",
        {"input_ids": IDS},
        r"\(rows, choices, columns\).*\(3, 8\)",
    ),
    "choices in a batch": (
        "ErnieMForMultipleChoice",
        {"input_ids": BatchEncoding({})},
        r"BatchEncoding; call model\(\*\*",
    ),
    "choices in a list": (
        "ErnieMForMultipleChoice",
        {"input_ids": [[[0, 5, 2]]]},
        "input_ids is of type list, but must be",
    ),
    "choices of nothing": ("ErnieMForMultipleChoice", {}, r"\(rows, choices, columns\).*nothing"),
    "choices with a plain mask": (
        "ErnieMForMultipleChoice",
        {"input_ids": IDS[None], "attention_mask": MASK},
        "attention_mask has shape",
    ),
    "choice out of range": (
        "ErnieMForMultipleChoice",
        {"input_ids": with_value(IDS, 2300)[None]},
        r"input_ids\[1, 3\] is 2300",
    ),
    "use_cache": ("ErnieMForSequenceClassification", {"input_ids": IDS, "use_cache": True}, "use_cache=True"),
    "cache": ("ErnieMForTokenClassification", {"input_ids": IDS, "past_key_values": ((EMBEDS,),)}, "past_key_values"),
    "no input": ("ErnieMForTokenClassification", {"labels": IDS}, "neither"),
    "span mask": (
        "ErnieMForQuestionAnswering",
        {"input_ids": IDS, "attention_mask": MASK[:2]},
        "attention_mask has shape",
    ),
    "too few labels": (
        "ErnieMForTokenClassification",
        {"input_ids": IDS, "labels": LABELS[:, None].expand(-1, 5)},
        r"labels has shape \(3, 5\).*\(3, 8\)",
    ),
    "class too large": (
        "ErnieMForSequenceClassification",
        {"input_ids": IDS, "labels": LABELS},
        r"labels\[1\] is 2, outside \[0, 2\); load the model with the num_labels that the data has.* -100",
    ),
    "class below zero": (
        "ErnieMForTokenClassification",
        {"input_ids": IDS, "labels": with_value(torch.ones_like(IDS), -1)},
        r"labels\[1, 3\] is -1, outside \[0, 2\); load",
    ),
    "choice that no row has": (
        "ErnieMForMultipleChoice",
        {"input_ids": IDS.expand(2, 3, 8), "labels": LABELS[1:] + 1},
        r"labels\[0\] is 3, outside \[0, 3\); count the choices",
    ),
    "too few starts": (
        "ErnieMForInformationExtraction",
        {"input_ids": IDS, "start_positions": torch.ones(3, 5), "end_positions": torch.ones(3, 8)},
        r"start_positions.*\(3, 5\)",
    ),
}


@pytest.mark.parametrize(("name", "arguments", "message"), BAD_HEAD_INPUTS.values(), ids=BAD_HEAD_INPUTS)
def test_a_bad_input_of_a_head_is_refused_by_name(name, arguments, message, packed):
    model = getattr(erniem_fast, name).from_pretrained(cases.TINY)
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_question_answering_has_two_scores():
    with pytest.raises(ValueError, match=r"num_labels=3; .*set it to 2"):
        erniem_fast.ErnieMForQuestionAnswering.from_pretrained(cases.TINY, num_labels=3)


def test_heads_to_prune_must_be_there(model):
    for heads, message in (
        ({2: [0]}, "layer 2; layers are 0 to 1"),
        ({-1: [0]}, "layer -1; layers are 0 to 1"),
        ({0: [1], 1: [2, 0]}, r"heads \[2\] of layer 1; heads are 0 to 1"),
        ({0: [0, 1]}, "layer 0 without heads; keep at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            model.prune_heads(heads)
    assert model.config.pruned_heads == {}, "a refused call must change nothing"
    model.prune_heads({0: [1]})
    with pytest.raises(ValueError, match="layer 0 without heads"):
        model.prune_heads({0: [0]})


def test_missing_files(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(OSError, match="missing"):
        erniem_fast.ErnieMModel.from_pretrained(missing)
    missing.mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors.*missing"):
        erniem_fast.ErnieMModel.from_pretrained(missing)
    (missing / "config.json").write_bytes((cases.TINY / "config.json").read_bytes())
    with pytest.raises(OSError, match=r"model\.safetensors.*missing"):
        erniem_fast.ErnieMForTokenClassification.from_pretrained(missing)
    with pytest.raises(ValueError, match=r"missing' holds no .*sentencepiece\.bpe\.model"):
        erniem_fast.ErnieMTokenizer.from_pretrained(missing)


def test_a_checkpoint_of_another_architecture(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    for name in ("ErnieMModel", *{name for name, _ in cases.HEADS.values()}):
        with pytest.raises(ValueError, match=r"model_type='bert'.*'ernie_m'.*AutoModel"):
            getattr(erniem_fast, name).from_pretrained(tmp_path)


def test_key_ranges():
    """As a mask per query, and only for packed input."""
    model, ids, bounds = load(), torch.arange(4, 13)[None], torch.tensor([0, 4, 9])
    ranges = torch.tensor([[0, 2], [0, 2], [0, 4], [2, 4], [0, 5], [1, 2], [4, 5], [0, 3], [2, 5]])
    found = model(ids, cu_seq_lens_q=bounds, max_length_q=5, key_ranges=ranges).last_hidden_state[0]
    for start, end in ((0, 4), (4, 9)):
        key = torch.arange(end - start)
        mask = (key >= ranges[start:end, :1]) & (key < ranges[start:end, 1:])
        assert_close(found[start:end], model(ids[:, start:end], attention_mask=mask[None]).last_hidden_state[0])
    with pytest.raises(ValueError, match="key_ranges need packed input"):
        model(ids, key_ranges=ranges)
    with pytest.raises(ValueError, match=r"key_ranges has shape \(8, 2\).*must hold integers of shape \(9, 2\)"):
        model(ids, cu_seq_lens_q=bounds, max_length_q=5, key_ranges=ranges[:8])
