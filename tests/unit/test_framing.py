"""Framing against ordinary protobuf: whatever the bytes, both read the same, or both refuse."""

from __future__ import annotations

from itertools import pairwise

import pytest
from google.protobuf import message as protobuf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from streamindex import framing
from streamindex.v1 import attention_pb2, key_cache_pb2, search_pb2

KINDS = {
    "keys": (key_cache_pb2.AppendKeysRequest, framing.parse_append_keys_request, ("keys", "scales")),
    "queries": (search_pb2.SearchRequest, framing.parse_search_request, ("q", "w", "positions")),
    "indices": (search_pb2.SearchResponse, framing.parse_search_response, ("indices", "scores")),
    "attend": (
        attention_pb2.SparseAttendRequest,
        framing.parse_attend_request,
        ("q", "index_q", "index_w", "indices", "positions"),
    ),
    "outputs": (attention_pb2.SparseAttendResponse, framing.parse_attend_response, ("out", "lse")),
}
ENCODERS = {
    "keys": framing.encode_key_chunk,
    "queries": framing.encode_query_chunk,
    "indices": framing.encode_index_chunk,
    "attend": lambda offset, count, *rest: framing.encode_attend_chunk(offset, count, rest[:-1], rest[-1]),
    "outputs": framing.encode_output_chunk,
}
kinds = pytest.mark.parametrize("kind", KINDS)
payloads = st.binary(max_size=300)
u64, u32 = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)


def varint(value: int, padding: int = 0) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(padding):  # longer than it need be, as protobuf allows
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


@st.composite
def fields(draw):
    """One field: any number, any wire type, known or not, well formed."""
    number, kind = draw(st.integers(1, 9)), draw(st.sampled_from([0, 1, 2, 5]))
    tag = varint(number << 3 | kind)
    if kind == 0:
        value = draw(u64)
        padding = draw(st.integers(0, 10 - len(varint(value)))) if draw(st.booleans()) else 0
        return tag + varint(value, padding)
    if kind == 2:
        data = draw(st.binary(max_size=20))
        return tag + varint(len(data), draw(st.integers(0, 2))) + data
    return tag + draw(st.binary(min_size=8 if kind == 1 else 4, max_size=8 if kind == 1 else 4))


chunks = st.lists(fields(), max_size=8).map(b"".join).map(lambda inner: b"\x12" + varint(len(inner)) + inner)
streams = st.lists(chunks | fields(), min_size=1, max_size=3).map(b"".join)


def reference(kind: str, data: bytes):
    cls, _, names = KINDS[kind]
    try:
        message = cls.FromString(data)
    except protobuf.DecodeError:
        return None
    if message.WhichOneof("message") != "chunk":
        return message
    chunk = message.chunk
    crc = chunk.crc32c if chunk.HasField("crc32c") else None
    return chunk.row_offset, chunk.row_count, tuple(getattr(chunk, name) for name in names), crc


def parsed(kind: str, data: bytes):
    try:
        message = KINDS[kind][1](data)
    except framing.FramingError:
        return None
    if not isinstance(message, framing.Chunk):
        return message
    parts = tuple(bytes(part) for part in message.parts)
    assert message.payload_bytes == sum(map(len, parts))
    return message.row_offset, message.row_count, parts, message.crc32c


@kinds
@given(offset=u64, count=u32, parts=st.lists(payloads, min_size=5, max_size=5), crc=u32)
def test_what_we_write_protobuf_reads(kind, offset, count, parts, crc):
    names = KINDS[kind][2]
    data = ENCODERS[kind](offset, count, *parts[: len(names)], crc)
    assert reference(kind, data) == (offset, count, tuple(parts[: len(names)]), crc)
    assert parsed(kind, data) == reference(kind, data)


@kinds
@given(offset=u64, count=u32, parts=st.lists(payloads, min_size=5, max_size=5), crc=st.none() | u32)
def test_what_protobuf_writes_we_read(kind, offset, count, parts, crc):
    cls, _, names = KINDS[kind]
    message = cls()
    message.chunk.SetInParent()
    message.chunk.row_offset, message.chunk.row_count = offset, count
    for name, part in zip(names, parts, strict=False):
        setattr(message.chunk, name, part)
    if crc is not None:
        message.chunk.crc32c = crc
    assert parsed(kind, message.SerializeToString()) == (offset, count, tuple(parts[: len(names)]), crc)


@kinds
@settings(max_examples=300)
@given(data=streams)
def test_fields_in_any_order_repeated_or_unknown(kind, data):
    assert parsed(kind, data) == reference(kind, data)


@kinds
@settings(max_examples=300)
@given(data=streams, where=st.integers(0, 400))
def test_truncated(kind, data, where):
    cut = data[: where % (len(data) + 1)]
    assert parsed(kind, cut) == reference(kind, cut)


@kinds
@settings(max_examples=500)
@given(data=st.binary(max_size=64) | st.binary(max_size=64).map(lambda inner: b"\x12" + varint(len(inner)) + inner))
@example(data=b"")
@example(data=b"\x12\x00")
@example(data=b"\x12\x0b" + b"\x08" + b"\xff" * 9 + b"\x7f")  # ten bytes, the last too large
@example(data=b"\x12\x03\x00\x01\x01")  # field number 0
@example(data=b"\x12\x02\x0b\x0c")  # a group
@example(data=b"\x12\x07\x82\x80\x80\x80\x80\x01\x00")  # a tag of more than 32 bits
@example(data=b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")  # a chunk of 2^64 - 1 bytes
def test_random_bytes(kind, data):
    assert parsed(kind, data) == reference(kind, data)


@kinds
@given(data=streams, flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3))
def test_damaged_bytes(kind, data, flips):
    damaged = bytearray(data)
    for where, flip in flips:
        damaged[where % len(damaged)] ^= flip
    assert parsed(kind, bytes(damaged)) == reference(kind, bytes(damaged))


def test_parts_are_views_of_the_message():
    data = framing.encode_key_chunk(1, 2, b"k" * 100, b"", 3)
    chunk = framing.parse_append_keys_request(data)
    assert isinstance(chunk, framing.Chunk)
    assert chunk.parts[0].obj is data
    assert all(a.readonly for a, _ in pairwise(chunk.parts))


def test_payloads_of_any_buffer_are_written_once():
    np = pytest.importorskip("numpy")
    array = np.arange(8, dtype=np.uint8)
    data = framing.encode_query_chunk(0, 1, array.data, bytearray(b"w"), memoryview(b""), None)
    assert parsed("queries", data) == (0, 1, (array.tobytes(), b"w", b""), None)


@pytest.mark.parametrize("offset", [-1, 2**64])
def test_numbers_out_of_range_are_not_written(offset):
    with pytest.raises(framing.FramingError):
        framing.encode_index_chunk(offset, 1, b"", b"", None)
