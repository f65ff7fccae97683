"""Some items of a SparseAttendBatch whose rows pass through one block together: found and attended together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from streamindex.framing import Chunk
from streamindex.v1 import attention_pb2 as pb

from streamindex_service.core.layers import KeyCache
from streamindex_service.errors import ServiceError
from streamindex_service.frontend import batch
from streamindex_service.frontend.attend_admission import AdmittedAttention, admit_attention
from streamindex_service.frontend.attend_block import INDICES, LSE, OUT, AttendFiller
from streamindex_service.frontend.attend_requests import AttendParameters
from streamindex_service.frontend.attend_tiles import AttendTiles
from streamindex_service.frontend.batch_group import BatchGroup, Member, Share
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.index_tiles import IndexTiles
from streamindex_service.frontend.query_block import BlockLayout
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tiles import TilePiece
from streamindex_service.frontend.tiles_together import Part, joined


class AttendMember(Member):
    """An item of a SparseAttendBatch. kept: what an answer consists of."""

    def __init__(
        self,
        service: Service,
        item: pb.SparseAttendBatchItem,
        result: pb.SparseAttendBatchResult,
        cache: KeyCache,
        parameters: AttendParameters,
        layout: BlockLayout,
        kept: Sequence[int],
    ) -> None:
        super().__init__(item, result, layout)
        self.cache = cache
        self.parameters = parameters
        self.filler: AttendFiller | None = None  # once it is admitted
        self._service = service
        self._answers: dict[int, list[bytes]] = {OUT: [], LSE: [], INDICES: []}
        self._kept = kept

    def chunk(self) -> Chunk:
        """Its rows."""
        item = self.item
        positions = np.array(item.positions, dtype=np.int64).tobytes()
        parts = (item.q, item.index_q, item.index_w, item.indices, positions)
        return Chunk(0, item.row_count, tuple(memoryview(part) for part in parts), None)

    def refuse(self, error: ServiceError) -> None:
        """See `Member`."""
        if not self.failed:
            refuse(self._service, self.result, error)

    def take(self, block: Block, at: int, rows: int) -> None:
        """See `Member`."""
        for tensor in self._kept:
            self._answers[tensor].append(self.layout.part(block, tensor, at, rows).tobytes())

    def finish(self) -> None:
        """See `Member`."""
        self.result.out, self.result.lse, self.result.indices = map(b"".join, self._answers.values())


def refuse(service: Service, result: pb.SparseAttendBatchResult, error: ServiceError) -> None:
    """Tell of an item that failed. It has neither header nor chunk: the fields are its own."""
    batch.refuse(service, result, error)
    result.error.field = result.error.field.removeprefix("header.").removeprefix("chunk.")


AttendShare = Share[AttendMember, AdmittedAttention]


class AttendGroup(BatchGroup[AttendMember, AdmittedAttention]):
    """Items of one kind."""

    async def _open(self, member: AttendMember) -> AdmittedAttention:
        admitted = await admit_attention(
            self._service, member.cache, member.item.layer, member.parameters, self._call.deadline_s, among_others=True
        )
        assert admitted.layout == member.layout, "rows of two kinds in one block"
        member.filler = AttendFiller(
            admitted.layout,
            member.cache.spec,
            member.parameters,
            admitted.kv.length_keys,
            admitted.window.length_keys,
        )
        return admitted

    def _fill(self, share: AttendShare, block: Block) -> None:
        assert share.member.filler is not None
        share.member.filler.fill(share.member.chunk(), share.first, share.rows, block, share.at, share.first)

    def _index(self, admitted: AdmittedAttention) -> IndexTiles | None:
        return admitted.index

    async def _compute(self, shares: list[AttendShare], block: Block) -> None:
        for tile in joined(_parts(shares, block), self._place):
            await self._run_together(shares, block, tile)


def _parts(shares: list[AttendShare], block: Block) -> Iterator[Part[AttendTiles]]:
    """Rows of one sequence each that may be a tile."""
    for share in shares:
        tiles, first, left = share.admitted.attend, share.at, share.rows
        while left:
            rows = min(tiles.rows_together(block, first, left), tiles.tile_rows())
            yield tiles, TilePiece(block, first, rows, 0, 0)
            first, left = first + rows, left - rows
