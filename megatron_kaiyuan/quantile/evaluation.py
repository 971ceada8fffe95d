"""Measure the trained models: bits per byte on held-out documents, and tasks where there are any.

One process, one model after another in the same memory. Import this after `cpu_platform.install()`.
"""

import argparse
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kaiyuan.checkpoints.recovery import open_intact_checkpoint
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.evaluation.held_out import document_options, window_losses
from megatron_kaiyuan.evaluation.loading import (
    build_untrained,
    load_weights,
    single_process_arguments,
    start_single_process,
)
from megatron_kaiyuan.evaluation.token_bytes import token_bytes
from megatron_kaiyuan.quantile.held_out import HeldOutDocuments, group_numbers
from megatron_kaiyuan.quantile.results import (
    HeldOutResult,
    Identity,
    RunResult,
    read_result,
    result_path,
    write_result,
)
from megatron_kaiyuan.quantile.runs import Run, SlicedStudy, run_folder
from megatron_kaiyuan.quantile.study import Study
from megatron_kaiyuan.quantile.tasks import TaskSuite, error_summary
from megatron_kaiyuan.quantile.training import FinishedRun, finished_run

__all__ = ["EvaluationOutcome", "evaluate_runs"]

_SHAPE_AND_TRAINING = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "padded_vocab_size",
    "seq_length",
    "untie_embeddings_and_output_weights",
    "global_batch_size",
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_fraction",
    "weight_decay",
    "clip_grad",
    "adam_beta1",
    "adam_beta2",
    "fp16",
    "bf16",
    "init_method_std",
    "train_samples",
    "kaiyuan_sandwich_norm",
    "kaiyuan_logit_softcap",
    "kaiyuan_z_loss",
)
"""Megatron's arguments that two compared models must share."""


@dataclass(slots=True)
class EvaluationOutcome:
    """What `evaluate` did."""

    evaluated: int = 0
    up_to_date: int = 0
    unfinished: list[str] = field(default_factory=list)
    """Runs that are not trained yet."""
    not_evaluated: dict[str, str] = field(default_factory=dict)
    """Tasks that could not be loaded or run, with the reason."""
    failed: dict[str, str] = field(default_factory=dict)
    """Runs that have no results because of an error, with the reason; the others were evaluated all the same."""


def evaluate_runs(
    study: Study, sliced: SlicedStudy, runs: Sequence[Run], progress: Callable[[], None] = lambda: None
) -> EvaluationOutcome:
    """Evaluate every finished run that has no results yet, or whose results lack a task that failed.

    Args:
        study: The study.
        sliced: What `slice` wrote.
        runs: Which of its runs.
        progress: Called after each run.

    Raises:
        StudyError: a held-out set is too small, or lm-evaluation-harness is asked for and not installed.
    """
    outcome = EvaluationOutcome()
    evaluator: _Evaluator | None = None
    for run in runs:
        finished = finished_run(study, run)
        if finished is None:
            outcome.unfinished.append(run.name)
        elif _is_current(study, run):
            outcome.up_to_date += 1
        else:
            evaluator = evaluator or _Evaluator(study, sliced, run)
            _evaluate(evaluator, study, run, finished, outcome)
        progress()
    return outcome


def _evaluate(
    evaluator: "_Evaluator", study: Study, run: Run, finished: FinishedRun, outcome: EvaluationOutcome
) -> None:
    """Evaluate one run, and record its own failures, such as a checkpoint that cannot be read."""
    try:
        with _quiet_megatron():
            result = evaluator.measure(run, finished)
    except CheckpointException as error:  # torch lets it pass `except Exception`
        ((cause, _), *_) = error.failures.values()
        outcome.failed[run.name] = error_summary(cause)
        return
    except Exception as error:
        outcome.failed[run.name] = error_summary(error)
        return
    write_result(study, run, result)
    outcome.evaluated += 1
    outcome.not_evaluated |= result.not_evaluated


