"""What a model computes, as far as its weights and both layouts must agree on it; and what has no counterpart there."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from megatron_kaiyuan.errors import ConvertError
from megatron_kaiyuan.host.quiet import quiet_megatron_import

__all__ = ["OPTIONS_WITHOUT_EFFECT", "Architecture", "architecture_from_arguments", "architecture_from_config"]

OPTIONS_WITHOUT_EFFECT = frozenset(
    {
        "post_norm_gain_init",
        "post_norm_depth_scaled",
        "branch_scale_bits",
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

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in asdict(self).items() if type(value) is int}
        wrong = [f"{name} is {value}" for name, value in sizes.items() if value < 1]
        if self.num_query_groups > 0 and self.num_attention_heads % self.num_query_groups:
            wrong.append(f"{self.num_attention_heads} heads do not divide among {self.num_query_groups} groups")
        if not 0 <= self.logit_softcap < float("inf"):
            wrong.append(f"logit_softcap is {self.logit_softcap}")
        if wrong:
            raise ConvertError(f"no such model: {'; '.join(wrong)}")

    @property
    def queries_per_group(self) -> int:
        """Query heads that share a key and a value."""
        return self.num_attention_heads // self.num_query_groups

    def to_arguments(self) -> dict[str, object]:
        """The same as Megatron's arguments."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("sandwich_norm", "logit_softcap"):
            values[_OPTION_PREFIX + name] = values.pop(name)
        values["untie_embeddings_and_output_weights"] = not values.pop("tied_embeddings")
        values["group_query_attention"] = self.num_query_groups != self.num_attention_heads
        return values | {name: allowed[0] for name, allowed, _ in _REQUIRED}

    def to_config(self, dtype: torch.dtype) -> dict[str, object]:
        """The same as a `config.json` of transformers.

        Args:
            dtype: Of the weights.
        """
        return {
            "architectures": ["KaiyuanForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_kaiyuan.KaiyuanConfig",
                "AutoModel": "modeling_kaiyuan.KaiyuanModel",
                "AutoModelForCausalLM": "modeling_kaiyuan.KaiyuanForCausalLM",
            },
            "model_type": "kaiyuan",
            "dtype": str(dtype).removeprefix("torch."),
            "vocab_size": self.padded_vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.kv_channels,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.layernorm_epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rotary_base},
            "initializer_range": self.init_method_std,
            "attention_bias": self.add_qkv_bias,
            "qk_norm": self.qk_layernorm,
            "sandwich_norm": self.sandwich_norm,
            "final_logit_softcapping": self.logit_softcap or None,
            "tie_word_embeddings": self.tied_embeddings,
            "use_cache": True,
        }


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
    """The Kaiyuan options that a run has; a checkpoint of stock Megatron has none, which is all of them off."""
    with quiet_megatron_import():
        from megatron_kaiyuan.model.config import KaiyuanModelOptions

    known = {field.name: field.default for field in fields(KaiyuanModelOptions)}
    found = {name: given[_OPTION_PREFIX + name] for name in known if _OPTION_PREFIX + name in given}
    converted = {"sandwich_norm", "logit_softcap"} | OPTIONS_WITHOUT_EFFECT
    strange = [name for name, value in found.items() if name not in converted and value != known[name]]
    if strange:
        flags = ", ".join(f"--{_OPTION_PREFIX}{name}".replace("_", "-") for name in strange)
        raise ConvertError(f"{flags}: KaiyuanForCausalLM does not have it yet; export a model trained without it")
    return found


def architecture_from_config(config: Mapping[str, Any], origin: str) -> Architecture:
    """What a model in Hugging Face's layout computes, by its `config.json`.

    Args:
        config: The parsed file; keys that are missing have no default here.
        origin: Its path, for errors.

    Raises:
        ConvertError: another architecture, a missing key, or a value that has no counterpart.
    """
    if config.get("model_type") != "kaiyuan":
        raise ConvertError(
            f"{origin}: model_type is {config.get('model_type')!r}; only models of type 'kaiyuan', as the export "
            "writes them, can be imported"
        )
    rope = config.get("rope_parameters") or {}
    for key, value, wanted in (
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("rope_type", rope.get("rope_type", "default"), "default"),
    ):
        if value != wanted:
            raise ConvertError(f"{origin}: {key} is {value!r}; the training code has only {wanted!r}")
    try:
        return Architecture(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config["num_key_value_heads"],
            kv_channels=config["head_dim"],
            padded_vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            rotary_base=float(rope["rope_theta"]),
            layernorm_epsilon=config["rms_norm_eps"],
            init_method_std=config["initializer_range"],
            qk_layernorm=config["qk_norm"],
            sandwich_norm=config["sandwich_norm"],
            logit_softcap=float(config["final_logit_softcapping"] or 0.0),
            add_qkv_bias=config["attention_bias"],
            tied_embeddings=config["tie_word_embeddings"],
        )
    except KeyError as error:
        raise ConvertError(f"{origin}: has no {error}; it was not written by the export") from error
