"""Host memory: the segments that keys live in, and the blocks through which query rows pass."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PageSlot
from streamindex_service.core.spares import SpareLimits, Spares
from streamindex_service.errors import HostMemoryError
from streamindex_service.frontend.segment_closer import SegmentCloser
from streamindex_service.frontend.tensors import Bytes, as_bytes
from streamindex_service.ipc.segments import Segment

NO_SPARES = SpareLimits(size_bytes=0, pieces=0, idle_s=0.0)

_MAX_PIECES = 1024  # of one write; the system's own bound
_NO_MEMORY = (errno.ENOMEM, errno.ENOSPC)  # of a memfd: the system's, a control group's
_LOOP_ANSWERS_S = 5.0  # at the very end the loop waits for the threads, and answers none of them
_segment_ids = itertools.count(1)


@dataclass(frozen=True, slots=True, eq=False)
class SharedSegment:
    """A segment and the number under which workers know it. `data` is all of it, [bytes] uint8."""

    segment_id: int
    segment: Segment
    data: Bytes
    writable_by_worker: bool

    @classmethod
    def create(cls, size_bytes: int, *, writable_by_worker: bool) -> SharedSegment:
        """Make one. Raises OSError."""
        segment = Segment.create(size_bytes)
        return cls(next(_segment_ids), segment, as_bytes(segment.map), writable_by_worker)

    def close(self) -> None:
        """Let go of it; its memory goes with the last reference to this object."""
        self.segment.close()


class HostExtents:
    """The segments of the host page pool. `dropped(segment_id)` is told of every segment that goes.

    Within the limits, segments without an extent are kept for the next extents, as they are: whoever makes pages
    visible sees to it that no old byte is left in them. All methods but `write` are for the event loop alone.
    """

    def __init__(
        self,
        dropped: Callable[[int], None],
        ledger: Ledger,
        spare_limits: SpareLimits = NO_SPARES,
        clock: Callable[[], float] = time.monotonic,
        loop: asyncio.AbstractEventLoop | None = None,
        closer: SegmentCloser | None = None,
    ) -> None:
        self._dropped = dropped
        self._ledger = ledger
        self._closer = closer  # None: they are closed at once
        # In lists of one: the last reference to a segment must be the closer's, and a caller's frame has one too.
        self._spares: Spares[list[SharedSegment]] = Spares(ledger, spare_limits, self._close, clock)
        self._loop = loop  # on which spares are dropped for a thread that writes; None where nothing else runs
        self._segments: dict[int, SharedSegment] = {}

    def make(self, extent_id: int, extent_bytes: int) -> None:
        """Find a segment for an extent whose bytes are reserved.

        Raises HostMemoryError when the system has no memory or descriptors left.
        """
        kept = self._spares.take(extent_bytes)
        if kept is None:
            self.make_room()
            kept = [self._create(extent_bytes)]
        self._segments[extent_id] = kept.pop()

    def make_room(self) -> None:
        """Something was reserved: what is spare goes for it, and is waited for where it is needed indeed."""
        ledger = self._ledger
        self._spares.make_room()
        if self._closer is not None and ledger.free_bytes < ledger.spare_bytes + self._closer.pending_bytes:
            self._closer.settle()

    def expire_spares(self) -> None:
        """Let go of what is spare for too long."""
        self._spares.expire()

    def drop(self, extent_id: int) -> None:
        """The extent is gone, and its bytes are released; its segment may stay for another."""
        dropped = [self._segments.pop(extent_id)]
        self._spares.keep(dropped, dropped[0].segment.size_bytes)

    def _create(self, size_bytes: int) -> SharedSegment:
        try:
            return SharedSegment.create(size_bytes, writable_by_worker=False)
        except OSError as error:
            if self.drop_spares():  # what is spare must not be what the system lacks
                return self._create(size_bytes)
            raise HostMemoryError("the host has no memory for the rows", detail=repr(error)) from error

    def _close(self, dropped: list[SharedSegment]) -> None:
        self._dropped(dropped[0].segment_id)
        if self._closer is None:
            dropped.pop().close()
        else:
            self._closer.close(dropped, dropped[0].segment.size_bytes)

    def drop_spares(self) -> bool:
        """The system lacks memory: everything spare goes, and is gone; whether there was anything."""
        had_any = self._spares.drop_all() or (self._closer is not None and self._closer.pending_bytes > 0)
        if self._closer is not None:
            self._closer.settle()
        return had_any

    def _have_spares_dropped(self) -> None:
        """On any thread. Another may have had it done a moment before."""
        if self._loop is None or asyncio._get_running_loop() is self._loop:
            self.drop_spares()
            return
        answer: Future[bool] = Future()
        # The loop may be closed, or wait for this very thread to end.
        with contextlib.suppress(RuntimeError, TimeoutError):
            self._loop.call_soon_threadsafe(lambda: answer.set_result(self.drop_spares()))
            answer.result(_LOOP_ANSWERS_S)

    def segment(self, slot: PageSlot) -> SharedSegment:
        """The segment that a page lies in."""
        return self._segments[slot.extent_id]

    def write(self, pieces: Sequence[tuple[int, int, memoryview]]) -> list[Bytes]:
        """Write pieces at (extent, byte within the extent). Lets go of the interpreter lock; raises HostMemoryError,
        when there is no memory even without what is spare. For any thread; the loop's may write a few rows itself.

        Through the descriptor, not the mapping: the first touch of a mapped page costs about twice as much as the
        write itself. Pieces that lie one after the other are written together; what was written together is given as it
        lies there.
        """
        written = []
        start = 0
        for stop in range(1, len(pieces) + 1):
            if stop == len(pieces) or not _adjacent(pieces[stop - 1], pieces[stop]) or stop - start == _MAX_PIECES:
                extent_id, offset, _ = pieces[start]
                buffers = [piece for _, _, piece in pieces[start:stop]]
                shared = self._segments[extent_id]
                end = self._write_all(shared.segment.fd, buffers, offset)
                written.append(shared.data[offset:end])
                start = stop
        return written

    def _write_all(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        try:
            try:
                return _write_once(fd, buffers, offset)
            except OSError as error:  # what is spare must not be what the system lacks
                if error.errno not in _NO_MEMORY:
                    raise
            self._have_spares_dropped()
            return _write_once(fd, buffers, offset)
        except OSError as error:
            raise HostMemoryError("the host has no memory for the rows", detail=repr(error)) from error

    def bytes_at(self, slot: PageSlot, start: int, size_bytes: int) -> Bytes:
        """Bytes [start, start + size) of a page."""
        begin = slot.offset_bytes + start
        return self._segments[slot.extent_id].data[begin : begin + size_bytes]


def _adjacent(one: tuple[int, int, memoryview], other: tuple[int, int, memoryview]) -> bool:
    (extent_id, offset, data), (next_extent_id, next_offset, _) = one, other
    return extent_id == next_extent_id and offset + len(data) == next_offset


def _write_once(fd: int, buffers: list[memoryview], offset: int) -> int:
    """Write buffers one after the other; where they end. Raises OSError."""
    end = offset + sum(map(len, buffers))
    written = os.pwritev(fd, buffers, offset)
    if offset + written == end:
        return end
    # Cut short by a signal, say; rare enough to go on in the simplest way.
    rest = memoryview(b"".join(buffers))[written:]
    while rest:
        written += (count := os.pwrite(fd, rest, offset + written))
        rest = rest[count:]
    return end


@dataclass(slots=True, eq=False)
class _Waiting:
    size_bytes: int
    can_wait: Callable[[], bool]
    turn: asyncio.Future[None]


def _cannot_wait() -> bool:
    return False


class IngressBudget:
    """The ingress ledger; who does not fit waits, first come first served, but for those who can wait.

    Rows of searches that wait for room on the device stay for long. If such searches took what is given back for more
    rows, those that have room could not go on, and nobody would make any: so they come after all others.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._waiting: deque[_Waiting] = deque()

    async def reserve(self, size_bytes: int, can_wait: Callable[[], bool] = _cannot_wait) -> None:
        """Take part of the budget, waiting for it if need be. `size_bytes` is at most the limit.

        can_wait: asked whenever something is given back, and when another asks; others go first while it says so.
        """
        assert size_bytes <= self.ledger.limit_bytes
        if not self._waiting and self.ledger.try_reserve(size_bytes):
            return
        entry = _Waiting(size_bytes, can_wait, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._grant()
        try:
            await entry.turn
        except asyncio.CancelledError:
            if entry.turn.done() and not entry.turn.cancelled():
                self.release(size_bytes)  # granted and cancelled at the same moment
            else:
                self._waiting.remove(entry)
                self._grant()
            raise

    def release(self, size_bytes: int) -> None:
        """Give it back."""
        self.ledger.release(size_bytes)
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            entry = next((each for each in self._waiting if not each.can_wait()), self._waiting[0])
            if entry.turn.cancelled():
                return  # its owner takes it out
            if not self.ledger.try_reserve(entry.size_bytes):
                return
            self._waiting.remove(entry)
            entry.turn.set_result(None)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A piece of ingress memory, shared with the worker both ways."""

    shared: SharedSegment
    offset_bytes: int
    data: Bytes  # [block_bytes] uint8


class BlockPool:
    """Blocks of one size. The ledger counts the blocks in use; their segments are kept for the next search.

    `drop_spares` is asked for what the system lacks, and tells whether it had anything.
    """

    def __init__(
        self,
        budget: IngressBudget,
        block_bytes: int,
        extent_bytes: int,
        drop_spares: Callable[[], bool] = lambda: False,
    ) -> None:
        self.block_bytes = block_bytes
        self._drop_spares = drop_spares
        self._budget = budget
        self._extent_blocks = max(1, extent_bytes // block_bytes)
        self._free: list[Block] = []

    async def acquire(self, can_wait: Callable[[], bool] = _cannot_wait) -> Block:
        """Take a block, waiting for the ingress budget if need be. can_wait: see `IngressBudget`."""
        await self._budget.reserve(self.block_bytes, can_wait)
        if not self._free:
            size = self.block_bytes
            try:
                shared = self._create(self._extent_blocks * size)
            except OSError as error:
                self._budget.release(size)
                raise HostMemoryError("the host has no memory for the rows", detail=repr(error)) from error
            self._free = [
                Block(shared, i * size, shared.data[i * size : (i + 1) * size]) for i in range(self._extent_blocks)
            ]
        return self._free.pop()

    def _create(self, size_bytes: int) -> SharedSegment:
        try:
            return SharedSegment.create(size_bytes, writable_by_worker=True)
        except OSError:
            if not self._drop_spares():
                raise
        return SharedSegment.create(size_bytes, writable_by_worker=True)

    def release(self, block: Block) -> None:
        """Give a block back."""
        self._free.append(block)
        self._budget.release(self.block_bytes)
