"""What a single field of a plan may hold: numbers with units, shares, names of files."""

from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from megatron_kaiyuan.data.learning_rate import averaging_weights
from megatron_kaiyuan.data.selection import Keep, exact_number, parse_count, parse_fraction, parse_keep
from megatron_kaiyuan.shards.score_files import check_score_name

__all__ = [
    "MOST_PASSES",
    "REST_OF",
    "DrawName",
    "Exclusion",
    "IndexPath",
    "Rate",
    "Repetition",
    "ScoreName",
    "Selection",
    "Shards",
    "Share",
    "Spacing",
    "Tokens",
    "Weight",
    "Weighting",
]

REST_OF = "rest of "
"""What stands before the name of a draw where its other documents are meant."""

MOST_PASSES = 1_000_000
"""Of a source in a phase."""
_NAME_SHARDS = "name a prefix, a directory or a glob (. is the working directory), or a list of them"


def _parse_tokens(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("true and false are not a number of tokens; write 120B, 1.5T, 300M or 120_000_000")
    if not isinstance(value, str):
        return value
    return parse_count(value)


def _parse_ratio(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number")
    try:
        return exact_number(str(value))
    except OverflowError as error:
        raise ValueError(f"too large or too small: {error}") from error
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{value!r} is not a number") from error


def _parse_weight(value: object) -> object:
    if isinstance(value, str) and value.strip().endswith("%"):
        bare = value.strip().removesuffix("%")
        raise ValueError(f"{value!r}: weights are relative to each other, not shares; write {bare} for all as percents")
    return value


def _parse_selection(value: object) -> Keep:
    return parse_keep(value)


def _parse_share(value: object) -> object:
    if isinstance(value, Fraction):
        return value
    if isinstance(value, bool):
        raise ValueError("true and false are not a share; write 30% or 0.3")
    return parse_fraction(str(value).strip())


def _positive(value: Fraction) -> Fraction:
    if value <= 0:
        raise ValueError(f"must be above 0, got {float(value)}; leave the source out of the phase to skip it")
    return value


def _by_quality(value: Keep) -> Keep:
    if not value.needs_scores:
        raise ValueError(f"except takes out a part by quality, such as top 1%, and {value} is none")
    return value


def _some(value: Fraction) -> Fraction:
    if value == 0:
        raise ValueError("a share of 0 is no part of the selection; give one above 0, such as 5%")
    return value


def _check_weights(value: str) -> str:
    try:
        averaging_weights(value, 1)
    except ValueError as error:
        raise ValueError(
            f"{error}; write mean, wma, ema:ALPHA with 0 < ALPHA <= 1, or {{as_decay: linear}}, cosine or sqrt"
        ) from error
    return value


def _as_decay(value: object) -> object:
    if not isinstance(value, dict):
        return value
    if set(value) != {"as_decay"}:
        raise ValueError(f"{value!r} is not a weighting; write {{as_decay: linear}}, cosine or sqrt")
    return f"decay:{value['as_decay']}"


def _few_passes(value: Fraction) -> Fraction:
    if value > MOST_PASSES:
        raise ValueError(f"more than {MOST_PASSES:,} passes; give fewer")
    return value


def _parse_shards(value: object) -> object:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError(f"an empty list; {_NAME_SHARDS}")
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"{item!r} is not a path; {_NAME_SHARDS}")
        if not item.strip():
            raise ValueError(f"empty; {_NAME_SHARDS}")
        if "\0" in item:
            raise ValueError(f"{item!r}: a path has no zero byte; {_NAME_SHARDS}")
    return value


def _check_index_path(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError("empty; leave rank_index: out where the index lies beside the shards")
    return value


def _check_draw(value: str) -> str:
    name = " ".join(value.split())
    if not name.removeprefix(REST_OF.strip()).strip():
        raise ValueError(f"{value!r} names no draw; write draw: NAME, or draw: rest of NAME for its other documents")
    return name


def _check_score(value: str) -> str:
    if not value:
        raise ValueError("empty; leave score: out where a source has no scores")
    return check_score_name(value)


Tokens = Annotated[int, BeforeValidator(_parse_tokens), Field(gt=0, lt=1 << 62)]
Ratio = Annotated[Fraction, BeforeValidator(_parse_ratio), AfterValidator(_positive)]
Repetition = Annotated[Ratio, AfterValidator(_few_passes)]
Weight = Annotated[Ratio, BeforeValidator(_parse_weight)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[Fraction, BeforeValidator(_parse_share)]
Spacing = Annotated[Share, AfterValidator(_some)]
Selection = Annotated[Keep, BeforeValidator(_parse_selection)]
Exclusion = Annotated[Selection, AfterValidator(_by_quality)]
Weighting = Annotated[str, BeforeValidator(_as_decay), AfterValidator(_check_weights)]
Shards = Annotated[str | list[str], BeforeValidator(_parse_shards)]
DrawName = Annotated[str, AfterValidator(_check_draw)]
ScoreName = Annotated[str, AfterValidator(_check_score)]
IndexPath = Annotated[str, AfterValidator(_check_index_path)]
