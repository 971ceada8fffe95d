"""The page of a run in a real browser: it draws every figure, offline and without an error of its scripts."""

from pathlib import Path

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.reporting.run_report import report_runs
from tests.browser import drawn, needs_browser, opened
from tests.functional_tests.training_run import train_well, write_corpus
from tests.unit_tests.reporting.run_files import entry, write_run


@needs_browser
def test_a_real_run_is_drawn_with_its_plan(tmp_path: Path) -> None:
    plan = write_corpus(tmp_path)
    flags = ("--fp16", "--initial-loss-scale", str(2**24), "--kaiyuan-activation-interval", "2")
    train_well(tmp_path, "--plan", str(plan), "--save", "saved", "--save-interval", "6", *flags)
    page = tmp_path / "report.html"
    (told,) = report_runs([tmp_path / "saved"], page, plan)
    description = Plan.load(plan).describe()
    assert told["tokens"] == told["planned_tokens"] == description["tokens"]
    assert told["skipped_steps"] > 0
    for name, source in told["sources"].items():
        assert source["tokens"] == description["sources"][name]["tokens_seen"] == source["expected_tokens"]
    curves, held_out, activations, sources, bands = drawn(opened(page, tmp_path / "profile"))
    # two lines for each source and all of them, four quantities, the skipped steps
    assert curves == 2 * 3 + 4 + 1
    assert held_out > 0
    assert activations == 2
    assert sources == 2 * 2
    assert bands == 2 * 10


@needs_browser
def test_runs_that_went_wrong_are_drawn_side_by_side(tmp_path: Path) -> None:
    peaks: dict[str, float | None] = {"embedding": 1.0, "decoder.layers.0": None}
    wrong = [entry(step, loss_scale=2.0**step, skipped_steps=1) for step in range(1, 8)]
    wrong += [entry(8, sources={}, loss=None, grad_norm=None, activations=peaks), '{"iteration": 9, "con', entry(5)]
    runs = [write_run(tmp_path / "wrong", wrong), write_run(tmp_path / "bare", [entry(1, sources={})])]
    report_runs(runs, tmp_path / "report.html")
    counts = drawn(opened(tmp_path / "report.html", tmp_path / "profile"))
    assert len(counts) == 1 + 2 + 1 + 1  # curves, the loss of two sources, what one run was fed, its bands
    assert all(counts)
