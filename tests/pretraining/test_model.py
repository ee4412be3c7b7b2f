"""ErnieMForPreTraining: losses of mixed objectives, CAMLM without leaks, BTMLM's two steps, languages."""

from random import Random

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForPreTraining

from erniem_fast import ErnieMForMaskedLM, ErnieMModel
from erniem_fast.pretraining import BTMLM, CAMLM, MMLM, ErnieMForPreTraining, pack
from erniem_fast.pretraining.structure import Structure, encode
from tests.golden import cases
from tests.model.tiny import assert_close, gradients
from tests.pretraining.parallel import LANGUAGES, PAIRS, SENTENCES, load, objectives

RECORDS = {"mmlm": SENTENCES, "tlm": PAIRS, "camlm": PAIRS, "btmlm": SENTENCES}


def losses_of(model, batch):
    return (model(**batch).loss_sums, model(**batch).label_counts)


def test_mmlm_and_tlm_are_masked_language_modelling(tokenizer):
    """Each sample's losses are those of ErnieMForMaskedLM, and the loss is their mean over all tokens."""
    model, plain = load(), ErnieMForMaskedLM.from_pretrained(cases.TINY, **cases.NO_DROPOUT).eval()
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    sums, samples = torch.zeros(4), []
    for index, (objective, records) in enumerate(zip(objectives(tokenizer)[:2], (SENTENCES, PAIRS), strict=True)):
        for record in records[:5]:
            (sample,) = objective.samples(record, Random(3))
            ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
            sums[index] += plain(ids, labels=labels).loss.item() * int((labels != -100).sum())
            samples.append(sample)
    found = model(**pack(samples))
    assert_close(found.loss_sums, sums, atol=1e-3)
    assert found.label_counts.sum() == sum(label != -100 for sample in samples for label in sample.labels)
    assert_close(found.loss, sums.sum() / found.label_counts.sum())


def camlm_sample(tokenizer, pair=PAIRS[3]):
    (sample,) = CAMLM(tokenizer=tokenizer).samples(pair, Random(2))
    half = len(tokenizer(pair.source)["input_ids"])
    hidden = [label != -100 for label in sample.labels]
    sides = [int(position >= half) for position in sample.position_ids]
    return sample, sides, hidden


def hidden_states(model, batch, embeds):
    structure = Structure(*(batch[name] for name in ("position_ids", "cu_seq_lens_q", "max_length_q", "key_ranges")))
    return encode(model.ernie_m, embeds, structure)


def test_camlm_shows_no_token_of_the_own_side(tokenizer):
    """Another word there leaves the predictions the same to the bit; another word on the other side changes them."""
    model = load()
    sample, sides, hidden = camlm_sample(tokenizer)
    batch = pack([sample])

    def predict(ids):
        with torch.no_grad():
            states = hidden_states(model, batch, model.get_input_embeddings()(ids))
            return model.lm_head(states)

    expected = predict(batch["input_ids"])
    for place, (side, masked) in enumerate(zip(sides, hidden, strict=True)):
        if masked:
            continue
        ids = batch["input_ids"].clone()
        ids[0, place] = 5 if ids[0, place] != 5 else 6
        found = predict(ids)
        for other, (own, chosen) in enumerate(zip(sides, hidden, strict=True)):
            if chosen:
                assert torch.equal(found[other], expected[other]) is (own == side)


def test_camlm_by_gradients(tokenizer):
    """Those of a side's predictions by its own unmasked tokens are zero, through all layers, by the others' not."""
    model = load()
    sample, sides, hidden = camlm_sample(tokenizer)
    batch, sides, hidden = pack([sample]), torch.tensor(sides), torch.tensor(hidden)
    for side in (0, 1):
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        states = hidden_states(model, batch, embeds)
        cross_entropy(
            model.lm_head(states[hidden & (sides == side)]), batch["labels"][0, hidden & (sides == side)]
        ).backward()
        size = embeds.grad[0].abs().amax(1)
        assert not size[~hidden & (sides == side)].any()
        assert (size[~hidden & (sides != side)] > 0).all()
        assert not size[hidden & (sides != side)].any()


