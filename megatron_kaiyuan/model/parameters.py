"""Exact parameter count of a dense model from its config, before anything is allocated."""

from dataclasses import dataclass

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.config import KaiyuanTransformerConfig

__all__ = ["ParameterCount", "count_parameters"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Number of parameters of the whole model, all pipeline and tensor-parallel ranks together."""

    matrices: int
    """Weights of the linear layers in the blocks."""
    norms: int
    """Gains (and biases) of all norms but the output norms, QK-norm included."""
    output_norms: int
    """Gains of the sandwich's output norms; 0 without sandwich norm."""
    biases: int
    """Biases of the linear layers."""
    embeddings: int
    """Input embedding and, when untied, output matrix."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.matrices + self.norms + self.output_norms + self.biases + self.embeddings


def count_parameters(
    config: KaiyuanTransformerConfig, padded_vocab_size: int, *, tied_embeddings: bool = False
) -> ParameterCount:
    """Count the parameters of a dense GPT with rotary positions.

    Args:
        config: The whole model's config.
        padded_vocab_size: Rows of the embedding, padding included.
        tied_embeddings: Whether the output layer shares the embedding's weights.

    Raises:
        ConfigError: mixture of experts or multi-latent attention, which this formula does not cover.
    """
    if config.num_moe_experts or config.multi_latent_attention:
        raise ConfigError("the parameter count covers dense attention and MLP only, not --num-experts or MLA")
    hidden, ffn, layers, head = config.hidden_size, config.ffn_hidden_size, config.num_layers, config.kv_channels
    query = config.num_attention_heads * head
    qkv = query + 2 * config.num_query_groups * head
    fc1 = ffn * (2 if config.gated_linear_unit else 1)
    norm_vectors = 1 if config.normalization == "RMSNorm" else 2
    per_layer_norms = 2 * hidden + (2 * head if config.qk_layernorm else 0)
    biases = (qkv if config.add_bias_linear or config.add_qkv_bias else 0) + (
        hidden + fc1 + hidden if config.add_bias_linear else 0
    )
    return ParameterCount(
        matrices=layers * (hidden * qkv + query * hidden + hidden * fc1 + ffn * hidden),
        norms=norm_vectors * (layers * per_layer_norms + hidden),
        output_norms=layers * 2 * hidden if config.kaiyuan.sandwich_norm else 0,
        biases=layers * biases,
        embeddings=padded_vocab_size * hidden * (1 if tied_embeddings else 2),
    )
