"""Metrics files as training writes them, for tests of the report."""

import json

from megatron_kaiyuan.data import NUM_BANDS

SEQ_LENGTH = 32


def entry(step, *, batch=8, every=1, **changes):
    """A log line of `every` steps of `batch` samples, of a run with one scored and one plain source."""
    tokens = every * batch * SEQ_LENGTH
    half = tokens // 2
    told = {
        "iteration": step,
        "consumed_samples": step * batch,
        "learning_rate": 0.001,
        "loss": 4.0 - step / 100,
        "grad_norm": 0.5,
        "loss_scale": 65536.0,
        "skipped_steps": 0,
        "tokens": tokens,
        "seconds": 0.5,
        "sources": {
            "scored": {"loss": 3.0, "tokens": half, "bands": [0] * (NUM_BANDS - 1) + [half]},
            "plain": {"loss": 5.0, "tokens": half, "bands": [0] * NUM_BANDS},
        },
    }
    return told | changes


def write_run(folder, entries):
    """Write lines, dicts or raw text; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in entries]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder
