"""The line that matters, in logs as torchrun, our tools and Python write them."""

import pytest

from megatron_kaiyuan.host.failures import line_that_matters

TORCHRUN = """
 iteration        1/ 320 | consumed samples: 16 | lm loss: 9.0
[rank1]: Traceback (most recent call last):
[rank1]:   File "pretrain.py", line 1, in main
[rank1]: KeyError: 'x'
[rank1]: During handling of the above exception, another exception occurred:
[rank1]: torch.AcceleratorError: CUDA error: invalid device ordinal
[rank1]: CUDA kernel errors might be asynchronously reported at some other API call
[rank0]: torch.distributed.DistBackendError: NCCL error: remote process exited
W1130 torch/distributed/elastic/multiprocessing/api.py:908] Sending process 15 closing signal SIGTERM
E1130 failed (exitcode: 1) local_rank: 1 (pid: 16) of binary: python
Traceback (most recent call last):
  File "run.py", line 905, in main
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
Root Cause (first observed failure):
"""
OURS = """
> device: CPU (this machine shows no GPU)
ConfigError: --seq-length 300 is above the plan's 256: leave it out
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
WARNED = """
/x/y.py:3: UserWarning: a FutureError may come
  warnings.warn("an Error: of some kind")
error: plan.yaml: phases.0.tokens is missing
"""


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (TORCHRUN, "torch.AcceleratorError: CUDA error: invalid device ordinal"),
        (OURS, "ConfigError: --seq-length 300 is above the plan's 256: leave it out"),
        (WARNED, "error: plan.yaml: phases.0.tokens is missing"),
        ("Traceback (most recent call last):\n  x\nKeyboardInterrupt\n", "KeyboardInterrupt"),
        ("[rank0]: Traceback\n[rank0]: OSError: [Errno 28] No space\n", "OSError: [Errno 28] No space"),
        ("all went well\n", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_error_of_the_rank_that_failed_first(log: str, expected: str | None) -> None:
    assert line_that_matters(log.splitlines(keepends=True)) == expected
