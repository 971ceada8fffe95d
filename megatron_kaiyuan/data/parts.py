"""What a phase takes of a source, as a stream: the selection, its random choices, its passes, and what a budget leaves.

Two versions of the plan differ here and nowhere else. Version 1 drew even samples, and thinned all passes of a
curriculum alike. Version 2 draws independently, shows what is unseen before it repeats, and lets the copies of a ranked
selection rise together.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce

import numpy as np

from megatron_kaiyuan.data.opened import OpenedSource
from megatron_kaiyuan.data.plan_schema import PhaseSourceSpec, PlanSpec
from megatron_kaiyuan.data.selection import Keep
from megatron_kaiyuan.data.stream import Shuffling, Stream
from megatron_kaiyuan.documents.draws import Draw
from megatron_kaiyuan.documents.even_sample import even_sample
from megatron_kaiyuan.documents.packing import PackedOrder
from megatron_kaiyuan.documents.permutation import derive_key
from megatron_kaiyuan.documents.runs import DocumentRuns, nearest_count
from megatron_kaiyuan.documents.shuffled import ShuffledOrder
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.host.terminal import counted

__all__ = ["Part", "build_stream", "fitted_stream", "most_windows"]

_FEWEST_OF_BAND = 4
"""Windows that a band of a ranked repetition has at least, on the average, so that copies are not neighbours."""


@dataclass(frozen=True, slots=True)
class Part:
    """One source of one phase, with what its choices depend on."""

    plan: PlanSpec
    phase: str
    order: str
    name: str
    spec: PhaseSourceSpec
    source: OpenedSource
    seq_length: int
    """Predicted tokens of a window of the phase."""
    indexed: bool = True
    """Whether what `tools/rank_data.py` stores for large sources must be there."""

    @property
    def ascending(self) -> bool:
        """Whether its windows rise in quality over the phase."""
        return self.order == "curriculum" and self.spec.sorted and self.source.spec.score is not None

    @property
    def ranked(self) -> bool:
        """Whether its documents are taken in the order of their ranks."""
        return self.ascending or self.spec.needs_scores or (self._named and self.source.spec.score is not None)

    @property
    def key(self) -> int:
        """Of its random choices."""
        return derive_key(self.plan.seed, self.phase, self.name)

    @property
    def draw_key(self) -> int:
        """Of its draw: the part's own, or that of all parts that name the draw."""
        if self._named:
            return derive_key(self.plan.seed, "draw", self.source.name, self.spec.drawn_as)
        return derive_key(self.key, "keep")

    @property
    def even(self) -> bool:
        """Whether random parts are even samples, as version 1 has them."""
        return self.plan.order_version == 1

    @property
    def _named(self) -> bool:
        return self.spec.draw is not None


def build_stream(part: Part) -> Stream:
    """All passes of a part, before any budget.

    Raises:
        PlanError: a selection that leaves less than one window.
    """
    available = part.source.trainable(ranked=part.ranked)
    documents = _select(available, part)
    packed = _packed(part, documents) if part.spec.packing == "whole" else None
    selected = documents if packed is None else _all_of(packed)
    whole, fraction = divmod(part.spec.repeat, 1)
    extra = _some(part, selected, nearest_count(fraction, selected.num_documents), fraction) if fraction else None
    stream = Stream(
        selected=selected,
        whole_passes=int(whole),
        extra=extra if extra is not None and extra.num_tokens else None,
        repeat=part.spec.repeat,
        seq_length=part.seq_length,
        ascending=part.ascending,
        key=part.key,
        shuffling=_shuffling(part, selected) if packed is None else None,
        packed=packed,
    )
    if stream.num_windows == 0:
        raise PlanError(
            f"phase {part.phase!r}, source {part.name!r}: keep {part.spec.kept} of "
            f"{counted(available.num_documents, 'document')} leaves {counted(documents.num_documents, 'document')}, "
            f"{counted(stream.num_tokens, 'token')} "
            "with repeat "
            f"{float(part.spec.repeat):g}; one window needs {part.seq_length + 1:,}: keep more, repeat more, or "
            "leave the source out of the phase"
        )
    return _with_bands(part, stream)


def fitted_stream(part: Part, stream: Stream, used: int) -> Stream:
    """The stream with as many passes as `used` windows of it need, at least one of them where it has a whole one."""
    shown = stream.seen.windows + used
    if shown == stream.num_windows or (shown < stream.num_windows and (part.even or not stream.ascending)):
        return stream
    if stream.seen.windows and stream.ascending:
        return stream  # one pass, of which earlier phases have shown some: the rest is thinned
    whole, missing = divmod(stream.tokens_of(shown), stream.selected.num_tokens)
    if not stream.ascending:  # cut short within its last pass, which a longer budget would go on with
        return replace(stream, whole_passes=whole + (1 if missing else 0), extra=None)
    if whole == 0 and used < stream.num_windows:  # less than one pass: what there is of it is thinned evenly
        return stream if stream.whole_passes == 0 else _with_bands(part, replace(stream, whole_passes=1, extra=None))
    extra = _of_at_least(part, stream.selected, missing) if missing else None
    return _with_bands(part, replace(stream, whole_passes=whole, extra=extra))


def most_windows(stream: Stream, max_repeat: Fraction | None) -> int:
    """How many windows of a stream a budget may ask for."""
    if stream.seen.windows and (stream.ascending or stream.seen.levels):
        return stream.available
    stretched = 0 if max_repeat is None else stream.windows_in(math.floor(max_repeat * stream.selected.num_tokens))
    return max(stream.num_windows, stretched) - stream.seen.windows


