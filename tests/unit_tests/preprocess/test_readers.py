import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.errors import PreprocessError
from megatron_kaiyuan.preprocess import readers
from megatron_kaiyuan.preprocess.documents import parse_block
from megatron_kaiyuan.preprocess.fields import FieldKeys
from megatron_kaiyuan.preprocess.inputs import Part, find_inputs
from megatron_kaiyuan.preprocess.readers import ByteRange, Lines, lines_of, read_blocks


def parts(path: Path) -> list[Part]:
    return [Part(file) for file in find_inputs([str(path)])[0]]


def read_all_lines(path: Path, block_bytes: int) -> list[bytes]:
    lines = []
    for block in read_blocks(parts(path), ["text"], block_bytes):
        assert isinstance(block.payload, ByteRange | Lines)
        lines += lines_of(block.payload).lines
    return lines


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=9).map(lambda line: b"x" + line.replace(b"\n", b"")), max_size=12),
    ends_with_newline=st.booleans(),
    block_bytes=st.integers(1, 40),
    compression=st.sampled_from(["", "gzip", "zstd"]),
)
def test_every_line_is_in_exactly_one_block(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    ends_with_newline: bool,  # noqa: FBT001
    block_bytes: int,
    compression: str,
) -> None:
    data = b"\n".join(lines) + (b"\n" if ends_with_newline and lines else b"")
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(
        {"": data, "gzip": gzip.compress(data), "zstd": pa.Codec("zstd").compress(data, asbytes=True)}[compression]
    )
    assert read_all_lines(path, block_bytes) == lines


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=10),
    ends_with_newline=st.booleans(),
    block_bytes=st.integers(1, 12),
    compression=st.sampled_from(["", "gzip", "zstd"]),
)
def test_exactly_the_lines_over_the_limit_are_faulty_for_their_length(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    ends_with_newline: bool,  # noqa: FBT001
    block_bytes: int,
    compression: str,
) -> None:
    data = b"\n".join(b"x" * length for length in lengths) + (b"\n" if ends_with_newline and lengths else b"")
    path = tmp_path_factory.getbasetemp() / "long.jsonl"
    path.write_bytes(
        {"": data, "gzip": gzip.compress(data), "zstd": pa.Codec("zstd").compress(data, asbytes=True)}[compression]
    )
    rows = 0
    found: dict[int, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "MAX_LINE_BYTES", 12)
        for block in read_blocks(parts(path), ["text"], block_bytes):
            batch = parse_block(block, FieldKeys(("text",)))
            found |= {rows + fault.row: fault.reason.value for fault in batch.faults}
            rows += batch.rows
    expected = ["line_too_long" if length > 12 else "broken_json" for length in lengths]
    assert [found[row] for row in range(rows)] == expected


def test_blank_lines_keep_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n\na\n\nb\n\n")
    for block_bytes in range(1, 9):
        assert read_all_lines(path, block_bytes) == [b"", b"", b"a", b"", b"b", b""]


def test_blocks_account_for_all_input_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"12345\n" * 100)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"12345\n" * 100))
    inputs = parts(tmp_path)
    blocks = read_blocks(inputs, ["text"], 50)
    assert sum(block.input_bytes for block in blocks) == sum(part.file.bytes for part in inputs)


def test_directories_and_globs_are_sorted_and_skip_other_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.json.gz", "deep/c.ndjson.zst", "readme.txt", ".hidden.jsonl"):
        (tmp_path / name).write_bytes(b"{}\n")
    found = [file.name for file in find_inputs([str(tmp_path)])[0]]
    assert found == [str(tmp_path / name) for name in ("a.json.gz", "b.jsonl", "deep/c.ndjson.zst")]
    assert [file.name for file in find_inputs([f"{tmp_path}/*.jsonl"])[0]] == [str(tmp_path / "b.jsonl")]
    assert [file.name for file in find_inputs([f"{tmp_path}/readme.txt"])[0]] == [str(tmp_path / "readme.txt")]


def test_format_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gzip.compress(b"{}\n"))
    (tmp_path / "b.jsonl.gz").write_bytes(b"{}\n")
    kinds = [file.kind for file in find_inputs([str(tmp_path / "a"), str(tmp_path / "b.jsonl.gz")])[0]]
    assert kinds == ["gzip", "unreadable"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("nothing.jsonl", "no such file"), ("*.jsonl", "matches no file"), (".", "folder without")],
)
def test_inputs_that_match_nothing_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PreprocessError, match=message):
        find_inputs([pattern])


def test_a_file_named_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    with pytest.raises(PreprocessError, match="named twice"):
        find_inputs([str(tmp_path / "a.jsonl"), str(tmp_path)])


def test_a_file_that_changes_during_the_run_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n")
    blocks = read_blocks(parts(path), ["text"])
    path.write_bytes(b"{}\n{}\n")
    payload = next(blocks).payload
    assert isinstance(payload, ByteRange)
    with pytest.raises(PreprocessError, match="6 bytes now, 3 when the run began"):
        lines_of(payload)


def test_blocks_of_parquet_are_as_small_as_their_texts_are_long(tmp_path: Path) -> None:
    path = tmp_path / "books.parquet"
    books = [f"{number:04d}" * 10_000 for number in range(60)]  # 40 KB each
    pq.write_table(pa.table({"text": books, "score": [0.5] * 60, "unread": ["x" * 99_999] * 60}), path)
    blocks = list(read_blocks(parts(path), ["text", "score"], 200_000))
    sizes = [len(block.payload.data) for block in blocks if isinstance(block.payload, readers.ArrowRows)]
    assert len(sizes) == len(blocks)
    assert max(sizes) < 2 * 200_000
    assert len(sizes) <= 15  # and not row by row: four or five books are a block
    keys = FieldKeys(("text",), ("score",))
    assert [text for block in blocks for (text,) in parse_block(block, keys).texts] == books
