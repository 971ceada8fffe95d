"""Compressed streams that give every byte decoded before a damaged place, and only then raise.

The readers of Python and Arrow drop what they have decoded since the last call when they meet damage: a whole block of
rows. They are therefore fed here in pieces whose ends are known: zlib from a copy of its state, zstd frame header by
frame header and block by block. The decoders of bzip2 and xz cannot be copied: up to `_SMALL_PIECE` bytes are lost.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Protocol

import pyarrow as pa

from megatron_kaiyuan.preprocess.formats import Kind

__all__ = ["DamagedStreamError", "Readable", "open_stream"]

_PIECE = 1 << 17
_SMALL_PIECE = 1 << 10
_GZIP = 31  # zlib's window bits: a gzip header, and its checksum is verified
_ZSTD_FRAME = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a first byte of 0x50 to 0x5f


class DamagedStreamError(Exception):
    """The rest of a compressed stream cannot be decoded."""


class Readable(Protocol):
    """What is read here, and what is given."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, none at the end."""
        ...


class _Decoder(Protocol):
    def fill(self, buffer: memoryview) -> int:
        """Write decoded bytes and return their number.

        Less than fits means the end. An error is raised only when all that was decoded is in the buffer.
        """
        ...


class _Decoded:
    """The decoded bytes up to a damaged place.

    A call that meets damage gives what comes before it, and the next one raises.
    """

    def __init__(self, decoder: _Decoder) -> None:
        self._decoder = decoder
        self._problem: Exception | None = None

    def read(self, size: int, /) -> bytes:
        """Exactly `size` bytes, less before the end or damage.

        Raises:
            DamagedStreamError: all bytes before the damage were given.
        """
        if self._problem is not None:
            raise DamagedStreamError(f"the compressed stream is damaged: {self._problem}") from self._problem
        buffer = bytearray(size)
        try:
            count = self._decoder.fill(memoryview(buffer))
        except (OSError, EOFError, zlib.error) as problem:
            self._problem = problem
            # how much was written is not known, but text has no zero bytes and the buffer had nothing else
            return bytes(buffer.rstrip(b"\0")) or self.read(size)
        return bytes(memoryview(buffer)[:count])


def open_stream(kind: Kind, raw: Readable) -> Readable:
    """Read a compressed file of one or more members, frames or streams.

    A plain file is read as it is. Zero bytes after a member of gzip, bzip2 or xz are padding.
    """
    decoder = _DECODERS.get(kind)
    return raw if decoder is None else _Decoded(decoder(raw))


class _Arrow:
    """Zstd and LZ4, whose decoders Arrow has."""

    def __init__(self, raw: "_Pieces", codec: str) -> None:
        self._stream = pa.CompressedInputStream(raw, codec)

    def fill(self, buffer: memoryview) -> int:
        return int(self._stream.readinto(buffer))  # Arrow writes to the buffer as it decodes, so an error takes nothing


class _Blocks:
    """Bzip2 and xz, whose decoders Python has."""

    def __init__(self, raw: Readable, start: "Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]") -> None:
        self._raw = raw
        self._start = start
        self._decoder = start()
        self._begun = False
        """The decoder has seen a byte."""

    def fill(self, buffer: memoryview) -> int:
        at = 0
        while at < len(buffer):
            data = b""
            if self._decoder.eof:
                data = self._decoder.unused_data.lstrip(b"\0")
                self._decoder, self._begun = self._start(), False
            if not data and self._decoder.needs_input:
                data = self._raw.read(_PIECE)
                if not self._begun:
                    data = data.lstrip(b"\0") if at or data[:1] == b"\0" else data
                if not data:
                    if self._begun:
                        raise EOFError("it ends before its end marker")
                    break
            self._begun = True
            piece = self._decode(data, min(len(buffer) - at, _SMALL_PIECE))
            buffer[at : at + len(piece)] = piece
            at += len(piece)
        return at

    def _decode(self, data: bytes, room: int) -> bytes:
        try:
            return self._decoder.decompress(data, room)
        except lzma.LZMAError as error:
            raise OSError(str(error)) from error


