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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron.training import get_tokenizer, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args, parse_args
from megatron.training.config.container import PretrainConfigContainer
from megatron.training.utils import print_rank_0

from megatron_kaiyuan.arguments import arguments_provider
from megatron_kaiyuan.errors import ConfigError, KaiyuanError
from megatron_kaiyuan.flags.complaints import megatron_checks, sentence
from megatron_kaiyuan.flags.ranges import check_ranges
from megatron_kaiyuan.flags.replaced import refuse_replaced
from megatron_kaiyuan.flags.rules import ALWAYS, Rule, refuse_flags
from megatron_kaiyuan.flags.spelling import Spelling, flags_among, spellings
from megatron_kaiyuan.flags.table import TABLE
from megatron_kaiyuan.host.terminal import counted
from megatron_kaiyuan.model.config import kaiyuan_config_from_args
from megatron_kaiyuan.training.schedule_arguments import build_schedule

__all__ = [
    "check_flags",
    "configuration",
    "flag_defaults",
    "known_flags",
    "parse",
    "tell_what_building_refuses",
    "validate",
]

_BUILDING = (
    "initialize_megatron",
    "set_jit_fusion_options",
    "setup_model_and_optimizer",
    "build_train_valid_test_data_iterators",
)
"""Functions of Megatron's that build a run, in their order."""
_REFUSALS = (AssertionError, ValueError, NotImplementedError, ImportError, FileNotFoundError)
"""What Megatron and torch raise where they cannot build what was asked for; a lack of memory is none of them."""


@functools.cache
def known_flags() -> Mapping[str, Spelling]:
    """Every flag of Megatron's and ours by the name that it is stored under, with the defaults of Megatron's parser."""
    return spellings(arguments_provider({})(add_megatron_arguments(argparse.ArgumentParser(add_help=False))))


def flag_defaults() -> dict[str, Any]:
    """Return the default of Megatron's parser or ours by the name that a flag is stored under."""
    return {name: flag.default for name, flag in known_flags().items()}


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
    check_ranges(args, known_flags())
    loads = bool(args.load or args.pretrained_checkpoint)
    # What other flags decide is known once the checkpoint has filled them in.
    check_flags(args, defaults, [rule for rule in TABLE if not loads or rule.where is ALWAYS])
    return args


def check_flags(args: argparse.Namespace, defaults: Mapping[str, object], rules: Iterable[Rule] = TABLE) -> None:
    """Refuse every flag that would have no effect, or another one than it says.

    Args:
        args: Parsed, not yet validated.
        defaults: Values that nobody gave, where they are not Megatron's defaults.
        rules: Those of the table to look at.

    Raises:
        ConfigError: names all such flags, each with what is wrong and what to do.
    """
    refuse_flags(args, flag_defaults() | dict(defaults), rules, known_flags())


def validate(
    defaults: Mapping[str, object], open_values: Mapping[str, object], other_words: Mapping[str, object]
) -> argparse.Namespace:
    """Return the arguments as Megatron's validation leaves them.

    It also builds the tokenizer and the writers.

    Args:
        defaults: As in `parse`.
        open_values: Values of arguments that the command line leaves open.
        other_words: Values of arguments that say the same as the command line, in units that Megatron takes.

    Raises:
        ConfigError: any of Megatron's checks fails.
    """
    given: dict[str, Any] = {}
    with megatron_checks(known_flags()):
        provider = _in_other_words(arguments_provider(defaults), other_words, given)
        args: argparse.Namespace = parse_and_validate_args(provider, args_defaults=dict(open_values))
        config = kaiyuan_config_from_args(copy.copy(args))
        if not args.skip_train:
            build_schedule(args)
        configuration(args)
    named = flags_among(sys.argv[1:], known_flags()) - other_words.keys()
    refuse_replaced(named, given, (args, config), known_flags())
    _check_rows(args)
    return args


def _check_rows(args: argparse.Namespace) -> None:
    """Megatron looks a token up in a table of any size."""
    tokens = get_tokenizer().vocab_size
    if args.padded_vocab_size < tokens:
        raise ConfigError(
            f"--padded-vocab-size {args.padded_vocab_size}: the tokenizer has {counted(tokens, 'token')}; give at "
            "least as many "
            "rows, or leave it out"
        )
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    if said := say_unused_rows(args.padded_vocab_size, tokens, multiple, args.hidden_size):
        print_rank_0(f"> {said}")


def say_unused_rows(rows: int, tokens: int, multiple: int, hidden_size: int) -> str | None:
    """Return a line about rows of the embedding that no token has.

    None where they are few, or padding needs them.

    Args:
        rows: `--padded-vocab-size`.
        tokens: Ids of the tokenizer.
        multiple: Megatron pads to a multiple of it.
        hidden_size: Width of a row.
    """
    unused = rows - tokens
    if unused < multiple or unused <= tokens // 10:
        return None
    return (
        f"WARNING: --padded-vocab-size {rows:,} for {counted(tokens, 'id')} of the tokenizer: "
        f"{counted(unused, 'row')} stand for no "
        f"token, {counted(unused * hidden_size, 'parameter')} in the embedding and as many in an output matrix of its "
        "own. "
        "Leave it out to pad by no more than is needed"
    )


def tell_what_building_refuses() -> None:
    """Let what Megatron or torch refuses while groups, model, optimizer and loaders are built be one sentence.

    It is what no earlier check has noticed. A second call changes nothing.
    """
    for name in _BUILDING:
        original = getattr(training, name)
        if not hasattr(original, "__wrapped__"):
            setattr(training, name, _telling(original))


def _telling(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return build(*args, **kwargs)
        except KaiyuanError:
            raise
        except _REFUSALS as error:
            raise ConfigError(sentence(error, known_flags(), sys.argv[1:])) from error

    return told


def configuration(args: argparse.Namespace) -> PretrainConfigContainer:
    """Megatron's configuration of everything but the model."""
    with warnings.catch_warnings():
        # It recommends a config class in place of a model builder; Megatron's own class cannot hold our options.
        warnings.filterwarnings("ignore", message=r"\s*It is recommended to use a ModelConfig", category=UserWarning)
        return pretrain_cfg_container_from_args(args)


def _in_other_words(
    provider: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
    values: Mapping[str, object],
    parsed: dict[str, Any],
) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """Let the parser that Megatron gets answer with these values, whatever the command line says.

    What it answers is written into `parsed` too, before Megatron changes it.
    """

    def provide(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = provider(parser)
        parse = parser.parse_args

        def parse_args(*words: Any) -> argparse.Namespace:
            args: argparse.Namespace = parse(*words)
            vars(args).update(values)
            parsed.update(vars(args))
            return args

        parser.parse_args = parse_args  # type: ignore[method-assign,assignment]
        return parser

    return provide
