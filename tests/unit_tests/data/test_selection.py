"""The grammar of selections."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kaiyuan.data.selection import Keep, parse_fraction, parse_keep

EVERY_FORM = {
    "all": Keep("all"),
    "  all ": Keep("all"),
    "all by documents": Keep("all"),
    "all by tokens": Keep("all"),
    "top 30%": Keep("band", Fraction(7, 10), Fraction(1)),
    "top 0.3": Keep("band", Fraction(7, 10), Fraction(1)),
    "top 3/10": Keep("band", Fraction(7, 10), Fraction(1)),
    "top 100%": Keep("band", Fraction(0), Fraction(1)),
    "top 0.1%": Keep("band", Fraction(999, 1000), Fraction(1)),
    "bottom 10%": Keep("band", Fraction(0), Fraction(1, 10)),
    "bottom 10% by tokens": Keep("band", Fraction(0), Fraction(1, 10), "tokens"),
    "band [20%, 40%)": Keep("band", Fraction(1, 5), Fraction(2, 5)),
    "band[20%,40%)": Keep("band", Fraction(1, 5), Fraction(2, 5)),
    "band [ 0.2 , 40% )": Keep("band", Fraction(1, 5), Fraction(2, 5)),
    "band [0, 1) by tokens": Keep("band", Fraction(0), Fraction(1), "tokens"),
    "random 60%": Keep("random", high=Fraction(3, 5)),
    "random 60%  by  tokens": Keep("random", high=Fraction(3, 5), by="tokens"),
    "random 60% by documents": Keep("random", high=Fraction(3, 5)),
}


@pytest.mark.parametrize("text", EVERY_FORM)
def test_every_form_is_understood(text):
    assert parse_keep(text) == EVERY_FORM[text]


@pytest.mark.parametrize("text", EVERY_FORM)
def test_what_is_printed_can_be_read_back(text):
    assert parse_keep(str(parse_keep(text))) == parse_keep(text)


@given(low=st.integers(0, 9999), size=st.integers(1, 10_000), by=st.sampled_from(["documents", "tokens"]))
def test_bands_of_hundredths_of_percents_are_exact_and_printed_without_loss(low, size, by):
    high = min(low + size, 10_000)
    keep = parse_keep(f"band [{low / 100}%, {high / 100}%) by {by}")
    assert (keep.low, keep.high, keep.by) == (Fraction(low, 10_000), Fraction(high, 10_000), by)
    assert parse_keep(str(keep)) == keep


REFUSED = {
    "top 30": "did you mean 30%?",
    "top 130%": "not between 0% and 100%",
    "top -5%": "not between 0% and 100%",
    "top 0%": "leave the source out of the phase",
    "random 0": "leave the source out of the phase",
    "bottom 0.0%": "leave the source out of the phase",
    "top": "not a selection; write all, top 30%",
    "top ten": "not a fraction; write 30% or 0.3",
    "top 1/0": "not a fraction",
    "top nan": "not a fraction",
    "top inf": "not a fraction",
    "best 30%": "not a selection",
    "TOP 30%": "not a selection",
    "": "not a selection",
    "all 30%": "not a selection",
    "top 30% by words": "not a selection",
    "band [40%, 20%)": "lower quantile is not below its upper one",
    "band [40%, 40%)": "lower quantile is not below its upper one",
    "band [20%, 40%]": "not a selection",
    "band (20%, 40%)": "not a selection",
    "band [20, 40)": "did you mean 20%?",
    "band 20%, 40%": "not a selection",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_a_selection_is_refused_with_a_remedy(text):
    with pytest.raises(ValueError) as caught:
        parse_keep(text)
    assert REFUSED[text] in str(caught.value)


def test_only_bands_speak_of_quality():
    assert parse_keep("top 3%").needs_scores
    assert not parse_keep("random 3%").needs_scores
    assert not parse_keep("all").needs_scores


def test_fractions_are_exact():
    assert parse_fraction("0.1") == Fraction(1, 10)
    assert parse_fraction("33.3%") == Fraction(333, 1000)
    assert parse_fraction("1") == 1
