"""With the libraries that ERNIE-M is used with: Auto classes, pipelines, Trainer, PEFT, accelerate, DDP."""

import os
import subprocess
import sys

import accelerate
import peft
import pytest
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

import erniem_fast
from erniem_fast import ErnieMForSequenceClassification, ErnieMForTokenClassification, ErnieMModel
from tests.golden import cases
from tests.integration.texts import TEXTS

ATOL = 1e-5  # a hundred roundings of values about 1


NO_DROPOUT = {**cases.NO_DROPOUT, "classifier_dropout": 0.0}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(cases.TINY)


@pytest.fixture(scope="module")
def batch(tokenizer):
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert encoded["attention_mask"].float().mean() < 0.7, "the texts must be ragged"
    return dict(encoded)


def load(model_class, **config):
    """The tiny checkpoint without dropout; heads get weights of their own, the same every time."""
    torch.manual_seed(7)
    return model_class.from_pretrained(cases.TINY, **NO_DROPOUT, **config).eval()


def assert_close(actual, expected, atol=ATOL):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---- transformers: Auto classes and pipelines


def test_auto_classes_tokenise_and_run(tokenizer, batch):
    assert type(tokenizer) is erniem_fast.ErnieMTokenizer
    model = transformers.AutoModel.from_pretrained(cases.TINY).eval()
    assert type(model) is ErnieMModel
    assert type(model.config) is erniem_fast.ErnieMConfig
    assert type(transformers.AutoModel.from_config(model.config)) is ErnieMModel
    expected = model(**batch).last_hidden_state
    without_mask = model(batch["input_ids"]).last_hidden_state
    assert torch.equal(without_mask, expected), "the padding of real sentences is found by its id"


@pytest.mark.parametrize("batch_size", [1, 5])
def test_text_classification_pipeline(batch_size, tokenizer):
    model = load(AutoModelForSequenceClassification, num_labels=3)
    results = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(
        TEXTS, batch_size=batch_size, top_k=None
    )
    for text, result in zip(TEXTS, results, strict=True):
        scores = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        found = torch.tensor([each["score"] for each in sorted(result, key=lambda each: each["label"])])
        assert_close(found, scores)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_token_classification_pipeline(batch_size, tokenizer):
    model = load(AutoModelForTokenClassification, num_labels=5)
    tag = pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu", ignore_labels=[])
    for text, result in zip(TEXTS, tag(TEXTS, batch_size=batch_size), strict=True):
        encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        offsets = encoded.pop("offset_mapping")[0, 1:-1].tolist()  # without [CLS] and [SEP]
        scores, labels = model(**encoded).logits.softmax(-1)[0, 1:-1].max(-1)
        tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0, 1:-1])
        words = [
            text[start:end] if token == tokenizer.unk_token else token
            for token, (start, end) in zip(tokens, offsets, strict=True)
        ]
        assert [each["word"] for each in result] == words
        assert [each["entity"] for each in result] == [f"LABEL_{label}" for label in labels]
        assert_close(torch.tensor([float(each["score"]) for each in result]), scores)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_feature_extraction_pipeline(batch_size, tokenizer):
    model = load(ErnieMModel)
    extract = pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu")
    for text, result in zip(TEXTS, extract(TEXTS, batch_size=batch_size), strict=True):
        expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        found = torch.tensor(result)
        assert_close(found[:, : expected.shape[1]], expected)
        assert not found[:, expected.shape[1] :].any()


def test_pipelines_find_their_classes_by_the_checkpoint():
    for task, model_class in (
        ("text-classification", ErnieMForSequenceClassification),
        ("token-classification", ErnieMForTokenClassification),
        ("feature-extraction", ErnieMModel),
        ("zero-shot-classification", ErnieMForSequenceClassification),
    ):
        loaded = pipeline(task, model=str(cases.TINY), device="cpu")
        assert type(loaded.model) is model_class
        assert type(loaded.tokenizer) is erniem_fast.ErnieMTokenizer


# ---- transformers: saving and loading


