"""Search: one stream of queries in and indices out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from streamindex.checksum import crc32c
from streamindex.framing import Chunk, encode_index_chunk

from streamindex_service.core.sizes import POSITION_BYTES
from streamindex_service.core.turns import Need, OpenSearch
from streamindex_service.frontend.admission import AdmittedSearch
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.messages import MessageWriter
from streamindex_service.frontend.query_block import INDICES, SCORES, Q, W, fill_rows, positions_of
from streamindex_service.frontend.requests import SearchParameters
from streamindex_service.frontend.row_stream import RowStream, Run
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tile_run import TileRun


class SearchStream(RowStream):
    """One admitted search."""

    def __init__(
        self,
        service: Service,
        admitted: AdmittedSearch,
        parameters: SearchParameters,
        blame_key: str,
        context: Any,
        writer: MessageWriter,
    ) -> None:
        self._admitted = admitted
        self._tiles = admitted.tiles
        self._layout = layout = admitted.tiles.layout
        self._start = parameters.start_position
        self._scored = parameters.want_scores
        self._blame_key = blame_key
        self._cache = admitted.snapshot.spec
        sizes = layout.row_bytes
        super().__init__(
            service,
            context,
            writer,
            parts=("q", "w", "positions"),
            part_bytes=(sizes[Q], sizes[W], POSITION_BYTES if self._start is None else 0),
            block_rows=layout.rows,
            answer_row_bytes=sizes[INDICES] + sizes[SCORES],
            announced_rows=parameters.row_count,
            band=parameters.band,
        )

    def _search(self) -> OpenSearch:
        return self._admitted.search

    def _fill(self, chunk: Chunk, first: int, count: int, block: Block, block_row: int, row_offset: int) -> None:
        fill_rows(self._layout, self._cache, chunk, first, count, block, block_row, row_offset, self._start)

    def _tile_rows(self, keys: int) -> int:
        return self._tiles.tile_rows(keys)

    def _needs(self) -> Iterable[Need]:
        return (self._tiles.least,)

    def _keys_at(self, block: Block, first: int, rows: int) -> int:
        return self._tiles.keys_seen(int(positions_of(self._layout, block, first, rows).max()))

    def _new_run(self, block: Block, first: int, rows: int, keys: int) -> Run:
        return TileRun(self._tiles, block, first, rows, keys, self._blame_key, self._run_ended)

    def _answer(self, block: Block, block_row: int, row_offset: int, count: int) -> bytes:
        indices = self._layout.part(block, INDICES, block_row, count)
        scores = self._layout.part(block, SCORES, block_row, count * self._scored)
        checksum = crc32c(scores.data, crc32c(indices.data))
        return encode_index_chunk(row_offset, count, indices.data, scores.data, checksum)
