"""Layouts of Hugging Face transformers: which ones compute a model exactly, their `config.json`, and reading it back.

`kaiyuan` brings its own code and computes every model. The others are classes that serving engines know:

| layout | exact for |
| --- | --- |
| `llama` | none of the stabilisers, no bias |
| `qwen2` | none of the stabilisers, `--add-qkv-bias` |
| `qwen3` | `--qk-layernorm` alone, no bias |
| `gemma3` | QK-norm and sandwich norm, with or without soft-cap; exact in FP32, rounded in 16 bits |

All but `gemma3` have the names of our own layout, so that only `config.json` differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_kaiyuan.errors import ConvertError
from megatron_kaiyuan.export.architecture import Architecture

__all__ = ["Layout", "LayoutName", "architecture_from_config", "choose_layout"]

LayoutName = Literal["kaiyuan", "llama", "qwen2", "qwen3", "gemma3"]

_STOCK_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_MODEL_TYPES = {"gemma3": "gemma3_text"}
_EXACT: tuple[LayoutName, ...] = ("llama", "qwen2", "qwen3")
_IMPORTED = ("kaiyuan", "llama", "qwen2", "qwen3")
_NEEDED = (
    "num_hidden_layers, hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim, "
    "vocab_size, max_position_embeddings, rms_norm_eps, initializer_range, tie_word_embeddings, rope_theta (in "
    "rope_parameters), attention_bias (of query, key and value), qk_norm, sandwich_norm (the norms of each layer), and "
    "final_logit_softcapping (the soft-cap of its logits, or 0)"
)
_GEMMA_NORMS = {
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to store a model for transformers."""

    name: LayoutName
    architecture: Architecture

    @property
    def has_code(self) -> bool:
        """Whether the folder brings the model's code (`trust_remote_code`)."""
        return self.name == "kaiyuan"

    def config(self, dtype: torch.dtype) -> dict[str, object]:
        """Return the content of `config.json` for weights of `dtype`."""
        if self.name == "kaiyuan":
            return _kaiyuan_config(self.architecture, dtype)
        return _stock_config(self.architecture, self.name, dtype)

    def stored_name(self, name: str) -> str:
        """Return what `model.layers.3.input_layernorm.weight`, say, of our own layout is called here."""
        if self.name != "gemma3":
            return name
        return ".".join(_GEMMA_NORMS.get(segment, segment) for segment in name.split("."))

    def stored(self, name: str, part: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a part of our own layout as it is stored here.

        Args:
            name: Its name in our own layout.
            part: Its tensor.
            dtype: Of the exported weights.
        """
        if self.name == "gemma3":
            module = name.split(".")[-2]
            if module.endswith("norm"):
                part = part.double() - 1.0  # Gemma multiplies by 1 + weight
            elif module == "embed_tokens":
                # Gemma multiplies the embedding by sqrt(h), rounded to the weights' dtype
                part = part.double() / torch.tensor(self.architecture.hidden_size**0.5).to(dtype).double()
        return part.to(dtype)


def choose_layout(architecture: Architecture, wanted: LayoutName | Literal["auto"], dtype: torch.dtype) -> Layout:
    """Return the layout that was asked for, or the stock one that computes the model exactly, or our own.

    Raises:
        ConvertError: the layout does not compute this model; names what it lacks.
    """
    if wanted == "auto":
        exact: list[LayoutName] = [name for name in _EXACT if not _differences(architecture, name)]
        return Layout((*exact, "kaiyuan")[0], architecture)
    wrong = [] if wanted == "kaiyuan" else _differences(architecture, wanted)
    if wanted == "gemma3" and architecture.branch_scale_bits and dtype == torch.float16:
        wrong.append(f"branches at 2^-{architecture.branch_scale_bits} of their scale overflow FP16 there")
    if wrong:
        raise ConvertError(
            f"--layout {wanted}: {_STOCK_CLASSES[wanted]} differs from the model: {'; '.join(wrong)}. "
            "Give --layout auto, which takes a stock layout where one is exact and our own elsewhere"
        )
    return Layout(wanted, architecture)


def _differences(architecture: Architecture, name: LayoutName) -> list[str]:
    """What a stock layout would compute otherwise."""
    gemma = name == "gemma3"
    features = {
        "QK-norm": (architecture.qk_layernorm, name in ("qwen3", "gemma3")),
        "sandwich norm": (architecture.sandwich_norm, gemma),
        "a bias on queries, keys and values": (architecture.add_qkv_bias, name == "qwen2"),
        "soft-capped logits": (bool(architecture.logit_softcap), gemma and bool(architecture.logit_softcap)),
        "tied embeddings": (architecture.tied_embeddings, architecture.tied_embeddings and not gemma),
    }
    return [
        f"{feature}: {_yes(ours)} in the model, {_yes(theirs)} there"
        for feature, (ours, theirs) in features.items()
        if ours != theirs
    ]


def _yes(value: bool) -> str:  # noqa: FBT001
    return "yes" if value else "no"


def _shape(architecture: Architecture, dtype: torch.dtype) -> dict[str, object]:
    """Keys that all layouts share."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": architecture.padded_vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "head_dim": architecture.kv_channels,
        "max_position_embeddings": architecture.max_position_embeddings,
        "rms_norm_eps": architecture.layernorm_epsilon,
        "initializer_range": architecture.init_method_std,
        "tie_word_embeddings": architecture.tied_embeddings,
        "use_cache": True,
    }


