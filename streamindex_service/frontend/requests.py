"""What callers ask for, checked field by field before anything is allocated."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from streamindex.v1 import attention_pb2, key_cache_pb2, search_pb2, types_pb2

from streamindex_service.config import Settings
from streamindex_service.core.band_queue import Band
from streamindex_service.core.sizes import MAX_POSITION, KeyFormat, KvFormat, pages_of, product
from streamindex_service.core.specs import CacheSpec, KvSpec, RowKind
from streamindex_service.errors import (
    ConventionMismatchError,
    ExceedsBudgetError,
    InvalidArgumentError,
    LayerChangedError,
)

MAX_HEADS = 128
MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 16
# What the operation of attention takes; a test compares.
MAX_ATTENTION_HEADS = 128
MIN_VALUE_DIM, MAX_VALUE_DIM = 16, 512
KEY_TAILS = (0, 16, 32, 64)
MAX_WINDOW = 4096  # tokens; models have 128
MAX_CONVENTION_BYTES = 128
MAX_REQUEST_KEY_BYTES = 64


StreamHeader = search_pb2.SearchHeader | attention_pb2.SparseAttendHeader


def within(field: str, value: int, least: int, most: int) -> int:
    """The value, if it is within its limits. Raises InvalidArgumentError naming field and limits."""
    if not least <= value <= most:
        raise InvalidArgumentError(
            f"{field} must be from {least} to {most}, not {value}", field=field, metadata={"min": least, "max": most}
        )
    return value


def _short(field: str, value: str, most_bytes: int) -> str:
    if len(value.encode()) > most_bytes:
        raise InvalidArgumentError(
            f"{field} must be at most {most_bytes} bytes", field=field, metadata={"max": most_bytes}
        )
    return value


def _format_name(number: int) -> str:
    if number in types_pb2.KeyFormat.values():
        return str(types_pb2.KeyFormat.Name(number))
    return str(number)


def cache_spec(
    spec: key_cache_pb2.KeyCacheSpec,
    settings: Settings,
    formats: frozenset[KeyFormat],
    kv_formats: frozenset[KvFormat],
    host_limit: int,
) -> CacheSpec:
    """Check a cache's spec. Raises InvalidArgumentError naming field and limit, ExceedsBudgetError with the figures."""
    within("spec.heads", spec.heads, 1, MAX_HEADS)
    within("spec.head_dim", spec.head_dim, HEAD_DIM_STEP, MAX_HEAD_DIM)
    if spec.head_dim % HEAD_DIM_STEP:
        raise InvalidArgumentError(
            f"spec.head_dim must be a multiple of {HEAD_DIM_STEP}, not {spec.head_dim}",
            field="spec.head_dim",
            metadata={"multiple_of": HEAD_DIM_STEP},
        )
    within("spec.ratio", spec.ratio, 1, 2**31 - 1)
    within("spec.layers", spec.layers, 1, settings.limits.max_layers)
    within("spec.expected_keys", spec.expected_keys, 0, settings.limits.max_layer_keys)
    within("spec.idle_ttl_s", spec.idle_ttl_s, 0, int(settings.server.max_idle_ttl_s))
    within("spec.priority", spec.priority, 0, max(types_pb2.Priority.values()))
    _short("spec.convention", spec.convention, MAX_CONVENTION_BYTES)
    key_format = KeyFormat.of(spec.key_format)
    if key_format is None or key_format not in formats:
        raise InvalidArgumentError(
            f"spec.key_format {_format_name(spec.key_format)} is not supported here",
            field="spec.key_format",
            metadata={"supported": ", ".join(_format_name(f) for f in sorted(formats))},
        )
    checked = CacheSpec(
        heads=spec.heads,
        head_dim=spec.head_dim,
        ratio=spec.ratio,
        key_format=key_format,
        layers=spec.layers,
        convention=spec.convention,
        expected_keys=spec.expected_keys,
        idle_ttl_s=float(spec.idle_ttl_s or settings.server.default_idle_ttl_s),
        priority=spec.priority or types_pb2.PRIORITY_STANDARD,
        kv=_kv_spec(spec.kv, kv_formats) if spec.HasField("kv") else None,
    )
    _refuse_what_never_fits(checked, host_limit)
    return checked


def _kv_spec(kv: key_cache_pb2.KvSpec, formats: frozenset[KvFormat]) -> KvSpec:
    kv_format = KvFormat.of(kv.kv_format)
    if kv_format is None or kv_format not in formats:
        raise InvalidArgumentError(
            f"spec.kv.kv_format {kv.kv_format} is not supported here",
            field="spec.kv.kv_format",
            metadata={"supported": ", ".join(f.name for f in sorted(formats))},
        )
    within("spec.kv.heads", kv.heads, 1, MAX_ATTENTION_HEADS)
    within("spec.kv.value_dim", kv.value_dim, MIN_VALUE_DIM, MAX_VALUE_DIM)
    if kv.value_dim & (kv.value_dim - 1) or (kv_format.key_dim and kv.value_dim != MAX_VALUE_DIM):
        wanted = str(MAX_VALUE_DIM) if kv_format.key_dim else "a power of two"
        raise InvalidArgumentError(f"spec.kv.value_dim must be {wanted}", field="spec.kv.value_dim")
    wide = [kv_format.key_dim] if kv_format.key_dim else [kv.value_dim + tail for tail in KEY_TAILS]
    if kv.key_dim not in wide:
        raise InvalidArgumentError(
            f"spec.kv.key_dim must be one of {', '.join(map(str, wide))}, not {kv.key_dim}", field="spec.kv.key_dim"
        )
    return KvSpec(kv_format, kv.key_dim, kv.value_dim, kv.heads)


