"""What sources hold, as one self-contained HTML page."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.reporting.html_page import Figures, html_card, html_page, html_table
from megatron_kaiyuan.reporting.plan_table import format_tokens
from megatron_kaiyuan.reporting.shards_figures import band_figure, length_figure, score_figure, sources_figure
from megatron_kaiyuan.reporting.shards_table import format_number, source_facts

__all__ = ["write_shards_page"]

_READ_BANDS = (
    '<p class="read">Right: the tokens in each tenth of the documents by score. Bars off the dashed line mean that '
    "quality and length go together, so that a top 30 % of the documents is not 30 % of the tokens.</p>"
)


def write_shards_page(sources: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page atomically; it loads nothing from elsewhere.

    Args:
        sources: what `describe_source` returned of each, with `document_samples` and `unchecked` where there are any.
        path: the HTML file.
    """
    figures = Figures()
    documents, tokens = (sum(source[field] for source in sources) for field in ("documents", "tokens"))
    shards = sum(source["shards"] for source in sources)
    what = "What these shards hold" if len(sources) == 1 else f"What {len(sources)} sources hold"
    lead = f"{documents:,} documents, {tokens:,} tokens ({format_tokens(tokens)}) in {shards:,} shards"
    parts = [f"<h1>{what}</h1>", f'<p class="lead">{lead}</p>']
    if len(sources) > 1:
        parts += [figures.add(sources_figure(sources)), _overview(sources)]
    parts += [_source_section(source, figures) for source in sources]
    write_text_atomically(path, html_page(what, parts))


def _overview(sources: Sequence[Mapping[str, Any]]) -> str:
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
    return html_table(header, rows, numbers={1, 2, 3, 5, 6})


def _source_section(source: Mapping[str, Any], figures: Figures) -> str:
    parts = [f"<h2>{html.escape(source['name'])}</h2>", _cards(source)]
    if source["findings"]:
        parts += ["<h3>Findings</h3>", _findings(source["findings"])]
    parts += _plots(source, figures)
    parts += ["<h3>Facts</h3>", html_table([], [list(fact) for fact in source_facts(source)])]
    if source["lengths"]["count"]:
        parts += ["<h3>Quantiles</h3>", _quantiles(source)]
    skipped = source["manifests"]["skipped"]
    if skipped:
        rows = [[reason, f"{count:,}"] for reason, count in skipped.items()]
        parts += ["<h3>Rows that gave no document</h3>", html_table(["reason", "rows"], rows, numbers={1})]
    for line in source.get("unchecked", ()):
        parts.append(f'<p class="read">Not checked: {html.escape(line)}</p>')
    if "document_samples" in source:
        parts.append(_documents(source))
    return "\n".join(parts)


def _cards(source: Mapping[str, Any]) -> str:
    manifests, lengths, findings = source["manifests"], source["lengths"], len(source["findings"])
    depth = "every byte verified" if "verified_bytes" in source else "sizes compared; --verify reads every byte"
    cards = [
        (f"{source['documents']:,}", "documents", ""),
        (format_tokens(source["tokens"]), f"tokens, {', '.join(source['dtypes']) or 'none readable'}", ""),
        (f"{source['shards']:,}", f"shards, {manifests['present']:,} with a manifest", ""),
        (f"{sum(manifests['skipped'].values()):,}", f"of {manifests['input_rows']:,} input rows skipped", ""),
        (f"{findings:,}", f"findings ({depth})", "bad" if findings else "good"),
    ]
    if lengths["count"]:
        median = format_number(lengths["quantiles"]["0.5"])
        cards.insert(2, (median, f"tokens in the median document, mean {format_number(lengths['mean'])}", ""))
    return '<div class="cards">' + "".join(html_card(*card) for card in cards) + "</div>"


def _plots(source: Mapping[str, Any], figures: Figures) -> list[str]:
    if not source["lengths"]["count"]:
        return []
    parts = [
        "<h3>Length</h3>",
        '<p class="read">Short documents are many, long ones hold the tokens: where the two curves part, choosing by '
        "documents and choosing by tokens are different things.</p>",
        figures.add(length_figure(source["lengths"])),
    ]
    scores = {score: told for score, told in source["scores"].items() if told["count"]}
    for number, (score, told) in enumerate(sorted(scores.items(), key=lambda item: item[1]["grades"] is not None)):
        parts += [
            f"<h3>Score: {html.escape(score)}</h3>",
            _READ_BANDS if number == 0 else "",
            f'<div class="plots">{figures.add(score_figure(score, told))}{figures.add(band_figure(told))}</div>',
        ]
    return parts


def _quantiles(source: Mapping[str, Any]) -> str:
    columns = {"tokens of a document": source["lengths"]}
    columns |= {f"score {name}": told for name, told in source["scores"].items() if told["count"]}
    fractions = list(source["lengths"]["quantiles"])
    header = ["", *({"0": "min", "1": "max"}.get(key, f"{float(key) * 100:g}%") for key in fractions), "mean"]
    rows = [
        [name, *(format_number(value) for value in told["quantiles"].values()), format_number(told["mean"])]
        for name, told in columns.items()
    ]
    return html_table(header, rows, numbers=set(range(1, len(header))))


def _findings(findings: Sequence[Mapping[str, str]]) -> str:
    rows = "".join(
        f'<tr><td class="kind">{html.escape(row["kind"])}</td><td class="file">{html.escape(row["file"])}</td>'
        f"<td>{html.escape(row['message'])}</td></tr>"
        for row in findings
    )
    return f'<div class="wide"><table><tr><th>kind</th><th>file</th><th>what is wrong</th></tr>{rows}</table></div>'


def _documents(source: Mapping[str, Any]) -> str:
    parts = ["<h3>Documents drawn at random</h3>", f'<p class="read">{html.escape(source["decoder"])}</p>']
    for row in source["document_samples"]:
        scores = "".join(
            f"; {name} {told['score']:.4g}, above about {told['above']:.0%} of the documents"
            for name, told in row["scores"].items()
        )
        place = f"{row['shard']} document {row['document']:,}, {row['tokens']:,} tokens{scores}"
        text = f"{row['text']} ..." if row["cut"] else row["text"]
        parts.append(f'<p class="place">{html.escape(place)}</p><pre>{html.escape(text)}</pre>')
    return "\n".join(parts)
