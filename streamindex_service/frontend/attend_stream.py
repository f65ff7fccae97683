"""SparseAttend: one stream of queries in and attention outputs out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from streamindex.checksum import crc32c
from streamindex.framing import Chunk, encode_output_chunk

from streamindex_service.core.turns import Need, OpenSearch
from streamindex_service.frontend.attend_admission import AdmittedAttention
from streamindex_service.frontend.attend_block import LSE, OUT, PARTS, AttendFiller, part_bytes
from streamindex_service.frontend.attend_requests import AttendParameters
from streamindex_service.frontend.attend_run import AttendRun
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.messages import MessageWriter
from streamindex_service.frontend.query_block import positions_of
from streamindex_service.frontend.row_stream import RowStream, Run
from streamindex_service.frontend.service import Service


class AttendStream(RowStream):
    """One admitted call."""

    def __init__(
        self,
        service: Service,
        admitted: AdmittedAttention,
        parameters: AttendParameters,
        blame_key: str,
        context: Any,
        writer: MessageWriter,
    ) -> None:
        self._admitted = admitted
        self._layout = layout = admitted.layout
        self._blame_key = blame_key
        self._filler = AttendFiller(
            layout, admitted.keys.spec, parameters, admitted.kv.length_keys, admitted.window.length_keys
        )
        super().__init__(
            service,
            context,
            writer,
            parts=PARTS,
            part_bytes=part_bytes(layout, parameters),
            block_rows=layout.rows,
            answer_row_bytes=layout.row_bytes[OUT] + layout.row_bytes[LSE],
            announced_rows=parameters.row_count,
            band=parameters.band,
        )

    def _search(self) -> OpenSearch:
        return self._admitted.search

    def _fill(self, chunk: Chunk, first: int, count: int, block: Block, block_row: int, row_offset: int) -> None:
        self._filler.fill(chunk, first, count, block, block_row, row_offset)

    def _tile_rows(self, keys: int) -> int:
        return self._admitted.tile_rows(keys)

    def _needs(self) -> Iterable[Need]:
        return self._admitted.needs

    def _keys_at(self, block: Block, first: int, rows: int) -> int:
        return self._admitted.keys_seen(int(positions_of(self._layout, block, first, rows).max()))

    def _new_run(self, block: Block, first: int, rows: int, keys: int) -> Run:
        admitted = self._admitted
        return AttendRun(admitted.index, admitted.attend, block, first, rows, keys, self._blame_key, self._run_ended)

    def _answer(self, block: Block, block_row: int, row_offset: int, count: int) -> bytes:
        out = self._layout.part(block, OUT, block_row, count)
        lse = self._layout.part(block, LSE, block_row, count)
        return encode_output_chunk(row_offset, count, out.data, lse.data, crc32c(lse.data, crc32c(out.data)))
