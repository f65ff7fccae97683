"""What the handles of the sync and the asyncio client have in common: no I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from streamindex_client.formats import KeyFormat, Priority, member
from streamindex_client.model import KeyCacheInfo, KeyCacheSpec

if TYPE_CHECKING:
    import numpy.typing as npt

    from streamindex_client.search import SearchPart, SearchSession, SearchSummary

__all__ = ["CacheHandle", "Collector", "SearchResult", "cache_spec"]


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
) -> KeyCacheSpec:
    """The spec of a cache to make. Raises InputError for an unknown format or priority."""
    known_format = member(KeyFormat, "key_format", key_format)
    known_priority = member(Priority, "priority", priority)
    return KeyCacheSpec(
        heads, head_dim, ratio, known_format, layers, convention, expected_keys, idle_ttl_s, known_priority
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

    def __repr__(self) -> str:
        """Without the id, which is a secret of its caller."""
        return f"<{type(self).__name__} {self._info.id[:4]}… {self._info.spec}>"

    def _note_length(self, layer: int, keys: int) -> int:
        lengths = self._info.layer_keys
        self._info = replace(self._info, layer_keys=(*lengths[:layer], keys, *lengths[layer + 1 :]))
        return keys


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
