"""A phase of the plan file and what it takes of each source, checked field by field."""

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_kaiyuan.data.plan_fields import (
    REST_OF,
    DrawName,
    Exclusion,
    Rate,
    Repetition,
    Selection,
    Spacing,
    Tokens,
    Weight,
    Weighting,
)
from megatron_kaiyuan.data.selection import Keep

__all__ = ["AmendmentSpec", "AveragingSpec", "LearningRateSpec", "PhaseSourceSpec", "PhaseSpec", "Strict"]

_SPACING = Fraction(1, 20)


class Strict(BaseModel):
    """A part of a plan that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class AveragingSpec(Strict):
    """Which checkpoints the final weights average."""

    last: int = Field(gt=0)
    every: int = Field(gt=0)
    """Training steps between two averaged checkpoints."""
    duration: int | None = Field(default=None, gt=0)
    """Steps from the first averaged checkpoint to the last, instead of `last`."""
    weights: Weighting = "mean"

    @model_validator(mode="before")
    @classmethod
    def _count_of_a_duration(cls, value: object) -> object:
        if not isinstance(value, dict) or value.get("duration") is None:
            return value
        duration, every = value["duration"], value.get("every")
        if "last" in value:
            raise ValueError("last and duration say the same in two ways; leave one of them out")
        if not isinstance(duration, int) or not isinstance(every, int) or every < 1 or duration % every:
            raise ValueError(
                f"duration {duration} is no multiple of every {every}; give whole numbers of steps that are"
            )
        return value | {"last": duration // every + 1}


class PhaseSourceSpec(Strict):
    """What a phase takes from a source."""

    keep: Selection = Keep("all")
    """The selection, such as `top 30%`."""
    but: Exclusion | None = Field(default=None, alias="except")
    """What is taken out of it again, by quality."""
    repeat: Repetition = Fraction(1)
    """Passes over the selection: 2.5 = twice all of it, and once a random half."""
    max_repeat: Repetition | None = None
    """How many passes a token budget larger than the streams may stretch `repeat` to."""
    weight: Weight | None = None
    """Share of the phase's tokens, relative to the other weights; None: the natural size of the stream."""
    fill: Literal["others"] | None = None
    """Who fills the share of a weighted source that has less than it: the others, by weight; None: that is refused."""
    sorted: bool = True
    """In a curriculum: ascending quality (True) or random order (False)."""
    start: Literal["all", "unseen"] = Field(default="all", alias="from")
    """`unseen`: go on with the source where the phases before this one stopped."""
    draw: DrawName | None = None
    """`NAME`: a random part that is the same wherever the name stands; `rest of NAME`: all documents but those."""
    repeat_order: Literal["ranked", "passes"] = "ranked"
    """How an ascending part repeats: band by band in one ascent, or one ascent a pass."""
    repeat_spacing: Spacing | None = None
    """Size of the bands of `ranked`, a share of the selection; None: 5 %."""
    shuffle: Literal["windows", "documents"] = "windows"
    """What comes in random order: packed windows, or also the documents before they are packed, anew in each pass."""
    packing: Literal["flowing", "whole"] = "flowing"
    """Whether documents run on from window to window, or stay whole where they fit, with padding at the ends."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: object) -> object:
        return {"keep": value} if isinstance(value, str | list) else ({} if value is None else value)

    @property
    def rest_of(self) -> str | None:
        """The draw whose other documents these are."""
        return self.draw.removeprefix(REST_OF) if self.draw is not None and self.draw.startswith(REST_OF) else None

    @property
    def drawn_as(self) -> str | None:
        """The name of the draw, whichever of its two parts is meant."""
        return self.rest_of or self.draw

    @property
    def spacing(self) -> Fraction:
        """Bands of a ranked repetition, as a share of the selection."""
        return _SPACING if self.repeat_spacing is None else self.repeat_spacing

    @model_validator(mode="after")
    def _draw_is_random(self) -> "PhaseSourceSpec":
        if self.rest_of is not None and self.keep.kind != "all":
            raise ValueError(f"draw {self.draw} names its documents already; leave out keep {self.keep}")
        if self.draw is not None and self.rest_of is None and self.keep.kind != "random":
            raise ValueError(
                f"draw {self.draw} names a random part, and keep is {self.keep}; write keep: random 30%, or leave "
                "out draw"
            )
        return self

    @property
    def kept(self) -> str:
        """What is kept, in the words of the plan."""
        if self.start == "unseen":
            return "what is unseen"
        kept = self.draw if self.draw is not None and self.rest_of else str(self.keep)
        return kept if self.but is None else f"{kept} except {self.but}"

    @property
    def needs_scores(self) -> bool:
        """Whether what is kept depends on quality."""
        return self.keep.needs_scores or self.but is not None

    @model_validator(mode="after")
    def _spacing_is_of_a_ranked_repetition(self) -> "PhaseSourceSpec":
        if self.repeat_spacing is not None and self.repeat_order == "passes":
            raise ValueError("repeat_spacing is of repeat_order: ranked; leave it out with repeat_order: passes")
        return self

    @model_validator(mode="after")
    def _limit_is_no_less(self) -> "PhaseSourceSpec":
        if self.max_repeat is not None and self.max_repeat < self.repeat:
            raise ValueError(
                f"max_repeat {float(self.max_repeat):.4g} is below repeat {float(self.repeat):.4g}; lower repeat, "
                "which is how often the source is shown, or raise max_repeat, to which a larger budget may stretch it"
            )
        return self


class LearningRateSpec(Strict):
    """The learning rate over a phase."""

    start: Rate
    end: Rate
    shape: Literal["constant", "linear", "cosine", "sqrt", "warmup"] = "constant"
    jump: bool = False
    """Whether the rate may begin elsewhere than where the phase before ended; without the word that is a mistake."""

    @model_validator(mode="after")
    def _constant_is_constant(self) -> "LearningRateSpec":
        if self.shape == "constant" and self.start != self.end:
            raise ValueError(
                f"shape constant with start {self.start} and end {self.end}; make them equal or name a shape"
            )
        return self


class AmendmentSpec(Strict):
    """Another length of a curriculum that has begun."""

    at: int = Field(gt=0, strict=True)
    """Samples that the run had consumed."""
    tokens: Tokens
    """Of the whole phase, from then on."""


class PhaseSpec(Strict):
    """One stretch of training with a fixed mix and order."""

    name: str = Field(min_length=1)
    order: Literal["shuffled", "curriculum"]
    tokens: Tokens | None = None
    """Predicted tokens of the phase; None: all that the selections amount to."""
    seq_length: Annotated[int, Field(gt=0, strict=True)] | None = None
    """Predicted tokens of a window; None: that of the plan. A multiple of it."""
    lr: LearningRateSpec | None = None
    amended: list[AmendmentSpec] = Field(default_factory=list)
    """Lengths that it got after it had begun, in turn."""
    sources: dict[str, PhaseSourceSpec] = Field(min_length=1)

    @model_validator(mode="after")
    def _only_curricula_are_amended(self) -> "PhaseSpec":
        if self.amended and self.order != "curriculum":
            raise ValueError("amended is for a curriculum that has begun; a shuffled phase just gets other tokens")
        if self.amended and any(part.fill is not None for part in self.sources.values()):
            raise ValueError("amended and fill: others do not go together: the mix depends on the whole length")
        if self.amended and self.seq_length is not None:
            raise ValueError(
                "amended is for phases with the plan's seq_length; keep this one as long as it is, and add a phase"
            )
        return self

    @model_validator(mode="after")
    def _weights_go_together(self) -> "PhaseSpec":
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            other = next(name for name in self.sources if name not in weighted)
            raise ValueError(
                f"{weighted[0]} has a weight and {other} has none; give every source of the phase a weight, or none"
            )
        if weighted and self.tokens is None:
            raise ValueError("weights need a token budget; add tokens: to the phase")
        filled = [name for name, source in self.sources.items() if source.fill is not None]
        if filled and not weighted:
            raise ValueError(f"{filled[0]} has fill and no weight, so it has no share to hand on; give it a weight")
        if filled and len(filled) == len(self.sources):
            raise ValueError("every source has fill: others, so nobody is left to fill; leave it out of one")
        return self
