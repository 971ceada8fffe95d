"""Keyed permutations: a random order of `range(size)` that needs no array.

A permutation is a pure function of its key, so a shuffled stream can be read at any position without building or
storing an index. Large sizes use an unbalanced Feistel network over `2**b`, `size <= 2**b < 2 * size`, with cycle
walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002); small sizes sort 64-bit hashes, which is
exactly uniform but for hash collisions. All arithmetic is modulo 2**64: the same on every machine and numpy version.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["KeyedPermutation", "derive_key", "mix64", "mix64_array"]

_MASK = (1 << 64) - 1
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6
_TABLE_LIMIT = 4096


def derive_key(*parts: object) -> int:
    """Return a 64-bit key made from names and numbers.

    The same parts give the same key everywhere. Parts are length-prefixed, so `("ab", "c")` and `("a", "bc")` give
    different keys.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = str(part).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def mix64(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers."""
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def mix64_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return `mix64` of every element, uint64 in and out."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


class KeyedPermutation:
    """A pseudo-random permutation of `range(size)`, evaluated one index or one array at a time."""

    __slots__ = ("_left_bits", "_right_bits", "_round_keys", "_table", "size")

    def __init__(self, size: int, key: int) -> None:
        assert size >= 0
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._left_bits = bits // 2
        self._right_bits = bits - bits // 2
        self._round_keys = [mix64((key + (r + 1) * _GOLDEN) & _MASK) for r in range(_ROUNDS)]
        self._table: NDArray[np.int64] | None = None
        if size <= _TABLE_LIMIT:
            hashes = mix64_array(np.arange(size, dtype=np.uint64) * np.uint64(_GOLDEN) ^ np.uint64(self._round_keys[0]))
            self._table = np.argsort(hashes, kind="stable").astype(np.int64)

    def __call__(self, index: int) -> int:
        """The element at position `index`, `0 <= index < size`."""
        if self._table is not None:
            return int(self._table[index])
        value = self._encrypt(index)
        while value >= self.size:  # cycle walking: stays a bijection of range(size)
            value = self._encrypt(value)
        return value

    def many(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the elements at all `indices`, int64 in and out, same shape `[n]`."""
        if self._table is not None:
            return self._table[indices]
        values = self._encrypt_array(indices.astype(np.uint64))
        outside = np.flatnonzero(values >= np.uint64(self.size))
        while outside.size:
            values[outside] = self._encrypt_array(values[outside])
            outside = outside[values[outside] >= np.uint64(self.size)]
        return values.astype(np.int64)

    def _encrypt(self, value: int) -> int:
        left_bits, right_bits = self._left_bits, self._right_bits
        left, right = value >> right_bits, value & ((1 << right_bits) - 1)
        for key in self._round_keys:
            mixed = (right ^ key) * _FIRST & _MASK
            mixed = (mixed ^ (mixed >> 29)) * _SECOND & _MASK
            left, right = right, left ^ (mixed >> (64 - left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right

    def _encrypt_array(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left_bits, right_bits = self._left_bits, self._right_bits
        left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
        for key in self._round_keys:
            mixed = (right ^ np.uint64(key)) * np.uint64(_FIRST)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(_SECOND)
            left, right = right, left ^ (mixed >> np.uint64(64 - left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("permutations are rebuilt from their key, not pickled")
