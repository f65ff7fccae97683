"""SparseAttendBatch: a ragged decode step of attention, as one message out and one back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from streamindex.v1 import attention_pb2

from streamindex_client.attend_requests import AttendForm, check_attended, finite, index_width, sink_logits
from streamindex_client.batch import AppendPlaces, check_count, item_positions, naming_item
from streamindex_client.errors import InputError, ProtocolError, StreamIndexError, from_message
from streamindex_client.formats import Priority, RowKind, member
from streamindex_client.requests import check_layer, key_rows, kv_rows
from streamindex_client.tensors import unsigned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamindex_client.attend import AttendBlock
    from streamindex_client.model import KeyCacheInfo

# What an item calls the scales of a kind, and the row that the first is written to.
_APPEND_NAMES = {
    RowKind.KEYS: {"scales": "key_scales", "first": "first_key"},
    RowKind.KV: {"scales": "kv_scales", "first": "first_kv_row"},
    RowKind.WINDOW: {"scales": "window_scales", "first": "first_window_row"},
}

__all__ = ["AttendBatchItem", "AttendBatchRequest", "AttendBatchResult", "build_attend_batch"]


class _Cache(Protocol):
    @property
    def info(self) -> KeyCacheInfo:
        """The cache's last known state."""

    def _note_length(self, layer: int, rows: int, kind: RowKind = ...) -> int: ...


@dataclass(frozen=True, slots=True)
class AttendBatchItem:
    """A few rows of one cache.

    q [rows, heads, key_dim] bf16, and where the rows stand: `start_position` or `positions` [rows]. With `top_k`
    index_q [rows, indexer heads, head_dim] in the cache's format and index_w [rows, indexer heads] float32; with
    `all_visible` neither; else `indices` [rows, entries] of any integer type, as many entries in all items. q may be
    None for an item that only appends.

    `keys`, `kv_rows` and `window_rows`, with scales for each where their format has them, are as for `append`: rows
    of the layer that are written before any item attends, from `first_key`, `first_kv_row` and `first_window_row` on,
    by default the last known length of each, behind what items before it append. After an error give these, or ask
    again only for the items that failed: what the others appended would be appended once more.
    """

    cache: _Cache
    layer: int
    q: Any = None
    index_q: Any = None
    index_w: Any = None
    indices: Any = None
    start_position: int | None = None
    positions: Any = None
    convention: str | None = None
    keys: Any = None
    key_scales: Any = None
    first_key: int | None = None
    kv_rows: Any = None
    kv_scales: Any = None
    first_kv_row: int | None = None
    window_rows: Any = None
    window_scales: Any = None
    first_window_row: int | None = None

    def appended(self, kind: RowKind) -> tuple[Any, Any, int | None]:
        """Of one kind: rows, their scales, and where the first is written."""
        if kind is RowKind.KEYS:
            return self.keys, self.key_scales, self.first_key
        if kind is RowKind.KV:
            return self.kv_rows, self.kv_scales, self.first_kv_row
        return self.window_rows, self.window_scales, self.first_window_row


@dataclass(frozen=True, slots=True)
class AttendBatchResult:
    """What became of one item.

    `out` [rows, heads, value_dim] bf16, in q's own type; `lse` [rows, heads] float32 and `indices` [rows, top_k] int32,
    None if not asked for. numpy arrays (read-only) or torch tensors, as q was. All None when `error` is set, and for an
    item that only appends. `layer_keys`, `layer_kv_rows` and `layer_window_rows` are the layer's lengths after the
    appends, some of which may have been made even where `error` is set: what `cache.length()` and the like tell then
    stays as it was.
    """

    out: Any = None
    lse: Any = None
    indices: Any = None
    error: StreamIndexError | None = None
    layer_keys: int = 0
    layer_kv_rows: int = 0
    layer_window_rows: int = 0


@dataclass(frozen=True, slots=True)
class AttendBatchRequest:
    """A checked batch: the message, and how to read the answer."""

    message: attention_pb2.SparseAttendBatchRequest
    items: Sequence[AttendBatchItem]
    blocks: list[AttendBlock | None] = field(default_factory=list)

    def results(self, answer: attention_pb2.SparseAttendBatchResponse) -> list[AttendBatchResult]:
        """One result an item; notes the layers' lengths in the caches. Raises ProtocolError."""
        check_count(answer.results, self.items)
        return [self._result(index, result) for index, result in enumerate(answer.results)]

    def _result(self, index: int, result: attention_pb2.SparseAttendBatchResult) -> AttendBatchResult:
        if result.HasField("error"):
            return _told(result, error=from_message(result.error))
        item = self.items[index]
        for kind, length in zip(RowKind, (result.layer_keys, result.kv_rows, result.window_rows), strict=True):
            if item.appended(kind)[0] is not None:
                item.cache._note_length(item.layer, length, kind)
        message, block, kv = self.message, self.blocks[index], check_attended(item.cache.info.spec)
        if block is None:
            if result.out or result.lse or result.indices:
                raise ProtocolError(f"item {index} only appends, and is answered")
            return _told(result)
        rows, found = block.count, message.want_indices and message.WhichOneof("selection") == "top_k"
        sizes = (
            2 * rows * kv.heads * kv.value_dim,
            4 * rows * kv.heads * message.want_lse,
            4 * rows * message.top_k * found,
        )
        came = (len(result.out), len(result.lse), len(result.indices))
        if came != sizes:
            raise ProtocolError(f"item {index} has {came} bytes of answers, expected {sizes}")
        return _told(
            result,
            block.make_out(np.frombuffer(result.out, "<u2").reshape(rows, kv.heads, kv.value_dim)),
            block.make(np.frombuffer(result.lse, "<f4").reshape(rows, kv.heads)) if message.want_lse else None,
            block.make(np.frombuffer(result.indices, "<i4").reshape(rows, message.top_k)) if found else None,
        )


