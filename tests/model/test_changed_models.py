"""Models whose modules users have resized, replaced, hooked or pruned."""

import pytest
import torch
from torch import nn

from erniem_fast import (
    ErnieMConfig,
    ErnieMForInformationExtraction,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMModel,
)
from tests.golden import cases
from tests.model.tiny import (
    COLUMNS,
    EMPTY,
    HEADS,
    HIDDEN,
    IDS,
    MASK,
    PAD,
    REAL,
    ROWS,
    Calls,
    assert_close,
    assert_same_gradients,
    load,
    random_weights,
)


def test_resized_embeddings(model, tmp_path, packed):
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).last_hidden_state
        model.resize_token_embeddings(cases.VOCABULARY + 10)
        assert model.config.vocab_size == cases.VOCABULARY + 10
        assert torch.equal(model(IDS, attention_mask=MASK).last_hidden_state, expected)
    added = IDS.clone()
    added[0, 3] = cases.VOCABULARY + 9
    model(added, attention_mask=MASK).last_hidden_state.square().sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[-1].any()
    assert not gradient[-2].any()
    assert not gradient[PAD].any()
    model.save_pretrained(tmp_path)
    again = ErnieMModel.from_pretrained(tmp_path).eval()
    assert_close(again(added)[0], model(added)[0])
    model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=r"outside \[0, 100\)"):
        model(IDS)


