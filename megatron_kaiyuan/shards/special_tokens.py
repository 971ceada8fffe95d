"""Special tokens among the ids of the texts themselves: detected, counted, and reported.

A text that holds `<|endoftext|>` gives the id of that token, as in Megatron's own tool. Such a document is cut there by
`--reset-attention-mask` and its relatives, so each shard counts them. What a tokenizer's post-processor puts around
every text is no part of these counts, and neither is the id that `--append-eod` adds.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["SpecialCounts", "SpecialIds"]


@dataclass(frozen=True)
class SpecialIds:
    """The special ids of a tokenizer, and what its post-processor puts around each text."""

    names: Mapping[int, str]
    """Token by id; the end-of-document id is one of them."""
    eod_id: int | None
    before: Sequence[int] = ()
    """Ids in front of each text."""
    after: Sequence[int] = ()
    """Ids behind each text."""

    @property
    def ends_itself(self) -> bool:
        """Whether the post-processor already ends each text with the end-of-document id."""
        return self.eod_id is not None and list(self.after[-1:]) == [self.eod_id]

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Return which ids are special, bool `[largest special id + 2]`.

        The last entry stands for all ids above.
        """
        mask = np.zeros(max(self.names, default=-1) + 2, dtype=np.bool_)
        mask[list(self.names)] = True
        return mask


@dataclass(slots=True)
class SpecialCounts:
    """How often special tokens stood inside the texts of some documents."""

    occurrences: Counter[str] = field(default_factory=Counter)
    """By token."""
    with_eod: int = 0
    """Documents that hold the end-of-document id inside."""
    ending_twice: int = 0
    """Documents that end with two end-of-document ids."""

    def add(self, other: "SpecialCounts") -> None:
        """Count further documents."""
        self.occurrences.update(other.occurrences)
        self.with_eod += other.with_eod
        self.ending_twice += other.ending_twice

    @classmethod
    def of(
        cls, tokens: NDArray[np.integer], lengths: NDArray[np.integer], special: SpecialIds, *, appended: bool
    ) -> "SpecialCounts":
        """Count over some documents.

        Args:
            tokens: their ids without the appended one, `[sum(lengths)]`.
            lengths: ids of each, `[documents]`.
            special: of the tokenizer.
            appended: whether the end-of-document id is appended to each.
        """
        if not len(tokens) or not special.names:
            return cls()
        ends = np.cumsum(lengths, dtype=np.int64)
        hits = np.flatnonzero(special.mask[np.minimum(tokens, len(special.mask) - 1)])
        documents = np.searchsorted(ends, hits, side="right")
        in_text = (hits >= (ends - lengths)[documents] + len(special.before)) & (
            hits < ends[documents] - len(special.after)
        )
        hits, documents = hits[in_text], documents[in_text]
        found = tokens[hits]
        numbers, counts = np.unique(found, return_counts=True)
        named = {special.names[int(number)]: int(count) for number, count in zip(numbers, counts, strict=True)}
        if special.eod_id is None:
            return cls(Counter(named))
        needed = 1 if appended else 2
        long_enough = ends[lengths >= needed]
        at_end = [tokens[long_enough - back] == special.eod_id for back in range(1, needed + 1)]
        return cls(
            Counter(named),
            with_eod=len(np.unique(documents[found == special.eod_id])),
            ending_twice=int(np.logical_and.reduce(at_end).sum()),
        )
