"""Some items of a SparseAttendBatch whose rows pass through one block together: found by item, attended together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import numpy as np
from streamindex.framing import Chunk
from streamindex.v1 import attention_pb2 as pb

from streamindex_service.core.layers import KeyCache
from streamindex_service.errors import ServiceError
from streamindex_service.frontend import batch
from streamindex_service.frontend.attend_admission import AdmittedAttention, admit_attention
from streamindex_service.frontend.attend_block import INDICES, LSE, OUT, AttendFiller
from streamindex_service.frontend.attend_requests import AttendParameters
from streamindex_service.frontend.attend_together import Part, joined
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.neighbours import NO_ROOM, Neighbours
from streamindex_service.frontend.query_block import BlockLayout
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tiles import TilePiece

_MOST_MEMBERS = 64  # calls that a group has open at a time, and a quarter of all that may be open


@dataclass(slots=True, eq=False)
class Member:
    """An item that has been checked, and what becomes of it. `layout`: how its rows lie in a block."""

    item: pb.SparseAttendBatchItem
    result: pb.SparseAttendBatchResult
    cache: KeyCache
    parameters: AttendParameters
    layout: BlockLayout
    answers: dict[int, list[bytes]] = field(default_factory=lambda: {OUT: [], LSE: [], INDICES: []})

    @property
    def failed(self) -> bool:
        """Whether nothing of it is to be computed any more."""
        return bool(self.result.HasField("error"))

    def chunk(self) -> Chunk:
        """Its rows."""
        item = self.item
        positions = np.array(item.positions, dtype=np.int64).tobytes()
        parts = (item.q, item.index_q, item.index_w, item.indices, positions)
        return Chunk(0, item.row_count, tuple(memoryview(part) for part in parts), None)

    def refuse(self, service: Service, error: ServiceError) -> None:
        """It has failed, and no other."""
        if not self.failed:
            refuse(service, self.result, error)


def refuse(service: Service, result: pb.SparseAttendBatchResult, error: ServiceError) -> None:
    """Tell of an item that failed. It has neither header nor chunk: the fields are its own."""
    batch.refuse(service, result, error)
    result.error.field = result.error.field.removeprefix("header.").removeprefix("chunk.")


@dataclass(slots=True, eq=False)
class _Share:
    """Rows [first, first + rows) of a member, from row `at` of the block on."""

    member: Member
    admitted: AdmittedAttention
    filler: AttendFiller
    first: int
    rows: int
    at: int


class AttendGroup:
    """Members of one kind, whose rows lie alike in a block. One of more rows than a block has is a group by itself."""

    def __init__(
        self,
        service: Service,
        turns: asyncio.Semaphore,
        groups: Neighbours,
        deadline_s: Callable[[], float | None],
    ) -> None:
        self._service = service
        self._turns = turns  # of the searches of the call
        self._groups = groups  # of the call, and this is one of them
        self._deadline_s = deadline_s
        self._members: list[tuple[Member, AdmittedAttention, AttendFiller]] = []
        self._series: list[batch.TileSeries] = []
        self._block: Block | None = None
        self._over = False

    async def run(self, waiting: deque[Member], kept: Sequence[int]) -> None:
        """Answer some of those that wait, which leave the queue. Errors are told in their results.

        kept: what an answer consists of.
        """
        async with AsyncExitStack() as stack:
            await self._admit(waiting, stack)
            if not self._members:
                return
            try:
                self._block = block = await self._service.blocks.acquire()
            except ServiceError as error:
                for member, _, _ in self._members:
                    member.refuse(self._service, error)
                return
            for shares in self._fills(self._members[0][0].layout.rows):
                await self._compute(shares, block, kept)
            for member, _, _ in self._members:
                if not member.failed:
                    member.result.out, member.result.lse, member.result.indices = map(b"".join, member.answers.values())
                    self._service.counters.queries += member.item.row_count

    async def _admit(self, waiting: deque[Member], stack: AsyncExitStack) -> None:
        """Open calls of as many members as a block has room for; at least one is taken from the queue."""
        rows, most = 0, max(1, min(_MOST_MEMBERS, self._service.settings.limits.max_open_searches // 4))
        while waiting and len(self._members) < most:
            member = waiting[0]
            if self._members and rows + member.item.row_count > member.layout.rows:
                return
            waiting.popleft()
            try:
                # What is in the way of the next may be this group's own, and then a later group has it.
                opened = await (self._admit_one(member) if self._members else self._admit_first(member))
            except NO_ROOM as error:
                if self._members:
                    waiting.appendleft(member)
                    return
                member.refuse(self._service, error)
                continue
            except ServiceError as error:
                member.refuse(self._service, error)
                continue
            admitted = await stack.enter_async_context(opened)
            admitted.users.append(self)
            assert admitted.layout == member.layout, "rows of two kinds in one block"
            filler = AttendFiller(admitted.layout, member.cache.spec, member.parameters, admitted.window.length_keys)
            self._members.append((member, admitted, filler))
            rows += member.item.row_count

    async def _admit_one(self, member: Member) -> AdmittedAttention:
        return await admit_attention(
            self._service, member.cache, member.item.layer, member.parameters, self._deadline_s, among_others=True
        )

    async def _admit_first(self, member: Member) -> AdmittedAttention:
        return await self._groups.beside(lambda: self._admit_one(member))

    def _fills(self, block_rows: int) -> Iterator[list[_Share]]:
        """The rows of all members, as many at a time as the block has."""
        shares: list[_Share] = []
        at = 0
        for member, admitted, filler in self._members:
            first = 0
            while first < member.item.row_count:
                rows = min(member.item.row_count - first, block_rows - at)
                shares.append(_Share(member, admitted, filler, first, rows, at))
                first, at = first + rows, at + rows
                if at == block_rows:
                    yield shares
                    shares, at = [], 0
        if shares:
            yield shares

    async def _compute(self, shares: list[_Share], block: Block, kept: Sequence[int]) -> None:
        """All of some rows, from the message to the answer."""
        for share in shares:
            self._fill(share, block)
        await self._find(_right(shares), block)
        search = self._members[0][1].search
        for tile in joined(self._parts(_right(shares), block), search):
            try:
                await self._new_series().run(tile, block, tile.first, tile.rows, 0)
            except ServiceError as error:
                for share in shares:
                    if share.at < tile.first + tile.rows and tile.first < share.at + share.rows:
                        share.member.refuse(self._service, error)
        for share in _right(shares):
            for tensor in kept:
                part = share.admitted.layout.part(block, tensor, share.at, share.rows)
                share.member.answers[tensor].append(part.tobytes())

    def _fill(self, share: _Share, block: Block) -> None:
        if share.member.failed:
            return
        try:
            share.filler.fill(share.member.chunk(), share.first, share.rows, block, share.at, share.first)
        except ServiceError as error:
            share.member.refuse(self._service, error)

    async def _find(self, shares: list[_Share], block: Block) -> None:
        """The indices of all rows that have none."""
        searched = [share for share in shares if share.admitted.index is not None]
        if len(searched) == 1:  # a task of its own would come a turn of the loop later
            await self._search(searched[0], block)
            return
        async with asyncio.TaskGroup() as group:
            for share in searched:
                group.create_task(self._search(share, block))

    async def _search(self, share: _Share, block: Block) -> None:
        index = share.admitted.index
        assert index is not None
        positions = share.member.item.positions[share.first : share.first + share.rows]
        first = 0
        async with self._turns:
            series = self._new_series()
            try:
                while first < share.rows:
                    left = positions[first:]
                    rows = min(len(left), index.tile_rows(index.keys_seen(max(left))))
                    keys = index.keys_seen(max(left[:rows]))
                    await series.run(index, block, share.at + first, rows, keys)
                    first += rows
            except ServiceError as error:
                share.member.refuse(self._service, error)

    def _parts(self, shares: list[_Share], block: Block) -> Iterator[Part]:
        """Rows of one sequence each that may be a tile."""
        for share in shares:
            tiles, first, left = share.admitted.attend, share.at, share.rows
            while left:
                rows = min(tiles.rows_together(block, first, left), tiles.tile_rows())
                yield tiles, TilePiece(block, first, rows, 0, 0)
                first, left = first + rows, left - rows

    def _new_series(self) -> batch.TileSeries:
        # Kept to the end: one that does not run at the moment may have tiles to come.
        self._series.append(series := batch.TileSeries())
        return series

    @property
    def runs(self) -> bool:
        """Whether the device has something of it, or will have."""
        return any(series.runs for series in self._series)

    async def stop(self) -> None:
        """Wait for the device."""
        await asyncio.gather(*(series.stop() for series in self._series))

    def give_back(self) -> None:
        """Give the block back. Each of the members' calls asks for it, and the first is before any of them ends."""
        if self._over:
            return
        self._over = True
        # Pages of all members are pinned for the first: they must not be when the others let go of them.
        search, governor = self._members[0][1].search, self._service.governor
        for pages in list(search.used.values()):
            governor.let_go(search, pages)
        if self._block is not None:
            self._service.blocks.release(self._block)


def _right(shares: list[_Share]) -> list[_Share]:
    return [share for share in shares if not share.member.failed]
