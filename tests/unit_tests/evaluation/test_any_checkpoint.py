"""Checkpoints of experts and of stock Megatron in the tools: the numbers of the model that was saved, or a sentence."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kaiyuan.checkpoints.averaging import average_checkpoints
from megatron_kaiyuan.checkpoints.reading import find_checkpoints, iteration_folder, open_checkpoint
from megatron_kaiyuan.errors import ConfigError, ConvertError
from megatron_kaiyuan.export.to_hugging_face import export_checkpoint
from tests.helpers import run_distributed
from tests.unit_tests.model import command_lines
from tests.unit_tests.model.test_experts import EXPERTS

FEATURES = "--qk-layernorm --kaiyuan-sandwich-norm --kaiyuan-logit-softcap 30"
CASES = {
    "experts": f"{EXPERTS} {FEATURES}",
    "experts in every other layer": f"{EXPERTS} --moe-layer-freq ([0]*1+[1]*1) --moe-token-dispatcher-type alltoall "
    "--moe-shared-expert-intermediate-size 24",
    "experts that were dropped from when full": f"{EXPERTS} --moe-token-dispatcher-type alltoall "
    "--moe-expert-capacity-factor 1.0",
    "stock": "",
    "stock experts": EXPERTS,
}
WINDOWS = np.random.default_rng(0).integers(0, command_lines.VOCABULARY, (2, command_lines.LENGTH + 1))
GREEDY = 5


def numbers_of_each(_rank: int, folder: Path) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Save a model of each case as Megatron does, and open it and the average of two such as the tools do.

    Returns:
        Losses and text of the models themselves by case, and of what was opened by case and whether it is the average.
    """
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_kaiyuan.evaluation.loading import load_model

    parallel_state.initialize_model_parallel()
    saved, opened = {}, {}
    for number, (name, words) in enumerate(CASES.items()):
        arguments = command_lines.arguments_of(words)
        model = command_lines._build(arguments, stock=name.startswith("stock")).eval()
        if name.startswith("stock"):
            arguments = Namespace(**{key: value for key, value in vars(arguments).items() if "kaiyuan" not in key})
        for iteration in (2, 3):
            place = iteration_folder(folder / str(number), iteration)
            place.mkdir(parents=True)
            arguments.consumed_train_samples = iteration
            state = {"model": model.sharded_state_dict(), "args": arguments, "iteration": iteration}
            dist_checkpointing.save(state, str(place))
        (place.parent / "latest_checkpointed_iteration.txt").write_text("3")
        saved[name] = _numbers(model)
        average_checkpoints(find_checkpoints(folder / str(number)), "mean", folder / f"{number}-average")
        for average, where in enumerate((folder / str(number), folder / f"{number}-average")):
            loaded, positions = load_model(open_checkpoint(where))
            assert positions == command_lines.LENGTH
            opened[name, bool(average)] = _numbers(loaded)
    return saved, opened


def _numbers(model: Any) -> tuple[Any, list[int]]:
    from megatron_kaiyuan.evaluation.generation import Sampling, sample_tokens
    from megatron_kaiyuan.evaluation.held_out import window_losses
    from megatron_kaiyuan.model.samples import SampleOptions

    losses, _ = window_losses(model, WINDOWS, SampleOptions())
    sampling = Sampling(temperature=0.0, max_new_tokens=GREEDY)
    sizes: dict[str, Any] = {"positions": command_lines.LENGTH, "vocabulary": command_lines.VOCABULARY, "end": None}
    return losses, sample_tokens(model, [1, 2, 3], sampling, **sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def numbers(folder: Path) -> tuple[dict[str, Any], dict[Any, Any]]:
    [found] = run_distributed(numbers_of_each, 1, folder)
    saved, opened = found
    return saved, opened


@pytest.mark.distributed
@pytest.mark.parametrize("average", [False, True], ids=["as saved", "average"])
@pytest.mark.parametrize("name", CASES)
def test_evaluation_generation_and_averages_have_the_numbers_of_the_model(
    name: str,
    average: bool,  # noqa: FBT001
    numbers: tuple[dict[str, Any], dict[Any, Any]],
) -> None:
    (losses, text), (found, written) = numbers[0][name], numbers[1][name, average]
    # A stock model is opened with our SDPA, which sums in another order.
    np.testing.assert_allclose(found, losses, rtol=1e-5 if name.startswith("stock") else 0)
    assert written == text
    assert len(written) == GREEDY


@pytest.mark.distributed
def test_a_stock_model_is_exported_as_llama_and_experts_are_refused_by_their_flag(
    numbers: tuple[dict[str, Any], Any], folder: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    for number, (name, words) in enumerate(CASES.items()):
        checkpoint = open_checkpoint(folder / str(number))
        if "--num-experts" in words:
            with pytest.raises(ConvertError, match=r"the model uses --num-experts \(the run has num_experts = 4"):
                export_checkpoint(checkpoint, tmp_path / str(number))
            continue
        assert export_checkpoint(checkpoint, tmp_path / name).layout.name == "llama"
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        ids = torch.from_numpy(WINDOWS)
        losses = torch.nn.functional.cross_entropy(
            model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        np.testing.assert_allclose(losses.detach().numpy(), numbers[0][name][0].ravel(), rtol=1e-5)


def test_a_checkpoint_of_the_legacy_format_is_named(tmp_path: Path) -> None:
    place = tmp_path / "iter_0000003" / "mp_rank_00"
    place.mkdir(parents=True)
    (place / "model_optim_rng.pt").write_bytes(b"")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(ConfigError, match="is in Megatron's legacy format"):
        open_checkpoint(tmp_path)
