"""Byte arithmetic of tensors and pages, checked against overflow.

Declared sizes come from callers and may be anything up to 2^64 - 1. Every product of such numbers goes through
`product`, which refuses beyond 2^63 - 1: what is accepted fits the signed 64-bit numbers of everything downstream.
"""

from __future__ import annotations

import enum

from streamindex_service.errors import InvalidArgumentError

PAGE_KEYS = 256  # keys of a page, in host memory and on the device
MAX_BYTES = (1 << 63) - 1
SCALE_BYTES = 4
MAX_POSITION = 1 << 62  # of a query; the number of keys it sees is computed in 64 bits
GATE_BYTES = 4
POSITION_BYTES = 8
INDEX_BYTES = 4
SCORE_BYTES = 4


class KeyFormat(enum.IntEnum):
    """Formats of keys and queries, with the numbers of `streamindex.v1.KeyFormat`."""

    BF16 = 1
    FP16 = 2
    FP32 = 3
    FP8_E4M3 = 4

    @classmethod
    def of(cls, number: int) -> KeyFormat | None:
        """The format with this number, if there is one."""
        return next((member for member in cls if member == number), None)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return {KeyFormat.BF16: 2, KeyFormat.FP16: 2, KeyFormat.FP32: 4, KeyFormat.FP8_E4M3: 1}[self]

    @property
    def has_scales(self) -> bool:
        """True: every key row has one float32 scale."""
        return self is KeyFormat.FP8_E4M3


def product(field: str, *factors: int) -> int:
    """Multiply sizes. Raises InvalidArgumentError naming `field` when the product passes 2^63 - 1."""
    result = 1
    for factor in factors:
        result *= factor
    if result > MAX_BYTES:
        raise InvalidArgumentError(f"{field} is too large", field=field)
    return result


def key_row_bytes(key_format: KeyFormat, head_dim: int) -> int:
    """Bytes of one key row, its scale apart."""
    return key_format.element_bytes * head_dim


def page_bytes(key_format: KeyFormat, head_dim: int) -> int:
    """Bytes of a page: 256 key rows, then, where the format has them, 256 float32 scales."""
    return PAGE_KEYS * (key_row_bytes(key_format, head_dim) + (SCALE_BYTES if key_format.has_scales else 0))


def pages_of(keys: int) -> int:
    """Pages that hold this many keys."""
    return -(-keys // PAGE_KEYS)


def query_row_bytes(key_format: KeyFormat, heads: int, head_dim: int) -> int:
    """Bytes of one query row's q."""
    return key_format.element_bytes * heads * head_dim


def answer_row_bytes(top_k: int, want_scores: bool) -> int:
    """Bytes of one answer row."""
    return top_k * (INDEX_BYTES + (SCORE_BYTES if want_scores else 0))


def align(value: int, alignment: int = 256) -> int:
    """The next multiple of `alignment`, at or above."""
    return -(-value // alignment) * alignment
