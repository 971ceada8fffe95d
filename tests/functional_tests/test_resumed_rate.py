"""A run that is resumed with another rate trains with the one that it was told to go on with."""

from pathlib import Path

import pytest

from tests.functional_tests.training_run import Finished, train_well, write_corpus


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [(), ("--use-distributed-optimizer", "--fp16", "--initial-loss-scale", "64")])
def test_a_resumed_run_trains_with_the_rate_that_it_was_told(tmp_path: Path, optimizer: tuple[str, ...]) -> None:
    plan = write_corpus(tmp_path)
    lines = [line for line in plan.read_text().splitlines() if "lr:" not in line]
    plan.write_text("\n".join(lines))
    flags = ("--plan", str(plan), "--lr-decay-style", "constant", *optimizer)
    begun = train_well(tmp_path, *flags, "--lr", "1e-3", "--save", "s", "--save-interval", "3", "--exit-interval", "3")
    assert begun.logged("learning-rate")[3] == pytest.approx(1e-3)
    for asked, rate in (("override", 5e-4), ("use-checkpoint", 1e-3)):
        more = ("--lr", "5e-4", "--load", "s", f"--{asked}-opt_param-scheduler", "--tensorboard-dir", asked)
        train_well(tmp_path, *flags, *more)
        events = Finished(0, "", tmp_path / asked)
        assert events.logged("learning-rate") == pytest.approx(dict.fromkeys((4, 5, 6), rate))
