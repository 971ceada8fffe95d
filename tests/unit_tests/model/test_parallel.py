"""Two processes: the same numbers under tensor, sequence and pipeline parallelism, and a checkpoint between them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import run_distributed
from tests.unit_tests.model import tiny
from tests.unit_tests.model.reference import Features, Shape, random_weights
from tests.unit_tests.model.test_model import FUSED, KAIYUAN, assert_matches_reference
from tests.unit_tests.model.tiny import Case, Outcome

FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = [
    Case(name="TP 2, no feature", tensor_parallel=2),
    Case(name="TP 2", features=KAIYUAN, tensor_parallel=2),
    Case(name="TP 2, FP16", features=KAIYUAN, tensor_parallel=2, half=True),
    Case(name="TP 2, unfused attention", features=KAIYUAN, tensor_parallel=2, attention="unfused"),
    Case(name="TP 2, sequence parallel", features=KAIYUAN, tensor_parallel=2, overrides={"sequence_parallel": True}),
    Case(
        name="TP 2, sequence parallel, full recompute",
        features=KAIYUAN,
        tensor_parallel=2,
        overrides=FULL_RECOMPUTE | {"sequence_parallel": True},
    ),
    Case(name="PP 2", features=KAIYUAN, pipeline_parallel=2),
    Case(name="TP 2, fused", features=KAIYUAN, tensor_parallel=2, fusions=FUSED),
    Case(
        name="TP 2, fused, FP16, weight gradients fused",
        features=KAIYUAN,
        tensor_parallel=2,
        half=True,
        fusions=FUSED,
        overrides={"gradient_accumulation_fusion": True},
    ),
    Case(
        name="TP 2, sequence parallel, fused",
        features=KAIYUAN,
        tensor_parallel=2,
        fusions=FUSED,
        overrides={"sequence_parallel": True},
    ),
    Case(name="PP 2, fused", features=KAIYUAN, pipeline_parallel=2, fusions=FUSED),
    Case(
        name="PP 2, FP16, FP32 residual",
        features=KAIYUAN,
        pipeline_parallel=2,
        half=True,
        overrides={"fp32_residual_connection": True},
    ),
]


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Outcome]]:
    return [tiny.outcomes_of(result) for result in run_distributed(tiny.train_steps, 2, CASES)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rank_has_the_float64_models_loss_and_its_part_of_the_gradients(
    case: Case, outcomes: list[dict[str, Outcome]]
) -> None:
    for outcome in outcomes:
        assert_matches_reference(case, outcome[case.name])
    seen = set().union(*(outcome[case.name].gradients for outcome in outcomes))
    assert seen == random_weights(case.shape, case.features).keys()


@pytest.mark.distributed
def test_tensor_parallel_ranks_agree_on_the_loss_bit_for_bit(outcomes: list[dict[str, Outcome]]) -> None:
    for case in CASES:
        losses = [outcome[case.name].loss for outcome in outcomes if outcome[case.name].loss is not None]
        assert len(losses) == case.tensor_parallel
        assert all(torch.equal(loss, losses[0]) for loss in losses), case.name


def checkpoint_entries(model: Any) -> Any:
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    return model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))


def save_checkpoint(_rank: int, case: Case, folder: str) -> None:
    from megatron.core import dist_checkpointing

    tiny.initialize_parallel(case.tensor_parallel, case.pipeline_parallel)
    model = tiny.build_stage(case)
    tiny.load_weights(model, random_weights(case.shape, case.features))
    dist_checkpointing.save(checkpoint_entries(model), folder)


def load_checkpoint(_rank: int, cases: list[Case], folder: str) -> dict[str, Any]:
    """This rank's weights after loading: value, dimension of the split, tensor-parallel rank."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_kaiyuan.monitoring.diagnosis import global_name

    loaded = {}
    for case in cases:
        tiny.initialize_parallel(case.tensor_parallel, case.pipeline_parallel)
        model = tiny.build_stage(case)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(dist_checkpointing.load(checkpoint_entries(model), folder))
        rank = parallel_state.get_tensor_model_parallel_rank()
        loaded[case.name] = {
            global_name(model, name): (tiny.portable(parameter), tiny.split_dimension(parameter), rank)
            for name, parameter in model.named_parameters()
        }
    return loaded


@pytest.mark.distributed
def test_a_checkpoint_saved_by_one_rank_loads_exactly_under_tp_2_and_pp_2(tmp_path: Path) -> None:
    shape = Shape(layers=4)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    run_distributed(save_checkpoint, 1, Case(name="one rank", shape=shape, features=KAIYUAN), str(folder))
    cases = [
        Case(name="TP 2", shape=shape, features=KAIYUAN, tensor_parallel=2),
        Case(name="PP 2", shape=shape, features=KAIYUAN, pipeline_parallel=2),
    ]
    ranks = run_distributed(load_checkpoint, 2, cases, str(folder))
    weights = random_weights(shape, KAIYUAN)
    for case in cases:
        seen: set[str] = set()
        for loaded in ranks:
            for name, (value, dimension, rank) in loaded[case.name].items():
                expected = tiny.shard(name, weights[name], dimension, rank, case.tensor_parallel)
                assert torch.equal(torch.from_numpy(value), expected.float()), (case.name, name)
                seen.add(name)
        assert seen == weights.keys()


def test_the_features_under_test_are_all_on() -> None:
    assert Features(sandwich=True, qk_norm=True, softcap=KAIYUAN.softcap, z_loss=KAIYUAN.z_loss) == KAIYUAN
    assert min(KAIYUAN.softcap, KAIYUAN.z_loss) > 0
