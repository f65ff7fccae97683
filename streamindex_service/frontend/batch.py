"""What the calls of many items have in common: a ragged decode step, in which each item fails or not by itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from streamindex.v1 import types_pb2

from streamindex_service.core.band_queue import Band
from streamindex_service.core.layers import KeyCache
from streamindex_service.core.sizes import MAX_POSITION
from streamindex_service.errors import CacheNotFoundError, InvalidArgumentError, ServiceError
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.rpc import to_message
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tile_run import TileRun
from streamindex_service.frontend.tiles import TileOperation

# Of the loop, some milliseconds: items that append little, and bytes that are looked at, written and joined to a page.
_ITEMS_A_TURN, _BYTES_A_TURN = 32, 1 << 20
_ITEM_OVERHEAD_BYTES = 1024  # of the answer message: lengths, or an error with its figures


class Item(Protocol):
    """A few rows of one cache."""

    @property
    def key_cache_id(self) -> str:
        """Of which."""

    @property
    def row_count(self) -> int:
        """How many."""

    @property
    def positions(self) -> Sequence[int]:
        """Where they stand."""


class Result(Protocol):
    """What became of an item."""

    @property
    def error(self) -> types_pb2.Error:
        """Set when it failed."""


def check_size(service: Service, items: Sequence[Item]) -> None:
    """Raises InvalidArgumentError for more items, or more rows of all together, than a call may have."""
    limits = service.settings.limits
    for field, value, most in (
        ("items", len(items), limits.max_batch_items),
        ("items.row_count", sum(item.row_count for item in items), limits.max_batch_rows),
    ):
        if value > most:
            raise InvalidArgumentError(
                f"{field}: {value} are more than {most}, the most of one call", field=field, metadata={"limit": most}
            )


def check_answers(service: Service, items: int, answer_bytes: int) -> None:
    """Raises InvalidArgumentError when the answers do not fit a message."""
    most_bytes = int(service.settings.limits.max_message_bytes) - _ITEM_OVERHEAD_BYTES * items
    if answer_bytes > most_bytes:
        raise InvalidArgumentError(
            f"the answers would have {answer_bytes} bytes, more than the {most_bytes} that one message may have",
            field="items.row_count",
            metadata={"needed_bytes": answer_bytes, "limit_bytes": most_bytes},
        )


def check_item(item: Item, parts: Sequence[tuple[str, bytes, int]]) -> None:
    """`parts`: name, bytes and bytes of a row of each tensor. Raises InvalidArgumentError naming the field."""
    if len(item.positions) != item.row_count:
        raise InvalidArgumentError(f"positions must have {item.row_count} numbers", field="positions")
    if any(position > MAX_POSITION for position in item.positions):
        raise InvalidArgumentError("positions must be at most 2^62", field="positions")
    for name, data, size in parts:
        if len(data) != item.row_count * size:
            raise InvalidArgumentError(
                f"{name} has {len(data)} bytes; {item.row_count} rows are {item.row_count * size}", field=name
            )


def step(service: Service, band: Band) -> AbstractContextManager[None]:
    """While the call is answered: streams of a lower priority hold back for an interactive one."""
    return contextlib.nullcontext() if band > Band.INTERACTIVE else service.pacing.step()


@contextlib.contextmanager
def caches_kept(service: Service, owner: str, items: Sequence[Item]) -> Iterator[None]:
    """While the call is answered: caches that it names do not expire, however long their items wait for the others."""
    store, named = service.caches, set[KeyCache]()
    for item in items:
        with contextlib.suppress(CacheNotFoundError):
            named.add(store.get(owner, item.key_cache_id))
    for cache in named:
        cache.busy += 1
    try:
        yield
    finally:
        for cache in named:
            cache.busy -= 1
            store.touch(cache)


class Turn:
    """Work on item after item that never waits: it would keep the loop from all others for as long as it takes."""

    def __init__(self) -> None:
        self._items = self._bytes = 0

    async def worked(self, size_bytes: int) -> None:
        """On one more item, on so many bytes of it; after some the others go on."""
        self._items += 1
        self._bytes += size_bytes
        if self._items >= _ITEMS_A_TURN or self._bytes >= _BYTES_A_TURN:
            self._items = self._bytes = 0
            await asyncio.sleep(0)


def refuse(service: Service, result: Result, error: ServiceError) -> None:
    """Tell of an item that failed."""
    service.counters.refusals[error.reason] += 1
    result.error.CopyFrom(to_message(error))


class TileSeries:
    """Tiles of rows of a block, one after another. A step is of many sequences: no single one of them is to
    blame for a worker's death."""

    def __init__(self) -> None:
        self._running: TileRun | None = None
        self._ended = asyncio.Event()

    @property
    def runs(self) -> bool:
        """Whether the device has something of it, or will have."""
        return self._running is not None and not self._running.done.done()

    async def run(self, operation: TileOperation, block: Block, first: int, rows: int, keys: int) -> None:
        """The next tile, of rows [first, first + rows), which see so many keys. Raises ServiceError."""
        self._ended.clear()
        self._running = run = TileRun(operation, block, first, rows, keys, ended=lambda _: self._ended.set())
        run.start()
        await self._ended.wait()
        run.done.result()

    async def stop(self) -> None:
        """No more; wait for the device."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running.done, return_exceptions=True)
