"""FP32 accumulation of weight gradients inside the matrix product, without apex.

Megatron's `--gradient-accumulation-fusion` calls an extension of apex that adds `grad_output.T @ input` to the FP32
gradient buffer in one product. cuBLAS can do that from torch: `addmm` with an output wider than its inputs.

Overflow: unfused, the weight gradient of a micro-batch is first rounded to FP16, where a sum over tokens of large
    scaled gradients can overflow. Here it never exists in FP16.
Cost: saves writing and reading the FP16 gradient and the separate addition.
Upstream instead: `fused_weight_gradient_mlp_cuda` of apex, or Transformer Engine's own layers.
"""

import torch
from torch import Tensor

__all__ = ["wgrad_gemm_accum_fp16", "wgrad_gemm_accum_fp32"]


def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """`main_grad += grad_output.T @ total_input`.

    Args:
        total_input: [t, in], FP16, BF16 or FP32.
        grad_output: [t, out], the same dtype.
        main_grad: [out, in], FP32, changed in place.
    """
    if grad_output.dtype == main_grad.dtype:
        torch.addmm(main_grad, grad_output.t(), total_input, out=main_grad)
    elif grad_output.is_cuda:
        torch.addmm(main_grad, grad_output.t(), total_input, out_dtype=main_grad.dtype, out=main_grad)
    else:  # torch has products that widen their result on CUDA only
        main_grad.addmm_(grad_output.t().to(main_grad.dtype), total_input.to(main_grad.dtype))


def wgrad_gemm_accum_fp16(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """The same with a gradient buffer of the inputs' own dtype."""
    main_grad.addmm_(grad_output.t(), total_input)
