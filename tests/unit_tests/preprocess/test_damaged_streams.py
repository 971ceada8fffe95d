"""Compressed files that are cut or damaged: every line that could be decoded before the damage is kept."""

import gzip
import io
import json
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from megatron_kaiyuan.preprocess.documents import parse_block
from megatron_kaiyuan.preprocess.fields import FieldKeys
from megatron_kaiyuan.preprocess.inputs import InputFile, Part
from megatron_kaiyuan.preprocess.readers import BLOCK_BYTES, read_blocks
from tests.unit_tests.preprocess.corpus import build, number_rows, read_shard_by_hand
from tests.unit_tests.preprocess.kills import ENVIRONMENT, TOOL

GZIP, ZSTD = "gzip", "zstd"
KINDS = pytest.mark.parametrize("kind", [GZIP, ZSTD])


def compressed(data: bytes, kind: str) -> bytes:
    return gzip.compress(data, mtime=0) if kind == GZIP else bytes(pa.Codec("zstd").compress(data, asbytes=True))


def json_lines(count: int, length: int = 30, seed: int = 0) -> list[bytes]:
    """Lines that compress badly, as text does."""
    digits = np.random.default_rng(seed).integers(0, 10, size=(count, length))
    return [json.dumps({"text": "".join(map(str, row))}).encode() + b"\n" for row in digits.tolist()]


def rows_and_faults(path: Path, kind: str, block_bytes: int = BLOCK_BYTES) -> tuple[list[str], list[str]]:
    part = Part(InputFile(str(path), path.stat().st_size, "gzip" if kind == GZIP else "zstd"))
    texts, faults = [], []
    for block in read_blocks([part], ["text"], block_bytes):
        batch = parse_block(block, FieldKeys(("text",)))
        texts += [text for (text,) in batch.texts]
        faults += [fault.reason.value for fault in batch.faults]
    return texts, faults


def gzip_prefix(data: bytes) -> bytes:
    """What zlib gives when it is fed byte by byte until it objects."""
    decoder, out = zlib.decompressobj(31), b""
    for at in range(len(data)):
        try:
            out += decoder.decompress(data[at : at + 1])
        except zlib.error:
            break
    return out


