"""How query rows and their answers lie in a block of ingress memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from streamindex.framing import Chunk

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
from streamindex_service.core.specs import CacheSpec
from streamindex_service.errors import InvalidArgumentError
from streamindex_service.frontend import tensors
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.tensors import RowRange
from streamindex_service.frontend.tiles import TilePlace

Q, W, POSITIONS, INDICES, SCORES = range(5)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Where the tensors of `rows` query rows lie in a block: byte offsets of each, and bytes of one of its rows.

    Of a search they are q, w, positions, indices, scores.
    """

    rows: int
    offsets: tuple[int, ...]
    row_bytes: tuple[int, ...]

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
        layout = cls.packed(row_bytes, block_bytes)
        assert layout.rows >= 1
        return layout

    @staticmethod
    @lru_cache(256)  # a decode step asks for each of its items
    def packed(row_bytes: tuple[int, ...], block_bytes: int) -> BlockLayout:
        """As many rows of tensors as a block holds; perhaps none."""
        # Every tensor starts on a multiple of 256 bytes, as wide loads want it.
        rows = max(0, (block_bytes - 256 * len(row_bytes)) // sum(row_bytes))
        offsets, offset = [], 0
        for size in row_bytes:
            offsets.append(offset)
            offset = align(offset + rows * size)
        assert offset <= block_bytes
        return BlockLayout(rows, tuple(offsets), row_bytes)

    def only(self, which: tuple[int, ...]) -> BlockLayout:
        """The same rows, of these tensors alone, in this order."""
        return BlockLayout(self.rows, tuple(self.offsets[i] for i in which), tuple(self.row_bytes[i] for i in which))

    def at(self, index: int, first: int) -> int:
        """Byte offset of a row of one tensor."""
        return self.offsets[index] + first * self.row_bytes[index]

    def place(self, first: int, rows: int, want_scores: bool) -> TilePlace:
        """Where the worker finds the tensors of rows [first, first + rows)."""
        at = [self.at(index, first) for index in range(len(self.offsets))]
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
    fill_positions(positions_bytes, start_position, row_offset)


def fill_positions(positions_bytes: tensors.Bytes, start_position: int | None, row_offset: int) -> None:
    """Count the positions of rows from `row_offset` on, or check those that came, where start_position is None.

    Raises InvalidArgumentError.
    """
    positions = positions_bytes.view(np.int64)
    count = len(positions)
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


def positions_of(layout: BlockLayout, block: Block, first: int, count: int) -> npt.NDArray[np.int64]:
    """Token positions of rows of a block."""
    return layout.part(block, POSITIONS, first, count).view(np.int64)
