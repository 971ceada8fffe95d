"""Spawned workers map the files themselves: no pickle holds what a file holds, whatever was read before."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_kaiyuan.data import CurriculumDataset, HeldOutDataset, Plan, open_source
from megatron_kaiyuan.documents.rank_index import build_rank_index, index_path, open_rank_index, write_rank_index
from megatron_kaiyuan.errors import RankIndexError
from tests.unit_tests.data.tiny import phase_of, plan_of, write_shard

ROOT = Path(__file__).parents[3]
DOCUMENTS = 400_000
FEW_BYTES = 16_000
"""Far below any array of the source: its scores alone have 1.6 MB."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """400 000 documents of three tokens in two shards; a plan whose maps have all been used."""
    folder = tmp_path_factory.mktemp("pickles")
    half = DOCUMENTS // 2
    for number in range(2):
        scores = np.random.default_rng(number).random(half)
        write_shard(folder / f"s{number}", np.arange(3 * half).reshape(-1, 3), scores)
    source = open_source("s", str(folder))
    write_rank_index(source, "score", index_path(source, "score"))
    phase = phase_of("curriculum", {"s": {"keep": "top 80%", "repeat": 1.5}})
    spec = plan_of(
        {"s": {"shards": str(folder), "score": "score"}}, phase, seq_length=64, validation={"s": {"documents": 90}}
    )
    plan = Plan.from_spec(spec)
    order = CurriculumDataset(plan)
    for sample in range(0, len(order), 97):
        order[sample]
        order.band_tokens(sample)
    _ = plan.fingerprint
    return plan


def parts_of(plan):
    source = plan.opened["s"].source
    return {
        "dataset": CurriculumDataset(plan),
        "held-out dataset": HeldOutDataset(plan, "s"),
        "plan": plan,
        "source": source,
        "shard": source.shards[0],
        "rank index": plan.opened["s"].ranked_order.index,
    }


@pytest.mark.parametrize("name", [
    "dataset", "held-out dataset", "plan", "source", "shard", "rank index",
])  # fmt: skip
def test_a_pickle_is_small_and_gives_the_same_back(opened, name):
    part = parts_of(opened)[name]
    raw = pickle.dumps(part)
    assert len(raw) < FEW_BYTES
    again = pickle.loads(raw)
    if name == "plan":
        assert again.fingerprint == part.fingerprint
    elif name == "source":
        assert (again.load_lengths() == part.load_lengths()).all()
        assert (again.scores_of("score", np.arange(9)) == part.scores_of("score", np.arange(9))).all()
    elif name == "shard":
        assert again == part
        assert (again.token_data == part.token_data).all()
    elif name == "rank index":
        assert (again.order == part.order).all()
        assert (again.token_marks == part.token_marks).all()
    else:
        assert (again[3]["tokens"] == part[3]["tokens"]).all()


def test_an_index_that_lies_in_memory_is_pickled_as_it_is(opened):
    index = build_rank_index(opened.opened["s"].source, "score")
    again = pickle.loads(pickle.dumps(index))
    assert (again.order == index.order).all()
    assert (again.seed, again.digest, again.path) == (index.seed, index.digest, None)


def test_an_index_that_was_built_again_meanwhile_is_not_taken_for_the_one_before(tmp_path):
    write_shard(tmp_path / "s", [[1, 2]] * 9, range(9))
    source = open_source("s", str(tmp_path / "s"))
    path = index_path(source, "score")
    write_rank_index(source, "score", path)
    raw = pickle.dumps(open_rank_index(path, source, "score"))
    write_rank_index(source, "score", path, seed=1)
    with pytest.raises(RankIndexError, match=r"s\.score\.rank: built again while it was in use"):
        pickle.loads(raw)


def test_a_simulated_plan_is_simulated_again():
    source = {"shards": "none", "score": "score", "expected": {"documents": 10**9, "tokens": 10**12}}
    plan = Plan.from_spec(plan_of({"s": source}, phase_of("shuffled", {"s": "all"})), simulate=True)
    assert plan.simulated
    assert pickle.loads(pickle.dumps(plan)).describe() == plan.describe()


CHILD = """
import json, multiprocessing, pickle, sys, tracemalloc
from pathlib import Path

def work(raw, folder, results):
    import numpy as np
    import megatron_kaiyuan.data
    np.random.default_rng(0).integers(0, 9, 4000).sum()  # what a first use loads
    tracemalloc.start()
    plan, source, index = pickle.loads(raw)
    order = megatron_kaiyuan.data.CurriculumDataset(plan)
    for sample in np.random.default_rng(0).integers(0, len(order), 4000).tolist():
        order[sample]
    total = int(index.order.max()) + int(source.lengths(np.arange(0, source.num_documents, 40)).sum())
    arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)  # numpy's own memory: no mapped file, no module
    own = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces)
    results.put((own // 1024, Path("/proc/self/maps").read_text().count(folder), total))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    raw = Path(sys.argv[1]).read_bytes()
    workers = [context.Process(target=work, args=(raw, sys.argv[2], results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    measured = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    print(json.dumps(measured))
"""


def test_spawned_workers_map_the_files_and_copy_none(opened, tmp_path):
    source, index = opened.opened["s"].source, opened.opened["s"].ranked_order.index
    (tmp_path / "raw").write_bytes(pickle.dumps((opened, source, index)))
    (tmp_path / "child.py").write_text(CHILD)
    folder = str(Path(source.shards[0].prefix).parent)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "child.py"), str(tmp_path / "raw"), folder],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for own, maps, total in json.loads(done.stdout):
        assert total == DOCUMENTS - 1 + 3 * (DOCUMENTS // 40)
        assert maps >= 6, "two .idx, two .bin, the rank index; some twice"
        assert own < 1_000, "KiB (182 without a copy); the two .idx alone have 7 800, all files 15 000"
