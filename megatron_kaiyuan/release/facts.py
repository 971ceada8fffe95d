"""What a run knows of itself, as plain data, and a list of what nobody knows.

A fact is read from the checkpoint, the metrics file, the plan, its manifests, the average or an evaluation; nothing is
guessed. What is missing is None, and a line of `unknown` says what it is and how to give it.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kaiyuan.checkpoints.average_proof import read_manifest
from megatron_kaiyuan.checkpoints.description import describe
from megatron_kaiyuan.checkpoints.identity import PLAN_RECORD
from megatron_kaiyuan.checkpoints.lineage import CODE, commands_of
from megatron_kaiyuan.checkpoints.reading import Checkpoint
from megatron_kaiyuan.checkpoints.tokenizer import tokenizer_of_checkpoint
from megatron_kaiyuan.data import NUM_BANDS, Plan
from megatron_kaiyuan.errors import KaiyuanError, ReleaseError
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.version import code_version
from megatron_kaiyuan.release.data_facts import source_facts
from megatron_kaiyuan.release.inputs import Notes, Weights, evaluation_of_weights, metrics_of_run
from megatron_kaiyuan.release.publishing import published_command
from megatron_kaiyuan.reporting.run_summary import summarize

__all__ = ["ReleaseRequest", "release_facts"]

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
_OF_THE_REPORT = ("run", "metrics", "planned_tokens", "seconds_left", "held_out", "held_out_average")
"""Of a summary of a run, what is about the machine, or about the time after the checkpoint."""
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


def release_facts(weights: list[Weights], run: Checkpoint, request: ReleaseRequest, notes: Notes) -> dict[str, Any]:
    """Return everything that the cards say, JSON-ready.

    Args:
        weights: The main ones first.
        run: Last checkpoint of training.
        request: What the person says.
        notes: Is added to: what nobody knows, and files that cannot be read or are of another run.
    """
    plan, file, fingerprints = _plan(run.arguments, request, notes)
    description = None if plan is None else plan.describe(NUM_BANDS)
    evaluation = _evaluation(request.evaluation, weights, fingerprints, notes)
    _check_tokenizer(request.tokenizer, weights, notes)
    facts = {
        "name": request.name,
        "licence": request.licence,
        "languages": list(request.languages),
        "hardware": request.hardware,
        "written_by": code_version(),
        "weights": [_weights(part, notes) for part in weights],
        "checkpoint": _checkpoint(run),
        "precision": _precision(run.arguments),
        "training": {flag: getattr(run.arguments, name, None) for name, flag in _TRAINING.items()},
        "code": getattr(run.arguments, CODE, None),
        "starts": _starts(run.arguments),
        "ranks": getattr(run.arguments, "world_size", None),
        "plan_file": file,
        "plan": description,
        "plan_is_done": description is not None
        and getattr(run.arguments, "consumed_train_samples", None) == description["samples"],
        "sources": {}
        if plan is None or description is None
        else source_facts(plan, description["sources"], notes.unknown),
        "run": _run(request.metrics, run, plan, description, notes),
        "evaluation": evaluation,
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    return facts | {"unknown": [*_unsaid(request, facts), *notes.unknown]}


def _checkpoint(run: Checkpoint) -> dict[str, Any]:
    """Its description without places, and without the commands, which are facts of their own."""
    told = {name: value for name, value in describe(run).items() if name not in ("folder", "files")}
    of_commands = ("command", "commands", "plan")
    return told | {"identity": {name: value for name, value in told["identity"].items() if name not in of_commands}}


def _starts(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        {"iteration": iteration, "code": code, "command": published_command(command)}
        for iteration, code, command in commands_of(arguments)
    ]


def _weights(part: Weights, notes: Notes) -> dict[str, Any]:
    try:
        average = read_manifest(part.checkpoint)
    except KaiyuanError as error:
        average = None
        notes.refuse(str(part.checkpoint.folder), error)
    return {"folder": part.folder, "iteration": part.checkpoint.iteration, "average": average}


def _precision(arguments: argparse.Namespace) -> str:
    return "FP16" if arguments.fp16 else "BF16" if arguments.bf16 else "FP32"


def _check_tokenizer(tokenizer: Path | None, weights: list[Weights], notes: Notes) -> None:
    if tokenizer is None:
        return
    try:
        found = [tokenizer_of_checkpoint(tokenizer, part.checkpoint.arguments) for part in weights]
    except (KaiyuanError, OSError) as error:
        notes.refuse(f"--tokenizer {tokenizer}", error)
        return
    if not all(one.compared for one in found):
        notes.unknown.append("proof that the tokenizer is the run's: the checkpoint does not record its tokenizer")


def _plan(
    arguments: argparse.Namespace, request: ReleaseRequest, notes: Notes
) -> tuple[Plan | None, str | None, list[str] | None]:
    """Return the plan where it can be opened, the name of its file, and the fingerprints that it has.

    One that the person names must open, and be the run's.
    """
    where = request.plan or (Path(named) if (named := getattr(arguments, "plan", None)) else None)
    if where is None:
        notes.unknown.append("the data: the run names no plan, so it was trained without one")
        return None, None, None
    try:
        given = Plan.load(where)
        plan = _plan_of_run(given, arguments)
        return plan, where.name, [plan.fingerprint, given.fingerprint]
    except (KaiyuanError, OSError) as error:
        if request.plan is not None:
            notes.refuse(f"--plan {where}", error)
        else:
            why = " ".join(str(error).split())
            notes.unknown.append(f"the data: the run's plan {where.name} cannot be used here ({why}); give --plan FILE")
        return None, where.name, None


def _plan_of_run(plan: Plan, arguments: argparse.Namespace) -> Plan:
    """The plan, if its order of samples is the one that the checkpoint records."""
    record = getattr(arguments, PLAN_RECORD, None)
    if record is None:
        raise ReleaseError("the checkpoint records no plan that this one could be compared with; leave --plan out")
    plan = plan.as_begun(record)
    ours, saved = (json.dumps(told, sort_keys=True, default=str) for told in (plan.order_record(), record))
    if ours != saved:
        raise ReleaseError("it orders other samples than the run did; give the plan as the run had it")
    return plan


def _run(
    metrics: Path | None, run: Checkpoint, plan: Plan | None, description: Mapping[str, Any] | None, notes: Notes
) -> dict[str, Any] | None:
    if metrics is None:
        notes.unknown.append(
            "loss, throughput, time and FP16 history: no metrics.jsonl in the run's folder; give --metrics FILE"
        )
        return None
    try:
        told = summarize(metrics_of_run(metrics, run, plan, notes.unknown), description)
    except (KaiyuanError, OSError) as error:
        notes.refuse(f"--metrics {metrics}", error)
        return None
    if told["smallest_headroom"] is None:
        notes.unknown.append("headroom of FP16: the run metered no activations")
    if told["steps"] < run.iteration:
        notes.unknown.append(f"what the run logged after step {told['steps']}: the metrics end there")
    return {name: value for name, value in told.items() if name not in _OF_THE_REPORT}


def _evaluation(
    path: Path | None, weights: list[Weights], fingerprints: list[str] | None, notes: Notes
) -> list[dict[str, Any]]:
    if path is None:
        return []
    try:
        return evaluation_of_weights(path, weights, fingerprints)
    except (KaiyuanError, OSError) as error:
        notes.refuse(f"--evaluation {path}", error)
        return []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unsaid(request: ReleaseRequest, facts: Mapping[str, Any]) -> list[str]:
    """What a person could say and has not, and what an earlier version did not record."""
    unrecorded = [start["iteration"] for start in facts["starts"] if start["command"] is None]
    lacks = {
        "the licence of the weights: --license": request.licence is None,
        "the languages: --language": not request.languages,
        "the hardware: --hardware": request.hardware is None,
        f"evaluation results: --evaluation FILE of {tool('evaluate')}": request.evaluation is None,
        "the tokenizer: --tokenizer DIR": request.tokenizer is None,
        "averaged weights: --averaged DIR": all(part["average"] is None for part in facts["weights"]),
        "the commit of the code that trained: the checkpoint does not record it": facts["code"] is None,
    }
    missing = [what for what, lacking in lacks.items() if lacking]
    missing += [
        f"the command of the run{'' if not step else f' from step {step}'}: the checkpoint does not record it"
        for step in unrecorded
    ]
    failed = {name: why for row in facts["evaluation"] for name, why in row["not_evaluated"].items()}
    return [*missing, *(f"the score on {name}: {why}" for name, why in failed.items())]
