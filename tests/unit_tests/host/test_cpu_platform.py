"""The CPU platform is there exactly when it is needed, and a machine with CUDA never notices it."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_kaiyuan.host import cpu_platform
from tests.helpers import run_distributed

REPOSITORY = Path(__file__).parents[3]

SNAPSHOT = """
import sys, torch
from torch.overrides import _get_current_function_mode_stack
from megatron_kaiyuan.host import cpu_platform

PLACES = (torch, torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.Tensor, torch.nn.Module)

def snapshot():
    return [{name: id(value) for name, value in vars(place).items()} for place in PLACES]
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def assert_runs(code: str) -> None:
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr


def test_a_machine_with_cuda_is_left_exactly_as_it_was() -> None:
    assert_runs(
        SNAPSHOT
        + """
torch.cuda.is_available = lambda: True
before, modules = snapshot(), set(sys.modules)
assert cpu_platform.install() is False
assert not cpu_platform.is_installed()
assert snapshot() == before
assert set(sys.modules) == modules
assert not _get_current_function_mode_stack()
"""
    )


def test_importing_the_module_changes_nothing() -> None:
    assert_runs(
        """
import torch
before = dict(vars(torch.cuda))
from megatron_kaiyuan.host import cpu_platform
assert dict(vars(torch.cuda)) == before and not cpu_platform.is_installed()
"""
    )


def test_installing_twice_changes_nothing_more() -> None:
    assert_runs(
        SNAPSHOT
        + """
import os
assert cpu_platform.install() is True
first, depth = snapshot(), len(_get_current_function_mode_stack())
assert cpu_platform.install() is True
assert snapshot() == first and len(_get_current_function_mode_stack()) == depth == 1
assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
assert "torch._dynamo" not in sys.modules
import torch._dynamo  # an optimizer's first step does; it looks through all of torch's functions
torch._dynamo.trace_rules.get_torch_obj_rule_map()
"""
    )


def test_installing_after_megatron_is_refused() -> None:
    finished = run_python(
        "import megatron.core\nfrom megatron_kaiyuan.host import cpu_platform\ncpu_platform.install()\n"
    )
    assert finished.returncode == 1
    assert "ConfigError: the CPU platform was asked for after megatron.core had been imported" in finished.stderr


def _page_faults(rank: int) -> int:
    """Faults of the kernel's pages while a tensor of 64 MiB is made and freed ten times.

    Not from the first time on: small things may settle in the memory of the first ones.
    """
    cpu_platform.keep_freed_memory()
    for _ in range(30):
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.distributed
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc is the library of C that can be told")
def test_the_memory_of_freed_tensors_is_used_again() -> None:
    """Each would cost 16 384 faults, or 32 where the system gives pages of 2 MiB."""
    assert run_distributed(_page_faults, 1)[0] < 100


def _answers(rank: int) -> None:
    """The questions Megatron asks of CUDA, answered by the CPU."""
    for tensor in (
        torch.zeros(2, device="cuda"),
        torch.ones(2, device=torch.cuda.current_device()),
        torch.arange(2, device=torch.device("cuda", 0)),
        torch.zeros(2).to("cuda"),
        torch.zeros(2).to("cuda", torch.float16, True),
        torch.nn.Linear(2, 2).to("cuda", torch.float16).weight,
        torch.zeros(2).to(torch.device("cuda:0")),
        torch.zeros(2).to(device="cuda", dtype=torch.float16),
        torch.zeros(2).cuda(0),
        torch.zeros(2).pin_memory(),
        torch.nn.Linear(2, 2).cuda(0).weight,
    ):
        assert tensor.device.type == "cpu"
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2, dtype=torch.float16).type() == "torch.cuda.HalfTensor"
    assert torch.zeros(2).type(torch.float16).dtype is torch.float16
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.cuda.device(0):
        torch.cuda.synchronize()
    torch.cuda.nvtx.range_push("work")
    torch.cuda.nvtx.range_pop()


def _swap_random_states(rank: int) -> tuple[list[float], list[float], list[float]]:
    """Megatron's own tracker: what a fork draws must not disturb what the other state draws."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(1)
    undisturbed = torch.rand(2).tolist() + torch.rand(2).tolist()
    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("other", 5)
    outside = torch.rand(2).tolist()
    with tracker.fork("other"):
        inside = torch.rand(2).tolist()
    outside += torch.rand(2).tolist()
    torch.manual_seed(5)
    assert inside == torch.rand(2).tolist()
    return undisturbed, outside, inside


@pytest.mark.distributed
def test_what_is_asked_for_on_cuda_is_made_on_the_cpu() -> None:
    run_distributed(_answers, 1)


@pytest.mark.distributed
def test_megatrons_random_states_swap_without_disturbing_each_other() -> None:
    undisturbed, outside, inside = run_distributed(_swap_random_states, 1)[0]
    assert outside == undisturbed
    assert inside != outside[:2]


def test_packages_whose_code_runs_on_gpus_alone_are_hidden_on_the_cpu(tmp_path: Path) -> None:
    """As in NVIDIA's containers: Megatron would take its final norm and its optimizer from there."""
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("__version__ = '2.12.0'\n")
    code = """
import transformer_engine.pytorch
from megatron_kaiyuan.host import cpu_platform
assert cpu_platform.install()
from megatron.core.extensions import transformer_engine
assert not transformer_engine.HAVE_TE
try:
    import transformer_engine.pytorch
except ImportError:
    print("hidden")
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("hidden\n"), done.stderr
