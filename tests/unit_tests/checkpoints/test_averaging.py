import io
import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_kaiyuan.checkpoints.averaging import average_checkpoints, choose_checkpoints, weights_of
from megatron_kaiyuan.checkpoints.parts import LazyTensor, read_rows, write_parts
from megatron_kaiyuan.checkpoints.reading import (
    Checkpoint,
    find_checkpoints,
    iteration_folder,
    new_checkpoint_folder,
    open_checkpoint,
    write_checkpoint,
)
from megatron_kaiyuan.errors import ConfigError

SHAPES = {
    "embedding.word_embeddings.weight": ((16, 8), torch.float16),
    "decoder.layers.mlp.linear_fc1.weight": ((3, 12, 8), torch.float16),
    "decoder.final_layernorm.weight": ((8,), torch.float32),
    "decoder.steps": ((2,), torch.int64),
}


def pickled(value: object) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream


def save(
    directory: Path, iteration: int, *, width: int = 8, plan: dict[str, object] | None = None, **args: object
) -> None:
    """A checkpoint as Megatron lays it out, with random weights, optimizer state, random state and arguments."""
    generator = torch.Generator().manual_seed(iteration)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 10).to(dtype)
        for name, (shape, dtype) in {**SHAPES, "output_layer.weight": ((16, width), torch.float16)}.items()
    }
    tensors["optimizer.state.exp_avg.output_layer.weight"] = torch.ones(16, width)
    values = {"seed": 7, "consumed_train_samples": 10 * iteration, "kaiyuan_plan_record": plan, **args}
    objects = {
        "common_state/shard_0_1": pickled([{"args": Namespace(**values), "iteration": iteration}]),
        "decoder.layers.mlp.linear_fc1._extra_state/shard_0_3": pickled(["extra", iteration]),
        "rng_state/shard_0.0_1.1": pickled(["random"]),
    }
    write_checkpoint(iteration_folder(directory, iteration), tensors, objects, {})
    (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def load_all(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in checkpoint.load_tensors(checkpoint.tensors).items()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for iteration in (5, 10, 15, 20):
        save(tmp_path / "run", iteration)
    return tmp_path / "run"


def test_a_mean_has_equal_weights() -> None:
    assert weights_of("mean", 4).tolist() == [0.25] * 4


def test_wma_weighs_by_age() -> None:
    np.testing.assert_allclose(weights_of("wma", 4), np.array([1, 2, 3, 4]) / 10, rtol=1e-15)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_ema_weights_are_those_of_the_recursion(alpha: float) -> None:
    values = np.eye(6)
    average = values[0]
    for value in values[1:]:
        average = alpha * value + (1 - alpha) * average
    np.testing.assert_allclose(weights_of(f"ema:{alpha}", 6), average, rtol=1e-12)


@pytest.mark.parametrize("kind", ["median", "ema", "ema:0", "ema:1.5", "ema:0.2.3", "ema:-1", ""])
def test_an_unknown_weighting_is_an_error(kind: str) -> None:
    with pytest.raises(ConfigError, match="use mean, wma, ema:A"):
        weights_of(kind, 3)


@pytest.mark.parametrize("kind", ["mean", "wma", "ema:0.2"])
def test_the_average_is_the_weighted_sum_rounded_once(run: Path, tmp_path: Path, kind: str) -> None:
    parts = choose_checkpoints(run, 3, None)
    average_checkpoints(parts, kind, tmp_path / "average")
    result = load_all(open_checkpoint(tmp_path / "average"))
    weights = weights_of(kind, 3)
    loaded = [load_all(part) for part in parts]
    for name, (_, dtype) in SHAPES.items():
        if not dtype.is_floating_point:
            continue
        exact = sum(weight * values[name].astype(np.float64) for weight, values in zip(weights, loaded, strict=True))
        # float32 sums err by at most 3 x 2^-24 of the largest part; that may move a float16 result by one unit (2^-10)
        unit = 2.0**-10 if dtype == torch.float16 else 0.0
        np.testing.assert_allclose(result[name], exact, rtol=unit, atol=3 * 2.0**-24 * 60)


def test_the_average_of_one_checkpoint_is_that_checkpoint(run: Path, tmp_path: Path) -> None:
    average_checkpoints(choose_checkpoints(run, 1, None), "mean", tmp_path / "average")
    result, original = open_checkpoint(tmp_path / "average"), open_checkpoint(run)
    for name, values in load_all(original).items():
        np.testing.assert_array_equal(load_all(result)[name], values)


def test_weights_and_extra_states_are_kept_and_optimizer_and_random_states_left_out(run: Path, tmp_path: Path) -> None:
    average_checkpoints(find_checkpoints(run), "mean", tmp_path / "average")
    stored = set(open_checkpoint(tmp_path / "average").reader.read_metadata().state_dict_metadata)
    objects = {"common_state/shard_0_1", "decoder.layers.mlp.linear_fc1._extra_state/shard_0_3"}
    assert stored == {*SHAPES, "output_layer.weight", *objects}


def test_objects_are_those_of_the_last_checkpoint(run: Path, tmp_path: Path) -> None:
    average_checkpoints(find_checkpoints(run), "mean", tmp_path / "average")
    result = open_checkpoint(tmp_path / "average")
    assert result.arguments.consumed_train_samples == 200
    extra = result.load_objects()["decoder.layers.mlp.linear_fc1._extra_state/shard_0_3"]
    assert torch.load(extra) == ["extra", 20]


def test_a_tensor_of_integers_is_taken_from_the_last_checkpoint(run: Path, tmp_path: Path) -> None:
    manifest = average_checkpoints(find_checkpoints(run), "mean", tmp_path / "average")
    assert manifest.taken_from_last == ("decoder.steps",)
    expected = load_all(open_checkpoint(run))["decoder.steps"]
    np.testing.assert_array_equal(load_all(open_checkpoint(tmp_path / "average"))["decoder.steps"], expected)


def test_the_manifest_says_what_was_averaged(run: Path, tmp_path: Path) -> None:
    average_checkpoints(choose_checkpoints(run, None, [10, 20]), "wma", tmp_path / "average")
    manifest = json.loads((iteration_folder(tmp_path / "average", 20) / "average.json").read_text())
    assert manifest["weights"] == "wma"
    assert [(part["iteration"], part["consumed_samples"]) for part in manifest["checkpoints"]] == [(10, 100), (20, 200)]
    assert sum(part["weight"] for part in manifest["checkpoints"]) == pytest.approx(1.0)


def test_a_stack_of_layers_is_averaged_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of checkpoints and layers, memory holds the parts of one."""
    layers, name = 5, "decoder.layers.mlp.linear_fc1.weight"
    for iteration in (10, 20, 30):
        values = torch.randn(layers, 4, 6, generator=torch.Generator().manual_seed(iteration))
        common = pickled([{"args": Namespace(seed=7, consumed_train_samples=iteration), "iteration": iteration}])
        with new_checkpoint_folder(iteration_folder(tmp_path / "run", iteration), {}) as folder:
            stack = LazyTensor((layers, 4, 6), torch.float32, [partial(values.narrow, 0, n, 1) for n in range(layers)])
            write_parts(folder, {name: stack}, {"common_state/shard_0_1": common})
    read: list[tuple[int, int]] = []

    def watched(checkpoint: Checkpoint, name: str, first: int, end: int) -> torch.Tensor:
        read.append((first, end))
        return read_rows(checkpoint, name, first, end)

    monkeypatch.setattr("megatron_kaiyuan.checkpoints.averaging.read_rows", watched)
    average_checkpoints(find_checkpoints(tmp_path / "run"), "mean", tmp_path / "average")
    assert sorted(read) == sorted([(n, n + 1) for n in range(layers)] * 3)
    parts = [load_all(checkpoint)[name] for checkpoint in find_checkpoints(tmp_path / "run")]
    result = load_all(find_checkpoints(tmp_path / "average")[0])[name]
    np.testing.assert_allclose(result, np.mean(parts, axis=0), atol=3 * 2.0**-24 * 5)


@pytest.mark.parametrize("field", ["kaiyuan_logit_softcap", "rotary_base", "kaiyuan_tokenizer"])
def test_a_model_of_the_same_shapes_that_computes_otherwise_is_refused(tmp_path: Path, field: str) -> None:
    for iteration, value in ((5, 1), (10, 2)):
        save(tmp_path / "run", iteration, **{field: value})
    with pytest.raises(ConfigError, match=r"different runs.*was 1 and is now 2"):
        average_checkpoints(find_checkpoints(tmp_path / "run"), "mean", tmp_path / "average")
    assert not (tmp_path / "average").exists()


def test_other_shapes_are_refused(run: Path, tmp_path: Path) -> None:
    save(run, 25, width=4)
    with pytest.raises(ConfigError, match=r"different models: output_layer\.weight"):
        average_checkpoints(find_checkpoints(run), "mean", tmp_path / "average")
    assert not (tmp_path / "average").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"seed": 8}, "--seed"), ({"consumed_train_samples": 200}, "does not grow"), ({"plan": {"a": 1}}, "only one")],
)
def test_another_run_is_refused(run: Path, tmp_path: Path, arguments: dict[str, object], reason: str) -> None:
    save(run, 25, **arguments)  # type: ignore[arg-type]  # `plan` is among them
    with pytest.raises(ConfigError, match=f"different runs.*{reason}"):
        average_checkpoints(find_checkpoints(run), "mean", tmp_path / "average")


def test_an_existing_output_is_never_written_over(run: Path, tmp_path: Path) -> None:
    average_checkpoints(find_checkpoints(run), "mean", tmp_path / "average")
    with pytest.raises(ConfigError, match="exists"):
        average_checkpoints(find_checkpoints(run), "wma", tmp_path / "average")


@pytest.mark.parametrize("kept", ["checkpoints", "tracker"])
def test_the_directory_of_a_run_is_no_output(run: Path, tmp_path: Path, kept: str) -> None:
    other = tmp_path / "other"
    save(other, 7)
    if kept == "tracker":
        iteration_folder(other, 7).rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"--output .*other.*another checkpoint; name a new directory"):
        average_checkpoints(find_checkpoints(run), "mean", other)
    assert not iteration_folder(other, 20).exists()
    assert (other / "latest_checkpointed_iteration.txt").read_text() == "7"


def test_progress_adds_up_to_what_is_read(run: Path, tmp_path: Path) -> None:
    checkpoints = find_checkpoints(run)
    advances: list[int] = []
    average_checkpoints(checkpoints, "mean", tmp_path / "average", advances.append)
    assert sum(advances) == sum(checkpoint.num_bytes for checkpoint in checkpoints)
    assert max(advances) < checkpoints[0].num_bytes


def test_averages_may_lie_beside_each_other_and_be_made_again(run: Path, tmp_path: Path) -> None:
    average_checkpoints(choose_checkpoints(run, None, [5, 10]), "mean", tmp_path / "average")
    average_checkpoints(find_checkpoints(run), "mean", tmp_path / "average")
    assert (tmp_path / "average" / "latest_checkpointed_iteration.txt").read_text() == "20"
    for iteration in (10, 20):
        iteration_folder(tmp_path / "average", iteration).rename(tmp_path / f"removed{iteration}")
    average_checkpoints(find_checkpoints(run), "wma", tmp_path / "average")


def test_an_unfinished_save_is_named(run: Path) -> None:
    (iteration_folder(run, 15) / ".metadata").unlink()
    with pytest.raises(ConfigError, match=r"iter_0000015.*did not end"):
        find_checkpoints(run)


@pytest.mark.parametrize("asked", [{"last": 5}, {"last": 0}, {"iterations": [5, 6]}, {"iterations": [5, 5]}])
def test_asking_for_checkpoints_that_are_not_there_names_those_that_are(run: Path, asked: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="holds iterations 5, 10, 15, 20"):
        choose_checkpoints(run, **{"last": None, "iterations": None, **asked})  # type: ignore[arg-type]


def test_an_empty_directory_and_a_missing_one_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no iter_"):
        find_checkpoints(tmp_path)
    with pytest.raises(ConfigError, match="no such directory"):
        find_checkpoints(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no checkpoint"):
        open_checkpoint(tmp_path)
