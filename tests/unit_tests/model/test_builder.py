"""From Megatron's command line to a model, and the command lines that are refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kaiyuan.errors import ConfigError
from tests.helpers import run_distributed

COMMAND = """--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--ffn-hidden-size 48 --swiglu --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6 --qk-layernorm
--position-embedding-type rope --seq-length 16 --max-position-embeddings 16 --untie-embeddings-and-output-weights
--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3 --fp16 --mock-data --tokenizer-type NullTokenizer
--vocab-size 63 --make-vocab-size-divisible-by 64 --attention-dropout 0 --hidden-dropout 0 --transformer-impl local
--kaiyuan-sandwich-norm --kaiyuan-post-norm-depth-scaled --kaiyuan-branch-scale-bits 4 --kaiyuan-logit-softcap 30
--kaiyuan-z-loss 1e-4"""


DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True, "create_attention_mask_in_dataloader": False}
STOCK = {
    "kaiyuan_sandwich_norm": False,
    "kaiyuan_branch_scale_bits": 0,
    "kaiyuan_post_norm_depth_scaled": False,
    "kaiyuan_logit_softcap": 0.0,
    "kaiyuan_z_loss": 0.0,
    "kaiyuan_fusions": "none",
}
GRAPHS = {"cuda_graph_impl": "local", "inference_cuda_graph_scope": None}
DOCUMENT_VARIATIONS: dict[str, dict[str, Any]] = {
    "documents": {},
    "documents, dense mask, TE": {
        "create_attention_mask_in_dataloader": True,
        "reset_position_ids": False,
        "transformer_impl": "transformer_engine",
    },
    "documents, TE": {"transformer_impl": "transformer_engine"},
    "documents, unfused": {"kaiyuan_attention": "unfused"},
    "documents, PP": {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float16},
    "documents, CP": {"context_parallel_size": 2},
    "documents, positions": {"reset_position_ids": False},
    "documents, dropout": {"attention_dropout": 0.1},
    "documents, CUDA graphs": GRAPHS,
    "CUDA graphs alone": GRAPHS | {"reset_attention_mask": False},
}


def observe(_rank: int) -> dict[str, Any]:
    """The config and model of one command line, and the complaint about each variation of it."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_kaiyuan.arguments import arguments_provider
    from megatron_kaiyuan.host.cpu_platform import CPU_ARGUMENT_DEFAULTS
    from megatron_kaiyuan.model.builder import kaiyuan_builder
    from megatron_kaiyuan.model.config import kaiyuan_config_from_args
    from tests.unit_tests.model import tiny

    def parsed(**changes: Any) -> Any:
        sys.argv = ["pretrain", *COMMAND.split()]
        arguments = parse_args(extra_args_provider=arguments_provider(CPU_ARGUMENT_DEFAULTS))
        validate_args(arguments)
        arguments.padded_vocab_size = 64
        vars(arguments).update(changes)
        return arguments

    def complaint(action: Callable[[], object]) -> str:
        try:
            action()
        except ConfigError as error:
            return str(error)
        return "accepted"

    def without_transformer_engine(arguments: Any) -> object:
        sys.modules["transformer_engine.pytorch"] = None  # type: ignore[assignment]  # importing it fails
        arguments.transformer_impl = "transformer_engine"
        return kaiyuan_builder(arguments, pre_process=True, post_process=True)

    tiny.initialize_parallel(1, 1)
    config = kaiyuan_config_from_args(parsed())
    model = kaiyuan_builder(parsed(), pre_process=True, post_process=True)
    return {
        "options": {name: getattr(config.kaiyuan, name) for name in config.kaiyuan.__slots__},
        "megatron": (config.num_query_groups, config.layernorm_epsilon, config.qk_layernorm, config.fp16),
        "layer": type(model.decoder.layers[0]).__name__,
        "dtype": str(model.decoder.layers[0].mlp.linear_fc1.weight.dtype),
        "MLA": complaint(lambda: kaiyuan_config_from_args(parsed(multi_latent_attention=True))),
        "positions": complaint(lambda: kaiyuan_config_from_args(parsed(max_position_embeddings=8))),
        "spec": complaint(lambda: kaiyuan_builder(parsed(spec=["a", "b"]), pre_process=True, post_process=True)),
        "vocabulary": complaint(
            lambda: kaiyuan_builder(
                parsed(padded_vocab_size=63, tensor_model_parallel_size=2, tensor_parallel_num_weight_shards=2),
                pre_process=True,
                post_process=True,
            )
        ),
        **{
            name: complaint(lambda changes=changes: kaiyuan_config_from_args(parsed(**DOCUMENTS | changes)))
            for name, changes in DOCUMENT_VARIATIONS.items()
        },
        **{
            name: complaint(lambda options=options: without_transformer_engine(parsed(**options)))
            for name, options in {"TE absent": {}, "TE absent, stock": STOCK}.items()
        },
        "implementation": complaint(
            lambda: kaiyuan_builder(parsed(transformer_impl="inference_optimized"), pre_process=True, post_process=True)
        ),
    }


