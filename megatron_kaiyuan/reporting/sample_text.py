"""Documents of a source and samples of a plan as a person can read them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.text import Text

from megatron_kaiyuan.data import CurriculumDataset, Segment, Source
from megatron_kaiyuan.documents.permutation import KeyedPermutation, derive_key
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.reporting.decoding import TextDecoder

__all__ = [
    "describe_sample",
    "fraction_below",
    "parse_sample_numbers",
    "parse_sample_range",
    "print_documents",
    "print_sample",
    "sample_documents",
]

_CANDIDATES = 64


def parse_sample_numbers(words: Sequence[str], num_samples: int) -> Iterator[int]:
    """Sample numbers from words such as `7` and `10-12` (both ends included).

    Raises:
        ConfigError: not a number or a range, or outside the plan.
    """
    for word in words:
        numbers = parse_sample_range(word)
        if numbers.stop > num_samples:
            raise ConfigError(f"--sample {word}: the plan has samples 0 to {num_samples - 1:,}; name some of these")
        yield from numbers


def parse_sample_range(word: str) -> range:
    """The sample numbers of a word such as `7` or `10-12`.

    Raises:
        ConfigError: not a number or an ascending range.
    """
    first, dash, last = word.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ConfigError(f"--sample {word}: not a sample number; write 7, or 10-12 for a range with both ends")
    low, high = int(first), int(last if dash else first)
    if low > high:
        raise ConfigError(f"--sample {word}: ranges ascend; write {high}-{low}")
    return range(low, high + 1)


def describe_sample(order: CurriculumDataset, sample: int, decoder: TextDecoder, characters: int) -> dict[str, Any]:
    """Where a sample of a plan comes from and what it says, as plain data.

    Args:
        order: the plan's samples.
        sample: which one.
        decoder: makes text of ids.
        characters: of each document's text to keep; 0: all.
    """
    origin = order.provenance(sample)
    tokens = order[sample]["tokens"]
    ends = np.cumsum([segment.stop - segment.start for segment in origin.segments])
    return {
        "sample": sample,
        "phase": origin.phase,
        "source": origin.source,
        "pass": origin.pass_number,
        "quantile": origin.quantile,
        "segments": [
            _describe_segment(segment, part, decoder, characters)
            for segment, part in zip(origin.segments, np.split(tokens, ends[:-1]), strict=True)
        ],
    }


def _describe_segment(
    segment: Segment, tokens: NDArray[np.int64], decoder: TextDecoder, characters: int
) -> dict[str, Any]:
    return {
        "shard": segment.shard,
        "document": segment.document,
        "start": segment.start,
        "stop": segment.stop,
    } | _text(tokens, len(tokens), decoder, characters)


def _text(tokens: NDArray[np.int64], total: int, decoder: TextDecoder, characters: int) -> dict[str, Any]:
    """Return text of at most `characters`, and whether tokens of it were left out."""
    text = decoder.decode(tokens.tolist())
    shown = text[:characters] if characters else text
    return {"text": shown, "cut": len(shown) < len(text) or len(tokens) < total}


def sample_documents(
    source: Source, count: int, decoder: TextDecoder, characters: int, scores: Mapping[str, Any], seed: int = 0
) -> list[dict[str, Any]]:
    """A few documents drawn at random, as plain data: from the worst to the best by a score, if there is one.

    Args:
        source: where to draw from.
        count: documents wanted; fewer where the source has fewer with tokens.
        decoder: makes text of ids.
        characters: of each text to keep; 0: all.
        scores: what `describe_source` says of each score.
        seed: of the draw.
    """
    drawn = KeyedPermutation(source.num_documents, derive_key(seed, "inspect")).many(
        np.arange(min(source.num_documents, _CANDIDATES * count))
    )
    drawn = drawn[source.lengths(drawn) > 0]
    complete = {name: told for name, told in scores.items() if told["count"] == source.num_documents}
    complete = dict(sorted(complete.items(), key=lambda item: item[1]["grades"] is not None))  # fine scores first
    columns = {name: source.scores_of(name, drawn) for name in complete}
    if columns:
        ascending = np.argsort(next(iter(columns.values())), kind="stable")
        chosen = ascending[np.unique(np.linspace(0, len(drawn) - 1, min(count, len(drawn))).astype(np.int64))]
    else:
        chosen = np.argsort(drawn[:count])
    return [
        _describe_document(source, int(drawn[at]), decoder, characters)
        | {"scores": {name: _scored(float(column[at]), complete[name]) for name, column in columns.items()}}
        for at in chosen.tolist()
    ]


def _describe_document(source: Source, document: int, decoder: TextDecoder, characters: int) -> dict[str, Any]:
    number = np.array([document])
    length, start = int(source.lengths(number)[0]), int(source.token_starts(number)[0])
    tokens = np.empty(min(length, characters) if characters else length, dtype=np.int64)  # a token has a character
    source.read_tokens(start, tokens)
    segment = source.segment(document, 0, length)
    place = {"shard": segment.shard, "document": segment.document, "tokens": length}
    return place | _text(tokens, length, decoder, characters)


def _scored(value: float, told: Mapping[str, Any]) -> dict[str, float]:
    return {"score": value, "above": fraction_below(told, value)}


def fraction_below(described: Mapping[str, Any], value: float) -> float:
    """About which fraction of the documents has a lower score, from the bins of `describe_source`."""
    bins = described["bins"]
    edges = np.array([bins[0]["low"], *(row["high"] for row in bins)])
    before = np.cumsum([0, *(row["documents"] for row in bins)])
    if described["grades"] is not None:
        return float(before[np.searchsorted(edges, value)] / before[-1])
    finite = np.nan_to_num(edges)
    return float(np.interp(value, finite, before) / before[-1])


def print_documents(documents: Sequence[Mapping[str, Any]], note: str, console: Console) -> None:
    """Decoded documents, each under a line that says where it lies and how it scores."""
    console.print(Text(note, style="dim"))
    for row in documents:
        scores = ", ".join(
            f"{name} {told['score']:.4g} (above about {told['above']:.0%} of the documents)"
            for name, told in row["scores"].items()
        )
        title = f"{row['shard']} document {row['document']:,}, {counted(row['tokens'], 'token')}"
        console.print(_with_text(f"{title}; {scores}" if scores else title, row))


def print_sample(described: Mapping[str, Any], console: Console) -> None:
    """A described sample: one line of origin, then its documents."""
    band = described["quantile"]
    quality = "unscored" if band is None else f"score quantiles {band[0]:.4f} to {band[1]:.4f} (1 = best)"
    console.print(
        Text(
            f"sample {described['sample']:,}: phase {described['phase']}, source {described['source']}, "
            f"pass {described['pass'] + 1}, {quality}",
            style="bold",
        )
    )
    for row in described["segments"]:
        place = f"{row['shard']} document {row['document']:,}, its tokens {row['start']:,} to {row['stop'] - 1:,}"
        console.print(_with_text(place, row))


def _with_text(title: str, row: Mapping[str, Any]) -> Group:
    body = "\n".join(f"    {line}" for line in row["text"].splitlines())
    return Group(Text(title, style="cyan"), Text(f"{body} ..." if row["cut"] else body), Text(""))