class Doubled(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


def test_other_word_embeddings_are_used(model, packed):
    words = model.get_input_embeddings().weight
    expected = model(inputs_embeds=2 * nn.functional.embedding(IDS, words), attention_mask=MASK).last_hidden_state
    table = nn.Embedding.from_pretrained(2 * words.detach(), freeze=False)
    subclass = Doubled.from_pretrained(words.detach(), freeze=False)
    hooked = nn.Embedding.from_pretrained(words.detach(), freeze=False)
    hooked.register_forward_hook(lambda module, arguments, output: 2 * output)
    for embeddings in (table, subclass, hooked):
        model.set_input_embeddings(embeddings)
        assert model.get_input_embeddings() is embeddings
        hidden = model(IDS, attention_mask=MASK).last_hidden_state
        assert_close(hidden[REAL], expected[REAL])
        hidden.square().sum().backward()
        assert embeddings.weight.grad.any()


@pytest.mark.parametrize(
    "options",
    [{"padding_idx": None}, {"padding_idx": 7}, {"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}],
    ids=str,
)
def test_options_of_word_embeddings_are_obeyed(options, packed):
    """As they are where the module itself is called, because it is of a subclass."""
    words = load().get_input_embeddings().weight.detach()
    ids = IDS.clone()
    ids[0, :4], ids[0, 4:6] = 7, PAD
    found = []
    for embedding_class in (nn.Embedding, type("Subclass", (nn.Embedding,), {})):
        model = load()
        embeddings = embedding_class(*words.shape, _weight=words.clone(), **options)
        model.set_input_embeddings(embeddings)
        hidden = model(ids, attention_mask=MASK).last_hidden_state[REAL]
        (hidden * random_weights(hidden)).sum().backward()
        found.append((hidden, embeddings.weight.grad.is_sparse, {"words": embeddings.weight.grad.to_dense()}))
    assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert_same_gradients(found[0][2], found[1][2])


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_word_table_costs_no_gradient(frozen, packed):
    """Which would be as large as the table: what most of a multilingual model is."""
    model = load()
    table = model.get_input_embeddings().weight.requires_grad_(not frozen)
    hidden = model(IDS, attention_mask=MASK).last_hidden_state
    with Calls() as calls:
        hidden.square().sum().backward()
    assert (tuple(table.shape) in calls.shapes) == (not frozen)
    assert model.embeddings.position_embeddings.weight.grad.any()


def test_a_hooked_word_table_sees_rows_of_ids(packed):
    """As in other models, so that a hook may count on three dimensions of its output, as NEFTune's does."""
    model, expected = load(), load()(IDS, attention_mask=MASK)
    table, seen = model.get_input_embeddings(), []
    table.register_forward_hook(lambda module, arguments, output: seen.append((*arguments, output)))
    outputs = model(IDS, attention_mask=MASK)
    assert_close(outputs.last_hidden_state, expected.last_hidden_state)
    ((ids, output),) = seen
    computed = REAL | (torch.arange(REAL.shape[1]) == 0)  # the pooler reads the first column, whatever it is
    assert torch.equal(ids, IDS.masked_fill(~computed, model.config.pad_token_id) if packed else IDS)
    assert torch.equal(output, table.weight[ids])


@pytest.mark.parametrize("change", ["replaced", "hooked"])
def test_another_activation_is_obeyed(change, packed):
    """Also where a kernel would compute the one of the config."""
    model, expected = load(), load(hidden_act="relu")
    for layer in model.encoder.layers:
        if change == "replaced":
            layer.activation = torch.nn.ReLU()
        else:
            layer.activation.register_forward_hook(lambda module, arguments, output: arguments[0].relu())
    for rows in (slice(None), slice(1)):  # of one short row a layer is one native call
        outputs, others = (each(IDS[rows], attention_mask=MASK[rows]) for each in (model, expected))
        assert_close(outputs.last_hidden_state, others.last_hidden_state)


HOOKED = [
    "embeddings.position_embeddings",
    "embeddings.layer_norm",
    "encoder.layers.0.norm1",
    "encoder.layers.1.norm2",
    "encoder.layers.0.self_attn.self_attn.q_proj",
    "encoder.layers.0.self_attn.self_attn.v_proj",
    "encoder.layers.1.self_attn.out_proj",
    "encoder.layers.0.linear1",
    "encoder.layers.1.linear2",
    "pooler.dense",
]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_are_called_and_obeyed(name, packed):
    """Those of a forward, which doubles what a module gives, as doubled weights would; and those of a backward."""
    model, expected = load(), load()
    module, called = model.get_submodule(name), []
    module.register_forward_hook(lambda module, arguments, output: 2 * output)
    module.register_full_backward_hook(lambda module, grad_inputs, grad_outputs: called.append(module))
    with torch.no_grad():
        for parameter in expected.get_submodule(name).parameters():
            parameter.mul_(2)
    outputs, doubled = model(IDS, attention_mask=MASK), expected(IDS, attention_mask=MASK)
    assert_close(outputs.last_hidden_state[REAL], doubled.last_hidden_state[REAL])
    assert_close(outputs.pooler_output[:EMPTY], doubled.pooler_output[:EMPTY])
    outputs.pooler_output.sum().backward()
    assert called == [module]


def test_pruned_heads_survive_saving(tmp_path):
    for model_class in (ErnieMModel, ErnieMForTokenClassification):
        model = load(model_class)
        model.prune_heads({0: [1]})
        model.prune_heads({0: [1], 1: [0]})
        assert model.config.pruned_heads == {0: [1], 1: [0]}
        model.save_pretrained(tmp_path)
        again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        assert again.config.pruned_heads == {0: [1], 1: [0]}
        assert_close(again.eval()(IDS, attention_mask=MASK)[0], model(IDS, attention_mask=MASK)[0])
        assert again.base_model.encoder.layers[0].self_attn.self_attn.q_proj.weight.shape == (HIDDEN // HEADS, HIDDEN)


def test_masked_heads_equal_pruned_heads(packed):
    """Values, and the gradients of all that is left."""
    found = []
    for pruned in (True, False):
        model = load()
        head_mask = None if pruned else torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        if pruned:
            model.prune_heads({0: [1], 1: [0]})
        hidden = model(IDS, attention_mask=MASK, head_mask=head_mask).last_hidden_state[REAL]
        (hidden * random_weights(hidden)).sum().backward()
        found.append((hidden, model.encoder.layers[0].linear1.weight.grad))
    assert_close(found[0][0], found[1][0])
    assert_same_gradients({"linear1": found[0][1]}, {"linear1": found[1][1]})


def test_a_pruned_model_takes_a_head_mask():
    """Of the unpruned model's shape; it says nothing new of heads that are gone."""
    model = load()
    model.prune_heads({0: [0]})
    head_mask = torch.tensor([[0.0, 0.5], [0.25, 1.0]])
    outputs = model(IDS, attention_mask=MASK, head_mask=head_mask, output_attentions=True)
    expected = load()(IDS, attention_mask=MASK, head_mask=head_mask, output_attentions=True)
    assert_close(outputs.last_hidden_state[REAL], expected.last_hidden_state[REAL])
    assert_close(outputs.attentions[0], expected.attentions[0][:, 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pruning_keeps_the_dtype(dtype):
    model = load().to(dtype)
    model.prune_heads({0: [1]})
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(IDS, attention_mask=MASK).last_hidden_state.dtype == dtype


@pytest.mark.parametrize("attentions", [False, True])
def test_the_importance_of_heads(attentions, packed):
    """The gradient of a head mask, as pruning methods take it, against a difference."""
    model = load().double()

    def loss_at(mask):
        outputs = model(IDS, attention_mask=MASK, head_mask=mask, output_attentions=attentions)
        return outputs.last_hidden_state[REAL].pow(3).sum()

    mask = torch.ones(2, HEADS, dtype=torch.float64, requires_grad=True)
    loss_at(mask).backward()
    step = torch.zeros_like(mask)
    step[0, 1] = 1e-5
    with torch.no_grad():
        difference = (loss_at(mask + step) - loss_at(mask - step)) / 2e-5
    assert mask.grad[0, 1].item() == pytest.approx(difference.item(), rel=1e-6)


def test_subclasses_of_heads_keep_their_losses():
    """transformers 5 picks losses by a class's name."""
    column = torch.arange(ROWS) % 2
    for model_class, labels in (
        (ErnieMForSequenceClassification, {"labels": column}),
        (ErnieMForTokenClassification, {"labels": IDS % 2}),
        (ErnieMForQuestionAnswering, {"start_positions": column, "end_positions": column}),
        (ErnieMForInformationExtraction, {"start_positions": column, "end_positions": column}),
        (ErnieMForMultipleChoice, {"labels": column[:2]}),
    ):
        ids = IDS.clamp(min=4).view(2, 3, COLUMNS) if model_class is ErnieMForMultipleChoice else IDS.clamp(min=4)
        subclass = type("Detector", (model_class,), {})
        assert_close(load(subclass)(ids, **labels).loss, load(model_class)(ids, **labels).loss)


def test_new_models_are_initialised():
    """As BERT's: normal weights, no biases, layer norms that change nothing, a padding row of zeros."""
    torch.manual_seed(0)
    config = ErnieMConfig(
        vocab_size=1000, hidden_size=64, num_attention_heads=4, intermediate_size=128, initializer_range=0.05
    )
    for model in (ErnieMForSequenceClassification(config), ErnieMForInformationExtraction(config)):
        for name, weights in model.state_dict().items():
            if "norm" in name:
                assert (weights == (1.0 if name.endswith("weight") else 0.0)).all(), name
            elif name.endswith("bias"):
                assert not weights.any(), name
            else:
                # Four standard errors of a normal distribution's standard deviation.
                assert weights.std().item() == pytest.approx(0.05, rel=4 / (2 * weights.numel()) ** 0.5), name
        assert not model.ernie_m.embeddings.word_embeddings.weight[PAD].any()
