"""The other examples on the device: a quantile study from slices to report, and the loaders of both adapters."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_kaiyuan.data import CurriculumDataset
from tests import GPU_TESTS, REPOSITORY
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source
from tests.unit_tests.quantile.tiny_study import study_content, write_sources

LENGTH = 8


@pytest.mark.timeout(400)
def test_a_quantile_study_from_slices_to_report(tmp_path: Path) -> None:
    """Two runs of 60 steps at a time, which share the GPU where there is one."""
    write_sources(tmp_path, names=("good",))
    content = study_content(tmp_path)
    content["sources"] = {"good": content["sources"]["good"]}
    content["slices"] |= {"tops": ["0%", "80%"], "tokens": 3840}
    content["training"] |= {"seeds": [4], "tokens": 30 * 8 * 32 * 2, "save_interval": 10, "precision": "fp16"}
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(content))
    said = {}
    for verb, flags in (("slice", []), ("train", ["--concurrent", "2"]), ("evaluate", []), ("report", [])):
        command = [sys.executable, str(REPOSITORY / "tools" / "quantile_benchmark.py"), verb, str(study), *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=380, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        said[verb] = done.stdout + done.stderr
    assert "2 trained" in said["train"]
    assert "2 runs evaluated" in said["evaluate"]
    assert ("device: CPU" in said["evaluate"]) == (GPU_TESTS != "cuda")
    for log in (tmp_path / "study" / "runs").glob("*/log.txt"):
        assert ("> device: CPU" in log.read_text()) == (GPU_TESTS != "cuda")
    assert (tmp_path / "study" / "report.html").stat().st_size > 1_000_000


@pytest.fixture
def plan(tmp_path: Path) -> str:
    scores = np.random.default_rng(0).permutation(60)
    sources = {"web": write_source(tmp_path / "web", numbered_documents([5] * 60), scores)}
    path = tmp_path / "plan.yaml"
    phases = [phase_of("shuffled", {"web": "all"}, "broad"), phase_of("curriculum", {"web": "top 50%"}, "best")]
    path.write_text(yaml.safe_dump(plan_of(sources, *phases, seq_length=LENGTH, validation={"web": {"documents": 9}})))
    return str(path)


def adapter(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / "adapters" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loader_processes_that_start_after_cuda_feed_the_device(plan: str, device: str) -> None:
    torch.ones(2, device=device).sum().item()
    order = CurriculumDataset(plan)
    expected = torch.from_numpy(np.stack([order[sample]["tokens"] for sample in range(len(order))]))
    batches = [tuple(part.to(device) for part in pair) for pair in adapter("torch_dataloader").batches(plan, 0, 4)]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert inputs.device.type == device
    assert torch.equal(inputs.cpu(), expected[:, :-1])
    assert torch.equal(targets.cpu(), expected[:, 1:])


def test_the_provider_for_stock_megatron_feeds_the_device(plan: str, device: str) -> None:
    train, valid, _ = adapter("megatron_provider").PlanProvider(plan, "web")((8, 4, 0))
    order = CurriculumDataset(plan)
    for dataset, first in ((train, order[0]["tokens"]), (valid, None)):
        loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, pin_memory=device == "cuda")
        batch = {name: value.to(device, non_blocking=True) for name, value in next(iter(loader)).items()}
        assert {value.device.type for value in batch.values()} == {device}
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        if first is not None:
            assert batch["tokens"][0].tolist() == first[:-1].tolist()
