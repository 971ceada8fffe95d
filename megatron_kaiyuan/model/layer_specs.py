"""Layer specs: which modules a Kaiyuan layer is made of.

Both functions start from Megatron's own submodules and replace what differs, so an upstream change of the rest arrives
by itself. Checkpoint names are Megatron's; the output norms add `decoder.layers.N.post_self_attn_layernorm.weight` and
`decoder.layers.N.post_mlp_layernorm.weight`, the same in both specs.
"""

import importlib
from collections.abc import Callable, Collection
from dataclasses import fields
from functools import partial
from typing import Any, Literal

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.attention import SdpaCoreAttention
from megatron_kaiyuan.model.config import FUSIONS, KaiyuanTransformerConfig, LocalAttention
from megatron_kaiyuan.model.fused_attention import FusedRotarySelfAttention, ScaledValueSelfAttention
from megatron_kaiyuan.model.layers import (
    FusedSwiGLUMLP,
    KaiyuanLayerSubmodules,
    KaiyuanTransformerLayer,
    ResidualRMSNorm,
    StableRMSNorm,
)

__all__ = [
    "get_kaiyuan_decoder_spec",
    "get_kaiyuan_layer_local_spec",
    "get_kaiyuan_layer_with_transformer_engine_spec",
    "require_transformer_engine",
]


def get_kaiyuan_layer_local_spec(
    *,
    sandwich_norm: bool = True,
    qk_layernorm: bool = True,
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm",
    attention: LocalAttention = "sdpa",
    fusions: Collection[str] = (),
    scaled_branches: bool = False,
) -> ModuleSpec:
    """A layer of Megatron-Core's own modules; needs neither Transformer Engine nor Apex.

    Args:
        sandwich_norm: Norms on the outputs of attention and MLP.
        qk_layernorm: Norms on queries and keys; must agree with the config's `qk_layernorm`.
        normalization: RMSNorm uses `StableRMSNorm` everywhere; LayerNorm uses Megatron's, without sandwich norm.
        attention: The core attention.
        fusions: Of `FUSIONS`: norm, rotary and swiglu change modules; the fused norm with residual is chosen by config.
        scaled_branches: Attention and MLP that obey the config's `branch_scale_bits`.
    """
    submodules = get_gpt_layer_local_submodules(qk_layernorm=qk_layernorm, normalization=normalization)
    attention_submodules = submodules.self_attention.submodules
    if normalization == "RMSNorm":
        submodules.input_layernorm = ResidualRMSNorm if "norm" in fusions else StableRMSNorm
        submodules.pre_mlp_layernorm = submodules.input_layernorm
        if qk_layernorm:
            attention_submodules.q_layernorm = StableRMSNorm
            attention_submodules.k_layernorm = StableRMSNorm
    if attention != "unfused":
        attention_submodules.core_attention = SdpaCoreAttention
    _replace_modules(submodules, fusions, scaled_branches=scaled_branches)
    return _layer_spec(submodules, StableRMSNorm if sandwich_norm else None)


def get_kaiyuan_layer_with_transformer_engine_spec(
    *,
    sandwich_norm: bool = True,
    qk_layernorm: bool = True,
    fusions: Collection[str] = (),
    scaled_branches: bool = False,
) -> ModuleSpec:
    """A layer of Transformer Engine's modules; the output norms are Transformer Engine's too.

    Raises:
        ConfigError: Transformer Engine is absent, or installed but fails to import.
    """
    require_transformer_engine()
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    submodules = get_gpt_layer_with_transformer_engine_submodules(qk_layernorm=qk_layernorm)
    _replace_modules(submodules, fusions, scaled_branches=scaled_branches)
    return _layer_spec(submodules, extension.TENorm if sandwich_norm else None)


def get_kaiyuan_decoder_spec(
    config: KaiyuanTransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Everything `GPTModel` needs to build this pipeline stage's decoder, chosen by `config.transformer_impl`.

    Raises:
        ConfigError: another implementation than `local` or `transformer_engine`, or an unusable Transformer Engine.
    """
    options = config.kaiyuan
    fusions = _layer_fusions(config)
    scaled_branches = options.scales_branches
    if config.transformer_impl == "transformer_engine":
        return get_kaiyuan_layer_with_transformer_engine_spec(
            sandwich_norm=options.sandwich_norm,
            qk_layernorm=config.qk_layernorm,
            fusions=fusions,
            scaled_branches=scaled_branches,
        )
    if config.transformer_impl != "local":
        raise ConfigError(
            f"--transformer-impl {config.transformer_impl} has no Kaiyuan layer; use local or transformer_engine"
        )
    layer = get_kaiyuan_layer_local_spec(
        sandwich_norm=options.sandwich_norm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        attention=config.local_attention_kernel,
        fusions=fusions,
        scaled_branches=scaled_branches,
    )
    if config.normalization != "RMSNorm":
        return layer
    # Given only a layer, Megatron picks the final norm by what is installed; name it instead.
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=StableRMSNorm)


def _layer_fusions(config: KaiyuanTransformerConfig) -> set[str]:
    """The fusions of a layer that are on and that nothing else in the config speaks against."""
    fusions = {what for what in FUSIONS if config.kaiyuan.fuses(what)}
    if config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or ()):
        fusions.discard("norm")  # Megatron's recomputation of norms expects one output
    if config.num_moe_experts:
        fusions.discard("swiglu")
    elif config.kaiyuan.recompute_swiglu:
        fusions.add("swiglu")  # only our MLP can leave its activation out
    return fusions


def _replace_modules(
    submodules: TransformerLayerSubmodules, fusions: Collection[str], *, scaled_branches: bool
) -> None:
    """Put our attention and MLP where they fuse or scale something; their submodules stay."""
    if "rotary" in fusions:
        submodules.self_attention.module = FusedRotarySelfAttention
    elif scaled_branches:
        submodules.self_attention.module = ScaledValueSelfAttention
    if "swiglu" in fusions or scaled_branches:
        # Megatron gives the MLP as a partial of its class's own builder; its submodules are the keyword.
        submodules.mlp = partial(FusedSwiGLUMLP.as_mlp_submodule, **submodules.mlp.keywords)


def _layer_spec(submodules: TransformerLayerSubmodules, post_norm: Callable[..., Any] | None) -> ModuleSpec:
    if post_norm is None:
        return ModuleSpec(module=TransformerLayer, submodules=submodules)
    inherited = {entry.name: getattr(submodules, entry.name) for entry in fields(submodules)}
    sandwich = KaiyuanLayerSubmodules(**inherited, post_self_attn_layernorm=post_norm, post_mlp_layernorm=post_norm)
    return ModuleSpec(module=KaiyuanTransformerLayer, submodules=sandwich)


def require_transformer_engine() -> None:
    """Refuse with the reason and the remedy where Transformer Engine does not import.

    Raises:
        ConfigError: it is absent, or installed but broken.
    """
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a broken installation fails in many ways: ImportError, OSError, RuntimeError, ...
        raise ConfigError(
            "--transformer-impl transformer_engine, but Transformer Engine does not import "
            f"({type(error).__name__}: {error}); install the transformer-engine extra on a CUDA machine, "
            "or use --transformer-impl local"
        ) from error
