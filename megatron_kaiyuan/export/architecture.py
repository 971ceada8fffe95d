"""What a model computes, as far as its weights and both layouts must agree on it.

Also what has no counterpart there.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_kaiyuan.errors import ConvertError
from megatron_kaiyuan.host.quiet import quiet_megatron_import
from megatron_kaiyuan.host.terminal import counted

__all__ = ["OPTIONS_WITHOUT_EFFECT", "Architecture", "architecture_from_arguments"]

OPTIONS_WITHOUT_EFFECT = frozenset(
    {
        "post_norm_gain_init",
        "post_norm_depth_scaled",
        "raise_branch_scale_below",
        "recompute_swiglu",
        "z_loss",
        "attention",
        "fusions",
    }
)
"""Options of the Kaiyuan variant that set initial weights, the loss or a way to compute, not what a model computes."""

_OPTION_PREFIX = "kaiyuan_"

# Megatron's argument, the values it may have, and the flag to name. Anything else is another function of the weights.
_REQUIRED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("normalization", ("RMSNorm",), "--normalization"),
    ("swiglu", (True,), "--swiglu"),
    ("position_embedding_type", ("rope",), "--position-embedding-type"),
    ("add_bias_linear", (False,), "--disable-bias-linear"),
    ("rotary_percent", (1.0,), "--rotary-percent"),
    ("rotary_interleaved", (False,), "--rotary-interleaved"),
    ("rotary_seq_len_interpolation_factor", (None, 1), "--rotary-seq-len-interpolation-factor"),
    ("use_rope_scaling", (False,), "--use-rope-scaling"),
    ("rope_type", (None, "rope"), "--rope-type"),
    ("no_rope_freq", (None,), "--no-rope-freq"),
    ("window_size", (None,), "--window-size"),
    ("softmax_type", ("vanilla",), "--softmax-type"),
    ("qk_l2_norm", (False,), "--qk-l2-norm"),
    ("layernorm_zero_centered_gamma", (False,), "--apply-layernorm-1p"),
    ("apply_residual_connection_post_layernorm", (False,), "--apply-residual-connection-post-layernorm"),
    ("attention_output_gate", (False,), "--attention-output-gate"),
    ("activation_func_clamp_value", (None,), "--activation-func-clamp-value"),
    ("glu_linear_offset", (0.0,), "--glu-linear-offset"),
    ("use_mup", (False,), "--use-mup"),
    ("multi_latent_attention", (False,), "--multi-latent-attention"),
    ("experimental_attention_variant", (None,), "--experimental-attention-variant"),
    ("linear_attention_freq", (None,), "--linear-attention-freq"),
    ("num_experts", (None, 0), "--num-experts"),
    ("mtp_num_layers", (None, 0), "--mtp-num-layers"),
    ("heterogeneous_layers_config_path", (None,), "--heterogeneous-layers-config-path"),
    ("hybrid_layer_pattern", (None,), "--hybrid-layer-pattern"),
    ("spec", (None,), "--spec"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A dense decoder with rotary positions, RMSNorm and SwiGLU.

    Raises:
        ConvertError: sizes that cannot be.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key and value heads."""
    kv_channels: int
    """Width of a head."""
    padded_vocab_size: int
    """Rows of the embedding."""
    max_position_embeddings: int
    rotary_base: float
    layernorm_epsilon: float
    init_method_std: float
    qk_layernorm: bool
    sandwich_norm: bool
    logit_softcap: float
    """c of `c * tanh(logits / c)`; 0 = off."""
    add_qkv_bias: bool
    tied_embeddings: bool
    branch_scale_bits: int = 0
    """K: branches are computed at 2^-K of their scale, which their output norm takes back; needs sandwich norm."""

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in asdict(self).items() if type(value) is int}
        wrong = [f"{name} is {value}" for name, value in sizes.items() if value < (name != "branch_scale_bits")]
        if self.num_query_groups > 0 and self.num_attention_heads % self.num_query_groups:
            wrong.append(
                f"{counted(self.num_attention_heads, 'head')} do not divide among "
                f"{counted(self.num_query_groups, 'group')}"
            )
        if not 0 <= self.logit_softcap < float("inf"):
            wrong.append(f"logit_softcap is {self.logit_softcap}")
        if self.branch_scale_bits and not self.sandwich_norm:
            wrong.append(f"branch_scale_bits is {self.branch_scale_bits} without sandwich norm")
        if wrong:
            raise ConvertError(f"no such model: {'; '.join(wrong)}")

    @property
    def queries_per_group(self) -> int:
        """Query heads that share a key and a value."""
        return self.num_attention_heads // self.num_query_groups

    def to_arguments(self) -> dict[str, object]:
        """The same as Megatron's arguments."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("sandwich_norm", "logit_softcap", "branch_scale_bits"):
            values[_OPTION_PREFIX + name] = values.pop(name)
        values["untie_embeddings_and_output_weights"] = not values.pop("tied_embeddings")
        values["group_query_attention"] = self.num_query_groups != self.num_attention_heads
        return values | {name: allowed[0] for name, allowed, _ in _REQUIRED}


def architecture_from_arguments(arguments: argparse.Namespace) -> Architecture:
    """What the model of a checkpoint computes, by the arguments of its run.

    Raises:
        ConvertError: a feature that the exported model does not have; names the flag and both values.
    """
    given = vars(arguments)
    _refuse_other_functions(given)
    options = _options(given)
    heads = given["num_attention_heads"]
    return Architecture(
        num_layers=given["num_layers"],
        hidden_size=given["hidden_size"],
        ffn_hidden_size=given["ffn_hidden_size"],
        num_attention_heads=heads,
        num_query_groups=given["num_query_groups"] if given.get("group_query_attention") else heads,
        kv_channels=given["kv_channels"],
        padded_vocab_size=given["padded_vocab_size"],
        max_position_embeddings=given["max_position_embeddings"],
        rotary_base=float(given["rotary_base"]),
        layernorm_epsilon=given["layernorm_epsilon"],
        init_method_std=given["init_method_std"],
        qk_layernorm=given["qk_layernorm"],
        sandwich_norm=bool(options.get("sandwich_norm", False)),
        logit_softcap=float(options.get("logit_softcap", 0.0)),
        add_qkv_bias=given.get("add_qkv_bias", False),
        tied_embeddings=not given["untie_embeddings_and_output_weights"],
        branch_scale_bits=int(options.get("branch_scale_bits", 0)),
    )


def _refuse_other_functions(given: Mapping[str, Any]) -> None:
    wrong = [
        f"{flag} (the run has {name} = {given[name]!r}, the exported model {allowed[0]!r})"
        for name, allowed, flag in _REQUIRED
        if name in given and given[name] not in allowed
    ]
    if wrong:
        raise ConvertError(
            f"the model uses {'; '.join(wrong)}: KaiyuanForCausalLM does not compute that. Export a model trained "
            "without it, or add it to megatron_kaiyuan/export/modeling_kaiyuan.py, architecture.py and weight_names.py"
        )


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Kaiyuan options that a run has.

    A checkpoint of stock Megatron has none, which is all of them off.
    """
    with quiet_megatron_import():
        from megatron_kaiyuan.model.config import KaiyuanModelOptions

    known = {field.name: field.default for field in fields(KaiyuanModelOptions)}
    found = {name: given[_OPTION_PREFIX + name] for name in known if _OPTION_PREFIX + name in given}
    converted = {"sandwich_norm", "logit_softcap", "branch_scale_bits"} | OPTIONS_WITHOUT_EFFECT
    strange = [name for name, value in found.items() if name not in converted and value != known[name]]
    if strange:
        flags = ", ".join(f"--{_OPTION_PREFIX}{name}".replace("_", "-") for name in strange)
        raise ConvertError(f"{flags}: KaiyuanForCausalLM does not have it yet; export a model trained without it")
    return found
