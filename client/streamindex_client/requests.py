"""From a caller's arguments to checked sessions and messages. Everything here raises InputError, before any call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamindex.v1 import key_cache_pb2, search_pb2

from streamindex_client.errors import InputError
from streamindex_client.formats import Priority, ResultOrder, RowKind, SearchMode, member
from streamindex_client.search import QueryBlock, SearchSession
from streamindex_client.tensors import float_rows, is_tensor, maker_like, position_rows, unsigned
from streamindex_client.upload import KeyRows

if TYPE_CHECKING:
    from streamindex_client.model import KeyCacheInfo, KeyCacheSpec
    from streamindex_client.retry import Environment

__all__ = [
    "SearchSource",
    "check_iterator",
    "check_layer",
    "chosen_rows",
    "key_rows",
    "kv_rows",
    "place_rows",
    "query_block",
    "search_source",
    "upload_start",
]


@dataclass(frozen=True, slots=True)
class SearchSource:
    """A session, and the iterator that feeds it (None when it already holds all queries)."""

    session: SearchSession
    blocks: Any


def check_layer(layer: int, spec: KeyCacheSpec) -> int:
    """A layer index of the cache."""
    number = unsigned("layer", layer, 32)
    if number >= spec.layers:
        raise InputError("layer", f"got {number}, the cache has layers 0 to {spec.layers - 1}")
    return number


def key_rows(spec: KeyCacheSpec, keys: Any, scales: Any) -> KeyRows:
    """keys [keys, head_dim] in the cache's format, and for FP8_E4M3 scales [keys] float32."""
    rows = float_rows("keys", keys, (None, spec.head_dim), spec.key_format.dtype_names, "keys head_dim")
    if spec.key_format.has_scales != (scales is not None):
        raise InputError("scales", f"are {'required' if scales is None else 'not used'} with {spec.key_format.value}")
    if scales is None:
        return KeyRows(rows)
    return KeyRows(rows, float_rows("scales", scales, (rows.count,), ("float32",), "keys"))


def kv_rows(spec: KeyCacheSpec, kind: RowKind, rows: Any, scales: Any) -> KeyRows:
    """KV rows or window rows: [rows, key_dim] bf16, or [rows, bytes] uint8 of a packed format, and for FP8_D512 scales
    [rows, 8] uint8."""
    if spec.kv is None:
        raise InputError(kind.value, "the cache holds index keys alone")
    kv_format = spec.kv.format
    width, names = kv_format.row_bytes or spec.kv.key_dim, ("uint8",) if kv_format.row_bytes else ("bfloat16", "uint16")
    found = float_rows(kind.value, rows, (None, width), names, "rows bytes" if kv_format.row_bytes else "rows key_dim")
    if bool(kv_format.scale_bytes) != (scales is not None):
        raise InputError("scales", f"are {'required' if scales is None else 'not used'} with {kv_format.value}")
    if scales is None:
        return KeyRows(found)
    return KeyRows(found, float_rows("scales", scales, (found.count, kv_format.scale_bytes), ("uint8",), "rows bytes"))


def chosen_rows(spec: KeyCacheSpec, tensors: dict[RowKind, Any], scales: Any) -> tuple[RowKind, KeyRows]:
    """What an append writes: the one of these that is not None."""
    given = [kind for kind, tensor in tensors.items() if tensor is not None]
    if len(given) != 1:
        names = ", ".join(kind.value for kind in tensors)
        raise InputError(given[1].value if given else "keys", f"give exactly one of {names}")
    kind = given[0]
    tensor = tensors[kind]
    return kind, key_rows(spec, tensor, scales) if kind is RowKind.KEYS else kv_rows(spec, kind, tensor, scales)


def query_block(spec: KeyCacheSpec, q: Any, w: Any, positions: Any) -> QueryBlock:
    """q [rows, heads, head_dim] in the cache's format, w [rows, heads] float32, positions [rows] or None."""
    shape = (None, spec.heads, spec.head_dim)
    q_rows = float_rows("q", q, shape, spec.key_format.dtype_names, "rows heads head_dim")
    w_rows = float_rows("w", w, (q_rows.count, spec.heads), ("float32",), "rows heads")
    position = None if positions is None else position_rows("positions", positions, q_rows.count)
    return QueryBlock(q_rows, w_rows, position, maker_like(q))


def search_source(
    env: Environment,
    info: KeyCacheInfo,
    *,
    layer: int,
    q: Any,
    w: Any,
    top_k: int,
    start_position: int | None,
    positions: Any,
    order: ResultOrder | str,
    mode: SearchMode | str,
    want_scores: bool,
    priority: Priority | str | None,
    convention: str | None,
) -> SearchSource:
    """A search session for tensors, or for an iterator of (q, w) or (q, w, positions) blocks."""
    spec = info.spec
    header = search_pb2.SearchHeader(
        key_cache_id=info.id,
        layer=check_layer(layer, spec),
        top_k=unsigned("top_k", top_k, 31, 1),
        query_format=spec.key_format.wire,
        convention=spec.convention if convention is None else convention,
        mode=member(SearchMode, "mode", mode).wire,
        order=member(ResultOrder, "order", order).wire,
        want_scores=bool(want_scores),
        request_key=env.new_key(),
    )
    if priority is not None:
        header.priority = member(Priority, "priority", priority).wire
    place_rows(header, q, start_position, positions)
    if is_tensor(q):
        block = query_block(spec, q, w, positions)
        header.row_count = block.q.count
        session = SearchSession(header, env.options, lambda checked: checked)
        session.feed(block)
        session.end_input()
        return SearchSource(session, None)
    if w is not None or positions is not None:
        raise InputError("w" if w is not None else "positions", "comes inside the chunks when q is an iterator of them")
    check_iterator(q, "(q, w[, positions])")
    explicit = start_position is None
    return SearchSource(SearchSession(header, env.options, lambda chunk: _chunk(spec, chunk, explicit)), q)


def place_rows(header: Any, q: Any, start_position: int | None, positions: Any) -> None:
    """Where the rows of a call stand."""
    if start_position is not None:
        header.start_position = unsigned("start_position", start_position, 63)
    else:
        header.explicit_positions = True
    if start_position is not None and positions is not None:
        raise InputError("positions", "give start_position or positions, not both")
    if is_tensor(q) and start_position is None and positions is None:
        raise InputError("start_position", "give start_position, or positions, one for each row of q")


def check_iterator(q: Any, wanted: str) -> None:
    """That it can be iterated, asynchronously or not."""
    if not hasattr(q, "__iter__") and not hasattr(q, "__aiter__"):
        raise InputError("q", f"got {type(q).__name__}, expected a tensor or an iterator of {wanted} chunks")


def _chunk(spec: KeyCacheSpec, chunk: Any, explicit: bool) -> QueryBlock:
    wanted = "(q, w, positions)" if explicit else "(q, w)"
    if not isinstance(chunk, tuple | list) or len(chunk) != (3 if explicit else 2):
        raise InputError("q", f"a chunk of the iterator is not {wanted}" + (" (no start_position)" if explicit else ""))
    return query_block(spec, chunk[0], chunk[1], chunk[2] if explicit else None)


def upload_start(
    info: KeyCacheInfo, layer: int, first_row: int, rows: int, kind: RowKind = RowKind.KEYS
) -> key_cache_pb2.AppendKeysHeader.Start:
    """The header of a new upload."""
    return key_cache_pb2.AppendKeysHeader.Start(
        key_cache_id=info.id,
        layer=check_layer(layer, info.spec),
        first_row=unsigned("first_row", first_row, 64),
        row_count=rows,
        row_kind=kind.wire,
    )
