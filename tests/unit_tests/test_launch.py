"""The launch scripts: run with stand-ins for torchrun and Slurm, their flags read by Megatron's own parser."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What Megatron understood of a command line, without its own checks of the machine.
READ_FLAGS = """
import json, sys, warnings
warnings.simplefilter("ignore")
from megatron.training.arguments import parse_args
from megatron_kaiyuan.arguments import add_kaiyuan_arguments
args = parse_args(extra_args_provider=add_kaiyuan_arguments)
print("ARGS", json.dumps({name: value for name, value in vars(args).items() if isinstance(value, int | float | str)}))
"""


@dataclass
class Workplace:
    """A folder with copies of the launch scripts, and a PATH on which programs are replaced."""

    root: Path

    def program(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER", "NODE"))}
        return {**kept, "PATH": f"{self.root / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}", **more}


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    for name in ["pretrain_kaiyuan_2b.sh", "slurm/pretrain.sbatch"]:
        target = tmp_path / "a clone/examples" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / "examples" / name).read_text())
    return Workplace(tmp_path / "a clone")


def torchrun_arguments(workplace: Workplace, *flags: str, **environment: str) -> list[str]:
    """What the example script would start."""
    workplace.program("bin/torchrun", r'printf "%s\0" "$@"')
    script = workplace.root / "examples/pretrain_kaiyuan_2b.sh"
    done = subprocess.run(
        ["bash", str(script), *flags],
        env=workplace.environment(**environment),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.rstrip("\0").split("\0")


def megatron_reads(flags: list[str]) -> dict[str, object]:
    """The values of Megatron's parser with our flags added; refuses an unknown flag."""
    done = subprocess.run(
        [sys.executable, "-c", READ_FLAGS, *flags],
        env={**os.environ, "WORLD_SIZE": "64", "RANK": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("ARGS "))
    values: dict[str, object] = json.loads(line.removeprefix("ARGS "))
    return values


def test_megatron_reads_the_2b_script_as_the_recipe_says(workplace: Workplace) -> None:
    started = torchrun_arguments(workplace, "--exit-signal", "SIGUSR1", "--micro-batch-size", "2")
    flags = started[started.index("megatron_kaiyuan.pretrain") + 1 :]

    values = megatron_reads(flags)

    shape = {
        "num_layers": 28,
        "hidden_size": 2048,
        "ffn_hidden_size": 6144,
        "num_attention_heads": 16,
        "num_query_groups": 8,
        "kv_channels": 128,
        "padded_vocab_size": 151936,
        "seq_length": 4096,
        "rotary_base": 10000,
        "global_batch_size": 2048,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "fp16": True,
        "qk_layernorm": True,
        "kaiyuan_sandwich_norm": True,
        "kaiyuan_logit_softcap": 30.0,
    }
    assert {name: values[name] for name in shape} == shape
    assert values["micro_batch_size"] == 2, "a flag given to the script must win over the script's own"


def test_the_distribution_of_the_2b_script_comes_from_the_environment(workplace: Workplace) -> None:
    started = torchrun_arguments(workplace, NNODES="4", NODE_RANK="3", MASTER_ADDR="first", NPROC_PER_NODE="2")

    assert started[: started.index("-m")] == [
        *("--nproc_per_node", "2", "--nnodes", "4", "--node_rank", "3"),
        *("--master_addr", "first", "--master_port", "29500"),
    ]


def test_paths_with_spaces_stay_one_argument(workplace: Workplace) -> None:
    started = torchrun_arguments(workplace, PLAN="my plan.yaml")

    assert started[started.index("--plan") + 1] == "my plan.yaml"


def start_slurm_job(workplace: Workplace, training: str) -> subprocess.Popen[str]:
    """Run the batch script where `srun` runs the command on this machine, and `training` stands for the ranks."""
    workplace.program("bin/srun", 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=1 exec "$@"')
    workplace.program("bin/scontrol", 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" >>calls; fi')
    workplace.program("examples/slurm/check_node.sh", 'echo "checked $1" >>calls')
    workplace.program("examples/pretrain_kaiyuan_2b.sh", training)
    return subprocess.Popen(
        ["bash", "examples/slurm/pretrain.sbatch", "--micro-batch-size", "2"],
        env=workplace.environment(
            SLURM_JOB_ID="123456",
            SLURM_JOB_NODELIST="n[1-2]",
            SLURM_JOB_NUM_NODES="2",
            SLURM_GPUS_ON_NODE="8",
            TMPDIR=str(workplace.root),
        ),
        cwd=workplace.root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


# torchrun, which ignores USR1, with one rank that listens to it as Megatron does. The rank is Python, because bash may
# not replace a signal that it inherits ignored.
LISTENING_RANK = """python -c '
import os, signal, sys, time
assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
signal.signal(signal.SIGUSR1, lambda *_: sys.exit({status}))
open("rank.pid", "w").write(str(os.getpid()))
time.sleep(60)
sys.exit(9)' &
wait $!"""


@pytest.mark.parametrize(("status", "afterwards"), [(0, ["requeue 123456"]), (1, [])], ids=["saved", "failed to save"])
def test_a_job_near_its_limit_queues_itself_again_once_its_ranks_have_saved(
    workplace: Workplace, status: int, afterwards: list[str]
) -> None:
    job = start_slurm_job(workplace, LISTENING_RANK.format(status=status))
    deadline = time.monotonic() + 30
    while not (workplace.root / "rank.pid").exists():
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    time.sleep(0.2)

    job.send_signal(signal.SIGUSR1)

    output, _ = job.communicate(timeout=30)
    calls = (workplace.root / "calls").read_text().splitlines()
    assert job.returncode == status, output
    assert calls == ["checked 8", *afterwards]


def test_each_node_gets_its_rank_and_the_first_host(workplace: Workplace) -> None:
    job = start_slurm_job(workplace, 'echo "$NNODES $NODE_RANK $NPROC_PER_NODE $MASTER_ADDR $MASTER_PORT $*"')

    output, _ = job.communicate(timeout=30)

    started, *_, ranks = output.splitlines()
    assert started == "start 1 of job 123456 on n[1-2]: rendezvous first:23456, 8 processes a node"
    assert ranks == "2 1 8 first 23456 --exit-signal SIGUSR1 --micro-batch-size 2"
    assert job.returncode == 0


def test_a_failed_run_fails_the_job_and_is_not_queued_again(workplace: Workplace) -> None:
    job = start_slurm_job(workplace, "exit 7")
    job.communicate(timeout=30)

    assert job.returncode == 7
    assert "requeue" not in (workplace.root / "calls").read_text()
