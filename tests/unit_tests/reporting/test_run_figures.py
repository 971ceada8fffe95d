"""The numbers behind the plots: smoothing, thinning, expectation, layers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, Plan
from megatron_kaiyuan.errors import MetricsError, PlanError
from megatron_kaiyuan.reporting.run_activations import activation_figure, layer_peaks
from megatron_kaiyuan.reporting.run_curves import colour_of, curves_figure, format_count, smoothed, thinned
from megatron_kaiyuan.reporting.run_expected import (
    check_plan,
    expected_band_tokens,
    expected_tokens,
    load_description,
    phase_marks,
)
from megatron_kaiyuan.reporting.run_metrics import read_run
from tests.unit_tests.data.tiny import write_shard
from tests.unit_tests.reporting.run_files import SEQ_LENGTH, entry, write_run

VALUES = st.lists(st.none() | st.floats(-1e3, 1e3), max_size=60)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    rng = np.random.default_rng(3)
    for name in ("scored", "plain"):
        documents = [[7] * int(rng.integers(20, 60)) for _ in range(300)]
        write_shard(folder / name, documents, rng.random(300).tolist())
    return Plan.from_spec(
        {
            "seq_length": SEQ_LENGTH,
            "sources": {
                "scored": {"shards": str(folder / "scored"), "score": "score"},
                "plain": {"shards": str(folder / "plain")},
            },
            "phases": [
                {"name": "one", "order": "shuffled", "sources": {"scored": "all", "plain": "all"}},
                {
                    "name": "two",
                    "order": "curriculum",
                    "sources": {"scored": {"keep": "top 50%", "repeat": 2.5}, "plain": {"keep": "all"}},
                },
            ],
        }
    )


def test_expected_tokens_are_those_that_the_order_shows(plan):
    """Against a count over every sample: sources to a sample, ascending bands to the windows that cross an edge."""
    description, order = plan.describe(10), CurriculumDataset(plan)
    seen = dict.fromkeys(plan.sources, 0)
    bands = np.zeros(10)
    for sample in range(len(order)):
        source = order.provenance(sample).source
        seen[source] += SEQ_LENGTH
        if source == "scored":
            bands += order.band_tokens(sample)
        if sample % 9:
            continue
        for name, tokens in seen.items():
            assert abs(expected_tokens(description, name, sample + 1) - tokens) <= 2 * SEQ_LENGTH
        start = description["phases"][1]["first_sample"]
        if sample + 1 >= start:  # the first phase is random: its bands fluctuate, here by less than three deviations
            spread = 3 * SEQ_LENGTH * math.sqrt(min(sample + 1, start))
            expected = expected_band_tokens(description, "scored", sample + 1)
            assert np.abs(np.array(expected) - bands).max() <= spread
    assert len(order) == description["samples"]


def test_an_ascending_pass_fills_its_bands_from_below(plan):
    description = plan.describe(10)
    phase = description["phases"][1]
    first, count, repeat = phase["first_sample"], phase["samples"], phase["sources"]["scored"]["repeat"]
    before = np.array(expected_band_tokens(description, "scored", first))
    whole = np.array([band["seen"]["two"] for band in description["sources"]["scored"]["bands"]])

    def shown(passes):
        return np.array(expected_band_tokens(description, "scored", first + round(count * passes / repeat))) - before

    assert shown(0.3)[-1] == 0
    assert shown(0.3)[5] > 0
    slack = 3 * SEQ_LENGTH  # where a pass ends is rounded to a sample here
    assert np.abs(shown(1) - whole / repeat).max() <= slack
    assert np.abs(shown(2) - 2 * whole / repeat).max() <= slack
    assert np.abs(shown(repeat) - whole).max() <= 1e-6


def test_nothing_is_expected_beyond_the_plan(plan):
    description = plan.describe(10)
    last = description["samples"]
    assert expected_tokens(description, "plain", 10 * last) == expected_tokens(description, "plain", last)


def test_phases_are_marked_in_tokens(plan):
    one, two = phase_marks(plan.describe(10))
    assert (one.start, one.stop) == (0, two.start)
    assert two.stop == plan.num_samples * SEQ_LENGTH
    assert phase_marks(None) == []


def test_a_plan_of_another_run_is_refused(plan, tmp_path):
    run = read_run(write_run(tmp_path, [entry(1)]))
    description = plan.describe(10)
    check_plan(run, description)
    with pytest.raises(MetricsError, match="seq_length 64"):
        check_plan(run, description | {"seq_length": 64})
    with pytest.raises(MetricsError, match="no source plain"):
        check_plan(run, description | {"sources": {"scored": {}}})


@pytest.mark.parametrize("text", ["{", "{}", '{"sources": {"a": 3}}', "[]"])
def test_a_json_that_is_no_description_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match="plan_data"):
        load_description(path)


@given(VALUES, st.floats(0.1, 50))
def test_smoothing_keeps_gaps_constants_and_the_range(values, half_life):
    result = smoothed(values, half_life)
    assert [value is None for value in result] == [value is None for value in values]
    known = [value for value in values if value is not None]
    for value in result:
        assert value is None or min(known) - 1e-6 <= value <= max(known) + 1e-6
    assert all(value is None or value == pytest.approx(2.5) for value in smoothed([2.5] * len(values), half_life))


def test_smoothing_halves_the_weight_after_the_half_life():
    assert smoothed([1.0, 0.0], 1)[1] == pytest.approx(1 / 3)  # weights 1/2 and 1, no bias at the start


@given(st.lists(st.none() | st.floats(-1e3, 1e3), min_size=1, max_size=400), st.integers(8, 60))
def test_thinning_keeps_order_extremes_ends_and_gaps(values, most):
    xs, ys = thinned(range(len(values)), values, most)
    assert xs == sorted(set(xs))
    assert [values[x] for x in xs] == ys
    assert (xs[0], xs[-1]) == (0, len(values) - 1)
    assert len(xs) <= most + 2
    known = [value for value in values if value is not None]
    if known:
        kept = [value for value in ys if value is not None]
        assert (min(kept), max(kept)) == (min(known), max(known))
    assert (None in ys) == (None in values)


def test_the_peak_of_a_layer_is_that_of_its_largest_tensor():
    peaks = {
        "embedding": 1.0,
        "decoder.layers.0.mlp.linear_fc1": 9.0,
        "decoder.layers.0": 3.0,
        "decoder.layers.11": 2.0,
    }
    assert layer_peaks(peaks) == {
        "embedding": (1.0, "embedding"),
        "layer 0": (9.0, "decoder.layers.0.mlp.linear_fc1"),
        "layer 11": (2.0, "decoder.layers.11"),
    }


@pytest.mark.parametrize("order", [(None, 3.0), (3.0, None)])
def test_a_tensor_that_is_not_finite_outdoes_every_other(order):
    tensors = dict(zip(("decoder.layers.4.mlp.linear_fc1", "decoder.layers.4"), order, strict=True))
    assert layer_peaks(tensors)["layer 4"][0] is None


def test_the_heat_map_ends_at_the_limit_of_fp16(tmp_path):
    lines = [entry(step, activations={"embedding": 0.0, "decoder.layers.0": 10.0 * step}) for step in (1, 2)]
    figure = activation_figure(read_run(write_run(tmp_path, lines)), [])
    heat = figure.data[0]
    assert heat.zmax == pytest.approx(math.log10(65504))
    assert list(heat.z[1]) == pytest.approx([1.0, math.log10(20)])
    assert list(heat.z[0]) == [None, None]  # no activity at all has no logarithm
    assert "3.28e+03 times below" in heat.customdata[1][1]


def test_a_rise_of_the_branch_scale_is_marked_where_it_happened(tmp_path):
    metered = {"activations": {"decoder.layers.0.mlp.linear_fc2": 9000.0}}
    lines = [entry(step, branch_scale_bits=bits, **metered) for step, bits in ((1, 4), (2, 6), (3, 6), (4, 4))]
    figure = activation_figure(read_run(write_run(tmp_path, lines)), [])
    told = [(note.text, note.x) for note in figure.layout.annotations if "branches" in note.text]
    assert told == [("branches 2^-6", 2 * 8 * SEQ_LENGTH)]


def test_a_rise_before_the_first_line_is_marked_too(tmp_path):
    metered = {"activations": {"decoder.layers.0.mlp.linear_fc2": 9000.0}, "activations_branch_scale_bits": 4}
    lines = [entry(1, branch_scale_bits=7, **metered), entry(2, branch_scale_bits=7)]
    figure = activation_figure(read_run(write_run(tmp_path, lines)), [])
    told = [(note.text, note.x) for note in figure.layout.annotations if "branches" in note.text]
    assert told == [("branches 2^-7", 8 * SEQ_LENGTH)]


def test_a_run_of_one_line_is_drawn_as_points(tmp_path):
    figure = curves_figure([read_run(write_run(tmp_path, [entry(1)]))], [])
    assert all("markers" in trace.mode for trace in figure.data)


def test_skipped_steps_are_marked_on_the_loss_scale(tmp_path):
    run = read_run(write_run(tmp_path, [entry(1), entry(2, skipped_steps=3, loss_scale=1024.0), entry(3)]))
    marks = next(trace for trace in curves_figure([run], []).data if trace.name == "skipped steps")
    assert (list(marks.x), list(marks.y)) == ([2 * 8 * SEQ_LENGTH], [1024.0])
    assert "skipped 3" in marks.customdata[0]


def test_colours_of_forty_sources_are_all_different():
    assert len({colour_of(number) for number in range(40)}) == 40


@pytest.mark.parametrize(("value", "text"), [(2.0**20, "2^20"), (1000.0, "1000"), (1.0, "1"), (0.0, "0")])
def test_loss_scales_are_told_as_powers_of_two(value, text):
    assert format_count(value) == text
