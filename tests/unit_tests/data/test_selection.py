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
    "score >= 3": Keep("score", at_least=(3.0, True)),
    "score>-.5": Keep("score", at_least=(-0.5, False)),
    "score <= 1e-3": Keep("score", at_most=(0.001, True)),
    "score < 4": Keep("score", at_most=(4.0, False)),
    "3 <= score < 5": Keep("score", at_least=(3.0, True), at_most=(5.0, False)),
    "0.1<score<=0.2": Keep("score", at_least=(0.1, False), at_most=(0.2, True)),
    "top 10B tokens": Keep("top", by="tokens", amount=10**10),
    "bottom 2M documents": Keep("bottom", amount=2 * 10**6),
    "random 1_500 documents": Keep("random", amount=1500),
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
    "score > high": "not a selection",
    "score == 3": "not a selection",
    "5 <= score < 3": "is empty: its lower score is not below its upper one",
    "3 < score <= 3": "is empty",
    "top 10% tokens": "a share and an amount at once; write top 30%, or top 10B tokens",
    "top 0 documents": "keeps nothing",
    "top 1.5 documents": "not a whole number",
    "top 1e12 tokens": "1e12 is 1T",
    "bottom 2M": "is not a fraction",
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


def test_a_list_joins_parts_by_quality_and_is_printed_as_it_is_read():
    keep = parse_keep(["top 10%", "band [40%, 60%)"])
    assert (keep.kind, keep.parts) == ("list", (parse_keep("top 10%"), parse_keep("band [40%, 60%)")))
    assert (str(keep), keep.needs_scores) == ("[top 10%, band [40%, 60%)]", True)
    assert parse_keep(["score >= 3"]) == parse_keep("score >= 3")
    for wrong, message in (([], "an empty list"), (["top 1%", "random 3%"], "random 3% is none; write it alone")):
        with pytest.raises(ValueError, match=message):
            parse_keep(wrong)