class OneByte(io.RawIOBase):
    """Gives a byte at a time, so that a decoder has handed out everything before the byte it objects to."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = io.BytesIO(data)

    def read(self, size: int = -1, /) -> bytes:
        return self._data.read(min(size, 1))

    def readable(self) -> bool:
        return True


def zstd_prefix(data: bytes) -> bytes:
    stream, out = pa.CompressedInputStream(OneByte(data), "zstd"), b""
    try:
        while byte := stream.read(1):
            out += byte
    except OSError:
        pass
    return out


PREFIXES: dict[str, Callable[[bytes], bytes]] = {GZIP: gzip_prefix, ZSTD: zstd_prefix}


def whole_texts(data: bytes) -> list[str]:
    return [json.loads(line)["text"] for line in data.split(b"\n")[:-1]]


@KINDS
def test_a_cut_file_keeps_every_line_that_can_be_decoded(tmp_path: Path, kind: str) -> None:
    lines = json_lines(40_000, 150)
    path = tmp_path / "cut"
    cut = compressed(b"".join(lines), kind)[:-100]
    path.write_bytes(cut)
    texts, faults = rows_and_faults(path, kind)
    assert faults == ["unreadable_file"]
    assert texts == whole_texts(b"".join(lines))[: len(texts)]
    if kind == GZIP:
        assert texts == whole_texts(zlib.decompressobj(31).decompress(cut))
    assert len(texts) > 40_000 - (1 << 17) // len(lines[0]) - 1  # a block of zstd is 128 KB, and decoded as a whole


@KINDS
@pytest.mark.parametrize("end", [b"\n", b""], ids=["newline", "none"])
def test_rubbish_after_a_small_file_costs_no_row(tmp_path: Path, kind: str, end: bytes) -> None:
    rows = number_rows(50)
    data = b"\n".join(json.dumps(row).encode() for row in rows) + end
    path = tmp_path / ("rows.jsonl.gz" if kind == GZIP else "rows.jsonl.zst")
    path.write_bytes(compressed(data, kind) + b"this is not a frame")
    assert build([path], tmp_path / "out", on_error="skip").skipped == {"unreadable_file": 1}
    texts = [" ".join(map(str, document)) for document in read_shard_by_hand(tmp_path / "out_text_document")]
    assert texts == [row["text"] for row in rows]


def test_a_small_gzip_file_without_its_end_keeps_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(compressed(b"".join(json_lines(50)), GZIP)[:-8])
    assert rows_and_faults(path, GZIP) == (whole_texts(b"".join(json_lines(50))), ["unreadable_file"])


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    kind=st.sampled_from([GZIP, ZSTD]),
    members=st.integers(1, 3),
    place=st.floats(0.01, 1),
    damage=st.sampled_from(["cut", "byte", "zeros"]),
    block_bytes=st.sampled_from([7, 1000, 100_000, BLOCK_BYTES]),
)
def test_no_line_is_lost_that_a_decoder_fed_byte_by_byte_gives(
    tmp_path_factory: pytest.TempPathFactory, kind: str, members: int, place: float, damage: str, block_bytes: int
) -> None:
    # zeros and ones, up to 400 KB: several blocks of zstd, and several of them in what is read at once
    bits = np.random.default_rng(1).integers(0, 2, size=(2_000, 180 // members)).tolist()
    lines = [json.dumps({"text": "".join(map(str, row))}).encode() + b"\n" for row in bits]
    one = compressed(b"".join(lines), kind)
    at = min(int(place * len(one)), len(one) - 1)
    last = {
        "cut": one[:at],
        "byte": one[:at] + bytes([one[at] ^ 0x55]) + one[at + 1 :],
        "zeros": one[:at] + bytes(200) + one[at + 200 :],
    }[damage]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(one * (members - 1) + last)
    decoded = PREFIXES[kind](last)
    kept = decoded[: decoded.rfind(b"\n") + 1].split(b"\n")[:-1]
    found: list[bytes] = []
    part = Part(InputFile(str(path), path.stat().st_size, "gzip" if kind == GZIP else "zstd"))
    for block in read_blocks([part], ["text"], block_bytes):
        data = getattr(block.payload, "data", b"")
        found += data.split(b"\n")[:-1] if data.endswith(b"\n") else data.split(b"\n")
    assert found[: (members - 1) * len(lines)] == [line[:-1] for line in lines] * (members - 1)
    rest = found[(members - 1) * len(lines) :]
    assert rest[: len(kept)] == kept
    assert len(rest) <= len(kept) + 1  # a last line that is whole although its newline is not there


@KINDS
def test_zero_bytes_after_the_end_of_gzip_are_padding_and_other_frames_are_passed_over(
    tmp_path: Path, kind: str
) -> None:
    lines = json_lines(20)
    path = tmp_path / "padded"
    frame = compressed(b"".join(lines), kind)
    skippable = b"\x50\x2a\x4d\x18" + (70_000).to_bytes(4, "little") + bytes(70_000)
    path.write_bytes(frame + (bytes(5000) if kind == GZIP else skippable) + frame)
    assert rows_and_faults(path, kind) == (whole_texts(b"".join(lines)) * 2, [])


@KINDS
def test_standard_input_keeps_its_lines_too(tmp_path: Path, kind: str) -> None:
    data = compressed(b"".join(json.dumps(row).encode() + b"\n" for row in number_rows(50)), kind)
    command = [*TOOL, "--input", "-", "--output-prefix", str(tmp_path / "out"), "--on-error", "skip"]
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000", "--workers", "1"]
    done = subprocess.run(
        [*command, *flags], input=data + b"rubbish", env=ENVIRONMENT, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"50 documents" in done.stdout
    assert b"unreadable_file" in done.stdout
    assert b"rror" not in done.stderr  # Arrow tells there what it could not do at the end
