"""The lower bound of a rank's memory, by hand, and below what the 2B shape was measured to take."""

import argparse

import pytest

from megatron_kaiyuan.training import memory

BASE = {
    "fp16": False, "bf16": False, "accumulate_allreduce_grads_in_fp32": False, "optimizer": "adam",
    "use_distributed_optimizer": False, "data_parallel_size": 1, "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "bytes_each"),
    [
        ({}, 4 + 4 + 8),
        ({"fp16": True}, 2 + 2 + 12),
        ({"fp16": True, "accumulate_allreduce_grads_in_fp32": True}, 2 + 4 + 12),
        ({"bf16": True, "use_distributed_optimizer": True, "data_parallel_size": 8}, 2 + 2 + 1.5),
        ({"bf16": True, "data_parallel_size": 8}, 2 + 2 + 12),
        ({"fp16": True, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4}, 16 / 8),
        ({"fp16": True, "optimizer": "sgd"}, 2 + 2),
        ({"fp16": True, "optimizer_cpu_offload": True}, 2 + 2),
        ({"fp16": True, "use_megatron_fsdp": True}, 0),
    ],
)
def test_bytes_of_a_parameter(changes: dict[str, object], bytes_each: float) -> None:
    assert memory.least_bytes(argparse.Namespace(**BASE | changes), 1_000_000) == bytes_each * 1_000_000


def test_the_bound_of_the_2b_shape_is_below_what_was_measured() -> None:
    """docs/benchmarks.md: 45.3 GiB at micro-batch 1, with gradients summed in FP32 on one GPU."""
    args = argparse.Namespace(**BASE | {"fp16": True, "accumulate_allreduce_grads_in_fp32": True})
    assert 30 < memory.least_bytes(args, 2_031_739_904) / 2**30 < 45.3