def test_samples_do_not_see_each_other(tokenizer):
    """Packed together or alone, in any order, their losses are the same."""
    model = load(LANGUAGES)
    with torch.no_grad():
        model.language_embeddings.weight.normal_(generator=torch.Generator().manual_seed(1))
    samples = []
    for objective in objectives(tokenizer, languages=LANGUAGES):
        records = RECORDS[objective.name]
        samples += [each for record in records[:4] for each in objective.samples(record, Random(1))]
    for sample in samples:
        sample.temperature = 0.0
    sums, counts = losses_of(model, pack(samples))
    assert (counts > 0).all()
    alone = [losses_of(model, pack([sample])) for sample in samples]
    assert_close(sum(each for each, _ in alone), sums, atol=2e-3)
    assert torch.equal(sum(each for _, each in alone), counts)
    assert_close(losses_of(model, pack(samples[::-1]))[0], sums, atol=2e-3)


def test_every_parameter_gets_a_gradient(tokenizer):
    """As `DistributedDataParallel` wants it, whatever the objectives of a batch."""
    model = load(LANGUAGES).train()
    for objective in objectives(tokenizer, languages=LANGUAGES):
        model.zero_grad()
        loss = model(**objective(RECORDS[objective.name][:3], seed=1)).loss
        loss.backward()
        assert gradients(model).keys() == {name for name, _ in model.named_parameters()}
        assert model(**objective(RECORDS[objective.name][:3], seed=1), num_items_in_batch=1).loss > 2 * loss


def btmlm_batch(tokenizer, temperature, records=SENTENCES[:4]):
    return BTMLM(tokenizer=tokenizer, languages=LANGUAGES, temperature=temperature)(records, seed=1)


