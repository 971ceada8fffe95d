"""Make a smaller plan that predicts a large one: every source thinned evenly, every amount divided."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from megatron_kaiyuan.data.plan_schema import load_plan_spec, parse_plan_spec
from megatron_kaiyuan.data.selection import parse_count, parse_fraction, parse_keep
from megatron_kaiyuan.errors import PlanError
from megatron_kaiyuan.host.atomic import write_text_atomically
from megatron_kaiyuan.host.yaml_file import read_yaml

__all__ = ["proxy_plan", "write_proxy"]


def write_proxy(plan: Path, share: str, output: Path) -> None:
    """Write the proxy of a plan file.

    Raises:
        PlanError: the plan is wrong or cannot be made smaller, or the share is none between 0 and 1.
    """
    try:
        fraction = parse_fraction(share)
    except ValueError as error:
        raise PlanError(f"--proxy {error}") from error
    if not 0 < fraction < 1:
        raise PlanError(f"--proxy {share}: a proxy has a part of the plan; give a share between 0 and 1, such as 1/16")
    load_plan_spec(plan)
    content = proxy_plan(read_yaml(plan), fraction)
    head = f"# {share} of {plan.name}: the same documents in every phase, each seen as often as there\n"
    write_text_atomically(output, head + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120))


def proxy_plan(content: dict[str, Any], share: Fraction) -> dict[str, Any]:
    """Return a plan as data in which every source has this share of its documents, and every amount this share of it.

    Raises:
        PlanError: a plan of version 1, or one with amendments.
    """
    if content.get("version") == 1 or any(phase.get("amended") for phase in content["phases"]):
        raise PlanError(
            "a proxy is made of a plan of version 2 without amendments; write version: 2, and leave them out"
        )
    small = dict(content) | {"version": 2}
    small["sources"] = {
        name: source | {"thin": str(share * parse_fraction(str(source.get("thin", "1"))))}
        for name, source in content["sources"].items()
    }
    small["phases"] = [_phase(phase, share) for phase in content["phases"]]
    if content.get("averaging"):
        averaging = dict(content["averaging"])
        if duration := averaging.pop("duration", None):
            averaging["last"] = duration // averaging["every"] + 1
        small["averaging"] = averaging | {"every": max(1, round(averaging["every"] * share))}
    parse_plan_spec(small, "proxy")
    return small


def _phase(phase: dict[str, Any], share: Fraction) -> dict[str, Any]:
    small = phase | {"sources": {name: _part(part, share) for name, part in phase["sources"].items()}}
    if phase.get("tokens") is not None:
        tokens = phase["tokens"]
        small["tokens"] = max(1, round((parse_count(tokens) if isinstance(tokens, str) else tokens) * share))
    return small


def _part(part: object, share: Fraction) -> object:
    if not isinstance(part, dict):
        return None if part is None else _selection(part, share)
    return {key: _selection(value, share) if key in ("keep", "except") else value for key, value in part.items()}


def _selection(value: object, share: Fraction) -> object:
    """Return a selection with its amounts divided.

    Shares and scores stay.
    """
    if isinstance(value, list):
        return [_selection(one, share) for one in value]
    keep = parse_keep(value)
    return f"{keep.kind} {max(1, round(keep.amount * share))} {keep.by}" if keep.amount else value
