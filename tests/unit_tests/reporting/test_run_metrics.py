"""Reading a run back: what counts, what is refused, what is remarked on."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kaiyuan.errors import MetricsError
from megatron_kaiyuan.model.numerics import FP16_MAX as FP16_MAX_OF_THE_METER
from megatron_kaiyuan.monitoring.metrics_file import append_metrics, read_metrics
from megatron_kaiyuan.reporting.run_metrics import FP16_MAX, read_run, read_runs
from megatron_kaiyuan.reporting.run_summary import format_duration, format_times, summarize
from tests.unit_tests.reporting.run_files import SEQ_LENGTH, entry, write_run


def test_a_run_is_read_from_its_folder_or_from_the_file(tmp_path):
    folder = write_run(tmp_path / "run", [entry(1), entry(2)])
    assert read_run(folder).lines == read_run(folder / "metrics.jsonl").lines
    assert read_run(folder).name == "run"


@pytest.mark.parametrize(
    ("lines", "message"),
    [(None, "no metrics.jsonl in"), ([], "is empty"), (['{"iterat', "[1]"], "no readable line (of 2)")],
)
def test_a_run_without_lines_is_refused_with_the_remedy(tmp_path, lines, message):
    if lines is not None:
        write_run(tmp_path, lines)
    with pytest.raises(MetricsError) as caught:
        read_run(tmp_path)
    assert message in str(caught.value)
    assert "--kaiyuan-metrics" in str(caught.value) or "--log-interval" in str(caught.value)


@pytest.mark.parametrize(
    "broken",
    [
        {"consumed_samples": None},
        {"sources": {"web": {"loss": 1.0, "tokens": 3, "bands": [1, 2]}}},
        {"sources": [1]},
        {"grad_norm": "large"},
    ],
)
def test_a_line_that_training_does_not_write_is_refused_by_its_step(tmp_path, broken):
    write_run(tmp_path, [entry(1), entry(2, **broken)])
    with pytest.raises(MetricsError, match="the line of step 2"):
        read_run(tmp_path)


def test_the_same_run_twice_is_refused(tmp_path):
    write_run(tmp_path, [entry(1)])
    with pytest.raises(MetricsError, match="named twice"):
        read_runs([tmp_path, tmp_path / "metrics.jsonl"])


def test_runs_in_folders_of_one_name_are_told_apart_by_their_parents(tmp_path):
    folders = [write_run(tmp_path / name / "save", [entry(1)]) for name in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/save", "b/save"]


def test_torn_lines_and_repeated_steps_are_counted_and_left_out(tmp_path):
    again = entry(2) | {"learning_rate": 0.5}
    write_run(tmp_path, [entry(1), entry(2), entry(3), '{"iteration": 4, "cons', again, entry(3)])
    run = read_run(tmp_path)
    assert [line.iteration for line in run.lines] == [1, 2, 3]
    assert run.lines[1].learning_rate == 0.5
    assert run.torn_lines == 1
    assert run.restarts == ((2, 3),)
    assert "steps 2 to 3 were trained again" in " ".join(summarize(run)["remarks"])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_of_repeated_steps_the_last_ones_stay(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("runs") / "metrics.jsonl"
    for place, step in enumerate(steps):
        append_metrics(path, {"iteration": step, "place": place})
    # a line stays if no later line has its step or one before it
    expected = [place for place, step in enumerate(steps) if all(later > step for later in steps[place + 1 :])]
    assert [line["place"] for line in read_metrics(path)] == expected


def test_the_loss_of_a_line_is_the_mean_over_its_tokens(tmp_path):
    sources = {
        "a": {"loss": 1.0, "tokens": 30, "bands": [0] * 10},
        "b": {"loss": 4.0, "tokens": 10, "bands": [0] * 10},
    }
    write_run(tmp_path, [entry(1, sources=sources, loss=9.0), entry(2, sources={}, loss=9.0)])
    assert [line.loss for line in read_run(tmp_path).lines] == [1.75, 9.0]


def test_what_is_not_finite_becomes_none_and_is_remarked_on(tmp_path):
    sources = entry(2)["sources"] | {"plain": {"loss": None, "tokens": 8, "bands": [0] * 10}}
    peaks = {"embedding": 1.0, "decoder.layers.0": None}
    lines = [entry(1), entry(2, sources=sources, activations=peaks), entry(3, sources={}, loss=math.nan)]
    run = read_run(write_run(tmp_path, lines))
    told = summarize(run)
    assert [line.loss is None for line in run.lines] == [False, True, True]
    assert run.lines[1].headroom == 0.0
    assert told["lines_without_finite_loss"] == 2
    assert (told["smallest_headroom"], told["smallest_headroom_step"]) == (0.0, 2)
    assert "first in decoder.layers.0 at step 2" in " ".join(told["remarks"])
    json.dumps(told, allow_nan=False)


def test_the_headline_adds_up(tmp_path):
    peaks = {"embedding": 2.0, "decoder.layers.0": 16.0, "output_layer": 4.0}
    lines = [entry(1, skipped_steps=2), entry(2, activations=peaks), entry(3, seconds=0.25)]
    told = summarize(read_run(write_run(tmp_path, lines)))
    assert told["tokens"] == 3 * 8 * SEQ_LENGTH
    assert told["skipped_steps"] == 2
    assert told["tokens_per_second"] == 8 * SEQ_LENGTH / 0.5
    assert told["smallest_headroom"] == FP16_MAX / 16
    assert told["sources"]["scored"]["bands"] == [0] * 9 + [3 * 4 * SEQ_LENGTH]
    assert told["sources"]["plain"]["bands"] is None
    assert told["remarks"] == []


def test_tokens_that_no_line_counts_are_remarked_on(tmp_path):
    """A checkpoint of step 3, lines every 2 steps: the resumed run's first line counts step 4 alone."""
    lines = [entry(2, every=2), entry(4, every=1), entry(6, every=2)]
    run = read_run(write_run(tmp_path, lines))
    assert run.seq_length == SEQ_LENGTH
    assert run.tokens_at(run.lines[-1]) == 6 * 8 * SEQ_LENGTH
    assert any(remark.startswith("256 tokens are in no line") for remark in summarize(run)["remarks"])


def test_a_run_without_a_plan_has_no_sources_and_says_so(tmp_path):
    told = summarize(read_run(write_run(tmp_path, [entry(1, sources={}), entry(2, sources={})])))
    assert told["sources"] == {}
    assert told["loss"] == entry(2)["loss"]
    assert "without --plan" in told["remarks"][0]


def test_the_limit_of_fp16_is_that_of_the_meter():
    assert FP16_MAX == FP16_MAX_OF_THE_METER


@pytest.mark.parametrize(("ratio", "text"), [(4718.2, "4,720 x"), (31.24, "31.2 x"), (0.5, "0.500 x"), (0, "overflow")])
def test_ratios_have_three_digits(ratio, text):
    assert format_times(ratio) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (600, "10 min"), (5400, "1.5 h"), (86400, "24.0 h"), (5 * 86400, "5.0 days")]
)
def test_durations_are_told_in_the_unit_that_fits(seconds, text):
    assert format_duration(seconds) == text
