"""What callers of attention ask for, checked field by field before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamindex.v1 import attention_pb2, types_pb2

from streamindex_service.config import Settings
from streamindex_service.core.scheduler import Band
from streamindex_service.core.specs import CacheSpec, KvSpec
from streamindex_service.errors import InvalidArgumentError, NoKvRowsError
from streamindex_service.frontend import requests
from streamindex_service.frontend.requests import SearchParameters


@dataclass(frozen=True, slots=True)
class AttendParameters:
    """A call's header, checked.

    `search` is what finds the indices, None where the caller gives them; `width` indices a row either way. `window`
    tokens, 0 for none. `sink`: a logit for each head, or empty. `start_position` is None when chunks carry positions;
    `row_count` is 0 when it was not announced.
    """

    kv: KvSpec
    search: SearchParameters | None
    width: int
    window: int
    scale: float
    sink: tuple[float, ...]
    want_lse: bool
    band: Band
    start_position: int | None
    row_count: int
    request_key: str


def attend_parameters(
    header: attention_pb2.SparseAttendHeader, spec: CacheSpec, settings: Settings
) -> AttendParameters:
    """Check a header against its cache.

    Raises InvalidArgumentError naming field and limit, ConventionMismatchError, NoKvRowsError.
    """
    if spec.kv is None:
        raise NoKvRowsError("the cache holds index keys alone", field="header.key_cache_id")
    most = settings.limits.max_top_k
    selection = header.WhichOneof("selection")
    if selection == "top_k":
        requests.within("header.top_k", header.top_k, 1, most)
        requests.check_same_kind(header.query_format, header.convention, spec, "header.")
        width = header.top_k
    elif selection == "given_indices":
        width = requests.within("header.given_indices", header.given_indices, 0, most)
        requests.check_convention(header.convention, spec, "header.")
    else:
        raise InvalidArgumentError("header needs top_k or given_indices", field="header.top_k")
    requests.within("header.window", header.window, 0, requests.MAX_WINDOW)
    if not math.isfinite(header.scale):
        raise InvalidArgumentError("header.scale must be finite", field="header.scale")
    sink = tuple(header.sink)
    if sink and (len(sink) != spec.kv.heads or any(math.isnan(value) for value in sink)):
        raise InvalidArgumentError(
            f"header.sink must have {spec.kv.heads} numbers, or none, and no NaN", field="header.sink"
        )
    requests.within("header.priority", header.priority, 0, max(types_pb2.Priority.values()))
    requests.check_request_key(header.request_key)
    start, row_count = requests.start_and_count(header)
    band = Band(header.priority or spec.priority)
    search = None
    if selection == "top_k":
        # Attention does not care for the order; that of the rows is the better one to read them in.
        search = SearchParameters(width, types_pb2.RESULT_ORDER_INDEX, False, band, start, row_count)
    return AttendParameters(
        spec.kv,
        search,
        width,
        header.window,
        header.scale,
        sink,
        header.want_lse,
        band,
        start,
        row_count,
        header.request_key,
    )
