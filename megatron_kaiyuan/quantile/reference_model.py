"""The model that every slice trains: its shape as Megatron flags, its parameters and its operations.

All reference models are of the family of Kaiyuan-2B: RoPE, RMSNorm, SwiGLU, no biases, QK-norm, sandwich norm and
soft-cap.
"""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_kaiyuan.host.terminal import counted

__all__ = ["PRESETS", "ReferenceModel", "preset_model"]

PRESETS: dict[str, dict[str, object]] = {
    "kaiyuan_0.5b": {
        "num_layers": 24,
        "hidden_size": 896,
        "ffn_hidden_size": 4864,
        "num_attention_heads": 14,
        "num_query_groups": 2,
        "tied_embeddings": True,
    },
    "tiny": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 192,
        "num_attention_heads": 4,
        "num_query_groups": 2,
    },
}
"""`kaiyuan_0.5b`: 0.49 B parameters with a vocabulary of 151 936, about the size the report uses; `tiny`: for CPUs."""


class ReferenceModel(BaseModel):
    """Shape of the reference model, in fields that carry Megatron's names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_query_groups: int = Field(gt=0)
    tied_embeddings: bool = False
    """Whether the output layer shares the input embedding."""
    kaiyuan_logit_softcap: float = Field(default=30.0, ge=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> "ReferenceModel":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by {counted(self.num_attention_heads, 'head')}"
            )
        if self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"heads of {self.hidden_size // self.num_attention_heads} are odd, and rotary positions turn pairs; "
                "change hidden_size or num_attention_heads"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_query_groups "
                f"{self.num_query_groups}"
            )
        return self

    def flags(self) -> list[str]:
        """Megatron's flags for this shape."""
        embeddings = [] if self.tied_embeddings else ["--untie-embeddings-and-output-weights"]
        return [
            *f"--num-layers {self.num_layers} --hidden-size {self.hidden_size}".split(),
            *f"--ffn-hidden-size {self.ffn_hidden_size} --num-attention-heads {self.num_attention_heads}".split(),
            *f"--group-query-attention --num-query-groups {self.num_query_groups}".split(),
            *["--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"],
            *["--qk-layernorm", "--kaiyuan-sandwich-norm", "--attention-dropout", "0", "--hidden-dropout", "0"],
            *f"--kaiyuan-logit-softcap {self.kaiyuan_logit_softcap:g} --init-method-std 0.02".split(),
            *embeddings,
        ]

    @property
    def layer_parameters(self) -> int:
        """Parameters of all layers and the last norm, without embeddings."""
        head = self.hidden_size // self.num_attention_heads
        qkv = self.hidden_size + 2 * self.num_query_groups * head
        matrices = self.hidden_size * (qkv + self.hidden_size + 3 * self.ffn_hidden_size)
        norms = 4 * self.hidden_size + 2 * head  # two before and two after attention and MLP; QK-norm
        return self.num_layers * (matrices + norms) + self.hidden_size

    def parameters(self, vocab_size: int) -> int:
        """All parameters, the vocabulary's padding left out."""
        return self.layer_parameters + vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    def flops_per_token(self, vocab_size: int, seq_length: int) -> float:
        """Operations of forward and backward for one token.

        6 for each parameter that a token is multiplied with (the input embedding is a look-up), and
        12 x layers x hidden x sequence for attention, at half because it is causal (Narayanan et al., 2104.04473).
        """
        multiplied = self.layer_parameters + vocab_size * self.hidden_size
        return 6.0 * multiplied + 12.0 * self.num_layers * self.hidden_size * seq_length / 2


def preset_model(name: str) -> dict[str, object]:
    """Fields of a named reference model.

    Raises:
        ValueError: no such name.
    """
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(f"model: {name!r} is unknown; name one of {known}, or give num_layers and the rest")
    return PRESETS[name]
