"""How rows of attention and their answers lie in a block of ingress memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from streamindex.framing import Chunk

from streamindex_service.core.sizes import (
    BF16_BYTES,
    GATE_BYTES,
    INDEX_BYTES,
    LSE_BYTES,
    POSITION_BYTES,
    SCORE_BYTES,
    KeyFormat,
    query_row_bytes,
)
from streamindex_service.core.specs import CacheSpec
from streamindex_service.errors import InvalidArgumentError, NoKvRowsError
from streamindex_service.frontend import tensors
from streamindex_service.frontend.attend_requests import AttendParameters
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.query_block import POSITIONS, BlockLayout, fill_positions
from streamindex_service.frontend.tensors import RowRange

INDEX_Q, INDEX_W, _, INDICES, SCORES, Q, OUT, LSE = range(8)  # positions lie where those of a search do
# What a search of these rows reads and writes, as it wants it.
SEARCHED = (INDEX_Q, INDEX_W, POSITIONS, INDICES, SCORES)
# Of a chunk, in the order of its fields.
PARTS = ("q", "index_q", "index_w", "indices", "positions")
PART_TENSORS = (Q, INDEX_Q, INDEX_W, INDICES, POSITIONS)


def attend_layout(spec: CacheSpec, parameters: AttendParameters, keeps_scores: bool, block_bytes: int) -> BlockLayout:
    """As many rows as a block holds. Raises InvalidArgumentError when it does not hold one."""
    kv, searched = parameters.kv, parameters.search is not None
    row_bytes = (
        query_row_bytes(spec.key_format, spec.heads, spec.head_dim) * searched,
        spec.heads * GATE_BYTES * searched,
        POSITION_BYTES,
        parameters.width * INDEX_BYTES,
        parameters.width * SCORE_BYTES * (keeps_scores and searched),
        kv.heads * kv.key_dim * BF16_BYTES,
        kv.heads * kv.value_dim * BF16_BYTES,
        kv.heads * LSE_BYTES * parameters.want_lse,
    )
    layout = BlockLayout.packed(row_bytes, block_bytes)
    if not layout.rows:
        raise InvalidArgumentError(
            f"a row and its answer have {sum(row_bytes)} bytes, more than a block of {block_bytes}",
            field="header.key_cache_id",
            metadata={"needed_bytes": sum(row_bytes), "limit_bytes": block_bytes},
        )
    return layout


def part_bytes(layout: BlockLayout, parameters: AttendParameters) -> tuple[int, ...]:
    """Bytes of a row of each part of a chunk."""
    sizes = [layout.row_bytes[tensor] for tensor in PART_TENSORS]
    if parameters.search is not None:
        sizes[PARTS.index("indices")] = 0  # they are found
    if parameters.start_position is not None:
        sizes[PARTS.index("positions")] = 0
    return tuple(sizes)


class AttendFiller:
    """Copies rows of chunks to blocks, and checks them. `kv_rows`, `window_rows`: that the layer has."""

    def __init__(
        self, layout: BlockLayout, spec: CacheSpec, parameters: AttendParameters, kv_rows: int, window_rows: int
    ) -> None:
        self._layout = layout
        self._parameters = parameters
        self._kv_rows = kv_rows
        self._window_rows = window_rows
        self._ratio = spec.ratio
        self._row_bytes = part_bytes(layout, parameters)
        kv = parameters.kv
        # must be finite: of each tensor its elements' format, how many a row has, and what messages call it
        self._finite = [(Q, KeyFormat.BF16, kv.heads * kv.key_dim, "q")]
        if parameters.search is not None:
            self._finite.append((INDEX_Q, spec.key_format, spec.heads * spec.head_dim, "index_q"))
            self._finite.append((INDEX_W, KeyFormat.FP32, spec.heads, "index_w"))

    def fill(self, chunk: Chunk, first: int, count: int, block: Block, block_row: int, row_offset: int) -> None:
        """Rows [first, first + count) of a chunk to a block; `row_offset` is the call's row of the first of them.

        Raises NonFiniteError, InvalidArgumentError, NoKvRowsError.
        """
        layout = self._layout
        targets = tuple(
            layout.part(block, tensor, block_row, count if size else 0)
            for tensor, size in zip(PART_TENSORS, self._row_bytes, strict=True)
        )
        tensors.copy_rows(chunk, [RowRange(first, count, targets)], self._row_bytes)
        for tensor, key_format, elements, name in self._finite:
            part = layout.part(block, tensor, block_row, count)
            tensors.check_finite(part, key_format, elements, name, row_offset)
        written = layout.part(block, POSITIONS, block_row, count)
        fill_positions(written, self._parameters.start_position, row_offset)
        positions = written.view(np.int64)
        if self._parameters.window:
            self._check_held("window", positions + 1, self._window_rows, row_offset)
        if self._parameters.all_visible:
            self._check_held("KV", (positions + 1) // self._ratio, self._kv_rows, row_offset)

    def _check_held(self, kind: str, needed: npt.NDArray[np.int64], held: int, row_offset: int) -> None:
        """That the layer has the rows, so many from the first on, that each query attends: what is not there would be
        left out of the softmax, and nobody would notice."""
        beyond = needed > held
        if beyond.any():
            at = int(np.argmax(beyond))
            raise NoKvRowsError(
                f"row {row_offset + at} attends {kind} rows up to the {needed[at]}th, the layer has {held} {kind} rows",
                field="chunk.positions" if self._parameters.start_position is None else "header.start_position",
                metadata={"row": row_offset + at, "needed_rows": int(needed[at]), f"{kind.lower()}_rows": held},
            )
