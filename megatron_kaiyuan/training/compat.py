"""The changes made to Megatron 0.19 from outside, all of them, each with its reason. Everything else uses its hooks."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets import utils as dataset_utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import layers as parallel_layers
from megatron.training import training

from megatron_kaiyuan.kernels import weight_gradient

__all__ = [
    "fuse_weight_gradients_without_apex",
    "keep_shipped_dataset_helpers",
    "observe_steps",
    "repair_distributed_torch_adam",
    "use_scheduler",
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

    Megatron looks for the extension by name at import and refuses the flag without it; torch can do the same.
    """
    if not parallel_layers._grad_accum_fusion_available:
        parallel_layers.fused_weight_gradient_mlp_cuda = weight_gradient
        parallel_layers._grad_accum_fusion_available = True


def use_scheduler(build: Callable[..., OptimizerParamScheduler]) -> None:
    """Let the training loop build its parameter scheduler through `build`, called with Megatron's own arguments.

    The loop names the class in the middle of a function and offers no hook to choose another.
    """
    training.OptimizerParamScheduler = build


def observe_steps(observer: Callable[..., None]) -> None:
    """Call `observer` after Megatron's own log line of each step, with the same arguments, on all ranks.

    The loop has no hook after a step that learns of its loss, its gradient norm and whether it was skipped. A later
    call replaces the observer.
    """
    original = getattr(training.training_log, "__wrapped__", training.training_log)

    @functools.wraps(original)
    def logged(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        observer(*args, **kwargs)
        return result

    training.training_log = logged


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
