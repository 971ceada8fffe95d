"""Runs of the real entry point in one process: resumed bit for bit in each spec and precision, fused, and rising."""

import json
import shlex
from pathlib import Path

import pytest

from tests.functional_tests import test_rising_scale as rising_scale
from tests.functional_tests.kill_and_resume import different_tensors
from tests.functional_tests.training_run import STEPS, VOCABULARY, Finished, train_well, write_corpus
from tests.gpu.machine import ENGINE

pytestmark = pytest.mark.timeout(300)
SAVING = shlex.split("--save saved --load saved --save-interval 100 --kaiyuan-activation-interval 2")
FP16 = ("--fp16", "--initial-loss-scale", "4096")
LOCAL = ("--transformer-impl", "local")
ENGINE_SPEC = ("--transformer-impl", "transformer_engine")
needs_engine = pytest.mark.skipif(bool(ENGINE), reason=ENGINE or "there")


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --deterministic-mode asks of the environment."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")


def run(folder: Path, plan: Path, *flags: str) -> Finished:
    folder.mkdir(exist_ok=True)
    return train_well(folder, "--plan", str(plan), *SAVING, "--deterministic-mode", *flags)


class Resumed:
    """One way to train; a class each, because gpu-check runs classes and modules side by side."""

    flags: tuple[str, ...]

    def test_a_run_that_is_resumed_ends_bit_for_bit_alike(self, tmp_path: Path) -> None:
        """Weights, main weights, optimizer and loss scaler; and the monitor has read every layer."""
        plan = write_corpus(tmp_path, end=VOCABULARY - 1)  # the tokenizer's own end of a document
        whole = run(tmp_path / "whole", plan, *self.flags)
        run(tmp_path / "parts", plan, *self.flags, "--exit-interval", "3")
        run(tmp_path / "parts", plan, *self.flags)
        assert different_tensors(tmp_path / "whole", tmp_path / "parts", STEPS) == []
        losses = whole.logged("lm loss")
        assert losses[STEPS] < losses[1]
        assert_monitored(tmp_path / "whole" / "saved" / "metrics.jsonl")


class TestLocalFp16(Resumed):
    flags = (*LOCAL, *FP16)


class TestLocalBf16(Resumed):
    flags = (*LOCAL, "--bf16")


class TestDistributedOptimizerAndDocumentsApart(Resumed):
    flags = (
        *LOCAL, *FP16, "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable",
        "--reset-position-ids", "--reset-attention-mask", "--no-create-attention-mask-in-dataloader",
    )  # fmt: skip


@needs_engine
class TestTransformerEngineFp16(Resumed):
    flags = (*ENGINE_SPEC, *FP16)


@needs_engine
class TestTransformerEngineBf16(Resumed):
    flags = (*ENGINE_SPEC, "--bf16")


def assert_monitored(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, STEPS + 1))
    assert set(lines[0]["sources"]) == {"scored", "plain"}
    peaks = lines[1]["activations"]
    assert len(peaks) > 10
    assert all(0 < peak < 65504 for peak in peaks.values())


def test_the_branch_scale_rises_and_stays_after_a_resume(tmp_path: Path) -> None:
    rising_scale.assert_scale_rises_and_stays(tmp_path, 1)


def test_every_fusion_gives_the_losses_of_none(tmp_path: Path) -> None:
    """FP32 master weights of an FP16 model move by roundings of FP16 only, which six steps do not amplify."""
    plan = write_corpus(tmp_path)
    found = []
    for name, flags in {"none": ("none", "--no-gradient-accumulation-fusion"), "all": ("auto",)}.items():
        finished = run(tmp_path / name, plan, *LOCAL, *FP16, "--kaiyuan-fusions", *flags)
        found.append(finished.logged("lm loss"))
    assert found[1] == pytest.approx(found[0], rel=2e-3)
    assert len(found[0]) == STEPS
