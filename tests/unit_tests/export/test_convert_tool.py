"""The command line of the conversion, in a process of its own, on a checkpoint and back, and with bad input."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_kaiyuan.checkpoints.reading import open_checkpoint
from tests.unit_tests.export.small_models import KAIYUAN, save_model

TOOL = Path(__file__).parents[3] / "tools/convert_checkpoint.py"


def convert(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )


def test_there_and_back(tmp_path: Path) -> None:
    checkpoint = save_model(KAIYUAN, tmp_path / "run", torch.float16)
    there = convert("export", tmp_path / "run", "--output", tmp_path / "hf")
    assert (there.returncode, there.stderr) == (0, "")
    assert "2 layers, hidden size 32, 64 token ids, soft-cap 30" in there.stdout
    back = convert("import", tmp_path / "hf", "--output", tmp_path / "back", "--iteration", 7)
    assert back.returncode == 0, back.stderr
    found = open_checkpoint(tmp_path / "back")
    assert found.iteration == 7
    for name, tensor in checkpoint.load_tensors(checkpoint.tensors).items():
        assert torch.equal(found.load_tensors([name])[name], tensor)


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        ([], 2, "required: {export,import}"),
        (["export", "nowhere", "--output", "x"], 1, "error: nowhere: no checkpoint"),
        (["import", "nowhere", "--output", "x"], 1, "config.json: cannot be read"),
        (["export", "nowhere", "--output", "x", "--max-shard-size", "5"], 2, "'5' is not a size; write 5GB"),
    ],
)
def test_bad_input_is_told_in_a_line(words: list[str], code: int, complaint: str) -> None:
    finished = convert(*words)
    assert finished.returncode == code
    assert complaint in finished.stderr
    assert "Traceback" not in finished.stderr
