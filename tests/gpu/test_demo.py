"""The demo with its tiny budget, each tool on the device, and the export, with which transformers has the same loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import GPU_TESTS, REPOSITORY
from tests.gpu.machine import gpu_count

pytestmark = pytest.mark.timeout(400)
HUGGING_FACE_LOSS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from megatron_kaiyuan.data import HeldOutDataset

folder, plan, device = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).to(device).eval()
losses = {}
for name in ("code", "reference", "packages"):
    windows = HeldOutDataset(plan, name)
    total = 0.0
    for number in range(len(windows)):
        tokens = torch.from_numpy(windows[number]["tokens"]).to(device)
        with torch.no_grad():
            logits = model(tokens[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits.float(), tokens[1:]))
    losses[name] = total / len(windows)
print(json.dumps(losses))
"""


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=REPOSITORY, env=os.environ | environment, capture_output=True,
        text=True, timeout=380, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_all_stages_run_and_transformers_computes_the_same_loss(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    said = run("examples/demo/run_demo.py", "--quick", "--output", output, COLUMNS="160")
    first = said.splitlines()[0]
    assert first.startswith(f"device: {gpu_count()} visible GPU" if GPU_TESTS == "cuda" else "device: CPU")
    for part in ("Held-out loss", "gradients overflowed", "no overflow for a whole window", "Generated with"):
        assert part in said
    untrained, last, average = json.loads((output / "evaluation.json").read_text())["results"]
    for name in ("code", "reference", "packages"):
        assert last["sources"][name]["loss"] < untrained["sources"][name]["loss"] - 0.4
    log = (output / "logs" / "train.log").read_text()
    assert ("> device: CPU" in log) == (GPU_TESTS != "cuda")

    export = ("tools/convert_checkpoint.py", "export", output / "averaged", "--output", output / "hf")
    run(*export, "--tokenizer", output / "tokenizer")
    device = "cuda" if GPU_TESTS == "cuda" else "cpu"
    found = json.loads(run("-c", HUGGING_FACE_LOSS, output / "hf", output / "plan.yaml", device).splitlines()[-1])
    for name, loss in found.items():
        assert loss == pytest.approx(average["sources"][name]["loss"], abs=5e-3), name
