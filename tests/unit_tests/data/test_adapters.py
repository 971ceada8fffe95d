"""The examples of docs/adapters.md run, and give the plan's order to loaders that know nothing of it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from megatron_kaiyuan.data import CurriculumDataset, HeldOutDataset
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source

ROOT = Path(__file__).resolve().parents[3]
ADAPTERS = ROOT / "examples" / "adapters"
LENGTH = 8


@pytest.fixture
def plan(tmp_path):
    sources = {
        "web": write_source(tmp_path / "web", numbered_documents([5] * 60), np.random.default_rng(0).permutation(60)),
        "code": write_source(tmp_path / "code", numbered_documents([7] * 30, 1000)),
    }
    phases = [
        phase_of("shuffled", {"web": "all", "code": "all"}, "broad"),
        phase_of("curriculum", {"web": "top 50%", "code": "random 50%"}, "best"),
    ]
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan_of(sources, *phases, seq_length=LENGTH, validation={"web": {"documents": 9}})))
    return str(path)


def load(name):
    spec = importlib.util.spec_from_file_location(name, ADAPTERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("consumed", [0, 13])
def test_the_torch_example_gives_the_plans_order_from_any_sample_on(plan, consumed):
    order = CurriculumDataset(plan)
    expected = np.stack([order[sample]["tokens"] for sample in range(consumed, len(order))])
    inputs, targets = map(torch.cat, zip(*load("torch_dataloader").batches(plan, consumed, 4), strict=True))
    assert np.array_equal(inputs.numpy(), expected[:, :-1])
    assert np.array_equal(targets.numpy(), expected[:, 1:])


def test_the_torch_example_runs_as_a_script_and_needs_no_megatron(plan):
    """`megatron` cannot be imported in that process."""
    script = ADAPTERS / "torch_dataloader.py"
    code = f"import runpy, sys; sys.modules['megatron'] = None; sys.argv = ['x', {plan!r}, '40']; "
    code += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.startswith(f"batch 0: (8, {LENGTH}), first tokens [")


def test_the_megatron_example_feeds_megatrons_own_sampler_on_every_rank_after_a_resume(plan):
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    train, valid, test = load("megatron_provider").PlanProvider(plan, "web")((48, 20, 0))
    order, held_out = CurriculumDataset(plan), HeldOutDataset(plan, "web")
    assert (len(train), len(valid), test) == (len(order), 20, None)
    shown = {}
    for rank in range(2):
        sampler = MegatronPretrainingSampler(
            len(train), 8, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=2
        )
        batches = list(DataLoader(train, batch_sampler=sampler))
        for number, batch in enumerate(batches):
            for row in range(2):
                sample = 8 + 4 * number + 2 * rank + row
                shown[sample] = torch.cat([batch["tokens"][row], batch["labels"][row, -1:]]).tolist()
    last = 8 + (len(order) - 8) // 4 * 4
    assert shown == {sample: order[sample]["tokens"].tolist() for sample in range(8, last)}
    assert [valid[i]["tokens"].tolist() for i in (0, len(held_out))] == [held_out[0]["tokens"][:-1].tolist()] * 2


@pytest.mark.filterwarnings("ignore:Could not determine rank from torch.distributed:UserWarning")  # no process group
def test_the_megatron_examples_samples_are_made_like_those_of_megatrons_own_dataset(plan, tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        eod, pad, vocab_size = 0, -1, 2000
        unique_identifiers = {"name": "numbers"}  # noqa: RUF012

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        split="1,0,0",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(tmp_path / "cache"),
    )
    prefix = str(tmp_path / "code" / "part-000")
    indexed = IndexedDataset(prefix, mmap=True)
    theirs = GPTDataset(indexed, prefix, np.arange(len(indexed), dtype=np.int32), 10, Split.train, config)[0]
    ours = load("megatron_provider").PlanProvider(plan, "web")((48, 20, 0))[0][0]
    facts = [{name: (value.dtype, value.shape) for name, value in sample.items()} for sample in (ours, theirs)]
    assert facts[0] == facts[1]
    for name in ("loss_mask", "position_ids"):
        assert torch.equal(ours[name], theirs[name])


def test_the_page_shows_the_examples_as_they_are():
    """Each line of code on the page is a line of the example under it."""
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    blocks = re.findall(r"`(examples/adapters/\w+\.py)`.*?```python\n(.*?)```", page, flags=re.DOTALL)
    assert sorted(name for name, _ in blocks) == [
        "examples/adapters/megatron_provider.py",
        "examples/adapters/torch_dataloader.py",
    ]
    for name, code in blocks:
        lines = {line.split("  #")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()}
        assert [line for line in code.splitlines() if line.split("  #")[0].strip() not in lines] == []
