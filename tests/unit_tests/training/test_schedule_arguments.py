"""The flags of the rate: refused beside a plan's own, turned from steps into samples, and decided on at a resume."""

import argparse
import copy
from collections.abc import Iterator

import pytest
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.training import global_vars
from megatron.training.arguments import parse_args

from megatron_kaiyuan.arguments import arguments_provider
from megatron_kaiyuan.errors import ConfigError, ResumeError
from megatron_kaiyuan.training.parsing import known_flags
from megatron_kaiyuan.training.schedule_arguments import (
    build_schedule,
    check_rates_of_plan,
    continue_schedule,
    steps_in_samples,
)
from tests.unit_tests.training.test_scheduler import FLAT, fake_plan


@pytest.fixture(autouse=True)
def _as_megatron_leaves_them(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", argparse.Namespace())
    patched = (MegatronOptimizer, "_filter_and_reorder_param_groups"), (DistributedOptimizer, "load_state_dict")
    originals = [vars(owner)[name] for owner, name in patched]
    yield
    for (owner, name), original in zip(patched, originals, strict=True):
        setattr(owner, name, original)


def given(monkeypatch: pytest.MonkeyPatch, words: str) -> argparse.Namespace:
    monkeypatch.setattr("sys.argv", ["pretrain", "--plan", "p", *words.split()])
    args: argparse.Namespace = parse_args(arguments_provider({}))
    return args


def run(monkeypatch: pytest.MonkeyPatch, words: str) -> argparse.Namespace:
    """Arguments of a run over 80 samples in steps of 8, as validation leaves them."""
    args = given(monkeypatch, f"--global-batch-size 8 --train-samples 80 --load folder {words}")
    args.start_weight_decay = args.end_weight_decay = args.weight_decay
    return args


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lr 1e-3", "^--lr 0.001: the phases of the plan give the learning rate"),
        ("--min-lr 1e-5 --lr-decay-style cosine", "^--min-lr 1e-05, --lr-decay-style cosine: "),
        ("--lr-warmup-iters 9 --lr-decay-iters 90", "^--lr-warmup-iters 9, --lr-decay-iters 90: "),
        ("--lr-wsd-decay-iters 9", "^--lr-wsd-decay-iters 9: "),
        ("--lr-warmup-fraction 0.1", "^--lr-warmup-fraction 0.1: .*take lr out of the plan$"),
        ("--override-opt_param-scheduler", "^--override-opt_param-scheduler: "),
    ],
)
def test_a_schedule_beside_the_rates_of_a_plan_is_refused(
    monkeypatch: pytest.MonkeyPatch, words: str, told: str
) -> None:
    args = given(monkeypatch, words)
    with pytest.raises(ConfigError, match=told):
        check_rates_of_plan(args, fake_plan(FLAT), known_flags())
    check_rates_of_plan(args, fake_plan(None), known_flags())


def test_the_rate_of_some_groups_may_differ_from_that_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    args = given(monkeypatch, "--lr 1e-3 --decoupled-lr 5e-4")
    check_rates_of_plan(args, fake_plan(FLAT), known_flags())


def test_steps_become_the_samples_that_megatron_would_make_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = "--lr 1 --lr-decay-style WSD --lr-warmup-iters 2 --lr-decay-iters 9 --lr-wsd-decay-iters 3"
    args = run(monkeypatch, steps)
    args.__dict__.update(steps_in_samples(args, known_flags()))
    assert (args.lr_warmup_iters, args.lr_decay_iters, args.lr_wsd_decay_iters) == (0, None, None)
    counted_in_steps = run(monkeypatch, steps)
    counted_in_steps.train_samples, counted_in_steps.train_iters = None, 10
    ours, theirs = build_schedule(args), build_schedule(counted_in_steps)
    assert (ours.lr_warmup_steps, ours.lr_decay_steps, ours.wsd_decay_steps) == (16, 72, 24)
    assert {name: value for name, value in vars(ours).items() if name != "optimizer"} == {
        name: value for name, value in vars(theirs).items() if name != "optimizer"
    }


