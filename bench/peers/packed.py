"""Worker: packed ERNIE-M in plain PyTorch on a GPU, as it is written with variable-length attention.

    python -m bench.peers.packed varlen | flash | compile

varlen: torch's own `varlen_attn`; flash: that of the package flash-attn; compile: varlen, compiled. Inference only:
varlen_attn has no dropout.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from bench.peers import xlm_roberta
from bench.peers.serve import serve
from bench.peers.torch_peer import TorchPeer


def varlen(q, k, v, cu_seqlens, longest):
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


def flash(q, k, v, cu_seqlens, longest):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


class Packed(nn.Module):
    """The layers of an XLMRobertaModel on packed tokens, queries, keys and values from one product."""

    def __init__(self, model, attention):
        super().__init__()
        self.embeddings, self.attention, self.heads = model.embeddings, attention, model.config.num_attention_heads
        self.pooler, self.layers = model.pooler, model.encoder.layer
        for layer in self.layers:
            inner = layer.attention.self
            parts = (inner.query, inner.key, inner.value)
            layer.qkv = nn.Linear(parts[0].in_features, 3 * parts[0].out_features)
            layer.qkv.weight = nn.Parameter(torch.cat([part.weight for part in parts]))
            layer.qkv.bias = nn.Parameter(torch.cat([part.bias for part in parts]))
            del layer.attention.self

    def forward(self, ids, positions, cu_seqlens, longest):
        """The hidden states of packed tokens, (tokens, hidden), and of the pooler, (sequences, hidden)."""
        tables = self.embeddings
        x = tables.LayerNorm(tables.word_embeddings(ids) + tables.position_embeddings(positions))
        for layer in self.layers:
            q, k, v = layer.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
            context = self.attention(q, k, v, cu_seqlens, longest).flatten(1)
            output = layer.attention.output
            x = output.LayerNorm(x + output.dense(context))
            x = layer.output.LayerNorm(x + layer.output.dense(F.gelu(layer.intermediate.dense(x))))
        return x, self.pooler.activation(self.pooler.dense(x[cu_seqlens[:-1].long()]))


class PackedPeer(TorchPeer):
    def __init__(self, variant):
        self.attention = {"varlen": varlen, "compile": varlen, "flash": flash}[variant]
        self.compiled = variant == "compile"

    def build(self, model, dtype):
        if self.attention is flash:
            import flash_attn

            versions = {"flash-attn": flash_attn.__version__}
        else:
            versions = {}
        module = Packed(xlm_roberta.load(model, dtype, "sdpa"), self.attention)
        return torch.compile(module, dynamic=True) if self.compiled else module, versions

    @torch.inference_mode()
    def forward(self, inputs):
        mask = inputs["attention_mask"].bool()
        lengths = mask.sum(1, dtype=torch.int32)
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        places = mask.flatten().nonzero().squeeze(1)
        positions = places % mask.shape[1] + xlm_roberta.PAD + 1
        ids = inputs["input_ids"].flatten()[places]
        packed, _ = self.module(ids, positions, cu_seqlens, int(lengths.max()))
        hidden_state = packed.new_zeros(mask.numel(), packed.shape[1])
        return hidden_state.index_copy_(0, places, packed).unflatten(0, mask.shape)


if __name__ == "__main__":
    serve(PackedPeer(sys.argv[1]))
