"""Some rows of attention, from the queue to their answers: first their indices are found, then they attend.

While these rows attend, the indices of the next are found: a stream has two such runs on their way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from streamindex_service.errors import WorkerLostError
from streamindex_service.frontend.attend_tiles import AttendTiles
from streamindex_service.frontend.futures import seen
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.index_tiles import IndexTiles
from streamindex_service.frontend.tile_run import TileRun


class AttendRun:
    """Rows [first, first + rows) of a block, which see up to `keys` index keys, as far as it is known.

    `index` is None where the caller has given the indices. `ended` is called as soon as `done` is done, which is once
    nothing of the rows waits or runs any more, whatever happens.
    """

    def __init__(
        self,
        index: IndexTiles | None,
        attend: AttendTiles,
        block: Block,
        first: int,
        rows: int,
        keys: int,
        blame_key: str,
        ended: Callable[[AttendRun], None],
    ) -> None:
        self.first = first
        self.rows = rows
        self.device_us = 0
        self.queued_s = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(seen)
        self._attend = attend
        self._block = block
        self._blame_key = blame_key
        self._ended = ended
        self._attended = 0  # rows
        self._cancelled = False
        self._searching: TileRun | None = None
        if index is not None:
            self._searching = TileRun(index, block, first, rows, keys, blame_key, self._stage_ended)
        self._stage: TileRun | None = self._searching

    def start(self) -> None:
        """Ask for the first turn."""
        if self._searching is not None:
            self._searching.start()
        else:
            self._go_on()

    @property
    def waiting(self) -> bool:
        """True until the device has it for the first time: it may still grow. Rows whose indices came do not grow."""
        return self._stage is not None and self._stage is self._searching and self._searching.waiting

    def grow(self, rows: int, keys: int) -> None:
        """So many rows more, which see so many keys."""
        assert self._searching is not None
        self._searching.grow(rows, keys)
        self.rows += rows

    def cancel(self) -> None:
        """Do not go on. What the device has begun still ends."""
        self._cancelled = True
        if self._stage is not None:
            self._stage.cancel()

    def _stage_ended(self, run: TileRun) -> None:
        self.device_us += run.device_us
        self.queued_s += run.queued_s
        error = run.done.exception()
        if error is not None:
            self._end(error)
            return
        if run is not self._searching:
            self._attended += run.rows
        self._go_on()

    def _go_on(self) -> None:
        if self._attended == self.rows:
            self._end(None)
        elif self._cancelled:
            self._end(WorkerLostError("the tile was cancelled"))
        else:
            first = self.first + self._attended
            rows = self._attend.rows_together(self._block, first, self.rows - self._attended)
            self._stage = TileRun(self._attend, self._block, first, rows, 0, self._blame_key, self._stage_ended)
            self._stage.start()

    def _end(self, error: BaseException | None) -> None:
        self._stage = None
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
        self._ended(self)