def test_a_checkpoint_in_shards(tmp_path, batch):
    model = load(ErnieMForTokenClassification, num_labels=5)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    again = ErnieMForTokenClassification.from_pretrained(tmp_path).eval()
    assert_close(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_loaded_in_another_dtype(dtype, tmp_path, batch):
    model = load(ErnieMModel, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config.dtype == dtype
    expected = load(ErnieMModel).to(dtype)
    for each in (model, expected):
        each.prune_heads({0: [1]})
    hidden = model(**batch).last_hidden_state
    assert hidden.dtype == dtype
    # One of them may be mapped from the file: with weights at other addresses the products may add up otherwise.
    tolerance = 16 * torch.finfo(dtype).eps * hidden.abs().max().item()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert_close(hidden, expected(**batch).last_hidden_state, tolerance)
    model.save_pretrained(tmp_path)
    again = ErnieMModel.from_pretrained(tmp_path, dtype="auto").eval()
    assert again.dtype == dtype
    for name, tensor in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert_close(again(**batch).last_hidden_state, hidden, tolerance)


def test_a_head_of_another_size_is_made_anew(tmp_path):
    load(ErnieMForSequenceClassification, num_labels=5).save_pretrained(tmp_path)
    model = ErnieMForSequenceClassification.from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (2, cases.HIDDEN)
    expected = load(ErnieMModel).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.ernie_m.state_dict().items())


# ---- transformers: Trainer


class Sentences(torch.utils.data.Dataset):
    """Real sentences; their label is the parity of their length, their tokens' labels those of the ids."""

    def __init__(self, tokenizer, per_token):
        self.rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
        for row in self.rows:
            ids = row["input_ids"]
            # The collator that packs gives a sequence's first token no label.
            row["labels"] = [-100, *(token % 3 for token in ids[1:])] if per_token else len(ids) % 2

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def train(tokenizer, tmp_path, model, collator, **options):
    """The losses of eight steps, and of the evaluation after them."""
    per_token = isinstance(model, ErnieMForTokenClassification)
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 3e-3, **options}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, seed=5, **options
    )
    sentences, losses = Sentences(tokenizer, per_token), []
    model.register_forward_hook(
        lambda module, _, output: losses.append(output.loss.item()) if module.training else None
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=sentences,
        eval_dataset=sentences,
        data_collator=collator,
        processing_class=tokenizer,
    )
    trainer.train()
    return losses, trainer.evaluate()["eval_loss"]


def test_trainer_packed_and_padded_alike(tokenizer, tmp_path):
    """The same losses whether the collator pads or packs, or attention is checkpointed; and they fall."""
    runs = {}
    for name, collator, options in (
        ("padded", DataCollatorForTokenClassification(tokenizer), {}),
        ("packed", DataCollatorWithFlattening(return_flash_attn_kwargs=True), {}),
        ("checkpointed", DataCollatorForTokenClassification(tokenizer), {"gradient_checkpointing": True}),
    ):
        model = load(ErnieMForTokenClassification, num_labels=3)
        losses, evaluated = train(tokenizer, tmp_path, model, collator, **options)
        runs[name] = [*losses, evaluated]
        assert evaluated < 0.7 * losses[0]
    # Adam divides by gradients, so that it can double a rounding at every step.
    assert runs["packed"] == pytest.approx(runs["padded"], abs=1e-3)
    assert runs["checkpointed"] == pytest.approx(runs["padded"], abs=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"bf16": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["bf16", "checkpointed", "accumulated"],
)
def test_trainer_options(options, tokenizer, tmp_path):
    """Of a sequence classifier, against plain training: to bfloat16's precision, or exactly, in the first loss."""
    collator = DataCollatorWithPadding(tokenizer)
    plain, _ = train(tokenizer, tmp_path, load(ErnieMForSequenceClassification), collator)
    losses, evaluated = train(tokenizer, tmp_path, load(ErnieMForSequenceClassification), collator, **options)
    accumulated = options.get("gradient_accumulation_steps", 1)
    assert len(losses) == 8 * accumulated
    first = sum(losses[:accumulated]) / accumulated
    assert first == pytest.approx(plain[0], rel=2**-7 if "bf16" in options else 1e-5)
    assert evaluated < plain[0]


# ---- PEFT