def test_pseudo_tokens(tokenizer):
    """The likeliest words at placeholders behind the whole text, which does not see them; the loss reads them."""
    model = load(LANGUAGES)
    with torch.no_grad():
        model.language_embeddings.weight.normal_(generator=torch.Generator().manual_seed(1))
    (sample,) = BTMLM(tokenizer=tokenizer, languages=LANGUAGES, temperature=0.0).samples(SENTENCES[3], Random(1))
    batch, source, total = pack([sample]), sample.source_length, len(sample)
    whole = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    ids = batch["language_ids"]
    embeds = model.get_input_embeddings()(whole) + model.language_embeddings(ids.clamp(min=0)) * (ids >= 0)[..., None]
    mask = torch.ones(1, total, total)
    mask[:, :source, source:] = 0
    with torch.no_grad():
        logits = model.lm_head(model.ernie_m(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[0])
        logits[:, tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", "[PAD]", "[MASK]"])] = -torch.inf
        filled = batch["input_ids"].clone()
        filled[0, sample.pseudo] = logits[sample.pseudo].argmax(1)
        hidden = model.ernie_m(filled).last_hidden_state
        counted = batch["labels"] != -100
        expected = cross_entropy(model.lm_head(hidden[counted]), batch["labels"][counted])
    assert_close(model(**batch).loss, expected)


def test_batches_that_happen_to_have_no_pseudo_tokens(tokenizer):
    """The model runs twice on them as on others, since shards of it on other processes wait for it."""
    model, calls = load(), []
    samples = [each for record in PAIRS[:4] for each in CAMLM(tokenizer=tokenizer).samples(record, Random(1))]
    expected = model(**pack(samples)).loss
    model.ernie_m.encoder.layers[0].register_forward_hook(lambda *arguments: calls.append(1))
    assert_close(model(**pack(samples, with_pseudo_tokens=True)).loss, expected)
    assert len(calls) == 2


def test_pseudo_tokens_are_drawn(tokenizer):
    """From torch's generator; without gradient and dropout, and the modes of all modules stay."""
    model = load(LANGUAGES).train()
    model.ernie_m.encoder.layers[0].eval()
    seen = set()
    model.lm_head.register_forward_hook(
        lambda module, arguments, logits: seen.add((module.training, torch.is_grad_enabled()))
    )

    def loss(temperature, seed):
        torch.manual_seed(seed)
        return model(**btmlm_batch(tokenizer, temperature)).loss.item()

    assert loss(0.0, 1) == loss(0.0, 2) == loss(1e-5, 1)
    assert loss(1.0, 1) == loss(1.0, 1) != loss(1.0, 2)
    assert seen == {(False, False)}
    modes = {name: module.training for name, module in model.named_modules()}
    assert not any(training for name, training in modes.items() if "layers.0" in name)
    assert all(training for name, training in modes.items() if "layers.0" not in name)


def test_languages(tokenizer, tmp_path):
    """They are zeros at first, kept by the model's checkpoint, and gone from the plain one's."""
    model, plain = load(LANGUAGES), load()
    plain.load_state_dict(model.state_dict(), strict=False)
    with_names, without = (CAMLM(tokenizer=tokenizer, **each)(PAIRS, seed=1) for each in ({"languages": LANGUAGES}, {}))
    assert_close(model(**with_names).loss, plain(**without).loss)
    with torch.no_grad():
        model.language_embeddings.weight.normal_(generator=torch.Generator().manual_seed(1))
    assert abs(model(**with_names).loss - plain(**without).loss) > 0.01
    model.save_pretrained(tmp_path / "whole")
    again = ErnieMForPreTraining.from_pretrained(tmp_path / "whole").eval()
    assert again.config.languages == LANGUAGES
    assert torch.equal(again(**with_names).loss, model(**with_names).loss)
    model.without_languages().save_pretrained(tmp_path / "plain")
    exported, info = ErnieMForMaskedLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert not hasattr(exported.config, "languages")
    ids = without["input_ids"][:, :9]
    assert torch.equal(exported.eval()(ids).logits, model.without_languages()(ids).logits)
    assert torch.equal(ErnieMModel.from_pretrained(tmp_path / "whole").eval()(ids)[0], exported.ernie_m(ids)[0])
    with pytest.raises(ValueError, match="has no language embeddings"):
        plain(**with_names)
    with pytest.raises(ValueError, match=r"language_ids\[0, \d+\] is \d+, outside \[0, 2\); give the objectives"):
        load(["de", "fr"])(**with_names)
    with pytest.raises(ValueError, match="languages='de' must be a list of names"):
        load("de")


def test_languages_are_not_renamed(tmp_path):
    """A checkpoint's embeddings keep their names, and only a model that has dropped them takes others."""
    load(["de", "fr"]).save_pretrained(tmp_path / "two")
    for names in (["fr", "de"], ["de", "fr", "zh"]):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"are not the config's, \['de', 'fr'\], whose embeddings"):
                ErnieMForPreTraining.from_pretrained(tmp_path / "two", languages=names)
    assert ErnieMForPreTraining.from_pretrained(tmp_path / "two", languages=("de", "fr")).config.languages[0] == "de"
    ErnieMForPreTraining.from_pretrained(tmp_path / "two", languages=[]).save_pretrained(tmp_path / "none")
    again = ErnieMForPreTraining.from_pretrained(tmp_path / "none", languages=["fr", "de"])
    assert again.config.languages == ["fr", "de"]
    assert not again.language_embeddings.weight.any()


def test_words_of_another_vocabulary_are_refused(tokenizer):
    batch = MMLM(tokenizer=tokenizer)(SENTENCES[:2], seed=1)
    for name in ("input_ids", "labels"):
        for word in (cases.VOCABULARY, -1):
            wrong = batch[name].index_fill(1, torch.tensor([1]), word)
            with pytest.raises(ValueError, match=rf"{name}\[0, 1\] is {word}, outside .* tokenizer and model"):
                load()(**{**batch, name: wrong})


def test_a_step_without_labels_has_a_loss_of_zero(tokenizer):
    batch = MMLM(tokenizer=tokenizer)(SENTENCES[:2], seed=1)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for count in (None, 0, torch.tensor(0)):
        assert load()(**batch, num_items_in_batch=count).loss == 0


def test_by_transformers_auto_class():
    assert type(AutoModelForPreTraining.from_pretrained(cases.TINY)) is ErnieMForPreTraining
