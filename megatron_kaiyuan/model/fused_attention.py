"""Megatron's self-attention with scaled values, and with QK-norm and rotary positions as one kernel.

The kernel is `kernels/qk_norm_rope.py`. Everything else is Megatron's: the packed product, the core attention, the
output product, the names in checkpoints. A call that the kernel does not cover (inference with a cache, packed
sequences, gates, interleaved or partial rotation, fewer key/value groups than tensor-parallel ranks) takes Megatron's
own way.

Shapes: s = sequence, b = batch, g = key/value groups and n = query heads of this rank, d = head size.
"""

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from megatron_kaiyuan.kernels.qk_norm_rope import qk_norm_rope
from megatron_kaiyuan.model.hooks import weight_for_kernel

__all__ = ["FusedRotarySelfAttention", "ScaledValueSelfAttention"]


class ScaledValueSelfAttention(SelfAttention):
    """Drop-in for `SelfAttention` that computes 2^-K of its output, K being `branch_scale_bits`.

    The values are scaled: attention is linear in them, so its output and `linear_proj` of it come out scaled, in any
    kernel and under any parallelism. Values are the smallest tensor to scale (g heads where the output has n).
    """

    branch_scale: float = 1.0
    """2^-K, set by the layer, whose output norm takes it back."""

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's, the values [s, b, g, d] times 2^-K."""
        query, key, value, *gate = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        return query, key, self._scaled(value), *gate

    def _scaled(self, value: Tensor) -> Tensor:
        return value if self.branch_scale == 1.0 else value * self.branch_scale


class FusedRotarySelfAttention(ScaledValueSelfAttention):
    """Drop-in for `ScaledValueSelfAttention`."""

    _angles: Tensor | None = None
    """Rotary angles of the call in progress, [s, 1, 1, d], when the kernel does the rotation."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run as Megatron's attention does, without applying rotary angles twice.

        The kernel applies them.
        """
        if args or not self._covers(rotary_pos_emb, kwargs):
            unfused: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs
            )
            return unfused
        self._angles = rotary_pos_emb
        try:
            fused: tuple[Tensor, Tensor | None] = super().forward(hidden_states, attention_mask, **kwargs)
            return fused
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Queries [s, b, n, d], keys and values [s, b, g, d], normed and rotated if this call's angles are set."""
        if self._angles is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        packed, _bias = self.linear_qkv(hidden_states)
        groups = self.num_query_groups_per_partition
        query, key, value = qk_norm_rope(
            packed.view(*packed.shape[:2], groups, -1),
            self._angles.flatten(1),
            _gain(self.q_layernorm),
            _gain(self.k_layernorm),
            queries_per_group=self.num_attention_heads_per_partition // groups,
            head_size=self.hidden_size_per_attention_head,
            eps=self.config.layernorm_epsilon,
        )
        return query, key, self._scaled(value)

    def _covers(self, angles: Any, call: dict[str, Any]) -> bool:
        """Whether this call is ordinary training or evaluation of the ordinary layout."""
        config = self.config
        ordinary_call = isinstance(angles, Tensor) and all(value is None for value in call.values())
        if not ordinary_call or config.no_rope_freq or config.attention_output_gate or config.test_mode:
            return False
        full_rotation = angles.shape[1:] == (1, 1, self.hidden_size_per_attention_head)
        default_rotation = not config.rotary_interleaved and not config.multi_latent_attention and not _is_yarn(self)
        known_norms = _has_gain(self.q_layernorm) == _has_gain(self.k_layernorm) and self._norms_are_plain()
        return full_rotation and default_rotation and known_norms and config.num_query_groups >= self.world_size

    def _norms_are_plain(self) -> bool:
        """Return whether queries and keys have no norm, or RMSNorm with a gain.

        LayerNorm, L2 norm and a gain of 1 + w are not plain.
        """
        norms = [norm for norm in (self.q_layernorm, self.k_layernorm) if _has_gain(norm)]
        rms_norm = self.config.normalization == "RMSNorm" and not self.config.layernorm_zero_centered_gamma
        return not norms or (rms_norm and all(hasattr(norm, "weight") for norm in norms))


def _is_yarn(attention: SelfAttention) -> bool:
    """Whether the rotation is scaled (YaRN)."""
    return bool(attention._yarn_concentration_factor != 1.0)


def _has_gain(norm: Any) -> bool:
    return norm is not None and not isinstance(norm, IdentityOp)


def _gain(norm: Any) -> Tensor | None:
    return weight_for_kernel(norm) if _has_gain(norm) else None
