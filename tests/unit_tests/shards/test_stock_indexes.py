"""Shards of Megatron's own tool: boundaries without a sequence, several sequences in a document, their scores."""

import hashlib
import struct
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_kaiyuan.data import CurriculumDataset, Plan, open_source
from megatron_kaiyuan.errors import RankIndexError, ScoreError, ShardError
from megatron_kaiyuan.inspection.describe import describe_source
from megatron_kaiyuan.inspection.verify import verify_shards
from megatron_kaiyuan.reporting.shards_table import source_facts
from megatron_kaiyuan.shards import index_check
from megatron_kaiyuan.shards.score_import import import_scores, read_scores
from tests.unit_tests.data.tiny import numbered_documents, phase_of, plan_of, write_manifest, write_shard


def write_stock(prefix: Path, documents: list[list[int]]) -> str:
    """A shard of documents that each hold sequences of these lengths, every token another one, by the format's text."""
    lengths = [length for document in documents for length in document]
    tokens = np.arange(sum(lengths), dtype=np.int32)
    pointers = 4 * (np.cumsum([0, *lengths])[:-1])
    boundaries = np.cumsum([0, *map(len, documents)])
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, len(lengths), len(boundaries))
    parts = [np.array(lengths, np.int32), pointers.astype(np.int64), boundaries.astype(np.int64)]
    Path(f"{prefix}.idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    return str(prefix)


DOCUMENTS = [[3], [], [2, 4], [], [5]]
SEQUENCES = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9, 10, 11, 12, 13]]


def plan(prefix: str, **source: Any) -> Plan:
    order = "curriculum" if source else "shuffled"
    return Plan.from_spec(plan_of({"s": {"shards": prefix, **source}}, phase_of(order, {"s": "all"}), seq_length=2))


def test_each_sequence_is_a_document_of_a_plan_and_boundaries_without_one_are_passed_over(tmp_path: Path) -> None:
    prefix = write_stock(tmp_path / "s", DOCUMENTS)
    order = CurriculumDataset(plan(prefix))
    segments = {
        (segment.document, segment.start, segment.stop)
        for sample in range(len(order))
        for segment in order.provenance(sample).segments
    }
    assert {document for document, _, _ in segments} == {0, 1, 2, 3}
    assert max(stop for document, _, stop in segments if document == 2) <= 4
    described = describe_source("s", prefix)
    assert (described["documents"], described["index_documents"], described["findings"]) == (4, 5, [])
    assert dict(source_facts(described))["sequences"].startswith("4 sequences in 5 documents; ")
    assert verify_shards(prefix).findings == []


def test_scores_of_documents_are_spread_over_their_sequences(tmp_path: Path) -> None:
    prefix = write_stock(tmp_path / "s", DOCUMENTS)
    source = open_source("s", prefix)
    np.save(tmp_path / "documents.npy", np.array([5.0, 99, 1, 98, 3]))
    import_scores(source, str(tmp_path / "documents.npy"), "q")
    assert source.load_scores("q").tolist() == [5, 1, 1, 3]
    np.save(tmp_path / "sequences.npy", np.array([1.0, 4, 3, 2]))
    import_scores(source, str(tmp_path / "sequences.npy"), "q")
    assert source.load_scores("q").tolist() == [1, 4, 3, 2]
    order = CurriculumDataset(plan(prefix, score="q"))
    assert order[len(order) - 1]["tokens"].tolist()[-2:] == [3, 4]
    np.save(f"{prefix}.scores.q.npy", np.array([5.0, 99, 1, 98, 3]))
    with pytest.raises(ScoreError, match=r"5 scores, one for each document.*hold 4 sequences .*rank_data\.py --scores"):
        plan(prefix, score="q")


def test_as_many_sequences_as_documents_that_do_not_pair_up_are_no_place_for_scores(tmp_path: Path) -> None:
    prefix = write_stock(tmp_path / "s", [[3], [], [2, 4], [5]])
    assert plan(prefix).num_samples == 6
    np.save(tmp_path / "s.npy", np.zeros(4))
    with pytest.raises(ScoreError, match=r"not one each \(the first other one is document 1\)"):
        import_scores(open_source("s", prefix), str(tmp_path / "s.npy"), "q")
    assert [finding.kind for finding in verify_shards(prefix).findings] == ["index"]


def what_is_read(prefix: str) -> object:
    """All samples of a plan over a shard, and what its scores would be."""
    order = CurriculumDataset(plan(prefix, score="score"))
    return [order[sample]["tokens"].tolist() for sample in range(len(order))], order.plan.fingerprint


