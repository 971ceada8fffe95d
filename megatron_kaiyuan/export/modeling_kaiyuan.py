# mypy: disable-error-code="no-untyped-call,untyped-decorator"
"""The Kaiyuan language model for Hugging Face transformers. Copied beside the weights at export.

`x += norm_post(f(norm_pre(x)))` for attention and SwiGLU, RMSNorm on queries and keys, and `c * tanh(logits / c)` on
the output; each is switched by the configuration. The same function as the training code computes, to rounding.

FP16 ends at 65 504, and the products before the output norms grow in training. With `branch_scale_bits` K they are
computed at 2^-K of their size: the factor enters on the values of attention and inside SwiGLU, in FP32 before its
rounding, and the output norms take it back exactly, RMSNorm(2^-K y; 4^-K eps) = RMSNorm(y; eps).

Shapes: b = batch, s = sequence, h = hidden, n = query heads, g = key/value heads, d = head size.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_kaiyuan import KaiyuanConfig

__all__ = ["KaiyuanForCausalLM", "KaiyuanModel"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) of `x`, [b, heads, s, d], by angles given as [b, s, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def plain_attention(
    module: "KaiyuanAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend with visible weights (`attn_implementation="eager"`).

    The softmax is in FP32.
    """
    key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class KaiyuanAttention(nn.Module):
    """Grouped-query attention with rotary positions and optional norms on queries and keys."""

    def __init__(self, config: KaiyuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.branch_scale = 2.0**-config.branch_scale_bits
        self.is_causal = True
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=config.attention_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, [b, s, h] to [b, s, h], and return the weights where the implementation has them."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), *angles)
        key = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), *angles)
        value = self.v_proj(x).view(heads).transpose(1, 2) * self.branch_scale
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        attend: Callable[..., Any] = plain_attention if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS[name]
        context, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(context.reshape(*x.shape[:-1], -1).contiguous()), weights


class KaiyuanMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: KaiyuanConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.branch_scale = 2.0**-config.branch_scale_bits

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP, [b, s, h] to [b, s, h].

        The activation is rounded once, as in training.
        """
        precise = torch.promote_types(x.dtype, torch.float32)
        gate, up = self.gate_proj(x).to(precise), self.up_proj(x).to(precise)
        return cast(Tensor, self.down_proj((nn.functional.silu(gate) * up * self.branch_scale).to(x.dtype)))


class KaiyuanDecoderLayer(GradientCheckpointingLayer):
    """One layer, whose `post_attention_layernorm` is the norm before the MLP, as in Llama and GLM-4."""

    def __init__(self, config: KaiyuanConfig, layer_idx: int) -> None:
        super().__init__()

        def output_norm() -> nn.Module:
            epsilon = config.rms_norm_eps * 4.0**-config.branch_scale_bits
            return nn.RMSNorm(config.hidden_size, epsilon) if config.sandwich_norm else nn.Identity()

        self.self_attn = KaiyuanAttention(config, layer_idx)
        self.mlp = KaiyuanMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_self_attn_layernorm = output_norm()
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_mlp_layernorm = output_norm()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[b, s, h] to [b, s, h]."""
        normed, x = self.input_layernorm(hidden_states), hidden_states
        branch, _ = self.self_attn(
            normed, angles=angles, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        x = x + self.post_self_attn_layernorm(branch)
        return cast(Tensor, x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x))))


class KaiyuanPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the model."""

    config_class = KaiyuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KaiyuanDecoderLayer"]  # noqa: RUF012 (as transformers declares it)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": KaiyuanDecoderLayer, "attentions": KaiyuanAttention}  # noqa: RUF012


class KaiyuanModel(KaiyuanPreTrainedModel):
    """Embedding, layers and the last norm."""

    def __init__(self, config: KaiyuanConfig) -> None:
        super().__init__(config)
        config.refuse_unknown()  # again: overrides of from_pretrained are set after the configuration was made
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(KaiyuanDecoderLayer(config, number) for number in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001 (the names and kinds of transformers)
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states, [b, s, h], of int64 ids [b, s] or embeddings [b, s, h].

        See transformers for the rest.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        angles = self._angles(position_ids, x)
        for layer in self.layers:
            # The stream alone is positional: checkpointing of gradients drops a cache only where it is a keyword.
            x = layer(x, attention_mask=mask, angles=angles, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values if use_cache else None
        )

    def _angles(self, position_ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of position * theta^(-2i/d), [b, s, d].

        They are computed in FP32 (FP64 for an FP64 model).
        """
        precise = torch.promote_types(x.dtype, torch.float32)
        size = self.config.head_dim
        exponents = torch.arange(0, size, 2, device=x.device, dtype=precise) / size
        angles = position_ids.to(precise).unsqueeze(-1) / self.config.rope_parameters["rope_theta"] ** exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class KaiyuanForCausalLM(KaiyuanPreTrainedModel, GenerationMixin):
    """The language model: logits, soft-capped where the configuration says so."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (as transformers declares it)
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: KaiyuanConfig) -> None:
        super().__init__(config)
        self.model = KaiyuanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001 (the names and kinds of transformers)
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, [b, s, vocabulary], and the loss where labels are given.

        Capped logits are in FP32.

        Args:
            input_ids: int64 [b, s].
            attention_mask: [b, s], 0 = padding.
            position_ids: int64 [b, s]; None = counted from the start of the cache.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: [b, s, h] in place of ids.
            labels: int64 [b, s], -100 = not counted.
            use_cache: Whether to return the cache.
            logits_to_keep: Compute only the last so many positions, or those of an index; 0 = all.
            **kwargs: For the attention implementation and the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        cap = self.config.final_logit_softcapping
        if cap is not None:
            # As in training: FP32, from the product in the weights' precision.
            logits = cap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
