"""SearchBatch: a ragged decode step, as one message out and one back."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from streamindex.v1 import search_pb2

from streamindex_client.errors import InputError, ProtocolError, StreamIndexError, from_message
from streamindex_client.formats import Priority, ResultOrder, RowKind, SearchMode, member
from streamindex_client.requests import check_layer, key_rows, query_block
from streamindex_client.tensors import maker_like, position_rows, unsigned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from streamindex_client.model import KeyCacheInfo

__all__ = [
    "AppendPlaces",
    "BatchItem",
    "BatchRequest",
    "BatchResult",
    "build_batch",
    "check_count",
    "item_positions",
    "naming_item",
]


class _Cache(Protocol):
    @property
    def info(self) -> KeyCacheInfo:
        """The cache's last known state."""

    def length(self, layer: int) -> int:
        """Keys of a layer, last known."""

    def _note_length(self, layer: int, keys: int) -> int: ...


@dataclass(frozen=True, slots=True)
class BatchItem:
    """A few rows of one cache.

    q [rows, heads, head_dim], w [rows, heads] float32, and where the rows stand: `start_position` or `positions`
    [rows]. `keys` [new, head_dim] (and `scales` [new] float32 for FP8_E4M3) are written before any item is searched,
    at `first_row`, or at the layer's last known length, behind what items before it append. After an error give
    `first_row`, or ask again only for the items that failed. q and w may be None for an item that only appends.
    """

    cache: _Cache
    layer: int
    q: Any = None
    w: Any = None
    start_position: int | None = None
    positions: Any = None
    keys: Any = None
    scales: Any = None
    first_row: int | None = None
    convention: str | None = None


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of one item.

    `indices` [rows, top_k] int32 and `scores` [rows, top_k] float32 (None if not asked for) as in `SearchPart`; both
    None when `error` is set. `layer_keys`: keys of the layer after the append, which may have been done even so.
    """

    layer_keys: int
    indices: Any = None
    scores: Any = None
    error: StreamIndexError | None = None


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A checked batch: the message, and how to read the answer."""

    message: search_pb2.SearchBatchRequest
    items: Sequence[BatchItem]
    makers: list[Callable[[npt.NDArray[Any]], Any]] = field(default_factory=list)

    def results(self, answer: search_pb2.SearchBatchResponse) -> list[BatchResult]:
        """One result an item; notes the layers' lengths in the caches. Raises ProtocolError."""
        check_count(answer.results, self.items)
        return [self._result(index, result) for index, result in enumerate(answer.results)]

    def _result(self, index: int, result: search_pb2.SearchBatchResult) -> BatchResult:
        item, sent = self.items[index], self.message.items[index]
        if result.HasField("error"):
            return BatchResult(result.layer_keys, error=from_message(result.error))
        item.cache._note_length(item.layer, result.layer_keys)
        shape = (sent.row_count, self.message.top_k)
        wanted = shape[0] * shape[1] * 4
        if len(result.indices) != wanted or len(result.scores) != wanted * self.message.want_scores:
            raise ProtocolError(f"item {index} has {len(result.indices)} + {len(result.scores)} bytes of answers")
        make = self.makers[index]
        return BatchResult(
            result.layer_keys,
            make(np.frombuffer(result.indices, "<i4").reshape(shape)),
            make(np.frombuffer(result.scores, "<f4").reshape(shape)) if self.message.want_scores else None,
        )


def build_batch(
    items: Sequence[BatchItem],
    *,
    top_k: int,
    order: ResultOrder | str,
    mode: SearchMode | str,
    want_scores: bool,
    priority: Priority | str | None,
) -> BatchRequest:
    """Check all items. Raises InputError naming the item and the argument."""
    message = search_pb2.SearchBatchRequest(
        top_k=unsigned("top_k", top_k, 31, 1),
        order=member(ResultOrder, "order", order).wire,
        mode=member(SearchMode, "mode", mode).wire,
        want_scores=bool(want_scores),
    )
    if priority is not None:
        message.priority = member(Priority, "priority", priority).wire
    request, places = BatchRequest(message, list(items)), AppendPlaces()
    for index, item in enumerate(request.items):
        with naming_item(index):
            message.items.append(_item(item, places))
        request.makers.append(maker_like(item.q))
    return request


class AppendPlaces:
    """Where the rows go that the items of a call append, in their order, if they do not say: behind the layer as it was
    last known, and behind what items before them append."""

    def __init__(self) -> None:
        self._ends: dict[tuple[str, int, RowKind], int] = {}

    def first_row(self, info: KeyCacheInfo, layer: int, kind: RowKind, rows: int, given: int | None) -> int:
        """The row of the layer that the first of so many is written to."""
        place = info.id, layer, kind
        end = self._ends.get(place, info.lengths(kind)[layer])
        first = end if given is None else given
        self._ends[place] = max(end, first + rows)
        return first


def check_count(results: Sequence[Any], items: Sequence[Any]) -> None:
    """One result must have come for each item. Raises ProtocolError."""
    if len(results) != len(items):
        raise ProtocolError(f"{len(results)} results came for {len(items)} items")


@contextlib.contextmanager
def naming_item(index: int) -> Iterator[None]:
    """What is wrong with an item is told with its number."""
    try:
        yield
    except InputError as error:
        raise InputError(f"items[{index}].{error.field}", error.message.partition(": ")[2]) from None


def item_positions(start_position: int | None, positions: Any, rows: int) -> list[int]:
    """Where an item's rows stand. Raises InputError."""
    if (start_position is None) == (positions is None):
        raise InputError("positions", "give either start_position or positions")
    if positions is not None:
        found: list[int] = position_rows("positions", positions, rows).tensor.tolist()
        return found
    start = unsigned("start_position", start_position, 63)
    return list(range(start, start + rows))


def _item(item: BatchItem, places: AppendPlaces) -> search_pb2.SearchBatchItem:
    info = item.cache.info
    spec = info.spec
    wire = search_pb2.SearchBatchItem(
        key_cache_id=info.id,
        layer=check_layer(item.layer, spec),
        query_format=spec.key_format.wire,
        convention=spec.convention if item.convention is None else item.convention,
    )
    if item.q is not None:
        block = query_block(spec, item.q, item.w, None)
        rows = block.q.count
        wire.row_count, wire.q, wire.w = rows, bytes(block.q.view(0, rows)), bytes(block.w.view(0, rows))
        wire.positions.extend(item_positions(item.start_position, item.positions, rows))
    elif item.keys is None:
        raise InputError("q", "give q and w, or keys to append, or both")
    if item.keys is not None:
        keys = key_rows(spec, item.keys, item.scales)
        given = None if item.first_row is None else unsigned("first_row", item.first_row, 64)
        wire.append.first_row = places.first_row(info, wire.layer, RowKind.KEYS, keys.count, given)
        wire.append.row_count = keys.count
        key_bytes, scale_bytes = keys.parts(0, keys.count)
        wire.append.keys, wire.append.scales = bytes(key_bytes), bytes(scale_bytes)
    return wire
