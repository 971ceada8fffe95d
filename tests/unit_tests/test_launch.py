"""The launch scripts: run with stand-ins for torchrun and Slurm, their flags read by Megatron's own parser."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from megatron_kaiyuan.arguments import add_kaiyuan_arguments
from megatron_kaiyuan.data.plan_schema import load_plan_spec

ROOT = Path(__file__).resolve().parents[2]

LAUNCHER = "megatron_kaiyuan.host.torchrun"

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
    for name in ["pretrain_kaiyuan_2b.sh", "slurm/pretrain.sbatch", "slurm/check_node.sh"]:
        target = tmp_path / "a clone/examples" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / "examples" / name).read_text())
    return Workplace(tmp_path / "a clone")


def put_launcher_aside(workplace: Workplace) -> None:
    """Let `python -m LAUNCHER` print its arguments; any other use of python is as it was."""
    others = f'if [ "$2" != {LAUNCHER} ]; then exec {sys.executable} "$@"; fi'
    workplace.program("bin/python", others + r'; shift 2; printf "%s\0" "$@"')


def torchrun_arguments(workplace: Workplace, *flags: str, **environment: str) -> list[str]:
    """What the 2B script hands to the launcher, for four processes where nothing else is said."""
    put_launcher_aside(workplace)
    script = workplace.root / "examples/pretrain_kaiyuan_2b.sh"
    done = subprocess.run(
        ["bash", str(script), *flags],
        env=workplace.environment(**{"NPROC_PER_NODE": "4"} | environment),
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
        env={**os.environ, "WORLD_SIZE": "64", "RANK": "0"},
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
    tokenizer = write_words(workplace.root / "qwen2", 151_646)  # its ids, without those that its models keep unused
    started = torchrun_arguments(
        workplace, "--exit-signal", "SIGUSR1", "--micro-batch-size", "2", TOKENIZER=str(tokenizer)
    )
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
        "save_interval": 1000,
        "kaiyuan_keep_checkpoints": 2,
    }
    assert {name: values[name] for name in shape} == shape
    assert values["micro_batch_size"] == 2, "a flag given to the script must win over the script's own"


def test_the_2b_script_leaves_the_rows_of_another_tokenizer_to_megatron(workplace: Workplace) -> None:
    other = torchrun_arguments(workplace, TOKENIZER=str(write_words(workplace.root / "other", 4096)))
    unknown = torchrun_arguments(workplace, "--tokenizer-type", "NullTokenizer", "--vocab-size", "4096")
    whole = torchrun_arguments(workplace, TOKENIZER=str(write_words(workplace.root / "whole", 151_936)))
    assert [started.count("--padded-vocab-size") for started in (other, unknown, whole)] == [0, 0, 1]


def write_words(folder: Path, count: int) -> Path:
    """A tokenizer of so many words."""
    folder.mkdir()
    words = models.WordLevel({f"w{number}": number for number in range(count)}, unk_token="w0")
    Tokenizer(words).save(str(folder / "tokenizer.json"))
    return folder


def test_the_distribution_of_the_2b_script_comes_from_the_environment(workplace: Workplace) -> None:
    started = torchrun_arguments(workplace, NNODES="4", NODE_RANK="3", MASTER_ADDR="first", NPROC_PER_NODE="2")

    assert started[: started.index("-m")] == [
        *("--nproc_per_node", "2", "--nnodes", "4", "--node_rank", "3"),
        *("--master_addr", "first", "--master_port", "29500"),
    ]


@pytest.mark.parametrize("seen", [3, 0])
def test_each_gpu_that_is_seen_gets_a_process(workplace: Workplace, seen: int) -> None:
    (workplace.root / "torch.py").write_text(f"class cuda:\n    device_count = staticmethod(lambda: {seen})\n")
    put_launcher_aside(workplace)
    script = workplace.root / "examples/pretrain_kaiyuan_2b.sh"
    environment = workplace.environment(PYTHONPATH=str(workplace.root))
    environment.pop("NPROC_PER_NODE", None)
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    if seen:
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("--nproc_per_node\x003\0")
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert "torch sees no GPU on this node: give it some, or set NPROC_PER_NODE" in done.stderr


def test_paths_with_spaces_stay_one_argument(workplace: Workplace) -> None:
    started = torchrun_arguments(workplace, PLAN="my plan.yaml")

    assert started[started.index("--plan") + 1] == "my plan.yaml"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_loss_scale_is_that_of_fp16_alone(workplace: Workplace, precision: str) -> None:
    """Training refuses flags that nothing reads."""
    started = torchrun_arguments(workplace, PRECISION=precision)
    assert f"--{precision}" in started
    scaling = {"--initial-loss-scale", "--min-loss-scale", "--loss-scale-window", "--hysteresis"}
    assert scaling & set(started) == (scaling if precision == "fp16" else set())


def test_all_checkpoints_can_be_kept(workplace: Workplace) -> None:
    assert "--kaiyuan-keep-checkpoints" not in torchrun_arguments(workplace, KEEP_CHECKPOINTS="")


@pytest.mark.parametrize(
    ("first_line", "ignore", "used"),
    [("#!/usr/bin/env bash", "", "venv"), ("#!/host/only/bash", "", "other"), ("#!/usr/bin/env bash", "1", "other")],
    ids=["starts", "of another machine", "not wanted"],
)
def test_the_environment_of_the_checkout_is_used_where_it_starts(
    workplace: Workplace, first_line: str, ignore: str, used: str
) -> None:
    workplace.program(".venv/bin/python", 'if [ "$1" = -m ]; then printf venv; fi')
    ours = workplace.root / ".venv/bin/python"
    ours.write_text(ours.read_text().replace("#!/usr/bin/env bash", first_line))

    started = torchrun_arguments(workplace, KAIYUAN_IGNORE_VENV=ignore)

    assert ("venv" if started == ["venv"] else "other") == used


def test_the_image_ignores_the_environment_of_a_checkout() -> None:
    assert "\nENV KAIYUAN_IGNORE_VENV=1\n" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("free", "used", "complaint"),
    [
        (311, 0, "n1: run has 311 GB free, 312 GB are asked for"),
        (100, 200, "n1: run has 100 GB free, 112 GB are asked for"),
        (56, 300, "n1: run has 56 GB free, 57 GB are asked for"),
        (112, 200, "n1: the plan nowhere.yaml cannot be read"),
    ],
    ids=["first start", "restart", "at the end", "enough"],
)
def test_a_node_asks_for_the_room_that_the_run_still_needs(
    workplace: Workplace, free: int, used: int, complaint: str
) -> None:
    workplace.program("bin/df", f"printf 'Head\\ndisk 1 1 {free}000000 1 /\\n'")
    workplace.program("bin/du", f'echo "{used}000000 $2"')
    checked = subprocess.run(
        ["bash", "-c", 'exec bash examples/slurm/check_node.sh 0 "$EPOCHREALTIME"'],
        env=workplace.environment(SLURMD_NODENAME="n1", PLAN="nowhere.yaml", RUN="run"),
        cwd=workplace.root,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert checked.returncode == 1
    assert checked.stderr.startswith(complaint)


def test_the_sample_plan_of_the_readme_is_a_plan(tmp_path: Path) -> None:
    [sample] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    plan = tmp_path / "plan.yaml"
    plan.write_text(sample)

    rates = [phase.lr for phase in load_plan_spec(plan).phases]

    assert [rate and (rate.start, rate.end) for rate in rates] == [(3.0e-3, 3.0e-3), (3.0e-3, 6.0e-4)]


def test_every_flag_of_ours_is_in_the_table_of_the_documentation() -> None:
    table = (ROOT / "docs/training.md").read_text().split("## Flags of this package")[1].split("\n## ")[0]
    parser = add_kaiyuan_arguments(argparse.ArgumentParser(add_help=False))
    flags = [action.option_strings[0] for action in parser._actions]
    assert len(flags) > 10
    assert [flag for flag in flags if f"`{flag}" not in table] == []


def start_slurm_job(
    workplace: Workplace, training: str, check: str = 'echo "checked $1" >>calls', **environment: str
) -> subprocess.Popen[str]:
    """Run the batch script where `srun` runs the command on this machine, and `training` stands for the ranks."""
    flags = 'flags=; while [[ $1 == --* ]]; do flags+="$1 "; shift; done; echo "${flags}of $SRUN_CPUS_PER_TASK" >>sruns'
    workplace.program("bin/srun", f'{flags}; SLURM_NODEID=1 exec "$@"')
    workplace.program("bin/scontrol", 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" >>calls; fi')
    workplace.program("examples/slurm/check_node.sh", check)
    workplace.program("examples/pretrain_kaiyuan_2b.sh", training)
    return subprocess.Popen(
        ["bash", "examples/slurm/pretrain.sbatch", "--micro-batch-size", "2"],
        env=workplace.environment(
            SLURM_JOB_ID="123456",
            SLURM_JOB_NODELIST="n[1-2]",
            SLURM_JOB_NUM_NODES="2",
            SLURM_GPUS_ON_NODE="8",
            SLURM_CPUS_PER_TASK="64",
            TMPDIR=str(workplace.root),
            **environment,
        ),
        cwd=workplace.root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


# The launcher, which replaces the script. It is Python, because bash may not replace a signal that it inherits ignored.
LISTENING_LAUNCHER = """exec python -c '
import os, signal, sys, time
assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
signal.signal(signal.SIGUSR1, lambda *_: sys.exit({status}))
open("rank.pid", "w").write(str(os.getpid()))
time.sleep(60)
sys.exit(9)'"""


