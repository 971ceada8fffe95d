"""The runs of a study: one for each source, quantile and seed, with its plan, its command and its folder."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.selection import parse_keep
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.quantile.cost import CostEstimate, estimate_cost
from megatron_kaiyuan.quantile.held_out import HeldOutDocuments, group_numbers
from megatron_kaiyuan.quantile.slices import Slice, choose_slices, open_sources
from megatron_kaiyuan.quantile.study import Study, top_name
from megatron_kaiyuan.shards.manifest import load_manifest, manifest_path
from megatron_kaiyuan.shards.tokenizer_match import different_tokenizers

__all__ = [
    "Run",
    "SlicedStudy",
    "common_flags",
    "my_share",
    "read_slices",
    "run_folder",
    "training_command",
    "write_slices",
]

_FORMAT = "megatron_kaiyuan.quantile_slices/1"
_UNKNOWN = "unknown"
_MOST_NAMED = 4
_STATED_SAVES = 5
"""Checkpoints of a run when the study does not say how often."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training run."""

    name: str
    source: str
    top: float
    """Quantile of its slice from the best document, 0 to 1."""
    seed: int
    keep: str
    documents: int
    slice_tokens: int
    score_low: float
    score_high: float
    plan: str
    """Path of its plan file."""
    plan_fingerprint: str
    digest: str
    """Identifies everything that its weights depend on."""

    @property
    def reach(self) -> tuple[Fraction, Fraction]:
        """From where to where its documents lie, as fractions of the source from the best document."""
        band = parse_keep(self.keep)
        return 1 - band.high, 1 - band.low


@dataclass(frozen=True, slots=True)
class SlicedStudy:
    """What `slice` wrote: all runs, and what they have in common."""

    study_digest: str
    tokenizer: str
    """Fingerprint of the shards' tokenizer, or `unknown`."""
    vocab_size: int
    cost: Mapping[str, Any]
    runs: tuple[Run, ...]
    unmanifested: tuple[str, ...] = ()
    """Shards that do not tell their tokenizer."""

    @property
    def warnings(self) -> list[str]:
        """What could not be checked of the data."""
        if not self.unmanifested:
            return []
        names = ", ".join(self.unmanifested[:_MOST_NAMED])
        more = len(self.unmanifested) - _MOST_NAMED
        others = "no shard has one" if self.tokenizer == _UNKNOWN else "the other shards have one"
        return [
            f"Shards without a manifest ({others}): {names}{f' and {more} more' if more > 0 else ''}. Whether all "
            "shards are of one tokenizer was not checked; models of different tokenizers do not compare. "
            "tools/preprocess_data.py writes manifests."
        ]


def write_slices(study: Study) -> tuple[SlicedStudy, CostEstimate]:
    """Cut the slices and write a plan for each run; no data is copied.

    Raises:
        StudyError, ShardError, ScoreError, RankIndexError: see `choose_slices`, `open_sources` and `HeldOutDocuments`.
    """
    opened = open_sources(study)
    slices = choose_slices(study, opened)
    shards = list(dict.fromkeys(shard.prefix for source in opened.values() for shard in source.source.shards))
    told = [shard for shard in shards if manifest_path(shard).is_file()]
    tokenizer, vocab_size = _tokenizer_of(told, study.training.flags)
    unmanifested = tuple(sorted(set(shards) - set(told)))
    cost = estimate_cost(study, vocab_size)
    order = {top: number for number, top in enumerate(sorted(study.slices.tops))}
    runs = []
    for source in study.sources:
        for top in sorted(study.slices.tops):
            parts = [piece for piece in slices if piece.source == source and piece.top == top]
            for number, seed in enumerate(study.training.seeds):
                runs.append(_write_run(study, parts[(number + order[top]) % len(parts)], seed))
    for name, spec in study.evaluation.held_out.items():  # before the training is paid for; all runs hold out the same
        plan = Plan.load(runs[0].plan)
        documents = HeldOutDocuments(plan, name, study.evaluation.max_windows).documents
        if spec.groups is not None:
            group_numbers(plan, name, spec.groups, documents)
    costs = {**asdict(cost), "share_of_main_run": cost.share_of_main_run}
    sliced = SlicedStudy(study.training_digest, tokenizer, vocab_size, costs, tuple(runs), unmanifested)
    content = {"format": _FORMAT, **asdict(sliced)}
    write_text_atomically(study.folder / "slices.json", json.dumps(content, indent=1) + "\n")
    return sliced, cost


def read_slices(study: Study) -> SlicedStudy:
    """What `slice` wrote for this study.

    Raises:
        StudyError: nothing, or for a study with other slices or training.
    """
    path = study.folder / "slices.json"
    if not path.is_file():
        raise StudyError(f"{path}: no such file; run `tools/quantile_benchmark.py slice` with this study first")
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("format", None) != _FORMAT:
        raise StudyError(f"{path}: not written by this version; run `slice` again")
    if content["study_digest"] != study.training_digest:
        raise StudyError(
            f"{path}: was cut for a study with other sources, slices, model or training than the study file has now; "
            "run `slice` again (runs that are not changed by it are kept)"
        )
    content["runs"] = tuple(Run(**run) for run in content["runs"])
    content["unmanifested"] = tuple(content.get("unmanifested", ()))
    return SlicedStudy(**content)