def lora(model, **options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "linear1"], **options}
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def trained(model, batch, steps=3):
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    labels = torch.arange(len(TEXTS)) % 2
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        assert all(each.grad is not None for each in model.parameters() if each.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_lora_trains_and_merges(batch, tmp_path):
    model = lora(load(ErnieMForSequenceClassification), modules_to_save=["classifier"]).train()
    untouched = load(ErnieMForSequenceClassification)(**batch).logits
    assert_close(model(**batch).logits, untouched)  # LoRA starts as nothing
    losses = trained(model, batch, steps=10)
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    with torch.inference_mode():
        adapted = model(**batch).logits
        with model.disable_adapter():
            assert_close(model(**batch).logits, untouched)
    assert (adapted - untouched).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(ErnieMForSequenceClassification), tmp_path).eval()
    with torch.inference_mode():
        assert_close(again(**batch).logits, adapted)
        merged = model.merge_and_unload()
        assert type(merged.ernie_m.encoder.layers[0].self_attn.self_attn.q_proj) is torch.nn.Linear
        assert_close(merged(**batch).logits, adapted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_lora_with_gradient_checkpointing(reentrant, batch):
    """All adapters get the gradients that they get without."""
    found = []
    for checkpointing in (True, False):
        torch.manual_seed(11)
        model = lora(load(ErnieMForSequenceClassification), init_lora_weights=False).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**batch, labels=torch.arange(len(TEXTS)) % 2).loss.backward()
        found.append(gradients(model))
    assert len(found[1]) == 2 * 2 * 3
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        assert_close(found[0][name], gradient, atol=1e-5 * gradient.abs().max())


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["word_embeddings", "position_embeddings", "out_proj", "linear2"]),
        peft.LoraConfig(target_modules=["k_proj"], modules_to_save=["norm1", "layer_norm", "word_embeddings"]),
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        peft.IA3Config(target_modules=["k_proj", "v_proj", "linear2"], feedforward_modules=["linear2"]),
        peft.LNTuningConfig(target_modules=["layer_norm", "norm1", "norm2"]),
    ],
    ids=["lora everywhere", "modules to save", "tokens", "ia3", "layer norms"],
)
def test_every_adapter_is_used(config, batch):
    """Each trainable parameter gets a gradient, and the right one: the loss falls as it says."""
    torch.manual_seed(11)
    model = peft.get_peft_model(load(ErnieMModel), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # zero otherwise, and the gradient of its partner too
    words = batch["input_ids"].clone()
    words[0, :2] = torch.tensor([5, 6])
    model.double()

    def loss():
        return model(words, attention_mask=batch["attention_mask"]).last_hidden_state.pow(3).sum()

    loss().backward()
    trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert trainable
    for name, parameter in trainable.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        index = parameter.grad.abs().argmax()
        with torch.no_grad():
            ends = []
            for step in (1e-6, -2e-6):
                parameter.view(-1)[index] += step
                ends.append(loss().item())
            parameter.view(-1)[index] += 1e-6
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(parameter.grad.view(-1)[index].item(), rel=1e-4), name


# ---- accelerate


def offloaded(how, tmp_path):
    if how == "cpu":
        return accelerate.cpu_offload(load(ErnieMModel), execution_device="cpu")
    if how == "disk":
        return accelerate.disk_offload(load(ErnieMModel), str(tmp_path), execution_device="cpu")
    if how == "hook on a projection":
        model = load(ErnieMModel)
        for layer in model.encoder.layers:
            for module in (layer.self_attn.self_attn.v_proj, layer.linear1):
                accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu", offload=True))
                assert module.weight.device.type == "meta"
        return model
    return load(ErnieMModel, device_map=how, offload_folder=str(tmp_path))


@pytest.mark.parametrize(
    "how",
    [
        "cpu",
        "disk",
        "hook on a projection",
        "auto",
        {"embeddings": "cpu", "encoder.layers.0": "cpu", "encoder.layers.1": "disk", "pooler": "cpu"},
        {"embeddings": "disk", "encoder": "cpu", "pooler": "disk"},
    ],
    ids=str,
)
def test_offloaded_weights_are_fetched(how, tmp_path, batch, packed):
    """Layer norms and embeddings too, whose modules the ops do not call."""
    expected = load(ErnieMModel)
    model = offloaded(how, tmp_path)
    with torch.no_grad():
        for _ in range(2):
            outputs, exact = model(**batch), expected(**batch)
            assert_close(outputs.last_hidden_state, exact.last_hidden_state)
            assert_close(outputs.pooler_output, exact.pooler_output)


# ---- torch.distributed


WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import erniem_fast
from tests.interpreter import make_faster

make_faster()
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
for name, (head, batch) in torch.load(f"{folder}/batches.pt").items():
    model = getattr(erniem_fast, head).from_pretrained(f"{folder}/{name}").train()
    model.requires_grad_()  # as after a start with frozen layers
    parallel = DistributedDataParallel(model)
    for _ in range(2):  # the second step finds out whether the first left anything behind
        model.zero_grad()
        parallel(**{name: tensor[rank::2] for name, tensor in batch.items()}).loss.backward()
    torch.save({name: each.grad for name, each in model.named_parameters()}, f"{folder}/{name}/gradients{rank}.pt")
dist.destroy_process_group()
"""

# A span can be given by a column a row too.
PARALLEL_HEADS = {
    **{name: (head, config, cases.make_labels(name, "right")) for name, (head, config) in cases.HEADS.items()},
    "columns": ("ErnieMForInformationExtraction", {}, cases.make_labels("question_answering", "right")),
}


@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_distributed_data_parallel(implementation, tmp_path):
    """Two processes with half a ragged batch each have the mean of both halves' gradients, for every kind of label."""
    names = ("ERNIEM_FAST_ATTENTION", "ERNIEM_FAST_BIAS_GELU", "ERNIEM_FAST_LAYERNORM")
    environment = {**os.environ, "TRITON_INTERPRET": "1", **dict.fromkeys(names, implementation)}
    models, batches = {}, {}
    for name, (head, config, labels) in PARALLEL_HEADS.items():
        models[name] = cases.load(erniem_fast, head, config).train()
        models[name].save_pretrained(tmp_path / name)
        batches[name] = head, cases.make_inputs(name, "right") | labels
    torch.save(batches, tmp_path / "batches.pt")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=300)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    for name, model in models.items():
        batch = batches[name][1]
        halves = [{key: tensor[rank::2] for key, tensor in batch.items()} for rank in range(2)]
        (sum(model(**half).loss for half in halves) / 2).backward()
        expected = gradients(model)
        scale = max(gradient.abs().max() for gradient in expected.values())
        for rank in range(2):
            found = torch.load(tmp_path / name / f"gradients{rank}.pt")
            assert found.keys() == expected.keys()
            for key, gradient in expected.items():
                assert_close(found[key], gradient, atol=1e-5 * scale)
