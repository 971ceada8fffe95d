"""The format of a file or a stream by its first bytes, with advice for what cannot be read.

The advice says what the file is and how to convert it.
"""

import json
from typing import Literal

__all__ = ["Kind", "encoding_problem", "kind_of", "recognise"]

Kind = Literal["plain", "gzip", "zstd", "bzip2", "xz", "lz4", "parquet", "stdin", "unreadable"]

_MAGICS: dict[Kind, bytes] = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "lz4": b"\x04\x22\x4d\x18",
    "parquet": b"PAR1",
}
_SUFFIXES: dict[str, Kind] = {
    ".gz": "gzip",
    ".zst": "zstd",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lz4": "lz4",
    ".parquet": "parquet",
}
_TO_JSONL = "write its rows as JSONL or Parquet"
_FOREIGN: dict[bytes, str] = {
    b"PK\x03\x04": "a ZIP archive; unpack it and name the files",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it and name the files",
    b"Rar!": "a RAR archive; unpack it and name the files",
    b"\x02\x21\x4c\x18": "LZ4 of the old format; pack it again with the lz4 tool of today, or gzip",
    b"\xff\x06\0\0sNaPpY": "a Snappy stream; pack it again with zstd or gzip",
    b"\x1f\x9d": "compressed with compress (.Z); pack it again with zstd or gzip",
    b"ARROW1": f"an Arrow (Feather) file; {_TO_JSONL}",
    b"ORC": f"an ORC file; {_TO_JSONL}",
    b"Obj\x01": f"an Avro file; {_TO_JSONL}",
    b"SQLite format 3\0": f"an SQLite database; {_TO_JSONL}",
    b"\x89HDF\r\n": f"an HDF5 file; {_TO_JSONL}",
    b"\x93NUMPY": f"a NumPy array; {_TO_JSONL}",
    b"MMIDIDX": "the index of a Megatron shard, which needs no preprocessing; name the shard in the plan",
}
_TAR_PLACE = slice(257, 262)
_ENCODINGS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def kind_of(head: bytes) -> Kind:
    """Return the format that the first bytes show, `plain` where they show none."""
    return next((kind for kind, magic in _MAGICS.items() if head.startswith(magic)), "plain")


def recognise(name: str, head: bytes, tail: bytes) -> tuple[Kind, str]:
    """Return the format of a file, and for kind `unreadable` what is wrong with it.

    Args:
        name: path; its suffix must not contradict the content.
        head: its first bytes, 4 KiB or the whole file.
        tail: its last bytes.
    """
    kind = kind_of(head)
    if kind != "plain":
        return kind, ""
    problem = next((f"it is {what}" for magic, what in _FOREIGN.items() if head.startswith(magic)), "")
    if head[_TAR_PLACE] == b"ustar":
        problem = "it is a tar archive; unpack it and name the files"
    problem = problem or encoding_problem(head) or _array_problem(head, tail)
    promised = next((suffix for suffix in _SUFFIXES if name.lower().endswith(suffix)), "")
    if promised and not problem:
        problem = (
            f"its first bytes {head[:4]!r} belie its suffix: it is not {_SUFFIXES[promised]}; write it again, or give "
            "it the suffix of what it is"
        )
    return ("unreadable", problem) if problem else ("plain", "")


def encoding_problem(data: bytes) -> str:
    """Return how to convert text in UTF-16 or UTF-32, empty for other text.

    The byte order mark or the zero bytes decide.
    """
    for mark, encoding in _ENCODINGS.items():
        if data.startswith(mark):
            return f"it is not UTF-8 but {encoding} ({encoding} byte order mark); {_iconv(encoding)}"
    for place, encoding in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        zeros, others = data[place : place + 64 : 2], data[1 - place : 65 - place : 2]
        if len(zeros) > 1 and not any(zeros) and all(others):
            return f"it is not UTF-8 but {encoding} (every other byte is zero); {_iconv(encoding)}"
    return ""


def _iconv(encoding: str) -> str:
    return f"convert it with iconv -f {encoding} -t UTF-8"


def _array_problem(head: bytes, tail: bytes) -> str:
    """Return what is wrong with one JSON array over a whole file.

    Empty where a `[` begins a mere row.
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"[") or not tail.rstrip().endswith(b"]"):
        return ""
    first, _, more = start.partition(b"\n")
    if more.strip() and _is_json(first):
        return ""
    return "it is a JSON array over the whole file, not JSONL with one object a line; convert it with jq -c '.[]'"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
