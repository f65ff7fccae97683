"""Chunks of tensors on the wire, read and written without passing the payload through a message object.

The chunk messages of `streamindex.v1` (KeyChunk, QueryChunk, IndexChunk, AttendChunk, OutputChunk) are ordinary
protobuf and every protobuf client may treat them so. Python's protobuf copies a bytes field on every read and write,
which costs about a third of the throughput of a stream; so the Python ends of this project find the payload inside the
message (`parse_*`, giving views of the buffer that came from the socket) and write the message around it (`encode_*`,
one copy in all).

All of them have one shape, which `_ChunkLayout` holds: 1 = row_offset, 2 = row_count, then the bytes fields from
number 3 on, then an optional fixed32 crc32c; and all are field 2 of the message that the stream carries.

Wire format: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamindex.joining import Buffer, join
from streamindex.v1 import attention_pb2, key_cache_pb2, search_pb2

__all__ = [
    "Chunk",
    "FramingError",
    "encode_attend_chunk",
    "encode_index_chunk",
    "encode_key_chunk",
    "encode_output_chunk",
    "encode_query_chunk",
    "parse_append_keys_request",
    "parse_attend_request",
    "parse_attend_response",
    "parse_search_request",
    "parse_search_response",
]

_VARINT, _BYTES, _FIXED32 = 0, 2, 5
_CHUNK_TAG = (2 << 3) | _BYTES  # field 2 of every stream message is its chunk
_FIRST_PART = 3
_LENGTH_DIGITS, _NUMBER_DIGITS = 4, 9  # of a varint in the ordinary case: lengths below 2^28, numbers below 2^63
_MAX_UINT32, _MAX_UINT64 = (1 << 32) - 1, (1 << 64) - 1


class FramingError(ValueError):
    """The bytes are not a message of the expected type."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole rows of one or more tensors.

    `parts` are the payloads in field order: keys, scales · q, w, positions · indices, scores · q, index_q, index_w,
    indices, positions · out, lse. A part that is absent is empty. They are views of the message's buffer and keep it
    alive.
    """

    row_offset: int
    row_count: int
    parts: tuple[memoryview, ...]
    crc32c: int | None

    @property
    def payload_bytes(self) -> int:
        """Length of all parts together, in bytes."""
        return sum(len(part) for part in self.parts)


@dataclass(frozen=True, slots=True)
class _ChunkLayout:
    message: Any  # the stream message's class
    part_names: tuple[str, ...]

    @property
    def checksum_field(self) -> int:
        return _FIRST_PART + len(self.part_names)


_KEYS = _ChunkLayout(key_cache_pb2.AppendKeysRequest, ("keys", "scales"))
_QUERIES = _ChunkLayout(search_pb2.SearchRequest, ("q", "w", "positions"))
_INDICES = _ChunkLayout(search_pb2.SearchResponse, ("indices", "scores"))
_ATTEND = _ChunkLayout(attention_pb2.SparseAttendRequest, ("q", "index_q", "index_w", "indices", "positions"))
_OUTPUTS = _ChunkLayout(attention_pb2.SparseAttendResponse, ("out", "lse"))


def parse_append_keys_request(data: bytes) -> key_cache_pb2.AppendKeysRequest | Chunk:
    """Read an AppendKeysRequest; a chunk comes as `Chunk(parts=(keys, scales))`. Raises FramingError."""
    message: key_cache_pb2.AppendKeysRequest | Chunk = _parse(data, _KEYS)
    return message


def parse_search_request(data: bytes) -> search_pb2.SearchRequest | Chunk:
    """Read a SearchRequest; a chunk comes as `Chunk(parts=(q, w, positions))`. Raises FramingError."""
    message: search_pb2.SearchRequest | Chunk = _parse(data, _QUERIES)
    return message


def parse_search_response(data: bytes) -> search_pb2.SearchResponse | Chunk:
    """Read a SearchResponse; a chunk comes as `Chunk(parts=(indices, scores))`. Raises FramingError."""
    message: search_pb2.SearchResponse | Chunk = _parse(data, _INDICES)
    return message


def parse_attend_request(data: bytes) -> attention_pb2.SparseAttendRequest | Chunk:
    """Read a SparseAttendRequest; a chunk comes as `Chunk(parts=(q, index_q, index_w, indices, positions))`. Raises
    FramingError."""
    message: attention_pb2.SparseAttendRequest | Chunk = _parse(data, _ATTEND)
    return message


def parse_attend_response(data: bytes) -> attention_pb2.SparseAttendResponse | Chunk:
    """Read a SparseAttendResponse; a chunk comes as `Chunk(parts=(out, lse))`. Raises FramingError."""
    message: attention_pb2.SparseAttendResponse | Chunk = _parse(data, _OUTPUTS)
    return message


def encode_key_chunk(row_offset: int, row_count: int, keys: Buffer, scales: Buffer, crc32c: int) -> bytes:
    """An AppendKeysRequest with a chunk, serialised."""
    return _encode(row_offset, row_count, (keys, scales), crc32c)


def encode_query_chunk(
    row_offset: int, row_count: int, q: Buffer, w: Buffer, positions: Buffer, crc32c: int | None
) -> bytes:
    """A SearchRequest with a chunk, serialised."""
    return _encode(row_offset, row_count, (q, w, positions), crc32c)


def encode_index_chunk(row_offset: int, row_count: int, indices: Buffer, scores: Buffer, crc32c: int | None) -> bytes:
    """A SearchResponse with a chunk, serialised."""
    return _encode(row_offset, row_count, (indices, scores), crc32c)


def encode_attend_chunk(row_offset: int, row_count: int, parts: tuple[Buffer, ...], crc32c: int | None) -> bytes:
    """A SparseAttendRequest with a chunk of (q, index_q, index_w, indices, positions), serialised."""
    return _encode(row_offset, row_count, parts, crc32c)


def encode_output_chunk(row_offset: int, row_count: int, out: Buffer, lse: Buffer, crc32c: int | None) -> bytes:
    """A SparseAttendResponse with a chunk, serialised."""
    return _encode(row_offset, row_count, (out, lse), crc32c)


def _parse(data: bytes, layout: _ChunkLayout) -> Any:
    ordinary = _parse_chunk(data, layout)
    if ordinary is not None:
        return ordinary
    # Anything unusual (no chunk, a chunk in pieces, unknown fields, overlong numbers) goes through protobuf itself,
    # so that what is accepted and how it is read is protobuf's decision alone.
    try:
        message = layout.message.FromString(data)
    except Exception as error:  # upb and pure Python raise different classes
        raise FramingError("not a protobuf message of the expected type") from error
    if message.WhichOneof("message") != "chunk":
        return message
    chunk = message.chunk
    return Chunk(
        chunk.row_offset,
        chunk.row_count,
        tuple(memoryview(getattr(chunk, name)) for name in layout.part_names),
        chunk.crc32c if chunk.HasField("crc32c") else None,
    )


def _parse_chunk(data: bytes, layout: _ChunkLayout) -> Chunk | None:
    """A message that is one chunk of known fields, as every sensible encoder writes it; None for any other."""
    if not data or data[0] != _CHUNK_TAG:
        return None
    view = memoryview(data)
    end = len(data)
    length, position = _read_varint(data, 1, _LENGTH_DIGITS)
    if length != end - position:
        return None
    row_offset = row_count = 0
    crc32c: int | None = None
    parts = [view[:0]] * len(layout.part_names)
    while position < end:
        field, kind = data[position] >> 3, data[position] & 7  # a tag of two bytes has a field beyond all of ours
        position += 1
        if kind == _BYTES and _FIRST_PART <= field < layout.checksum_field:
            length, position = _read_varint(data, position, _LENGTH_DIGITS)
            if not 0 <= length <= end - position:
                return None
            parts[field - _FIRST_PART] = view[position : position + length]
            position += length
        elif kind == _VARINT and field in (1, 2):
            value, position = _read_varint(data, position, _NUMBER_DIGITS)
            if value < 0:
                return None
            if field == 1:
                row_offset = value
            else:
                row_count = value & _MAX_UINT32  # as protobuf does with a uint32 that is too long
        elif kind == _FIXED32 and field == layout.checksum_field and end - position >= 4:
            crc32c = int.from_bytes(view[position : position + 4], "little")
            position += 4
        else:
            return None
    return Chunk(row_offset, row_count, tuple(parts), crc32c)


def _read_varint(data: bytes, position: int, digits: int) -> tuple[int, int]:
    """A number of at most `digits` bytes, and where it ends; -1 if there is none."""
    value = 0
    for shift in range(0, 7 * digits, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    return -1, position


def _varint(value: int) -> bytes:
    if not 0 <= value <= _MAX_UINT64:
        raise FramingError(f"{value} is not an unsigned 64-bit number")
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _encode(row_offset: int, row_count: int, parts: tuple[Buffer, ...], crc32c: int | None) -> bytes:
    pieces: list[Buffer] = []
    head = bytearray()
    if row_offset:
        head += b"\x08" + _varint(row_offset)
    if row_count:
        head += b"\x10" + _varint(row_count)
    for field, part in enumerate(parts, _FIRST_PART):
        length = memoryview(part).nbytes
        if length:
            head += bytes([(field << 3) | _BYTES]) + _varint(length)
            pieces += [bytes(head), part]
            head.clear()
    if crc32c is not None:
        head += bytes([((_FIRST_PART + len(parts)) << 3) | _FIXED32]) + crc32c.to_bytes(4, "little")
    pieces.append(bytes(head))
    inner = sum(memoryview(piece).nbytes for piece in pieces)
    return join([bytes([_CHUNK_TAG]) + _varint(inner), *pieces])
