"""Core attention through torch's scaled dot-product attention (SDPA), for the local spec.

Overflow: a score is a sum of d products of FP16 numbers. In Megatron's unfused attention the scores are written in FP16
    ([b, n, sq, sk] values), so one beyond 65 504 becomes infinite and its row NaN.
Bound: with QK-norm |q.k| <= d * max|gain_q| * max|gain_k| (128 at gain 1), divided by sqrt(d) afterwards. Without it
    nothing bounds q.k.
Remedy: SDPA's kernels keep scores and softmax in FP32 and never write them: only the output, a mean of values, is
    rounded to FP16. `--attention-softmax-in-fp32` and `--apply-query-key-layer-scaling` have nothing left to do.
Cost: none; memory O(s) instead of O(s^2), and faster on the CPU and on GPUs.
Upstream instead: `DotProductAttention` (unfused), or Transformer Engine's kernels.
Source: torch.nn.functional.scaled_dot_product_attention; FlashAttention (arXiv 2205.14135).

Shapes: sq, sk = sequence of queries and keys, b = batch, n = query heads and g = key/value groups of this
    tensor-parallel rank, d = head size.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.document_attention import attend_within_documents, holds_boundaries

__all__ = ["SdpaCoreAttention"]

_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# cuDNN first: on Hopper it takes half the time of torch's flash kernel (docs/benchmarks.md).
_KERNELS = {"sdpa": [SDPBackend.CUDNN_ATTENTION, *_WITHOUT_CUDNN], "sdpa-flash": _WITHOUT_CUDNN}
"""By the option; others leave the order to torch."""
_CAUSAL_MASKS = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)


class SdpaCoreAttention(MegatronModule):
    """Drop-in for Megatron's `DotProductAttention`: same arguments, same result up to rounding."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        del attention_type, cp_comm_type, pg_collection  # of no use here: no communication, self-attention only
        super().__init__(config=config)
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.kernels = _KERNELS.get(getattr(config, "local_attention_kernel", "sdpa"))
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [sq, b, n, d].
            key: [sk, b, g, d], g dividing n.
            value: [sk, b, g, d].
            attention_mask: Boolean, broadcastable to [b, n, sq, sk], True = hidden. It replaces the causal mask, as in
                Megatron; None leaves the causal mask to the kernel, which is faster. Or the boundaries of documents,
                int32 (`document_attention.py`): causal inside each.
            attn_mask_type: Overrides the module's own.
            attention_bias: Must be None.
            packed_seq_params: Must be None.

        Returns:
            [sq, b, n * d], in the dtype of `query`.

        Raises:
            ConfigError: packed sequences, an attention bias, a padding mask type without its mask, or dropout inside
                documents.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise ConfigError(
                "SDPA attention takes neither packed sequences nor an attention bias; "
                "use --transformer-impl transformer_engine"
            )
        if attention_mask is not None and holds_boundaries(attention_mask):
            self._check_documents(query, key)
            return attend_within_documents(query, key, value, attention_mask, self.softmax_scale)
        mask, is_causal = self._mask(query.size(0), key.size(0), attention_mask, attn_mask_type, query.device)
        kernels = _preferred(self.kernels, query)
        with self._dropout_rng(), kernels:
            # [sq, b, n, d] -> [b, n, sq, d], views only
            context = functional.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=key.size(2) != query.size(2),
            )
        # [b, n, sq, d] -> [sq, b, n * d]
        return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _check_documents(self, query: Tensor, key: Tensor) -> None:
        if self.dropout > 0 and self.training:
            raise ConfigError("attention inside documents has no dropout; add --attention-dropout 0")
        assert query.shape[:2] == key.shape[:2], "self-attention of whole windows"

    def _mask(
        self, sq: int, sk: int, attention_mask: Tensor | None, override: AttnMaskType | None, device: torch.device
    ) -> tuple[Tensor | None, bool]:
        """Return SDPA's `(attn_mask, is_causal)`.

        SDPA's boolean masks mark what is visible, Megatron's what is hidden.
        """
        if attention_mask is not None:
            return ~attention_mask, False
        mask_type = override or self.attn_mask_type
        if mask_type == AttnMaskType.no_mask or (mask_type in _CAUSAL_MASKS and sq == 1):
            return None, False
        if mask_type not in _CAUSAL_MASKS:
            raise ConfigError(f"attention mask type {mask_type.name} needs an attention mask, got None")
        if sq == sk:
            return None, True
        # Queries are the last sq of sk positions (a cache in front); SDPA's causal flag would align them to the first.
        return torch.ones(sq, sk, dtype=torch.bool, device=device).tril(sk - sq), False

    def _dropout_rng(self) -> AbstractContextManager[None]:
        """Each tensor-parallel rank holds other heads, so dropout draws from Megatron's per-rank random state."""
        if self.dropout == 0.0 or not self.training or self.config.sequence_parallel:
            return contextlib.nullcontext()
        fork: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return fork


def _preferred(kernels: list[SDPBackend] | None, query: Tensor) -> AbstractContextManager[None]:
    """Return a context with the order in which torch tries its kernels.

    torch's own order stays where results must repeat bit for bit, and on the CPU.
    """
    if kernels is None or not query.is_cuda or torch.are_deterministic_algorithms_enabled():
        return contextlib.nullcontext()
    chosen: AbstractContextManager[None] = sdpa_kernel(kernels, set_priority=True)
    return chosen
