"""What rows of an upload must not hold: NaN and Inf, wherever a format has numbers that may be such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from streamindex_service.core.sizes import KeyFormat, KvFormat
from streamindex_service.core.specs import CacheSpec, RowKind
from streamindex_service.errors import NonFiniteError
from streamindex_service.frontend import tensors

_UE8M0_NAN = 0xFF


class RowCheck(Protocol):
    """Looks at rows of one kind and format."""

    @property
    def together(self) -> bool:
        """Whether rows without scales may be looked at where they lie, many chunks as one tensor."""

    def rows(self, data: Any, first_row: int) -> None:
        """Whole rows, without the scales beside them. Raises NonFiniteError naming the row, counted from first_row."""

    def scales(self, data: Any, first_row: int) -> None:
        """The scales beside them. Raises NonFiniteError likewise."""


@dataclass(frozen=True, slots=True)
class Elements:
    """Rows of elements of one type, and perhaps a float32 scale for each."""

    key_format: KeyFormat
    row_elements: int
    tensor: str = "keys"

    @property
    def together(self) -> bool:
        """See RowCheck."""
        return not self.key_format.has_scales

    def rows(self, data: Any, first_row: int) -> None:
        """See RowCheck."""
        tensors.check_finite(data, self.key_format, self.row_elements, self.tensor, first_row)

    def scales(self, data: Any, first_row: int) -> None:
        """See RowCheck."""
        tensors.check_finite(data, KeyFormat.FP32, 1, "scales", first_row)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Bytes [start, stop) of a packed row, elements of one type."""

    start: int
    stop: int
    key_format: KeyFormat


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows that are stretches of several types, and perhaps `exponents` ue8m0 scales, of 8 bytes beside each row."""

    row_bytes: int
    stretches: Sequence[_Stretch]
    tensor: str
    exponents: int = 0

    @property
    def together(self) -> bool:
        """See RowCheck."""
        return not self.exponents

    def rows(self, data: Any, first_row: int) -> None:
        """See RowCheck."""
        rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, self.row_bytes)
        for part in self.stretches:
            piece = np.ascontiguousarray(rows[:, part.start : part.stop])
            elements = (part.stop - part.start) // part.key_format.element_bytes
            tensors.check_finite(piece, part.key_format, elements, self.tensor, first_row)

    def scales(self, data: Any, first_row: int) -> None:
        """See RowCheck."""
        if not self.exponents:
            return
        bad = np.frombuffer(data, dtype=np.uint8).reshape(-1, 8)[:, : self.exponents] == _UE8M0_NAN
        if bad.any():
            row = first_row + int(np.argmax(bad)) // self.exponents
            raise NonFiniteError(
                f"scales has a NaN in row {row}", field="scales", metadata={"tensor": "scales", "row": row}
            )


def row_check(spec: CacheSpec, kind: RowKind) -> RowCheck:
    """What is looked at in rows of that kind."""
    if kind is RowKind.KEYS:
        return Elements(spec.key_format, spec.head_dim)
    assert spec.kv is not None, "the cache holds index keys alone"
    name = "kv_rows" if kind is RowKind.KV else "window_rows"
    if spec.kv.kv_format is KvFormat.BF16:
        return Elements(KeyFormat.BF16, spec.kv.key_dim, name)
    if spec.kv.kv_format is KvFormat.FP8_D512:
        wide = (_Stretch(0, 448, KeyFormat.FP8_E4M3), _Stretch(448, 576, KeyFormat.BF16))
        return PackedRows(576, wide, name, exponents=7)
    wide_576 = (
        _Stretch(0, 512, KeyFormat.FP8_E4M3),
        _Stretch(512, 528, KeyFormat.FP32),
        _Stretch(528, 656, KeyFormat.BF16),
    )
    return PackedRows(656, wide_576, name)
