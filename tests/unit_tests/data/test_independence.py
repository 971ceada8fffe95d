"""The order does not depend on who reads it, from where, with how many workers, or how documents are cut."""

import hashlib
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.data import CurriculumDataset, HeldOutDataset, Plan
from tests.unit_tests.data.tiny import (
    all_samples,
    assert_resumes_anywhere,
    numbered_documents,
    phase_of,
    plan_of,
    write_source,
)

HASH_OF_ORDER = """
import hashlib, sys
from megatron_kaiyuan.data import CurriculumDataset, Plan
order = CurriculumDataset(Plan.load(sys.argv[1]))
print(hashlib.sha256(b"".join(order[s]["tokens"].tobytes() for s in range(len(order)))).hexdigest())
print(order.plan.fingerprint)
"""


def mixed_spec(folder, cuts=(), phases=3):
    """Two scored sources and a plain one, with ties, empty documents, held-out ones, all kinds of phase."""
    sources = {}
    for number, name in enumerate(("web", "code", "books")):
        lengths = [(5 * n * n + 3 * n + number) % 12 for n in range(60)]
        scores = None if name == "books" else [(n * n + n // 3 + number) % 8 for n in range(60)]
        documents = numbered_documents(lengths, 10_000 * number)
        sources[name] = write_source(folder / name, documents, scores, cuts)
    every = [
        phase_of("shuffled", {"web": "all", "code": "random 50%", "books": {"repeat": 1.5}}, "first"),
        phase_of("curriculum", {"web": {"keep": "top 50%", "repeat": 2}, "books": "all"}, "second", tokens=300),
        phase_of("curriculum", {"code": {"keep": "band [20%, 90%)", "repeat": 1.25}, "web": "top 10%"}, "third"),
    ]
    return plan_of(sources, *every[:phases], seq_length=5, validation={"web": {"documents": 4}})


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return mixed_spec(tmp_path_factory.mktemp("mixed") / "data")


@pytest.fixture(scope="module")
def samples(spec):
    return all_samples(spec)


def test_training_may_resume_at_every_sample(spec):
    assert_resumes_anywhere(spec)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_random_access_gives_what_sequential_access_gives(spec, samples, seed):
    order = CurriculumDataset(Plan.from_spec(spec))
    rng = np.random.default_rng(seed)
    for start in rng.integers(0, len(samples), 8):
        for sample in range(int(start), min(int(start) + int(rng.integers(1, 9)), len(samples))):
            assert tuple(order[sample]["tokens"].tolist()) == samples[sample]


def test_blocks_and_single_look_ups_agree_in_a_phase_of_many_blocks(tmp_path):
    sources = {
        "s": write_source(tmp_path / "s", numbered_documents([3] * 1500), range(1500)),
        "t": write_source(tmp_path / "t", numbered_documents([2] * 500, 10_000)),
    }
    for order in ("shuffled", "curriculum"):
        plan = Plan.from_spec(plan_of(sources, phase_of(order, {"s": {"repeat": 1.5}, "t": "all"}), seq_length=2))
        phase = plan.phases[0]
        numbers, windows = phase.block(0, phase.num_samples)
        single = [phase.sample(sample) for sample in range(0, phase.num_samples, 7)]
        assert single == list(zip(numbers[::7].tolist(), windows[::7].tolist(), strict=True))
        dataset = CurriculumDataset(plan)
        for sample in (*range(1020, 1030), 2047, 2048, 2049, 1025, 3):
            assert dataset.source_index(sample) == numbers[sample]


def sampler_indices(total, consumed, micro_batch, rank, ranks):
    """Indices that a data-parallel rank reads: each step takes the next `micro_batch * ranks` samples, rank by rank."""
    step = micro_batch * ranks
    for first in range(consumed, total - step + 1, step):
        yield range(first + rank * micro_batch, first + (rank + 1) * micro_batch)


@settings(deadline=None, max_examples=25)
@given(ranks=st.integers(1, 9), micro_batch=st.integers(1, 5), consumed=st.integers(0, 310))
@example(ranks=1, micro_batch=1, consumed=0)
@example(ranks=8, micro_batch=4, consumed=48)
def test_any_number_of_ranks_and_micro_batch_size_together_read_the_same_order(
    spec, samples, ranks, micro_batch, consumed
):
    batches = []
    for rank in range(ranks):
        order = CurriculumDataset(Plan.from_spec(spec))
        indices = sampler_indices(len(samples), consumed, micro_batch, rank, ranks)
        batches.append([[tuple(order[i]["tokens"].tolist()) for i in batch] for batch in indices])
    read = [sample for step in zip(*batches, strict=True) for batch in step for sample in batch]
    assert read == samples[consumed : consumed + len(read)]
    assert len(samples) - consumed - len(read) < ranks * micro_batch


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_loader_workers_read_the_same_order(spec, samples, start_method):
    loader = torch.utils.data.DataLoader(
        CurriculumDataset(Plan.from_spec(spec)), batch_size=4, num_workers=2, multiprocessing_context=start_method
    )
    read = [tuple(tokens) for batch in loader for tokens in batch["tokens"].tolist()]
    assert read == samples


def test_threads_may_share_a_dataset(tmp_path):
    sources = {"s": write_source(tmp_path / "s", numbered_documents([1] * 6000))}
    spec = plan_of(sources, phase_of("shuffled", {"s": "all"}), seq_length=1)
    samples = all_samples(spec)
    order = CurriculumDataset(Plan.from_spec(spec))
    wrong = []

    def read(first):
        for sample in range(first, 5900, 97):
            if tuple(order[sample]["tokens"].tolist()) != samples[sample]:
                wrong.append(sample)

    threads = [threading.Thread(target=read, args=(first,)) for first in (0, 1000, 2000, 3000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_pickled_dataset_reopens_its_files(spec, samples):
    order = pickle.loads(pickle.dumps(CurriculumDataset(Plan.from_spec(spec))))
    assert tuple(order[17]["tokens"].tolist()) == samples[17]
    held = HeldOutDataset(Plan.from_spec(spec), "web")
    assert np.array_equal(pickle.loads(pickle.dumps(held))[0]["tokens"], held[0]["tokens"])
    assert len(pickle.dumps(order)) < 20_000


@pytest.mark.parametrize("hash_seed", ["0", "77"])
def test_another_process_sees_the_same_order(spec, samples, tmp_path, hash_seed):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    run = subprocess.run(
        [sys.executable, "-c", HASH_OF_ORDER, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
    )
    flat = np.array(samples, dtype=np.int64)
    assert run.stdout.split() == [hashlib.sha256(flat.tobytes()).hexdigest(), Plan.from_spec(spec).fingerprint]


@settings(deadline=None, max_examples=12)
@given(cuts=st.lists(st.integers(0, 60), max_size=12))
@example(cuts=[0, 0, 60, 60])
@example(cuts=list(range(1, 60)))
def test_the_same_documents_in_other_shards_give_the_same_order(spec, samples, tmp_path_factory, cuts):
    recut = mixed_spec(tmp_path_factory.mktemp("recut") / "data", cuts)
    assert all_samples(recut) == samples
    assert Plan.from_spec(recut).fingerprint == Plan.from_spec(spec).fingerprint


@pytest.mark.parametrize(("version", "golden"), [(1, "63d51cba6b361f47"), (2, "3743b03aa82b066a")])
def test_the_order_never_changes_between_releases(spec, version, golden):
    """Golden values: a run resumed under a later release must see the order it began with."""
    flat = np.array(all_samples(spec | {"version": version}), dtype=np.int64)
    assert flat.shape == (315, 6)
    assert hashlib.sha256(flat.astype("<i8").tobytes()).hexdigest()[:16] == golden


def test_nothing_is_written_next_to_the_shards(spec):
    folder = Path(spec["sources"]["web"]["shards"])
    before = sorted(folder.iterdir())
    Plan.from_spec(spec).describe()
    assert sorted(folder.iterdir()) == before
