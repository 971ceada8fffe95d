"""A checkpoint whose tensors are not the model's, all and no other, is refused with the tensor named, in any format."""

from pathlib import Path
from typing import Any

import pytest

from megatron_kaiyuan.checkpoints.fitting import misfit, require_fit
from megatron_kaiyuan.errors import ResumeError
from tests.helpers import run_distributed
from tests.unit_tests.model import command_lines
from tests.unit_tests.model.test_experts import EXPERTS

MODEL = {"a": (2, 3), "b": (4,)}


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (MODEL, None),
        ({"a": (2, 3)}, "has no b"),
        (MODEL | {"c": (1,)}, "has beside the model's tensors c"),
        (MODEL | {"b": (5,)}, "has another shape of b (5,) not (4,)"),
        ({"d": ()}, "has no a, b; has beside the model's tensors d"),
        (MODEL | {f"x{number}": () for number in range(9)}, "has beside the model's tensors x0, x1, x2 and 6 more"),
    ],
)
def test_what_one_side_lacks_is_named(stored: dict[str, tuple[int, ...]], told: str | None) -> None:
    assert misfit(MODEL, stored) == told


PAIRS = {
    "the same": ("--qk-layernorm", "--qk-layernorm"),
    "experts": (EXPERTS, EXPERTS),
    "saved without QK-norm": ("", "--qk-layernorm"),
    "saved with QK-norm": ("--qk-layernorm", ""),
    "saved with output norms": ("--kaiyuan-sandwich-norm", ""),
    "saved without experts": ("", EXPERTS),
    "saved with more layers": ("--num-layers 4", ""),
}
NAMED = {
    "the same": None,
    "experts": None,
    "saved without QK-norm": "has no {}self_attention.k_layernorm.weight",
    "saved with QK-norm": "has beside the model's tensors {}self_attention.k_layernorm.weight",
    "saved with output norms": "has beside the model's tensors {}post_mlp_layernorm.weight",
    "saved without experts": "has no {}mlp.",
    "saved with more layers": "has ",
}


def load_each(_rank: int, folder: str) -> dict[str, dict[str, str | None]]:
    """What loading the second model of each pair from a checkpoint of the first complains of, by format."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    from megatron_kaiyuan.checkpoints.fitting import stored_shapes, wanted_shapes
    from megatron_kaiyuan.checkpoints.reading import Checkpoint
    from megatron_kaiyuan.errors import ResumeError
    from megatron_kaiyuan.training import loaded_model

    parallel_state.initialize_model_parallel()
    metadata = ensure_metadata_has_dp_cp_group(None)
    loaded_model.get_args = lambda: command_lines.argparse.Namespace(load="run")
    found: dict[str, dict[str, str | None]] = {}
    for name, (saved, loading) in PAIRS.items():
        first, second = command_lines.build_stage(saved), command_lines.build_stage(loading)
        place = Path(folder) / name
        place.mkdir()
        dist_checkpointing.save(first.sharded_state_dict(metadata=metadata), str(place))
        stored = stored_shapes(Checkpoint(place, 1))
        distributed = misfit(wanted_shapes(second.sharded_state_dict(metadata=metadata)), stored)
        try:
            with loaded_model._takes_all_tensors([second]):
                second.load_state_dict(first.state_dict_for_save_checkpoint(), strict=False)
            legacy = None
        except ResumeError as error:
            legacy = str(error)
        found[name] = {"torch_dist": distributed, "torch": legacy}
    return found


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str | None]]:
    [found] = run_distributed(load_each, 1, str(tmp_path_factory.mktemp("checkpoints")))
    return dict(found)


@pytest.mark.distributed
@pytest.mark.parametrize("form", ["torch_dist", "torch"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_model_takes_the_whole_checkpoint_or_nothing(name: str, form: str, loaded: dict[str, Any]) -> None:
    told, expected = loaded[name][form], NAMED[name]
    layer = "decoder.layers." if form == "torch_dist" else "decoder.layers.0."
    if expected is None:
        assert told is None
    else:
        assert expected.format(layer) in str(told)


def test_the_empty_state_of_a_layer_of_transformer_engine_is_no_weight() -> None:
    weight = {"decoder.layers.0.mlp.linear_fc1.weight": (4, 2)}
    empty = {"decoder.layers.0.self_attention.core_attention._extra_state": (0,)}
    assert misfit(weight | empty, weight) is None
    assert misfit(weight, {**weight, "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2": (0,)}) is None
    assert "linear_fc1.weight" in str(misfit(weight | empty, empty))


def test_a_tensor_that_a_flag_of_training_makes_is_explained() -> None:
    weight = {"a": (2,)}
    with pytest.raises(
        ResumeError, match=r"router.qb_beta: it is of another model \(--moe-router-load-balancing-type qu"
    ):
        require_fit("--load c", weight | {"decoder.layers.mlp.router.qb_beta": (4,)}, weight)
    with pytest.raises(ResumeError, match="has no b: it is of another model; leave"):
        require_fit("--load c", {**weight, "b": (1,)}, weight)
