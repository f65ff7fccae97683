"""Search: one stream of queries in and indices out.

Three things go on at once. The reader takes chunks from the socket and has them copied into blocks of ingress memory;
rows that are there go to the device as tiles, one after another in the order that the scheduler finds among all
searches, two of a search at a time, so that the device has the next one when it finishes the first; the writer sends
answers in order. While the device is busy with others, rows gather and tiles grow up to a block; while it is idle, a
tile is whatever has arrived. A search holds at most a few blocks, whatever the number of its
queries: a caller who does not read stops its own search and nothing else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from streamindex.checksum import crc32c
from streamindex.framing import Chunk, encode_index_chunk
from streamindex.v1 import search_pb2 as pb

from streamindex_service.core.sizes import MAX_POSITION, POSITION_BYTES
from streamindex_service.errors import InvalidArgumentError, MalformedMessageError, SlowConsumerError
from streamindex_service.frontend import tensors
from streamindex_service.frontend.admission import AdmittedSearch
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.query_block import fill_rows
from streamindex_service.frontend.requests import SearchParameters
from streamindex_service.frontend.rpc import MessageReader, MessageWriter
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tile_run import TileRun

_TILES_AHEAD = 2  # tiles of one search that wait for the device or are there: one runs, one is ready
_ANSWER_BYTES = 1 << 20  # payload of one answer message


@dataclass(slots=True, eq=False)
class _Filling:
    """A block and how far its rows have come."""

    block: Block
    taken: int = 0  # rows that have a place
    ready: int = 0  # rows that are copied
    submitted: int = 0
    delivered: int = 0
    closed: bool = False  # no more rows will come


@dataclass(slots=True, eq=False)
class _Tile:
    filling: _Filling
    run: TileRun
    row_offset: int  # row of the search


@dataclass(slots=True)
class _Progress:
    received: int = 0
    submitted: int = 0
    answered: int = 0
    device_us: int = 0
    queued_s: float = 0.0
    ended: bool = False
    tiles: deque[_Tile] = field(default_factory=deque)
    fillings: deque[_Filling] = field(default_factory=deque)


class SearchStream:
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
        self._service = service
        self._admitted = admitted
        self._parameters = parameters
        self._blame_key = blame_key
        self._cache = admitted.snapshot.spec
        self._layout = admitted.layout
        self._context = context
        self._writer = writer
        self._explicit = parameters.start_position is None
        self._at = _Progress()
        self._changed = asyncio.Event()
        self._blocks_held = 0
        self._block_freed = asyncio.Event()
        self._copying: asyncio.Task[None] | None = None
        self._outstanding: set[TileRun] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._over = False

    async def run(self) -> pb.SearchDone:
        """Until all rows are answered. Raises ServiceError. `give_back` must follow, whatever happens."""
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write())
        self._tasks = [reader, writer]
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in (writer, reader):  # the device's failure says more than what it does to the reader
            if task in done:
                task.result()
        at = self._at
        return pb.SearchDone(row_count=at.answered, device_us=at.device_us, queued_ms=int(1000 * at.queued_s))

    async def give_back(self) -> None:
        """Stop what still goes on and give the blocks back. The device is done with this search when this returns."""
        self._over = True
        for task in self._tasks:
            task.cancel()
        for run in list(self._outstanding):
            run.cancel()
        # A write under back-pressure may never see its cancellation: it is not waited for. What is waited for is all
        # that touches the blocks: the copy that runs, and the tiles that the device has begun.
        pending: list[Awaitable[Any]] = [run.done for run in self._outstanding]
        if self._copying is not None:
            pending.append(self._copying)
        await asyncio.gather(*pending, return_exceptions=True)
        for filling in self._at.fillings:
            self._service.blocks.release(filling.block)
        self._at.fillings.clear()

    async def _read(self) -> None:
        while True:
            message = await self._next_message()
            if message is None:
                break
            if not isinstance(message, Chunk):
                raise MalformedMessageError("a header comes first and once, then chunks")
            await self._take(message)
        await self._settle()
        announced = self._parameters.row_count
        if announced and announced != self._at.received:
            raise InvalidArgumentError(
                f"the header announced {announced} rows, {self._at.received} came",
                field="header.row_count",
                metadata={"announced_rows": announced, "received_rows": self._at.received},
            )
        self._at.ended = True
        self._changed.set()

    async def _next_message(self) -> Any:
        reading = MessageReader(self._context)
        while True:
            answered = self._at.answered
            try:
                return await reading.next(self._copying, self._service.settings.limits.slow_consumer_s)
            except TimeoutError:
                if answered == self._at.answered == self._at.received:
                    reading.cancel()
                    raise SlowConsumerError("no query came for too long while all were answered") from None

    async def _take(self, chunk: Chunk) -> None:
        self._check(chunk)
        done = 0
        while done < chunk.row_count:
            filling = await self._room()
            count = min(chunk.row_count - done, self._layout.rows - filling.taken)
            # One copy at a time, so that rows are ready in order; the next chunk is received meanwhile.
            await self._settle()
            self._copying = asyncio.create_task(
                self._copy(chunk, done, count, filling, filling.taken, self._at.received)
            )
            filling.taken += count
            filling.closed = filling.taken == self._layout.rows
            self._at.received += count
            done += count

    def _check(self, chunk: Chunk) -> None:
        limit = int(self._service.settings.limits.max_chunk_bytes)
        if chunk.payload_bytes > limit:
            raise InvalidArgumentError(
                f"a chunk may have {limit} bytes",
                field="chunk",
                metadata={"limit": limit, "received_bytes": chunk.payload_bytes},
            )
        if chunk.row_count < 1:
            raise InvalidArgumentError("chunk.row_count must be at least 1", field="chunk.row_count")
        if chunk.row_offset != self._at.received:
            raise InvalidArgumentError(
                f"chunk.row_offset must be {self._at.received}: chunks come in order, without gaps",
                field="chunk.row_offset",
                metadata={"expected_row_offset": self._at.received},
            )
        q, w, _, _, _ = self._layout.row_bytes
        tensors.check_part_sizes(chunk, ("q", "w", "positions"), (q, w, POSITION_BYTES if self._explicit else 0))

    async def _room(self) -> _Filling:
        """The block that the next row goes to."""
        if self._at.fillings and not self._at.fillings[-1].closed:
            return self._at.fillings[-1]
        while self._blocks_held >= self._service.settings.memory.search_blocks:
            self._block_freed.clear()
            await self._block_freed.wait()
        self._blocks_held += 1
        filling = _Filling(await self._service.blocks.acquire())
        self._at.fillings.append(filling)
        return filling

    async def _settle(self) -> None:
        # Forgotten only when it is done: whoever cleans up must know of a copy that runs.
        if self._copying is not None:
            await asyncio.shield(self._copying)
            self._copying = None

    async def _copy(
        self, chunk: Chunk, first: int, count: int, filling: _Filling, block_row: int, row_offset: int
    ) -> None:
        loop = asyncio.get_running_loop()
        start = self._parameters.start_position
        arguments = (self._layout, self._cache, chunk, first, count, filling.block, block_row, row_offset, start)
        await loop.run_in_executor(self._service.ingest_threads, fill_rows, *arguments)
        filling.ready += count
        self._pump()

    def _pump(self) -> None:
        """Make tiles of what is ready, up to _TILES_AHEAD; one that still waits takes more rows first."""
        # A copy that was running when the search ended still comes here; its block is about to be given back.
        if self._over:
            return
        for filling in self._at.fillings:
            while (ready := filling.ready - filling.submitted) > 0:
                limit = self._admitted.tile_rows(self._keys_seen(ready))
                last = self._at.tiles[-1] if self._at.tiles else None
                if last is not None and last.filling is filling and last.run.waiting and last.run.rows < limit:
                    rows = min(ready, limit - last.run.rows)
                    last.run.grow(rows, self._keys_seen(rows))
                    self._submitted(filling, rows)
                elif len(self._outstanding) < _TILES_AHEAD:
                    self._submit(filling, min(ready, limit))
                else:
                    return

    def _submit(self, filling: _Filling, rows: int) -> None:
        keys = self._keys_seen(rows)
        run = TileRun(self._admitted, filling.block, filling.submitted, rows, keys, self._blame_key)
        self._at.tiles.append(_Tile(filling, run, self._at.submitted))
        self._submitted(filling, rows)
        self._outstanding.add(run)
        run.done.add_done_callback(lambda _: self._tile_done(run))
        run.start()
        self._changed.set()

    def _submitted(self, filling: _Filling, rows: int) -> None:
        filling.submitted += rows
        self._at.submitted += rows

    def _keys_seen(self, rows: int) -> int:
        """Of the next rows, the last. Explicit positions are not looked at: as many as there are."""
        start = self._parameters.start_position
        position = MAX_POSITION if start is None else start + self._at.submitted + rows - 1
        return self._admitted.keys_seen(position)

    def _tile_done(self, run: TileRun) -> None:
        self._outstanding.discard(run)
        self._pump()
        self._changed.set()

    async def _write(self) -> None:
        while True:
            while not self._at.tiles:
                if self._at.ended and self._at.answered == self._at.received:
                    return
                self._changed.clear()
                await self._changed.wait()
            tile = self._at.tiles[0]
            await asyncio.shield(tile.run.done)
            self._at.device_us += tile.run.device_us
            self._at.queued_s += tile.run.queued_s
            for first in range(0, tile.run.rows, self._answer_rows):
                count = min(self._answer_rows, tile.run.rows - first)
                await self._send(self._answer(tile, first, count))
                self._at.answered += count
            self._at.tiles.popleft()
            self._deliver(tile)

    @property
    def _answer_rows(self) -> int:
        return max(1, _ANSWER_BYTES // (self._layout.row_bytes[3] + self._layout.row_bytes[4]))

    def _answer(self, tile: _Tile, first: int, count: int) -> bytes:
        indices = self._layout.part(tile.filling.block, 3, tile.run.first + first, count)
        scores = self._layout.part(tile.filling.block, 4, tile.run.first + first, count * self._parameters.want_scores)
        checksum = crc32c(scores.data, crc32c(indices.data))
        return encode_index_chunk(tile.row_offset + first, count, indices.data, scores.data, checksum)

    async def _send(self, message: bytes) -> None:
        await self._writer.write(message)

    def _deliver(self, tile: _Tile) -> None:
        filling = tile.filling
        filling.delivered += tile.run.rows
        if filling.closed and filling.delivered == self._layout.rows:
            self._at.fillings.remove(filling)
            self._service.blocks.release(filling.block)
            self._blocks_held -= 1
            self._block_freed.set()
