"""The client's half of a stream of query rows as a state machine without I/O.

Queries come as blocks (one for a tensor, many for an iterator), are cut in pieces of a chunk each, and wait in one of
two queues: not sent, or sent and not answered. Both together are what a retry can send again; answered rows are gone.
A new attempt is a new call whose row 0 is the first unanswered row. What the rows are, and what an answer is, is said
by a subclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from streamindex import checksum, framing

from streamindex_client.effects import Pause
from streamindex_client.errors import DataLossError, ProtocolError, from_message

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from streamindex_client.effects import Step
    from streamindex_client.options import ClientOptions

__all__ = ["RowBlock", "RowSession"]


class RowBlock(Protocol):
    """Checked query rows. `make` hands answers back in the kind of tensor that they came in."""

    @property
    def make(self) -> Callable[[npt.NDArray[Any]], Any]:
        """An array as the caller's kind of tensor."""

    @property
    def count(self) -> int:
        """Rows."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on the wire."""

    def encode(self, row_offset: int, start: int, stop: int) -> bytes:
        """The message with rows start to stop - 1."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one block that travel in one chunk; `row` counts from the start of the whole call."""

    block: RowBlock
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
        return self.block.encode(self.row - base, self.start, self.stop)


@dataclass(slots=True)
class _Attempt:
    base: int
    header_sent: bool = False
    accepted: bool = False
    done: bool = False
    chunk_bytes: int = 0


class RowSession(ABC):
    """Queries on their way out, answers on their way in.

    `header` is the first attempt's; `check` turns a block of the caller's iterator into a `RowBlock`; `name` is what a
    call is called in messages.
    """

    name = "call"

    def __init__(self, header: Any, options: ClientOptions, check: Callable[[Any], RowBlock]) -> None:
        self.header = header
        self.options = options
        self.check = check
        self._unsent: deque[_Piece] = deque()
        self._unanswered: deque[_Piece] = deque()
        self._unanswered_bytes = 0
        self._fed = 0
        self._answered = 0
        self._input_ended = False
        self._layer_version = 0
        self._attempt = _Attempt(0)
        self._make: Callable[[npt.NDArray[Any]], Any] | None = None

    @abstractmethod
    def _parse(self, data: bytes) -> Any:
        """A message of the server, or a chunk. Raises FramingError."""

    @abstractmethod
    def _first_message(self, header: Any) -> bytes:
        """The message that opens an attempt, serialised."""

    @abstractmethod
    def _answer_sizes(self) -> tuple[int, int]:
        """Bytes of both parts of an answer row."""

    @abstractmethod
    def _part(
        self, first: int, rows: int, one: memoryview, other: memoryview, make: Callable[[npt.NDArray[Any]], Any]
    ) -> Any:
        """Answer rows as the caller gets them."""

    @abstractmethod
    def _tell_attempt(self) -> None:
        """An attempt begins: for the summary."""

    @abstractmethod
    def _tell_accepted(self, accepted: Any) -> None:
        """The server has accepted an attempt: for the summary."""

    @abstractmethod
    def _tell_done(self, rows: int, done: Any) -> None:
        """The call is complete, so many rows are answered: for the summary."""

    @property
    def answered_rows(self) -> int:
        """Rows whose answers have come."""
        return self._answered

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
        self._tell_attempt()

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
        """Check the caller's next block and take it in. Raises InputError."""
        self.take(self.check(block))

    def take(self, checked: RowBlock) -> None:
        """Take checked rows in; an empty block is passed over."""
        if self._make is None:
            self._make = checked.make
        if checked.count:
            self._unsent.append(_Piece(checked, self._fed, 0, checked.count))
            self._fed += checked.count

    def end_input(self) -> None:
        """The caller has no more queries."""
        self._input_ended = True

    def receive(self, data: bytes | None) -> Any:
        """Take the server's next message, None at the end of the stream; gives the answer rows it holds.

        Raises the refusal as its typed error, DataLossError (retriable) for a checksum that differs, ProtocolError
        for what the contract does not allow.
        """
        if data is None:
            raise ProtocolError(f"the {self.name}'s stream ended before it was done")
        try:
            message = self._parse(data)
        except framing.FramingError as error:
            raise ProtocolError(f"an answer of the {self.name} cannot be read: {error}") from error
        attempt = self._attempt
        if isinstance(message, framing.Chunk):
            if not attempt.accepted or attempt.done:
                raise ProtocolError(f"answer rows came out of turn in a {self.name}")
            return self._take(message)
        kind = message.WhichOneof("message")
        if kind == "refused":
            raise from_message(message.refused)
        if kind == "accepted" and not attempt.accepted:
            self._accept(message.accepted)
        elif kind == "done" and attempt.accepted:
            self._end(message.done)
        else:
            raise ProtocolError(f"{kind or 'an empty message'} came out of turn in a {self.name}")
        return None

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """An answer of this shape in the kind that the queries had; numpy if none came."""
        array = np.empty(shape, dtype)
        return array if self._make is None else self._make(array)

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

    def _accept(self, accepted: Any) -> None:
        attempt = self._attempt
        attempt.chunk_bytes = min(self.options.chunk_bytes, accepted.max_chunk_bytes or self.options.chunk_bytes)
        attempt.accepted = True
        self._layer_version = accepted.layer_version
        self._tell_accepted(accepted)

    def _end(self, done: Any) -> None:
        if not self.complete or done.row_count != self._answered - self._attempt.base:
            raise ProtocolError(
                f"the {self.name} was ended after {done.row_count} rows, {self.kept_rows} are not answered"
            )
        self._tell_done(self._answered, done)
        self._attempt.done = True

    def _take(self, chunk: framing.Chunk) -> Any:
        rows = chunk.row_count
        first = self._attempt.base + chunk.row_offset
        sent = self._unanswered[-1].end if self._unanswered else self._answered
        if first != self._answered or not rows or first + rows > sent:
            raise ProtocolError(f"answers to rows {first} to {first + rows} came, expected from {self._answered}")
        one, other = chunk.parts
        if (one.nbytes, other.nbytes) != tuple(rows * size for size in self._answer_sizes()):
            raise ProtocolError(f"{rows} answer rows have {one.nbytes} + {other.nbytes} bytes")
        if chunk.crc32c is not None and checksum.crc32c(other, checksum.crc32c(one)) != chunk.crc32c:
            raise DataLossError("answer rows arrived damaged", reason="CHECKSUM", retry_after_s=0.0)
        self._answer(first + rows)
        make = self._make
        assert make is not None, "rows are answered only after they were fed"
        return self._part(first, rows, one, other, make)

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
        header = type(self.header)()
        header.CopyFrom(self.header)
        if header.WhichOneof("position") == "start_position":
            header.start_position += base
        if header.row_count:
            header.row_count -= base
        if self._answered and self._layer_version:  # what is answered already is of this state of the layer
            header.expected_layer_version = self._layer_version
        return self._first_message(header)
