"""All changes made to Megatron 0.19 from outside, each with its reason.

Everything else uses its hooks. But for those of `loop_observers.py`, which change nothing and listen, and those to the
files of checkpoints, in `checkpoints/megatron_files.py`.
"""

import argparse
import functools
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import rerun_state_machine
from megatron.core.datasets import utils as dataset_utils
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.rerun_state_machine import RerunMode
from megatron.core.tensor_parallel import layers as parallel_layers
from megatron.training import checkpointing, get_args, get_signal_handler, training
from megatron.training.dist_signal_handler import all_gather_item
from megatron.training.utils import print_rank_0
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import DataLoader

from megatron_kaiyuan.checkpoints import writing
from megatron_kaiyuan.errors import SaveError
from megatron_kaiyuan.host.stop_signals import StopRequests
from megatron_kaiyuan.kernels import weight_gradient

__all__ = [
    "Keeper",
    "end_at",
    "fuse_weight_gradients_without_apex",
    "initialize_loader_workers",
    "keep_checkpoints",
    "keep_shipped_dataset_helpers",
    "log_each_step_once",
    "rename_rates_of_groups",
    "repair_checkpoints_before_first_step",
    "repair_distributed_torch_adam",
    "report_stop_signals",
    "stop_at_invalid_results",
    "use_scheduler",
    "write_checkpoints",
]


def keep_shipped_dataset_helpers() -> None:
    """Do not build the dataset helpers where there is nothing to build them with.

    Megatron runs `make` beside its dataset sources at every start. The wheel ships the compiled helper but no Makefile,
    so that `make` fails and the run ends, on every machine.
    """
    if not (Path(dataset_utils.__file__).parent / "Makefile").exists():
        dataset_utils.compile_helpers = lambda: None


def fuse_weight_gradients_without_apex() -> None:
    """Give `--gradient-accumulation-fusion` its two functions where apex's extension is absent.

    Megatron looks for the extension at import and refuses the flag without it; torch can do the same.
    """
    if not parallel_layers._grad_accum_fusion_available:
        parallel_layers.fused_weight_gradient_mlp_cuda = weight_gradient
        parallel_layers._grad_accum_fusion_available = True


def use_scheduler(build: Callable[..., OptimizerParamScheduler]) -> None:
    """Let the training loop build its parameter scheduler through `build`, called with Megatron's own arguments.

    The loop names the class in the middle of a function and offers no hook to choose another.
    """
    training.OptimizerParamScheduler = build


def stop_at_invalid_results(why_at_once: Callable[[str], Exception], at_exit: Callable[[int], None]) -> None:
    """Let a loss or gradient that is not finite end the run with a reason of ours, wherever Megatron detects it.

    It repeats such a step and leaves with a code, without a word to the user; without `--save` it saves to a folder
    called None. Where it cannot repeat, in an evaluation for instance, it raises a RuntimeError; in the first step of a
    start it takes the gradients as they are. A second call replaces the reasons.

    Args:
        why_at_once: Returns the error of a result that is not going to be repeated, given Megatron's name for it.
        at_exit: Called on all ranks with the exit code when a repeated step ends the run, before anything is saved.
    """
    machine = rerun_state_machine.RerunStateMachine
    validate = getattr(machine.validate_result, "__wrapped__", machine.validate_result)
    step = getattr(training.train_step, "__wrapped__", training.train_step)

    @functools.wraps(validate)
    def validated(self: Any, result: Any, rejection_func: Callable[[Any], bool], message: str, **named: Any) -> None:
        repeats = self.mode is not RerunMode.DISABLED and self.first_iteration_complete
        if named.get("fatal", True) and not repeats and rejection_func(result):
            raise why_at_once(message)
        validate(self, result, rejection_func, message, **named)

    @functools.wraps(step)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        outcome = step(*args, **kwargs)
        _losses, _skipped, _should_save, should_exit, code, *_ = outcome
        if should_exit:
            at_exit(code)
        return outcome

    machine.validate_result = validated
    training.train_step = stepped


def log_each_step_once() -> None:
    """Let the first log line of a start be one like any other where it is due.

    Megatron writes a line after the first step in any case, and keeps what it summed up: the loss of the second line is
    then the mean of both. A second call changes nothing.
    """
    original = training.training_log
    if hasattr(original, "logs_each_step_once"):
        return

    def training_log(
        losses: Any, totals: Any, rate: Any, iteration: int, *more: Any, is_first_iteration: bool = False, **named: Any
    ) -> Any:
        extra = is_first_iteration and iteration % get_args().log_interval != 0
        return original(losses, totals, rate, iteration, *more, is_first_iteration=extra, **named)

    training_log.logs_each_step_once = True  # type: ignore[attr-defined]
    training.training_log = training_log


