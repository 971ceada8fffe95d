"""FP16 matrix products that round once, at their end.

Overflow: cuBLAS may split the sum of a product over several blocks and round each part to FP16 before it adds them. Two
    parts beyond 65 504 that would cancel give inf, or NaN, although the result fits.
Bound: with the parts in FP32 a product overflows only if its result does.
Remedy: torch's own switch. Of no effect on products that accumulate into FP32, as weight gradients do, and on BF16.
Cost: cuBLAS has fewer kernels to choose from; not measured.
Upstream instead: torch's default, which allows it; Megatron leaves it alone.
Source: torch's notes on numerical accuracy, "Reduced Precision Reduction for FP16 and BF16 GEMMs".
"""

import torch

__all__ = ["keep_partial_sums_in_fp32"]


def keep_partial_sums_in_fp32() -> None:
    """Forbid FP16 partial sums in this process.

    Without CUDA nothing else changes.
    """
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
