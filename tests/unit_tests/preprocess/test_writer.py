import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray

from megatron_kaiyuan.errors import ConfigError
from megatron_kaiyuan.preprocess import ShardWriter, optimal_dtype, partial
from megatron_kaiyuan.shards.manifest import Manifest, TokenizerRecord
from tests.unit_tests.preprocess.corpus import read_shard_by_hand


def publish(writer: ShardWriter) -> Manifest:
    files, scores = writer.compose()
    tokenizer = TokenizerRecord(type="NullTokenizer", model=None, vocab_size=9, eod_id=None, fingerprint="0")
    manifest = Manifest(
        documents=writer.documents,
        tokens=writer.tokens,
        dtype=writer.dtype.name,
        max_token_id=writer.max_token_id,
        append_eod=False,
        files=files,
        scores=scores,
        tokenizer=tokenizer,
        inputs=[],
        skipped={},
        json_key="text",
        created_by="test",
    )
    writer.publish(manifest)
    return manifest


def write(prefix: Path, documents: list[list[int]], dtype: type[np.generic], batch: int = 3) -> Manifest:
    with ShardWriter(str(prefix), np.dtype(dtype), overwrite=True) as writer:
        for first in range(0, len(documents), batch):
            part = documents[first : first + batch]
            tokens = np.array([token for document in part for token in document], dtype=dtype)
            writer.append(tokens, np.array([len(document) for document in part], dtype=np.int64))
        return publish(writer)


def write_with_megatron(prefix: Path, documents: list[list[int]], dtype: type[np.generic]) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype=np.int64), [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_bytes_are_those_of_the_megatron_builder(tmp_path: Path, dtype: type[np.generic]) -> None:
    random = np.random.default_rng(7)
    documents = [random.integers(0, 65000, size=random.integers(0, 50)).tolist() for _ in range(100)]
    write(tmp_path / "ours", documents, dtype)
    write_with_megatron(tmp_path / "theirs", documents, dtype)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("mmap", [True, False])
def test_megatron_reads_what_we_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mmap: bool) -> None:  # noqa: FBT001
    monkeypatch.setenv("RANK", "0")  # megatron warns when it has to guess
    documents = [[1, 2, 3], [70000], [5] * 200]
    write(tmp_path / "ours", documents, np.int32)
    dataset = IndexedDataset(str(tmp_path / "ours"), multimodal=False, mmap=mmap)
    assert [dataset[number].tolist() for number in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65499), max_size=12), max_size=40),
    dtype=st.sampled_from([np.int32, np.uint16]),
    batch=st.integers(1, 9),
)
def test_any_documents_come_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: type[np.generic], batch: int
) -> None:
    prefix = tmp_path_factory.getbasetemp() / "round_trip"
    manifest = write(prefix, documents, dtype, batch)
    assert read_shard_by_hand(prefix) == documents
    assert manifest.documents == len(documents)
    assert manifest.tokens == sum(map(len, documents))
    assert manifest.max_token_id == max((token for document in documents for token in document), default=-1)


def test_index_longer_than_one_chunk_matches_megatron(tmp_path: Path) -> None:
    lengths = np.tile(np.arange(3), 100_000)  # 300 000 documents, more than the 262 144 of a chunk
    tokens: NDArray[np.uint16] = np.arange(int(lengths.sum()), dtype=np.uint32).astype(np.uint16)
    with ShardWriter(str(tmp_path / "ours"), np.dtype(np.uint16)) as writer:
        writer.append(tokens, lengths)
        publish(writer)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    builder.sequence_lengths = lengths.tolist()
    builder.document_indices = list(range(len(lengths) + 1))
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 65536, 200_000])
def test_type_of_ids_is_the_one_megatron_chooses(vocab_size: int) -> None:
    assert optimal_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_scores_keep_their_order_and_their_summary(tmp_path: Path) -> None:
    scores = np.array([[0.5, -1], [0.25, 7], [1, 0]], dtype=np.float32)
    with ShardWriter(str(tmp_path / "p"), np.dtype(np.int32), ["a", "b.c"]) as writer:
        for row in scores:
            writer.append(np.ones(2, dtype=np.int32), np.array([2]), row[None])
        manifest = publish(writer)
    stored = [np.load(tmp_path / f"p.scores.{key}.npy") for key in ("a", "b.c")]
    assert all(column.dtype == np.float32 for column in stored)
    assert np.array_equal(np.stack(stored, axis=1), scores)
    assert manifest.scores["b.c"].model_dump() == {"min": -1, "max": 7, "mean": 2}


