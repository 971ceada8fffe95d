import re
from pathlib import Path

import pytest
import yaml
from bpe import END_OF_TEXT, train_tokenizer
from pipeline import remove_output
from settings import FULL, QUICK, planned_text
from training_log import parse_line, read_training_log, scale_changes
from transformers import AutoTokenizer

from megatron_kaiyuan.data.plan_schema import parse_plan_spec

PLAN = Path(__file__).parents[3] / "examples" / "demo" / "plan.yaml"
LINE = (
    " [2026-01-01 00:00:00.000000] iteration {iteration:8d}/      40 | consumed samples: {samples:12d} | elapsed time "
    "per iteration (ms): 88.0 | learning rate: 2.000000E-03 | global batch size:     4 |{loss} loss scale: {scale:.1f} "
    "| grad norm: 1.085 | number of skipped iterations: {skipped:3d} | number of nan iterations:   0 |"
)


def line(iteration: int, scale: float, *, skipped: bool = False) -> str:
    loss = "" if skipped else " lm loss: 6.971000E+00 |"
    return LINE.format(iteration=iteration, samples=4 * iteration, scale=scale, loss=loss, skipped=int(skipped))


def test_a_line_of_the_training_log_is_read_whole() -> None:
    step = parse_line(line(4, 262144.0))
    assert step is not None
    assert (step.iteration, step.of, step.loss, step.loss_scale, step.skipped) == (4, 40, 6.971, 262144.0, False)
    assert (step.milliseconds, step.learning_rate) == (88.0, 2e-3)


def test_a_skipped_step_has_no_loss() -> None:
    step = parse_line(line(4, 262144.0, skipped=True))
    assert step is not None
    assert step.skipped
    assert step.loss is None


def test_other_lines_are_no_steps() -> None:
    assert parse_line("saving checkpoint at iteration       4 to runs/demo in torch_dist format") is None


def test_the_scale_history_names_each_change_and_counts_repeated_steps_once(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    lines = [line(1, 1024.0), line(2, 512.0), line(3, 512.0), line(2, 1024.0), line(3, 512.0), line(4, 1024.0)]
    log.write_text("\n".join(["some text", *lines]))
    changes = [(change.iteration, change.scale) for change in scale_changes(read_training_log(log))]
    assert changes == [(1, 1024.0), (3, 512.0), (4, 1024.0)]


def test_the_tokenizer_keeps_every_text_and_ends_documents(tmp_path: Path) -> None:
    text = "def f(x):\n    return 'é'  # naïve\t\n"
    size = train_tokenizer(iter([text] * 20), tmp_path, 300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert size == len(tokenizer) <= 300
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.encode(END_OF_TEXT) == [tokenizer.eos_token_id]


def test_the_full_demo_trains_on_the_committed_plan_word_for_word() -> None:
    assert planned_text(PLAN, FULL, Path("runs/demo")) == PLAN.read_text()


def test_the_committed_plan_has_the_three_phases_the_demo_promises() -> None:
    phases = parse_plan_spec(yaml.safe_load(PLAN.read_text())).phases
    assert [phase.order for phase in phases] == ["shuffled", "curriculum", "curriculum"]
    assert all(source.repeat > 1 for source in phases[2].sources.values())
    assert phases[2].lr is not None
    assert phases[2].lr.end < phases[2].lr.start
    assert all(phase.tokens is not None and phase.tokens % (256 * FULL.global_batch) == 0 for phase in phases)


def test_the_quick_plan_has_the_same_phases_with_smaller_budgets() -> None:
    full = yaml.safe_load(PLAN.read_text())
    quick = yaml.safe_load(planned_text(PLAN, QUICK, Path("elsewhere")))
    parse_plan_spec(quick)
    for one, other in zip(full["phases"], quick["phases"], strict=True):
        assert one["tokens"] == 32 * other["tokens"]
        assert one["sources"] == other["sources"]
    assert not re.search("runs/demo", yaml.safe_dump(quick))


def test_a_folder_that_no_demo_wrote_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(SystemExit, match="left alone"):
        remove_output(tmp_path)
    assert (tmp_path / "precious").exists()
