"""The flags of the learning rate: beside a plan, in steps or samples, and at a resume.

Megatron ends in a bare assertion where a run that counts samples is given a warm-up in steps, and in an error about
"parameter groups" where a resumed run is given another rate: it looks for the optimizer's groups by the rate that they
had. `--override-opt_param-scheduler` and `--use-checkpoint-opt_param-scheduler`, which decide the same question for the
schedule, come too late for that.
"""

import argparse
import contextlib
import copy
import io
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import global_vars, training

from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.errors import ConfigError, ResumeError
from megatron_kaiyuan.flags.spelling import Spelling
from megatron_kaiyuan.training.compat import rename_rates_of_groups
from megatron_kaiyuan.training.scheduler import plan_has_learning_rate

__all__ = ["build_schedule", "check_rates_of_plan", "continue_schedule", "steps_in_samples"]

_IN_STEPS = {
    "lr_warmup_iters": "lr_warmup_samples",
    "lr_decay_iters": "lr_decay_samples",
    "lr_wsd_decay_iters": "lr_wsd_decay_samples",
}
_OF_THE_SCHEDULE = (
    "min_lr",
    "lr_decay_style",
    "lr_wsd_decay_style",
    "lr_warmup_fraction",
    "lr_warmup_init",
    *_IN_STEPS,
    *_IN_STEPS.values(),
    "override_opt_param_scheduler",
    "use_checkpoint_opt_param_scheduler",
)
_OF_GROUPS = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")
"""What Megatron distinguishes the groups of the optimizer by."""
_NOT_IN_THE_STATE = ("lr_warmup_init", "lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples")
"""What a checkpoint's schedule depends on and does not hold."""
_OF_THE_OPTIMIZER = (
    "optimizer",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "sgd_momentum",
    "apply_wd_to_qk_layernorm",
)
"""What a resumed optimizer takes from its checkpoint, whatever the flags say, or cannot change."""


def check_rates_of_plan(args: argparse.Namespace, plan: Plan, flags: Mapping[str, Spelling]) -> None:
    """Refuse the flags of a schedule where the plan gives the rate of every phase.

    Args:
        args: Parsed, not yet validated.
        plan: The plan of the run.
        flags: How the parser spells them, and their defaults.

    Raises:
        ConfigError: names all of them.
    """
    if not plan_has_learning_rate(plan):
        return
    names = [*_OF_THE_SCHEDULE] if args.decoupled_lr is not None else ["lr", *_OF_THE_SCHEDULE]
    values = {name: getattr(args, name) for name in names}
    given = [flags[name].written(value) for name, value in values.items() if value != flags[name].default]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: the phases of the plan give the learning rate (lr), of which this would change "
            "nothing; leave it out, or take lr out of the plan"
        )


def steps_in_samples(args: argparse.Namespace, flags: Mapping[str, Spelling]) -> dict[str, object]:
    """Return what the flags in steps are in samples, for a run over a plan, which counts samples.

    Megatron multiplies them with `--global-batch-size` itself, in runs that count steps.

    Args:
        args: Parsed, not yet validated; of a run with a plan and without `--train-iters`.
        flags: How the parser spells them, and their defaults.

    Returns:
        Values by argument; those in steps have their defaults.

    Raises:
        ConfigError: the size of a step is not known, or a flag is given in both units.
    """
    given = {name: getattr(args, name) for name in _IN_STEPS if getattr(args, name) != flags[name].default}
    if not given or args.train_iters is not None:
        return {}
    written = ", ".join(flags[name].written(value) for name, value in given.items())
    in_samples = ", ".join(flags[_IN_STEPS[name]].usual for name in given)
    if args.step_batch_size_schedule is not None or args.global_batch_size is None:
        reason = "are of several sizes" if args.step_batch_size_schedule is not None else "need --global-batch-size"
        raise ConfigError(f"{written}: a run over a plan counts samples, and its steps {reason}; use {in_samples}")
    twice = [name for name in given if getattr(args, _IN_STEPS[name]) != flags[_IN_STEPS[name]].default]
    if twice:
        raise ConfigError(f"{written}: given in samples too ({in_samples}); leave one of the two out")
    found: dict[str, object] = {name: flags[name].default for name in given}
    return found | {_IN_STEPS[name]: steps * args.global_batch_size for name, steps in given.items()}


def build_schedule(args: argparse.Namespace) -> OptimizerParamScheduler:
    """Build Megatron's schedule of the rate and of the weight decay for an optimizer without parameters.

    Args:
        args: Validated arguments; they stay as they are, though Megatron fills in what they leave open.
    """
    present, own = global_vars.get_args(), copy.copy(args)
    if own.train_samples:
        own.train_iters = None  # a run that counts samples has filled it in
    global_vars.set_args(own)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[{}]))
    finally:
        global_vars.set_args(present)