def _select(available: DocumentRuns, part: Part) -> DocumentRuns:
    if part.spec.rest_of is not None:
        drawn = part.plan.draws[part.source.name, part.spec.rest_of]
        kept = available.minus(_random_part(available, part, drawn))
    elif part.spec.keep.kind == "random":
        kept = _random_part(available, part, part.spec.keep)
    else:
        kept = _by_quality(available, part, part.spec.keep)
    return kept if part.spec.but is None else kept.minus(_by_quality(available, part, part.spec.but))


def _by_quality(available: DocumentRuns, part: Part, keep: Keep) -> DocumentRuns:
    """All documents, or those that a selection by quality takes of them."""
    if keep.kind == "all":
        return available
    if keep.kind == "list":
        return reduce(DocumentRuns.joined_with, (_by_quality(available, part, one) for one in keep.parts))
    if keep.kind == "score":
        low, high = part.source.ranks_scored(keep.at_least, keep.at_most)
        return available.common_with(DocumentRuns(available.order, np.array([low]), np.array([max(low, high)])))
    if keep.amount:
        _check_amount(available, part, keep)
    if keep.by == "documents":
        total = available.num_documents
        edges = [nearest_count(edge, total) for edge in (keep.low, keep.high)]
        edges = [total - keep.amount, total] if keep.kind == "top" else edges
    else:
        tokens = available.num_tokens
        wanted = [tokens - keep.amount, tokens] if keep.kind == "top" else [keep.low * tokens, keep.high * tokens]
        wanted = [0, keep.amount] if keep.kind == "bottom" else wanted
        edges = [available.nearest_index(edge) for edge in wanted]
    if keep.kind == "bottom" and keep.by == "documents":
        edges = [0, keep.amount]
    return available.between(*edges)


def _check_amount(available: DocumentRuns, part: Part, keep: Keep) -> None:
    total = available.num_documents if keep.by == "documents" else available.num_tokens
    if keep.amount > total:
        raise PlanError(
            f"phase {part.phase!r}, source {part.name!r}: keep {keep}, and there are {total:,} {keep.by} to train on; "
            "write a smaller number, or all"
        )


def _random_part(available: DocumentRuns, part: Part, keep: Keep) -> DocumentRuns:
    if part.even:
        return even_sample(available, keep.high, keep.by, part.draw_key)
    draw = Draw(available, part.draw_key)
    if keep.amount:
        _check_amount(available, part, keep)
    if keep.by == "tokens":
        return draw.tokens(keep.amount or nearest_count(keep.high, available.num_tokens))
    return draw.documents(keep.amount or nearest_count(keep.high, available.num_documents))


def _some(part: Part, selected: DocumentRuns, count: int, fraction: Fraction) -> DocumentRuns:
    """A part of a selection that is shown once more: `count` documents."""
    key = derive_key(part.key, "repeat")
    return even_sample(selected, fraction, "documents", key) if part.even else Draw(selected, key).documents(count)


def _of_at_least(part: Part, selected: DocumentRuns, tokens: int) -> DocumentRuns:
    """The smallest part of a selection, shown once more, with this many tokens."""
    key = derive_key(part.key, "repeat")
    if part.even:
        sample = even_sample(selected, Fraction(tokens, selected.num_tokens), "tokens", key)
    else:
        sample = Draw(selected, key).tokens(tokens)
    while sample.num_tokens < tokens:  # rounded down to a document: take the next one too
        count = sample.num_documents + 1
        sample = _some(part, selected, count, Fraction(count, selected.num_documents))
    return sample


def _with_bands(part: Part, stream: Stream) -> Stream:
    """The bands in which a ranked repetition comes: as its spacing says, but none too short to keep copies apart."""
    if not stream.ascending or part.even or part.spec.repeat_order == "passes" or stream.num_passes == 1:
        return replace(stream, num_bands=1)
    return replace(stream, num_bands=_num_bands(part, stream.selected))


def _packed(part: Part, documents: DocumentRuns) -> PackedOrder:
    """Return the windows that a selection is packed into whole.

    Where that is asked for, the documents are shuffled once before.
    """
    shuffled = None
    if (shuffling := _shuffling(part, documents)) is not None:
        edges = np.arange(shuffling.num_bands + 1, dtype=np.int64) * documents.num_documents // shuffling.num_bands
        shuffled = ShuffledOrder(documents, edges, derive_key(shuffling.key, "documents"))
    return PackedOrder(documents, part.seq_length, shuffled, ascending=part.ascending, must_be_stored=part.indexed)


def _all_of(packed: PackedOrder) -> DocumentRuns:
    return DocumentRuns(packed, np.zeros(1, dtype=np.int64), np.array([packed.num_documents], dtype=np.int64))


def _num_bands(part: Part, selected: DocumentRuns) -> int:
    """Bands of an ascending selection, as the spacing says."""
    asked = -(-part.spec.spacing.denominator // part.spec.spacing.numerator)
    windows = selected.num_tokens // part.seq_length
    return max(1, min(asked, selected.num_documents // 2, windows // _FEWEST_OF_BAND))


def _shuffling(part: Part, selected: DocumentRuns) -> Shuffling | None:
    """How the documents of a part are shuffled before they are packed: all of them, or each band of what ascends."""
    if part.spec.shuffle == "windows":
        return None
    return Shuffling(part.key, _num_bands(part, selected) if part.ascending else 1)