@pytest.fixture(scope="module")
def observations() -> dict[str, Any]:
    [result] = run_distributed(observe, 1)
    return dict(result)


@pytest.mark.distributed
def test_a_command_line_becomes_the_config_it_asks_for(observations: dict[str, Any]) -> None:
    assert observations["options"] == {
        "sandwich_norm": True,
        "post_norm_gain_init": 1.0,
        "post_norm_depth_scaled": True,
        "branch_scale_bits": 4,
        "raise_branch_scale_below": 0.0,
        "recompute_swiglu": False,
        "logit_softcap": 30.0,
        "z_loss": 1e-4,
        "attention": "auto",
        "fusions": "auto",
    }
    assert observations["megatron"] == (2, 1e-6, True, True)
    assert observations["layer"] == "KaiyuanTransformerLayer"
    assert observations["dtype"] == "torch.float16"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("variation", "expected"),
    [
        ("MLA", "--multi-latent-attention makes Megatron use another config class"),
        ("positions", "--seq-length 16 is longer than --max-position-embeddings 8"),
        ("spec", "--spec a b replaces the Kaiyuan layers"),
        ("vocabulary", "63 is not divisible by --tensor-model-parallel-size 2; raise --make-vocab-size-divisible-by"),
        ("TE absent", "does not import (ModuleNotFoundError"),
        ("TE absent, stock", "or use --transformer-impl local"),
        ("documents", "accepted"),
        ("documents, dense mask, TE", "accepted"),
        ("documents, TE", "needs SDPA, not transformer_engine attention: use --transformer-impl local"),
        ("documents, unfused", "needs SDPA, not unfused attention"),
        ("documents, PP", "use --pipeline-model-parallel-size 1, not 2"),
        ("documents, CP", "--context-parallel-size 2 needs --transformer-impl transformer_engine"),
        ("documents, positions", "add --reset-position-ids"),
        ("documents, dropout", "add --attention-dropout 0"),
        ("documents, CUDA graphs", "documents differs from batch to batch; remove --cuda-graph-impl"),
        ("CUDA graphs alone", "accepted"),
        ("implementation", "use local or transformer_engine"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused(
    variation: str, expected: str, observations: dict[str, Any]
) -> None:
    assert expected in observations[variation]


def refuse_transformer_engine() -> str:
    from megatron_kaiyuan.model.layer_specs import require_transformer_engine

    with pytest.raises(ConfigError) as caught:
        require_transformer_engine()
    return str(caught.value)


def test_absent_transformer_engine_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.delitem(sys.modules, "transformer_engine.pytorch", raising=False)
    assert "use --transformer-impl local" in refuse_transformer_engine()


def test_a_broken_transformer_engine_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('libcublas.so: undefined symbol')")
    for module in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    assert "OSError: libcublas.so: undefined symbol" in refuse_transformer_engine()
