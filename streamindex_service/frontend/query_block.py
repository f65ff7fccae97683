"""How query rows and their answers lie in a block of ingress memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from streamindex.framing import Chunk

from streamindex_service.core.caches import CacheSpec
from streamindex_service.core.sizes import (
    GATE_BYTES,
    INDEX_BYTES,
    MAX_POSITION,
    POSITION_BYTES,
    SCORE_BYTES,
    KeyFormat,
    align,
    query_row_bytes,
)
from streamindex_service.errors import InvalidArgumentError
from streamindex_service.frontend import tensors
from streamindex_service.frontend.device import TilePlace
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.tensors import RowRange

Q, W, POSITIONS, INDICES, SCORES = range(5)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Where the tensors of `rows` query rows lie in a block: byte offsets of q, w, positions, indices, scores."""

    rows: int
    offsets: tuple[int, int, int, int, int]
    row_bytes: tuple[int, int, int, int, int]

    @classmethod
    def of(cls, spec: CacheSpec, top_k: int, want_scores: bool, block_bytes: int) -> BlockLayout:
        """As many rows of a search on such a cache as a block holds."""
        row_bytes = (
            query_row_bytes(spec.key_format, spec.heads, spec.head_dim),
            spec.heads * GATE_BYTES,
            POSITION_BYTES,
            top_k * INDEX_BYTES,
            top_k * SCORE_BYTES if want_scores else 0,
        )
        # Every tensor starts on a multiple of 256 bytes, as wide loads want it.
        rows = (block_bytes - 256 * len(row_bytes)) // sum(row_bytes)
        assert rows >= 1
        offsets, offset = [], 0
        for size in row_bytes:
            offsets.append(offset)
            offset = align(offset + rows * size)
        assert offset <= block_bytes
        return cls(rows, (offsets[0], offsets[1], offsets[2], offsets[3], offsets[4]), row_bytes)

    def place(self, first: int, rows: int, want_scores: bool) -> TilePlace:
        """Where the worker finds the tensors of rows [first, first + rows)."""
        at = [offset + first * size for offset, size in zip(self.offsets, self.row_bytes, strict=True)]
        return TilePlace(rows, at[Q], at[W], at[POSITIONS], at[INDICES], at[SCORES] if want_scores else None)

    def part(self, block: Block, index: int, first: int, count: int) -> tensors.Bytes:
        """Rows [first, first + count) of one tensor, as bytes."""
        start = self.offsets[index] + first * self.row_bytes[index]
        return block.data[start : start + count * self.row_bytes[index]]


def fill_rows(
    layout: BlockLayout,
    spec: CacheSpec,
    chunk: Chunk,
    first: int,
    count: int,
    block: Block,
    block_row: int,
    row_offset: int,
    start_position: int | None,
) -> None:
    """Copy rows [first, first + count) of a chunk of q, w, positions to a block, and check them.

    `row_offset` is the search's row of the first of them, for messages; the positions are start_position + row, or the
    chunk's when that is None. Raises NonFiniteError, InvalidArgumentError.
    """
    q, w, positions_bytes = (layout.part(block, index, block_row, count) for index in (Q, W, POSITIONS))
    explicit = start_position is None
    row_bytes = (layout.row_bytes[Q], layout.row_bytes[W], POSITION_BYTES if explicit else 0)
    tensors.copy_rows(chunk, [RowRange(first, count, (q, w, positions_bytes))], row_bytes)
    tensors.check_finite(q, spec.key_format, spec.heads * spec.head_dim, "q", row_offset)
    tensors.check_finite(w, KeyFormat.FP32, spec.heads, "w", row_offset)
    positions = positions_bytes.view(np.int64)
    if start_position is not None:
        start = start_position + row_offset
        if start + count - 1 > MAX_POSITION:
            raise InvalidArgumentError("positions pass 2^62, counted from the start", field="header.start_position")
        positions[:] = np.arange(start, start + count, dtype=np.int64)
        return
    bad = (positions < 0) | (positions > MAX_POSITION)
    if bad.any():
        row = row_offset + int(np.argmax(bad))
        raise InvalidArgumentError(f"the position of row {row} is not from 0 to 2^62", field="chunk.positions")
