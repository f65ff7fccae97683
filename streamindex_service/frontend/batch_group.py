"""Some items of a ragged step whose rows pass through one block together: admitted one by one, computed together."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

from streamindex_service.core.specs import CacheSpec
from streamindex_service.core.turns import OpenSearch
from streamindex_service.errors import DeviceMemoryError, InternalError, ServiceError
from streamindex_service.frontend import batch
from streamindex_service.frontend.admission import OpenCall
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.index_tiles import IndexTiles
from streamindex_service.frontend.neighbours import NO_ROOM, Neighbours
from streamindex_service.frontend.query_block import BlockLayout
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tiles import TilePiece
from streamindex_service.frontend.tiles_together import Part, Together, joined

_MOST_MEMBERS = 64  # calls that a group has open at a time, and a quarter of all that may be open
_OF_A_PART = (DeviceMemoryError, InternalError)  # what rows of one member can make a tile of several fail with
_GROUPS_AT_ONCE = 2  # of one call: while one is computed, the other is admitted
_TILES_AT_ONCE = 16  # of one call, that find indices; well below the bound of the governor's queue


class Member(ABC):
    """An item that has been checked, and what becomes of it. `layout`: how its rows lie in a block."""

    def __init__(self, item: Any, result: Any, layout: BlockLayout) -> None:
        self.item = item
        self.result = result
        self.layout = layout

    @property
    def rows(self) -> int:
        """Its rows."""
        return int(self.item.row_count)

    @property
    def failed(self) -> bool:
        """Whether nothing of it is to be computed any more."""
        return bool(self.result.HasField("error"))

    @abstractmethod
    def refuse(self, error: ServiceError) -> None:
        """It has failed, and no other."""

    @abstractmethod
    def take(self, block: Block, at: int, rows: int) -> None:
        """The answers of its next rows are in a block, from row `at` of it on."""

    @abstractmethod
    def finish(self) -> None:
        """All answers were taken."""


AnyMember = TypeVar("AnyMember", bound=Member)
Opened = TypeVar("Opened", bound=OpenCall)


@dataclass(slots=True, eq=False)
class Share(Generic[AnyMember, Opened]):
    """Rows [first, first + rows) of a member, from row `at` of the block on."""

    member: AnyMember
    admitted: Opened
    first: int
    rows: int
    at: int


class BatchCall:
    """What the groups of one call share. deadline_s: the caller's remaining time."""

    def __init__(self, deadline_s: Callable[[], float | None]) -> None:
        self.deadline_s = deadline_s
        self.turns = asyncio.Semaphore(_TILES_AT_ONCE)
        self.groups = Neighbours()

    async def answer(
        self, members: Sequence[tuple[Hashable, AnyMember]], new_group: Callable[[], BatchGroup[AnyMember, Any]]
    ) -> None:
        """Answer all members, group after group of those of one kind."""
        waiting: dict[Hashable, deque[AnyMember]] = {}
        for kind, member in members:
            waiting.setdefault(kind, deque()).append(member)

        async def groups() -> None:
            while some := next((each for each in waiting.values() if each), None):
                with self.groups.part():
                    await new_group().run(some)

        if len(members) == 1:  # a task of its own would come a turn of the loop later
            await groups()
            return
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_GROUPS_AT_ONCE):
                tasks.create_task(groups())


