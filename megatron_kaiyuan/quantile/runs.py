"""The runs of a study: one for each source, quantile and seed, with its plan, its command and its folder."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.selection import parse_keep
from megatron_kaiyuan.errors import StudyError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.cli import tool
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.quantile.branches import BranchPlans, scratch_plan
from megatron_kaiyuan.quantile.cost import CostEstimate, estimate_cost
from megatron_kaiyuan.quantile.held_out import HeldOutDocuments, group_numbers
from megatron_kaiyuan.quantile.slices import Slice, choose_slices, open_sources, scores_at
from megatron_kaiyuan.quantile.study import Study, top_name
from megatron_kaiyuan.shards.manifest import load_manifest, manifest_path
from megatron_kaiyuan.shards.tokenizer_match import different_tokenizers

__all__ = [
    "MIX_ALONE",
    "Run",
    "SlicedStudy",
    "common_flags",
    "last_step",
    "my_share",
    "read_slices",
    "run_folder",
    "training_command",
    "write_slices",
]

MIX_ALONE = "the mix alone"
"""Name of the control without any slice, for people."""
_FORMAT = "megatron_kaiyuan.quantile_slices/1"
_UNKNOWN = "unknown"
_TRACKER = "latest_checkpointed_iteration.txt"
_MOST_NAMED = 4
_STATED_SAVES = 5
"""Checkpoints of a run when the study does not say how often."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training run."""

    name: str
    seed: int
    keep: str
    plan: str
    """Path of its plan file."""
    plan_fingerprint: str
    digest: str
    """Identifies everything that its weights depend on."""
    source: str = ""
    """Whose documents it is about; empty for the mix."""
    top: float = 0.0
    """Quantile of its slice from the best document, 0 to 1; of a slice only."""
    documents: int = 0
    slice_tokens: int = 0
    score_low: float = 0.0
    score_high: float = 0.0
    control: str = ""
    """Empty: a slice. `random` and `mix`: what slices are compared with in a branch design; `trunk`: what all of its
    branches start from."""

    @property
    def cell_name(self) -> str:
        """Return a name for people, the same for all seeds."""
        names = {"random": f"{self.source}, random documents", "mix": MIX_ALONE, "trunk": "trunk"}
        return names.get(self.control) or f"{self.source} top {self.top * 100:.4g}%"

    @property
    def reach(self) -> tuple[Fraction, Fraction]:
        """From where to where its documents lie, as fractions of the source from the best document."""
        if self.control:
            return Fraction(0), Fraction(1)
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
    """Shards that do not record their tokenizer."""
    trunks: tuple[Run, ...] = ()
    """One a seed, where the runs branch from trunks."""
    trunk_passes: float = 0.0
    """How often a trunk shows the dataset that it repeats most."""

    @property
    def warnings(self) -> list[str]:
        """What could not be checked of the data."""
        repeated = (
            [f"A trunk shows its smallest dataset {self.trunk_passes:.2g} times: its slices are nothing new to it."]
            if self.trunk_passes > 1
            else []
        )
        return [*repeated, *self._about_manifests()]

    def _about_manifests(self) -> list[str]:
        if not self.unmanifested:
            return []
        names = ", ".join(self.unmanifested[:_MOST_NAMED])
        more = len(self.unmanifested) - _MOST_NAMED
        others = "no shard has one" if self.tokenizer == _UNKNOWN else "the other shards have one"
        return [
            f"Shards without a manifest ({others}): {names}{f' and {more} more' if more > 0 else ''}. Whether all "
            "shards are of one tokenizer was not checked; models of different tokenizers do not compare. "
            f"{tool('preprocess')} writes manifests."
        ]


