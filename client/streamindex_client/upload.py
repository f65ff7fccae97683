"""The client's half of AppendKeys as a state machine without I/O.

An upload is one or more attempts. Each opens a stream, sends the header, and after `accepted` sends chunks from the
row that the server names, never more than its window ahead of its acknowledgements, then the finish. A broken attempt
leaves what is known of the upload (its id, the rows acknowledged, the digest at each chunk's end) to the next.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from streamindex import checksum, framing
from streamindex.v1 import key_cache_pb2

from streamindex_client.effects import Pause
from streamindex_client.errors import InputError, ProtocolError, from_message

if TYPE_CHECKING:
    from streamindex_client.effects import Step
    from streamindex_client.tensors import Rows

__all__ = ["KeyRows", "UploadSession"]

_DEFAULT_WINDOW_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class KeyRows:
    """What is uploaded: rows of keys, and for FP8_E4M3 a scale for each."""

    keys: Rows
    scales: Rows | None = None

    @property
    def count(self) -> int:
        """Rows."""
        return self.keys.count

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on the wire."""
        return self.keys.row_bytes + (self.scales.row_bytes if self.scales else 0)

    def parts(self, start: int, stop: int) -> tuple[memoryview, memoryview]:
        """Keys and scales of some rows; empty scales where the format has none."""
        return self.keys.view(start, stop), self.scales.view(start, stop) if self.scales else memoryview(b"")


@dataclass(frozen=True, slots=True, order=True)
class _Digest:
    """CRC-32C of all rows below `row`."""

    row: int
    keys: int = 0
    scales: int = 0

    def extended(self, row: int, keys: memoryview, keys_crc: int, scales: memoryview) -> _Digest:
        joined = checksum.combine(self.keys, keys_crc, keys.nbytes)
        return _Digest(row, joined, checksum.crc32c(scales, self.scales))


@dataclass(slots=True)
class _Attempt:
    """One stream. Chunks are built by one thread, in order; a later attempt shares nothing with it."""

    digests: list[_Digest] = field(default_factory=lambda: [_Digest(0)])
    header_sent: bool = False
    accepted: bool = False
    finish_sent: bool = False
    cursor: int = 0
    chunk_rows: int = 0
    window_bytes: int = 0