def row_kind(number: int) -> RowKind:
    """Which rows an upload writes. Raises InvalidArgumentError."""
    within("header.start.row_kind", number, 0, max(RowKind))
    return RowKind(number or RowKind.KEYS)


def search_floor_bytes(settings: Settings) -> int:
    """Device memory that every search can be made to run with, beside its pages: the smallest workspace, and the rows
    and answers of a tile, which lie in one block."""
    return int(settings.memory.workspace_floor_bytes) + int(settings.memory.search_block_bytes)


def _refuse_what_never_fits(spec: CacheSpec, host_limit: int) -> None:
    layer_bytes = product("spec.expected_keys", pages_of(spec.expected_keys), spec.page_bytes)
    if spec.kv is not None:  # window rows are not foreseen: how many of them are kept is the caller's affair
        layer_bytes += product("spec.expected_keys", pages_of(spec.expected_keys), spec.kv.form.page_bytes)
    needed = product("spec.layers", layer_bytes, spec.layers)
    if spec.expected_keys and needed > host_limit:
        raise ExceedsBudgetError(
            "the cache can never fit the host memory budget",
            field="spec.expected_keys",
            metadata={"needed_bytes": needed, "budget_bytes": host_limit, "budget": "host"},
        )


@dataclass(frozen=True, slots=True)
class SearchParameters:
    """How a search is made.

    `start_position` is None when every chunk carries its rows' positions; `row_count` is 0 when it is not announced.
    """

    top_k: int
    order: int
    want_scores: bool
    band: Band
    start_position: int | None = None
    row_count: int = 0
    request_key: str = ""


def search_parameters(header: search_pb2.SearchHeader, spec: CacheSpec, settings: Settings) -> SearchParameters:
    """Check a search's header against its cache.

    Raises InvalidArgumentError naming field and limit, ConventionMismatchError.
    """
    check_selection(header.top_k, header.mode, header.order, settings, "header.")
    check_same_kind(header.query_format, header.convention, spec, "header.")
    within("header.priority", header.priority, 0, max(types_pb2.Priority.values()))
    check_request_key(header.request_key)
    start, row_count = start_and_count(header)
    band = Band(header.priority or spec.priority)
    return SearchParameters(header.top_k, header.order, header.want_scores, band, start, row_count, header.request_key)


def check_request_key(key: str) -> None:
    """Raises InvalidArgumentError."""
    _short("header.request_key", key, MAX_REQUEST_KEY_BYTES)


def blame_key(owner: str, request_key: str, header: StreamHeader) -> str:
    """Under which name a call is known that a worker dies of: the key that its caller repeats, or its header."""
    return f"{owner}/{request_key or hashlib.sha256(header.SerializeToString()).hexdigest()}"


def start_and_count(header: StreamHeader) -> tuple[int | None, int]:
    """Where the rows of a stream stand, None where chunks tell, and how many will come. Raises InvalidArgumentError."""
    position = header.WhichOneof("position")
    if position is None or (position == "explicit_positions" and not header.explicit_positions):
        raise InvalidArgumentError("header needs start_position or explicit_positions", field="header.start_position")
    start = None if position == "explicit_positions" else header.start_position
    if start is not None:
        within("header.start_position", start, 0, MAX_POSITION)
    return start, within("header.row_count", header.row_count, 0, MAX_POSITION)


def batch_parameters(request: search_pb2.SearchBatchRequest, settings: Settings) -> SearchParameters:
    """Check what all items of a batch have in common. Raises InvalidArgumentError naming field and limit."""
    check_selection(request.top_k, request.mode, request.order, settings)
    within("priority", request.priority, 0, max(types_pb2.Priority.values()))
    band = Band(request.priority or types_pb2.PRIORITY_INTERACTIVE)
    return SearchParameters(request.top_k, request.order, request.want_scores, band)


def check_layer_version(header: StreamHeader, version: int) -> None:
    """A search that goes on where another broke off must see the same layer. Raises LayerChangedError."""
    if header.HasField("expected_layer_version") and header.expected_layer_version != version:
        raise LayerChangedError(
            "the layer has changed since the version expected",
            field="header.expected_layer_version",
            metadata={"layer_version": version},
        )


def check_selection(top_k: int, mode: int, order: int, settings: Settings, prefix: str = "") -> None:
    """Check what is asked of the selection. Raises InvalidArgumentError."""
    within(f"{prefix}top_k", top_k, 1, settings.limits.max_top_k)
    if mode not in (types_pb2.SEARCH_MODE_UNSPECIFIED, types_pb2.SEARCH_MODE_EXACT):
        raise InvalidArgumentError(f"{prefix}mode: this version has SEARCH_MODE_EXACT alone", field=f"{prefix}mode")
    within(f"{prefix}order", order, 0, max(types_pb2.ResultOrder.values()))


def check_same_kind(query_format: int, convention: str, spec: CacheSpec, prefix: str = "") -> None:
    """Queries must be made as the cache's keys are. Raises InvalidArgumentError, ConventionMismatchError."""
    if KeyFormat.of(query_format) is None:
        raise InvalidArgumentError(f"{prefix}query_format is not a format", field=f"{prefix}query_format")
    if query_format != spec.key_format:
        raise ConventionMismatchError(
            f"the cache holds {_format_name(spec.key_format)}, the queries are {_format_name(query_format)}",
            field=f"{prefix}query_format",
        )
    check_convention(convention, spec, prefix)


def check_convention(convention: str, spec: CacheSpec, prefix: str = "") -> None:
    """Queries must be made as the cache's keys are. Raises ConventionMismatchError."""
    if convention != spec.convention:
        raise ConventionMismatchError("the convention is not the cache's", field=f"{prefix}convention")
