"""Memory while reading: flat over an epoch, and one index for all loader workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_kaiyuan.data import open_source
from megatron_kaiyuan.documents.rank_index import index_path, write_rank_index
from tests.unit_tests.data.tiny import phase_of, plan_of, write_shard

ROOT = Path(__file__).parents[3]
SHARDS = 200
DOCUMENTS = 3_000_000


def run_child(script, *args):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY + script, *map(str, args)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MEMORY = """
import json, multiprocessing, resource, sys
from pathlib import Path
import numpy as np
from megatron_kaiyuan.data import CurriculumDataset

def own_kib():
    "Memory that no other process shares and that is no cache of a file."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def maps_of(folder):
    "Mapped and private KiB of the files of a folder."
    mapped = private = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = folder in line
        elif inside and line.startswith("Rss"):
            mapped += int(line.split()[1])
        elif inside and line.startswith("Private_Dirty"):
            private += int(line.split()[1])
    return mapped, private
"""

EPOCH = """
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
order = CurriculumDataset(sys.argv[1])
own, files = [], []
for sample in range(len(order)):
    assert len(order[sample]["tokens"]) == 17
    if sample % (len(order) // 8) == 0:
        own.append(own_kib())
        files.append(sum(1 for line in open("/proc/self/maps") if sys.argv[2] in line))
print(json.dumps({"samples": len(order), "own": own, "files": files}))
"""


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_memory_is_flat_over_an_epoch_of_more_shards_than_maps_may_stay_open(tmp_path, order):
    """200 shards where at most 64 maps stay open; the first eighth of the epoch is for caches to fill."""
    folder = tmp_path / "s"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        documents = [[number] * length for length in rng.integers(1, 40, 60).tolist()]
        write_shard(folder / f"part-{number:03}", documents, rng.random(60).tolist())
    plan = tmp_path / "plan.yaml"
    spec = plan_of({"s": {"shards": str(folder), "score": "score"}}, phase_of(order, {"s": "all"}), seq_length=16)
    plan.write_text(yaml.safe_dump(spec, sort_keys=False))
    told = run_child(EPOCH, plan, folder)
    assert told["samples"] > 10_000
    assert max(told["files"]) <= 64, "of 401 files"
    assert max(told["own"][2:]) - told["own"][1] < 1024, told["own"]


WORKERS = """
def work(order, results):
    before = own_kib()
    for sample in np.random.default_rng(0).integers(0, len(order), 3000).tolist():
        order[sample]
    results.put((own_kib() - before, *maps_of(sys.argv[2])))

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    order = CurriculumDataset(sys.argv[1])
    before = own_kib()
    order.plan.describe()
    results = context.SimpleQueue()
    workers = [context.Process(target=work, args=(order, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    told = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    print(json.dumps({"opened": own_kib() - before, "workers": told}))
"""


@pytest.fixture(scope="module")
def large_plan(tmp_path_factory):
    """Three million documents of four tokens: 60 MB of `.idx`, 13 MB of rank index, 48 MB of `.bin` (a hole)."""
    folder = tmp_path_factory.mktemp("large")
    prefix = write_shard(folder / "web", [])
    header = Path(f"{prefix}.idx").read_bytes()[:18] + np.array([DOCUMENTS, DOCUMENTS + 1], np.uint64).tobytes()
    with Path(f"{prefix}.idx").open("wb") as index:
        index.write(header)
        for array in (np.full(DOCUMENTS, 4, np.int32), 16 * np.arange(DOCUMENTS), np.arange(DOCUMENTS + 1)):
            index.write(array.data)
    with Path(f"{prefix}.bin").open("wb") as tokens:
        tokens.truncate(16 * DOCUMENTS)
    np.save(f"{prefix}.scores.score.npy", np.random.default_rng(0).random(DOCUMENTS, dtype=np.float32))
    source = open_source("web", prefix)
    write_rank_index(source, "score", index_path(source, "score"))
    plan = folder / "plan.yaml"
    sources = {"web": {"shards": prefix, "score": "score"}}
    phase = phase_of("curriculum", {"web": {"keep": "top 80%", "repeat": 2.5}})
    plan.write_text(yaml.safe_dump(plan_of(sources, phase, seq_length=256), sort_keys=False))
    yield plan
    for path in folder.iterdir():
        path.unlink()


def test_workers_share_the_index_and_copy_none_of_it(large_plan):
    """Each worker touches most of the files; what it has of them is page cache, and its own memory grows by less."""
    told = run_child(WORKERS, large_plan, large_plan.parent)
    for own, mapped, private in told["workers"]:
        assert mapped > 40_000, "KiB of the files"
        assert private == 0
        assert own < 4_096, "KiB; a copy of the documents' order alone would be 12 000"
    assert told["opened"] < 4_096
