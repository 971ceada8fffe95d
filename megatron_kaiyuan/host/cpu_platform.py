"""Training on a machine without CUDA, through Megatron's own loop.

Megatron asks for CUDA in about a thousand places, few of which need it: a device to put tensors on, a random state, a
stream to wait for. `install()` answers those questions with the CPU, so that the same loop, checkpoints and parallelism
(over gloo) run in a test, on a laptop and on a cluster. Entry points and the tests' process runner call it before they
import Megatron; nothing else does, and it changes nothing on a machine that has CUDA.

Price: one CPU generator plays both the CPU and the CUDA random state, and every torch call pays a Python hook of about
a microsecond. Neither matters for correctness; both make this a platform for small runs. FP16 products are computed in
FP32 and rounded once: `cpu_products.py`.
"""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.host.cpu_products import multiply_half_in_float
from megatron_kaiyuan.host.machine import hide_packages_of_gpus

__all__ = ["CPU_ARGUMENT_DEFAULTS", "install", "is_installed", "keep_freed_memory"]

_MARK = "_kaiyuan_cpu_platform"

# Numbers of glibc's malloc.h: how many allocations may be mappings of their own; from how many free bytes at its end
# the heap shrinks (-1: never).
_MALLOPT_MMAP_MAX = -4
_MALLOPT_TRIM_THRESHOLD = -1

CPU_ARGUMENT_DEFAULTS: dict[str, object] = {
    # NCCL moves data between GPUs only.
    "distributed_backend": "gloo",
    # The other way draws the initial weights on the GPU.
    "use_cpu_initialization": True,
    # Transformer Engine's layers are CUDA kernels.
    "transformer_impl": "local",
    # Each of these picks a CUDA extension (apex, Transformer Engine) or a kernel compiled for one.
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
}
"""Values of Megatron's arguments that a run without CUDA needs, by the name argparse stores them under."""


def is_installed() -> bool:
    """Whether this process runs on the CPU platform."""
    return hasattr(torch.cuda, _MARK)


def install() -> bool:
    """Let Megatron run on the CPU. A second call changes nothing.

    Returns:
        True where the CPU platform is active; False on a machine with CUDA, where torch stays as it is.

    Raises:
        ConfigError: Megatron was imported before, and has already taken what this replaces.
    """
    if is_installed():
        return True
    if torch.cuda.is_available():
        return False
    if "megatron.core" in sys.modules:
        raise ConfigError(
            "the CPU platform was asked for after megatron.core had been imported, which is too late: "
            "call megatron_kaiyuan.host.cpu_platform.install() before anything imports megatron"
        )
    hide_packages_of_gpus()
    for owner, substitutions in _substitutions():
        for name, replacement in substitutions.items():
            setattr(owner, name, _under_one_name(replacement))
    contextlib.ExitStack().enter_context(_SendToCpu())
    multiply_half_in_float()
    # Megatron asks for this with tensor parallelism: it orders kernels on a GPU's queues.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    setattr(torch.cuda, _MARK, True)
    return True


def keep_freed_memory() -> None:
    """Let glibc use the memory of freed tensors again.

    Meant for training, where the same sizes come with each step. It asks the system anew for each large one, whose
    pages the kernel then clears one by one: a fifth of a step of the demo. The price is memory: its largest process
    grew by a quarter (docs/lab-notes.md), and what reads large checkpoints piece by piece would keep pieces. Other
    libraries of C have no such switch, or ignore it.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MALLOPT_MMAP_MAX, 0)
        set_option(_MALLOPT_TRIM_THRESHOLD, -1)


class _SendToCpu(TorchFunctionMode):
    """Creates on the CPU what is asked for on CUDA, and gives CPU tensors the type names of CUDA tensors.

    Megatron's optimizers sort parameters by `param.type()`, comparing it with "torch.cuda.HalfTensor" and the like, and
    refuse every other name.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to:
            args = (args[0], *("cpu" if _is_cuda(arg) else arg for arg in args[1:]))
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device: object) -> bool:
    """Return whether `device` names a CUDA device.

    A bare integer always does.
    """
    if isinstance(device, torch.device):
        return device.type == "cuda"
    number = isinstance(device, int) and not isinstance(device, bool)  # `non_blocking` comes beside the device
    return number or (isinstance(device, str) and device.startswith("cuda"))


