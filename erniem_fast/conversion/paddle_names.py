"""Names and layouts of ERNIE-M's tensors in Paddle and at Baidu, and here.

Paddle's linear layers hold weights as (in, out), PyTorch's as (out, in). A square weight shows no difference, so that
names alone decide which tensors are transposed: all weights with two dimensions but the tables of embeddings.
"""

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

_PROJECTION = re.compile(r"\bself_attn\.([qkv]_proj)\.")
_OURS = re.compile(r"\bself_attn\.self_attn\.([qkv]_proj)\.")

# Baidu's names, and ours without the layer's.
_BAIDU = {
    "word_embedding": "embeddings.word_embeddings.weight",
    "pos_embedding": "embeddings.position_embeddings.weight",
    "pre_encoder_layer_norm_scale": "embeddings.layer_norm.weight",
    "pre_encoder_layer_norm_bias": "embeddings.layer_norm.bias",
    "pooled_fc.w_0": "pooler.dense.weight",
    "pooled_fc.b_0": "pooler.dense.bias",
}
_BAIDU_LAYER = {
    "multi_head_att_query_fc": "self_attn.self_attn.q_proj",
    "multi_head_att_key_fc": "self_attn.self_attn.k_proj",
    "multi_head_att_value_fc": "self_attn.self_attn.v_proj",
    "multi_head_att_output_fc": "self_attn.out_proj",
    "post_att_layer_norm": "norm1",
    "ffn_fc_0": "linear1",
    "ffn_fc_1": "linear2",
    "post_ffn_layer_norm": "norm2",
}
_BAIDU_HEADS = {"cls_out": "classifier", "cls_seq_label_out": "classifier", "cls_mrc_out": "qa_outputs"}
_BAIDU_PART = re.compile(r"encoder_layer_(\d+)_(.+?)[._](w_0|b_0|scale|bias)")
_BAIDU_HEAD = re.compile(r"(.+)_([wb])")
_ENDS = {"w_0": "weight", "w": "weight", "scale": "weight", "b_0": "bias", "b": "bias", "bias": "bias"}


def is_paddles(names: Iterable[str]) -> bool:
    """Whether tensors are named as Paddle names those of ERNIE-M."""
    return any(_PROJECTION.search(name) and not _OURS.search(name) for name in names)


def from_paddle(
    tensors: Iterable[tuple[str, Tensor]], names: Iterable[str], answers_questions: bool
) -> Iterator[tuple[str, Tensor]]:
    """Tensors under our names and in our layout, one after another.

    Args:
        tensors: names and tensors of Paddle.
        names: all the names.
        answers_questions: whether `classifier` is the head of question answering, which is `qa_outputs` here.
    """
    # The first release of UIE-M called its encoder `encoder`, where others have `ernie_m`.
    is_first_uie = any(name.startswith(("encoder.encoder.", "encoder.embeddings.")) for name in names)
    for name, tensor in tensors:
        if name.endswith("embeddings.position_ids"):
            continue
        if is_first_uie and name.startswith("encoder."):
            name = "ernie_m." + name.removeprefix("encoder.")
        if answers_questions and name.startswith("classifier."):
            name = "qa_outputs." + name.removeprefix("classifier.")
        name = name if _OURS.search(name) else _PROJECTION.sub(r"self_attn.self_attn.\1.", name)
        yield name, _transposed(name, tensor)


def to_paddle(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one of our models under Paddle's names and in its layout, one after another."""
    for name, tensor in tensors:
        transposed = _transposed(name, tensor)
        if name.startswith("qa_outputs."):
            name = "classifier." + name.removeprefix("qa_outputs.")
        yield _OURS.sub(r"self_attn.\1.", name), transposed


def from_baidu(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of Baidu's `params/` under our names, with `ernie_m.` before the encoder's, and in our layout.

    A name that Baidu's encoder and heads do not have stays as it is.
    """
    for name, tensor in tensors:
        ours = _baidu_name(name)
        yield ours, _transposed(ours, tensor)


def _baidu_name(name: str) -> str:
    if name in _BAIDU:
        return f"ernie_m.{_BAIDU[name]}"
    part, head = _BAIDU_PART.fullmatch(name), _BAIDU_HEAD.fullmatch(name)
    if part and part[2] in _BAIDU_LAYER:
        return f"ernie_m.encoder.layers.{part[1]}.{_BAIDU_LAYER[part[2]]}.{_ENDS[part[3]]}"
    if head and head[1] in _BAIDU_HEADS:
        return f"{_BAIDU_HEADS[head[1]]}.{_ENDS[head[2]]}"
    return name


def _transposed(name: str, tensor: Tensor) -> Tensor:
    is_linear = tensor.dim() == 2 and name.endswith(".weight") and "embeddings." not in name
    return tensor.t().contiguous() if is_linear else tensor