def test_leaving_without_publishing_leaves_nothing(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "p"), np.dtype(np.int32), ["a"]) as writer:
        writer.append(np.ones(2, dtype=np.int32), np.array([2]), np.ones((1, 1), dtype=np.float32))
        writer.compose()
    assert list(tmp_path.iterdir()) == []


def test_nothing_has_a_final_name_before_publishing(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "p"), np.dtype(np.int32)) as writer:
        writer.append(np.ones(2, dtype=np.int32), np.array([2]))
        assert all(path.name.endswith(".partial") for path in tmp_path.iterdir())
        publish(writer)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "p.bin",
        "p.documents.parquet",
        "p.idx",
        "p.manifest.json",
    ]


def test_two_writers_of_one_shard_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "_PATIENCE", 0.0)
    with (
        ShardWriter(str(tmp_path / "p"), np.dtype(np.int32)),
        pytest.raises(ConfigError, match="another process is writing"),
    ):
        ShardWriter(str(tmp_path / "p"), np.dtype(np.int32))


def test_leftovers_of_a_killed_run_do_not_matter(tmp_path: Path) -> None:
    for name in ("p.bin.partial", "p.idx.partial", "p.lengths.partial"):
        (tmp_path / name).write_bytes(b"torn")
    write(tmp_path / "p", [[1, 2]], np.int32)
    assert read_shard_by_hand(tmp_path / "p") == [[1, 2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "p.bin",
        "p.documents.parquet",
        "p.idx",
        "p.manifest.json",
    ]


def test_existing_shard_is_kept_unless_overwriting(tmp_path: Path) -> None:
    (tmp_path / "p.idx").write_bytes(b"stock")
    with pytest.raises(ConfigError, match=r"p\.idx exists \(without a manifest.*--overwrite"):
        ShardWriter(str(tmp_path / "p"), np.dtype(np.int32))
    assert (tmp_path / "p.idx").read_bytes() == b"stock"


def test_overwriting_removes_the_scores_of_the_earlier_run(tmp_path: Path) -> None:
    for name in ("p.scores.old.npy", "pp.scores.old.npy"):
        (tmp_path / name).write_bytes(b"old")
    write(tmp_path / "p", [[1]], np.int32)
    assert not (tmp_path / "p.scores.old.npy").exists()
    assert (tmp_path / "pp.scores.old.npy").exists()


@pytest.fixture
def own_host(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of this host in partial files, on a file system without locks."""

    def no_locks(_stream: object, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(partial.fcntl, "flock", no_locks)
    return partial.partial_path(Path("s.bin")).name.removeprefix("s.bin.").rpartition("-")[0]


@pytest.mark.parametrize(
    ("writer", "age", "left"),
    [
        ("{host}-999999999", 0.0, False),  # a process of this host that is gone
        ("elsewhere-17", 1000.0, False),  # of another host, and long not written to
        ("elsewhere-17", 0.0, True),  # perhaps alive: neither waited for nor removed
    ],
)
def test_partial_files_on_a_file_system_without_locks(
    tmp_path: Path, own_host: str, writer: str, age: float, *, left: bool
) -> None:
    path = tmp_path / f"s.bin.{writer.format(host=own_host)}.partial"
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    with partial.Ownership(str(tmp_path / "s")) as owned:
        partial.remove_dead_partials(str(tmp_path / "s"), owned)
    assert path.exists() == left


def test_a_living_writer_of_this_host_is_respected_without_locks(
    tmp_path: Path, own_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"s.bin.{own_host}-{os.getppid()}.partial").touch()
    monkeypatch.setattr(partial, "_PATIENCE", 0.0)
    with (
        partial.Ownership(str(tmp_path / "s")) as owned,
        pytest.raises(ConfigError, match="another process is writing"),
    ):
        partial.remove_dead_partials(str(tmp_path / "s"), owned)
