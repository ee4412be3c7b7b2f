"""The questions that the goldens answer: inputs, masks, labels and head weights of every model case.

make.py puts them to transformers 4.57.6, the tests put them to erniem_fast. All are drawn from numpy's RandomState,
whose numbers never change, so that only the answers need to be stored.
"""

import pathlib
import zlib

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

GOLDEN = pathlib.Path(__file__).parent
TINY = GOLDEN / "tiny"
ROWS, CHOICES, LENGTH, HIDDEN, VOCABULARY, PAD = 6, 3, 20, 64, 2300, 1
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IGNORED = -100
EMPTY_ROW = 3

# Each head's class and what its config adds; what a sequence classifier minimises follows from its labels.
HEADS = {
    "single_label": ("ErnieMForSequenceClassification", {"num_labels": 3}),
    "multi_label": ("ErnieMForSequenceClassification", {"num_labels": 3}),
    "regression": ("ErnieMForSequenceClassification", {"num_labels": 1}),
    "multiple_choice": ("ErnieMForMultipleChoice", {}),
    "token_classification": ("ErnieMForTokenClassification", {"num_labels": 5}),
    "question_answering": ("ErnieMForQuestionAnswering", {"num_labels": 2}),
    "information_extraction": ("ErnieMForInformationExtraction", {}),
}
MODELS = {
    "model": ("ErnieMModel", {}),
    "model_without_pooler": ("ErnieMModel", {"add_pooling_layer": False}),
    **HEADS,
}
SPAN_HEADS = ("question_answering", "information_extraction")


def make_masks():
    """Masks by kind, each (ROWS, LENGTH) int64; empty_row is right with nothing kept in EMPTY_ROW."""
    right = (np.arange(LENGTH) < np.array([[20], [15], [9], [4], [2], [1]])).astype(np.int64)
    holes = np.ones_like(right)
    holes[0, 5:9] = 0
    holes[1, 1::2] = 0
    holes[2, [3, 11, 17, 18, 19]] = 0
    holes[3, 1:-1] = 0
    holes[4, [0, 1, 2, 3, 10]] = 0
    empty_row = right.copy()
    empty_row[EMPTY_ROW] = 0
    left = right[:, ::-1].copy()
    kinds = {"full": np.ones_like(right), "right": right, "left": left, "holes": holes, "empty_row": empty_row}
    return {kind: torch.from_numpy(mask) for kind, mask in kinds.items()}


MASKS = make_masks()


def make_input_ids(kind):
    """(ROWS, LENGTH) int64: pad ids at padding, words in holes; in the full batch one real token has the pad id."""
    ids = torch.from_numpy(np.random.RandomState(1).randint(4, VOCABULARY - 1, (ROWS, LENGTH)))
    if kind == "full":
        ids[1, 2] = PAD
    elif kind != "holes":
        ids[MASKS[kind] == 0] = PAD
    return ids


def make_inputs(head, kind):
    """input_ids and attention_mask, with the choices of multiple choice in a dimension of their own."""
    shape = (-1, CHOICES, LENGTH) if head == "multiple_choice" else (ROWS, LENGTH)
    return {"input_ids": make_input_ids(kind).view(shape), "attention_mask": MASKS[kind].view(shape)}


