"""Formats, orders, modes and priorities by name, and their numbers on the wire."""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import TypeVar

from streamindex.v1 import key_cache_pb2, types_pb2

from streamindex_client.errors import InputError

__all__ = ["KeyFormat", "KvFormat", "Priority", "ResultOrder", "RowKind", "SearchMode", "member"]


class KeyFormat(StrEnum):
    """Element format of keys and queries."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    FP8_E4M3 = "fp8_e4m3"

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return _ELEMENT_BYTES[self]

    @property
    def has_scales(self) -> bool:
        """Whether each key row carries one float32 scale."""
        return self is KeyFormat.FP8_E4M3

    @property
    def dtype_names(self) -> tuple[str, ...]:
        """Names of the numpy (or ml_dtypes) and torch dtypes that hold it: its own first, then raw bits."""
        return _DTYPE_NAMES[self]

    @property
    def wire(self) -> types_pb2.KeyFormat:
        """Its number on the wire."""
        number: types_pb2.KeyFormat = types_pb2.KeyFormat.Value(f"KEY_FORMAT_{self.name}")
        return number

    @classmethod
    def from_wire(cls, number: int) -> KeyFormat | None:
        """The format of a number; None for one that this version does not know."""
        return next((each for each in cls if each.wire == number), None)


_ELEMENT_BYTES = {KeyFormat.BF16: 2, KeyFormat.FP16: 2, KeyFormat.FP32: 4, KeyFormat.FP8_E4M3: 1}
_DTYPE_NAMES = {
    KeyFormat.BF16: ("bfloat16", "uint16"),
    KeyFormat.FP16: ("float16",),
    KeyFormat.FP32: ("float32",),
    KeyFormat.FP8_E4M3: ("float8_e4m3fn", "uint8"),
}


class KvFormat(StrEnum):
    """Element format of KV rows and window rows.

    BF16: [rows, key_dim]. FP8_D512: [rows, 576] bytes and, as scales, [rows, 8] bytes. FP8_D576: [rows, 656] bytes.
    """

    BF16 = "bf16"
    FP8_D512 = "fp8_d512"
    FP8_D576 = "fp8_d576"

    @property
    def row_bytes(self) -> int | None:
        """Bytes of a packed row, without the scales beside it; None for rows of elements."""
        return {KvFormat.BF16: None, KvFormat.FP8_D512: 576, KvFormat.FP8_D576: 656}[self]

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales beside a row."""
        return 8 if self is KvFormat.FP8_D512 else 0

    @property
    def wire(self) -> types_pb2.KvFormat:
        """Its number on the wire."""
        number: types_pb2.KvFormat = types_pb2.KvFormat.Value(f"KV_FORMAT_{self.name}")
        return number

    @classmethod
    def from_wire(cls, number: int) -> KvFormat | None:
        """The format of a number; None for one that this version does not know."""
        return next((each for each in cls if each.wire == number), None)


class RowKind(StrEnum):
    """Which rows of a layer an upload writes: index keys, KV rows (one for each key), window rows (one a token)."""

    KEYS = "keys"
    KV = "kv_rows"
    WINDOW = "window_rows"

    @property
    def wire(self) -> key_cache_pb2.RowKind:
        """Its number on the wire."""
        names = {RowKind.KEYS: "KEYS", RowKind.KV: "KV", RowKind.WINDOW: "WINDOW"}
        number: key_cache_pb2.RowKind = key_cache_pb2.RowKind.Value(f"ROW_KIND_{names[self]}")
        return number


class ResultOrder(StrEnum):
    """Order of the indices within an answer row; padding is always last."""

    SCORE = "score"
    INDEX = "index"

    @property
    def wire(self) -> types_pb2.ResultOrder:
        """Its number on the wire."""
        number: types_pb2.ResultOrder = types_pb2.ResultOrder.Value(f"RESULT_ORDER_{self.name}")
        return number


class SearchMode(StrEnum):
    """How the selection is made."""

    EXACT = "exact"

    @property
    def wire(self) -> types_pb2.SearchMode:
        """Its number on the wire."""
        number: types_pb2.SearchMode = types_pb2.SearchMode.Value(f"SEARCH_MODE_{self.name}")
        return number


class Priority(StrEnum):
    """Which requests go first when they compete for the device."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"

    @property
    def wire(self) -> types_pb2.Priority:
        """Its number on the wire."""
        number: types_pb2.Priority = types_pb2.Priority.Value(f"PRIORITY_{self.name}")
        return number

    @classmethod
    def from_wire(cls, number: int) -> Priority:
        """The priority of a number; unspecified is standard."""
        return next((each for each in cls if each.wire == number), cls.STANDARD)


_Member = TypeVar("_Member", bound=Enum)


def member(kind: type[_Member], argument: str, value: str | _Member) -> _Member:
    """The member of `kind` with this value. Raises InputError naming the argument and the valid values."""
    try:
        return kind(value)
    except ValueError:
        valid = ", ".join(repr(each.value) for each in kind)
        raise InputError(argument, f"got {value!r}, expected one of {valid}") from None