def rename_rates_of_groups(changes: Mapping[str, Mapping[float, float]]) -> None:
    """Let an optimizer be loaded whose groups have new rates.

    Megatron matches a saved group by its rates, and then takes the saved ones. Here the groups of a checkpoint get the
    new rates before it looks for them.

    Args:
        changes: Rate now by rate before, for each of `max_lr` and `min_lr`.
    """
    original = MegatronOptimizer._filter_and_reorder_param_groups

    def rename(groups: list[dict[str, Any]]) -> None:
        for group in groups:
            group.update({key: rates[group[key]] for key, rates in changes.items() if group.get(key) in rates})

    def renamed(current: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> Any:
        rename(loaded)
        return original(current, loaded)

    MegatronOptimizer._filter_and_reorder_param_groups = staticmethod(renamed)
    load = DistributedOptimizer.load_state_dict

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        rename(state_dict["optimizer"]["param_groups"])
        load(self, state_dict)

    DistributedOptimizer.load_state_dict = load_state_dict


def end_at(iteration: int) -> None:
    """Let a run that is counted in samples end at this iteration.

    Megatron divides all samples by the present batch, which is wrong once a run has had another one.
    """

    def update_train_iters(args: argparse.Namespace) -> None:
        if not args.train_iters:
            args.train_iters = iteration
            print_rank_0(f"> the run ends at iteration {iteration}")

    training.update_train_iters = update_train_iters


class Keeper(Protocol):
    """What `keep_checkpoints` asks and notifies (see `megatron_kaiyuan.training.checkpoint_keeping`)."""

    def lacks(self, iteration: int) -> bool:
        """Whether this iteration must be saved beside those of the interval."""

    def protects(self, iteration: int) -> bool:
        """Whether this iteration may not be deleted."""

    def before_save(self, iteration: int) -> None:
        """Called on all ranks."""

    def after_save(self, iteration: int) -> None:
        """React to a save on all ranks, while an asynchronous save may still be writing."""

    def not_saved(self, iteration: int, error: BaseException) -> Exception:
        """Return what to raise in place of the error of a save, on the ranks that have one."""

    def goes_on(self, iteration: int) -> None:
        """Called on all ranks when the step has been saved, if it is to be, and another one follows."""


def keep_checkpoints(keeper: Keeper) -> None:
    """Save when `keeper` lacks a checkpoint, never delete what it protects, and notify it of every save.

    The loop saves at multiples of one interval, `--save-retain-interval` deletes all but multiples of another, and
    there are no hooks around a save. A later call replaces the keeper.
    """
    decide = getattr(training.checkpoint_and_decide_exit, "__wrapped__", training.checkpoint_and_decide_exit)
    save = getattr(training.save_checkpoint, "__wrapped__", training.save_checkpoint)
    delete = getattr(checkpointing._async_delete_checkpoint_impl, "__wrapped__", None)
    delete = delete or checkpointing._async_delete_checkpoint_impl

    @functools.wraps(save)
    def saved(iteration: int, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("non_persistent_ckpt"):
            save(iteration, *args, **kwargs)
            return
        keeper.before_save(iteration)
        try:
            save(iteration, *args, **kwargs)
        except (CheckpointException, SaveError, OSError) as error:
            raise keeper.not_saved(iteration, error) from error
        keeper.after_save(iteration)

    @functools.wraps(decide)
    def decided(
        model: Any, optimizer: Any, scheduler: Any, iteration: int, operations: Any, context: Any, data: Any
    ) -> bool:
        leave = bool(decide(model, optimizer, scheduler, iteration, operations, context, data))
        if keeper.lacks(iteration):
            training.save_checkpoint_and_time(
                iteration, model, optimizer, scheduler, operations, context, train_data_iterator=data
            )
        if not leave:
            keeper.goes_on(iteration)
        return leave

    @functools.wraps(delete)
    def deleted(directory: str, iteration: int, *args: Any, **kwargs: Any) -> None:
        if not keeper.protects(iteration):
            delete(directory, iteration, *args, **kwargs)

    training.save_checkpoint = saved
    training.checkpoint_and_decide_exit = decided
    checkpointing._async_delete_checkpoint_impl = deleted


def write_checkpoints(*, asynchronous: bool) -> None:
    """Write checkpoints as `checkpoints/writing.py` does.

    Megatron's writer starts a helper process which any signal to the rank's process group kills, reports no reason of a
    failure, and begins a save that the disk cannot hold. A second call changes the queue alone.
    """

    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        if filesystem_async._results_queue is None:
            filesystem_async._results_queue = writing.results_queue(asynchronous=asynchronous)
        return filesystem_async._results_queue

    writer = filesystem_async.FileSystemWriterAsync
    prepare = getattr(writer.prepare_write_data, "__wrapped__", writer.prepare_write_data)

    @functools.wraps(prepare)
    def prepared(self: Any, plan: Any, planner: Any) -> None:
        prepare(self, plan, planner)
        if not self.use_msc:
            writing.check_space(Path(self.checkpoint_dir), self.write_buckets)

    filesystem_async.get_write_results_queue = get_write_results_queue
    writer.prepare_write_data = prepared
    writer.write_preloaded_data_multithread = staticmethod(writing.write_buckets)


def report_stop_signals(requests: StopRequests) -> None:
    """Let the loop save and end at a signal that `requests` notes, and name the signal.

    Megatron listens to one signal. All ranks learn of a signal that one of them received, and each learns its number.
    """
    handler = get_signal_handler()
    requests.number = requests.number or handler.sig * handler._signal_received
    print_datetime = getattr(training.print_datetime, "__wrapped__", training.print_datetime)

    def signals_received() -> list[int]:
        numbers: list[int] = all_gather_item(requests.number, dtype=torch.int32)
        requests.agreed = max(numbers)
        return numbers

    @functools.wraps(print_datetime)
    def named(text: str, *args: Any, **kwargs: Any) -> None:
        if requests.agreed:
            text = text.replace("receiving SIGTERM", f"receiving {signal.Signals(requests.agreed).name}")
        print_datetime(text, *args, **kwargs)

    handler.signals_received = signals_received
    training.print_datetime = named


def initialize_loader_workers(initialize: Callable[[], None]) -> None:
    """Call `initialize` in each loader worker, after Megatron's own initialization.

    That one gives a worker a handler for SIGTERM which only sets a flag. Python then waits for ever for the worker when
    the rank exits.
    """
    build = getattr(training.build_pretraining_data_loader, "__wrapped__", training.build_pretraining_data_loader)

    @functools.wraps(build)
    def built(*args: Any, **kwargs: Any) -> Any:
        loader = build(*args, **kwargs)
        if isinstance(loader, DataLoader) and loader.num_workers:
            loader.worker_init_fn = functools.partial(_initialize_worker, loader.worker_init_fn, initialize)
        return loader

    training.build_pretraining_data_loader = built


def _initialize_worker(first: Callable[[int], None] | None, then: Callable[[], None], number: int) -> None:
    if first is not None:
        first(number)
    then()


def repair_distributed_torch_adam() -> None:
    """Let `--use-distributed-optimizer` resume with torch's Adam, which stands in where apex and TE are absent.

    Defects of the distributed optimizer with it, all but the last about Adam's number of steps. Before a checkpoint is
    loaded it asks for the number, which torch's Adam creates at its first step: an assertion ends the run. It gives all
    parameters one and the same tensor, which each of them then advances: the bias correction of the resumed run is
    wrong. Having loaded the number it sets it back to that of the fresh optimizer (default checkpoint format), or looks
    for one that was not saved and ends (fully reshardable format). And in FP32 the default format writes to weights
    that require gradients, which torch refuses. A second call changes nothing.
    """
    if hasattr(DistributedOptimizer.state_dict, "__wrapped__"):
        return
    original_state, original_load = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict
    original_set = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(original_state)
    def state_dict(self: Any) -> Any:
        _create_adam_state(self.optimizer)
        return original_state(self)

    @functools.wraps(original_load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original_load(self, state_dict)
        _separate_adam_steps(self.optimizer)

    @functools.wraps(original_set)
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        with torch.no_grad():  # in FP32 the main weights are views of the model's, and the default format forgets this
            original_set(self, model_param, {**tensors, "step": None})  # None: leave it as loaded with the groups

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def repair_checkpoints_before_first_step() -> None:
    """Let a checkpoint be loaded that was saved while every FP16 step so far had overflowed, with torch's Adam.

    Adam has no state then: Megatron saves none, and asks for it when it loads. With a state of zeros, it leaves out the
    number of steps where that is 0, and Adam misses it. A second call changes nothing.
    """
    if hasattr(Float16OptimizerWithFloat16Params.sharded_state_dict, "__wrapped__"):
        return
    original = Float16OptimizerWithFloat16Params.sharded_state_dict

    @functools.wraps(original)
    def sharded_state_dict(self: Any, model_state: Any, *args: Any, **kwargs: Any) -> Any:
        is_torch_adam = isinstance(self.optimizer, torch.optim.Adam)
        if is_torch_adam and not (args[0] if args else kwargs.get("is_loading", False)):
            _create_adam_state(self.optimizer)
        result = original(self, model_state, *args, **kwargs)
        if is_torch_adam:
            result["optimizer"]["state"].setdefault("common_step", torch.zeros((), dtype=torch.float32))
        return result

    Float16OptimizerWithFloat16Params.sharded_state_dict = sharded_state_dict


def _create_adam_state(optimizer: object) -> None:
    """Give each parameter the state that torch's Adam would give it at its first step."""
    if not isinstance(optimizer, torch.optim.Adam) or optimizer.state:
        return
    for group in optimizer.param_groups:
        on_device = group["capturable"] or group["fused"]
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _separate_adam_steps(optimizer: object) -> None:
    if isinstance(optimizer, torch.optim.Adam):
        for state in optimizer.state.values():
            state["step"] = state["step"].clone()