@contextmanager
def _quiet_megatron() -> Iterator[None]:
    """Without what torch and Megatron say at every model about how Megatron loads its checkpoints."""
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # "GPTModel is deprecated"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
        warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
        yield


def _is_current(study: Study, run: Run) -> bool:
    path = result_path(study, run)
    if not path.is_file():
        return False
    try:
        result = read_result(path)
    except (StudyError, ValueError, KeyError, TypeError):  # of another version, or damaged
        return False
    # a task that failed may load once its cause is mended, so such a result is never final
    complete = not result.not_evaluated
    return complete and result.digest == run.digest and result.identity.evaluation == study.evaluation_digest


class _Evaluator:
    """The model and the held-out documents, which all runs of a study share.

    Raises:
        StudyError: something that no run can do without is missing.
    """

    def __init__(self, study: Study, sliced: SlicedStudy, first: Run) -> None:
        self._study, self._sliced = study, sliced
        self._suite = TaskSuite.load(study.evaluation, study.tokenizer.model if study.tokenizer else None)
        plan = Plan.load(first.plan)
        self._held_out = {
            name: HeldOutDocuments(plan, name, study.evaluation.max_windows) for name in study.evaluation.held_out
        }
        told = study.evaluation.held_out
        self._groups = {
            name: group_numbers(plan, name, sidecar, documents.documents)
            for name, documents in self._held_out.items()
            if (sidecar := told[name].groups) is not None
        }
        self._bytes = token_bytes(study.tokenizer.model) if study.tokenizer is not None else None
        self._record = plan.tokenizer_record
        start_single_process()
        self._arguments: argparse.Namespace | None = None
        self._model: Any = None

    def measure(self, run: Run, finished: FinishedRun) -> RunResult:
        """Everything that is measured of one run.

        Raises:
            ConfigError: its checkpoint is missing, damaged, or of another model.
        """
        checkpoint = open_intact_checkpoint(run_folder(self._study, run) / "checkpoints")
        if self._arguments is None:  # built for the first checkpoint that can be read; the others fill it anew
            arguments = single_process_arguments(checkpoint.arguments)
            self._model, self._arguments = build_untrained(arguments), arguments
        load_weights(self._model, checkpoint)
        held_out = {name: self._held_out_result(name, documents) for name, documents in self._held_out.items()}
        tasks, failed = self._suite.evaluate(self._model, self._arguments.max_position_embeddings)
        identity = Identity(
            tokenizer=self._sliced.tokenizer,
            model=_model_digest(checkpoint.arguments),
            tokens=checkpoint.iteration * self._study.training.global_batch_size * self._study.seq_length,
            evaluation=self._study.evaluation_digest,
        )
        return RunResult(run.name, run.digest, identity, held_out, tasks, failed, finished.tokens_per_second)

    def _held_out_result(self, name: str, documents: HeldOutDocuments) -> HeldOutResult:
        assert self._arguments is not None, "built by measure"
        options = document_options(self._arguments, self._record)
        nats, tokens, sizes = (np.zeros(documents.num_documents) for _ in range(3))
        for start in range(0, documents.num_windows, self._study.evaluation.batch_size):
            rows = documents.rows(start, min(start + self._study.evaluation.batch_size, documents.num_windows))
            losses, counts = window_losses(self._model, rows, options)
            nats += documents.sum_by_document(start, losses)
            tokens += documents.sum_by_document(start, counts)
            if self._bytes is not None:
                sizes += documents.sum_by_document(start, self._bytes[rows[:, 1:]] * counts)
        return HeldOutResult(
            nats=tuple(round(value, 6) for value in nats.tolist()),
            tokens=tuple(int(value) for value in tokens),
            bytes=tuple(int(value) for value in sizes),
            groups=self._groups.get(name, ()),
        )


def _model_digest(arguments: argparse.Namespace) -> str:
    """Return the digest of what shapes the model and its training.

    The data and the seed are left out.
    """
    values = {name: str(getattr(arguments, name)) for name in _SHAPE_AND_TRAINING}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
