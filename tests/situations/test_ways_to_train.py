"""Situations of training: frozen parts, accumulation, replicas, shards, noise, averaged weights."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from erniem_fast import ErnieMForSequenceClassification, ErnieMForTokenClassification, ErnieMModel
from tests.golden import cases
from tests.model.tiny import assert_close, assert_same_gradients, gradients, load
from tests.situations.truths import BATCH, FULL, IDS, MASK, RATES, REAL, ROWS, assert_same_results, cubes, gradients_of

FROZEN = {
    "biases alone": lambda name: name.endswith("bias"),
    "norms alone": lambda name: "norm" in name,
    "the last layer alone": lambda name: "layers.1" in name,
    "attention alone": lambda name: "self_attn" in name,
    "words alone": lambda name: "word_embeddings" in name,
    "one projection alone": lambda name: name == "encoder.layers.0.self_attn.self_attn.v_proj.weight",
}


@pytest.mark.parametrize("trained", FROZEN.values(), ids=FROZEN)
def test_parts_of_a_model_are_trained(trained):
    """They get the gradients that they get where all is, and no others get any."""
    model = load().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    found, expected = gradients_of(model), gradients_of()
    assert found.keys() == set(filter(trained, expected))
    assert_same_gradients(expected | found, expected)


def accumulated(model):
    for row in range(ROWS):
        length = int(MASK[row].sum())
        cubes(model, {"input_ids": IDS[row : row + 1, :length]}).backward()


def with_inference_before_backward(model):
    loss = cubes(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(FULL)
            model(FULL[:1])
    loss.backward()


def with_results_changed_in_place(model):
    hidden = model(**BATCH).last_hidden_state
    hidden.masked_fill_(~REAL[..., None], 7.0)
    hidden.mul_(2.0)
    (hidden[REAL] / 2).pow(3).sum().backward()


def with_results_of_a_full_batch_changed_in_place(model):
    for row in range(ROWS):
        hidden = model(IDS[row : row + 1, : int(MASK[row].sum())]).last_hidden_state
        hidden.mul_(2.0)
        (hidden / 2).pow(3).sum().backward()


def in_another_thread(model):
    thread = threading.Thread(target=cubes(model).backward)
    thread.start()
    thread.join()


def with_a_retained_graph(model):
    loss = cubes(model)
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()


def with_saved_tensors_elsewhere(model):
    with torch.autograd.graph.save_on_cpu():
        loss = cubes(model)
    loss.backward()


def with_saved_tensors_packed(model):
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (tensor.dtype, tensor.detach().clone().numpy()),
        lambda packed: torch.from_numpy(packed[1]).to(packed[0]),
    ):
        loss = cubes(model)
    loss.backward()


def with_anomalies_detected(model):
    with torch.autograd.set_detect_anomaly(True):
        cubes(model).backward()


def deterministically(model):
    torch.use_deterministic_algorithms(True)
    try:
        cubes(model).backward()
    finally:
        torch.use_deterministic_algorithms(False)


def in_replicas(model):
    """As `DataParallel` makes them: their parameters are tensors that depend on the model's."""
    cubes(replica_of(model)).backward()


def replica_of(model):
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in module.named_parameters(recurse=False):
            setattr(replica, name, parameter.view_as(parameter))
    return replicas[model]


WAYS_TO_TRAIN = (
    accumulated,
    with_inference_before_backward,
    with_results_changed_in_place,
    with_results_of_a_full_batch_changed_in_place,
    in_another_thread,
    with_a_retained_graph,
    with_saved_tensors_elsewhere,
    with_saved_tensors_packed,
    with_anomalies_detected,
    deterministically,
    in_replicas,
)


@pytest.mark.parametrize("way", WAYS_TO_TRAIN, ids=lambda way: way.__name__)
def test_ways_to_train(way):
    """All give the same gradients."""
    model = load().train()
    way(model)
    assert_same_gradients(gradients(model), gradients_of())


