"""The work that a stream's chunks make (checks, copies), off the event loop and counted in order.

The event loop of an asyncio server is what bounds its throughput, so it hears of this work rarely: a lane hands chunks
to threads through a queue and takes word of many at a time. A future and a wake-up for each chunk would cost the loop a
quarter of the time in which it receives one. A thread spends much of its time waiting for the interpreter lock, which
the loop holds: after every call that let go of it, up to the switch interval; and the loop stands still while it is
woken. So a thread begins when several chunks wait, takes them together, and makes few such calls. What is worked on
quickly while it is in the processor's cache (a checksum) is cheaper on the loop than a call on a thread: five to eight
parts in a hundred of an upload's throughput on 16 cores.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from streamindex_service.errors import HostMemoryError, ServiceError
from streamindex_service.frontend.collector import let_go_of_frames
from streamindex_service.frontend.host_memory import IngressBudget

_AHEAD = 12  # chunks of one stream that wait for a thread or are worked on
_AT_ONCE = 2  # threads that work on one stream
_TOGETHER = 4  # chunks that a thread takes at a time
_NEWS_AFTER_S = 0.02  # when little happens, the loop looks after so long
_GATHER_S = 0.004  # the longest that a chunk waits for others before a thread begins


Work = Callable[[list[Any]], Sequence[Callable[[], None]]]
"""Works on chunks that follow each other; for each, what counts it as done."""


@dataclass(slots=True, eq=False)
class _Piece:
    work: Work
    chunk: Any
    size_bytes: int
    count: Callable[[], None] | None = None  # what the work has returned
    error: Exception | None = None


class IngestLane:
    """One stream's chunks. All methods are for the event loop; the work runs on the executor's threads.

    The work on chunks returns what counts each as done; that is called (on some thread) once all chunks before it are
    counted. Work that raises for several chunks is done again for one after the other, up to the bad one, so that those
    before it are counted; after a want of memory nothing is done again, and none of them is counted. `news` is called
    on the loop after some were, `failed` when a piece of work raised: no chunk behind it is counted then, and `put` and
    `settle` raise the same, until `close`.
    """

    def __init__(
        self,
        threads: Executor,
        budget: IngressBudget,
        news_bytes: int,
        news: Callable[[], None],
        failed: Callable[[], None],
    ) -> None:
        self.failure: Exception | None = None
        self._executor = threads
        self._budget = budget
        self._news_bytes = news_bytes
        self._news = news
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._gathering: asyncio.TimerHandle | None = None
        self._reserved_bytes = 0  # of the ingress budget; all of it is for chunks that are not done
        self._pending = 0
        # Shared with the threads, under the lock.
        self._lock = threading.Lock()
        self._waiting: deque[_Piece] = deque()
        self._waiting_bytes = 0
        self._overdue = False  # something waits that has been gathered with for long enough
        self._uncounted: deque[_Piece] = deque()  # in order; those that wait or are worked on, and a few that are done
        self._threads = 0
        self._awaited = False
        self._done = 0
        self._done_bytes = 0
        self._error: Exception | None = None  # the first; nothing is worked on or counted after it

    async def put(self, work: Work, chunk: Any, size_bytes: int) -> None:
        """Queue work on a chunk of so many bytes, after waiting for room. Raises what earlier work has raised."""
        await self._until(_AHEAD - 1)
        await self._budget.reserve(size_bytes)
        piece = _Piece(work, chunk, size_bytes)
        with self._lock:
            error = self._error
            if error is None:
                self._waiting.append(piece)
                self._waiting_bytes += size_bytes
                self._uncounted.append(piece)
        if error is not None:  # it came about while the budget was waited for
            self._budget.release(size_bytes)
            raise error
        self._reserved_bytes += size_bytes
        self._pending += 1
        self._start()
        if self._gathering is None:
            self._gathering = self._loop.call_later(_GATHER_S, self._end_gathering)
        if self._timer is None:
            self._timer = self._loop.call_later(_NEWS_AFTER_S, self._hear)

    def _start(self, *, now: bool = False) -> None:
        """Let a thread begin if enough chunks wait for one, or if any does and it is to be now."""
        with self._lock:
            start = self._threads < _AT_ONCE and bool(self._waiting) and (now or self._is_enough())
            self._threads += start
        if start:
            self._executor.submit(self._work)

    def _is_enough(self) -> bool:
        """Under the lock: whether so much waits that it is worth a thread's calls, or the sender's window is in want of
        news, or it has waited long enough."""
        many = len(self._waiting) >= _TOGETHER or self._waiting_bytes >= self._news_bytes
        return many or (self._overdue and bool(self._waiting))

    def _end_gathering(self) -> None:
        self._gathering = None
        with self._lock:
            self._overdue = bool(self._waiting)
        self._start()

    async def settle(self) -> None:
        """Wait until all chunks are counted. Raises what the work has raised."""
        await self._until(0)

    async def close(self) -> None:
        """Wait until no thread touches anything any more; what waits for one is dropped."""
        with self._lock:
            while self._waiting:
                self._drop(self._waiting.pop())
            self._waiting_bytes = 0
        while self._still_working():
            await self._changed.wait()
        self._hear()
        assert self._pending == 0
        for timer in (self._timer, self._gathering):
            if timer is not None:
                timer.cancel()
        # Raised to the stream, it holds the stream's frames, and those this lane: a circle around their last chunk.
        self.failure = self._error = None
        self._news = self._failed = _nothing  # the stream refers to this lane

    def _still_working(self) -> bool:
        """Whether a thread has work; then `_changed` will be set."""
        self._changed.clear()
        with self._lock:
            self._awaited = self._threads > 0
            return self._awaited

    def _drop(self, piece: _Piece) -> None:
        self._uncounted.remove(piece)
        self._done += 1
        self._done_bytes += piece.size_bytes

    async def _until(self, pending: int) -> None:
        while True:
            if self.failure is not None:
                raise self.failure
            if self._pending <= pending:
                return
            await self._hear_or_wait()

    async def _hear_or_wait(self) -> None:
        self._changed.clear()
        with self._lock:
            self._awaited = True
            something = self._done or (self._error is not None and self.failure is None)
        if something:
            self._hear()
        else:
            self._start(now=True)
            await self._changed.wait()

    def _hear(self) -> None:
        """Take word of what the threads have done."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._lock:
            done, self._done = self._done, 0
            done_bytes, self._done_bytes = self._done_bytes, 0
            error = self._error if self.failure is None else None
            self._awaited = False
        self._pending -= done
        if error is not None:
            self.failure = error
            done_bytes, self._pending = self._reserved_bytes, 0
        self._reserved_bytes -= done_bytes
        if done_bytes:
            self._budget.release(done_bytes)
        self._changed.set()
        if error is not None:
            self._failed()
        elif done:
            self._news()
        if self._pending and self._timer is None:
            self._timer = self._loop.call_later(_NEWS_AFTER_S, self._hear)

    def _work(self) -> None:
        """On a thread: until nothing waits, or less than enough and the loop does not wait for it."""
        pieces = None
        while True:
            with self._lock:
                if not self._waiting or (pieces is not None and not self._awaited and not self._is_enough()):
                    self._threads -= 1
                    if self._awaited:
                        self._loop.call_soon_threadsafe(self._hear)
                    return
                pieces = self._take()
            _do(pieces)
            with self._lock:
                tell = self._count()
            if tell:
                self._loop.call_soon_threadsafe(self._hear)

    def _take(self) -> list[_Piece]:
        """The first of what waits, and those behind it that can be worked on with it."""
        pieces = [self._waiting.popleft()]
        while self._waiting and len(pieces) < _TOGETHER and self._waiting[0].work == pieces[0].work:
            pieces.append(self._waiting.popleft())
        self._waiting_bytes -= sum(piece.size_bytes for piece in pieces)
        self._overdue = self._overdue and bool(self._waiting)
        return pieces

    def _count(self) -> bool:
        """Count what is done and has nothing undone before it; True when the loop is to hear of it at once."""
        while self._uncounted:
            first = self._uncounted[0]
            if first.error is not None:
                self._error = first.error
                self._waiting.clear()
                self._waiting_bytes = 0
                self._uncounted.clear()
                # What was counted before it is released with everything else when the loop hears of the error.
                self._done = self._done_bytes = 0
                return True
            if first.count is None:
                break
            first.count()
            self._uncounted.popleft()
            self._done += 1
            self._done_bytes += first.size_bytes
        return bool(self._done) and (self._awaited or self._done_bytes >= self._news_bytes)


def _nothing() -> None:
    """Is to be done any more."""


def _do(pieces: list[_Piece]) -> None:
    error = _try(pieces)
    if error is None:
        return
    if len(pieces) == 1 or isinstance(error, HostMemoryError):
        pieces[0].error = error  # handed to the stream, which raises it
        return
    for piece in pieces:
        piece.error = _try([piece])
        if piece.error is not None:  # nothing behind it can be counted
            return


def _try(pieces: list[_Piece]) -> Exception | None:
    """Work on the pieces; what it raised."""
    try:
        for piece, count in zip(pieces, pieces[0].work([piece.chunk for piece in pieces]), strict=True):
            piece.count = count
    except Exception as error:
        _let_go(error)
        return error
    return None


def _let_go(error: Exception) -> None:
    """Take the frames from an error, which lives as long as its stream: no segment could go before the views that they
    hold. Where it was raised, if nobody expected it, goes on as text, for the log."""
    if not isinstance(error, ServiceError):
        error.add_note("On an ingest thread:\n" + "".join(traceback.format_exception(error)))
    let_go_of_frames(error)
