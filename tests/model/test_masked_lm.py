"""ErnieMForMaskedLM beside XLMRobertaForMaskedLM with the same weights, and the loss over the vocabulary."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, XLMRobertaConfig, XLMRobertaForMaskedLM, pipeline

from bench.peers import xlm_roberta
from erniem_fast import ErnieMForMaskedLM, ErnieMForSequenceClassification, ErnieMTokenizer, vocabulary_loss
from erniem_fast.vocabulary_loss import vocabulary_losses
from tests.golden import cases
from tests.model.tiny import (
    ATOL,
    COLUMNS,
    IDS,
    MASK,
    REAL,
    RIGHT,
    ROWS,
    Calls,
    assert_close,
    assert_same_gradients,
    flattened,
    gradients,
    load,
    make_ids,
)

WORDS, PREFIX = cases.VOCABULARY, "ernie_m."


def make_labels(ids):
    """About every third token is to be predicted."""
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.3
    return ids.masked_fill(~chosen, -100)


def load_head():
    """With a bias, which is zero in a new head."""
    model = load(ErnieMForMaskedLM)
    with torch.no_grad():
        model.lm_head.bias.normal_(generator=torch.Generator().manual_seed(5))
    return model


def xlm_roberta_of(model):
    fields = model.config.to_dict().items()
    kept = {name: value for name, value in fields if name in XLMRobertaConfig.__dataclass_fields__}
    peer = XLMRobertaForMaskedLM(XLMRobertaConfig(**{**kept, "model_type": "xlm-roberta", "type_vocab_size": 1}))
    state = model.state_dict()
    encoder = {name.removeprefix(PREFIX): each for name, each in state.items() if name.startswith(PREFIX)}
    remapped = {f"roberta.{name}": each for name, each in xlm_roberta.remap(encoder).items() if "pooler" not in name}
    head = {name: each for name, each in state.items() if name.startswith("lm_head.")}
    peer.load_state_dict({**remapped, **head})
    return peer.eval()


def test_same_as_xlm_roberta():
    """Logits at real tokens, zeros at padding; the loss; and the gradients of the tied table and the head."""
    model, ids = load_head(), make_ids(RIGHT)
    peer, labels = xlm_roberta_of(model), make_labels(ids).masked_fill(RIGHT == 0, -100)
    batch = {"input_ids": ids, "attention_mask": RIGHT}
    logits = model(**batch).logits
    assert_close(logits[RIGHT.bool()], peer(**batch).logits[RIGHT.bool()])
    assert not logits[RIGHT == 0].any()
    found, expected = model(**batch, labels=labels), peer(**batch, labels=labels)
    assert_close(found.loss, expected.loss)
    assert_close(found.logits, expected.logits[labels != -100])
    found.loss.backward()
    expected.loss.backward()
    ours, theirs = gradients(model), gradients(peer)
    table = theirs.pop("lm_head.decoder.weight")  # the first of the table's names there
    head = {name: grad for name, grad in theirs.items() if name.startswith("lm_head")}
    assert len(head) == 5
    found = {name: ours[name] for name in head} | {"table": ours["ernie_m.embeddings.word_embeddings.weight"]}
    assert_same_gradients(found, head | {"table": table})


def test_padding_and_layouts(packed):
    """Labels at padding do not count in the packed layout, and every real token's logits are the same."""
    model, labels = load_head(), make_labels(IDS)
    found = model(IDS, attention_mask=MASK, labels=labels)
    logits = model(IDS, attention_mask=MASK).logits
    assert logits.shape == (ROWS, COLUMNS, WORDS)
    assert bool(logits[~REAL].any()) is not packed
    counted = labels.masked_fill(~REAL, -100) if packed else labels
    assert_close(found.loss, cross_entropy(logits.flatten(0, 1), counted.flatten()))


def test_packed_input_and_a_divisor_of_the_callers():
    model, labels = load_head().train(), make_labels(make_ids(RIGHT))
    packed = flattened(RIGHT, labels)
    labels = labels.masked_fill(RIGHT == 0, -100)
    expected = model(make_ids(RIGHT), attention_mask=RIGHT, labels=labels)
    packed["labels"] = labels[RIGHT.bool()][None]
    found = model(**packed)
    assert found.logits is None
    assert_close(found.loss, expected.loss)
    count = int((labels != -100).sum())
    for items in (2 * count, torch.tensor(2 * count)):
        assert_close(model(**packed, num_items_in_batch=items).loss, found.loss / 2)


def test_every_parameter_gets_a_gradient():
    """As `DistributedDataParallel` wants it, also of a batch in which no word is to be predicted: its loss is 0."""
    model = load_head().train()
    for labels, learns in ((make_labels(IDS), True), (torch.full_like(IDS, -100), False)):
        model.zero_grad()
        loss = model(IDS, attention_mask=MASK, labels=labels).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert bool(loss > 0) is learns
        loss = model(IDS, attention_mask=MASK, labels=labels, num_items_in_batch=int(learns)).loss
        assert bool(loss > 0) is learns


