"""A plan with everything resolved: sample number -> phase, source, window, by arithmetic."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kaiyuan.data.build_phase import build_phase
from megatron_kaiyuan.data.constraints import check_domain_bounds
from megatron_kaiyuan.data.description import ResolvedPlan, describe_plan
from megatron_kaiyuan.data.opened import OpenedSource, check_held_out, open_plan_sources
from megatron_kaiyuan.data.phase import Phase, stored_orders
from megatron_kaiyuan.data.plan_phases import AveragingSpec
from megatron_kaiyuan.data.plan_rules import check_first_version, otherwise_in_second
from megatron_kaiyuan.data.plan_schema import (
    PlanSpec,
    SourceSpec,
    TokenizerSpec,
    ValidationSpec,
    load_plan_spec,
    parse_plan_spec,
)
from megatron_kaiyuan.data.resume import check_resume, order_record, version_of_record
from megatron_kaiyuan.data.retention import kept_weights, retained_by_band
from megatron_kaiyuan.data.simulation import SimulatedSource, simulate_plan_sources
from megatron_kaiyuan.data.vocabulary import check_tokenizers, check_vocabulary
from megatron_kaiyuan.errors import PlanError, ResumeError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.shards.manifest import TokenizerRecord

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What a run sees, in which order, how often. Build one with `Plan.load` or `Plan.from_spec`."""

    spec: PlanSpec
    opened: Mapping[str, OpenedSource]
    phases: list[Phase]

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, simulate: bool = False) -> "Plan":
        """Read a plan file and open its sources.

        Nothing is built, and no token is read but a few probes.

        Args:
            path: the YAML file.
            simulate: plan with the sizes in the sources' `expected` fields instead of files.

        Raises:
            PlanError: the file is wrong, or asks for what the sources cannot give.
            ShardError, ScoreError, RankIndexError: a source's files are missing or damaged.
        """
        return cls.from_spec(load_plan_spec(Path(path)), simulate=simulate)

    @classmethod
    def from_spec(cls, spec: PlanSpec | dict[str, Any], *, simulate: bool = False, indexed: bool = True) -> "Plan":
        """Resolve a plan given as data.

        Errors as `load`.

        Args:
            spec: the plan.
            simulate: as `load`.
            indexed: whether what `tools/rank_data.py` stores for large sources must be there, as for reading.
        """
        if isinstance(spec, dict):
            spec = parse_plan_spec(spec)
        opened = (simulate_plan_sources if simulate else open_plan_sources)(spec.sources, spec.validation, spec.seed)
        if not simulate:
            check_tokenizers(opened, spec.tokenizer)
        check_held_out(opened, spec.seq_length)
        phases: list[Phase] = []
        for phase in spec.phases:
            phases.append(build_phase(phase, spec, opened, phases, indexed=indexed))
        check_domain_bounds(spec, phases)
        for order in () if simulate or not indexed else stored_orders(phases):
            order.open_stored()
        return cls(spec, opened, phases)

    def __reduce__(self) -> tuple[Any, ...]:
        # its text alone: spawned workers open the files themselves rather than receive copies of what was read of them
        return _reopen, (self.spec, self.simulated)

    @property
    def simulated(self) -> bool:
        """Whether the sources exist by their expected sizes only."""
        return any(isinstance(source.source, SimulatedSource) for source in self.opened.values())

    @property
    def seq_length(self) -> int:
        """Predicted tokens of a sample."""
        return self.spec.seq_length

    @property
    def longest(self) -> int:
        """Predicted tokens of the longest windows: those of a phase may be several samples."""
        return self.spec.longest

    @property
    def seed(self) -> int:
        """Seed of every random choice of the plan."""
        return self.spec.seed

    @property
    def tokenizer(self) -> TokenizerSpec | None:
        """The tokenizer the plan names, if any."""
        return self.spec.tokenizer

    @property
    def sources(self) -> dict[str, SourceSpec]:
        """Return the sources, keyed with their names, in the order of the plan file."""
        return self.spec.sources

    @property
    def validation(self) -> dict[str, ValidationSpec]:
        """Held-out documents by source name."""
        return self.spec.validation

    @property
    def averaging(self) -> AveragingSpec | None:
        """Which checkpoints the final weights average, if the plan says."""
        return self.spec.averaging

    @property
    def num_samples(self) -> int:
        """Samples of all phases."""
        return self.phases[-1].first_sample + self.phases[-1].num_samples

    @cached_property
    def _phase_ends(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        return np.array([phase.first_sample + phase.num_samples for phase in self.phases], dtype=np.int64)

    def phase_of(self, sample: int) -> Phase:
        """The phase a sample belongs to."""
        return self.phases[int(np.searchsorted(self._phase_ends, sample, side="right"))]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the order of all samples: equal fingerprints, equal data in equal order. 16 hex digits."""
        return hashlib.sha256(json.dumps(self.order_record(), sort_keys=True).encode()).hexdigest()[:16]

    def order_record(self) -> dict[str, Any]:
        """Return everything the order depends on, as plain data.

        Checkpoints store it.
        """
        return order_record(self.spec, self.opened, self.phases)

    def as_begun(self, record: Mapping[str, Any]) -> "Plan":
        """The plan under the version of the language that a saved order was made with, where the file names none.

        Raises:
            ResumeError: the file uses what that version does not have.
        """
        version = version_of_record(record)
        if self.spec.version is not None or version == self.spec.order_version:
            return self
        try:
            check_first_version(self.spec.phases)
        except ValueError as error:
            raise ResumeError(
                f"the run to continue began under version {version} of the plan language. {error}"
            ) from error
        return Plan.from_spec(self.spec.model_copy(update={"version": version}), simulate=self.simulated)

    def otherwise_in_newest(self) -> list[str]:
        """What the newest version of the plan language would show in another order, part by part."""
        scored = [name for name, source in self.sources.items() if source.score is not None]
        return otherwise_in_second(self.spec.phases, scored) if self.spec.order_version == 1 else []

    def check_resume(self, record: dict[str, Any], consumed_samples: int) -> None:
        """Refuse to continue a run whose already consumed samples this plan would have chosen differently.

        Raises:
            ResumeError: names the first field that changed, with both values.
        """
        check_resume(record, self.order_record(), consumed_samples)

    @property
    def tokenizer_record(self) -> TokenizerRecord | None:
        """Return the tokenizer that the manifests of all shards name, None where no shard has one."""
        shards = (shard for source in self.opened.values() for shard in source.source.shards)
        return next((shard.record.tokenizer for shard in shards if shard.record is not None), None)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse shards with token ids outside the vocabulary, of which ids must be below `vocab_size`.

        Raises:
            ShardError: names the shard and the id.
        """
        check_vocabulary(self.opened, vocab_size)

    def describe(self, bands: int = 10) -> dict[str, Any]:
        """The dry run as plain data: per phase, source and quantile band, unique and repeated tokens and epochs."""
        return describe_plan(ResolvedPlan(self.spec, self.opened, self.phases, self.fingerprint), bands)

    def retained(self, global_batch_size: int, weight_decay: float, bands: int = 10) -> list[dict[str, Any]]:
        """Return what weight the tokens of each phase, source and quality band keep in the final weights.

        Args:
            global_batch_size: samples of a step.
            weight_decay: Megatron's `--weight-decay`, above 0.
            bands: equal score bands of a scored source.

        Raises:
            PlanError: the plan gives no learning rates, or the averaged checkpoints reach back before its start.
        """
        if self.phases[0].lr is None:
            raise PlanError("the weight that data keep depends on the learning rate, and the plan has none; add lr")
        steps, averaging = self.num_samples / global_batch_size, self.averaging
        if averaging is not None and (averaging.last - 1) * averaging.every >= steps:
            raise PlanError(
                f"averaging: {counted(averaging.last, 'checkpoint')}, {counted(averaging.every, 'step')} apart, reach "
                "back before "
                f"the first of {steps:,.0f} steps; lower one of them"
            )
        kept = kept_weights(self.phases, global_batch_size, weight_decay, averaging)
        return retained_by_band(self.phases, self.opened, kept, bands)


def _reopen(spec: PlanSpec, simulate: bool) -> Plan:  # noqa: FBT001
    return Plan.from_spec(spec, simulate=simulate)