class UploadSession:
    """Rows on their way to one layer.

    `acknowledged` rows are held by the server; `layer_keys` is the layer's length once the upload is committed, until
    then None.
    """

    def __init__(
        self, start: key_cache_pb2.AppendKeysHeader.Start, rows: KeyRows, chunk_bytes: int, upload_id: str = ""
    ) -> None:
        self._start = start
        self._rows = rows
        self._chunk_bytes = chunk_bytes
        self._attempt = _Attempt()
        self.upload_id = upload_id
        self.acknowledged = 0
        self.layer_keys: int | None = None

    @property
    def total(self) -> int:
        """Rows of the upload."""
        return self._rows.count

    @property
    def wants_input(self) -> bool:
        """Uploads have no iterator."""
        return False

    def begin(self) -> None:
        """Start an attempt: the stream is about to be opened."""
        self._attempt = _Attempt(digests=self._attempt.digests)

    def next_step(self) -> Step:
        """What the sender does next."""
        attempt = self._attempt
        if not attempt.header_sent:
            attempt.header_sent = True
            return self._build_header
        if not attempt.accepted:
            return Pause.WAIT
        if attempt.cursor < self.total:
            return self._next_chunk(attempt)
        if not attempt.finish_sent:
            attempt.finish_sent = True
            return partial(self._build_finish, attempt)
        return Pause.HALF_CLOSE

    def feed(self, block: Any) -> None:
        """Uploads have no iterator."""
        raise AssertionError(f"an upload was fed {block!r}")

    def end_input(self) -> None:
        """Uploads have no iterator."""
        raise AssertionError("an upload has no input to end")

    def receive(self, data: bytes | None) -> None:
        """Take the server's next message, None at the end of the stream.

        Raises the refusal as its typed error, ProtocolError for what the contract does not allow.
        """
        if data is None:
            raise ProtocolError("the upload's stream ended before it was committed")
        try:
            message = key_cache_pb2.AppendKeysResponse.FromString(data)
        except Exception as error:  # upb and pure Python raise different classes
            raise ProtocolError("an AppendKeysResponse cannot be read") from error
        kind = message.WhichOneof("message")
        if kind == "refused":
            raise from_message(message.refused)
        if kind == "accepted" and not self._attempt.accepted:
            self._accept(message.accepted)
        elif kind == "acknowledged" and self._attempt.accepted:
            self._acknowledge(message.acknowledged.row_offset)
        elif kind == "committed" and self._attempt.finish_sent:
            self.acknowledged = self.total
            self.layer_keys = message.committed.layer_keys
        else:
            raise ProtocolError(f"{kind or 'an empty message'} came out of turn in an upload")

    def _next_chunk(self, attempt: _Attempt) -> Step:
        start = attempt.cursor
        stop = min(start + attempt.chunk_rows, self.total)
        in_flight = start - self.acknowledged
        # one chunk may always travel, however small the window
        if in_flight and (stop - self.acknowledged) * self._rows.row_bytes > attempt.window_bytes:
            return Pause.WAIT
        attempt.cursor = stop
        return partial(self._build_chunk, attempt, start, stop)

    def _accept(self, accepted: key_cache_pb2.UploadAccepted) -> None:
        offset = accepted.row_offset
        if offset > self.total:
            raise ProtocolError(f"the server holds {offset} rows of an upload of {self.total}")
        limit = min(self._chunk_bytes, accepted.max_chunk_bytes or self._chunk_bytes)
        # a row longer than the chosen chunk is still sent whole if the server takes it
        limit = max(limit, min(self._rows.row_bytes, accepted.max_chunk_bytes or self._rows.row_bytes))
        attempt = self._attempt
        attempt.chunk_rows = limit // self._rows.row_bytes
        if not attempt.chunk_rows:
            raise InputError("keys", f"a row has {self._rows.row_bytes} bytes, the server's chunks have {limit}")
        attempt.window_bytes = accepted.window_bytes or _DEFAULT_WINDOW_BYTES
        attempt.digests = self._digests_at(offset, attempt.digests)
        attempt.cursor = self.acknowledged = offset
        attempt.accepted = True
        self.upload_id = accepted.upload_id or self.upload_id

    def _acknowledge(self, offset: int) -> None:
        if offset > self._attempt.cursor:
            raise ProtocolError(f"row {offset} was acknowledged, {self._attempt.cursor} have been sent")
        self.acknowledged = max(self.acknowledged, offset)

    def _digests_at(self, row: int, known: list[_Digest]) -> list[_Digest]:
        """Known digests up to `row`, which is computed if it lies within a chunk or was sent by another session."""
        kept = known[: bisect_right(known, row, key=lambda digest: digest.row)]
        while kept[-1].row < row:
            start = kept[-1].row
            stop = min(row, start + max(1, self._chunk_bytes // self._rows.row_bytes))
            keys, scales = self._rows.parts(start, stop)
            kept.append(kept[-1].extended(stop, keys, checksum.crc32c(keys), scales))
        return kept

    def _build_header(self) -> bytes:
        header = key_cache_pb2.AppendKeysHeader()
        if self.upload_id:
            header.resume_upload_id = self.upload_id
        else:
            header.start.CopyFrom(self._start)
        data: bytes = key_cache_pb2.AppendKeysRequest(header=header).SerializeToString()
        return data

    def _build_chunk(self, attempt: _Attempt, start: int, stop: int) -> bytes:
        keys, scales = self._rows.parts(start, stop)
        keys_crc = checksum.crc32c(keys)
        attempt.digests.append(attempt.digests[-1].extended(stop, keys, keys_crc, scales))
        return framing.encode_key_chunk(start, stop - start, keys, scales, checksum.crc32c(scales, keys_crc))

    def _build_finish(self, attempt: _Attempt) -> bytes:
        digest = attempt.digests[-1]
        assert digest.row == self.total, "chunks are built in order, before the finish"
        finish = key_cache_pb2.AppendKeysFinish(row_count=self.total, keys_crc32c=digest.keys)
        if self._rows.scales is not None:
            finish.scales_crc32c = digest.scales
        data: bytes = key_cache_pb2.AppendKeysRequest(finish=finish).SerializeToString()
        return data