class _NoStream:
    """Stands for both a CUDA stream and a CUDA event: on the CPU the work is done when the call returns."""

    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Accept the options of either, such as the device and the priority."""

    def _nothing(self, *args: object, **kwargs: object) -> None:
        """Return at once."""

    wait_stream = wait_event = record = wait = synchronize = _nothing

    def record_event(self, _event: object = None) -> "_NoStream":
        """Return an event that has happened."""
        return self

    def query(self) -> bool:
        """Everything is always done."""
        return True

    def elapsed_time(self, _end: object) -> float:
        """Return 0.0 milliseconds between two events, since time is not measured here."""
        return 0.0


class _EveryDevice:
    """A sequence of generators in which each CUDA index is the one CPU generator."""

    def __getitem__(self, _index: int) -> torch.Generator:
        return torch.default_generator


def _under_one_name(replacement: object) -> object:
    """Copy a function, so that no two of torch's names hold the same one.

    torch's compiler tabulates torch's functions when something first imports it, as an optimizer's first step does, and
    rejects a function under two names. Importing it ahead would cost each start 1.5 s.
    """
    if not isinstance(replacement, FunctionType):
        return replacement
    return functools.update_wrapper(
        FunctionType(
            replacement.__code__, replacement.__globals__, None, replacement.__defaults__, replacement.__closure__
        ),
        replacement,
    )


def _nothing(*_args: object, **_kwargs: object) -> None:
    """Take any arguments and return at once."""


def _same_tensor(tensor: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
    return tensor


def _same_module(module: torch.nn.Module, *_args: object, **_kwargs: object) -> torch.nn.Module:
    return module


def _all_to_all_by_numbers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `torch.distributed.all_to_all_single`, which takes sizes as numbers, for sizes that are tensors."""

    def all_to_all_single(*args: Any, **kwargs: Any) -> Any:
        numbers = {
            name: value.tolist()
            for name, value in kwargs.items()
            if name.endswith("_split_sizes") and torch.is_tensor(value)
        }
        return original(*args, **{**kwargs, **numbers})

    return all_to_all_single


def _run_now(function: Callable[[], object], **_kwargs: object) -> None:
    function()


def _backward_on_cpu(*args: Any, **kwargs: Any) -> Any:
    # The autograd engine runs a module's own backward with no function mode in place.
    with _SendToCpu():
        return torch.autograd.graph._engine_run_backward(*args, **kwargs)


def _uncompiled(function: Callable[..., Any] | None = None, **_kwargs: object) -> Callable[..., Any]:
    """`torch.compile` used as a call, a bare decorator or a decorator with options."""
    return function if function is not None else lambda inner: inner


@contextlib.contextmanager
def _any_context(*_args: object, **_kwargs: object) -> Iterator[None]:
    yield


def _host_properties(_device: object = None) -> SimpleNamespace:
    """What Megatron reads of a device: its name, its architecture (0.0: older than every GPU) and its size."""
    return SimpleNamespace(name="CPU", major=0, minor=0, multi_processor_count=1, total_memory=0)


def _substitutions() -> tuple[tuple[object, dict[str, object]], ...]:
    return (
        (torch.cuda, {**_device_substitutions(), **_random_substitutions(), **_stream_substitutions()}),
        (torch.cuda.random, _random_substitutions()),
        # A data loader with workers asks here whether to page-lock what they send; torch.cuda says yes now.
        (torch.accelerator, {"is_available": lambda: False}),
        # Marks for a GPU profiler.
        (torch.cuda.nvtx, {"range_push": _nothing, "range_pop": _nothing, "mark": _nothing, "range": _any_context}),
        # Moving to the device moves nothing. Page-locked memory serves copies to a GPU and needs its driver.
        (torch.Tensor, {"cuda": _same_tensor, "pin_memory": _same_tensor, "record_stream": _nothing}),
        (torch.nn.Module, {"cuda": _same_module}),
        # Backward of sequence parallelism allocates on the current device.
        (torch.autograd, {"_engine_run_backward": _backward_on_cpu}),
        # Megatron turns the sizes into numbers where it copies them from a GPU.
        (torch.distributed, {"all_to_all_single": _all_to_all_by_numbers(torch.distributed.all_to_all_single)}),
        # Compiling for the CPU takes minutes for functions of a few lines, and a C++ compiler that may be missing.
        (torch, {"compile": _uncompiled}),
    )


def _device_substitutions() -> dict[str, object]:
    return {
        # initialize_megatron refuses to start otherwise.
        "is_available": lambda: True,
        # Model-parallel groups are built only where there is a device; rank r takes device r.
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _nothing,
        "device": _any_context,
        # Kernels and overlap options are chosen by architecture.
        "get_device_capability": lambda _device=None: (0, 0),
        "get_device_properties": _host_properties,
        "get_device_name": lambda _device=None: "CPU",
        # Initialising the driver.
        "init": _nothing,
        "_lazy_init": _nothing,
        "_lazy_call": _run_now,
        # Memory of the device, for the log.
        "empty_cache": _nothing,
        "reset_peak_memory_stats": _nothing,
        "memory_stats": lambda _device=None: {},
        "memory_allocated": lambda _device=None: 0,
        "max_memory_allocated": lambda _device=None: 0,
        "memory_reserved": lambda _device=None: 0,
        "max_memory_reserved": lambda _device=None: 0,
        "mem_get_info": lambda _device=None: (0, 0),
    }


def _random_substitutions() -> dict[str, object]:
    # Megatron keeps a random state per parallel group and swaps it into the device's generator around each use.
    return {
        "default_generators": _EveryDevice(),
        "get_rng_state": lambda device="cpu": torch.get_rng_state(),
        "set_rng_state": lambda new_state, device="cpu": torch.set_rng_state(new_state),
        # Not torch.manual_seed, which calls these.
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
    }


def _stream_substitutions() -> dict[str, object]:
    # Streams order work that a GPU does later; here it is done already.
    return {
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": _NoStream,
        "default_stream": _NoStream,
        "set_stream": _nothing,
        "stream": _any_context,
        "synchronize": _nothing,
        "is_current_stream_capturing": lambda: False,
    }
