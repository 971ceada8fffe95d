"""examples/slurm/pretrain.sbatch in a real Slurm of two nodes, on the CPU platform: signalled, queued again, finished.

The script, the launch script and Megatron's loop are those of a cluster run; the model is tiny and the nodes are both
this machine. Slurm's own signal before the time limit comes at a moment of its choosing (docs/slurm.md tells of a run
into the limit), so the test sends that same signal to the batch script at a step of ours.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from megatron_kaiyuan.shards.source import open_source
from tests.functional_tests.local_slurm import NODES, LocalSlurm, local_slurm, missing_programs
from tests.functional_tests.training_run import MODEL_FLAGS, REPOSITORY, TRAINING_FLAGS, Finished, write_corpus
from tests.unit_tests.preprocess.corpus import save_bpe
from tests.unit_tests.quantile.tiny_study import study_content, write_sources

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"no {', '.join(missing_programs())}; tools/dev/install_test_tools.sh installs Slurm",
    ),
]

STEPS = 60
FLAGS = [
    *MODEL_FLAGS,
    *TRAINING_FLAGS,
    *("--num-query-groups", "1", "--kv-channels", "16", "--init-method-std", "0.02", "--padded-vocab-size", "96"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--tokenizer-type", "NullTokenizer"),
    *("--hysteresis", "1"),
]
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    with TemporaryDirectory(prefix="slurm") as folder, local_slurm(Path(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of the other training tests, ten times as long: 60 steps of 8 samples."""
    path = write_corpus(tmp_path_factory.mktemp("corpus"))
    text = path.read_text().replace("tokens: 768", "tokens: 7680")
    path.write_text(text.replace("repeat: 2}", "repeat: 8}").replace("random 40%", "random 40%, repeat: 8"))
    return path


def submit(slurm: LocalSlurm, plan: Path, run: Path, *options: str, **environment: str) -> str:
    """Queue the script as a user would, and return the job's number."""
    run.mkdir()
    nodes = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60", f"--output={run}/out", *options]
    variables = {"PLAN": str(plan), "RUN": str(run), "NPROC_PER_NODE": "1", "MIN_FREE_GB": "1", "OMP_NUM_THREADS": "1"}
    script = ["examples/slurm/pretrain.sbatch", *FLAGS]
    return slurm.run("sbatch", "--parsable", *nodes, *script, cwd=REPOSITORY, **{**variables, **environment})


def logged(run: Path, name: str) -> dict[int, float]:
    return Finished(0, "", run / "tensorboard").logged(name)


def wait_for_text(path: Path, text: str, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"{text!r} is not in {path.read_text()[-3000:]}"
        time.sleep(0.1)


def test_a_job_saves_at_the_signal_queues_itself_again_and_ends_as_if_undisturbed(
    slurm: LocalSlurm, plan: Path, tmp_path: Path
) -> None:
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    job = submit(slurm, plan, disturbed)
    wait_for_text(disturbed / "out", " iteration        3/      60 ", timeout=120)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    # While the ranks save, too: a signal that reached the helpers of a checkpoint would end it.
    wait_for_text(disturbed / "out", "saving checkpoint at iteration", timeout=60)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_text(disturbed / "out", "exiting program after receiving", timeout=60)
    other = submit(slurm, plan, undisturbed)
    for number in (job, other):
        fields = slurm.wait(number, *ENDED, timeout=240)
        assert fields["JobState"] == "COMPLETED", (disturbed / "out").read_text()[-3000:]
    output = (disturbed / "out").read_text()
    assert slurm.job(job)["Restarts"] == "1"
    assert f"start 2 of job {job}" in output
    assert "successfully loaded checkpoint" in output
    for name in ("lm loss", "learning-rate", "loss-scale"):
        expected = logged(undisturbed, name)
        assert logged(disturbed, name) == expected
        assert sorted(expected) == list(range(1, STEPS + 1)), name


def test_the_rendezvous_is_the_first_host_of_the_allocation(slurm: LocalSlurm, plan: Path, tmp_path: Path) -> None:
    job = submit(
        slurm, plan, tmp_path / "run", "--nodes=1", f"--exclude={NODES[0]}", NPROC_PER_NODE="1", MIN_FREE_GB="10000000"
    )
    slurm.wait(job, *ENDED, timeout=60)
    assert f"on {NODES[1]}: rendezvous {NODES[1]}:" in (tmp_path / "run/out").read_text()


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"MIN_FREE_GB": "10000000"}, f"{NODES[1]}: .* GB free, 10000000 GB are asked for"),
        ({"MAX_CLOCK_SECONDS": "0"}, f"{NODES[1]}: its clock says"),
        ({"PLAN": "nowhere.yaml"}, f"{NODES[1]}: the plan nowhere.yaml cannot be read"),
        ({"NPROC_PER_NODE": ""}, "Slurm gave this job no GPUs"),
    ],
)
def test_a_node_that_is_not_fit_stops_the_job_before_training(
    slurm: LocalSlurm, plan: Path, tmp_path: Path, environment: dict[str, str], complaint: str
) -> None:
    job = submit(slurm, plan, tmp_path / "run", **environment)
    assert slurm.wait(job, *ENDED, timeout=60)["JobState"] == "FAILED"
    output = (tmp_path / "run/out").read_text()
    found = subprocess.run(["grep", "-E", complaint], input=output, text=True, capture_output=True, check=False)
    assert found.returncode == 0, output
    assert "iteration" not in output


