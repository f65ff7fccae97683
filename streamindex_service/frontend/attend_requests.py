"""What callers of attention ask for, checked field by field before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamindex.v1 import attention_pb2, types_pb2

from streamindex_service.config import Settings
from streamindex_service.core.attention_estimates import window_group
from streamindex_service.core.band_queue import Band
from streamindex_service.core.sizes import PAGE_KEYS
from streamindex_service.core.specs import CacheSpec, KvSpec
from streamindex_service.errors import InvalidArgumentError, NoKvRowsError
from streamindex_service.frontend import requests
from streamindex_service.frontend.requests import SearchParameters


@dataclass(frozen=True, slots=True)
class AttendParameters:
    """A call's header, checked.

    `search` is what finds the indices, None where the caller gives them; `width` indices a row either way.
    `all_visible`: there are none, each query attends all KV rows that it sees. `window` tokens, 0 for none. `sink`: a
    logit for each head, or empty. `start_position` is None when chunks carry positions; `row_count` is 0 when it was
    not announced. `last_position` is None when nobody knows it, and `first_position` 0.
    """

    kv: KvSpec
    search: SearchParameters | None
    width: int
    all_visible: bool
    window: int
    scale: float
    sink: tuple[float, ...]
    want_lse: bool
    band: Band
    start_position: int | None
    row_count: int
    request_key: str
    first_position: int
    last_position: int | None

    def window_pages(self, pages: int) -> tuple[int, int]:
        """Of so many pages of window rows, those [first, stop) that the windows of the call's queries may need."""
        if not self.window:
            return 0, 0
        last = pages * PAGE_KEYS if self.last_position is None else self.last_position
        return window_group(max(0, self.first_position - self.window + 1), last + 1, pages)


Asked = attention_pb2.SparseAttendHeader | attention_pb2.SparseAttendBatchRequest
_Named = attention_pb2.SparseAttendHeader | attention_pb2.SparseAttendBatchItem


def attend_parameters(
    header: attention_pb2.SparseAttendHeader, spec: CacheSpec, settings: Settings
) -> AttendParameters:
    """Check a header against its cache.

    Raises InvalidArgumentError naming field and limit, ConventionMismatchError, NoKvRowsError.
    """
    _refuse_without_kv(spec, "header.")
    check_asked(header, settings, "header.")
    requests.check_request_key(header.request_key)
    start, row_count = requests.start_and_count(header)
    band = Band(header.priority or spec.priority)
    last = None if start is None or not row_count else start + row_count - 1
    return _parameters(header, header, spec, band, start, row_count, header.request_key, "header.", (start or 0, last))


def item_parameters(
    request: attention_pb2.SparseAttendBatchRequest, item: attention_pb2.SparseAttendBatchItem, spec: CacheSpec
) -> AttendParameters:
    """Check an item of a batch against its cache; the request has been checked by `check_asked`. Raises likewise."""
    _refuse_without_kv(spec, "")
    band = Band(request.priority or types_pb2.PRIORITY_INTERACTIVE)
    # how many there are is checked later, and nobody looks at more of them than rows
    positions = item.positions if len(item.positions) == item.row_count else ()
    known = (min(positions), max(positions)) if positions else (0, None)
    return _parameters(request, item, spec, band, None, item.row_count, "", "", known)


def check_asked(asked: Asked, settings: Settings, prefix: str = "") -> None:
    """Check what is asked, whatever the cache. Raises InvalidArgumentError naming field and limit."""
    limits, selection = settings.limits, asked.WhichOneof("selection")
    if selection == "top_k":
        requests.within(f"{prefix}top_k", asked.top_k, 1, limits.max_top_k)
    elif selection == "given_indices":
        requests.within(f"{prefix}given_indices", asked.given_indices, 0, limits.max_given_indices)
    elif selection != "all_visible":
        raise InvalidArgumentError(
            f"{prefix.rstrip('.') or 'the request'} needs top_k, given_indices or all_visible", field=f"{prefix}top_k"
        )
    elif not asked.all_visible:
        raise InvalidArgumentError(f"{prefix}all_visible must be true, or left out", field=f"{prefix}all_visible")
    requests.within(f"{prefix}window", asked.window, 0, requests.MAX_WINDOW)
    if not math.isfinite(asked.scale):
        raise InvalidArgumentError(f"{prefix}scale must be finite", field=f"{prefix}scale")
    if any(math.isnan(value) for value in asked.sink):
        raise InvalidArgumentError(f"{prefix}sink must have no NaN", field=f"{prefix}sink")
    requests.within(f"{prefix}priority", asked.priority, 0, max(types_pb2.Priority.values()))


def _refuse_without_kv(spec: CacheSpec, prefix: str) -> None:
    if spec.kv is None:
        raise NoKvRowsError("the cache holds index keys alone", field=f"{prefix}key_cache_id")


def _parameters(
    asked: Asked,
    named: _Named,
    spec: CacheSpec,
    band: Band,
    start: int | None,
    row_count: int,
    request_key: str,
    prefix: str,
    known: tuple[int, int | None],
) -> AttendParameters:
    """What is asked, of the cache that is named. known: the first and the last position."""
    kv = spec.kv
    assert kv is not None, "the cache holds index keys alone"
    search = None
    if asked.WhichOneof("selection") == "top_k":
        requests.check_same_kind(named.query_format, named.convention, spec, prefix)
        # Attention does not care for the order; that of the rows is the better one to read them in.
        search = SearchParameters(asked.top_k, types_pb2.RESULT_ORDER_INDEX, False, band, start, row_count)
    else:
        requests.check_convention(named.convention, spec, prefix)
    sink = tuple(asked.sink)
    if sink and len(sink) != kv.heads:
        raise InvalidArgumentError(f"{prefix}sink must have {kv.heads} numbers, or none", field=f"{prefix}sink")
    return AttendParameters(
        kv,
        search,
        search.top_k if search is not None else asked.given_indices,
        asked.all_visible,
        asked.window,
        asked.scale,
        sink,
        asked.want_lse,
        band,
        start,
        row_count,
        request_key,
        *known,
    )
