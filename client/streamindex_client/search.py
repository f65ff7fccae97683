"""The client's half of Search as a state machine without I/O.

Queries come as blocks (one for a tensor, many for an iterator), are cut in pieces of a chunk each, and wait in one of
two queues: not sent, or sent and not answered. Both together are what a retry can send again; answered rows are gone.
A new attempt is a new search whose row 0 is the first unanswered row.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from streamindex import checksum, framing
from streamindex.v1 import search_pb2

from streamindex_client.effects import Pause
from streamindex_client.errors import DataLossError, ProtocolError, from_message

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from streamindex_client.effects import Step
    from streamindex_client.options import ClientOptions
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
    def row_bytes(self) -> int:
        """Bytes of a row on the wire."""
        return self.q.row_bytes + self.w.row_bytes + (self.positions.row_bytes if self.positions else 0)


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


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one block that travel in one chunk; `row` counts from the start of the whole search."""

    block: QueryBlock
    row: int
    start: int
    stop: int

    @property
    def end(self) -> int:
        return self.row + self.stop - self.start

    @property
    def payload_bytes(self) -> int:
        return (self.stop - self.start) * self.block.row_bytes

    def split(self, rows: int) -> tuple[_Piece, _Piece]:
        middle = self.start + rows
        head = _Piece(self.block, self.row, self.start, middle)
        return head, _Piece(self.block, self.row + rows, middle, self.stop)

    def encode(self, base: int) -> bytes:
        block, span = self.block, (self.start, self.stop)
        q, w = block.q.view(*span), block.w.view(*span)
        positions = block.positions.view(*span) if block.positions else memoryview(b"")
        crc = checksum.crc32c(positions, checksum.crc32c(w, checksum.crc32c(q)))
        return framing.encode_query_chunk(self.row - base, self.stop - self.start, q, w, positions, crc)


@dataclass(slots=True)
class _Attempt:
    base: int
    header_sent: bool = False
    accepted: bool = False
    done: bool = False
    chunk_bytes: int = 0


