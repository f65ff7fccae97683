"""The client's half of Search: what is sent, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from streamindex import checksum, framing
from streamindex.v1 import search_pb2

from streamindex_client.row_session import RowSession

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from streamindex_client.tensors import Rows

__all__ = ["QueryBlock", "SearchPart", "SearchSession", "SearchSummary"]


@dataclass(frozen=True, slots=True)
class QueryBlock:
    """Checked query rows: q, w, and positions where they are explicit. `make` hands answers back in q's kind."""

    q: Rows
    w: Rows
    positions: Rows | None
    make: Callable[[npt.NDArray[Any]], Any]

    @property
    def count(self) -> int:
        """Rows."""
        return self.q.count

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on the wire."""
        return self.q.row_bytes + self.w.row_bytes + (self.positions.row_bytes if self.positions else 0)

    def encode(self, row_offset: int, start: int, stop: int) -> bytes:
        """The message with rows start to stop - 1."""
        q, w = self.q.view(start, stop), self.w.view(start, stop)
        positions = self.positions.view(start, stop) if self.positions else memoryview(b"")
        crc = checksum.crc32c(positions, checksum.crc32c(w, checksum.crc32c(q)))
        return framing.encode_query_chunk(row_offset, stop - start, q, w, positions, crc)


@dataclass(frozen=True, slots=True)
class SearchPart:
    """Consecutive answer rows.

    `indices`: [rows, top_k] int32, -1 pads; `scores`: [rows, top_k] float32, -inf pads, or None if not asked for. Row
    i answers query row `row_offset + i`. numpy arrays (read-only) or torch tensors, as q was.
    """

    row_offset: int
    indices: Any
    scores: Any = None

    @property
    def rows(self) -> int:
        """Rows of this part."""
        return len(self.indices)


@dataclass(frozen=True, slots=True)
class SearchSummary:
    """How a search went: what its last attempt saw, and figures over all attempts."""

    layer_keys: int = 0
    implementation: str = ""
    queued_ms: int = 0
    rows: int = 0
    device_us: int = 0
    attempts: int = 0


class SearchSession(RowSession):
    """Queries on their way out, indices on their way in."""

    name = "search"
    summary = SearchSummary()

    def _parse(self, data: bytes) -> Any:
        return framing.parse_search_response(data)

    def _first_message(self, header: search_pb2.SearchHeader) -> bytes:
        data: bytes = search_pb2.SearchRequest(header=header).SerializeToString()
        return data

    def _answer_sizes(self) -> tuple[int, int]:
        size = 4 * self.header.top_k
        return size, size if self.header.want_scores else 0

    def _part(
        self, first: int, rows: int, one: memoryview, other: memoryview, make: Callable[[npt.NDArray[Any]], Any]
    ) -> SearchPart:
        shape = (rows, self.header.top_k)
        return SearchPart(
            first,
            make(np.frombuffer(one, "<i4").reshape(shape)),
            make(np.frombuffer(other, "<f4").reshape(shape)) if self.header.want_scores else None,
        )

    def _tell_attempt(self) -> None:
        self.summary = replace(self.summary, attempts=self.summary.attempts + 1)

    def _tell_accepted(self, accepted: search_pb2.SearchAccepted) -> None:
        self.summary = replace(self.summary, layer_keys=accepted.layer_keys, implementation=accepted.implementation)

    def _tell_done(self, rows: int, done: search_pb2.SearchDone) -> None:
        before = self.summary
        self.summary = replace(
            before,
            rows=rows,
            device_us=before.device_us + done.device_us,
            queued_ms=before.queued_ms + done.queued_ms,
        )
