"""A score made of several, of values and of ranks, against hand numbers and the definition of a rank."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kaiyuan.commands import rank
from megatron_kaiyuan.data import CurriculumDataset, Plan, open_source
from megatron_kaiyuan.errors import ScoreError
from megatron_kaiyuan.shards.score_mix import ScoreMix, parse_mix, quantile_ranks, write_mix
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_source

EDU = [5.0, 1.0, 3.0, 3.0, 9.0, 0.0]
DCLM = [0.1, 0.9, 0.5, 0.2, 0.3, 0.4]


@pytest.fixture
def shards(tmp_path):
    folder = write_source(tmp_path / "s", numbered_documents([2] * 6), cuts=(4,))["shards"]
    for name, scores in (("edu", EDU), ("dclm", DCLM)):
        np.save(f"{folder}/part-000.scores.{name}.npy", np.float32(scores[:4]))
        np.save(f"{folder}/part-001.scores.{name}.npy", np.float32(scores[4:]))
    return folder


def test_a_sum_is_read_with_its_weights():
    assert parse_mix("0.7*edu + 0.3*dclm") == ScoreMix(((0.7, "edu"), (0.3, "dclm")))
    assert parse_mix("edu-score - .5 * long") == ScoreMix(((1.0, "edu-score"), (-0.5, "long")))
    assert parse_mix("2*a+b") == ScoreMix(((2.0, "a"), (1.0, "b")))
    for wrong in ("0.7*", "edu dclm", "+", "edu + edu", "0*edu", "2**edu"):
        with pytest.raises(ScoreError, match="--score"):
            parse_mix(wrong)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_ranks_are_the_share_of_others_below_and_half_of_those_that_are_equal(scores):
    expected = [
        (sum(other < own for other in scores) + (sum(other == own for other in scores) - 1) / 2)
        / max(len(scores) - 1, 1)
        for own in scores
    ]
    assert quantile_ranks(np.float64(scores)).tolist() == pytest.approx(expected)


def test_values_and_ranks_are_summed_document_by_document(shards):
    source = open_source("s", shards)
    write_mix(source, parse_mix("0.5*edu + 10*dclm"), "values", of_ranks=False)
    assert source.load_scores("values").tolist() == pytest.approx([3.5, 9.5, 6.5, 3.5, 7.5, 4.0])
    write_mix(source, parse_mix("edu + dclm"), "ranks", of_ranks=True)
    expected = [(4 + 0) / 5, (1 + 5) / 5, (2.5 + 4) / 5, (2.5 + 1) / 5, (5 + 2) / 5, (0 + 3) / 5]
    assert source.load_scores("ranks").tolist() == pytest.approx(expected)
    with pytest.raises(ScoreError, match="--as edu: the sum would replace one of its own scores"):
        write_mix(source, parse_mix("edu + dclm"), "edu", of_ranks=True)


def test_the_command_stores_and_ranks_a_sum_and_a_plan_reads_it(shards, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rank_data.py", shards, "--score", "edu + dclm", "--as", "quality"])
    rank.main()
    assert "6 documents" in capsys.readouterr().out
    source = {"shards": shards, "score": "quality"}
    order = CurriculumDataset(
        Plan.from_spec(plan_of({"s": source}, phase_of("curriculum", {"s": "all"}), seq_length=2))
    )
    shown = [int(order[sample]["tokens"][-1]) // 2 for sample in range(len(order))]
    assert shown == [3, 0, 1, 2, 4], "document 5 is the lowest, and its first token nobody predicts"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--score", "edu + dclm"], "is a sum: name it with --as NAME"),
        (["--score", "edu", "--as", "x"], "are of a sum, and --score edu is none"),
        (["--score", "edu", "--combine", "values"], "are of a sum"),
        (["--score", "edu + dclm", "--as", "x", "--verify"], "leave out --plan, --scores and --verify"),
    ],
)
def test_a_sum_without_a_name_and_a_name_without_a_sum_are_refused(shards, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["rank_data.py", shards, *options])
    with pytest.raises(SystemExit) as caught:
        rank.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
