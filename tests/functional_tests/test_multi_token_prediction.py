"""Multi-token prediction through the real entry point: its stages get the tokens, wherever they are."""

from pathlib import Path

import pytest

from tests.functional_tests.training_run import Finished, train_well, write_corpus

MODEL = ("--no-kaiyuan-sandwich-norm", "--kaiyuan-logit-softcap", "0", "--mtp-num-layers", "1")
SHARDED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
SPLITS = {
    "on the last stage": (2, ()),
    "on a stage between": (3, ("--pipeline-model-parallel-layout", "Et|tm|L")),
}
# As in test_training.py, for three steps.
ROUNDING = 4e-5


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def single(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """Six steps on one rank, a checkpoint after three."""
    folder = tmp_path_factory.mktemp("single")
    return folder, train_well(folder, "--plan", str(plan), "--save", "saved", "--save-interval", "3", *MODEL, *SHARDED)


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_pipeline_stages_continue_as_one_rank_would(
    single: tuple[Path, Finished], plan: Path, tmp_path: Path, split: str
) -> None:
    processes, layout = SPLITS[split]
    loaded = ("--plan", str(plan), "--load", str(single[0] / "saved"), "--ckpt-step", "3")
    stages = ("--pipeline-model-parallel-size", str(processes), *layout)
    finished = train_well(tmp_path, *loaded, *MODEL, *SHARDED, *stages, processes=processes)
    for name in ("lm loss", "mtp_1 loss", "grad-norm"):
        expected = {step: value for step, value in single[1].logged(name).items() if step > 3}
        assert len(expected) == 3
        assert finished.logged(name) == pytest.approx(expected, rel=0, abs=ROUNDING), name