def test_nodes_that_see_other_data_stop_the_job(slurm: LocalSlurm, plan: Path, tmp_path: Path) -> None:
    """The same path, another file behind it on each node, as where a disk is not shared."""
    for node, seed in zip(NODES, ("7", "8"), strict=True):
        (tmp_path / f"{node}.yaml").write_text(plan.read_text().replace("seed: 7", f"seed: {seed}"))
    prolog = tmp_path / "prolog"  # what it prints is the environment of the task that follows
    prolog.write_text(f"#!/bin/bash\necho export PLAN={tmp_path}/$SLURMD_NODENAME.yaml\n")
    prolog.chmod(0o755)
    job = submit(slurm, plan, tmp_path / "run", SLURM_TASK_PROLOG=str(prolog))
    assert slurm.wait(job, *ENDED, timeout=60)["JobState"] == "FAILED"
    output = (tmp_path / "run/out").read_text()
    assert "the nodes differ" in output
    assert "iteration" not in output


def submit_array(slurm: LocalSlurm, folder: Path, script: str, *flags: str, **environment: str) -> list[str]:
    """Run a script of one node a task as an array of two, to its end, and return what the tasks wrote."""
    options = ["--array=0-1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=0", f"--output={folder}/out-%a"]
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    job = slurm.run("sbatch", "--parsable", *options, script, *flags, cwd=REPOSITORY, **environment)
    outputs = []
    for task in (0, 1):
        fields = slurm.wait(f"{job}_{task}", *ENDED, timeout=240)
        outputs.append((folder / f"out-{task}").read_text())
        assert fields["JobState"] == "COMPLETED", outputs[-1][-3000:]
    return outputs


def test_a_quantile_study_is_trained_and_evaluated_by_an_array(slurm: LocalSlurm, tmp_path: Path) -> None:
    write_sources(tmp_path, names=("good",))
    content = study_content(tmp_path)
    content["sources"] = {"good": content["sources"]["good"]}
    content["slices"]["tops"] = ["0%", "80%"]
    content["training"]["seeds"] = 1
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(content))
    tool = ["tools/quantile_benchmark.py", "slice", str(study)]
    subprocess.run([sys.executable, *tool], cwd=REPOSITORY, check=True, capture_output=True)
    outputs = submit_array(slurm, tmp_path, "examples/quantile/train.sbatch", STUDY=str(study), NUM_TASKS="2")
    assert all("1 trained" in output and "1 run evaluated" in output for output in outputs)
    results = [json.loads(path.read_text()) for path in (tmp_path / "study" / "results").iterdir()]
    assert sorted(result["run"] for result in results) == ["good-top0-seed1", "good-top80-seed1"]


def test_files_are_tokenized_by_an_array(slurm: LocalSlurm, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(4):
        rows = "".join(json.dumps({"text": f"{number} {row}"}) + "\n" for row in range(5))
        (tmp_path / "text" / f"{number}.jsonl").write_text(rows)
    save_bpe(tmp_path / "tokenizer")
    folders = {"INPUT": "text", "OUT": "shards", "TOKENIZER": "tokenizer"}
    variables = {name: str(tmp_path / folder) for name, folder in folders.items()} | {"NUM_TASKS": "2"}
    submit_array(slurm, tmp_path, "examples/slurm/preprocess.sbatch", "--shard-size", "100", **variables)
    assert len(list((tmp_path / "shards").glob("*.idx"))) > 1
    assert open_source("shards", str(tmp_path / "shards")).num_documents == 20
