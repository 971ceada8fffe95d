"""Layer specs: which modules a Kaiyuan layer is made of.

Everything starts from the spec that Megatron itself makes of the same config, layer by layer, and replaces what
differs. So experts, mixed layers and whatever else a flag asks for are built as upstream builds them, and an upstream
change arrives by itself. Checkpoint names are Megatron's; the output norms add
`decoder.layers.N.post_self_attn_layernorm.weight` and `decoder.layers.N.post_mlp_layernorm.weight`, the same in the
local spec and with Transformer Engine.
"""

import importlib
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs, get_gpt_mtp_block_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.attention import SdpaCoreAttention
from megatron_kaiyuan.model.config import FUSIONS, KaiyuanTransformerConfig
from megatron_kaiyuan.model.fused_attention import FusedRotarySelfAttention, ScaledValueSelfAttention
from megatron_kaiyuan.model.layers import (
    FusedSwiGLUMLP,
    KaiyuanLayerSubmodules,
    KaiyuanTransformerLayer,
    ResidualRMSNorm,
    StableRMSNorm,
)

__all__ = ["get_kaiyuan_decoder_spec", "get_kaiyuan_mtp_spec", "kaiyuan_layer_spec", "require_transformer_engine"]


def get_kaiyuan_decoder_spec(
    model_config: GPTModelConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return what `GPTModel` needs to build the decoder of this pipeline stage.

    Args:
        model_config: Holds a `KaiyuanTransformerConfig`.
        vp_stage: Virtual pipeline stage.
        pp_rank: Pipeline rank; None: this process's.

    Raises:
        ConfigError: another implementation than `local` or `transformer_engine`, or an unusable Transformer Engine.
    """
    config: KaiyuanTransformerConfig = model_config.transformer
    _check_implementation(config)
    stock = default_layer_spec(model_config, vp_stage)
    if isinstance(stock, TransformerBlockSubmodules):
        layers = [kaiyuan_layer_spec(layer, config) for layer in stock.layer_specs]
        return replace(stock, layer_specs=layers, layer_norm=_own_norm(stock.layer_norm, config))
    layer = kaiyuan_layer_spec(stock, config)
    if not config.uses_own_norms:
        return layer
    # Given only a layer, Megatron picks the final norm by what is installed; name it instead.
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=StableRMSNorm)


def get_kaiyuan_mtp_spec(
    model_config: GPTModelConfig, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the layers of multi-token prediction, of the same modules as the decoder's last layer.

    None where the config has none, or where this pipeline stage builds none.
    """
    config: KaiyuanTransformerConfig = model_config.transformer
    if config.mtp_num_layers is None:
        return None
    with_te = config.transformer_impl == "transformer_engine"
    last = get_gpt_decoder_layer_specs(
        config, with_te, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm, vp_stage=vp_stage
    )[-1]
    block = get_gpt_mtp_block_spec(
        config, kaiyuan_layer_spec(last, config), use_transformer_engine=with_te, vp_stage=vp_stage
    )
    if block is None:
        return None
    return replace(block, layer_specs=[_with_own_norms(layer, config) for layer in block.layer_specs])


def _with_own_norms(layer: ModuleSpec, config: KaiyuanTransformerConfig) -> ModuleSpec:
    parts = layer.submodules
    norms = {name: _own_norm(getattr(parts, name), config) for name in ("enorm", "hnorm", "layer_norm")}
    return replace(layer, submodules=replace(parts, **norms))


def kaiyuan_layer_spec(stock: ModuleSpec, config: KaiyuanTransformerConfig) -> ModuleSpec:
    """Return Megatron's spec of a layer with our modules in the place of those that they stand in for.

    Modules that ours do not stand in for (experts, other kinds of attention, other norms) stay; `stock` is not changed.

    Raises:
        ConfigError: sandwich norm around a layer of another class than Megatron's transformer layer.
    """
    fusions = _layer_fusions(config)
    parts = stock.submodules
    norm = partial(_own_norm, config=config, fused="norm" in fusions)
    changed: dict[str, Any] = {
        "input_layernorm": norm(parts.input_layernorm),
        "pre_mlp_layernorm": norm(parts.pre_mlp_layernorm),
        "self_attention": _attention(parts.self_attention, config, fused="rotary" in fusions),
    }
    if "swiglu" in fusions or config.kaiyuan.scales_branches:
        changed["mlp"] = _own_mlp(parts.mlp)
    if not config.kaiyuan.sandwich_norm:
        return replace(stock, submodules=replace(parts, **changed))
    if stock.module is not TransformerLayer:
        raise ConfigError(f"--kaiyuan-sandwich-norm is of Megatron's transformer layer, not of {stock.module}")
    inherited = {entry.name: getattr(parts, entry.name) for entry in fields(parts)} | changed
    output_norm = _output_norm(config)
    sandwich = KaiyuanLayerSubmodules(**inherited, post_self_attn_layernorm=output_norm, post_mlp_layernorm=output_norm)
    return replace(stock, module=KaiyuanTransformerLayer, submodules=sandwich)


def _layer_fusions(config: KaiyuanTransformerConfig) -> set[str]:
    """The fusions of a layer that are on and that nothing else in the config speaks against."""
    fusions = {what for what in FUSIONS if config.kaiyuan.fuses(what)}
    if config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or ()):
        fusions.discard("norm")  # Megatron's recomputation of norms expects one output
    if config.kaiyuan.recompute_swiglu:
        fusions.add("swiglu")  # only our MLP can leave its activation out
    return fusions