def test_a_table_of_its_own(tmp_path):
    """The head's bias is one parameter still, with a gradient, and is saved and grows."""
    model = load(ErnieMForMaskedLM, tie_word_embeddings=False).train()
    with torch.no_grad():
        model.lm_head.bias.normal_(generator=torch.Generator().manual_seed(5))
    model.resize_token_embeddings(WORDS + 7)
    model(IDS, attention_mask=MASK, labels=make_labels(IDS)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    head = model.lm_head
    assert head.bias is head.decoder.bias
    assert head.decoder.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = ErnieMForMaskedLM.from_pretrained(tmp_path)
    assert again.lm_head.bias is again.lm_head.decoder.bias
    assert torch.equal(again.eval()(IDS[:1]).logits, model.eval()(IDS[:1]).logits)


def test_wrong_labels():
    model = load_head()
    with pytest.raises(ValueError, match=rf"labels\[0, 1\] is {WORDS}, outside \[0, {WORDS}\)"):
        model(IDS[:1], labels=IDS[:1].index_fill(1, torch.tensor([1]), WORDS))
    with pytest.raises(ValueError, match="labels has shape"):
        model(IDS, labels=IDS[:, :2])


def test_saved_and_resized(tmp_path):
    """The pooler of the checkpoint stays, the table and the bias are saved once and grow together."""
    model = load_head()
    model.resize_token_embeddings(WORDS + 7)
    head = model.lm_head
    assert head.bias is head.decoder.bias
    assert head.decoder.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS[:1]).logits, model(IDS[:1]).logits)
    classifier = ErnieMForSequenceClassification.from_pretrained(tmp_path)
    expected = load().pooler.state_dict()
    assert all(torch.equal(each, expected[name]) for name, each in classifier.ernie_m.pooler.state_dict().items())


def test_fill_mask():
    """The pipeline proposes the words with the largest logits, of texts of unequal lengths in one batch."""
    tokenizer, model = ErnieMTokenizer.from_pretrained(cases.TINY), load_head()
    texts = ["Ihr [MASK] wurde geändert.", "Log [MASK]"]
    found = pipeline("fill-mask", model=model, tokenizer=tokenizer)(texts, batch_size=2, top_k=3)
    for text, proposals in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        place = ids[0].tolist().index(tokenizer.mask_token_id)
        probabilities = model(ids).logits[0, place].softmax(0)
        assert [each["token"] for each in proposals] == probabilities.topk(3).indices.tolist()
        assert proposals[0]["score"] == pytest.approx(probabilities.max().item(), abs=ATOL)


def test_a_replaced_decoder_is_called():
    model = load_head()
    expected = model(IDS, attention_mask=MASK, labels=make_labels(IDS))
    model.lm_head.decoder.register_forward_hook(lambda module, arguments, logits: 2 * logits)
    found = model(IDS, attention_mask=MASK, labels=make_labels(IDS))
    assert_close(found.logits, 2 * expected.logits)
    counted = make_labels(IDS)[REAL & (make_labels(IDS) != -100)]
    assert_close(found.loss, cross_entropy(found.logits, counted))


def operands(dtype, tokens=37, features=24, words=101):
    generator = torch.Generator().manual_seed(6)
    draw = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((tokens, features), (words, features))]
    bias = torch.randn(words, generator=generator, dtype=dtype)
    leaves = [each.requires_grad_() for each in (*draw, bias)]
    return leaves, torch.randint(0, words, (tokens,), generator=generator)


@pytest.mark.parametrize("at_once", [101, 505, 10**6], ids=["one token", "five tokens", "all"])
def test_losses_and_gradients(at_once, monkeypatch):
    """In float64 those of PyTorch, whatever the chunks; a factor of the loss is one of the gradients."""
    monkeypatch.setattr(vocabulary_loss, "LOGITS_AT_ONCE", at_once)
    leaves, labels = operands(torch.float64)
    hidden, weight, bias = leaves
    total, losses = vocabulary_losses(*leaves, labels)
    expected = cross_entropy(hidden @ weight.T + bias, labels, reduction="none")
    assert_close(losses, expected.detach(), atol=1e-13)
    assert_close(total, expected.sum(), atol=1e-11)
    assert not losses.requires_grad
    found = torch.autograd.grad(total / 3, leaves)
    for one, other in zip(found, torch.autograd.grad(expected.sum() / 3, leaves), strict=True):
        assert_close(one, other, atol=1e-12)


def test_only_the_gradients_that_are_needed():
    (hidden, weight, bias), labels = operands(torch.float64)
    expected = torch.autograd.grad(vocabulary_losses(hidden, weight, bias, labels)[0], hidden)[0]
    total, _ = vocabulary_losses(hidden, weight.detach(), bias.detach(), labels)
    assert torch.equal(torch.autograd.grad(total, hidden)[0], expected)
    with torch.no_grad():
        assert not vocabulary_losses(hidden, weight, bias, labels)[0].requires_grad


def test_a_second_backward_is_refused():
    leaves, labels = operands(torch.float32)
    total, _ = vocabulary_losses(*leaves, labels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated a second time"):
        total.backward()


def test_losses_under_autocast():
    """Gradients in the leaves' dtype, no further from float64 than PyTorch's own under autocast, up to a quarter."""
    leaves, labels = operands(torch.float32, tokens=200, features=64, words=300)
    wide = [each.detach().double().requires_grad_() for each in leaves]
    true = torch.autograd.grad(vocabulary_losses(*wide, labels)[0], wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = vocabulary_losses(*leaves, labels)
        stock = cross_entropy(leaves[0] @ leaves[1].T + leaves[2], labels, reduction="sum")
    for found, other, right in zip(*(torch.autograd.grad(each, leaves) for each in (total, stock)), true, strict=True):
        assert found.dtype == torch.float32
        assert (found - right).norm() <= 1.25 * (other - right).norm()


def test_logits_are_never_all_in_memory(monkeypatch):
    """No tensor of a training step holds more of them than a chunk."""
    monkeypatch.setattr(vocabulary_loss, "LOGITS_AT_ONCE", 8 * WORDS)
    model = load_head().train()
    ids = torch.randint(4, WORDS, (8, 100), generator=torch.Generator().manual_seed(7))
    with Calls() as calls:
        model(ids, labels=make_labels(ids)).loss.backward()
    logits = [shape for shape in calls.shapes if WORDS in shape and cases.HIDDEN not in shape]
    assert max(torch.Size(shape).numel() for shape in logits) == 8 * WORDS
