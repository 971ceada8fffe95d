"""Sources that do not exist yet: planning with invented document counts, lengths and scores.

A simulated source has as many documents and tokens as its `expected` field says. Lengths scatter about the mean, with a
linear trend over quality, as `invented_lengths.py` says; scores are ranks alone, without ties. Every count of a dry run
follows by arithmetic; there are no tokens to read, so a simulated plan can be described but not trained on.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.opened import OpenedSource, leave_out_elsewhere
from megatron_kaiyuan.data.plan_schema import ExpectedSpec, SourceSpec, ValidationSpec
from megatron_kaiyuan.documents.invented_lengths import InventedLengths
from megatron_kaiyuan.documents.order import DocumentOrder, Pieces, block_size
from megatron_kaiyuan.documents.permutation import KeyedPermutation, derive_key
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.shards.shard import Shard
from megatron_kaiyuan.shards.source import Segment, Source

__all__ = ["SimulatedSource", "simulate_plan_sources"]


@dataclass(frozen=True)
class SimulatedSource(Source):
    """Documents that are only counted."""

    shards: tuple[Shard, ...] = ()
    expected: ExpectedSpec = field(kw_only=True)

    @property
    def num_documents(self) -> int:
        """Documents expected."""
        return self.expected.documents

    @property
    def num_tokens(self) -> int:
        """Tokens expected."""
        return self.expected.tokens


class SimulatedOrder:
    """An order whose cumulative tokens are a formula."""

    def __init__(self, source: SimulatedSource, *, ranked: bool, seed: int = 0) -> None:
        self.source: Source = source
        self.ranked = ranked
        self.block = block_size(source.num_documents, 1 << 18 if ranked else 1 << 14)
        self._lengths = InventedLengths(
            source.num_documents,
            source.num_tokens,
            trend=source.expected.length_by_quality if ranked else 0.0,
            spread=source.expected.length_spread,
            key=derive_key(seed, "simulated", source.name, ranked),
        )

    @property
    def num_documents(self) -> int:
        """Documents expected."""
        return self.source.num_documents

    def token_offsets(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens before each position: exact at both ends."""
        return self._lengths.before(positions)

    def locate(self, token: int) -> int:
        """The position that holds this token."""
        return self._lengths.locate(token)

    def documents_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Documents are numbered by position."""
        return positions

    def lengths_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Invented lengths."""
        return self.token_offsets(positions + 1) - self.token_offsets(positions)

    def positions_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ranks of these documents, because simulated documents are numbered by rank.

        Held-out ones are drawn at random anyway.
        """
        return documents

    def read(self, token: int, out: NDArray[np.int64]) -> None:
        """A simulated source has no tokens."""
        raise self._no_tokens()

    def pieces(self, token: int, count: int) -> Pieces:
        """A simulated source has no documents to name."""
        raise self._no_tokens()

    def segments(self, token: int, count: int) -> list[Segment]:
        """A simulated source has no documents to name."""
        raise self._no_tokens()

    def _no_tokens(self) -> PlanError:
        return PlanError(
            f"source {self.source.name!r} is simulated: it can be planned with, but it holds no tokens to read; "
            "build its shards first"
        )


@dataclass(frozen=True)
class SimulatedOpenedSource(OpenedSource):
    """A source whose orders and whose identity follow from its `expected` field and the plan's seed."""

    source: SimulatedSource
    seed: int = field(kw_only=True)
    """Of the plan."""

    @cached_property
    def storage_order(self) -> DocumentOrder:
        """Documents as they would be stored."""
        return SimulatedOrder(self.source, ranked=False, seed=self.seed)

    @cached_property
    def ranked_order(self) -> DocumentOrder:
        """Documents in ascending rank."""
        return SimulatedOrder(self.source, ranked=True, seed=self.seed)

    @cached_property
    def content(self) -> str:
        """Identifies the sizes that were expected."""
        return hashlib.sha256(f"simulated {self.source.expected}".encode()).hexdigest()

    @cached_property
    def ranking(self) -> str:
        """Identifies the order by rank."""
        return self.content[:16]


def simulate_plan_sources(
    specs: Mapping[str, SourceSpec], held_out: Mapping[str, ValidationSpec], seed: int
) -> dict[str, OpenedSource]:
    """Return sources of the sizes in their `expected` fields.

    Arguments and errors as of `open_plan_sources`.
    """
    opened = {name: _simulate(name, spec, held_out.get(name), seed) for name, spec in specs.items()}
    sizes = {name: source.source.num_documents for name, source in opened.items()}
    shards = {name: [((str(specs[name].shards), size), size)] for name, size in sizes.items()}
    return leave_out_elsewhere(opened, shards)


def _simulate(name: str, spec: SourceSpec, told: ValidationSpec | None, seed: int) -> SimulatedOpenedSource:
    """A source of the size its `expected` field gives, with held-out documents drawn as from a real one.

    Raises:
        PlanError: the source has no `expected` field, fewer documents than are to be held out, or groups.
    """
    if spec.expected is None:
        raise PlanError(
            f"sources.{name}: --simulate needs expected: {{documents: N, tokens: N}} for every source; add it, or run "
            "without --simulate once the shards exist"
        )
    if spec.deny is not None:
        raise PlanError(
            f"sources.{name}.deny: --simulate has no documents to deny; leave deny out until the shards exist, or run "
            "without --simulate"
        )
    if told is not None and told.groups is not None:
        raise PlanError(
            f"validation.{name}.groups: --simulate has no sidecar to read; leave groups out until the shards exist, "
            "or run without --simulate"
        )
    source = SimulatedSource(name, expected=spec.expected)
    held_out = 0 if told is None else told.documents
    if held_out >= source.num_documents:
        raise PlanError(f"validation.{name}.documents: {held_out} of {source.num_documents} leaves none to train on")
    drawn = KeyedPermutation(source.num_documents, derive_key(seed, "held-out", name)).many(np.arange(held_out))
    return SimulatedOpenedSource(name, spec, source, np.sort(drawn), seed=seed)