@dataclass(slots=True)
class SearchSession:
    """Queries on their way out, answers on their way in.

    `header` is the first attempt's; `check` turns a block of the caller's iterator into a `QueryBlock`.
    """

    header: search_pb2.SearchHeader
    options: ClientOptions
    check: Callable[[Any], QueryBlock]
    summary: SearchSummary = SearchSummary()
    _unsent: deque[_Piece] = field(default_factory=deque)
    _unanswered: deque[_Piece] = field(default_factory=deque)
    _unanswered_bytes: int = 0
    _fed: int = 0
    _answered: int = 0
    _input_ended: bool = False
    _layer_version: int = 0
    _attempt: _Attempt = field(default_factory=lambda: _Attempt(0))
    _make: Callable[[npt.NDArray[Any]], Any] | None = None

    @property
    def complete(self) -> bool:
        """Whether every row of the input is answered."""
        return self._input_ended and self._answered == self._fed

    @property
    def done(self) -> bool:
        """Whether the server has ended the present attempt."""
        return self._attempt.done

    @property
    def kept_rows(self) -> int:
        """Rows held for sending or for a retry."""
        return self._fed - self._answered

    @property
    def wants_input(self) -> bool:
        """Whether all that was fed has been sent, and more may come."""
        return self._attempt.accepted and not self._unsent and not self._input_ended and self._fits(0, 1)

    def begin(self) -> None:
        """Start an attempt at the first unanswered row."""
        self._unsent.extendleft(reversed(self._unanswered))
        self._unanswered.clear()
        self._unanswered_bytes = 0
        self._attempt = _Attempt(self._answered)
        self._tell(attempts=self.summary.attempts + 1)

    def next_step(self) -> Step:
        """What the sender does next."""
        attempt = self._attempt
        if not attempt.header_sent:
            attempt.header_sent = True
            return partial(self._build_header, attempt.base)
        if not attempt.accepted:
            return Pause.WAIT
        if not self._unsent:
            if self._input_ended:
                return Pause.HALF_CLOSE
            return Pause.NEED_INPUT if self.wants_input else Pause.WAIT
        self._cut(attempt.chunk_bytes)
        piece = self._unsent[0]
        if not self._fits(piece.payload_bytes, piece.stop - piece.start):
            return Pause.WAIT
        self._unanswered.append(self._unsent.popleft())
        self._unanswered_bytes += piece.payload_bytes
        return partial(piece.encode, attempt.base)

    def feed(self, block: Any) -> None:
        """Check the caller's next block and take it in; an empty one is passed over. Raises InputError."""
        checked = self.check(block)
        if self._make is None:
            self._make = checked.make
        if checked.q.count:
            self._unsent.append(_Piece(checked, self._fed, 0, checked.q.count))
            self._fed += checked.q.count

    def end_input(self) -> None:
        """The caller has no more queries."""
        self._input_ended = True

    def receive(self, data: bytes | None) -> SearchPart | None:
        """Take the server's next message, None at the end of the stream; gives the answer rows it holds.

        Raises the refusal as its typed error, DataLossError (retriable) for a checksum that differs, ProtocolError
        for what the contract does not allow.
        """
        if data is None:
            raise ProtocolError("the search's stream ended before it was done")
        try:
            message = framing.parse_search_response(data)
        except framing.FramingError as error:
            raise ProtocolError(f"a SearchResponse cannot be read: {error}") from error
        attempt = self._attempt
        if isinstance(message, framing.Chunk):
            if not attempt.accepted or attempt.done:
                raise ProtocolError("answer rows came out of turn in a search")
            return self._take(message)
        kind = message.WhichOneof("message")
        if kind == "refused":
            raise from_message(message.refused)
        if kind == "accepted" and not attempt.accepted:
            self._accept(message.accepted)
        elif kind == "done" and attempt.accepted:
            self._end(message.done)
        else:
            raise ProtocolError(f"{kind or 'an empty message'} came out of turn in a search")
        return None

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """An answer of this shape in the kind that the queries had; numpy if none came."""
        array = np.empty(shape, dtype)
        return array if self._make is None else self._make(array)

    def _tell(self, **figures: Any) -> None:
        names = SearchSummary.__dataclass_fields__
        self.summary = SearchSummary(**({name: getattr(self.summary, name) for name in names} | figures))

    def _fits(self, payload_bytes: int, rows: int) -> bool:
        if not self._unanswered:
            return True  # one piece may always travel, however small the window
        unanswered_rows = self._unanswered[-1].end - self._answered
        return (
            self._unanswered_bytes + payload_bytes <= self.options.search_window_bytes
            and unanswered_rows + rows <= self.options.search_window_rows
        )

    def _cut(self, limit: int) -> None:
        """Make the first unsent piece no longer than a chunk and the window."""
        piece = self._unsent[0]
        # a row longer than a chunk is sent whole: the server says whether it takes it
        rows = min(max(1, limit // piece.block.row_bytes), self.options.search_window_rows)
        if piece.stop - piece.start > rows:
            self._unsent.popleft()
            self._unsent.extendleft(reversed(piece.split(rows)))

    def _accept(self, accepted: search_pb2.SearchAccepted) -> None:
        attempt = self._attempt
        attempt.chunk_bytes = min(self.options.chunk_bytes, accepted.max_chunk_bytes or self.options.chunk_bytes)
        attempt.accepted = True
        self._layer_version = accepted.layer_version
        self._tell(
            layer_keys=accepted.layer_keys,
            implementation=accepted.implementation,
        )

    def _end(self, done: search_pb2.SearchDone) -> None:
        if not self.complete or done.row_count != self._answered - self._attempt.base:
            raise ProtocolError(f"the search was ended after {done.row_count} rows, {self.kept_rows} are not answered")
        before = self.summary
        self._tell(
            rows=self._answered,
            device_us=before.device_us + done.device_us,
            queued_ms=before.queued_ms + done.queued_ms,
        )
        self._attempt.done = True

    def _take(self, chunk: framing.Chunk) -> SearchPart:
        indices, scores = chunk.parts
        rows, top_k = chunk.row_count, self.header.top_k
        first = self._attempt.base + chunk.row_offset
        sent = self._unanswered[-1].end if self._unanswered else self._answered
        if first != self._answered or not rows or first + rows > sent:
            raise ProtocolError(f"answers to rows {first} to {first + rows} came, expected from {self._answered}")
        expected = (rows * top_k * 4, rows * top_k * 4 if self.header.want_scores else 0)
        if (indices.nbytes, scores.nbytes) != expected:
            raise ProtocolError(f"{rows} answer rows have {indices.nbytes} + {scores.nbytes} bytes")
        if chunk.crc32c is not None and checksum.crc32c(scores, checksum.crc32c(indices)) != chunk.crc32c:
            raise DataLossError("answer rows arrived damaged", reason="CHECKSUM", retry_after_s=0.0)
        self._answer(first + rows)
        make = self._make
        assert make is not None, "rows are answered only after they were fed"
        return SearchPart(
            first,
            make(np.frombuffer(indices, "<i4").reshape(rows, top_k)),
            make(np.frombuffer(scores, "<f4").reshape(rows, top_k)) if self.header.want_scores else None,
        )

    def _answer(self, row: int) -> None:
        """Drop what is answered below `row`."""
        self._answered = row
        while self._unanswered and self._unanswered[0].row < row:
            piece = self._unanswered.popleft()
            answered = min(piece.end, row) - piece.row
            self._unanswered_bytes -= answered * piece.block.row_bytes
            if piece.end > row:
                self._unanswered.appendleft(piece.split(answered)[1])

    def _build_header(self, base: int) -> bytes:
        header = search_pb2.SearchHeader()
        header.CopyFrom(self.header)
        if header.WhichOneof("position") == "start_position":
            header.start_position += base
        if header.row_count:
            header.row_count -= base
        if self._answered and self._layer_version:  # what is answered already is of this state of the layer
            header.expected_layer_version = self._layer_version
        data: bytes = search_pb2.SearchRequest(header=header).SerializeToString()
        return data
