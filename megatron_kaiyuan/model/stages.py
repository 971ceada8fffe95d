"""Which pipeline stages see the data: the first, the last, and those of multi-token prediction."""

import argparse

from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.training.utils import is_first_or_last_pipeline_stage

__all__ = ["embedding_ranks", "loads_data", "predicts_further_tokens", "sees_data"]


def _layout(args: argparse.Namespace) -> PipelineParallelLayerLayout | None:
    layout = args.pipeline_model_parallel_layout
    return layout and PipelineParallelLayerLayout(layout, args.pipeline_model_parallel_size)


def embedding_ranks(args: argparse.Namespace, pp_ranks: list[int]) -> list[int]:
    """Return which ranks of a pipeline have the embedding's weights, and sum their gradient over them.

    The first stage embeds, so do those of multi-token prediction, and the last one's output layer may be tied to it.
    Megatron's default is the first and the last, whatever they have.
    """
    last = [pp_ranks[-1]]
    having = [] if args.untie_embeddings_and_output_weights else last
    if args.mtp_num_layers:
        layout = _layout(args)
        having += (
            last
            if layout is None
            else [rank for rank, stages in zip(pp_ranks, layout.layout, strict=True) if _has_mtp(stages)]
        )
    return sorted({pp_ranks[0], *having})


def _has_mtp(stages: list[list[LayerType]]) -> bool:
    return any(LayerType.mtp in stage for stage in stages)


def predicts_further_tokens(args: argparse.Namespace, vp_stage: int | None) -> bool:
    """Return whether this stage has layers of multi-token prediction, and so embeds the tokens again."""
    if not args.mtp_num_layers:
        return False
    return bool(
        mtp_on_this_rank(_layout(args), args.mtp_num_layers, ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    )


def sees_data(args: argparse.Namespace, vp_stage: int | None) -> bool:
    """Return whether this stage works on tokens or labels."""
    return bool(is_first_or_last_pipeline_stage(vp_stage)) or predicts_further_tokens(args, vp_stage)


def loads_data(args: argparse.Namespace, vp_stage: int | None) -> bool:
    """Return whether this rank reads the data of its stage, and hands it to the others of its tensor-parallel group."""
    return sees_data(args, vp_stage) and parallel_state.get_tensor_model_parallel_rank() == 0