def write_slices(study: Study) -> tuple[SlicedStudy, CostEstimate]:
    """Cut the slices and write a plan for each run, without copying data.

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
    plans = _branch_plans(study, opened)
    runs = []
    for source in study.sources:
        for top in sorted(study.slices.tops):
            parts = [piece for piece in slices if piece.source == source and piece.top == top]
            for number, seed in enumerate(study.training.seeds):
                runs.append(_slice_run(study, plans, parts[(number + order[top]) % len(parts)], seed))
    trunks = [] if plans is None else _trunks(study, plans)
    runs += [] if plans is None else _controls(study, plans, opened)
    for name, spec in study.evaluation.held_out.items():  # before the training is paid for; all runs hold out the same
        plan = Plan.load(runs[0].plan)
        documents = HeldOutDocuments(plan, name, study.evaluation.max_windows).documents
        if spec.groups is not None:
            group_numbers(plan, name, spec.groups, documents)
    costs = {**asdict(cost), "share_of_main_run": cost.share_of_main_run}
    passes = 0.0 if plans is None else plans.most_passes
    told_of = (study.training_digest, tokenizer, vocab_size, costs)
    sliced = SlicedStudy(*told_of, tuple(runs), unmanifested, tuple(trunks), passes)
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
        raise StudyError(f"{path}: no such file; run `{tool('quantile')} slice` with this study first")
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("format", None) != _FORMAT:
        raise StudyError(f"{path}: not written by this version; run `slice` again")
    if content["study_digest"] != study.training_digest:
        raise StudyError(
            f"{path}: was cut for a study with other sources, slices, model or training than the study file has now; "
            "run `slice` again (runs that are not changed by it are kept)"
        )
    for kind in ("runs", "trunks"):
        content[kind] = tuple(Run(**run) for run in content.get(kind, ()))
    content["unmanifested"] = tuple(content.get("unmanifested", ()))
    return SlicedStudy(**content)


def _branch_plans(study: Study, opened: Mapping[str, OpenedSource]) -> BranchPlans | None:
    if study.trunk is None:
        return None
    sizes = {name: opened[names[0]].trainable(ranked=True).num_tokens for name, names in study.datasets.items()}
    return BranchPlans(study, sizes)


def last_step(study: Study, run: Run) -> int:
    """Return the step of a run's last checkpoint, which counts those of its trunk for a branch."""
    return study.trunk_steps + (0 if run.control == "trunk" else study.steps)


def my_share(runs: Sequence[Run], task: int, tasks: int) -> list[Run]:
    """Every `tasks`-th run from number `task` on: the share of one task of a job array.

    Raises:
        StudyError: `task` is not one of 0 to `tasks - 1`.
    """
    if tasks < 1 or not 0 <= task < tasks:
        raise StudyError(f"--task-id {task} of --num-tasks {tasks}: ids run from 0 to one below the number of tasks")
    return list(runs[task::tasks])


