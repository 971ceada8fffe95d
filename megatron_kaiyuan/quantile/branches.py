"""Plans of the runs of a study: a slice from scratch, or branches from one trunk on the broad mix.

A branch's plan begins with the phases of its trunk and ends with a cooldown: half mix, half slice. Its run loads the
trunk's checkpoint as one of its own, so the plan's check of consumed samples proves that trunk and branch agree. The
cooldown has the same name in all branches of a trunk, so their mix halves show the same documents in the same order.
Controls: the cooldown on the mix alone, and with random documents of each source in place of a slice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from megatron_kaiyuan.quantile.study import Study

__all__ = ["BranchPlans", "plan_frame", "scratch_plan"]


def plan_frame(study: Study, scored: Mapping[str, str]) -> dict[str, Any]:
    """Return a plan without phases: the sources, each ranked by one of its scores, and what is held out.

    Args:
        study: The study.
        scored: Of each dataset, the source whose score ranks it.
    """
    tokenizer = {} if study.tokenizer is None else {"tokenizer": study.tokenizer.model_dump()}
    held_out = study.evaluation.held_out
    return {
        "seq_length": study.seq_length,
        "seed": study.seed,
        **tokenizer,
        "sources": {dataset: _source(study, name) for dataset, name in scored.items()}
        | {name: {"shards": spec.shards} for name, spec in held_out.items() if spec.shards is not None},
        "validation": {
            name: {"documents": spec.documents} | ({} if spec.groups is None else {"groups": spec.groups})
            for name, spec in held_out.items()
        },
    }


def _source(study: Study, name: str) -> dict[str, Any]:
    return study.sources[name].model_dump(exclude_none=True, exclude={"dataset"})


def scratch_plan(study: Study, source: str, keep: str, seed: int) -> dict[str, Any]:
    """Return the plan of a run on one slice alone.

    Its phase is named after the seed, which keys the order; what is held out stays the same.
    """
    passes = ceil(Fraction(study.budget) / study.slices.tokens)
    part: dict[str, Any] = {"keep": keep} | ({"max_repeat": passes} if passes > 1 else {})
    trained = study.dataset_of(source)
    phase = {"name": f"seed {seed}", "order": "shuffled", "tokens": study.budget, "sources": {trained: part}}
    scored = {dataset: names[0] for dataset, names in study.datasets.items()} | {trained: source}
    # a shuffled band has the same order under both versions, and a study begun earlier the same fingerprints
    return {"version": 1, **plan_frame(study, scored), "phases": [phase]}


@dataclass(frozen=True, slots=True)
class BranchPlans:
    """The plans of a study with `design: branch`."""

    study: Study
    sizes: Mapping[str, int]
    """Of each dataset, the tokens that may be trained on."""

    @property
    def mix(self) -> dict[str, float]:
        """Return the shares of the datasets in the mix, which sum to 1."""
        assert self.study.trunk is not None
        weights: Mapping[str, float] = self.study.trunk.mix or self.sizes
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    @property
    def most_passes(self) -> float:
        """How often the trunk shows the dataset that it repeats most."""
        assert self.study.trunk is not None
        tokens = self.study.trunk.tokens
        return max(share * tokens / self.sizes[name] for name, share in self.mix.items())

    def trunk(self, seed: int) -> dict[str, Any]:
        """Return the plan of the trunk of a seed."""
        scored = {dataset: names[0] for dataset, names in self.study.datasets.items()}
        return {"version": 2, **plan_frame(self.study, scored), "phases": self._trunk_phases(seed)}

    def branch(self, seed: int, source: str | None = None, keep: str | None = None) -> dict[str, Any]:
        """Return the plan of a branch.

        Args:
            seed: Of its trunk.
            source: Whose documents are beside the mix; None: the mix alone.
            keep: Which of them, in the plan's grammar; None: random ones.
        """
        study, content = self.study, self.trunk(seed)
        trunk, training = study.trunk, study.training
        assert trunk is not None
        parts = self._mix_parts(study.budget, Fraction(1) if source is None else 1 - trunk.share)
        if source is not None:
            name = f"{source}-slice"
            content["sources"][name] = _source(study, source)
            passes = ceil(study.slice_budget / study.slices.tokens)
            if keep is None:  # whole documents of about so many tokens; a few may be seen once more
                # in the plan's grammar, where a count has no commas
                keep, passes = " ".join(["random", str(study.slices.tokens + study.seq_length), "tokens"]), passes + 1
            parts[name] = {"keep": keep, "weight": float(trunk.share)} | ({"max_repeat": passes} if passes > 1 else {})
        rate = {"start": training.lr, "end": training.min_lr, "shape": training.lr_decay_style}
        phase = {"name": f"branch {seed}", "order": "shuffled", "tokens": study.budget, "lr": rate, "sources": parts}
        content["phases"] = [*content["phases"], phase]
        return content

    def _trunk_phases(self, seed: int) -> list[dict[str, Any]]:
        study, trunk = self.study, self.study.trunk
        assert trunk is not None
        step, rate = study.training.global_batch_size * study.seq_length, study.training.lr
        steps = trunk.tokens // step
        fraction = study.training.lr_warmup_fraction
        warm = min(steps - 1, max(1, round(steps * fraction))) if fraction else 0
        phases = [
            (f"warm-up {seed}", warm * step, {"start": 0.0, "end": rate, "shape": "warmup"}),
            (f"trunk {seed}", (steps - warm) * step, {"start": rate, "end": rate, "shape": "constant"}),
        ]
        return [
            {"name": name, "order": "shuffled", "tokens": tokens, "lr": lr, "sources": self._mix_parts(tokens)}
            for name, tokens, lr in phases
            if tokens
        ]

    def _mix_parts(self, tokens: int, share: Fraction = Fraction(1)) -> dict[str, Any]:
        """Return the parts of a phase of so many tokens that are the mix.

        It may pass over small datasets more than once.
        """
        parts: dict[str, Any] = {}
        for name, part in self.mix.items():
            # one window of slack: shares become whole windows
            passes = ceil((part * float(share) * tokens + self.study.seq_length) / max(1, self.sizes[name] - 1))
            parts[name] = {"weight": part * float(share)} | ({"max_repeat": passes} if passes > 1 else {})
        return parts
