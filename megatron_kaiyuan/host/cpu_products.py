"""FP16 matrix products and attention on the CPU, computed in FP32 and rounded once.

Without FP16 instructions (`avx512_fp16`) torch multiplies FP16 matrices in loops of its own, 4 to 28 times slower than
in FP32 with all conversions, and spends nearly nine tenths of a training step there (docs/lab-notes.md). The kernels
are exchanged below autograd, so that forward and backward, autograd's products and those of Megatron's layers go the
same way.

Overflow: as in FP16. Sums are taken in FP32, as tensor cores do, and a result beyond 65 504 becomes inf.
Everywhere, also on processors with FP16 instructions: a run then has the same numbers on all of them, but for the order
    of FP32 sums. There it may cost speed; measured only without them.
Cost: FP32 copies of the factors and the result while a product runs; 3 microseconds for a product of another dtype.
Upstream instead: oneDNN's FP16 product where the processor has the instructions, slow loops elsewhere. Products with a
    vector stay as they are: torch takes their sums in FP32, without a detour.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["multiply_half_in_float"]

_PRODUCTS = (
    *("mm", "mm.out", "bmm", "bmm.out"),
    *("addmm", "addmm.out", "addmm_", "baddbmm", "baddbmm.out", "baddbmm_"),
)
"""What matmul, linear, einsum and their gradients are made of, by torch's names."""
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"

_libraries: list[torch.library.Library] = []
"""Kept here, because the kernels are torch's own again when their library is gone."""


def multiply_half_in_float() -> None:
    """Exchange the kernels in this process. To be called once."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    kernels = {name: _product(name) for name in _PRODUCTS}
    kernels[_ATTENTION] = _attention(_ATTENTION, rounded=1)  # the second result, the logsumexp, is FP32 anyway
    kernels[f"{_ATTENTION}_backward"] = _attention(f"{_ATTENTION}_backward", rounded=3)
    with warnings.catch_warnings():
        # torch warns that kernels of its own are replaced, which is what is asked for.
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        for name, kernel in kernels.items():
            library.impl(  # type: ignore[no-untyped-call]
                name, kernel, "CPU", with_keyset=True, allow_override=True
            )
    _libraries.append(library)


def _product(name: str) -> Callable[..., Any]:
    """Return a kernel for factors that are all FP16.

    Others go to torch's own kernel, which also refuses a mixture.
    """
    base = name.partition(".")[0]
    in_place = base.endswith("_")
    functional, own = (
        getattr(torch.ops.aten, base.rstrip("_")).default,
        torch.library.get_kernel(f"aten::{name}", "CPU"),
    )

    def kernel(keys: Any, *args: Any, out: Tensor | None = None, **scalars: Any) -> Any:
        given = args if out is None else (*args, out)
        if any(isinstance(value, Tensor) and value.dtype is not torch.float16 for value in given):
            return own.call_boxed(keys, *args, **scalars, **({} if out is None else {"out": out}))
        result = functional(*map(_widened, args), **scalars).half()
        if out is not None:
            return torch.ops.aten.clone.out(result, out=out)  # which gives `out` its shape, as torch's own would
        return args[0].copy_(result) if in_place else result

    return kernel


def _attention(name: str, rounded: int) -> Callable[..., Any]:
    """Return a kernel for FP16 queries, or for FP16 gradients of the output.

    `rounded` of its results are FP16.
    """
    functional = getattr(torch.ops.aten, name).default
    own = torch.library.get_kernel(f"aten::{name}", "CPU")

    def kernel(keys: Any, *args: Any, **options: Any) -> Any:
        if args[0].dtype is not torch.float16:
            return own.call_boxed(keys, *args, **options)
        wide = {name: _widened(value) for name, value in options.items()}
        results = functional(*map(_widened, args), **wide)
        return *(result.half() for result in results[:rounded]), *results[rounded:]

    return kernel


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value
