"""The work that a stream's chunks make (checksums, checks, copies), in order, off the event loop.

The event loop of an asyncio server is what bounds its throughput, so it hears of this work rarely: a lane hands chunks
to a thread through a queue and takes word of many at a time. A future and a wake-up for each chunk would cost the loop
a quarter of the time in which it receives one.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor

from streamindex_service.frontend.host_memory import IngressBudget

_AHEAD = 4  # chunks of one stream that wait for the thread or are worked on
_NEWS_AFTER_S = 0.02  # when little happens, the loop looks after so long


class IngestLane:
    """One stream's chunks. All methods are for the event loop; the work runs on the executor's threads, one at a time.

    `news` is called on the loop after some work was done, `failed` when a piece of it raised: nothing queued behind it
    runs then, and `put` and `settle` raise the same.
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
        self._threads = threads
        self._budget = budget
        self._news_bytes = news_bytes
        self._news = news
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._reserved_bytes = 0  # of the ingress budget; all of it is for chunks that are not done
        self._pending = 0
        # Shared with the thread, under the lock.
        self._lock = threading.Lock()
        self._queue: deque[tuple[Callable[[], None], int]] = deque()
        self._running = False
        self._awaited = False
        self._done = 0
        self._done_bytes = 0
        self._error: Exception | None = None

    async def put(self, work: Callable[[], None], size_bytes: int) -> None:
        """Queue work on a chunk of so many bytes, after waiting for room. Raises what earlier work has raised."""
        await self._until(_AHEAD - 1)
        await self._budget.reserve(size_bytes)
        self._reserved_bytes += size_bytes
        self._pending += 1
        with self._lock:
            self._queue.append((work, size_bytes))
            start, self._running = not self._running, True
        if start:
            self._threads.submit(self._work)
        if self._timer is None:
            self._timer = self._loop.call_later(_NEWS_AFTER_S, self._hear)

    async def settle(self) -> None:
        """Wait until nothing is queued. Raises what the work has raised."""
        await self._until(0)

    async def close(self) -> None:
        """Wait until the thread touches nothing any more. Raises nothing of the work's; survives a cancellation."""
        with self._lock:
            for _ in range(len(self._queue) - 1):  # the first may be running
                self._done_bytes += self._queue.pop()[1]
                self._done += 1
        while self._pending and self.failure is None:
            await self._news_of_work()
        if self._timer is not None:
            self._timer.cancel()

    async def _until(self, pending: int) -> None:
        while True:
            if self.failure is not None:
                raise self.failure
            if self._pending <= pending:
                return
            await self._news_of_work()

    async def _news_of_work(self) -> None:
        self._changed.clear()
        with self._lock:
            self._awaited = True
            something = self._done or self._error
        if something:
            self._hear()
        else:
            await self._changed.wait()

    def _hear(self) -> None:
        """Take word of what the thread has done."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._lock:
            done, self._done = self._done, 0
            done_bytes, self._done_bytes = self._done_bytes, 0
            error, self._error = self._error, None
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
        """On a thread: until the queue is empty."""
        while True:
            with self._lock:
                if not self._queue:
                    self._running = False
                    return
                work, size_bytes = self._queue[0]
            try:
                work()
            except Exception as error:  # handed to the stream, which raises it
                self._finish_with(error)
                return
            with self._lock:
                self._queue.popleft()
                self._done += 1
                self._done_bytes += size_bytes
                tell = self._awaited or self._done_bytes >= self._news_bytes
            if tell:
                self._loop.call_soon_threadsafe(self._hear)

    def _finish_with(self, error: Exception) -> None:
        with self._lock:
            self._queue.clear()
            self._running = False
            self._error = error
        self._loop.call_soon_threadsafe(self._hear)