class BatchGroup(ABC, Generic[AnyMember, Opened]):
    """Members of one kind, whose rows lie alike in a block. One of more rows than a block has is a group by itself."""

    def __init__(self, service: Service, call: BatchCall) -> None:
        self._service = service
        self._call = call
        self._members: list[tuple[AnyMember, Opened]] = []
        self._series: list[batch.TileSeries] = []
        self._block: Block | None = None
        self._over = False

    @abstractmethod
    async def _open(self, member: AnyMember) -> Opened:
        """Admit the call of a member. Raises ServiceError."""

    @abstractmethod
    def _fill(self, share: Share[AnyMember, Opened], block: Block) -> None:
        """Copy rows of a member to the block, and check them. Raises ServiceError."""

    @abstractmethod
    def _index(self, admitted: Opened) -> IndexTiles | None:
        """What finds the indices of a call, if they are to be found."""

    async def _compute(self, shares: list[Share[AnyMember, Opened]], block: Block) -> None:
        """Have the answers of rows in the block; their indices are there. Errors are told to the members."""

    async def run(self, waiting: deque[AnyMember]) -> None:
        """Answer some of those that wait, which leave the queue. Errors are told to the members."""
        async with AsyncExitStack() as stack:
            await self._admit(waiting, stack)
            if not self._members:
                return
            try:
                self._block = block = await self._service.blocks.acquire()
            except ServiceError as error:
                for member, _ in self._members:
                    member.refuse(error)
                return
            for shares in self._fills(self._members[0][0].layout.rows):
                for share in shares:
                    self._fill_share(share, block)
                await self._find(right(shares), block)
                await self._compute(right(shares), block)
                for share in right(shares):
                    share.member.take(block, share.at, share.rows)
            for member, _ in self._members:
                if not member.failed:
                    member.finish()
                    self._service.counters.queries += member.rows

    async def _admit(self, waiting: deque[AnyMember], stack: AsyncExitStack) -> None:
        """Open calls of as many members as a block has room for; at least one is taken from the queue."""
        rows, most = 0, max(1, min(_MOST_MEMBERS, self._service.settings.limits.max_open_searches // 4))
        while waiting and len(self._members) < most:
            member = waiting[0]
            if self._members and rows + member.rows > member.layout.rows:
                return
            waiting.popleft()
            try:
                # What is in the way of the next may be this group's own, and then a later group has it.
                opened = await (self._open(member) if self._members else self._open_first(member))
            except NO_ROOM as error:
                if self._members:
                    waiting.appendleft(member)
                    return
                member.refuse(error)
                continue
            except ServiceError as error:
                member.refuse(error)
                continue
            await stack.enter_async_context(opened)
            opened.users.append(self)
            self._members.append((member, opened))
            rows += member.rows

    async def _open_first(self, member: AnyMember) -> Opened:
        return await self._call.groups.beside(lambda: self._open(member))

    def _fills(self, block_rows: int) -> Iterator[list[Share[AnyMember, Opened]]]:
        """The rows of all members, as many at a time as the block has."""
        shares: list[Share[AnyMember, Opened]] = []
        at = 0
        for member, admitted in self._members:
            first = 0
            while first < member.rows:
                rows = min(member.rows - first, block_rows - at)
                shares.append(Share(member, admitted, first, rows, at))
                first, at = first + rows, at + rows
                if at == block_rows:
                    yield shares
                    shares, at = [], 0
        if shares:
            yield shares

    def _fill_share(self, share: Share[AnyMember, Opened], block: Block) -> None:
        if share.member.failed:
            return
        try:
            self._fill(share, block)
        except ServiceError as error:
            share.member.refuse(error)

    async def _find(self, shares: list[Share[AnyMember, Opened]], block: Block) -> None:
        """The indices of all rows that have none: of as many sequences in a tile as may be, and page by page of those
        that the device does not hold as a whole."""
        whole: list[Part[IndexTiles]] = []
        searches = []
        for share in shares:
            index = self._index(share.admitted)
            if index is None:
                continue
            pieces = _pieces(index, share, block)
            if index.in_parts:
                searches.append(self._search(shares, block, [(index, piece) for piece in pieces]))
            else:
                whole += [(index, piece) for piece in pieces]
        searches += [self._search_together(shares, block, tile) for tile in joined(whole, self._place)]
        if len(searches) == 1:  # a task of its own would come a turn of the loop later
            await searches[0]
            return
        async with asyncio.TaskGroup() as group:
            for search in searches:
                group.create_task(search)

    async def _search(
        self, shares: list[Share[AnyMember, Opened]], block: Block, parts: Sequence[Part[IndexTiles]]
    ) -> None:
        """Rows of one member, tile after tile."""
        async with self._call.turns:
            series = self._new_series()
            for index, piece in parts:
                try:
                    await series.run(index, block, piece.first, piece.rows, piece.keys)
                except ServiceError as error:
                    refuse_rows(shares, piece.first, piece.rows, error)
                    return

    async def _search_together(
        self, shares: list[Share[AnyMember, Opened]], block: Block, tile: Together[IndexTiles]
    ) -> None:
        async with self._call.turns:
            await self._run_together(shares, block, tile)

    async def _run_together(self, shares: list[Share[AnyMember, Opened]], block: Block, tile: Together[Any]) -> None:
        """A tile of rows of several members. What fails together may be right apart: one fails by itself then."""
        series, queue = self._new_series(), deque([tile])
        while queue:
            tile = queue.popleft()
            if all(share.member.failed for share in shares_of(shares, tile.first, tile.rows)):
                continue  # with another tile, while this one waited for its turn
            try:
                await series.run(tile, block, tile.first, tile.rows, tile.keys)
            except ServiceError as error:
                if isinstance(error, _OF_A_PART) and len(tile.parts) > 1:
                    queue += [Together([part], self._place) for part in tile.parts]
                else:
                    refuse_rows(shares, tile.first, tile.rows, error)

    @property
    def _place(self) -> OpenSearch:
        """In whose place tiles of several members wait."""
        return self._members[0][1].search

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
        search, governor = self._place, self._service.governor
        for pages in list(search.used.values()):
            governor.let_go(search, pages)
        if self._block is not None:
            self._service.blocks.release(self._block)


def right(shares: list[Share[AnyMember, Opened]]) -> list[Share[AnyMember, Opened]]:
    """Those whose members have not failed."""
    return [share for share in shares if not share.member.failed]


def refuse_rows(shares: Sequence[Share[Any, Any]], first: int, rows: int, error: ServiceError) -> None:
    """All members fail of which some of these rows of the block are."""
    for share in shares_of(shares, first, rows):
        share.member.refuse(error)


def shares_of(shares: Sequence[Share[Any, Any]], first: int, rows: int) -> list[Share[Any, Any]]:
    """Those of which some of these rows of the block are."""
    return [share for share in shares if share.at < first + rows and first < share.at + share.rows]


def search_kind(spec: CacheSpec) -> Hashable:
    """What caches must have in common that are searched in one tile."""
    return spec.key_format, spec.heads, spec.head_dim, spec.ratio


def _pieces(index: IndexTiles, share: Share[Any, Any], block: Block) -> list[TilePiece]:
    """Rows of a share that may each be a tile, and how many keys they see."""
    positions = share.member.item.positions[share.first : share.first + share.rows]
    last = list(accumulate(reversed(positions), max))[::-1]  # of each row and those after it
    found, first = [], 0
    while first < share.rows:
        rows = min(share.rows - first, index.tile_rows(index.keys_seen(last[first])))
        keys = index.keys_seen(max(positions[first : first + rows]))
        found.append(TilePiece(block, share.at + first, rows, keys, 0))
        first += rows
    return found