def my_share(runs: Sequence[Run], task: int, tasks: int) -> list[Run]:
    """Every `tasks`-th run from number `task` on: the share of one task of a job array.

    Raises:
        StudyError: `task` is not one of 0 to `tasks - 1`.
    """
    if tasks < 1 or not 0 <= task < tasks:
        raise StudyError(f"--task-id {task} of --num-tasks {tasks}: ids run from 0 to one below the number of tasks")
    return list(runs[task::tasks])


def training_command(study: Study, run: Run, python: str = sys.executable) -> list[str]:
    """The command line of a run; a second start continues from its last checkpoint."""
    training = study.training
    launcher = ["-m", "megatron_kaiyuan.host.torchrun", "--standalone", "--nproc-per-node", str(training.processes)]
    folder = run_folder(study, run)
    save_interval = training.save_interval or max(1, study.steps // _STATED_SAVES)
    return [
        *[python, *(launcher if training.processes > 1 else [])],
        *["-m", "megatron_kaiyuan.pretrain", "--plan", run.plan],
        *common_flags(study),
        *["--seed", str(run.seed), "--save-interval", str(save_interval)],
        *["--save", str(folder / "checkpoints"), "--load", str(folder / "checkpoints")],
    ]


def common_flags(study: Study) -> list[str]:
    """Megatron's flags that all runs of a study share."""
    training = study.training
    optimizer = f"--optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay {training.weight_decay:g}"
    rate = (
        f"--lr {training.lr:g} --min-lr {training.min_lr:g} --lr-decay-style {training.lr_decay_style} "
        f"--lr-warmup-fraction {training.lr_warmup_fraction:g}"
    )
    return [
        *study.model.flags(),
        *f"--micro-batch-size {training.micro_batch_size} --global-batch-size {training.global_batch_size}".split(),
        *[*optimizer.split(), "--clip-grad", "1.0", *rate.split()],
        *([] if training.precision == "fp32" else [f"--{training.precision}"]),
        *["--num-workers", "0", "--log-interval", "1", "--eval-iters", "1", "--eval-interval", "1000000000"],
        *training.flags,
    ]


def run_folder(study: Study, run: Run) -> Path:
    """Where a run keeps its checkpoints, its log and its state."""
    return study.folder / "runs" / run.name


def _write_run(study: Study, piece: Slice, seed: int) -> Run:
    name = f"{piece.source}-{top_name(piece.top)}-seed{seed}"
    path = study.folder / "plans" / f"{name}.yaml"
    content = _plan_content(study, piece, seed)
    fingerprint = Plan.from_spec(content).fingerprint
    head = f"# {piece.last - piece.first:,} documents around the top {float(piece.top):.4g} quantile, seed {seed}\n"
    write_text_atomically(path, head + yaml.safe_dump(content, sort_keys=False))
    identity = json.dumps([fingerprint, seed, common_flags(study)])
    return Run(
        name=name,
        source=piece.source,
        top=float(piece.top),
        seed=seed,
        keep=piece.keep,
        documents=piece.last - piece.first,
        slice_tokens=piece.tokens,
        score_low=piece.score_low,
        score_high=piece.score_high,
        plan=str(path),
        plan_fingerprint=fingerprint,
        digest=hashlib.sha256(identity.encode()).hexdigest()[:16],
    )


def _plan_content(study: Study, piece: Slice, seed: int) -> dict[str, Any]:
    """The plan of one run. Its phase is named after the seed, which keys the order; what is held out stays the same."""
    passes = -(-Fraction(study.budget) // study.slices.tokens)
    part: dict[str, Any] = {"keep": piece.keep} | ({"max_repeat": int(passes)} if passes > 1 else {})
    trained = study.dataset_of(piece.source)
    phase = {"name": f"seed {seed}", "order": "shuffled", "tokens": study.budget, "sources": {trained: part}}
    scored = {dataset: names[0] for dataset, names in study.datasets.items()} | {trained: piece.source}
    tokenizer = {} if study.tokenizer is None else {"tokenizer": study.tokenizer.model_dump()}
    held_out = study.evaluation.held_out
    return {
        "version": 1,  # a shuffled band has the same order under both, and a study begun earlier the same fingerprints
        "seq_length": study.seq_length,
        "seed": study.seed,
        **tokenizer,
        "sources": {
            dataset: study.sources[name].model_dump(exclude_none=True, exclude={"dataset"})
            for dataset, name in scored.items()
        }
        | {name: {"shards": spec.shards} for name, spec in held_out.items() if spec.shards is not None},
        "phases": [phase],
        "validation": {name: {"documents": spec.documents} for name, spec in held_out.items()},
    }


def _tokenizer_of(shards: Sequence[str], flags: Sequence[str]) -> tuple[str, int]:
    """Fingerprint of the tokenizer of all shards that have a manifest, and its vocabulary.

    Raises:
        StudyError: two shards have different tokenizers, or nothing tells the size of the vocabulary.
    """
    records = [(shard, load_manifest(shard).tokenizer) for shard in shards]
    if message := different_tokenizers(records):
        raise StudyError(f"{message}; models trained on them do not compare: build one of them again")
    if records:
        return records[0][1].fingerprint, records[0][1].vocab_size
    if "--vocab-size" not in flags:
        raise StudyError(
            "the size of the vocabulary is unknown: the shards have no manifest; build them with "
            'tools/preprocess_data.py, or add "--vocab-size", "N" to training.flags'
        )
    return _UNKNOWN, int(flags[list(flags).index("--vocab-size") + 1])
