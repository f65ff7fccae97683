"""SparseAttendBatch: a ragged decode step of attention, as one message out and one back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from streamindex.v1 import attention_pb2

from streamindex_client.attend_requests import AttendForm, check_attended, finite, index_width, sink_logits
from streamindex_client.batch import check_count, item_positions, naming_item
from streamindex_client.errors import InputError, ProtocolError, StreamIndexError, from_message
from streamindex_client.formats import Priority, member
from streamindex_client.requests import check_layer
from streamindex_client.tensors import unsigned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamindex_client.attend import AttendBlock
    from streamindex_client.model import KeyCacheInfo

__all__ = ["AttendBatchItem", "AttendBatchRequest", "AttendBatchResult", "build_attend_batch"]


class _Cache(Protocol):
    @property
    def info(self) -> KeyCacheInfo:
        """The cache's last known state."""


@dataclass(frozen=True, slots=True)
class AttendBatchItem:
    """A few rows of one cache.

    q [rows, heads, key_dim] bf16, and where the rows stand: `start_position` or `positions` [rows]. With `top_k`
    index_q [rows, indexer heads, head_dim] in the cache's format and index_w [rows, indexer heads] float32; with
    `all_visible` neither; else `indices` [rows, entries] of any integer type, as many entries in all items.
    """

    cache: _Cache
    layer: int
    q: Any
    index_q: Any = None
    index_w: Any = None
    indices: Any = None
    start_position: int | None = None
    positions: Any = None
    convention: str | None = None


@dataclass(frozen=True, slots=True)
class AttendBatchResult:
    """What became of one item.

    `out` [rows, heads, value_dim] bf16, in q's own type; `lse` [rows, heads] float32 and `indices` [rows, top_k] int32,
    None if not asked for. numpy arrays (read-only) or torch tensors, as q was. All None when `error` is set.
    """

    out: Any = None
    lse: Any = None
    indices: Any = None
    error: StreamIndexError | None = None


@dataclass(frozen=True, slots=True)
class AttendBatchRequest:
    """A checked batch: the message, and how to read the answer."""

    message: attention_pb2.SparseAttendBatchRequest
    items: Sequence[AttendBatchItem]
    blocks: list[AttendBlock] = field(default_factory=list)

    def results(self, answer: attention_pb2.SparseAttendBatchResponse) -> list[AttendBatchResult]:
        """One result an item. Raises ProtocolError."""
        check_count(answer.results, self.items)
        return [self._result(index, result) for index, result in enumerate(answer.results)]

    def _result(self, index: int, result: attention_pb2.SparseAttendBatchResult) -> AttendBatchResult:
        if result.HasField("error"):
            return AttendBatchResult(error=from_message(result.error))
        message, block, kv = self.message, self.blocks[index], check_attended(self.items[index].cache.info.spec)
        rows, found = block.count, message.want_indices and message.WhichOneof("selection") == "top_k"
        sizes = (
            2 * rows * kv.heads * kv.value_dim,
            4 * rows * kv.heads * message.want_lse,
            4 * rows * message.top_k * found,
        )
        came = (len(result.out), len(result.lse), len(result.indices))
        if came != sizes:
            raise ProtocolError(f"item {index} has {came} bytes of answers, expected {sizes}")
        return AttendBatchResult(
            block.make_out(np.frombuffer(result.out, "<u2").reshape(rows, kv.heads, kv.value_dim)),
            block.make(np.frombuffer(result.lse, "<f4").reshape(rows, kv.heads)) if message.want_lse else None,
            block.make(np.frombuffer(result.indices, "<i4").reshape(rows, message.top_k)) if found else None,
        )


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
        if items:
            with naming_item(0):
                width = index_width(items[0].indices, True)
        message.given_indices = width
    request = AttendBatchRequest(message, list(items))
    for index, item in enumerate(request.items):
        with naming_item(index):
            wire, block = _item(item, top_k is not None, width, len(message.sink))
        message.items.append(wire)
        request.blocks.append(block)
    return request


def _item(
    item: AttendBatchItem, searched: bool, width: int | None, sinks: int
) -> tuple[attention_pb2.SparseAttendBatchItem, AttendBlock]:
    info = item.cache.info
    kv = check_attended(info.spec)
    if sinks and sinks != kv.heads:
        raise InputError("q", f"the sink has {sinks} numbers, the cache {kv.heads} heads")
    if width is not None and item.indices is None:
        raise InputError("indices", "is required without top_k and all_visible")
    if width is None and item.indices is not None:
        raise InputError("indices", "is not used with top_k or all_visible")
    form = AttendForm(info.spec, searched, width, explicit=True)
    form.check_search(item.index_q, item.index_w)
    block = form.block(item.q, item.index_q, item.index_w, item.indices, None)
    rows = block.count
    q, index_q, index_w, indices, _ = (b"" if part is None else bytes(part.view(0, rows)) for part in block.parts)
    wire = attention_pb2.SparseAttendBatchItem(
        key_cache_id=info.id,
        layer=check_layer(item.layer, info.spec),
        query_format=info.spec.key_format.wire,
        convention=info.spec.convention if item.convention is None else item.convention,
        row_count=rows,
        q=q,
        index_q=index_q,
        index_w=index_w,
        indices=indices,
        positions=item_positions(item.start_position, item.positions, rows),
    )
    return wire, block