def _told(
    result: attention_pb2.SparseAttendBatchResult,
    out: Any = None,
    lse: Any = None,
    indices: Any = None,
    error: StreamIndexError | None = None,
) -> AttendBatchResult:
    """With the lengths that came."""
    return AttendBatchResult(out, lse, indices, error, result.layer_keys, result.kv_rows, result.window_rows)


def build_attend_batch(
    items: Sequence[AttendBatchItem],
    *,
    top_k: int | None,
    all_visible: bool = False,
    window: int,
    scale: float,
    sink: Any,
    want_lse: bool,
    want_indices: bool,
    priority: Priority | str | None,
) -> AttendBatchRequest:
    """Check all items. Raises InputError naming the item and the argument."""
    message = attention_pb2.SparseAttendBatchRequest(
        window=unsigned("window", window, 32),
        scale=finite("scale", scale),
        sink=sink_logits(sink, None),
        want_lse=bool(want_lse),
        want_indices=bool(want_indices),
    )
    if priority is not None:
        message.priority = member(Priority, "priority", priority).wire
    width = None
    if top_k is not None:
        if all_visible:
            raise InputError("all_visible", "is not used with top_k")
        message.top_k = unsigned("top_k", top_k, 31, 1)
    elif all_visible:
        message.all_visible = True
    else:
        width = 0
        asking = next((index for index, item in enumerate(items) if item.q is not None), None)
        if asking is not None:
            with naming_item(asking):
                width = index_width(items[asking].indices, True)
        message.given_indices = width
    request, places = AttendBatchRequest(message, list(items)), AppendPlaces()
    for index, item in enumerate(request.items):
        with naming_item(index):
            wire, block = _item(item, top_k is not None, width, len(message.sink), places)
        message.items.append(wire)
        request.blocks.append(block)
    return request


def _item(
    item: AttendBatchItem, searched: bool, width: int | None, sinks: int, places: AppendPlaces
) -> tuple[attention_pb2.SparseAttendBatchItem, AttendBlock | None]:
    info = item.cache.info
    kv = check_attended(info.spec)
    if sinks and sinks != kv.heads:
        raise InputError("q", f"the sink has {sinks} numbers, the cache {kv.heads} heads")
    appends = [append for kind in RowKind if (append := _append(item, kind, places)) is not None]
    wire = attention_pb2.SparseAttendBatchItem(
        key_cache_id=info.id,
        layer=check_layer(item.layer, info.spec),
        query_format=info.spec.key_format.wire,
        convention=info.spec.convention if item.convention is None else item.convention,
        appends=appends,
    )
    if item.q is None:
        if not appends:
            raise InputError("q", "give q, or rows to append, or both")
        for name in ("index_q", "index_w", "indices", "start_position", "positions"):
            if getattr(item, name) is not None:
                raise InputError(name, "is not used without q")
        return wire, None
    if width is not None and item.indices is None:
        raise InputError("indices", "is required without top_k and all_visible")
    if width is None and item.indices is not None:
        raise InputError("indices", "is not used with top_k or all_visible")
    form = AttendForm(info.spec, searched, width, explicit=True)
    form.check_search(item.index_q, item.index_w)
    block = form.block(item.q, item.index_q, item.index_w, item.indices, None)
    rows = block.count
    wire.row_count = rows
    tensors = block.parts[:-1]  # positions are numbers of the message
    for name, part in zip(("q", "index_q", "index_w", "indices"), tensors, strict=True):
        if part is not None:
            setattr(wire, name, bytes(part.view(0, rows)))
    wire.positions.extend(item_positions(item.start_position, item.positions, rows))
    return wire, block


def _append(
    item: AttendBatchItem, kind: RowKind, places: AppendPlaces
) -> attention_pb2.SparseAttendBatchItem.Append | None:
    """Rows of one kind, if it has any."""
    info = item.cache.info
    tensor, scales, first = item.appended(kind)
    names = _APPEND_NAMES[kind]
    if tensor is None:
        for name, value in (("scales", scales), ("first", first)):
            if value is not None:
                raise InputError(names[name], f"is not used without {kind.value}")
        return None
    try:
        found = (
            key_rows(info.spec, tensor, scales) if kind is RowKind.KEYS else kv_rows(info.spec, kind, tensor, scales)
        )
    except InputError as error:
        if error.field != "scales":
            raise
        raise InputError(names["scales"], error.message.partition(": ")[2]) from None
    rows, scale_bytes = found.parts(0, found.count)
    if not found.count:
        raise InputError(kind.value, "has no rows")
    given = None if first is None else unsigned(names["first"], first, 64)
    return attention_pb2.SparseAttendBatchItem.Append(
        row_kind=kind.wire,
        first_row=places.first_row(info, check_layer(item.layer, info.spec), kind, found.count, given),
        row_count=found.count,
        rows=bytes(rows),
        scales=bytes(scale_bytes),
    )
