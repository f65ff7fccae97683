"""The client's half of SparseAttend: what is sent, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from streamindex import checksum, framing
from streamindex.v1 import attention_pb2

from streamindex_client.row_session import RowSession

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from streamindex_client.options import ClientOptions
    from streamindex_client.tensors import Rows

__all__ = ["AttendBlock", "AttendPart", "AttendSession", "AttendSummary"]

_EMPTY = memoryview(b"")


@dataclass(frozen=True, slots=True)
class AttendBlock:
    """Checked query rows: q, index_q, index_w, indices, positions, None where a call has none of them. `make` hands
    log-sum-exps back in q's kind, `make_out` outputs, which come as the bits of bf16."""

    parts: tuple[Rows | None, ...]
    make: Callable[[npt.NDArray[Any]], Any]
    make_out: Callable[[npt.NDArray[Any]], Any]

    @property
    def count(self) -> int:
        """Rows."""
        q = self.parts[0]
        assert q is not None
        return q.count

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on the wire."""
        return sum(part.row_bytes for part in self.parts if part is not None)

    def encode(self, row_offset: int, start: int, stop: int) -> bytes:
        """The message with rows start to stop - 1."""
        views = tuple(_EMPTY if part is None else part.view(start, stop) for part in self.parts)
        crc = 0
        for view in views:
            crc = checksum.crc32c(view, crc)
        return framing.encode_attend_chunk(row_offset, stop - start, views, crc)


@dataclass(frozen=True, slots=True)
class AttendPart:
    """Consecutive answer rows.

    `out`: [rows, heads, value_dim] bf16, in q's own type; `lse`: [rows, heads] float32, or None if not asked for. Row i
    answers query row `row_offset + i`. numpy arrays (read-only) or torch tensors, as q was.
    """

    row_offset: int
    out: Any
    lse: Any = None

    @property
    def rows(self) -> int:
        """Rows of this part."""
        return len(self.out)


@dataclass(frozen=True, slots=True)
class AttendSummary:
    """How a call went: what its last attempt saw, and figures over all attempts."""

    layer_keys: int = 0
    kv_rows: int = 0
    window_rows: int = 0
    implementation: str = ""
    queued_ms: int = 0
    rows: int = 0
    device_us: int = 0
    attempts: int = 0


class AttendSession(RowSession):
    """Queries on their way out, outputs on their way in: `heads` of `value_dim` elements a row."""

    name = "call"
    summary = AttendSummary()

    def __init__(
        self,
        header: attention_pb2.SparseAttendHeader,
        options: ClientOptions,
        check: Callable[[Any], AttendBlock],
        heads: int,
        value_dim: int,
    ) -> None:
        super().__init__(header, options, check)
        self._check_block = check
        self.heads = heads
        self.value_dim = value_dim
        self._make_out: Callable[[npt.NDArray[Any]], Any] | None = None

    def feed(self, block: Any) -> None:
        """See RowSession."""
        self._take_outputs(self._check_block(block))

    def take_all(self, block: AttendBlock) -> None:
        """Take in all queries of the call, checked; none will follow."""
        self._take_outputs(block)
        self.end_input()

    def _take_outputs(self, checked: AttendBlock) -> None:
        if self._make_out is None:
            self._make_out = checked.make_out
        self.take(checked)

    def outputs(self, bits: npt.NDArray[Any]) -> Any:
        """Bits of bf16 in the type that the queries had; as they are if none came."""
        return bits if self._make_out is None else self._make_out(bits)

    def _parse(self, data: bytes) -> Any:
        return framing.parse_attend_response(data)

    def _first_message(self, header: attention_pb2.SparseAttendHeader) -> bytes:
        data: bytes = attention_pb2.SparseAttendRequest(header=header).SerializeToString()
        return data

    def _answer_sizes(self) -> tuple[int, int]:
        return 2 * self.heads * self.value_dim, 4 * self.heads * self.header.want_lse

    def _part(
        self, first: int, rows: int, one: memoryview, other: memoryview, make: Callable[[npt.NDArray[Any]], Any]
    ) -> AttendPart:
        return AttendPart(
            first,
            self.outputs(np.frombuffer(one, "<u2").reshape(rows, self.heads, self.value_dim)),
            make(np.frombuffer(other, "<f4").reshape(rows, self.heads)) if self.header.want_lse else None,
        )

    def _tell_attempt(self) -> None:
        self.summary = replace(self.summary, attempts=self.summary.attempts + 1)

    def _tell_accepted(self, accepted: attention_pb2.SparseAttendAccepted) -> None:
        self.summary = replace(
            self.summary,
            layer_keys=accepted.layer_keys,
            kv_rows=accepted.kv_rows,
            window_rows=accepted.window_rows,
            implementation=accepted.implementation,
        )

    def _tell_done(self, rows: int, done: attention_pb2.SparseAttendDone) -> None:
        before = self.summary
        self.summary = replace(
            before,
            rows=rows,
            device_us=before.device_us + done.device_us,
            queued_ms=before.queued_ms + done.queued_ms,
        )