def wait_for_file(path: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    time.sleep(0.2)


@pytest.mark.parametrize(
    ("number", "status", "afterwards"),
    [
        (signal.SIGUSR1, 0, ["requeue 123456"]),
        (signal.SIGUSR1, 128 + signal.SIGUSR1, ["requeue 123456"]),
        (signal.SIGUSR1, 1, []),
        (signal.SIGTERM, 0, []),
    ],
    ids=["saved", "nothing to save yet", "failed to save", "preempted or cancelled"],
)
def test_a_job_near_its_limit_queues_itself_again_once_its_ranks_have_saved(
    workplace: Workplace, number: signal.Signals, status: int, afterwards: list[str]
) -> None:
    job = start_slurm_job(workplace, LISTENING_LAUNCHER.format(status=status))
    wait_for_file(workplace.root / "rank.pid", job)

    job.send_signal(number)

    output, _ = job.communicate(timeout=30)
    calls = (workplace.root / "calls").read_text().splitlines()
    assert job.returncode == status, output
    assert calls == ["checked 8", *afterwards]


@pytest.mark.parametrize(
    ("number", "status", "afterwards"),
    [(signal.SIGUSR1, 0, "requeue 123456\n"), (signal.SIGTERM, 143, "")],
    ids=["time limit", "cancelled"],
)
def test_a_signal_while_the_nodes_are_checked_is_not_lost(
    workplace: Workplace, number: signal.Signals, status: int, afterwards: str
) -> None:
    """It must neither end the script before it can queue itself again nor leave a launcher that nobody tells."""
    job = start_slurm_job(workplace, LISTENING_LAUNCHER.format(status=0), check="touch checking calls; sleep 0.5")
    wait_for_file(workplace.root / "checking", job)

    job.send_signal(number)

    output, _ = job.communicate(timeout=60)
    assert job.returncode == status, output
    assert (workplace.root / "rank.pid").exists() == (status == 0)
    assert (workplace.root / "calls").read_text() == afterwards


def test_the_ranks_of_a_node_get_its_cores_and_the_small_tasks_one(workplace: Workplace) -> None:
    job = start_slurm_job(workplace, "exit 0")
    job.communicate(timeout=30)

    assert (workplace.root / "sruns").read_text().splitlines() == [
        "--ntasks-per-node=1 --cpus-per-task=1 of 64",
        "--kill-on-bad-exit=1 of 64",
    ]


@pytest.mark.parametrize(("given", "run"), [({}, "job-123456 allow"), ({"WANDB_RUN_ID": "mine"}, "mine allow")])
def test_all_starts_of_a_job_are_one_wandb_run(workplace: Workplace, given: dict[str, str], run: str) -> None:
    job = start_slurm_job(workplace, 'echo "$WANDB_RUN_ID $WANDB_RESUME"', **given)

    assert job.communicate(timeout=30)[0].splitlines()[-1] == run


def test_each_node_gets_its_rank_and_the_first_host(workplace: Workplace) -> None:
    job = start_slurm_job(workplace, 'echo "$NNODES $NODE_RANK $NPROC_PER_NODE $MASTER_ADDR $MASTER_PORT $*"')

    output, _ = job.communicate(timeout=30)

    started, *_, ranks = output.splitlines()
    assert started == "start 1 of job 123456 on n[1-2]: rendezvous first:23456, 8 processes a node"
    assert ranks == "2 1 8 first 23456 --micro-batch-size 2"
    assert job.returncode == 0


def test_a_failed_run_fails_the_job_and_is_not_queued_again(workplace: Workplace) -> None:
    job = start_slurm_job(workplace, "exit 7")
    job.communicate(timeout=30)

    assert job.returncode == 7
    assert "requeue" not in (workplace.root / "calls").read_text()