def test_steps_stay_steps_where_the_run_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    args = given(monkeypatch, "--global-batch-size 8 --train-iters 10 --lr-warmup-iters 2")
    assert steps_in_samples(args, known_flags()) == {}
    assert steps_in_samples(given(monkeypatch, "--lr-warmup-samples 16"), known_flags()) == {}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--step-batch-size-schedule 0:8", "^--lr-warmup-iters 2: .*of several sizes; use --lr-warmup-samples$"),
        ("", "^--lr-warmup-iters 2: .* need --global-batch-size; use --lr-warmup-samples$"),
        ("--global-batch-size 8 --lr-warmup-samples 9", "^--lr-warmup-iters 2: given in samples too"),
    ],
)
def test_steps_of_an_unknown_size_are_refused(monkeypatch: pytest.MonkeyPatch, words: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        steps_in_samples(given(monkeypatch, f"--lr-warmup-iters 2 {words}"), known_flags())


def go_on(monkeypatch: pytest.MonkeyPatch, words: str, before: str = "--lr 1e-3") -> argparse.Namespace:
    args = run(monkeypatch, words)
    saved = run(monkeypatch, before)
    saved.train_iters = 9  # Megatron fills it in, and counts otherwise than the run ends
    args.said = continue_schedule(args, saved, known_flags(), planned_rate=False)
    return args


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lr 5e-4", "^--load folder: --lr was 0.001 and is now 0.0005; restore it, or add --override-opt_param-sch"),
        ("--lr 1e-3 --min-lr 1e-4", "--min-lr was 0.0 and is now 0.0001; .*--use-checkpoint-opt_param-scheduler with"),
        ("--lr 1e-3 --lr-warmup-samples 8", "the warm-up in samples was 0 and is now 8"),
        ("--lr 1e-3 --lr-decay-style cosine", "--lr-decay-style was linear and is now cosine"),
        ("--lr 1e-3 --weight-decay 0.5", "the weight decay at the start was 0.01 and is now 0.5, the weight decay at"),
        ("--lr 1e-3 --decoupled-lr 1e-4", "--decoupled-lr was None and is now 0.0001, but .*add --no-load-optim"),
        (
            "--lr 1e-3 --adam-beta2 0.95",
            "--adam-beta2 was 0.999 and is now 0.95, but a resumed optimizer keeps its own",
        ),
        ("--lr 1e-3 --optimizer sgd", "--optimizer was adam and is now sgd"),
    ],
)
def test_another_schedule_at_a_resume_is_refused_with_both_values(
    monkeypatch: pytest.MonkeyPatch, words: str, told: str
) -> None:
    with pytest.raises(ResumeError, match=told):
        go_on(monkeypatch, words)


def test_the_same_schedule_and_a_new_optimizer_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert go_on(monkeypatch, "--lr 1e-3").said is None
    assert go_on(monkeypatch, "--lr 5e-4 --adam-beta2 0.9 --no-load-optim").said is None


def test_the_schedule_of_the_checkpoint_goes_on_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = "--lr 1e-3 --min-lr 1e-5 --lr-warmup-init 1e-6"
    args = go_on(monkeypatch, "--lr 5e-4 --use-checkpoint-opt_param-scheduler", before)
    assert (args.lr, args.min_lr, args.lr_warmup_init) == (1e-3, 1e-5, 1e-6)
    assert "the schedule of the checkpoint goes on" in args.said


def test_the_groups_of_a_checkpoint_get_the_new_rates_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = "--lr 1e-3 --decoupled-lr 1e-4"
    args = go_on(monkeypatch, "--lr 5e-4 --decoupled-lr 2e-4 --override-opt_param-scheduler", before)
    assert "--lr was 0.001 and is now 0.0005, --decoupled-lr was 0.0001 and is now 0.0002" in args.said
    now = [{"max_lr": 2e-4, "min_lr": 0.0, "params": []}, {"max_lr": 5e-4, "min_lr": 0.0, "params": []}]
    saved = [{"max_lr": 1e-3, "min_lr": 0.0, "params": [0]}, {"max_lr": 1e-4, "min_lr": 0.0, "params": [1]}]
    loaded = MegatronOptimizer._filter_and_reorder_param_groups(now, copy.deepcopy(saved))
    assert [group["max_lr"] for group in loaded] == [2e-4, 5e-4]
