"""The texts of a release, from its facts: model card with the Hub's YAML, data card, how to make the model again."""

import functools
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_kaiyuan.host.terminal import visible
from megatron_kaiyuan.reporting.plan_table import format_tokens, times_shown
from megatron_kaiyuan.reporting.run_summary import format_duration, format_times

__all__ = ["CARDS", "hub_metadata", "render_cards"]

CARDS = {"README.md": "model_card.md", "DATA.md": "data_card.md", "reproduce.md": "reproduce.md"}
"""Files of a release, and the template of each."""

_LICENCES_OF_THE_HUB = frozenset(
    {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "odc-by", "openrail"}
)
"""Those that we know the Hub to name; another one is `other` with its name beside."""
_DATASET = re.compile(r"(?:https://huggingface\.co/datasets/)?([\w.-]+/[\w.-]+)/?")


def hub_metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the YAML head of a model card, by the Hub's names, without what is not known."""
    licence = facts["licence"]
    known = licence in _LICENCES_OF_THE_HUB
    datasets = [found[1] for source in facts["sources"].values() if (found := _dataset(source["origin"]))]
    results = [result for row in facts["evaluation"] if row["folder"] == "." for result in _results(row)]
    return {
        **({} if licence is None else {"license": licence if known else "other"}),
        **({} if licence is None or known else {"license_name": licence, "license_link": "LICENSE"}),
        **({"language": facts["languages"]} if facts["languages"] else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pretrained", "megatron-kaiyuan", facts["layout"]["name"]],
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
        **({"model-index": [{"name": facts["name"], "results": results}]} if results else {}),
    }


def _dataset(origin: str | None) -> re.Match[str] | None:
    return None if origin is None else _DATASET.fullmatch(origin)


def _results(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Evaluation results as the Hub has them: tasks, and bits per byte on held-out documents."""
    found = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": name, "name": name},
            "metrics": [{"type": score, "value": value, "name": score} for score, value in told["scores"].items()],
        }
        for name, told in row.get("tasks", {}).items()
    ]
    for name, told in row["sources"].items():
        if told["bits_per_byte"] is not None:
            metric = {"type": "bits_per_byte", "value": told["bits_per_byte"], "name": "bits per byte"}
            dataset = {"type": f"held-out-{name}", "name": f"{name}, held-out documents"}
            found.append({"task": {"type": "text-generation"}, "dataset": dataset, "metrics": [metric]})
    return found


def render_cards(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of a release by the names of their files."""
    head = yaml.safe_dump(hub_metadata(facts), sort_keys=False, allow_unicode=True)
    return {
        file: _templates().get_template(template).render(facts=facts, head=head) for file, template in CARDS.items()
    }


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("megatron_kaiyuan.release"),
        autoescape=False,  # Markdown; `cell` keeps the names of others from ending a cell
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cell": _cell,
        "shell": lambda words: shlex.join(words) if isinstance(words, list) else shlex.quote(str(words)),
        "duration": lambda seconds: "unknown" if seconds is None else format_duration(seconds),
        "times": format_times,
        "tokens": lambda count: "unknown" if count is None else format_tokens(count),
        "shown": times_shown,
    }
    return environment


def _cell(value: object) -> str:
    """Return a value for a table or a line of Markdown, `unknown` for None."""
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "none"
    text = visible(str(value)).replace("\n", " ")
    return re.sub(r"([|<>`\\])", r"\\\1", text)
