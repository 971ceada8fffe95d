"""Names and layouts of the weights on both sides, and how one becomes the other.

Megatron stacks the same weight of all layers along a first dimension, stores query, key and value as one matrix (for
each group: its queries, its key, its value) and gate and up of the SwiGLU as one (gate first). Hugging Face's layout
has a tensor for each layer and each part. Both directions only move rows, so a round trip changes no bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_kaiyuan.export.architecture import Architecture

__all__ = ["Weight", "joined", "parts_of", "weights_of"]

Layout = Literal["whole", "qkv", "gate_up"]

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of the training checkpoint and what it is called there and here."""

    name: str
    """In the checkpoint: `decoder.layers.mlp.linear_fc1.weight`."""
    stacked: bool
    """Whether its first dimension is the layer."""
    parts: tuple[str, ...]
    """In Hugging Face's layout; `{layer}` stands for the layer's number."""
    shape: tuple[int, ...]
    """Of one layer, in the checkpoint."""
    layout: Layout = "whole"

    def part_names(self, layer: int) -> list[str]:
        """Names of the parts of one layer."""
        return [part.format(layer=layer) for part in self.parts]

    def name_of_layer(self, layer: int) -> str:
        """Its name in checkpoints that do not stack layers: `decoder.layers.3.mlp.linear_fc1.weight`."""
        return self.name.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)


def weights_of(architecture: Architecture) -> Iterator[Weight]:
    """Yield every weight of a model, in the order of computation.

    Nothing else belongs in its checkpoint.
    """
    hidden, rows = architecture.hidden_size, architecture.padded_vocab_size
    yield Weight("embedding.word_embeddings.weight", False, ("model.embed_tokens.weight",), (rows, hidden))
    yield from _attention_weights(architecture)
    yield from _mlp_weights(architecture)
    yield Weight("decoder.final_layernorm.weight", False, ("model.norm.weight",), (hidden,))
    if not architecture.tied_embeddings:
        yield Weight("output_layer.weight", False, ("lm_head.weight",), (rows, hidden))


def _layer_weight(
    name: str, parts: Sequence[str], shape: tuple[int, ...], kind: str = "weight", layout: Layout = "whole"
) -> Weight:
    there = tuple(f"model.layers.{{layer}}.{part}.{kind}" for part in parts)
    return Weight(f"decoder.layers.{name}", True, there, shape, layout)


def _attention_weights(architecture: Architecture) -> Iterator[Weight]:
    hidden, head = architecture.hidden_size, architecture.kv_channels
    queries = architecture.num_attention_heads * head
    mixed = queries + 2 * architecture.num_query_groups * head
    qkv = "self_attention.linear_qkv"
    yield _layer_weight(f"{qkv}.layer_norm_weight", ["input_layernorm"], (hidden,))
    yield _layer_weight(f"{qkv}.weight", _ATTENTION, (mixed, hidden), layout="qkv")
    if architecture.add_qkv_bias:
        yield _layer_weight(f"{qkv}.bias", _ATTENTION, (mixed,), kind="bias", layout="qkv")
    if architecture.qk_layernorm:
        yield _layer_weight("self_attention.q_layernorm.weight", ["self_attn.q_norm"], (head,))
        yield _layer_weight("self_attention.k_layernorm.weight", ["self_attn.k_norm"], (head,))
    yield _layer_weight("self_attention.linear_proj.weight", ["self_attn.o_proj"], (hidden, queries))
    if architecture.sandwich_norm:
        yield _layer_weight("post_self_attn_layernorm.weight", ["post_self_attn_layernorm"], (hidden,))


def _mlp_weights(architecture: Architecture) -> Iterator[Weight]:
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    yield _layer_weight("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm"], (hidden,))
    yield _layer_weight("mlp.linear_fc1.weight", ["mlp.gate_proj", "mlp.up_proj"], (2 * ffn, hidden), layout="gate_up")
    yield _layer_weight("mlp.linear_fc2.weight", ["mlp.down_proj"], (hidden, ffn))
    if architecture.sandwich_norm:
        yield _layer_weight("post_mlp_layernorm.weight", ["post_mlp_layernorm"], (hidden,))


def parts_of(weight: Weight, tensor: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
    """One layer's tensor of the checkpoint, cut into Hugging Face's parts (views or copies)."""
    if weight.layout == "whole":
        return (tensor,)
    if weight.layout == "gate_up":
        return tensor.chunk(2)
    queries = architecture.queries_per_group
    grouped = tensor.view(architecture.num_query_groups, queries + 2, architecture.kv_channels, *tensor.shape[1:])
    query, key, value = torch.split(grouped, [queries, 1, 1], dim=1)
    return tuple(part.flatten(0, 2) for part in (query, key, value))


def joined(weight: Weight, parts: Sequence[Tensor], architecture: Architecture) -> Tensor:
    """Undo `parts_of`."""
    if weight.layout == "whole":
        return parts[0]
    if weight.layout == "gate_up":
        return torch.cat(list(parts))
    grouped = [
        part.view(architecture.num_query_groups, -1, architecture.kv_channels, *part.shape[1:]) for part in parts
    ]
    return torch.cat(grouped, dim=1).flatten(0, 2)
