"""Safetensors files written tensor by tensor in any order, and read one tensor at a time.

The library writes a file from tensors that are all in memory. The format lets one do without: a header of 8 bytes
(little-endian length) and JSON with every tensor's dtype, shape and place, then the bytes. Sizes are known from the
checkpoint's metadata, so headers are written first and each tensor when it is at hand.
"""

import json
import struct
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_kaiyuan.errors import ConvertError

__all__ = ["INDEX_NAME", "TensorFolder", "TensorWriter"]

INDEX_NAME = "model.safetensors.index.json"
"""Says which file holds which tensor, where there are several files."""

_SINGLE = "model.safetensors"
_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}

Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


class TensorWriter:
    """Writer of a model's tensors into a folder, as a context manager.

    `with` closes it. Leaving the block well means that all tensors were written.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Form], max_file_bytes: int) -> None:
        """Lay out the files.

        Args:
            folder: Exists and is empty.
            tensors: All that will be written, in the order of the files.
            max_file_bytes: Largest file, but for a tensor that is larger by itself.

        Raises:
            ConvertError: a dtype other than FP16, BF16 and FP32.
        """
        self._missing = dict(tensors)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files: list[BinaryIO] = []
        groups = _grouped(tensors, max_file_bytes)
        files = {}
        for number, group in enumerate(groups, start=1):
            name = _SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            self._start_file(folder / name, {key: tensors[key] for key in group})
            files.update(dict.fromkeys(group, name))
        if len(groups) > 1:
            total = sum(_num_bytes(form) for form in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _start_file(self, path: Path, tensors: Mapping[str, Form]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in tensors.items():
            begin, end = end, end + _num_bytes((shape, dtype))
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight
        stream = path.open("wb")
        self._files.append(stream)
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
        for name in tensors:
            self._places[name] = (stream, 8 + len(text) + header[name]["data_offsets"][0])

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, once, in the shape and dtype that were announced."""
        form = (tuple(tensor.shape), tensor.dtype)
        assert self._missing.pop(name) == form, f"{name} is {form}"
        stream, place = self._places[name]
        stream.seek(place)
        stream.write(tensor.contiguous().view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._files:
            stream.close()
        assert kind is not None or not self._missing, f"never written: {', '.join(self._missing)}"


def _grouped(tensors: Mapping[str, Form], max_file_bytes: int) -> list[list[str]]:
    """Return the names in files, each name in its order.

    A new file begins where the next tensor would not fit.
    """
    strange = [f"{name} is {dtype}" for name, (_, dtype) in tensors.items() if dtype not in _DTYPES]
    if strange:
        raise ConvertError(f"{strange[0]}; only FP16, BF16 and FP32 weights can be exported")
    groups: list[list[str]] = [[]]
    size = 0
    for name, form in tensors.items():
        if groups[-1] and size + _num_bytes(form) > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _num_bytes(form)
    return groups


def _num_bytes(form: Form) -> int:
    return torch.Size(form[0]).numel() * form[1].itemsize


class TensorFolder:
    """The safetensors of a model in Hugging Face's layout, opened but not read."""

    def __init__(self, folder: Path) -> None:
        """Open all files.

        Raises:
            ConvertError: there are none, one is missing or damaged, or they are not what the index says.
        """
        self._file_of: dict[str, Any] = {}
        for path in _listed_files(folder):
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ConvertError(f"{path}: cannot be read ({error}); copy or export it again") from error
            self._file_of.update(dict.fromkeys(opened.keys(), opened))  # type: ignore[no-untyped-call]

    @cached_property
    def forms(self) -> dict[str, Form]:
        """Return shape and dtype, keyed with tensor names."""
        names = {name: dtype for dtype, name in _DTYPES.items()}
        found = {}
        for name, opened in self._file_of.items():
            described = opened.get_slice(name)
            if described.get_dtype() not in names:
                raise ConvertError(f"{name} is {described.get_dtype()}; only FP16, BF16 and FP32 can be imported")
            found[name] = (tuple(described.get_shape()), names[described.get_dtype()])
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor


def _listed_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if not index.is_file():
        if not (folder / _SINGLE).is_file():
            raise ConvertError(f"{folder}: holds neither {_SINGLE} nor {INDEX_NAME}; give a folder with safetensors")
        return [folder / _SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{index}: is not an index of safetensors ({error!r})") from error
    return [folder / name for name in names]
