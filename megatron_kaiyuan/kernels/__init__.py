"""Triton kernels of the local layers and the loss, with the same functions in plain torch for machines without CUDA.

Each module has one public function a shape; on CUDA tensors it launches the kernels, elsewhere it computes the same in
torch. No Megatron in here.
"""
