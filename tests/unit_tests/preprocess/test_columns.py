"""A column of any Parquet type is read, or named with its type, whatever else is installed."""

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_kaiyuan.errors import PreprocessError
from tests.unit_tests.preprocess.corpus import build, read_shard_by_hand

NUMBERS: dict[str, tuple[pa.Array, list[float]]] = {
    "decimal": (pa.array([Decimal("0.10"), Decimal("-2.5")]), [0.1, -2.5]),
    "decimal256": (pa.array([Decimal("0.10"), Decimal("7")], pa.decimal256(50, 10)), [0.1, 7]),
    "half": (pa.array(np.array([0.5, 2], dtype=np.float16)), [0.5, 2]),
    "text": (pa.array(["0.5", " -1e3 "]), [0.5, -1000]),
    "dictionary": (pa.array(["0.5", "2"]).dictionary_encode(), [0.5, 2]),
    "uint64": (pa.array([2**53, 5], pa.uint64()), [2.0**53, 5]),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_number_of_any_column_type_is_a_score(tmp_path: Path, kind: str) -> None:
    column, wanted = NUMBERS[kind]
    pq.write_table(pa.table({"text": ["1", "2"], "score": column}), tmp_path / "a.parquet")
    build([tmp_path / "a.parquet"], tmp_path / "out", score_keys=("score",))
    assert np.load(tmp_path / "out_text_document.scores.score.npy") == pytest.approx(wanted)


OTHERS: dict[str, tuple[pa.Array, str]] = {
    "truth": (pa.array([True]), "the truth value True"),
    "time": (pa.array([1], pa.timestamp("ns")), r"timestamp\[ns\]"),
    "date": (pa.array([datetime(2026, 1, 1, tzinfo=UTC).date()]), "date"),
    "list": (pa.array([[1.0]]), r"the array \[1.0\]"),
    "words": (pa.array(["high"]), "the text 'high'"),
    "hexadecimal": (pa.array(["0x10"]), "the text '0x10'"),
    "underscores": (pa.array(["1_000"]), "the text '1_000'"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_column_of_another_type_is_named(tmp_path: Path, kind: str) -> None:
    column, told = OTHERS[kind]
    pq.write_table(pa.table({"text": ["1"], "score": column}), tmp_path / "a.parquet")
    with pytest.raises(PreprocessError, match=rf"a\.parquet:1: score 'score' is .*{told}.* instead of a number"):
        build([tmp_path / "a.parquet"], tmp_path / "out", score_keys=("score",))


@pytest.mark.parametrize("unit", ["ns", "us", "ms"])
def test_a_moment_beside_the_text_in_a_nested_field_is_no_obstacle(tmp_path: Path, unit: str) -> None:
    document = pa.StructArray.from_arrays(
        [pa.array(["1", "2", None]), pa.array([1, None, 3], pa.timestamp(unit))],
        names=["text", "at"],
        mask=pa.array([False, False, True]),
    )
    pq.write_table(pa.table({"document": document}), tmp_path / "a.parquet")
    assert build([tmp_path / "a.parquet"], tmp_path / "out", json_keys=("document.text",), on_error="skip").skipped == {
        "missing_key": 1
    }
    assert read_shard_by_hand(next(tmp_path.glob("out_*.bin")).with_suffix("")) == [[1], [2]]
    with pytest.raises(
        PreprocessError, match=rf"'document.at' holds a cell of type timestamp\[{unit}\] instead of text"
    ):
        build([tmp_path / "a.parquet"], tmp_path / "two", json_keys=("document.at",))


def test_texts_and_maps_of_any_column_type_are_read(tmp_path: Path) -> None:
    table = pa.table(
        {
            "view": pa.array(["1", "2"], pa.string_view()),
            "large": pa.array(["3", "4"], pa.large_string()),
            "bytes": pa.array([b"5", b"6"]),
            "metadata": pa.array([[("quality", "0.5")], [("quality", "1.5")]], pa.map_(pa.string(), pa.string())),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    build(
        [tmp_path / "a.parquet"],
        tmp_path / "o",
        json_keys=("view", "large", "bytes"),
        score_keys=("metadata.quality",),
    )
    assert [read_shard_by_hand(f"{tmp_path}/o_{key}_document") for key in ("view", "large", "bytes")] == [
        [[1], [2]],
        [[3], [4]],
        [[5], [6]],
    ]
    assert np.load(tmp_path / "o_view_document.scores.metadata.quality.npy").tolist() == [0.5, 1.5]
