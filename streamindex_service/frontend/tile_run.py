"""One tile, from the queue to its answer.

It waits for its turn, runs, and gives its turn back when the device has really finished. When the device has no memory
for it in spite of the budget, it runs again alone, then in ever smaller pieces with the smallest workspace, and is
refused after `worker.memory_retries` such tries. Its answers lie in its block when `done` is; whatever happens, `done`
is done once nothing of it waits or runs any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from streamindex_service.core.tile_pieces import TilePieces
from streamindex_service.core.turns import Grant, SearchTurn
from streamindex_service.errors import DeviceMemoryError, InternalError, ServiceError, WorkerLostError
from streamindex_service.frontend.call import CURRENT
from streamindex_service.frontend.device import tile_error
from streamindex_service.frontend.futures import seen
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.tiles import Submitted, TileDue, TileOperation, TilePiece
from streamindex_service.ipc.supervisor import CancelledTileError
from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.telemetry.spans import TracedTile


class TileRun:
    """Rows [first, first + rows) of a block, which see up to `keys` keys, as far as it is known.

    `ended` is called as soon as `done` is done: a callback of the future would come a turn of the loop later.
    """

    def __init__(
        self,
        operation: TileOperation,
        block: Block,
        first: int,
        rows: int,
        keys: int,
        blame_key: str = "",
        ended: Callable[[TileRun], None] | None = None,
    ) -> None:
        self.first = first
        self.rows = rows
        self.device_us = 0
        self.queued_s = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(seen)
        self._operation = operation
        self._call = CURRENT.get()
        self._span = self._call.span if self._call is not None else None
        self._asked_at = 0.0  # for the turn that it waits for; of a traced call
        self._block = block
        self._keys = keys
        self._blame_key = blame_key
        self._ended = ended or _nobody
        self._pieces: TilePieces | None = None  # from the first grant on
        self._step = 0  # of those that the present piece takes
        self._cancelled = False
        self._turn: SearchTurn | None = None
        self._on_device: Callable[[], None] | None = None  # cancels what is there

    def start(self) -> None:
        """Ask for the first turn."""
        self._request(self.first, self.rows)

    @property
    def waiting(self) -> bool:
        """True until the device has it for the first time: it may still grow."""
        return self._turn is not None and self._turn.waiting and self._pieces is None

    def grow(self, rows: int, keys: int) -> None:
        """So many rows more, which see so many keys."""
        assert self.waiting
        assert self._turn is not None
        self.rows += rows
        self._keys = max(self._keys, keys)
        self._operation.grow(self._turn, self._piece(self.first, self.rows))

    def cancel(self) -> None:
        """Do not go on. What the device has begun still ends."""
        self._cancelled = True
        if self._turn is not None and self._turn.waiting:
            self._operation.service.governor.cancel(self._turn)
            self._refused(WorkerLostError("the tile was cancelled"), "CANCELLED")
        elif self._on_device is not None:
            self._on_device()

    def _piece(self, first: int, rows: int) -> TilePiece:
        return TilePiece(self._block, first, rows, self._keys, self._step)

    def _request(self, first: int, rows: int) -> None:
        pieces = self._pieces
        if self._span is not None:
            self._asked_at = self._operation.service.clock()
        alone, smallest = (pieces.alone, pieces.smallest) if pieces is not None else (False, False)
        try:
            turn = self._operation.request(
                self._piece(first, rows), self._granted, self._refused, alone=alone, smallest=smallest
            )
        except Exception as error:  # whoever waits for the end of this must hear of it
            self._refused(error if isinstance(error, ServiceError) else InternalError(repr(error)))
            return
        if not self.done.done():  # it may have been granted already, and refused by the device
            self._turn = turn

    def _granted(self, grant: Grant) -> None:
        service = self._operation.service
        self.queued_s += grant.waited_s
        if self._pieces is None:
            self._pieces = TilePieces(self.first, self.rows, service.settings.worker.memory_retries)
        assert self._pieces.current is not None
        try:
            submitted = self._operation.submit(
                self._piece(*self._pieces.current), grant, self._due(grant), self._blame_key
            )
        except Exception as error:
            # Whoever happened to let this turn run must not fail with it, and what it was granted must come back.
            service.governor.finish(grant)
            self._refused(error if isinstance(error, ServiceError) else InternalError(repr(error)))
            return
        self._on_device = lambda: service.device.cancel(submitted.views[0], [submitted.tile_id])
        given_at = service.clock()
        submitted.future.add_done_callback(lambda done: self._ran(grant, given_at, submitted))

    def _due(self, grant: Grant) -> TileDue:
        turn, call = grant.turn, self._call
        device_s = turn.cost_s - turn.promotion_s  # the worker begins once the pages are there
        if call is None:
            return TileDue(turn.band, device_s)
        return TileDue(turn.band, device_s, call.request_id, call.trace.traceparent)

    def _ran(self, grant: Grant, given_at: float, submitted: Submitted) -> None:
        self._on_device = None
        future, governor = submitted.future, self._operation.service.governor
        error = future.exception()
        if error is None and grant.epoch != governor.epoch:
            # A copy of pages has failed since, perhaps of those that it has read.
            error = DeviceMemoryError("what was on the device had to be forgotten")
        tile_done = pb.TileDone() if error else future.result().tile_done
        device_us = tile_done.device_us
        governor.finish(grant, None if error else device_us / 1e6, tile_done.peak_bytes)
        if self._call is not None and error is None:
            device_s = device_us / 1e6
            transfer_s = self._operation.service.clock() - given_at - device_s
            self._call.counters.tile_done(grant.waited_s, transfer_s, device_s)
        if self._span is not None:
            self._trace(given_at, tile_done, "" if error is None else _reason(error))
        assert self._pieces is not None
        if error is None:
            self._step += 1
            if self._step == self._operation.steps(self._keys):
                self._pieces.computed()
                self._step = 0
            self.device_us += device_us
            self._next()
        elif isinstance(error, CancelledTileError):
            self._fail(WorkerLostError("the tile was cancelled"))
        elif isinstance(error, ServiceError):
            error = tile_error(submitted.views, error)
            short = isinstance(error, DeviceMemoryError)
            governor.meter.memory.failures += short
            if short and self._pieces.no_memory():
                self._step = 0
                self._next()
            elif short:
                self._fail(self._no_memory(grant, error))
            else:
                self._fail(error)
        else:
            self._fail(error)

    def _trace(self, given_at: float | None, done: pb.TileDone, error: str) -> None:
        assert self._span is not None
        current = self._pieces.current if self._pieces is not None else None
        tile = TracedTile(
            operation=self._operation.name,
            rows=self.rows if current is None else current[1],
            asked_s=self._asked_at,
            given_s=given_at,
            issued_s=done.issued_us / 1e6,
            ended_s=done.ended_us / 1e6,
            device_s=done.device_us / 1e6,
            answered_s=self._operation.service.clock(),
            error=error,
        )
        self._span.tile(tile)

    def _refused(self, error: ServiceError, reason: str = "") -> None:
        """It was not given to the device, and never will be."""
        if self._span is not None:
            self._trace(None, pb.TileDone(), reason or error.reason)
        self._fail(error)

    def _no_memory(self, grant: Grant, error: ServiceError) -> DeviceMemoryError:
        """The last of the wants of memory, with the figures: what the smallest piece was to take, and of what."""
        service = self._operation.service
        page_bytes = sum(page.page_bytes for page in grant.turn.need.pages)
        figures: dict[str, int | str] = {
            "needed_bytes": page_bytes + grant.workspace_bytes,
            "budget_bytes": service.hbm.limit_bytes,
            "tries": service.settings.worker.memory_retries + 1,
        }
        return DeviceMemoryError(error.message, metadata=figures, detail=error.detail)

    def _next(self) -> None:
        assert self._pieces is not None
        if self._pieces.current is None:
            self.done.set_result(None)
            self._tell_ended()
        elif self._cancelled:
            self._fail(WorkerLostError("the tile was cancelled"))
        else:
            self._request(*self._pieces.current)

    def _fail(self, error: BaseException) -> None:
        self.done.set_exception(error)
        self._tell_ended()

    def _tell_ended(self) -> None:
        """`done` is done. A turn and whoever listens refer to this, and this no longer to them: else each tile would
        wait for the garbage collector."""
        ended, self._ended, self._turn = self._ended, _nobody, None
        ended(self)


def _nobody(run: TileRun) -> None:
    """Listens."""


def _reason(error: BaseException) -> str:
    if isinstance(error, CancelledTileError):
        return "CANCELLED"
    return error.reason if isinstance(error, ServiceError) else InternalError.reason
