"""One stream of query rows in and answer rows out.

Three things go on at once. The reader takes chunks from the socket and copies them into blocks of ingress memory; rows
that are there go to the device as tiles, one after another in the order that the scheduler finds among all searches;
the writer sends answers in order. The first rows go at once. A tile costs the event loop about as much as half a chunk
does, so after that rows gather: a tile goes when it is as large as it may be, or when nothing of the search is on its
way and the rows have gathered (`gathering.py`). With a device that is faster than the caller, tiles are what arrives in
such a time; with a slower one they are full, and two of a search are on their way, so that the device has the next one
when it finishes the first. A tile for which other layers would have to make room gathers for longer, the first one too
(`Room.gathering_s`). A search holds at most a few blocks, whatever the number of its queries: a caller who does not
read stops its own search and nothing else.

Rows are checked and copied on the event loop, while they are still in the processor's cache: a tenth of a millisecond
for 1 MiB, less than it costs to hand them to a thread and to hear of it. What one stream does there in one turn of the
loop is bounded, and so is what all streams do (`LoopTurns`), so that a decode step does not wait for many of them; and
while decode steps are on their way, streams of a lower priority hold back (`Pacing`). Rows for which others would have
to make room on the device come behind those that it can go on with; of those whose layers do not take part yet, a few
streams bring any (`ReadAhead`).
"""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from streamindex.framing import Chunk

from streamindex_service.core.band_queue import Band
from streamindex_service.core.turns import Need, OpenSearch
from streamindex_service.errors import InvalidArgumentError, MalformedMessageError, SlowConsumerError
from streamindex_service.frontend import tensors
from streamindex_service.frontend.gathering import Gathering
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.messages import MessageReader, MessageWriter
from streamindex_service.frontend.service import Service

_TILES_AHEAD = 2  # tiles of one search that wait for the device or are there: one runs, one is ready
_ANSWER_BYTES = 1 << 20  # payload of one answer message
_LOOK_AGAIN_S = 0.01  # while rows gather for a layer without room
_TURN_BYTES = 1 << 20  # of rows that are copied in one turn of the loop
_SILENT_S = 0.1  # without rows, their caller thinks
_FIRST_ROWS = 4096  # the oldest stream goes first with so many rows; then it comes after those that have brought less
_ages = itertools.count()  # a number for each stream


class Run(Protocol):
    """Rows on their way through the device; `done` is done once nothing of them waits or runs any more."""

    first: int
    rows: int
    device_us: int
    queued_s: float
    done: asyncio.Future[None]

    @property
    def waiting(self) -> bool:
        """Whether it may still grow."""

    def start(self) -> None:
        """Begin."""

    def grow(self, rows: int, keys: int) -> None:
        """So many rows more, which see so many keys."""

    def cancel(self) -> None:
        """Do not go on. What the device has begun still ends."""


@dataclass(frozen=True, slots=True)
class RowsDone:
    """How a stream went."""

    rows: int
    device_us: int
    queued_ms: int


@dataclass(slots=True, eq=False)
class _Filling:
    """A block and how far its rows have come."""

    block: Block
    rows: int = 0  # that are there
    submitted: int = 0
    delivered: int = 0


@dataclass(slots=True, eq=False)
class _Tile:
    filling: _Filling
    run: Run
    row_offset: int  # row of the stream


@dataclass(slots=True)
class _Progress:
    received: int = 0
    submitted: int = 0
    answering: int = 0  # the caller may have these answers
    answered: int = 0  # these have left
    device_us: int = 0
    queued_s: float = 0.0
    ended: bool = False
    tiles: deque[_Tile] = field(default_factory=deque)
    fillings: deque[_Filling] = field(default_factory=deque)


