"""Tensor bytes from the wire: checked, and copied to where they will stay.

Uploads copy and check on threads of the ingest pool, many chunks at a time; searches do so on the event loop, chunk by
chunk, for their rows are wanted at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from streamindex.checksum import crc32c
from streamindex.framing import Chunk

from streamindex_service.core.sizes import KeyFormat
from streamindex_service.errors import (
    ChecksumError,
    InvalidArgumentError,
    NonFiniteError,
    UploadConflictError,
)

Bytes = npt.NDArray[np.uint8]

# Format -> its bits as a signed integer, and the least positive ones that are not finite. e4m3fn has no Inf.
_FINITE = {
    KeyFormat.BF16: (np.int16, 0x7F80),
    KeyFormat.FP16: (np.int16, 0x7C00),
    KeyFormat.FP32: (np.int32, 0x7F800000),
    KeyFormat.FP8_E4M3: (np.int8, 0x7F),
}


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [first, first + count) of a chunk, and where each part of them goes: one byte array a part."""

    first: int
    count: int
    targets: tuple[Bytes, ...]


def as_bytes(buffer: Any) -> Bytes:
    """A buffer as a [bytes] uint8 array, without a copy."""
    return np.frombuffer(buffer, dtype=np.uint8)


def check_part_sizes(chunk: Chunk, names: Sequence[str], row_bytes: Sequence[int]) -> None:
    """Every part must hold exactly row_count rows. Raises InvalidArgumentError naming the part."""
    for name, part, size in zip(names, chunk.parts, row_bytes, strict=True):
        if len(part) != chunk.row_count * size:
            raise InvalidArgumentError(
                f"chunk.{name} has {len(part)} bytes; {chunk.row_count} rows are {chunk.row_count * size}",
                field=f"chunk.{name}",
                metadata={"expected_bytes": chunk.row_count * size, "received_bytes": len(part)},
            )


def verify_checksum(chunk: Chunk) -> tuple[int, int]:
    """Check the chunk's CRC-32C, if it has one, over all parts in order.

    Returns the CRC-32C of the first part and of all parts. Raises ChecksumError.
    """
    first = running = crc32c(chunk.parts[0])
    for part in chunk.parts[1:]:
        running = crc32c(part, running)
    if chunk.crc32c is not None and running != chunk.crc32c:
        raise ChecksumError("the chunk's bytes do not have the checksum that came with them", field="chunk.crc32c")
    return first, running


def copy_rows(chunk: Chunk, ranges: Sequence[RowRange], row_bytes: Sequence[int]) -> None:
    """Copy ranges of rows of every part of a chunk to their places."""
    sources = [as_bytes(part) for part in chunk.parts]
    for rows in ranges:
        for source, size, target in zip(sources, row_bytes, rows.targets, strict=True):
            if size:
                start = rows.first * size
                np.copyto(target, source[start : start + rows.count * size])


def compare_rows(chunk: Chunk, ranges: Sequence[RowRange], row_bytes: Sequence[int]) -> None:
    """Check that rows held already are the same. Raises UploadConflictError."""
    sources = [as_bytes(part) for part in chunk.parts]
    for rows in ranges:
        for source, size, target in zip(sources, row_bytes, rows.targets, strict=True):
            start = rows.first * size
            if not np.array_equal(target, source[start : start + rows.count * size]):
                raise UploadConflictError(
                    "the chunk repeats acknowledged rows with other bytes", field="chunk.row_offset"
                )


def check_finite(data: Any, key_format: KeyFormat, row_elements: int, tensor: str, first_row: int) -> None:
    """Refuse NaN and Inf. Raises NonFiniteError naming the tensor and the row (first_row + the row in `data`)."""
    signed, least = _FINITE[key_format]
    positive = np.frombuffer(data, dtype=signed)
    if positive.size == 0:
        return
    # NaN and Inf have the largest bits of either sign: the largest signed number finds them among the positive
    # elements, the largest unsigned one among the negative. Two passes, and no memory taken.
    width = 8 * positive.itemsize
    negative = positive.view(f"u{positive.itemsize}")
    if int(positive.max()) < least and int(negative.max()) < least | 1 << (width - 1):
        return
    bad = (negative & (2 ** (width - 1) - 1)) >= least
    row = first_row + int(np.argmax(bad)) // row_elements
    raise NonFiniteError(
        f"{tensor} has a NaN or an Inf in row {row}", field=tensor, metadata={"tensor": tensor, "row": row}
    )