def _own_norm(builder: Any, config: KaiyuanTransformerConfig, *, fused: bool = False) -> Any:
    """Return our norm where Megatron's spec has torch's RMSNorm.

    Other norms stay.
    """
    if builder is not WrappedTorchNorm or not config.uses_own_norms:
        return builder
    return ResidualRMSNorm if fused else StableRMSNorm


def _output_norm(config: KaiyuanTransformerConfig) -> Callable[..., Any]:
    if config.transformer_impl == "local":
        return StableRMSNorm
    norm: Callable[..., Any] = importlib.import_module("megatron.core.extensions.transformer_engine").TENorm
    return norm


def _attention(stock: ModuleSpec, config: KaiyuanTransformerConfig, *, fused: bool) -> ModuleSpec:
    """Return Megatron's self-attention with our norms, kernel and fusions.

    Another kind of attention stays.
    """
    if stock.module is not SelfAttention:
        return stock
    parts = stock.submodules
    norms = {name: _own_norm(getattr(parts, name), config) for name in ("q_layernorm", "k_layernorm")}
    core = parts.core_attention
    if core is DotProductAttention and config.local_attention_kernel != "unfused":
        core = SdpaCoreAttention
    module = SelfAttention
    if fused:
        module = FusedRotarySelfAttention
    elif config.kaiyuan.scales_branches:
        module = ScaledValueSelfAttention
    return replace(stock, module=module, submodules=replace(parts, core_attention=core, **norms))


def _own_mlp(builder: Any) -> Any:
    """Return our dense MLP where Megatron's spec has its own.

    Experts and Transformer Engine's fused MLP stay.
    """
    # Megatron gives the MLP as a partial of its class's own builder; its submodules are the keyword.
    if isinstance(builder, partial) and getattr(builder.func, "__self__", None) is MLP:
        return partial(FusedSwiGLUMLP.as_mlp_submodule, **builder.keywords)
    return builder


def _check_implementation(config: KaiyuanTransformerConfig) -> None:
    if config.transformer_impl == "transformer_engine":
        require_transformer_engine()
    elif config.transformer_impl != "local":
        raise ConfigError(
            f"--transformer-impl {config.transformer_impl} has no Kaiyuan layer; use local or transformer_engine"
        )


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