def test_replicas_take_head_masks():
    """They have no parameters to take the dtype from."""
    model, head_mask = load(), torch.tensor([1.0, 0.25])
    outputs, expected = (each(**BATCH, head_mask=head_mask) for each in (replica_of(model), model))
    assert_close(outputs.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model(reentrant):
    """It runs the model twice, with the same dropout."""
    found = []
    for checkpointed in (True, False):
        model = ErnieMModel.from_pretrained(cases.TINY, **RATES).train()
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()

        def run(embeds, model=model):
            return model(inputs_embeds=embeds, attention_mask=MASK).last_hidden_state[REAL]

        torch.manual_seed(3)
        hidden = checkpoint(run, embeds, use_reentrant=reentrant) if checkpointed else run(embeds)
        hidden.pow(3).sum().backward()
        found.append((hidden, {"embeds": embeds.grad, **gradients(model)}))
    assert_close(found[0][0], found[1][0])
    assert_same_gradients(found[0][1], found[1][1])


def test_two_views_of_a_text_with_dropout():
    """As contrastive learning makes them: by two calls, or by one with each text twice. They differ, and both teach."""
    model = ErnieMModel.from_pretrained(cases.TINY, **RATES).train()
    torch.manual_seed(3)
    first, second = (model(**BATCH).pooler_output for _ in range(2))
    both = model(IDS.repeat(2, 1), attention_mask=MASK.repeat(2, 1)).pooler_output
    for one, other in ((first, second), both.split(ROWS)):
        assert ((one - other).abs().amax(1) > 0.1).all()
    (first - second).square().sum().backward()
    assert all(gradient.any() for gradient in gradients(model).values())


def test_two_heads_on_one_encoder():
    """The gradients of both losses add up in it."""
    sequence, token = load(ErnieMForSequenceClassification), load(ErnieMForTokenClassification)
    token.ernie_m = sequence.ernie_m
    losses = [lambda: sequence(**BATCH).logits.pow(2).sum(), lambda: token(**BATCH).logits[REAL].pow(2).sum()]
    (losses[0]() + losses[1]()).backward()
    together = gradients(sequence)
    sequence.zero_grad()
    for loss in losses:
        loss().backward()
    assert_same_gradients(gradients(sequence), together)


def test_adversarial_noise_in_the_word_table():
    """Added to the parameter's data and taken away again: the loss rises as the gradient says."""
    model = load().double().train()
    table = model.get_input_embeddings().weight
    loss = cubes(model)
    loss.backward()
    step = 1e-6 * table.grad / table.grad.norm()
    with torch.no_grad():
        table.data.add_(step)
        above = cubes(model)
        table.data.sub_(2 * step)
        below = cubes(model)
        table.data.add_(step)
        assert cubes(model).item() == pytest.approx(loss.item(), rel=1e-12)
    assert (above - below).item() / 2e-6 == pytest.approx(table.grad.norm().item(), rel=1e-6)


def test_averaged_weights():
    model = load().train()
    average, optimizer, seen = AveragedModel(model), torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(3):
        cubes(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
    expected = load()
    with torch.no_grad():
        for parameter, *states in zip(expected.parameters(), *seen, strict=True):
            parameter.copy_(torch.stack(states).mean(0))
    assert_same_results(average.module.eval(), expected)
    assert (average.module(**BATCH).last_hidden_state - model(**BATCH).last_hidden_state).abs().max() > 0.01


def test_parametrised_weights():
    """They are what their parametrisations make of others, which are trained."""
    model = load()
    for layer in model.encoder.layers:
        parametrizations.weight_norm(layer.linear1)
        parametrizations.spectral_norm(layer.linear2)
        parametrizations.orthogonal(layer.self_attn.out_proj)
        parametrizations.weight_norm(layer.self_attn.self_attn.k_proj)
    model.eval()
    expected = load()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            *path, attribute = name.split(".")
            parameter.copy_(getattr(model.get_submodule(".".join(path)), attribute))
    assert_same_results(model, expected)
    cubes(model.train()).backward()
    assert all(each.grad is not None for name, each in model.named_parameters() if "pooler" not in name)


def test_sharded_weights():
    """Each layer gathers its own when it is called, whole modules at a time."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), load().train()
        for module in (*model.encoder.layers, model):
            fully_shard(module, mesh=mesh)
        assert_same_results(model, load())
        found = gradients_of(model)
        assert_same_gradients({name: each.full_tensor() for name, each in found.items()}, gradients_of())
    finally:
        dist.destroy_process_group()
