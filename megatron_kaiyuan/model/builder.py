"""Build the model from Megatron's arguments, in the shape that `megatron.training` calls a model builder."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models import gpt
from megatron.training.models.gpt import GPTModelBuilder

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.model.config import KaiyuanTransformerConfig, kaiyuan_config_from_args
from megatron_kaiyuan.model.layer_specs import (
    get_kaiyuan_decoder_spec,
    get_kaiyuan_mtp_spec,
    require_transformer_engine,
)
from megatron_kaiyuan.model.output_head import install_output_head

__all__ = ["kaiyuan_builder"]


def kaiyuan_builder(
    args: argparse.Namespace,
    pre_process: bool,  # noqa: FBT001 (Megatron's builder signature)
    post_process: bool,  # noqa: FBT001
    vp_stage: int | None = None,
    config: KaiyuanTransformerConfig | None = None,
    pg_collection: Any = None,
) -> GPTModel:
    """Build one pipeline stage.

    With every option off this is the model of Megatron's own builder, bit for bit: same modules, same initial weights.

    Args:
        args: Megatron's parsed and validated arguments with the `kaiyuan_*` options.
        pre_process: Whether the stage has the embedding.
        post_process: Whether the stage has the output layer.
        vp_stage: Virtual pipeline stage.
        config: Transformer config; made from `args` when None.
        pg_collection: Process groups; Megatron's global ones when None.

    Raises:
        ConfigError: flags that cannot work together; see `kaiyuan_config_from_args`.
    """
    config = kaiyuan_config_from_args(args) if config is None else config
    _check_arguments(args, config)
    pg_collection = ProcessGroupCollection.use_mpu_process_groups() if pg_collection is None else pg_collection
    model_config = gpt_config_from_args(args, config=config)
    build = partial(
        GPTModelBuilder(model_config).build_model,
        pg_collection,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )
    if config.has_stock_layers:
        model = build()
    else:
        model_config.transformer_layer_spec = get_kaiyuan_decoder_spec(
            model_config, vp_stage=vp_stage, pp_rank=get_pg_rank(pg_collection.pp)
        )
        with _mtp_layers_of(get_kaiyuan_mtp_spec(model_config, vp_stage=vp_stage)):
            model = build()
    install_output_head(model, config.kaiyuan)
    return model


@contextmanager
def _mtp_layers_of(spec: object) -> Iterator[None]:
    """Let Megatron's builder take this spec for multi-token prediction.

    It makes one of stock layers whatever the decoder's are, and has no argument for another.
    """
    original = gpt.mtp_block_spec
    gpt.mtp_block_spec = lambda *_args, **_kwargs: spec
    try:
        yield
    finally:
        gpt.mtp_block_spec = original


def _check_arguments(args: argparse.Namespace, config: KaiyuanTransformerConfig) -> None:
    if config.transformer_impl == "transformer_engine":
        require_transformer_engine()  # Megatron's own spec fails without a word of it
    vocabulary = args.padded_vocab_size
    if vocabulary is not None and vocabulary % config.tensor_model_parallel_size:
        raise ConfigError(
            f"a vocabulary of {vocabulary} is not divisible by --tensor-model-parallel-size "
            f"{config.tensor_model_parallel_size}; raise --make-vocab-size-divisible-by"
        )