def _read_shape(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shape in a config, with the base of the rotary positions.

    Undoes `_shape`. Raises KeyError for a key that is missing.
    """
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "padded_vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "rotary_base": float(rope["rope_theta"]),
        "layernorm_epsilon": config["rms_norm_eps"],
        "init_method_std": config["initializer_range"],
        "tied_embeddings": config["tie_word_embeddings"],
    }


def _kaiyuan_config(architecture: Architecture, dtype: torch.dtype) -> dict[str, object]:
    return {
        "architectures": ["KaiyuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_kaiyuan.KaiyuanConfig",
            "AutoModel": "modeling_kaiyuan.KaiyuanModel",
            "AutoModelForCausalLM": "modeling_kaiyuan.KaiyuanForCausalLM",
        },
        "model_type": "kaiyuan",
        **_shape(architecture, dtype),
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": architecture.rotary_base},
        "attention_bias": architecture.add_qkv_bias,
        "qk_norm": architecture.qk_layernorm,
        "sandwich_norm": architecture.sandwich_norm,
        "final_logit_softcapping": architecture.logit_softcap or None,
        "branch_scale_bits": architecture.branch_scale_bits,
    }


def _stock_config(architecture: Architecture, name: LayoutName, dtype: torch.dtype) -> dict[str, object]:
    rope = {"rope_type": "default", "rope_theta": architecture.rotary_base}
    config = {
        "architectures": [_STOCK_CLASSES[name]],
        "model_type": _MODEL_TYPES.get(name, name),
        **_shape(architecture, dtype),
        "attention_dropout": 0.0,
    }
    if name == "gemma3":
        return config | {
            "hidden_activation": "silu",
            "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
            "layer_types": ["full_attention"] * architecture.num_layers,
            "query_pre_attn_scalar": architecture.kv_channels,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": architecture.logit_softcap or None,
            "attention_bias": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
    # `rope_theta` at the top is what transformers 4 and most engines read, `rope_parameters` what transformers 5 does
    config |= {"hidden_act": "silu", "rope_theta": architecture.rotary_base, "rope_parameters": rope}
    if name == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    if name == "qwen3":
        config |= {"attention_bias": False}
    return config if name == "llama" else config | {"use_sliding_window": False, "sliding_window": None}


def architecture_from_config(config: Mapping[str, Any], origin: str) -> Architecture:
    """Return what a model in a Hugging Face layout computes, by its `config.json`.

    Args:
        config: The parsed file. Keys that a stock layout leaves out have the defaults of transformers.
        origin: Its path, for errors.

    Raises:
        ConvertError: another architecture, a missing key, or a value that has no counterpart.
    """
    kind = config.get("model_type")
    if kind not in _IMPORTED:
        raise ConvertError(
            f"{origin}: model_type is {kind!r}; models of type {', '.join(_IMPORTED)} can be imported. "
            f"For another one, write its config.json as type 'kaiyuan', if the model computes one: {_NEEDED}"
        )
    if kind == "kaiyuan":
        return _from_kaiyuan(config, origin)
    return _from_stock(_with_defaults(config, kind), kind, origin)


def _with_defaults(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    filled: dict[str, Any] = CONFIG_MAPPING[kind].from_dict(dict(config)).to_dict()
    # Qwen2's class has no such key, and those of the others may leave it empty
    filled["head_dim"] = filled.get("head_dim") or filled["hidden_size"] // filled["num_attention_heads"]
    return filled


def _from_stock(config: Mapping[str, Any], kind: str, origin: str) -> Architecture:
    rope = config["rope_parameters"]
    _refuse(
        origin,
        {
            "hidden_act": (config["hidden_act"], "silu"),
            "rope_type": (rope.get("rope_type", "default"), "default"),
            "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
            "attention_bias": (bool(config.get("attention_bias")) and kind != "qwen2", False),
            "mlp_bias": (bool(config.get("mlp_bias")), False),
            "use_sliding_window": (bool(config.get("use_sliding_window")), False),
        },
    )
    return Architecture(
        **_read_shape(config, rope),
        qk_layernorm=kind == "qwen3",
        sandwich_norm=False,
        logit_softcap=0.0,
        add_qkv_bias=kind == "qwen2",
    )


def _refuse(origin: str, values: Mapping[str, tuple[object, object]]) -> None:
    for key, (value, wanted) in values.items():
        if value != wanted:
            raise ConvertError(f"{origin}: {key} is {value!r}; the training code has only {wanted!r}")


def _from_kaiyuan(config: Mapping[str, Any], origin: str) -> Architecture:
    rope = config.get("rope_parameters") or {}
    _refuse(
        origin,
        {
            "hidden_act": (config.get("hidden_act", "silu"), "silu"),
            "rope_type": (rope.get("rope_type", "default"), "default"),
        },
    )
    try:
        return Architecture(
            **_read_shape(config, rope),
            qk_layernorm=config["qk_norm"],
            sandwich_norm=config["sandwich_norm"],
            logit_softcap=float(config["final_logit_softcapping"] or 0.0),
            add_qkv_bias=config["attention_bias"],
            branch_scale_bits=config.get("branch_scale_bits", 0),  # folders written before 0.2 have none
        )
    except KeyError as error:
        raise ConvertError(f"{origin}: has no {error}; it was not written by the export") from error