class _Gunzip:
    def __init__(self, raw: Readable) -> None:
        self._raw = raw
        self._input = b""
        self._member = zlib.decompressobj(_GZIP)
        self._between = False
        """A member has ended, and none has begun."""

    def fill(self, buffer: memoryview) -> int:
        at = 0
        while at < len(buffer):
            self._input = self._input or self._raw.read(_PIECE)
            at_end = not self._input
            if self._between and not self._begin_member():
                if at_end:
                    break
                continue
            decoded = self._decode(buffer, at)
            if at_end and decoded == at:  # zlib may still have held bytes for which there was no room
                raise EOFError("it ends before its end marker")
            at = decoded
        return at

    def _begin_member(self) -> bool:
        self._input = self._input.lstrip(b"\0")
        if self._input:
            self._member, self._between = zlib.decompressobj(_GZIP), False
        return bool(self._input)

    def _decode(self, buffer: memoryview, at: int) -> int:
        before = self._member.copy()
        room = len(buffer) - at
        try:
            data = self._member.decompress(self._input, room)
        except zlib.error:
            data = _before_damage(before, self._input, room)
            buffer[at : at + len(data)] = data
            raise
        buffer[at : at + len(data)] = data
        self._between = self._member.eof
        self._input = self._member.unused_data if self._between else self._member.unconsumed_tail
        return at + len(data)


def _before_damage(state: "zlib._Decompress", data: bytes, room: int) -> bytes:
    """What the longest beginning of `data` that zlib does not object to gives."""
    good, bad, decoded = 0, len(data), b""
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            decoded, good = state.copy().decompress(data[:middle], room), middle
        except zlib.error:
            bad = middle
    return decoded


class _Pieces(Protocol):
    """What Arrow reads from."""

    closed: bool

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class _RawPieces:
    """A plain file that is read as it is, and stays open."""

    def __init__(self, raw: Readable) -> None:
        self.closed = False
        self._raw = raw

    def read(self, size: int, /) -> bytes:
        return self._raw.read(min(size, _PIECE))

    def close(self) -> None:
        """Do nothing when Arrow closes the file, because whoever opened it closes it."""
        self.closed = True


class _ZstdPieces:
    """A zstd file as Arrow reads it, in pieces that end where a frame header, a block or a checksum ends.

    What comes after a piece the format does not allow is given as it is: the decoder then reports what is wrong.
    """

    def __init__(self, raw: Readable) -> None:
        self.closed = False
        self._raw = raw
        self._piece = memoryview(b"")
        self._to_skip = 0
        """Bytes left of a frame that holds no data."""
        self._in_frame = self._lost = self._last_block = self._has_checksum = False

    def read(self, size: int, /) -> bytes:
        if not self._piece:
            self._piece = memoryview(self._raw.read(_PIECE) if self._lost else self._next_piece())
        given, self._piece = self._piece[:size], self._piece[size:]
        return bytes(given)

    def close(self) -> None:
        """Do nothing when Arrow closes the file, because whoever opened it closes it."""
        self.closed = True

    def _next_piece(self) -> bytes:
        if self._to_skip:
            skipped = self._raw.read(min(self._to_skip, _PIECE))
            self._to_skip = self._to_skip - len(skipped) if skipped else 0
            return skipped
        if not self._in_frame:
            return self._frame_header()
        if self._last_block:
            self._in_frame = self._last_block = False
            return self._raw.read(4) if self._has_checksum else self._frame_header()
        header = self._raw.read(3)
        fields = int.from_bytes(header, "little")
        self._last_block, kind, length = bool(fields & 1), fields >> 1 & 3, fields >> 3
        self._lost = len(header) < 3 or kind == 3 or length > 1 << 21
        return header if self._lost else header + self._raw.read(1 if kind == 1 else length)

    def _frame_header(self) -> bytes:
        head = self._raw.read(5)
        self._in_frame = len(head) == 5 and head.startswith(_ZSTD_FRAME)
        if self._in_frame:
            descriptor = head[4]
            single, self._has_checksum = descriptor >> 5 & 1, bool(descriptor & 4)
            content_size = (single, 2, 4, 8)[descriptor >> 6]
            return head + self._raw.read(1 - single + (0, 1, 2, 4)[descriptor & 3] + content_size)
        if head[1:4] == _ZSTD_SKIPPABLE and head[0] >> 4 == 5:
            head += self._raw.read(3)
            self._to_skip = int.from_bytes(head[4:], "little")
        else:
            self._lost = True  # the end, or no frame
        return head


_DECODERS: dict[Kind, Callable[[Readable], _Decoder]] = {
    "gzip": _Gunzip,
    "zstd": lambda raw: _Arrow(_ZstdPieces(raw), "zstd"),
    "lz4": lambda raw: _Arrow(_RawPieces(raw), "lz4"),
    "bzip2": lambda raw: _Blocks(raw, bz2.BZ2Decompressor),
    "xz": lambda raw: _Blocks(raw, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
}