def training_command(study: Study, run: Run, python: str = sys.executable) -> list[str]:
    """Return the command line of a run.

    A second start continues from its last checkpoint.
    """
    training = study.training
    launcher = ["-m", "megatron_kaiyuan.host.torchrun", "--standalone", "--nproc-per-node", str(training.processes)]
    folder = run_folder(study, run)
    steps = study.trunk_steps if run.control == "trunk" else study.steps
    save_interval = training.save_interval or max(1, steps // _STATED_SAVES)
    saved = folder / "checkpoints"
    load = saved
    if study.trunk is not None and run.control != "trunk" and not (saved / _TRACKER).is_file():
        load = trunk_folder(study) / f"trunk-seed{run.seed}" / "checkpoints"  # read where it is; all branches share it
    return [
        *[python, *(launcher if training.processes > 1 else [])],
        *["-m", "megatron_kaiyuan.pretrain", "--plan", run.plan],
        *common_flags(study),
        *["--seed", str(run.seed), "--save-interval", str(save_interval)],
        *["--save", str(saved), "--load", str(load)],
    ]


def common_flags(study: Study) -> list[str]:
    """Return Megatron's flags that all runs of a study share.

    The plans of branches give the rate themselves.
    """
    training = study.training
    optimizer = f"--optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay {training.weight_decay:g}"
    rate = (
        f"--lr {training.lr:g} --min-lr {training.min_lr:g} --lr-decay-style {training.lr_decay_style} "
        f"--lr-warmup-fraction {training.lr_warmup_fraction:g}"
    )
    return [
        *study.model.flags(),
        *f"--micro-batch-size {training.micro_batch_size} --global-batch-size {training.global_batch_size}".split(),
        *[*optimizer.split(), "--clip-grad", "1.0", *([] if study.trunk is not None else rate.split())],
        *([] if training.precision == "fp32" else [f"--{training.precision}"]),
        *["--num-workers", "0", "--log-interval", "1", "--eval-iters", "1", "--eval-interval", "1000000000"],
        *training.flags,
    ]


def run_folder(study: Study, run: Run) -> Path:
    """Where a run keeps its checkpoints, its log and its state."""
    return (trunk_folder(study) if run.control == "trunk" else study.folder / "runs") / run.name


def trunk_folder(study: Study) -> Path:
    """Return where the trunks are: in this study, or in the one that it names."""
    other = None if study.trunk is None else study.trunk.folder
    return (study.folder if other is None else Path(other)) / "runs"


def _slice_run(study: Study, plans: BranchPlans | None, piece: Slice, seed: int) -> Run:
    content = (
        scratch_plan(study, piece.source, piece.keep, seed)
        if plans is None
        else plans.branch(seed, piece.source, piece.keep)
    )
    head = (
        f"{counted(piece.last - piece.first, 'document')} around the top {float(piece.top):.4g} quantile, seed {seed}"
    )
    return _write_run(
        study,
        content,
        head,
        name=f"{piece.source}-{top_name(piece.top)}-seed{seed}",
        source=piece.source,
        top=float(piece.top),
        seed=seed,
        keep=piece.keep,
        documents=piece.last - piece.first,
        slice_tokens=piece.tokens,
        score_low=piece.score_low,
        score_high=piece.score_high,
    )


def _trunks(study: Study, plans: BranchPlans) -> list[Run]:
    return [
        _write_run(study, plans.trunk(seed), f"the trunk of seed {seed}", name=f"trunk-seed{seed}", seed=seed,
                   control="trunk", keep="the broad mix")
        for seed in study.training.seeds
    ]  # fmt: skip


def _controls(study: Study, plans: BranchPlans, opened: Mapping[str, OpenedSource]) -> list[Run]:
    """The branches that a slice is compared with: random documents of its source, and the mix alone."""
    found = []
    for seed in study.training.seeds:
        head, name = f"{MIX_ALONE}, trunk of seed {seed}", f"mix-only-seed{seed}"
        content = plans.branch(seed)
        found.append(_write_run(study, content, head, name=name, seed=seed, control="mix", keep="the broad mix"))
        for source in study.sources:
            low, high = scores_at(opened[source], np.array([0, opened[source].source.num_documents - 1]))
            content = plans.branch(seed, source)
            part = Plan.from_spec(content).phases[-1].streams[f"{source}-slice"].selected
            found.append(
                _write_run(
                    study,
                    content,
                    f"random documents of {source}, trunk of seed {seed}",
                    name=f"{source}-random-seed{seed}",
                    source=source,
                    seed=seed,
                    control="random",
                    keep=content["phases"][-1]["sources"][f"{source}-slice"]["keep"],
                    documents=part.num_documents,
                    slice_tokens=part.num_tokens,
                    score_low=low,
                    score_high=high,
                )
            )
    return found


def _write_run(study: Study, content: Mapping[str, Any], head: str, *, name: str, seed: int, **told: Any) -> Run:
    """Write the plan of a run.

    `told` is what the run says of its documents.
    """
    path = study.folder / "plans" / f"{name}.yaml"
    fingerprint = Plan.from_spec(dict(content)).fingerprint
    write_text_atomically(path, f"# {head}\n" + yaml.safe_dump(dict(content), sort_keys=False))
    # the plan of a branch holds the phases of its trunk, so its fingerprint is of both
    identity = json.dumps([fingerprint, seed, common_flags(study)])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Run(name=name, seed=seed, plan=str(path), plan_fingerprint=fingerprint, digest=digest, **told)


def _tokenizer_of(shards: Sequence[str], flags: Sequence[str]) -> tuple[str, int]:
    """Return the fingerprint of the tokenizer of all shards that have a manifest, and its vocabulary.

    Raises:
        StudyError: two shards have different tokenizers, or nothing records the size of the vocabulary.
    """
    records = [(shard, load_manifest(shard).tokenizer) for shard in shards]
    if message := different_tokenizers(records):
        raise StudyError(f"{message}; models trained on them do not compare: build one of them again")
    if records:
        return records[0][1].fingerprint, records[0][1].vocab_size
    if "--vocab-size" not in flags:
        raise StudyError(
            "the size of the vocabulary is unknown: the shards have no manifest; build them with "
            f'{tool("preprocess")}, or add "--vocab-size", "N" to training.flags'
        )
    return _UNKNOWN, int(flags[list(flags).index("--vocab-size") + 1])
