"""Byte arithmetic of tensors and pages, checked against overflow.

Declared sizes come from callers and may be anything up to 2^64 - 1. Every product of such numbers goes through
`product`, which refuses beyond 2^63 - 1: what is accepted fits the signed 64-bit numbers of everything downstream.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from streamindex_service.errors import InvalidArgumentError

PAGE_KEYS = 256  # keys of a page, in host memory and on the device
MAX_BYTES = (1 << 63) - 1
SCALE_BYTES = 4
MAX_POSITION = 1 << 62  # of a query; the number of keys it sees is computed in 64 bits
GATE_BYTES = 4
POSITION_BYTES = 8
INDEX_BYTES = 4
SCORE_BYTES = 4
LSE_BYTES = 4
BF16_BYTES = 2


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


class KvFormat(enum.IntEnum):
    """Formats of KV rows, with the numbers of `streamindex.v1.KvFormat`."""

    BF16 = 1
    FP8_D512 = 2
    FP8_D576 = 3

    @classmethod
    def of(cls, number: int) -> KvFormat | None:
        """The format with this number, if there is one."""
        return next((member for member in cls if member == number), None)

    @property
    def key_dim(self) -> int | None:
        """Elements of a key of a packed format; None where the cache says how many."""
        return {KvFormat.BF16: None, KvFormat.FP8_D512: 512, KvFormat.FP8_D576: 576}[self]


@dataclass(frozen=True, slots=True)
class RowForm:
    """How rows of one kind lie in a page: 256 rows, then, where there are any, the scales of these rows."""

    row_bytes: int
    scale_bytes: int = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return PAGE_KEYS * (self.row_bytes + self.scale_bytes)

    @classmethod
    def of_keys(cls, key_format: KeyFormat, head_dim: int) -> RowForm:
        """Index keys."""
        return cls(key_row_bytes(key_format, head_dim), SCALE_BYTES if key_format.has_scales else 0)

    @classmethod
    def of_kv(cls, kv_format: KvFormat, key_dim: int) -> RowForm:
        """KV rows and window rows."""
        return {
            KvFormat.BF16: cls(BF16_BYTES * key_dim),
            KvFormat.FP8_D512: cls(576, 8),
            KvFormat.FP8_D576: cls(656),
        }[kv_format]


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
