"""What sources hold, as one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.reporting.html_page import Card, figure_block, render_page
from megatron_kaiyuan.reporting.plan_table import format_tokens
from megatron_kaiyuan.reporting.shards_figures import band_figure, length_figure, score_figure, sources_figure
from megatron_kaiyuan.reporting.shards_table import format_number, source_facts

__all__ = ["write_shards_page"]


def write_shards_page(sources: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page atomically.

    It loads nothing from elsewhere.

    Args:
        sources: what `describe_source` returned of each, with `document_samples` and `unchecked` where there are any.
        path: the HTML file.
    """
    documents, tokens = (sum(source[field] for source in sources) for field in ("documents", "tokens"))
    shards = sum(source["shards"] for source in sources)
    held = f"{counted(documents, 'document')}, {counted(tokens, 'token')} ({format_tokens(tokens)})"
    page = render_page(
        "shards.html",
        title="What these shards hold" if len(sources) == 1 else f"What {counted(len(sources), 'source')} hold",
        lead=f"{held} in {counted(shards, 'shard')}",
        overview=_overview(sources) if len(sources) > 1 else None,
        sources=[_section(source) for source in sources],
    )
    write_text_atomically(path, page)


def _overview(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [
        [
            source["name"],
            f"{source['documents']:,}",
            format_tokens(source["tokens"]),
            format_number(source["lengths"]["mean"]) if source["lengths"]["count"] else "-",
            ", ".join(source["scores"]) or "none",
            f"{source['manifests']['present']:,} of {source['shards']:,}",
            f"{len(source['findings']):,}",
        ]
        for source in sources
    ]
    header = ["source", "documents", "tokens", "tokens a document", "scores", "manifests", "findings"]
    return {"figure": figure_block(sources_figure(sources)), "header": header, "rows": rows, "numbers": (1, 2, 3, 5, 6)}


def _section(source: Mapping[str, Any]) -> dict[str, Any]:
    counted = source["lengths"]["count"]
    return {
        "name": source["name"],
        "cards": _cards(source),
        "findings": source["findings"],
        "length_figure": figure_block(length_figure(source["lengths"])) if counted else None,
        "scores": _scores(source) if counted else [],
        "facts": [list(fact) for fact in source_facts(source)],
        "quantiles": _quantiles(source) if counted else None,
        "skipped": [[reason, f"{count:,}"] for reason, count in source["manifests"]["skipped"].items()],
        "unchecked": source.get("unchecked", ()),
        "decoder": source.get("decoder") if "document_samples" in source else None,
        "documents": [_document(row) for row in source.get("document_samples", ())],
    }


def _cards(source: Mapping[str, Any]) -> list[Card]:
    manifests, lengths, findings = source["manifests"], source["lengths"], len(source["findings"])
    depth = "every byte verified" if "verified_bytes" in source else "sizes compared; --verify reads every byte"
    cards: list[Card] = [
        (f"{source['documents']:,}", "documents", ""),
        (format_tokens(source["tokens"]), f"tokens, {', '.join(source['dtypes']) or 'none readable'}", ""),
        (f"{source['shards']:,}", f"shards, {manifests['present']:,} with a manifest", ""),
        (f"{sum(manifests['skipped'].values()):,}", f"of {manifests['input_rows']:,} input rows skipped", ""),
        (f"{findings:,}", f"findings ({depth})", "bad" if findings else "good"),
    ]
    if lengths["count"]:
        median = format_number(lengths["quantiles"]["0.5"])
        cards.insert(2, (median, f"tokens in the median document, mean {format_number(lengths['mean'])}", ""))
    return cards


def _scores(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    scores = {score: told for score, told in source["scores"].items() if told["count"]}
    return [
        {"name": score, "values": figure_block(score_figure(score, told)), "bands": figure_block(band_figure(told))}
        for score, told in sorted(scores.items(), key=lambda item: item[1]["grades"] is not None)
    ]


def _quantiles(source: Mapping[str, Any]) -> dict[str, Any]:
    columns = {"tokens of a document": source["lengths"]}
    columns |= {f"score {name}": told for name, told in source["scores"].items() if told["count"]}
    fractions = list(source["lengths"]["quantiles"])
    header = ["", *({"0": "min", "1": "max"}.get(key, f"{float(key) * 100:g}%") for key in fractions), "mean"]
    rows = [
        [name, *(format_number(value) for value in told["quantiles"].values()), format_number(told["mean"])]
        for name, told in columns.items()
    ]
    return {"header": header, "rows": rows, "numbers": range(1, len(header))}


def _document(row: Mapping[str, Any]) -> dict[str, str]:
    scores = "".join(
        f"; {name} {told['score']:.4g}, above about {told['above']:.0%} of the documents"
        for name, told in row["scores"].items()
    )
    return {
        "place": f"{row['shard']} document {row['document']:,}, {counted(row['tokens'], 'token')}{scores}",
        "text": f"{row['text']} ..." if row["cut"] else row["text"],
    }
