"""Configuration of the Kaiyuan language model for Hugging Face transformers. Copied beside the weights at export."""

from typing import Any

import transformers
from transformers import PretrainedConfig

_OLDEST = (5, 2)

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < _OLDEST:
    raise ImportError(
        f"the Kaiyuan model needs transformers 5.2 or later, found {transformers.__version__}; "
        "pip install 'transformers>=5.2'"
    )

__all__ = ["KaiyuanConfig"]


class KaiyuanConfig(PretrainedConfig):  # type: ignore[no-untyped-call]  # transformers leaves a hook untyped
    """Shape and options of a decoder-only model.

    Names are those of Llama and Gemma 2 where they have one.
    """

    model_type = "kaiyuan"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the name and type are of transformers)
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2048,
        intermediate_size: int = 6144,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        max_position_embeddings: int = 4096,
        rms_norm_eps: float = 1e-6,
        rope_parameters: dict[str, Any] | None = None,
        initializer_range: float = 0.018,
        hidden_act: str = "silu",
        attention_bias: bool = False,  # noqa: FBT001 (transformers passes them by keyword)
        qk_norm: bool = True,  # noqa: FBT001
        sandwich_norm: bool = True,  # noqa: FBT001
        final_logit_softcapping: float | None = 30.0,
        branch_scale_bits: int = 0,
        tie_word_embeddings: bool = False,  # noqa: FBT001
        use_cache: bool = True,  # noqa: FBT001
        **kwargs: Any,
    ) -> None:
        """Describe a model.

        Args:
            vocab_size: Rows of the embedding, padding included; the padding takes part in the softmax as in training.
            hidden_size: Width of the residual stream.
            intermediate_size: Width inside the SwiGLU.
            num_hidden_layers: Layers.
            num_attention_heads: Query heads.
            num_key_value_heads: Key and value heads; divides the query heads.
            head_dim: Width of a head.
            max_position_embeddings: Longest context the model was trained on, tokens.
            rms_norm_eps: Epsilon of every norm.
            rope_parameters: `rope_theta`, and `rope_type`, of which only `default` is known.
            initializer_range: Standard deviation of untrained weights.
            hidden_act: Only `silu`.
            attention_bias: Whether queries, keys and values have a bias.
            qk_norm: RMSNorm on each head's queries and keys, before the rotation.
            sandwich_norm: RMSNorm on the outputs of attention and MLP, inside the residual branch.
            final_logit_softcapping: c of `c * tanh(logits / c)`; None = off.
            branch_scale_bits: K; attention and MLP are computed at 2^-K of their scale, so that their products stay
                within FP16. Their output norm takes the factor back, so the function is the same for every K.
            tie_word_embeddings: Whether the output matrix is the embedding.
            use_cache: Whether generation keeps keys and values.
            **kwargs: As in every configuration of transformers.
        """
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.initializer_range = initializer_range
        self.hidden_act = hidden_act
        self.attention_bias = attention_bias
        self.qk_norm = qk_norm
        self.sandwich_norm = sandwich_norm
        self.final_logit_softcapping = final_logit_softcapping
        self.branch_scale_bits = branch_scale_bits
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)  # type: ignore[call-arg]
        self.refuse_unknown()

    def refuse_unknown(self) -> None:
        """Refuse values that the model does not compute, also those that were set after `__init__`.

        Raises:
            ValueError: names the value and what the model has.
        """
        rope = self.rope_parameters
        only = {
            "hidden_act": (self.hidden_act, "silu"),
            "rope_type": (rope.get("rope_type", "default"), "default"),
            "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
            "sliding_window": (getattr(self, "sliding_window", None), None),
            "attn_logit_softcapping": (getattr(self, "attn_logit_softcapping", None), None),
        }
        for name, (value, known) in only.items():
            if value != known:
                raise ValueError(f"{name} is {value!r}; the Kaiyuan model knows only {known!r}")
        cap = self.final_logit_softcapping
        if cap is not None and not cap > 0:
            raise ValueError(f"final_logit_softcapping is {cap}; give a positive number, or null for no cap")
        if self.branch_scale_bits and not self.sandwich_norm:
            raise ValueError(
                f"branch_scale_bits is {self.branch_scale_bits}; it needs sandwich_norm, which takes it back"
            )