@pytest.mark.parametrize("manifest", [True, False])
def test_no_flipped_bit_of_an_index_is_an_error_without_a_name_or_changes_what_is_read(
    tmp_path: Path,
    manifest: bool,  # noqa: FBT001
) -> None:
    prefix = write_shard(tmp_path / "s", numbered_documents([3, 4, 5]), [1, 2, 3])
    path = Path(f"{prefix}.idx")
    whole = path.read_bytes()
    if manifest:
        record = {"name": path.name, "bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
        write_manifest(prefix, files={"idx": record})
    expected, silent = what_is_read(prefix), set()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert what_is_read(prefix) == expected
            silent.add(bit // 8)
        except ShardError as error:
            assert f"{prefix}.idx" in str(error)  # noqa: PT017
    boundaries = len(whole) - 8 * 4
    assert not silent if manifest else min(silent) >= boundaries  # which nothing but an import of scores reads


def test_damage_in_an_index_too_large_to_read_in_whole_is_named_where_it_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_check, "CHECKED_BYTES", 0)
    prefix = write_shard(tmp_path / "s", numbered_documents([3] * 400), range(400))
    path = Path(f"{prefix}.idx")
    whole = path.read_bytes()
    expected = what_is_read(prefix)
    for byte in np.random.default_rng(0).integers(34, len(whole) - 8 * 401, 60).tolist():
        damaged = bytearray(whole)
        damaged[byte] ^= 0x80
        path.write_bytes(damaged)
        try:
            what_is_read(prefix)
        except (ShardError, RankIndexError) as error:
            assert path.name in str(error) or prefix in str(error)  # noqa: PT017
    path.write_bytes(whole)
    assert what_is_read(prefix) == expected


NUMBERS: dict[str, tuple[pa.Array, list[float]]] = {
    "decimal": (pa.array([Decimal("0.10"), Decimal("0.20")]), [0.1, 0.2]),
    "whole decimal": (pa.array([Decimal(2**53 - 1), Decimal(2**53)]), [2**53 - 1, 2**53]),
    "text": (pa.array(["0.5", "-1e3"]), [0.5, -1000]),
    "dictionary": (pa.array([2.5, 1.5]).dictionary_encode(), [2.5, 1.5]),
    "half": (pa.array(np.array([0.5, 2], np.float16)), [0.5, 2]),
    "nested": (pa.array([{"quality": 1.5}, {"quality": 0.5}]), [1.5, 0.5]),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_parquet_column_of_any_number_type_is_read(tmp_path: Path, kind: str) -> None:
    column, wanted = NUMBERS[kind]
    pq.write_table(pa.table({"a": column}), tmp_path / "scores:1.pq")
    name = "a.quality" if kind == "nested" else "a"
    assert read_scores(f"{tmp_path}/scores:1.pq:{name}") == pytest.approx(wanted, abs=0)


REFUSED: dict[str, tuple[pa.Array, str]] = {
    "null": (pa.array([1.0, None]), "has 1 null, the first in row 1"),
    "null inside": (pa.array([{"q": 1.0}, None]), "has 1 null"),
    "truth": (pa.array([True, False]), "is of type bool, which is not a number"),
    "time": (pa.array([1, 2], pa.timestamp("ns")), r"is of type timestamp\[ns\]"),
    "words": (pa.array(["1", "high"]), "does not hold numbers"),
    "beyond": (pa.array([Decimal(2**60) + Decimal("0.5"), Decimal(1)]), r"beyond 2\^53"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_parquet_column_is_named(tmp_path: Path, kind: str) -> None:
    pq.write_table(pa.table({"a": REFUSED[kind][0]}), tmp_path / "s.parquet")
    with pytest.raises(ScoreError, match=f"--scores .*{REFUSED[kind][1]}"):
        read_scores(f"{tmp_path}/s.parquet:{'a.q' if kind == 'null inside' else 'a'}")


def test_a_parquet_file_without_a_column_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"], "m": [{"q": 1.0}], "a:b": [2.0]}), tmp_path / "s.parquet")
    for column in ("", ":", ":nothing"):
        with pytest.raises(ScoreError, match=r"give FILE\.parquet:COLUMN \(it has text, m\.q, a:b\)"):
            read_scores(f"{tmp_path}/s.parquet{column}")
    assert read_scores(f"{tmp_path}/s.parquet:a:b").tolist() == [2]
    np.savez(tmp_path / "a.npz", np.zeros(1))
    with pytest.raises(ScoreError, match="an archive"):
        read_scores(str(tmp_path / "a.npz"))
