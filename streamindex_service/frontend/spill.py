"""Host memory that is not enough: idle caches go to disk, and come back when they are used.

What goes and where is decided in `core/spill.py`; here the bytes are moved, on one thread, one move at a time. Whoever
needs the disk waits for its turn, and at most for one move of those that make room ahead of need.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from streamindex_service.core.caches import CacheStore
from streamindex_service.core.layers import KeyCache, Page
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool
from streamindex_service.core.spill import MOVE_BYTES, Move, Spill
from streamindex_service.core.uploads import UploadTable
from streamindex_service.errors import (
    HostMemoryError,
    HostQuotaError,
    QueueFullError,
    SpillUnreadableError,
)
from streamindex_service.frontend.host_memory import HostExtents
from streamindex_service.frontend.spill_files import SpillFiles

_FILES = 1024  # at most, about: a disk budget larger than so many extents has larger ones
_READS = 2  # of a page that is not as it was written, before it is given up
_MOVES_IN_VAIN = 16  # one after another, each of pages that came into use while they were written

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class SpillLimits:
    """Where to, and how much of it; see the settings `memory.spill_*`."""

    directory: str
    size_bytes: int
    extent_bytes: int
    watermark: float
    idle_s: float
    pause_s: float
    max_wait_s: float


class HostRoom:
    """Room in host memory for those who need it. Without a spill directory it is what there is."""

    def __init__(self) -> None:
        self.ledger: Ledger | None = None  # of the disk

    @property
    def spilled_pages(self) -> int:
        """Pages that have gone to disk, since the start."""
        return 0

    @property
    def restored_pages(self) -> int:
        """Pages that have come back."""
        return 0

    async def make(self, take: Callable[[], Result]) -> Result:
        """Do what takes host memory, and perhaps raises HostMemoryError; again, for as long as room can be made."""
        return take()

    @contextlib.asynccontextmanager
    async def with_pages(self, cache: KeyCache, pages: Callable[[], Sequence[Page]]) -> AsyncIterator[None]:
        """Within, up to the first wait, these pages of a cache are in host memory. `pages` gives all of them as long as
        any is not, and may give none else."""
        yield

    async def keep_free(self) -> None:
        """Make room ahead of need."""

    def check(self) -> None:
        """That it can work. Raises OSError."""

    def close(self) -> None:
        """The service stops; nothing is on its way any more."""


class SpillingRoom(HostRoom):
    """The same with a disk behind it. Lives on the event loop; `background` runs work to its end, whoever waits."""

    def __init__(
        self,
        store: CacheStore,
        uploads: UploadTable,
        extents: HostExtents,
        limits: SpillLimits,
        clock: Callable[[], float],
        background: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        log: Any,
    ) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spill")
        self.files = SpillFiles(limits.directory, self._thread.submit)
        self.ledger = Ledger("spill", limits.size_bytes)
        disk_extent_bytes = max(limits.extent_bytes, limits.size_bytes // _FILES)
        disk = PagePool(self.ledger, disk_extent_bytes, self.files.make_extent, self.files.drop_extent)
        self._store = store
        self.spill = Spill(self._store, disk, clock, MOVE_BYTES)
        self._uploads = uploads
        self._extents = extents
        self._limits = limits
        self._clock = clock
        self._background = background
        self._log = log
        self._disk_is_mine = asyncio.Lock()
        self._paused_until = clock()
        self._moves = 0  # that have freed anything

    @property
    def spilled_pages(self) -> int:
        """See HostRoom."""
        return self.spill.spilled_pages

    @property
    def restored_pages(self) -> int:
        """See HostRoom."""
        return self.spill.restored_pages

    def check(self) -> None:
        """That files can be made. Raises OSError."""
        self.files.check()

    def close(self) -> None:
        """Let go of the disk."""
        self._thread.shutdown(wait=True)
        self.files.close()

    async def make(self, take: Callable[[], Result]) -> Result:
        """See HostRoom. A quota is not a want of memory."""
        may_be_more = True
        while True:
            try:
                return take()
            except HostQuotaError:
                raise
            except HostMemoryError as error:
                if not may_be_more:
                    raise
                needed = max(self._limits.extent_bytes, int(error.metadata.get("needed_bytes", 0)))
                # When nothing can go, others may have given memory back while the disk was waited for.
                may_be_more = await self._finished(self._free(needed))

    @contextlib.asynccontextmanager
    async def with_pages(self, cache: KeyCache, pages: Callable[[], Sequence[Page]]) -> AsyncIterator[None]:
        """See HostRoom. Raises HostMemoryError, ExceedsBudgetError, SpillUnreadableError, QueueFullError."""
        wanted = _Wanted(self._store, pages)
        cache.busy += 1
        try:
            # What others do to the cache while this waits may bring pages that are on disk as well.
            while not _all_in_host(pages()):
                await self._finished(self._restore(wanted))
            yield
        finally:
            cache.busy -= 1
            wanted.leave()

    async def keep_free(self) -> None:
        """Spill what was idle for long while more than the watermark is in use."""
        host = self._store.host
        mark_bytes = int(self._limits.watermark * host.ledger.limit_bytes)
        while (above := host.page_bytes_in_use - mark_bytes) > 0:
            try:
                if not await self._finished(self._free(above, self._limits.idle_s)):
                    return
            except QueueFullError:
                return  # the disk is busy with those who need it

    async def _finished(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Work that goes on when its caller is gone: threads still write to what it holds."""
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                result = await work
            except Exception as error:
                if not done.cancelled():
                    done.set_exception(error)
            else:
                if not done.cancelled():
                    done.set_result(result)

        self._background(run())
        return await done

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """The disk is this caller's alone. Raises QueueFullError when it is others' for too long."""
        try:
            async with asyncio.timeout(self._limits.max_wait_s):
                await self._disk_is_mine.acquire()
        except TimeoutError:
            waited_ms = int(1000 * self._limits.max_wait_s)
            raise QueueFullError(
                "the disk was busy with others for too long", metadata={"waited_ms": waited_ms}
            ) from None
        try:
            yield
        finally:
            self._disk_is_mine.release()

    async def _free(self, needed_bytes: int, idle_s: float = 0.0) -> bool:
        moves = self._moves
        async with self._turn():
            # Somebody else may have made room while this waited.
            return moves != self._moves or await self._spill_some(needed_bytes, idle_s)

    async def _spill_some(self, needed_bytes: int, idle_s: float = 0.0) -> bool:
        """One move; whether any memory is free that was not. What has expired goes first, and not to the disk."""
        if self._uploads.reclaim(at_once=True):
            return True
        for _ in range(_MOVES_IN_VAIN):
            if self._clock() < self._paused_until:
                return False
            move = self.spill.begin_spill(needed_bytes, idle_s)
            if move is None:
                return False
            if await self._spill_move(move):
                return True
        return False

    async def _spill_move(self, move: Move) -> bool:
        """Whether any memory is free that was not: not when the disk fails, or all pages came into use meanwhile."""
        checksums = None
        try:
            checksums = await self._on_thread(lambda: self._write(move))
        except OSError as error:
            self._paused_until = self._clock() + self._limits.pause_s
            self._log.error("spill_failed", detail=repr(error), pages=len(move.pages))
        finally:
            freed_bytes = self.spill.end_spill(move, checksums)
        self._moves += freed_bytes > 0
        return freed_bytes > 0

    async def _restore(self, wanted: _Wanted) -> None:
        """Bring pages back for as long as somebody wants them, who has them held when this has ended."""
        async with self._turn():
            may_be_more = True
            while missing := wanted.missing():
                self.spill.refuse_what_never_fits(wanted.held)
                move = self.spill.begin_restore(missing)
                if move is not None:
                    await self._bring(move)
                    may_be_more = True
                elif may_be_more:
                    may_be_more = await self._spill_some(sum(page.page_bytes for page in missing))
                else:
                    raise self._store.memory_used_up(missing[0].page_bytes, missing[0].page_bytes, 1.0)

    async def _bring(self, move: Move) -> None:
        restored = False
        try:
            await self._on_thread(lambda: self._read(move))
            restored = True
        except OSError as error:
            self._log.error("spill_unreadable", detail=repr(error), pages=len(move.pages))
            raise SpillUnreadableError("keys of this layer cannot be read back from disk") from error
        finally:
            self.spill.end_restore(move, restored)

    async def _on_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # On the thread.

    def _write(self, move: Move) -> list[int]:
        pages = zip(move.pages, move.slots, strict=True)
        return self.files.write(
            [(slot, self._extents.bytes_at(page.in_host, 0, page.page_bytes).data) for page, slot in pages]
        )

    def _read(self, move: Move) -> None:
        for page, slot in zip(move.pages, move.slots, strict=True):
            data = self._read_page(page)
            self._extents.write([(slot.extent_id, slot.offset_bytes, memoryview(data))])

    def _read_page(self, page: Page) -> bytearray:
        assert page.spilled is not None
        for _ in range(_READS - 1):
            with contextlib.suppress(OSError):
                return self.files.read(page.spilled, page.page_bytes, page.crc32c)
        return self.files.read(page.spilled, page.page_bytes, page.crc32c)


class _Wanted:
    """Pages that somebody waits for: `pages` tells which. They are held from the turn at the disk on, not before: who
    waits for that must not keep the memory that those before it need."""

    def __init__(self, store: CacheStore, pages: Callable[[], Sequence[Page]]) -> None:
        self.held: list[Page] = []
        self._store = store
        self._pages = pages
        self._left = False

    def missing(self) -> list[Page]:
        """Those of them that are not in host memory now; none when nobody waits any more. All of them are held, and
        those no longer that have been replaced meanwhile."""
        if self._left or _all_in_host(found := self._pages()):  # what is held by then stays so
            return []
        found = list(dict.fromkeys(found))
        self._store.hold(found)
        self._store.release(self.held)
        self.held = found
        return [page for page in found if page.host is None]

    def leave(self) -> None:
        """Nobody waits any more, or all is there and in use."""
        self._left = True
        self._store.release(self.held)
        self.held = []


def _all_in_host(pages: Sequence[Page]) -> bool:
    return all(page.host is not None for page in pages)
