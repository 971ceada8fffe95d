"""The command line through Megatron's parser and all of its checks, before any model is built.

Megatron checks in four places: its parser, its validation, the classes that hold its configuration, and its learning
rate schedule. The last two come late in a run, the schedule after the model; here all four are done at once, and what
any of them complains of is one sentence.
"""

import argparse
import copy
import functools
import sys
import warnings
from collections.abc import Mapping
from types import SimpleNamespace

from megatron.training import global_vars, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args, parse_args
from megatron.training.config.container import PretrainConfigContainer

from megatron_kaiyuan.arguments import arguments_provider
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.flags.complaints import megatron_checks
from megatron_kaiyuan.flags.rules import refuse_flags
from megatron_kaiyuan.flags.spelling import Spelling, spellings
from megatron_kaiyuan.flags.table import TABLE
from megatron_kaiyuan.model.config import kaiyuan_config_from_args

__all__ = ["configuration", "known_flags", "parse", "validate"]


@functools.cache
def known_flags() -> Mapping[str, Spelling]:
    """Every flag of Megatron's and ours by the name that it is stored under, with the defaults of Megatron's parser."""
    return spellings(arguments_provider({})(add_megatron_arguments(argparse.ArgumentParser(add_help=False))))


def parse(defaults: Mapping[str, object]) -> argparse.Namespace:
    """Return the command line as it was given.

    Args:
        defaults: Of the parser, where they are not Megatron's.

    Raises:
        ConfigError: Megatron refuses it, a flag of it would have no effect, or it names a file that would replace it.
    """
    if any(word.split("=")[0] == "--yaml-cfg" for word in sys.argv[1:]):
        raise ConfigError(
            "--yaml-cfg replaces the whole command line, and no file of it can name a plan or an option of this "
            "package; give its settings as flags"
        )
    with megatron_checks(known_flags()):
        args: argparse.Namespace = parse_args(arguments_provider(defaults))
    flags = known_flags()
    refuse_flags(args, {name: flag.default for name, flag in flags.items()} | dict(defaults), TABLE, flags)
    return args


def validate(defaults: Mapping[str, object], open_values: Mapping[str, object]) -> argparse.Namespace:
    """Return the arguments as Megatron's validation leaves them; it also builds the tokenizer and the writers.

    Args:
        defaults: As in `parse`.
        open_values: Values of arguments that the command line leaves open.

    Raises:
        ConfigError: any of Megatron's checks fails.
    """
    with megatron_checks(known_flags()):
        provider = arguments_provider(defaults)
        args: argparse.Namespace = parse_and_validate_args(provider, args_defaults=dict(open_values))
        kaiyuan_config_from_args(copy.copy(args))
        _build_schedule(args)
        configuration(args)
    return args


def configuration(args: argparse.Namespace) -> PretrainConfigContainer:
    """Megatron's configuration of everything but the model."""
    with warnings.catch_warnings():
        # It recommends a config class in place of a model builder; Megatron's own class cannot hold our options.
        warnings.filterwarnings("ignore", message=r"\s*It is recommended to use a ModelConfig", category=UserWarning)
        return pretrain_cfg_container_from_args(args)


def _build_schedule(args: argparse.Namespace) -> None:
    """Build the schedule of the learning rate and of the weight decay once, for an optimizer without parameters.

    It fills in what was left open, so it gets a copy of the arguments.
    """
    if args.skip_train:
        return
    global_vars.set_args(copy.copy(args))
    try:
        training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[{}]))
    finally:
        global_vars.set_args(args)
