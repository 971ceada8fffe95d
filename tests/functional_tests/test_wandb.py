"""A run that reports to wandb, offline: what lies on disk afterwards, and what is refused before it starts."""

import argparse
import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_kaiyuan.arguments import add_kaiyuan_arguments, check_save_arguments
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.monitoring.metrics_file import read_metrics
from tests.functional_tests.training_run import train_well, write_corpus

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None,
    reason="wandb is not installed; tools/dev/install_test_tools.sh installs it",
)
BLOCK, HEADER = 32_768, 7


def stored_records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format after a header of its own.

    Blocks of 32 KiB; each part of a record has a checksum, its length and its kind: 1 is a whole record, 2 to 4 are a
    first, middle and last part. A block ends with zeros where not even a header fits.
    """
    content, position, parts = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):
            yield parts
            parts = b""


def logged_values(path: Path) -> dict[str, dict[int, Any]]:
    """Value by step of everything that was logged."""
    from wandb.proto.wandb_internal_pb2 import Record

    values: dict[str, dict[int, Any]] = {}
    for stored in stored_records(path):
        record = Record.FromString(stored)
        for item in record.history.item:
            name = item.key or ".".join(item.nested_key)
            values.setdefault(name, {})[record.history.step.num] = json.loads(item.value_json)
    return values


def test_an_offline_run_holds_the_loss_and_tokens_of_each_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_corpus(tmp_path)
    for name, value in {"MODE": "offline", "RUN_ID": "job-7", "RESUME": "allow", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    flags = ["--wandb-project", "pretraining", "--wandb-exp-name", "tiny", "--wandb-save-dir", "reports"]

    train_well(tmp_path, "--plan", str(plan), "--exit-interval", "2", "--kaiyuan-metrics", "metrics.jsonl", *flags)

    [file] = tmp_path.glob("reports/wandb/offline-run-*/run-job-7.wandb")
    found = logged_values(file)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2]
    for source in ("scored", "plain"):
        losses = {line["iteration"]: line["sources"][source]["loss"] for line in lines}
        assert found[f"source loss/{source}"] == pytest.approx(losses)
        tokens = [line["sources"][source]["tokens"] for line in lines]
        assert found[f"source tokens/{source}"] == {1: tokens[0], 2: sum(tokens)}
    assert set(found["lm loss"]) == {1, 2}, "Megatron's own"


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"wandb_exp_name": "tiny"}, "without a folder for its files: add --wandb-save-dir DIR, or --save DIR"),
        ({"wandb_save_dir": "reports"}, "without --wandb-exp-name: give the run a name"),
    ],
    ids=["folder", "name"],
)
def test_what_wandb_needs_is_asked_for_before_the_run(given: dict[str, str], remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"--wandb-project pretraining {remedy}"):
        check_save_arguments(wandb_arguments(**given))
    check_save_arguments(wandb_arguments(wandb_exp_name="tiny", wandb_save_dir="reports"))


def test_a_missing_wandb_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="--wandb-project pretraining, but wandb is not installed: pip install wandb"):
        check_save_arguments(wandb_arguments(wandb_exp_name="tiny", wandb_save_dir="reports"))


def wandb_arguments(**given: str) -> argparse.Namespace:
    """Arguments of a run that reports to wandb, with Megatron's defaults."""
    ours = vars(add_kaiyuan_arguments(argparse.ArgumentParser()).parse_args([]))
    defaults = {"save": None, "save_interval": None, "wandb_exp_name": "", "wandb_save_dir": ""}
    return argparse.Namespace(**{**ours, **defaults, "wandb_project": "pretraining", **given})
