"""What is declared, out of limits or in disagreement: refused by name before anything is allocated."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from streamindex.v1 import key_cache_pb2, search_pb2, types_pb2

from tests.support.calls import (
    Calls,
    StreamCall,
    finish_message,
    key_chunk,
    query_chunk,
    query_chunks,
    refused,
    resume_message,
    search_header,
    start_message,
)
from tests.support.services import is_idle, wait_for
from tests.support.tensors import BF16, FP8, FP16, FP32, Draw, Kind, expected

KIND = Kind(heads=3, head_dim=32, layers=2, convention="rope-v1")
SCALED = Kind(heads=3, head_dim=32, key_format=FP8)
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("field", "value", "least", "most"),
    [
        ("heads", 0, 1, 128),
        ("heads", 129, 1, 128),
        ("heads", 2**32 - 1, 1, 128),
        ("head_dim", 0, 16, 256),
        ("head_dim", 8, 16, 256),
        ("head_dim", 272, 16, 256),
        ("ratio", 0, 1, 2**31 - 1),
        ("ratio", 2**31, 1, 2**31 - 1),
        ("layers", 0, 1, 256),
        ("layers", 257, 1, 256),
        ("expected_keys", 2**63, 0, 16_777_216),
        ("expected_keys", 2**64 - 1, 0, 16_777_216),
        ("idle_ttl_s", 86_401, 0, 86_400),
        ("priority", 4, 0, 3),
        ("priority", -1, 0, 3),
    ],
)
def test_a_spec_out_of_limits_is_refused_with_the_limits(calls, field, value, least, most):
    spec = KIND.spec()
    setattr(spec, field, value)
    refusal = refused(calls.key_caches.CreateKeyCache, key_cache_pb2.CreateKeyCacheRequest(spec=spec))
    assert (refusal.code, refusal.error.field) == (INVALID, f"spec.{field}")
    assert dict(refusal.error.metadata) == {"min": str(least), "max": str(most)}


@pytest.mark.parametrize("head_dim", [17, 24, 250])
def test_head_dim_is_a_multiple_of_sixteen(calls, head_dim):
    request = key_cache_pb2.CreateKeyCacheRequest(spec=Kind(head_dim=head_dim).spec())
    refusal = refused(calls.key_caches.CreateKeyCache, request)
    assert (refusal.code, refusal.error.field) == (INVALID, "spec.head_dim")
    assert refusal.error.metadata["multiple_of"] == "16"


@pytest.mark.parametrize("key_format", [0, 5, -1, 2**31 - 1])
def test_a_format_that_is_none(calls, key_format):
    spec = KIND.spec()
    spec.key_format = key_format
    refusal = refused(calls.key_caches.CreateKeyCache, key_cache_pb2.CreateKeyCacheRequest(spec=spec))
    assert (refusal.code, refusal.error.field) == (INVALID, "spec.key_format")
    assert "KEY_FORMAT_BF16" in refusal.error.metadata["supported"]


def test_a_convention_that_is_too_long_counts_bytes(calls):
    spec = KIND.spec()
    spec.convention = "ä" * 64
    calls.delete(calls.key_caches.CreateKeyCache(key_cache_pb2.CreateKeyCacheRequest(spec=spec)).key_cache.id)
    spec.convention = "ä" * 64 + "a"
    refusal = refused(calls.key_caches.CreateKeyCache, key_cache_pb2.CreateKeyCacheRequest(spec=spec))
    assert (refusal.code, refusal.error.field) == (INVALID, "spec.convention")


def test_a_spec_that_is_missing(calls):
    refusal = refused(calls.key_caches.CreateKeyCache, key_cache_pb2.CreateKeyCacheRequest())
    assert (refusal.code, refusal.error.field) == (INVALID, "spec.heads")


@pytest.mark.parametrize(
    ("first_row", "row_count"),
    [(0, 0), (0, 2**63), (0, 2**64 - 1), (0, 16_777_217), (2**64 - 1, 2**64 - 1), (2**63, 1), (2**64 - 1, 1)],
)
def test_declared_rows_that_cannot_be(calls, first_row, row_count):
    with calls.cache(KIND) as cache:
        before = calls.load()
        with calls.append_call() as call:
            call.send(start_message(cache.id, row_count, first_row))
            refusal = call.refusal()
        assert (refusal.code, refusal.error.field) == (INVALID, "header.start.row_count")
        after = calls.load()
    assert (after.open_uploads, after.ledgers[1].peak_bytes) == (before.open_uploads, before.ledgers[1].peak_bytes)


def test_what_is_announced_takes_no_memory(calls):
    """Sixteen million rows announced, none sent."""
    with calls.cache(KIND) as cache:
        before = calls.ledger("host").reserved_bytes
        call, _ = calls.start_upload(cache.id, 16_777_216)
        with call:
            assert calls.ledger("host").reserved_bytes == before


@pytest.mark.parametrize("layer", [2, 2**32 - 1])
def test_a_layer_that_is_not_there(calls, layer):
    with calls.cache(KIND) as cache:
        with calls.append_call() as call:
            call.send(start_message(cache.id, 1, layer=layer))
            append = call.refusal()
        with calls.search_call() as call:
            call.send(search_header(KIND, cache.id, 1, layer=layer))
            search = call.refusal()
        request = key_cache_pb2.TruncateKeysRequest(key_cache_id=cache.id, layer=layer)
        truncate = refused(calls.key_caches.TruncateKeys, request)
    for refusal in (append, search, truncate):
        assert refusal.code is INVALID
        assert refusal.error.field.endswith("layer")


CHUNKS = [
    ("one row more than bytes", KIND, {"row_count": 11}, "chunk.keys"),
    ("one row fewer than bytes", KIND, {"row_count": 9}, "chunk.keys"),
    ("2^32-1 rows", KIND, {"row_count": 2**32 - 1}, "chunk.keys"),
    ("no rows", KIND, {"row_count": 0, "keys": b""}, "chunk.row_count"),
    ("half an element", KIND, {"keys": b"\0" * (10 * 64 - 1)}, "chunk.keys"),
    ("float32 where bfloat16 is", KIND, {"keys": b"\0" * (10 * 128)}, "chunk.keys"),
    ("no keys", KIND, {"keys": b""}, "chunk.keys"),
    ("scales where there are none", KIND, {"scales": b"\0" * 40}, "chunk.scales"),
    ("no scales", SCALED, {"scales": b""}, "chunk.scales"),
    ("scales of a row too few", SCALED, {"scales": b"\0" * 36}, "chunk.scales"),
    ("more rows than announced", KIND, {"row_offset": 1}, "chunk.row_count"),
    ("offset 2^64-1", KIND, {"row_offset": 2**64 - 1}, "chunk.row_count"),
]


@pytest.mark.parametrize(("kind", "wrong", "field"), [c[1:] for c in CHUNKS], ids=[c[0] for c in CHUNKS])
def test_a_key_chunk_that_disagrees_with_itself(calls, kind, wrong, field):
    keys = Draw(1).keys(kind, 10)
    with calls.cache(kind) as cache:
        call, accepted = calls.start_upload(cache.id, 10)
        with call:
            call.send(key_chunk(kind, keys, 0, **wrong))
            refusal = call.refusal()
        assert (refusal.code, refusal.error.field) == (INVALID, field), refusal
        assert calls.query_upload(accepted.upload_id).row_offset == 0


def test_a_key_chunk_longer_than_the_limit(calls):
    most = calls.capabilities().limits.max_chunk_bytes
    kind = Kind(head_dim=256, key_format=FP32)
    rows = most // kind.row_bytes
    keys = Draw(2).keys(kind, rows + 1)
    with calls.cache(kind) as cache:
        assert calls.upload(kind, cache.id, keys[:rows], chunk_rows=rows) == rows
        call, accepted = calls.start_upload(cache.id, rows + 1)
        with call:
            assert accepted.max_chunk_bytes == most
            call.send(key_chunk(kind, keys, 0))
            refusal = call.refusal()
    assert (refusal.code, refusal.error.metadata["limit"]) == (INVALID, str(most))


# Searches.


@pytest.fixture(scope="module")
def cache(roomy_service):
    keys = Draw(3).keys(KIND, 300)
    with Calls(roomy_service.address) as calls, calls.cache(KIND, keys) as made:
        yield made.id, keys


HEADERS = [
    ({"top_k": 0}, "header.top_k"),
    ({"top_k": 4097}, "header.top_k"),
    ({"top_k": 2**32 - 1}, "header.top_k"),
    ({"mode": 2}, "header.mode"),
    ({"mode": -1}, "header.mode"),
    ({"order": 3}, "header.order"),
    ({"order": -1}, "header.order"),
    ({"priority": 4}, "header.priority"),
    ({"query_format": 0}, "header.query_format"),
    ({"query_format": 9}, "header.query_format"),
    ({"start_position": 2**62 + 1}, "header.start_position"),
    ({"start_position": 2**64 - 1}, "header.start_position"),
    ({"explicit_positions": False}, "header.start_position"),
    ({"row_count": 2**63}, "header.row_count"),
    ({"request_key": "k" * 65}, "header.request_key"),
]


@pytest.mark.parametrize(("wrong", "field"), HEADERS, ids=lambda value: str(value))
def test_a_search_header_out_of_limits(calls, cache, wrong, field):
    with calls.search_call() as call:
        call.send(search_header(KIND, cache[0], **{"top_k": 5, **wrong}))
        refusal = call.refusal()
    assert (refusal.code, refusal.error.field) == (INVALID, field)


def test_no_positions_at_all(calls, cache):
    message = search_header(KIND, cache[0], 5)
    message.header.ClearField("start_position")
    with calls.search_call() as call:
        call.send(message)
        refusal = call.refusal()
    assert (refusal.code, refusal.error.field) == (INVALID, "header.start_position")


@pytest.mark.parametrize(
    "wrong", [{"convention": ""}, {"convention": "rope-v2"}, {"query_format": FP16}, {"query_format": FP8}]
)
def test_queries_made_in_another_way(calls, cache, wrong):
    with calls.search_call() as call:
        call.send(search_header(KIND, cache[0], 5, **wrong))
        refusal = call.refusal()
    assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CONVENTION_MISMATCH")
    assert refusal.error.field == f"header.{next(iter(wrong))}"


QUERY_CHUNKS = [
    ("a row more than q", {"row_count": 11}, "chunk.q"),
    ("2^32-1 rows", {"row_count": 2**32 - 1}, "chunk.q"),
    ("no rows", {"row_count": 0, "q": b"", "w": b""}, "chunk.row_count"),
    ("q of another format", {"q": b"\0" * (10 * 3 * 32 * 4)}, "chunk.q"),
    ("w of a head too few", {"w": b"\0" * (10 * 2 * 4)}, "chunk.w"),
    ("w as float64", {"w": b"\0" * (10 * 3 * 8)}, "chunk.w"),
    ("no w", {"w": b""}, "chunk.w"),
    ("positions that were not asked for", {"positions": b"\0" * 80}, "chunk.positions"),
    ("a gap", {"row_offset": 11}, "chunk.row_offset"),
    ("rows again", {"row_offset": 0}, "chunk.row_offset"),
    ("row 2^64-1", {"row_offset": 2**64 - 1}, "chunk.row_offset"),
]


@pytest.mark.parametrize(("wrong", "field"), [c[1:] for c in QUERY_CHUNKS], ids=[c[0] for c in QUERY_CHUNKS])
def test_a_query_chunk_that_disagrees_with_itself(calls, cache, wrong, field):
    queries = Draw(4).queries(KIND, 20)
    with calls.start_search(KIND, cache[0], 5) as call:
        call.send(query_chunk(KIND, queries, 0, 10))
        call.receive("chunk")
        call.send(query_chunk(KIND, queries, 10, 10, **wrong))
        refusal = call.refusal()
    assert (refusal.code, refusal.error.field) == (INVALID, field), refusal
    wait_for(lambda: is_idle(calls.load()))


def test_a_query_chunk_longer_than_the_limit(calls, cache):
    most = calls.capabilities().limits.max_chunk_bytes
    queries = Draw(5).queries(KIND, most // (3 * 32 * 2 + 3 * 4) + 1)
    with calls.start_search(KIND, cache[0], 5) as call:
        call.send(query_chunk(KIND, queries, 0, len(queries)))
        refusal = call.refusal()
    assert (refusal.code, refusal.error.metadata["limit"]) == (INVALID, str(most))


@pytest.mark.parametrize(("announced", "sent"), [(10, 9), (10, 11), (1, 20)])
def test_rows_that_are_not_as_many_as_announced(calls, cache, announced, sent):
    queries = Draw(6).queries(KIND, sent)
    with calls.start_search(KIND, cache[0], 5, row_count=announced) as call:
        call.send(*query_chunks(KIND, queries, 4))
        call.half_close()
        refusal = call.refusal()
    assert (refusal.code, refusal.error.field) == (INVALID, "header.row_count")


@pytest.mark.parametrize("position", [-1, -(2**63), 2**62 + 1, 2**63 - 1])
@pytest.mark.parametrize("row", [0, 13])
def test_an_explicit_position_that_cannot_be(calls, cache, position, row):
    queries = Draw(7).queries(KIND, 20)
    queries.positions[row] = position
    with calls.start_search(KIND, cache[0], 5, explicit_positions=True) as call:
        call.send(*query_chunks(KIND, queries, 6, explicit=True))
        refusal = call.refusal()
    assert (refusal.code, refusal.error.field) == (INVALID, "chunk.positions"), refusal
    assert f"row {row}" in refusal.details


def test_the_last_position_may_be_2_to_the_62nd_and_no_more(calls, cache):
    cache_id, keys = cache
    queries = Draw(8).queries(KIND, 3)
    with calls.start_search(KIND, cache_id, 5, start_position=2**62 - 2) as call:
        call.send(*query_chunks(KIND, queries, 2))
        call.half_close()
        found = [np.frombuffer(m.chunk.indices, np.int32) for m in call.rest()[:-1]]
    queries.positions[:] = 300
    assert np.array_equal(np.concatenate(found).reshape(-1, 5), expected(KIND, keys, queries, 5)[0])
    with calls.start_search(KIND, cache_id, 5, start_position=2**62 - 1) as call:
        call.send(*query_chunks(KIND, queries, 2))
        refusal = call.refusal()
    assert (refusal.code, refusal.error.field) == (INVALID, "header.start_position"), refusal


def test_positions_that_are_missing(calls, cache):
    queries = Draw(9).queries(KIND, 5)
    with calls.start_search(KIND, cache[0], 5, explicit_positions=True) as call:
        call.send(*query_chunks(KIND, queries, 5))
        refusal = call.refusal()
    assert (refusal.code, refusal.error.field) == (INVALID, "chunk.positions")


NON_FINITE = [
    (BF16, "q", np.uint16(0x7FC0).tobytes()),
    (FP16, "q", np.float16(np.inf).tobytes()),
    (FP32, "q", np.float32(-np.inf).tobytes()),
    (FP8, "q", b"\xff"),
    (BF16, "w", np.float32(np.nan).tobytes()),
    (FP8, "w", np.float32(np.inf).tobytes()),
]


@pytest.mark.parametrize(("key_format", "tensor", "value"), NON_FINITE)
@pytest.mark.parametrize("row", [0, 17])
def test_nan_and_inf_in_queries_are_refused_by_name_and_row(calls, key_format, tensor, value, row):
    kind = Kind(heads=3, head_dim=32, key_format=key_format)
    draw = Draw(10)
    queries = draw.queries(kind, 40)
    with calls.cache(kind, draw.keys(kind, 50)) as made, calls.start_search(kind, made.id, 5) as call:
        call.send(query_chunk(kind, queries, 0, 20))
        assert call.receive("chunk").row_count == 20
        bad = query_chunk(kind, queries, 20, 20)
        data = bytearray(getattr(bad.chunk, tensor))
        at = row * len(data) // 20 + 2 * len(value)
        data[at : at + len(value)] = value
        setattr(bad.chunk, tensor, bytes(data))
        call.send(bad)
        refusal = call.refusal()
    assert (refusal.code, refusal.error.reason) == (INVALID, "NON_FINITE")
    assert dict(refusal.error.metadata) == {"tensor": tensor, "row": str(20 + row)}


def test_a_query_chunk_with_a_bad_checksum(calls, cache):
    queries = Draw(11).queries(KIND, 5)
    with calls.start_search(KIND, cache[0], 5) as call:
        call.send(query_chunk(KIND, queries, 0, 5, crc32c=12345))
        refusal = call.refusal()
    assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.DATA_LOSS, "CHECKSUM")


def test_a_refusal_comes_in_band_whatever_is_being_answered(calls, cache):
    """Answers and the refusal are written to one stream."""
    queries = Draw(12).queries(KIND, 400)
    for _ in range(30):
        with calls.start_search(KIND, cache[0], 64) as call:
            call.send(*query_chunks(KIND, queries, 10)[:-1])
            call.send(query_chunk(KIND, queries, 0, 10))
            assert call.refusal().error.field == "chunk.row_offset"


# Messages.

ORDERS = [
    ("nothing", [], "MALFORMED_MESSAGE"),
    ("a chunk first", ["chunk"], "MALFORMED_MESSAGE"),
    ("a finish first", ["finish"], "MALFORMED_MESSAGE"),
    ("an empty message first", ["empty"], "MALFORMED_MESSAGE"),
    ("two headers", ["header", "header"], "MALFORMED_MESSAGE"),
    ("a resume in the middle", ["header", "resume"], "MALFORMED_MESSAGE"),
    ("an empty message", ["header", "empty"], "MALFORMED_MESSAGE"),
    ("garbage first", ["garbage"], "MALFORMED_MESSAGE"),
    ("garbage later", ["header", "chunk", "garbage"], "MALFORMED_MESSAGE"),
    ("a header of no kind", ["no kind"], "INVALID_ARGUMENT"),
    ("a message cut short", ["header", "cut"], "MALFORMED_MESSAGE"),
]


@pytest.mark.parametrize(("order", "reason"), [o[1:] for o in ORDERS], ids=[o[0] for o in ORDERS])
def test_upload_messages_out_of_order(calls, order, reason):
    keys = Draw(13).keys(KIND, 10)
    raw = calls.channel.stream_stream(
        "/streamindex.v1.KeyCacheService/AppendKeys",
        request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
        response_deserializer=key_cache_pb2.AppendKeysResponse.FromString,
    )
    with calls.cache(KIND) as cache, StreamCall(raw) as call:
        messages = {
            "header": start_message(cache.id, 20),
            "chunk": key_chunk(KIND, keys, 0),
            "finish": finish_message(KIND, keys),
            "resume": resume_message("up_x"),
            "empty": key_cache_pb2.AppendKeysRequest(),
            "no kind": key_cache_pb2.AppendKeysRequest(header=key_cache_pb2.AppendKeysHeader()),
            "garbage": b"\xff" * 100,
            "cut": key_chunk(KIND, keys, 10).SerializeToString()[:-1],
        }
        call.send(*(messages[name] for name in order))
        call.half_close()
        refusal = call.refusal()
    assert (refusal.code, refusal.error.reason) == (INVALID, reason)


SEARCH_ORDERS = [o for o in ORDERS if "finish" not in o[1] and "resume" not in o[1] and "no kind" not in o[1]]


@pytest.mark.parametrize(("order", "reason"), [o[1:] for o in SEARCH_ORDERS], ids=[o[0] for o in SEARCH_ORDERS])
def test_search_messages_out_of_order(calls, cache, order, reason):
    queries = Draw(14).queries(KIND, 20)
    raw = calls.channel.stream_stream(
        "/streamindex.v1.SearchService/Search",
        request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
        response_deserializer=search_pb2.SearchResponse.FromString,
    )
    messages = {
        "header": search_header(KIND, cache[0], 5),
        "chunk": query_chunk(KIND, queries, 0, 10),
        "empty": search_pb2.SearchRequest(),
        "garbage": b"\x12\x05\xff\xff\xff\xff\xff",
        "cut": query_chunk(KIND, queries, 0, 10).SerializeToString()[:-1],
    }
    with StreamCall(raw) as call:
        call.send(*(messages[name] for name in order))
        call.half_close()
        refusal = call.refusal()
    assert (refusal.code, refusal.error.reason) == (INVALID, reason)
    wait_for(lambda: is_idle(calls.load()))


@pytest.mark.parametrize(
    "method",
    [
        "KeyCacheService/CreateKeyCache",
        "KeyCacheService/GetKeyCache",
        "KeyCacheService/QueryUpload",
        "SearchService/SearchBatch",
        "AttentionService/SparseAttendBatch",
    ],
)
def test_garbage_in_a_unary_call(calls, method):
    raw = calls.channel.unary_unary(f"/streamindex.v1.{method}")
    refusal = refused(raw, b"\xff" * 50, timeout=30)
    assert (refusal.code, refusal.error.reason) == (INVALID, "MALFORMED_MESSAGE")


@pytest.mark.parametrize("token", ["x", "-1", "1" * 21, "¹", "9" * 20])
def test_page_tokens_that_are_not_the_servers(calls, token):
    if token == "9" * 20:  # a number, and no cache was made after it
        assert not calls.list(page_token=token).key_caches
        return
    request = key_cache_pb2.ListKeyCachesRequest(page_token=token)
    refusal = refused(calls.key_caches.ListKeyCaches, request)
    assert (refusal.code, refusal.error.field) == (INVALID, "page_token")


def test_lists_come_in_pages_oldest_first(calls):
    made = [calls.create(Kind(heads=heads)).id for heads in range(1, 6)]
    found, token = [], ""
    while True:
        page = calls.list(page_size=2, page_token=token)
        assert len(page.key_caches) <= 2
        found += [cache.id for cache in page.key_caches]
        token = page.next_page_token
        if not token:
            break
    assert [cache_id for cache_id in found if cache_id in made] == made
    for cache_id in made:
        calls.delete(cache_id)
    assert not set(made) & {cache.id for cache in calls.list().key_caches}


def test_defaults_are_filled_in(calls):
    with calls.cache(KIND) as cache:
        assert (cache.spec.idle_ttl_s, cache.spec.priority) == (3600, types_pb2.PRIORITY_STANDARD)
        assert (cache.spec.heads, cache.spec.head_dim, cache.spec.layers) == (3, 32, 2)
        assert list(cache.layer_keys) == [0, 0]