class RowStream(ABC):
    """The rows of one open call. A subclass says what they are, what is done with them, and what an answer is.

    parts: names of a chunk's tensors; part_bytes: bytes of a row of each; block_rows: rows of a block;
    announced_rows: that will come, 0 when that is not known.
    """

    def __init__(
        self,
        service: Service,
        context: Any,
        writer: MessageWriter,
        *,
        parts: tuple[str, ...],
        part_bytes: tuple[int, ...],
        block_rows: int,
        answer_row_bytes: int,
        announced_rows: int,
        band: Band,
    ) -> None:
        self._service = service
        self._writer = writer
        self._parts = parts
        self._part_bytes = part_bytes
        self._block_rows = block_rows
        self._answer_rows = max(1, _ANSWER_BYTES // answer_row_bytes)
        self._turn_rows = max(1, _TURN_BYTES // part_bytes[0])
        self._announced_rows = announced_rows
        self._holds_back = band > Band.INTERACTIVE
        self._time_remaining = context.time_remaining
        self.band = band
        self.age = next(_ages)
        self._at = _Progress()
        self._changed = asyncio.Event()
        self._gathering = Gathering(service.loop_turns, context.time_remaining, with_others=self._holds_back)
        self._gathered: asyncio.TimerHandle | None = None
        self._blocks_held = 0
        self._block_freed = asyncio.Event()
        self._waits_for_block = False
        self._reader = MessageReader(context)
        self._heard_at = service.clock()  # a message was waited for, or an answer left
        self._outstanding: set[Run] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._over = False

    @abstractmethod
    def _search(self) -> OpenSearch:
        """The call's place among the others."""

    @abstractmethod
    def _fill(self, chunk: Chunk, first: int, count: int, block: Block, block_row: int, row_offset: int) -> None:
        """Copy rows [first, first + count) of a chunk to rows of a block, and check them. Raises ServiceError."""

    @abstractmethod
    def _tile_rows(self, keys: int) -> int:
        """Most rows of the next tile, where they see up to so many keys."""

    @abstractmethod
    def _keys_at(self, block: Block, first: int, rows: int) -> int:
        """The most index keys that one of these rows of a block sees."""

    @abstractmethod
    def _needs(self) -> Iterable[Need]:
        """The least of each operation that is done with the rows."""

    @abstractmethod
    def _new_run(self, block: Block, first: int, rows: int, keys: int) -> Run:
        """What computes rows of a block; `_run_ended` is to be called with it as soon as it is done."""

    @abstractmethod
    def _answer(self, block: Block, block_row: int, row_offset: int, count: int) -> bytes:
        """The message that answers so many rows, which are computed."""

    async def run(self) -> RowsDone:
        """Until all rows are answered. Raises ServiceError. Then `stop`, if it still `runs`, and `give_back`."""
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write())
        self._tasks = [reader, writer]
        silence = asyncio.create_task(self._listen_for_silence())
        try:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            silence.cancel()
        for task in (writer, reader):  # the device's failure says more than what it does to the reader
            if task in done:
                task.result()
        at = self._at
        return RowsDone(at.answered, at.device_us, int(1000 * at.queued_s))

    @property
    def runs(self) -> bool:
        """Whether it reads, writes, or has something on the device."""
        return bool(self._outstanding) or not all(task.done() for task in self._tasks)

    async def stop(self) -> None:
        """Stop what still goes on. The device is done with this search when this returns."""
        self._over = True
        for task in self._tasks:
            task.cancel()
        for run in list(self._outstanding):
            run.cancel()
        # A write under back-pressure may never see its cancellation: it is not waited for. What is waited for is all
        # that touches the blocks: the tiles that the device has begun.
        await asyncio.gather(*(run.done for run in self._outstanding), return_exceptions=True)

    def give_back(self) -> None:
        """Give the blocks back. Nothing touches them any more."""
        self._over = True
        self._service.read_ahead.leave(self)
        if self._gathered is not None:
            self._gathered.cancel()
        for filling in self._at.fillings:
            self._service.blocks.release(filling.block)
        self._at.fillings.clear()
        # They refer to this, and what stopped them to their frames.
        self._at.tiles.clear()
        self._tasks.clear()

    async def _read(self) -> None:
        pacing = self._service.pacing
        while True:
            if self._holds_back:
                await pacing.before_reading()
            self._heard_at = self._service.clock()  # silence begins when there is somebody to listen
            message = await self._reader.next()
            if message is None:
                break
            if not isinstance(message, Chunk):
                raise MalformedMessageError("a header comes first and once, then chunks")
            pacing.read(message.payload_bytes)
            await self._take(message)
        announced = self._announced_rows
        if announced and announced != self._at.received:
            raise InvalidArgumentError(
                f"the header announced {announced} rows, {self._at.received} came",
                field="header.row_count",
                metadata={"announced_rows": announced, "received_rows": self._at.received},
            )
        self._at.ended = True
        self._pump()
        self._changed.set()

    async def _listen_for_silence(self) -> None:
        # One look a period, not a timer for every message: silence is noticed after one to two of them.
        period_s = self._service.settings.limits.slow_consumer_s
        while True:
            await asyncio.sleep(period_s)
            all_answered = self._at.answered == self._at.received
            if all_answered and self._reader.waits and self._service.clock() - self._heard_at >= period_s:
                self._reader.stop(SlowConsumerError("no query came for too long while all were answered"))
                return

    async def _take(self, chunk: Chunk) -> None:
        self._check(chunk)
        unasked = self._at.answering < self._at.received  # now: there may be answers before it has its turn
        await self._turn()
        tensors.verify_checksum(chunk)
        self._service.counters.queries += chunk.row_count
        done = 0
        while done < chunk.row_count:
            if done:
                await self._turn()
            filling = await self._room()
            count = min(chunk.row_count - done, self._block_rows - filling.rows, self._turn_rows)
            self._fill(chunk, done, count, filling.block, filling.rows, self._at.received)
            filling.rows += count
            self._gathering.rows_came(unasked=unasked or done > 0)
            self._at.received += count
            done += count
            self._pump()

    async def _turn(self) -> None:
        """Wait for a turn of the loop in which rows may be copied."""
        room, read_ahead, search = self._service.governor.room, self._service.read_ahead, self._search()
        if self.lacks_layer():
            left_s = self._time_remaining()
            most_s = float(self._service.settings.scheduler.promotion_wait_s)
            search.rows_wait = True
            try:
                await read_ahead.next(self, most_s if left_s is None else min(most_s, left_s / 4))
            finally:
                search.rows_wait = False
        else:
            read_ahead.leave(self)
        lacks_room = room.lacks_room(search, self._needs())
        rank = (int(self.band), self._at.received // _FIRST_ROWS, self.age)
        await self._service.loop_turns.next(rank, behind=lacks_room)

    @property
    def caller(self) -> str:
        """Whose it is."""
        return self._search().caller

    def lacks_layer(self) -> bool:
        """Whether what its rows need does not take part on the device yet."""
        return self._service.governor.room.lacks_layer(self._search(), self._needs())

    def brings_rows(self) -> bool:
        """Whether rows are on their way into a block, or came a moment ago, or all that it can bring now is there and
        not computed yet. Who does not read its answers brings none."""
        at, blocked = self._at, self._waits_for_block
        if not (self._reader.waits or blocked or at.ended):
            return True
        if asyncio.get_running_loop().time() - self._gathering.came_at < _SILENT_S:
            return True
        all_there = blocked or at.ended or at.received == self._announced_rows
        return all_there and (at.received > at.submitted or bool(self._outstanding))

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
        announced = self._announced_rows
        if announced and self._at.received + chunk.row_count > announced:
            # before they are computed: a call may hold no more than what those it announced can ask for
            raise InvalidArgumentError(
                f"the header announced {announced} rows, more came",
                field="header.row_count",
                metadata={"announced_rows": announced, "received_rows": self._at.received + chunk.row_count},
            )
        tensors.check_part_sizes(chunk, self._parts, self._part_bytes)

    async def _room(self) -> _Filling:
        """The block that the next row goes to."""
        if self._at.fillings and self._at.fillings[-1].rows < self._block_rows:
            return self._at.fillings[-1]
        governor, search = self._service.governor, self._search()
        # Rows of a search that waits for others to make room are of use to nobody yet: one block of them, and what the
        # stream could bring meanwhile goes to those who have their layers.
        most = self._service.settings.memory.search_blocks
        while self._blocks_held >= (1 if governor.room.is_held_back(search) else most):
            self._block_freed.clear()
            self._waits_for_block = True
            await self._block_freed.wait()
            self._waits_for_block = False
        self._blocks_held += 1
        filling = _Filling(await self._service.blocks.acquire(lambda: governor.room.is_held_back(search)))
        self._at.fillings.append(filling)
        return filling

    def _pump(self) -> None:
        """Make tiles of the rows that are there, up to _TILES_AHEAD; one that still waits takes more rows first."""
        for filling in self._at.fillings:
            while (ready := filling.rows - filling.submitted) > 0:
                limit = self._tile_rows(self._keys_seen(filling, ready))
                last = self._at.tiles[-1] if self._at.tiles else None
                if last is not None and last.filling is filling and last.run.waiting and last.run.rows < limit:
                    rows = min(ready, limit - last.run.rows)
                    last.run.grow(rows, self._keys_seen(filling, rows))
                    self._submitted(filling, rows)
                elif len(self._outstanding) < _TILES_AHEAD and self._may_go(filling, ready >= limit):
                    self._submit(filling, min(ready, limit))
                else:
                    return

    def _may_go(self, filling: _Filling, full: bool) -> bool:
        """Whether a tile may go: it does not get more rows, or has waited for them enough. full: a tile of its own."""
        if filling.rows == self._block_rows or self._at.ended or self._at.received == self._announced_rows:
            return True
        if self._outstanding:
            return full
        for_copy_s = self._service.governor.room.gathering_s(self._search(), self._needs())
        loop = asyncio.get_running_loop()
        now, until = loop.time(), self._gathering.ends_at(for_copy_s=for_copy_s, full=full)
        if now >= until:
            return True
        if self._gathered is not None:
            self._gathered.cancel()
        # For a copy, there may be room before, of which nobody tells: it is looked again.
        look_at = min(until, now + _LOOK_AGAIN_S) if for_copy_s else until
        self._gathered = loop.call_at(look_at, self._end_gathering)
        return False

    def _end_gathering(self) -> None:
        self._gathered = None
        if not self._over:
            self._pump()

    def _submit(self, filling: _Filling, rows: int) -> None:
        keys = self._keys_seen(filling, rows)
        run = self._new_run(filling.block, filling.submitted, rows, keys)
        self._at.tiles.append(_Tile(filling, run, self._at.submitted))
        self._submitted(filling, rows)
        self._outstanding.add(run)
        self._gathering.tile_went()
        run.start()

    def _submitted(self, filling: _Filling, rows: int) -> None:
        filling.submitted += rows
        self._at.submitted += rows

    def _keys_seen(self, filling: _Filling, rows: int) -> int:
        """By the next rows."""
        return self._keys_at(filling.block, filling.submitted, rows)

    def _run_ended(self, run: Run) -> None:
        self._outstanding.discard(run)
        if not self._over and run.done.exception() is None:
            self._pump()
        self._changed.set()

    async def _write(self) -> None:
        while True:
            while not (self._at.tiles and self._at.tiles[0].run.done.done()):
                if self._at.ended and self._at.answered == self._at.received:
                    return
                self._changed.clear()
                await self._changed.wait()
            tile = self._at.tiles[0]
            tile.run.done.result()
            self._at.device_us += tile.run.device_us
            self._at.queued_s += tile.run.queued_s
            for first in range(0, tile.run.rows, self._answer_rows):
                count = min(self._answer_rows, tile.run.rows - first)
                row = tile.run.first + first
                self._at.answering += count
                await self._writer.write(self._answer(tile.filling.block, row, tile.row_offset + first, count))
                self._at.answered += count
                self._heard_at = self._service.clock()
            self._at.tiles.popleft()
            self._deliver(tile)

    def _deliver(self, tile: _Tile) -> None:
        filling = tile.filling
        filling.delivered += tile.run.rows
        if filling.delivered == filling.rows:  # full or not: a search that waits for queries holds no memory
            self._at.fillings.remove(filling)
            self._service.blocks.release(filling.block)
            self._blocks_held -= 1
            self._block_freed.set()
