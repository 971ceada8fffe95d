"""An independent GPT in plain torch and float64, the oracle of the model tests: no code of Megatron's or ours.

Weights are a dict under Megatron's names, full (not sharded), so that any partition of a model can be compared with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A tiny model in which no two sizes coincide by accident."""

    layers: int = 2
    hidden: int = 32
    heads: int = 4
    groups: int = 2
    head_size: int = 8
    ffn: int = 48
    vocab: int = 64
    sequence: int = 12
    batch: int = 2
    rotary_base: int = 10000
    epsilon: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class Features:
    """Which of the variant's features the reference computes."""

    sandwich: bool = False
    qk_norm: bool = False
    softcap: float = 0.0
    z_loss: float = 0.0


def random_weights(shape: Shape, features: Features, seed: int = 7) -> dict[str, Tensor]:
    """Full weights in float64 whose values are exact in FP16, so that every precision starts from the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def gain(size: int) -> Tensor:
        return 1.0 + 0.2 * torch.randn(size, generator=generator)

    weights = {"embedding.word_embeddings.weight": torch.randn(shape.vocab, shape.hidden, generator=generator)}
    query, key = shape.heads * shape.head_size, shape.groups * shape.head_size
    for layer in range(shape.layers):
        prefix = f"decoder.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = gain(shape.hidden)
        weights[prefix + "self_attention.linear_qkv.weight"] = matrix(query + 2 * key, shape.hidden)
        weights[prefix + "self_attention.linear_proj.weight"] = matrix(shape.hidden, query)
        weights[prefix + "pre_mlp_layernorm.weight"] = gain(shape.hidden)
        weights[prefix + "mlp.linear_fc1.weight"] = matrix(2 * shape.ffn, shape.hidden)
        weights[prefix + "mlp.linear_fc2.weight"] = matrix(shape.hidden, shape.ffn)
        if features.qk_norm:
            weights[prefix + "self_attention.q_layernorm.weight"] = gain(shape.head_size)
            weights[prefix + "self_attention.k_layernorm.weight"] = gain(shape.head_size)
        if features.sandwich:
            weights[prefix + "post_self_attn_layernorm.weight"] = gain(shape.hidden)
            weights[prefix + "post_mlp_layernorm.weight"] = gain(shape.hidden)
    weights["decoder.final_layernorm.weight"] = gain(shape.hidden)
    weights["output_layer.weight"] = matrix(shape.vocab, shape.hidden)
    return {name: value.half().double() for name, value in weights.items()}


def random_batch(shape: Shape, seed: int = 11) -> tuple[Tensor, Tensor]:
    """Tokens and labels, int64 [b, s]."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(shape.vocab, (shape.batch, shape.sequence + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def reference_logits(weights: dict[str, Tensor], tokens: Tensor, shape: Shape, features: Features) -> Tensor:
    """Logits [b, s, V], soft-capped if the features say so."""
    x = weights["embedding.word_embeddings.weight"][tokens]
    for layer in range(shape.layers):
        prefix = f"decoder.layers.{layer}."
        attention = _attention(weights, prefix, rms_norm(x, weights[prefix + "input_layernorm.weight"], shape), shape)
        if features.sandwich:
            attention = rms_norm(attention, weights[prefix + "post_self_attn_layernorm.weight"], shape)
        x = x + attention
        mlp = _mlp(weights, prefix, rms_norm(x, weights[prefix + "pre_mlp_layernorm.weight"], shape))
        if features.sandwich:
            mlp = rms_norm(mlp, weights[prefix + "post_mlp_layernorm.weight"], shape)
        x = x + mlp
    logits = rms_norm(x, weights["decoder.final_layernorm.weight"], shape) @ weights["output_layer.weight"].T
    return features.softcap * torch.tanh(logits / features.softcap) if features.softcap else logits


def reference_step(
    weights: dict[str, Tensor], tokens: Tensor, labels: Tensor, shape: Shape, features: Features
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token [b, s], and the gradient of their mean with respect to every weight."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    logits = reference_logits(leaves, tokens, shape, features)
    log_partition = torch.logsumexp(logits, dim=-1)
    loss = log_partition - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    loss = loss + features.z_loss * log_partition**2
    gradients = torch.autograd.grad(loss.mean(), list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def rms_norm(x: Tensor, gain: Tensor, shape: Shape) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension."""
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + shape.epsilon) * gain


def reference_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention, [b, heads, s, d] with as many key heads as query heads; `visible` is [sq, sk]."""
    scores = query @ key.transpose(-1, -2) / query.size(-1) ** 0.5
    return torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1) @ value


def _attention(weights: dict[str, Tensor], prefix: str, x: Tensor, shape: Shape) -> Tensor:
    """Megatron stores query, key and value by group: the group's queries, its key, its value."""
    batch, sequence, _ = x.shape
    per_group = shape.heads // shape.groups
    mixed = x @ weights[prefix + "self_attention.linear_qkv.weight"].T
    mixed = mixed.view(batch, sequence, shape.groups, per_group + 2, shape.head_size)
    query = mixed[..., :per_group, :].reshape(batch, sequence, shape.heads, shape.head_size)
    key, value = mixed[..., per_group, :], mixed[..., per_group + 1, :]
    if prefix + "self_attention.q_layernorm.weight" in weights:
        query = rms_norm(query, weights[prefix + "self_attention.q_layernorm.weight"], shape)
        key = rms_norm(key, weights[prefix + "self_attention.k_layernorm.weight"], shape)
    query, key = _rotate(query, shape), _rotate(key, shape)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    key, value = (part.repeat_interleave(per_group, dim=1) for part in (key, value))
    visible = torch.ones(sequence, sequence, dtype=torch.bool).tril()
    context = reference_attention(query, key, value, visible).transpose(1, 2).reshape(batch, sequence, -1)
    return context @ weights[prefix + "self_attention.linear_proj.weight"].T


def _rotate(x: Tensor, shape: Shape) -> Tensor:
    """Rotary positions: the pair (x_i, x_{i + d/2}) turns by position * base^(-2i/d). x is [b, s, heads, d]."""
    half = shape.head_size // 2
    speed = shape.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(x.size(1), dtype=torch.float64), speed)[None, :, None, :]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1)


def _mlp(weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    gate, up = (x @ weights[prefix + "mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ weights[prefix + "mlp.linear_fc2.weight"].T
