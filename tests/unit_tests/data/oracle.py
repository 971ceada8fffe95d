"""A brute-force model of the training order, written from the design and without any code of the engine.

It builds every list that the engine never stores: the sorted documents, the packed windows, the merged samples. It
covers all but chance itself: curricula with distinct scores, bands, repetitions in either order, budgets and weights.
Where a document is shown once more by chance, the test says which ones were drawn, and checks them by their own laws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What a phase takes from one source: documents with distinct scores, a band of ranks, whole passes."""

    documents: Sequence[Sequence[int]]
    scores: Sequence[float]
    low: Fraction = Fraction(0)
    high: Fraction = Fraction(1)
    by: str = "documents"
    repeat: Fraction | int = 1
    spacing: Fraction = Fraction(1, 20)
    """Bands of a ranked repetition; 1: pass by pass."""
    weight: float | None = None
    held_out: frozenset[int] = field(default_factory=frozenset)


def half_up(value: Fraction) -> int:
    """Nearest whole number, halves upwards."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def ranked(part: Part) -> list[list[int]]:
    """Trainable documents in ascending score."""
    numbers = [n for n in range(len(part.documents)) if n not in part.held_out]
    return [list(part.documents[n]) for n in sorted(numbers, key=lambda n: part.scores[n])]


def nearest_boundary(documents: Sequence[Sequence[int]], tokens: Fraction) -> int:
    """How many documents to take to come nearest to `tokens` tokens; the fewer when two are equally near.

    Among boundaries that differ by empty documents alone any is right; tokens are what counts.
    """
    counts = [0]
    for document in documents:
        counts.append(counts[-1] + len(document))
    return min(range(len(counts)), key=lambda n: (abs(counts[n] - tokens), n))


def selected(part: Part) -> list[list[int]]:
    """Documents of the band, ascending."""
    documents = ranked(part)
    if part.by == "documents":
        return documents[half_up(part.low * len(documents)) : half_up(part.high * len(documents))]
    total = sum(map(len, documents))
    return documents[nearest_boundary(documents, part.low * total) : nearest_boundary(documents, part.high * total)]


def windows(tokens: Sequence[int], seq_length: int, *, drop_first: bool) -> list[Tokens]:
    """Windows of `seq_length + 1` tokens every `seq_length`; the part that fills none is dropped at one end."""
    count = max(0, (len(tokens) - 1) // seq_length)
    first = len(tokens) - 1 - count * seq_length if drop_first else 0
    return [tuple(tokens[first + w * seq_length : first + (w + 1) * seq_length + 1]) for w in range(count)]


def packed_whole(documents: Sequence[list[int]], room: int, group: int) -> list[list[list[int]]]:
    """Windows of whole documents, as docs/plan.md says, group by group: tokens of each, without padding."""
    windows: list[list[list[int]]] = []
    for first in range(0, len(documents), group):
        pieces: list[list[int]] = []
        bins: list[list[list[int]]] = []
        for document in documents[first : first + group]:
            while len(document) > room:
                bins.append([document[:room]])
                document = document[room - 1 :]
            if document:
                pieces.append(document)
        for piece in sorted(pieces, key=len, reverse=True):
            fitting = [one for one in bins if sum(map(len, one)) + len(piece) <= room]
            if fitting:
                max(fitting, key=lambda one: sum(map(len, one))).append(piece)
            else:
                bins.append([piece])
        windows += bins
    return windows


def bands(part: Part, seq_length: int) -> list[list[list[int]]]:
    """The selection cut into bands: as many as the spacing asks for, of two documents and four windows or more."""
    documents = selected(part)
    windows_of = sum(map(len, documents)) // seq_length
    asked = -(-part.spacing.denominator // part.spacing.numerator)
    count = max(1, min(asked, len(documents) // 2, windows_of // 4))
    edges = [number * len(documents) // count for number in range(count + 1)]
    return [documents[first:last] for first, last in pairwise(edges)]


def passes(part: Part, seq_length: int, used: int | None) -> tuple[int, int]:
    """Whole passes, and tokens of the part of one more, that `used` windows need; None: all that `repeat` says."""
    size = sum(map(len, selected(part)))
    if used is None or (used == (int(part.repeat) * size - 1) // seq_length and part.repeat == int(part.repeat)):
        return int(part.repeat), 0
    whole, missing = divmod(used * seq_length + 1, size)
    return (whole, missing) if whole else (1, 0)


def stream(part: Part, seq_length: int, used: int | None = None, again: frozenset[int] = frozenset()) -> list[Tokens]:
    """All windows of an ascending stream that shows `used` of them; documents beginning with `again` once more."""
    whole, missing = passes(part, seq_length, used)
    assert bool(missing) == bool(again), "a part of a pass is drawn exactly where one is needed"
    one_pass = whole + bool(missing) == 1
    tokens = [
        token
        for band in ([selected(part)] if one_pass else bands(part, seq_length))
        for documents in [*[band] * whole, [document for document in band if document and document[0] in again]]
        for document in documents
        for token in document
    ]
    return windows(tokens, seq_length, drop_first=True)


def merged(rates: Sequence[float], samples: int) -> list[tuple[int, int]]:
    """The first `samples` (stream, sample of the stream), by position `(j + 1/2) / rate`, ties by stream."""
    enough = [int(samples * rate / sum(rates)) + len(rates) + 3 for rate in rates]
    every = [((j + 0.5) / rates[i], i, j) for i in range(len(rates)) for j in range(enough[i])]
    return [(i, j) for _, i, j in sorted(every)[:samples]]


def shares(parts: Sequence[Part], seq_length: int, tokens: int | None) -> list[tuple[int, int]]:
    """The merged (stream, sample of the stream) of a phase."""
    natural = [float(len(stream(part, seq_length))) for part in parts]
    rates = [part.weight if part.weight is not None else size for part, size in zip(parts, natural, strict=True)]
    return merged(rates, int(sum(natural)) if tokens is None else tokens // seq_length)


def curriculum(
    parts: Sequence[Part],
    seq_length: int,
    tokens: int | None = None,
    again: Sequence[frozenset[int]] | None = None,
) -> list[tuple[int, Tokens]]:
    """Number of the source and tokens of every sample of a curriculum phase."""
    order = shares(parts, seq_length, tokens)
    used = [sum(1 for i, _ in order if i == number) for number in range(len(parts))]
    some = again or [frozenset()] * len(parts)
    streams = [stream(part, seq_length, *rest) for part, *rest in zip(parts, used, some, strict=True)]
    return [(i, streams[i][(j + 1) * len(streams[i]) // used[i] - 1]) for i, j in order]
