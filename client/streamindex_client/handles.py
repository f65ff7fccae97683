"""What the handles of the sync and the asyncio client have in common: no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamindex_client.formats import KeyFormat, Priority, RowKind, member
from streamindex_client.model import KeyCacheInfo, KeyCacheSpec, KvSpec

if TYPE_CHECKING:
    import numpy.typing as npt

    from streamindex_client.attend import AttendPart, AttendSession, AttendSummary
    from streamindex_client.search import SearchPart, SearchSession, SearchSummary

__all__ = ["AttendCollector", "AttendResult", "CacheHandle", "Collector", "SearchResult", "cache_spec"]


def cache_spec(
    heads: int,
    head_dim: int,
    ratio: int,
    key_format: KeyFormat | str,
    layers: int,
    convention: str,
    expected_keys: int,
    idle_ttl_s: int,
    priority: Priority | str,
    kv: KvSpec | None = None,
) -> KeyCacheSpec:
    """The spec of a cache to make. Raises InputError for an unknown format or priority."""
    known_format = member(KeyFormat, "key_format", key_format)
    known_priority = member(Priority, "priority", priority)
    return KeyCacheSpec(
        heads, head_dim, ratio, known_format, layers, convention, expected_keys, idle_ttl_s, known_priority, kv
    )


class CacheHandle:
    """A cache's identity and its last known state."""

    def __init__(self, info: KeyCacheInfo) -> None:
        self._info = info

    @property
    def info(self) -> KeyCacheInfo:
        """The cache's state when the server last told it; `refresh` asks again."""
        return self._info

    @property
    def id(self) -> str:
        """The server's name of the cache: who knows it and has the caller's identity may use it."""
        return self._info.id

    def length(self, layer: int) -> int:
        """Keys of a layer, as last known; this handle's own appends and truncations are counted."""
        return self._info.layer_keys[layer]

    def kv_length(self, layer: int) -> int:
        """KV rows of a layer, as last known."""
        return self._info.layer_kv_rows[layer]

    def window_length(self, layer: int) -> int:
        """Window rows of a layer, as last known."""
        return self._info.layer_window_rows[layer]

    def __repr__(self) -> str:
        """Without the id, which is a secret of its caller."""
        return f"<{type(self).__name__} {self._info.id[:4]}… {self._info.spec}>"

    def _note_length(self, layer: int, rows: int, kind: RowKind = RowKind.KEYS) -> int:
        lengths = self._info.lengths(kind)
        changed = (*lengths[:layer], rows, *lengths[layer + 1 :])
        self._info = self._info.with_lengths(kind, changed)
        return rows


@dataclass(frozen=True, slots=True)
class SearchResult:
    """All answer rows of a search: `indices` [rows, top_k] int32, `scores` [rows, top_k] float32 or None."""

    indices: Any
    scores: Any
    summary: SearchSummary


class Collector:
    """Puts the parts of a search together."""

    def __init__(self, session: SearchSession) -> None:
        self._session = session
        self._parts: list[SearchPart] = []

    def add(self, part: SearchPart) -> None:
        """Take the next part."""
        self._parts.append(part)

    def result(self) -> SearchResult:
        """All rows, in the kind that the parts have."""
        parts, header = self._parts, self._session.header
        scores = [part.scores for part in parts] if header.want_scores else None
        shape = (0, header.top_k)
        return SearchResult(
            _joined([part.indices for part in parts], self._session.empty(shape, np.dtype("<i4"))),
            None if scores is None else _joined(scores, self._session.empty(shape, np.dtype("<f4"))),
            self._session.summary,
        )


@dataclass(frozen=True, slots=True)
class AttendResult:
    """All answer rows of attention: `out` [rows, heads, value_dim] in q's type, `lse` [rows, heads] float32 or None."""

    out: Any
    lse: Any
    summary: AttendSummary


class AttendCollector:
    """Puts the parts of a call of attention together."""

    def __init__(self, session: AttendSession) -> None:
        self._session = session
        self._parts: list[AttendPart] = []

    def add(self, part: AttendPart) -> None:
        """Take the next part."""
        self._parts.append(part)

    def result(self) -> AttendResult:
        """All rows, in the kind that the parts have."""
        parts, session = self._parts, self._session
        empty = session.outputs(np.empty((0, session.heads, session.value_dim), "<u2"))
        lse = None
        if session.header.want_lse:
            lse = _joined([part.lse for part in parts], session.empty((0, session.heads), np.dtype("<f4")))
        return AttendResult(_joined([part.out for part in parts], empty), lse, session.summary)


def _joined(pieces: list[Any], empty: Any) -> Any:
    if not pieces:
        return empty
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(empty, np.ndarray):
        whole: npt.NDArray[Any] = np.concatenate(pieces)
        return whole
    rows = sum(len(piece) for piece in pieces)
    joined = empty.new_empty((rows, *empty.shape[1:]))  # torch, without importing it
    start = 0
    for piece in pieces:
        joined[start : start + len(piece)] = piece
        start += len(piece)
    return joined
