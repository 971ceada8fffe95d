"""What a run knows of itself, as plain data, and a list of what nobody knows.

A fact is read from the checkpoint, the metrics file, the plan, its manifests, the average or an evaluation; nothing is
guessed. What is missing is None, and a line of `unknown` says what it is and how to give it.
"""

import argparse
import importlib.metadata
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kaiyuan.checkpoints.averaging import MANIFEST_NAME
from megatron_kaiyuan.checkpoints.description import describe
from megatron_kaiyuan.checkpoints.identity import PLAN_RECORD
from megatron_kaiyuan.checkpoints.lineage import CODE, COMMAND
from megatron_kaiyuan.checkpoints.reading import Checkpoint
from megatron_kaiyuan.checkpoints.redaction import hide_secrets, redact
from megatron_kaiyuan.data import NUM_BANDS, Plan
from megatron_kaiyuan.errors import KaiyuanError, ReleaseError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.version import code_version
from megatron_kaiyuan.release.data_facts import source_facts
from megatron_kaiyuan.reporting.run_metrics import read_run
from megatron_kaiyuan.reporting.run_summary import summarize

__all__ = ["ReleaseRequest", "Weights", "release_facts"]

_TRAINING = {
    "optimizer": "--optimizer",
    "lr": "--lr",
    "min_lr": "--min-lr",
    "lr_decay_style": "--lr-decay-style",
    "adam_beta1": "--adam-beta1",
    "adam_beta2": "--adam-beta2",
    "weight_decay": "--weight-decay",
    "clip_grad": "--clip-grad",
    "init_method_std": "--init-method-std",
    "global_batch_size": "--global-batch-size",
    "seq_length": "--seq-length",
    "seed": "--seed",
}
_PACKAGES = ("megatron-core", "torch", "transformers", "tokenizers", "numpy", "safetensors", "transformer-engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """What a person says of a release, with None for what nobody says."""

    name: str
    licence: str | None = None
    languages: tuple[str, ...] = ()
    hardware: str | None = None
    plan: Path | None = None
    """None: the one that the run names."""
    metrics: Path | None = None
    evaluation: Path | None = None
    """JSON of `tools/evaluate.py`."""
    tokenizer: Path | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """One set of weights of a release."""

    folder: str
    """Where they lie in it: `.` or a subfolder."""
    checkpoint: Checkpoint


def release_facts(weights: list[Weights], run: Checkpoint, request: ReleaseRequest) -> dict[str, Any]:
    """Return everything that the cards say, JSON-ready.

    Args:
        weights: The main ones first.
        run: Last checkpoint of training.
        request: What the person says.

    Raises:
        ReleaseError: a file that the person names cannot be read, or is of another run.
    """
    unknown: list[str] = []
    plan, where = _plan(run.arguments, request, unknown)
    description = None if plan is None else plan.describe(NUM_BANDS)
    facts = {
        "name": request.name,
        "licence": request.licence,
        "languages": list(request.languages),
        "hardware": request.hardware,
        "written_by": code_version(),
        "weights": [_weights(part) for part in weights],
        "checkpoint": {name: value for name, value in describe(run).items() if name not in ("folder", "files")},
        "precision": _precision(run.arguments),
        "training": {flag: getattr(run.arguments, name, None) for name, flag in _TRAINING.items()},
        "code": getattr(run.arguments, CODE, None),
        "command": _without_secrets(told) if (told := getattr(run.arguments, COMMAND, None)) else None,
        "ranks": getattr(run.arguments, "world_size", None),
        "plan_file": where,
        "plan": description,
        "sources": {} if plan is None or description is None else source_facts(plan, description["sources"], unknown),
        "run": _run(request.metrics, description, unknown),
        "evaluation": _evaluation(request.evaluation, weights),
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    return facts | {"unknown": [*_unsaid(request, facts), *unknown]}


def _weights(part: Weights) -> dict[str, Any]:
    average = part.checkpoint.folder / MANIFEST_NAME
    return {
        "folder": part.folder,
        "iteration": part.checkpoint.iteration,
        "average": json.loads(average.read_text(encoding="utf-8")) if average.is_file() else None,
    }


def _without_secrets(command: str) -> str:
    """Once more: an earlier version recorded them."""
    try:
        return hide_secrets(shlex.join(redact(shlex.split(command))))
    except ValueError:  # no closing quotation
        return hide_secrets(command)


def _precision(arguments: argparse.Namespace) -> str:
    return "FP16" if arguments.fp16 else "BF16" if arguments.bf16 else "FP32"


def _plan(arguments: argparse.Namespace, request: ReleaseRequest, unknown: list[str]) -> tuple[Plan | None, str | None]:
    """Return the plan, where it can be opened.

    One that the person names must open.
    """
    where = request.plan or (Path(named) if (named := getattr(arguments, "plan", None)) else None)
    if where is None:
        unknown.append("the data: the run names no plan; give --plan FILE if it had one")
        return None, None
    try:
        return _plan_of_run(Plan.load(where), arguments), str(where)
    except (KaiyuanError, OSError) as error:
        if request.plan is not None:
            raise ReleaseError(f"--plan {where}: {error}") from error
        unknown.append(f"the data: the run's plan {where} cannot be used here ({error}); give --plan FILE")
        return None, str(where)


def _plan_of_run(plan: Plan, arguments: argparse.Namespace) -> Plan:
    """The plan, if its order of samples is the one that the checkpoint records."""
    record = getattr(arguments, PLAN_RECORD, None)
    if record is None:
        return plan
    plan = plan.as_begun(record)
    ours, saved = (json.dumps(told, sort_keys=True, default=str) for told in (plan.order_record(), record))
    if ours != saved:
        raise ReleaseError("it orders other samples than the run did; give the plan as the run had it")
    return plan


def _run(metrics: Path | None, description: Mapping[str, Any] | None, unknown: list[str]) -> dict[str, Any] | None:
    if metrics is None:
        unknown.append("loss, throughput, time and FP16 history: no metrics.jsonl in the run's folder; give --metrics")
        return None
    told = summarize(read_run(metrics), description)
    if told["smallest_headroom"] is None:
        unknown.append("headroom of FP16: the run metered no activations")
    return told


def _evaluation(path: Path | None, weights: list[Weights]) -> list[dict[str, Any]]:
    """Return results of the released weights, each with the folder of the weights.

    Others are refused.
    """
    if path is None:
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [(row, Path(row["label"]).resolve()) for row in content["results"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReleaseError(f"--evaluation {path}: is not what {tool('evaluate')} --json writes ({error!r})") from error
    folders = {part.checkpoint.folder.resolve(): part.folder for part in weights}
    found = [
        {"tasks": {}, "not_evaluated": {}, **row, "folder": folders[place]} for row, place in rows if place in folders
    ]
    if not found:
        measured = ", ".join(str(row["label"]) for row, _ in rows)
        wanted = ", ".join(str(folder) for folder in folders)
        raise ReleaseError(
            f"--evaluation {path}: measures {measured}, the release holds {wanted}; run {tool('evaluate')} on these"
        )
    return sorted(found, key=lambda row: row["folder"])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unsaid(request: ReleaseRequest, facts: Mapping[str, Any]) -> list[str]:
    """What a person could say and has not, and what an earlier version did not record."""
    lacks = {
        "the licence of the weights: --license": request.licence is None,
        "the languages: --language": not request.languages,
        "the hardware: --hardware": request.hardware is None,
        f"evaluation results: --evaluation FILE of {tool('evaluate')}": not facts["evaluation"],
        "the tokenizer: --tokenizer DIR": request.tokenizer is None,
        "averaged weights: --averaged DIR": all(part["average"] is None for part in facts["weights"]),
        "the commit of the code that trained: the checkpoint does not record it": facts["code"] is None,
        "the command of the run: the checkpoint does not record it": facts["command"] is None,
    }
    missing = [what for what, lacking in lacks.items() if lacking]
    failed = {name: why for row in facts["evaluation"] for name, why in row["not_evaluated"].items()}
    return [*missing, *(f"the score on {name}: {why}" for name, why in failed.items())]