def make_labels(head, kind):
    """The label arguments of a head's forward; an empty row is ignored wherever labels can say so."""
    random = np.random.RandomState(2)
    mask = MASKS[kind]
    is_empty = mask.sum(1) == 0
    if head in SPAN_HEADS:
        return make_spans(head, mask, is_empty, random)
    if head == "single_label":
        labels = torch.from_numpy(random.randint(3, size=ROWS)).masked_fill(is_empty, IGNORED)
    elif head == "multi_label":
        labels = torch.from_numpy(random.randint(2, size=(ROWS, 3))).float()
    elif head == "regression":
        labels = torch.from_numpy(random.randn(ROWS)).float()
    elif head == "multiple_choice":
        labels = torch.from_numpy(random.randint(CHOICES, size=ROWS // CHOICES))
        labels.masked_fill_(is_empty.view(-1, CHOICES).any(1), IGNORED)
    else:
        labels = torch.from_numpy(random.randint(5, size=(ROWS, LENGTH))).masked_fill(mask == 0, IGNORED)
    return {"labels": labels}


def make_spans(head, mask, is_empty, random):
    if head == "information_extraction":
        start, end = torch.from_numpy(random.randint(2, size=(2, ROWS, LENGTH))).float()
    else:
        # First and last real token; outside of the sequence, where spans are ignored, in one row and in the empty one.
        start = mask.argmax(1).masked_fill(is_empty, LENGTH)
        end = (LENGTH - 1 - mask.flip(1).argmax(1)).masked_fill(is_empty, LENGTH)
        start[2] = 999
    return {"start_positions": start, "end_positions": end}


def has_golden_loss(head, kind):
    """False where transformers' loss takes in the empty row, which it alone lets attend to everything."""
    return kind != "empty_row" or head not in ("multi_label", "regression", "information_extraction")


def make_rare_inputs():
    """Positions out of order, embeddings in place of ids, a factor for each head or each head of each layer."""
    random = np.random.RandomState(3)
    positions = np.stack([random.permutation(500)[:LENGTH] for _ in range(ROWS)])
    ids = {"input_ids": make_input_ids("right")}
    return {
        "position_ids": ids | {"position_ids": torch.from_numpy(positions)},
        "inputs_embeds": {"inputs_embeds": torch.from_numpy(random.randn(ROWS, LENGTH, HIDDEN) / 4).float()},
        "head_mask": ids | {"head_mask": torch.tensor([0.0, 1.0])},
        "layer_head_mask": ids | {"head_mask": torch.tensor([[1.0, 0.5], [0.0, 1.0]])},
    }


def load(library, name, config):
    """The tiny checkpoint under class `name` of `library`, without dropout; weights that it lacks are drawn here."""
    model_class = getattr(library, name)
    model, info = model_class.from_pretrained(TINY, output_loading_info=True, **NO_DROPOUT, **config)
    with torch.no_grad():
        for key in info["missing_keys"]:
            parameter = model.get_parameter(key)
            random = np.random.RandomState(zlib.crc32(key.encode()))
            parameter.copy_(torch.from_numpy(random.randn(*parameter.shape) / 4))
    return model


def loss_over_real_tokens(head, start_logits, end_logits, mask, start_positions, end_positions):
    """The loss of a span head as transformers defines it, but with padding out of its softmax or its mean."""
    losses = []
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        if head == "question_answering":
            logits = logits.masked_fill(mask == 0, torch.finfo(torch.float32).min)
            losses.append(F.cross_entropy(logits, positions.clamp(0, LENGTH), ignore_index=LENGTH))
        else:
            losses.append(F.binary_cross_entropy_with_logits(logits[mask == 1], positions[mask == 1]))
    return sum(losses) / 2


def sketch_gradients(model):
    """Every gradient by its parameter's name, sorted: a large matrix's rows each summed under random signs, float64.

    An error in any element changes its row's sum, and goldens of some forty backward passes stay small. Parameters
    that the loss does not reach, such as an unused pooler's, have none.
    """
    sketches = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.grad is None:
            continue
        gradient = parameter.grad.double().numpy()
        if gradient.ndim == 2 and len(gradient) > 8:
            gradient = gradient @ np.random.RandomState(HIDDEN).choice([-1.0, 1.0], gradient.shape[1])
        sketches[name] = gradient.ravel()
    return sketches


def describe(output):
    """The shapes in a forward's output: a list for a tensor, a list of lists for a tuple, None for None."""
    if isinstance(output, tuple):
        return [describe(element) for element in output]
    return None if output is None else list(output.shape)


class Rows(torch.utils.data.IterableDataset):
    """Rows of input_ids and a label, padded to one length; being iterable, Trainer takes them in their order."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        length = max(len(ids) for ids, _ in self.rows)
        for ids, label in self.rows:
            padding = [0] * (length - len(ids))
            yield {
                "input_ids": ids + [PAD] * len(padding),
                "attention_mask": [1] * len(ids) + padding,
                "labels": label,
            }


def train(library, rows, settings, output_dir, dtype=torch.float32):
    """Fine-tune the tiny checkpoint by Trainer and return the loss of every step, which Trainer's own log rounds."""
    model = load(library, "ErnieMForSequenceClassification", {"num_labels": 4}).to(dtype)
    losses = []
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
    Trainer(model, TrainingArguments(output_dir=str(output_dir), **settings), train_dataset=Rows(rows)).train()
    return losses
