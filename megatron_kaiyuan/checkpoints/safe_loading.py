"""Open the pickles of a checkpoint as data: no class and no function outside the lists here is ever called.

A pickle may name any function of any installed package, and whoever opens it calls that function. `.metadata`, the
run's arguments and every object beside the tensors are pickles, so a checkpoint from somebody else could run code. What
the lists hold only stores values. Damage is reported in the same way: bytes that are no pickle of these classes.

Errors of `read_metadata` and `load_object` begin with "has a ... that": the caller puts the folder in front.
"""

import importlib
import importlib.util
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_kaiyuan.errors import CheckpointError, KaiyuanError
from megatron_kaiyuan.host.quiet import quiet_megatron_import
from megatron_kaiyuan.host.terminal import visible

__all__ = ["load_object", "load_stored", "one_line", "read_metadata", "readable"]

_METADATA_CLASSES = {
    "torch": ("Size",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "torch.distributed._shard.sharded_tensor.metadata": ("MEM_FORMAT_ENCODING", "TensorProperties"),  # torch 2.2
    "torch.serialization": ("_get_layout",),  # looks a layout up by its name
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
}
"""What `.metadata` of torch's and Megatron's writers names, besides dtypes of torch."""

_OBJECT_CLASSES = (
    "_io.BytesIO",
    "argparse.Namespace",
    "io.BytesIO",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "signal.Signals",
    "types.SimpleNamespace",
)
"""What Megatron stores beside the tensors, besides tensors and what torch itself takes for data."""

_NUMPY_DTYPES = ("numpy.dtypes.UInt32DType",)
"""Classes of the arrays' dtypes, which no file names; numpy's random state is of this one."""


class _MetadataUnpickler(pickle._Unpickler):
    """In Python: the one in C takes memory for as many objects as a damaged byte says, which ends the process."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise CheckpointError(_foreign(".metadata", f"{module}.{name}"))


def _foreign(name: str, named: str) -> str:
    return f"has a {name} that names {visible(named)}, which no checkpoint needs and which could run code"


def one_line(error: BaseException) -> str:
    """Type and first line of an error, for a sentence of ours."""
    text = visible(str(error).strip().split("\n")[0][:300])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_metadata(path: Path) -> Metadata:
    """Read the `.metadata` of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, is no metadata, or names something else than data.
    """
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes raise anything
        raise CheckpointError(f"has a {path.name} that is unreadable ({one_line(error)})") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"has a {path.name} that is a {type(metadata).__name__} and no list of tensors")
    return metadata


def load_object(stream: BinaryIO, name: str) -> Any:
    """Load what `torch.save` wrote, tensors on the CPU.

    Args:
        stream: Seekable.
        name: Of the file or the stored object, for messages.

    Raises:
        CheckpointError: it is damaged, or names something else than data.
    """
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
        foreign = sorted(set(named) - set(_OBJECT_CLASSES))
        if foreign:
            raise CheckpointError(_foreign(name, foreign[0]))
        stream.seek(0)
        with torch.serialization.safe_globals([*map(_imported, named), *map(_imported, _NUMPY_DTYPES)]):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes raise anything
        raise CheckpointError(f"has a {name} that is unreadable ({one_line(error)})") from error


def _imported(name: str) -> tuple[Any, str]:
    module, _, attribute = name.rpartition(".")
    with quiet_megatron_import():
        return getattr(importlib.import_module(module), attribute), name


def load_stored(stream: BinaryIO, name: str, part: str = "") -> Any:
    """Load an object that a part of the checkpoint stores, and check what it holds for others to unpickle.

    Transformer Engine unpickles the extra states of its modules, which are bytes in a tensor, by itself.

    Args:
        stream: Seekable.
        name: Of the object.
        part: File that it is from, for messages.

    Raises:
        CheckpointError: as `load_object`.
    """
    told = f"{name} in {part}" if part else name
    value = load_object(stream, told)
    if "_extra_state" in name and importlib.util.find_spec("transformer_engine"):
        for state in value if isinstance(value, list) else [value]:
            _check_extra_state(state, told)
    return value


def _check_extra_state(state: Any, name: str) -> None:
    if isinstance(state, io.BytesIO):
        load_object(io.BytesIO(state.getvalue()), name)
    elif isinstance(state, torch.Tensor) and state.numel():
        from megatron.core.safe_globals import SafeUnpickler

        try:
            SafeUnpickler(io.BytesIO(state.cpu().numpy().tobytes())).load()
        except Exception as error:
            raise CheckpointError(f"has a {name} that holds no state of Megatron's ({one_line(error)})") from error


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn what torch and Megatron raise about a damaged checkpoint, anything, into one sentence.

    Raises:
        CheckpointError: names the folder and the first reason.
    """
    try:
        yield
    except KaiyuanError:
        raise
    except CheckpointException as error:
        reason: BaseException = next((wrapped[0] for wrapped in error.failures.values()), error)
        if isinstance(reason, KaiyuanError):
            raise reason from None
        raise _unreadable(folder, reason) from error
    except Exception as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{folder} cannot be read ({one_line(error)}); restore it from a copy, or name another checkpoint"
    )
