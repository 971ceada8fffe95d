"""Sources that do not exist yet: planning with invented document counts, lengths and scores.

A simulated source has as many documents and tokens as its `expected` field says. Lengths scatter about the mean, with a
linear trend over quality, as `invented_lengths.py` says; scores are ranks alone, without ties. Every count of a dry run
follows by arithmetic; there are no tokens to read, so a simulated plan can be described but not trained on.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from megatron_kaiyuan.data.opened import OpenedSource, leave_out_elsewhere
from megatron_kaiyuan.data.plan_schema import ExpectedSpec, SourceSpec
from megatron_kaiyuan.documents.invented_lengths import InventedLengths
from megatron_kaiyuan.documents.order import Pieces, block_size
from megatron_kaiyuan.documents.permutation import KeyedPermutation, derive_key
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.shards.source import Segment, Source

__all__ = ["SimulatedSource", "simulate_plan_sources"]


class SimulatedSource(Source):
    """Documents that are only counted."""

    expected: ExpectedSpec

    def __init__(self, name: str, expected: ExpectedSpec) -> None:
        super().__init__(name, ())
        object.__setattr__(self, "expected", expected)

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
        """Documents are numbered by rank; held-out ones are drawn at random anyway."""
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


def simulate_plan_sources(
    specs: Mapping[str, SourceSpec], held_out: Mapping[str, int], seed: int
) -> dict[str, OpenedSource]:
    """Sources of the sizes that their `expected` fields give; arguments and errors as of `open_plan_sources`."""
    opened = {name: _simulate(name, spec, held_out[name], seed) for name, spec in specs.items()}
    sizes = {name: source.source.num_documents for name, source in opened.items()}
    shards = {name: [((str(specs[name].shards), size), size)] for name, size in sizes.items()}
    opened = leave_out_elsewhere(opened, shards)
    for source in opened.values():
        _invent_files(source, seed)
    return opened


def _simulate(name: str, spec: SourceSpec, held_out: int, seed: int) -> OpenedSource:
    """A source of the size its `expected` field gives, with held-out documents drawn as from a real one.

    Raises:
        PlanError: the source has no `expected` field, or fewer documents than are to be held out.
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
    source = SimulatedSource(name, spec.expected)
    if held_out >= source.num_documents:
        raise PlanError(f"validation.{name}.documents: {held_out} of {source.num_documents} leaves none to train on")
    drawn = KeyedPermutation(source.num_documents, derive_key(seed, "held-out", name)).many(np.arange(held_out))
    return OpenedSource(name, spec, source, np.sort(drawn))


def _invent_files(opened: OpenedSource, seed: int) -> None:
    """Put there what the cached properties of a real source find in its files."""
    source = opened.source
    assert isinstance(source, SimulatedSource)
    digest = hashlib.sha256(f"simulated {source.expected}".encode()).hexdigest()
    opened.__dict__.update(
        storage_order=SimulatedOrder(source, ranked=False, seed=seed),
        ranked_order=SimulatedOrder(source, ranked=True, seed=seed),
        content=digest,
        ranking=digest[:16],
    )