def continue_schedule(
    args: argparse.Namespace, saved: argparse.Namespace | None, flags: Mapping[str, Spelling], *, planned_rate: bool
) -> str | None:
    """Let a resumed run go on with the schedule that the command line asks for, and say which where there are two.

    Args:
        args: Validated arguments; changed where the checkpoint decides.
        saved: Arguments of the run to continue, if there is one.
        flags: How the parser spells them.
        planned_rate: The plan gives the rate.

    Raises:
        ResumeError: the schedule, or what a resumed optimizer keeps, was another one, and no flag says which to take.
    """
    if saved is None or args.no_load_optim or args.skip_train:
        return None
    _check_optimizer(args, saved, flags)
    if planned_rate:
        for name in ("lr", "min_lr"):
            setattr(args, name, getattr(saved, name))
        return None
    changed = _differences(args, saved)
    if not changed:
        return None
    told = ", ".join(f"{what} was {before} and is now {now}" for what, (before, now) in changed.items())
    if args.use_checkpoint_opt_param_scheduler:
        for name in (*_OF_GROUPS, *_NOT_IN_THE_STATE):
            setattr(args, name, getattr(saved, name))
        return f"the schedule of the checkpoint goes on (--use-checkpoint-opt_param-scheduler): {told}"
    if not args.override_opt_param_scheduler:
        raise ResumeError(
            f"--load {args.load}: {told}; restore it, or add --override-opt_param-scheduler to go on with the new "
            "value, --use-checkpoint-opt_param-scheduler with that of the checkpoint"
        )
    if args.use_mup or getattr(saved, "use_mup", False):
        raise ResumeError(f"--load {args.load}: {told}; --use-mup derives other rates from it: restore it")
    rename_rates_of_groups(
        {
            f"{bound}_lr": {
                getattr(saved, name): getattr(args, name)
                for name in (f"decoupled_{lr}", lr)
                if getattr(saved, name) is not None
            }
            for bound, lr in (("max", "lr"), ("min", "min_lr"))
        }
    )
    return f"the schedule changes (--override-opt_param-scheduler): {told}"


def _differences(args: argparse.Namespace, saved: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Return what differs between the two schedules, and between the rates of the groups.

    Each has its value before and now.
    """
    before, now = (_constants(build_schedule(run)) for run in (saved, args))
    for name in ("decoupled_lr", "decoupled_min_lr"):
        before[f"--{name.replace('_', '-')}"] = getattr(saved, name)
        now[f"--{name.replace('_', '-')}"] = getattr(args, name)
    return {name: (before[name], now[name]) for name in before if before[name] != now[name]}


_CONSTANTS = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "init_lr": "--lr-warmup-init",
    "lr_warmup_steps": "the warm-up in samples",
    "lr_decay_steps": "the decay in samples",
    "lr_decay_style": "--lr-decay-style",
    "wsd_decay_steps": "the decay of --lr-decay-style WSD in samples",
    "lr_wsd_decay_style": "--lr-wsd-decay-style",
    "start_wd": "the weight decay at the start",
    "end_wd": "the weight decay at the end",
    "wd_incr_steps": "the samples of the whole run",
    "wd_incr_style": "--weight-decay-incr-style",
}
"""What a schedule depends on, as the class that holds it calls it."""


def _constants(schedule: OptimizerParamScheduler) -> dict[str, Any]:
    return {said: getattr(schedule, name) for name, said in _CONSTANTS.items()}


def _check_optimizer(args: argparse.Namespace, saved: argparse.Namespace, flags: Mapping[str, Spelling]) -> None:
    for name in _OF_THE_OPTIMIZER:
        before, now = getattr(saved, name, None), getattr(args, name)
        if before is not None and before != now:
            raise ResumeError(
                f"--load {args.load}: {flags[name].usual} was {before} and is now {now}, but a resumed optimizer keeps "
                "its own; restore it, or add --no-load-optim to start a new optimizer"
            )
    for name in ("decoupled_lr", "decoupled_min_lr"):
        if (getattr(saved, name) is None) != (getattr(args, name) is None):
            raise ResumeError(
                f"--load {args.load}: {flags[name].usual} was {getattr(saved, name)} and is now {getattr(args, name)}, "
                "but a resumed optimizer keeps its groups; restore it, or add --no-load-optim to start a new optimizer"
            )
