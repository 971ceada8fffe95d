"""The model of the checkpoint that a run loads: its options are the run's where the command line says nothing.

Megatron takes all of them from the command line, and with `--use-checkpoint-args` some from the checkpoint, which then
beat those that were given. Either way a forgotten flag would build another model, and load what fits of the weights.
So a checkpoint also has to fill the whole model, in every format, or the run ends.
"""

import argparse
import contextlib
import copy
import functools
import io
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.training import checkpointing, get_args, training
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.utils import print_rank_0

from megatron_kaiyuan.checkpoints.fitting import require_fit, stored_shapes, wanted_shapes
from megatron_kaiyuan.checkpoints.identity import check_fitting_model, check_same_run
from megatron_kaiyuan.checkpoints.model_identity import carried_options
from megatron_kaiyuan.checkpoints.reading import Checkpoint
from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.flags.spelling import flags_among
from megatron_kaiyuan.training.parsing import flag_defaults, known_flags

__all__ = ["LoadedModel", "load_all_tensors_or_none", "read_loaded_model"]


@dataclass(frozen=True)
class LoadedModel:
    """What the checkpoint says."""

    arguments: argparse.Namespace
    """Those of the run that saved it."""
    continues: bool
    """Whether that run goes on; else a new one begins with its weights."""
    origin: str
    """Flag and folder."""

    def options(self, args: argparse.Namespace) -> dict[str, Any]:
        """Return the options of the model that this run takes from there, and say which.

        Args:
            args: Parsed, not yet validated; what they say is left alone.

        Raises:
            ResumeError: the command line gives an option of another model.
        """
        flags, given = known_flags(), _given()
        # Before anything else: options of two models need not fit each other.
        self._compare(args, given)
        carried = carried_options(self.arguments, given, flag_defaults())
        taken = [flags[name].written(value) for name, value in carried.items() if getattr(args, name) != value]
        if taken:
            print_rank_0(f"> from the checkpoint of {self.origin}: {', '.join(sorted(taken))}")
        return carried

    def check(self, args: argparse.Namespace) -> None:
        """Refuse another model than the checkpoint's, and say where the command line changes how it is trained.

        Args:
            args: Validated.

        Raises:
            ResumeError: names each flag with both values.
        """
        for difference in self._compare(args):
            print_rank_0(f"> {difference} (from the checkpoint of {self.origin} on)")

    def _compare(self, args: argparse.Namespace, only: Collection[str] | None = None) -> list[str]:
        """Check all options, or some, and return where the command line changes how the model is trained."""
        check = check_same_run if self.continues else check_fitting_model
        return check(args, self.arguments, flag_defaults(), only)


def read_loaded_model(args: argparse.Namespace) -> LoadedModel | None:
    """Return the model of the checkpoint that a run starts from.

    None where it starts from random weights.

    Args:
        args: Parsed, not yet validated.

    Raises:
        ConfigError: `--use-checkpoint-args` would replace a flag of the command line.
    """
    for name in ("load", "pretrained_checkpoint"):
        told = copy.copy(args)
        if args.pretrained_checkpoint:  # what is missing is then read from there, and both were looked at
            told.exit_on_missing_checkpoint = False
        # The function reports each argument that it sets; it sets them on a copy here.
        with contextlib.redirect_stdout(io.StringIO()):
            found = load_args_from_checkpoint(told, load_arg=name) if getattr(args, name) else None
        if isinstance(found, tuple):
            origin = f"{known_flags()[name].usual} {getattr(args, name)}"
            if args.use_checkpoint_args:
                _refuse_replaced(args, told, origin)
            saved: argparse.Namespace = found[1]
            saved.iteration = told.iteration  # in the file it is the iteration at which that run had started
            return LoadedModel(saved, name == "load" and not args.finetune, origin)
    return None


def _refuse_replaced(args: argparse.Namespace, told: argparse.Namespace, origin: str) -> None:
    flags = known_flags()
    replaced = [
        f"{flags[name].written(getattr(args, name))} (there {getattr(told, name)})"
        for name in sorted(_given())
        if getattr(told, name, None) != getattr(args, name)
    ]
    if replaced:
        raise ConfigError(
            f"{', '.join(replaced)}: --use-checkpoint-args takes the value in the checkpoint of {origin} instead; "
            "leave the flag out, or leave --use-checkpoint-args out"
        )


def _given() -> set[str]:
    return flags_among(sys.argv[1:], known_flags())


def load_all_tensors_or_none() -> None:
    """Let a run that loads a checkpoint end where the tensors of its model are not those of the checkpoint.

    A second call changes nothing.
    """
    if hasattr(training.load_checkpoint, "__wrapped__"):
        return
    load, read_distributed = training.load_checkpoint, checkpointing._load_global_dist_base_checkpoint

    @functools.wraps(load)
    def load_checkpoint(ddp_model: list[Any], *args: Any, **kwargs: Any) -> Any:
        with _takes_all_tensors(ddp_model):
            return load(ddp_model, *args, **kwargs)

    @functools.wraps(read_distributed)
    def load_distributed(*args: Any, **kwargs: Any) -> Any:
        load_dir, _, only_arguments, state, iteration, release = args
        if not only_arguments and state is not None:
            folder = checkpointing.get_checkpoint_name(load_dir, iteration, release, return_base_dir=True)
            of_model = {name: part for name, part in state.items() if name.startswith("model")}
            require_fit(folder, wanted_shapes(of_model), stored_shapes(Checkpoint(Path(folder), iteration)))
        return read_distributed(*args, **kwargs)

    training.load_checkpoint = load_checkpoint
    checkpointing._load_global_dist_base_checkpoint = load_distributed


@contextlib.contextmanager
def _takes_all_tensors(chunks: list[Any]) -> Iterator[None]:
    """Let each chunk of a model refuse a state whose tensors are not its own, in any format, strict or not."""
    for chunk in chunks:
        chunk.load_state_dict = functools.partial(_load_whole, chunk, chunk.load_state_dict)
    try:
        yield
    finally:
        for chunk in chunks:
            del chunk.load_state_dict


def _load_whole(chunk: Any, load: Callable[..., Any], state: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    require_fit(f"--load {get_args().load}", _shapes(chunk.state_dict_for_save_checkpoint()), _shapes(state))
    return load(state, *args, **kwargs)


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
