"""The texts of a release, from its facts: model card with the Hub's YAML, data card, how to make the model again."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_kaiyuan.release.licences import hub_licence
from megatron_kaiyuan.release.markdown import address, bash, cell, code
from megatron_kaiyuan.release.steps import average_command, preprocess_commands, train_command
from megatron_kaiyuan.reporting.plan_table import format_tokens, times_shown
from megatron_kaiyuan.reporting.run_summary import format_duration, format_times

__all__ = ["CARDS", "hub_metadata", "render_cards"]

CARDS = {"README.md": "model_card.md", "DATA.md": "data_card.md", "reproduce.md": "reproduce.md"}
"""Files of a release, and the template of each."""

_DATASET = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/|hf://datasets/)"
    r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:[/?#@].*)?"
)
"""An address of a dataset on the Hub; `owner/name` alone may as well be a folder."""


def hub_metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the YAML head of a model card, by the Hub's names, without what is not known."""
    datasets = [found for source in facts["sources"].values() if (found := _dataset(source["origin"]))]
    results = [result for row in facts["evaluation"] if row["folder"] == "." for result in _results(row)]
    return {
        **_licence(facts),
        **({"language": facts["languages"]} if facts["languages"] else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pretrained", "megatron-kaiyuan", facts["layout"]["name"]],
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
        **({"model-index": [{"name": facts["name"], "results": results}]} if results else {}),
    }


def _licence(facts: Mapping[str, Any]) -> dict[str, str]:
    """The Hub's name, or `other` with the name and the text of the licence beside."""
    named = facts["licence"]
    if named is None:
        return {}
    if (known := hub_licence(named)) is not None:
        return {"license": known}
    link = {"license_link": "LICENSE"} if facts["has_licence_file"] else {}
    return {"license": "other", "license_name": named, **link}


def _dataset(origin: str | None) -> str | None:
    """The dataset that an origin declares, without branch and file."""
    found = None if origin is None else _DATASET.fullmatch(origin.strip())
    return None if found is None else re.sub(r"/(?:tree|blob|resolve|viewer|raw|discussions)$", "", found[1])


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
    head = yaml.safe_dump(hub_metadata(facts), sort_keys=False, allow_unicode=True, width=1000)
    cards = {
        file: _templates().get_template(template).render(facts=facts, head=head) for file, template in CARDS.items()
    }
    ModelCard(cards["README.md"], ignore_metadata_errors=False)  # raises where the Hub's own reader would
    return cards


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("megatron_kaiyuan.release"),
        autoescape=False,  # Markdown: every value goes through `cell`, `code` or `bash`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "address": address,
        "bash": bash,
        "cell": cell,
        "code": code,
        "duration": lambda seconds: "unknown" if seconds is None else format_duration(seconds),
        "preprocess": preprocess_commands,
        "average": average_command,
        "train": train_command,
        "times": format_times,
        "tokens": lambda count: "unknown" if count is None else format_tokens(count),
        "shown": times_shown,
    }
    return environment
