"""Situations of adapters."""

import peft
import pytest
import torch
from torch import nn

from erniem_fast import ErnieMForSequenceClassification
from tests.model.tiny import assert_close, load
from tests.situations.truths import BATCH, IDS, MASK, ROWS


def with_random_adapters(model, config, name="default"):
    model = peft.get_peft_model(model, config, adapter_name=name)
    torch.manual_seed(11)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


TUNERS = {
    "all linears": peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"),
    "weights in size and direction": peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS", use_dora=True),
    "biases too": peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS", bias="all"),
    "rotations": peft.OFTConfig(target_modules=["linear1", "q_proj"], task_type="SEQ_CLS"),
    "reflections": peft.HRAConfig(target_modules=["out_proj", "linear2"], task_type="SEQ_CLS"),
    "shared random matrices": peft.VeraConfig(target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("config", TUNERS.values(), ids=TUNERS)
def test_adapters_are_saved_with_their_head_and_merged(config, tmp_path):
    base = load(ErnieMForSequenceClassification)
    untouched = base(**BATCH).logits
    model = with_random_adapters(base, config)
    adapted = model(**BATCH).logits.detach()
    assert (adapted - untouched).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    other = load(ErnieMForSequenceClassification)
    nn.init.zeros_(other.classifier.weight)  # which comes with the adapter
    again = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    assert_close(again(**BATCH).logits, adapted)
    assert_close(model.merge_and_unload()(**BATCH).logits, adapted)


def test_several_adapters_in_turn():
    def config():
        return peft.LoraConfig(target_modules=["v_proj", "linear2"])

    model = with_random_adapters(load(), config(), "first")
    model.add_adapter("second", config())
    model.eval()
    first = model(**BATCH).last_hidden_state
    model.set_adapter("second")
    assert_close(model(**BATCH).last_hidden_state, load()(**BATCH).last_hidden_state)
    model.set_adapter("first")
    model.merge_adapter()
    assert_close(model(**BATCH).last_hidden_state, first)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert_close(model(**BATCH).last_hidden_state, load()(**BATCH).last_hidden_state)


def test_learnt_prompts():
    """Embeddings in front of every row, as if they were the first tokens."""
    count = 3
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=count)
    model = with_random_adapters(load(), config)
    hidden = model(**BATCH).last_hidden_state
    plain, prompts = load(), model.get_prompt(batch_size=ROWS)
    embeds = torch.cat([prompts, plain.get_input_embeddings()(IDS)], 1)
    mask = torch.cat([torch.ones(ROWS, count, dtype=torch.long), MASK], 1)
    assert_close(hidden, plain(inputs_embeds=embeds, attention_mask=mask).last_hidden_state)
