"""Search over a real socket: a pipeline, in any cut, under one total order."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from streamindex import framing
from streamindex.checksum import crc32c
from streamindex.v1 import types_pb2

from tests.support.calls import Calls, answers, finish_message, query_chunk, query_chunks, search_header, start_message
from tests.support.services import is_idle, wait_for
from tests.support.tensors import BF16, FP8, FP16, FP32, Draw, Kind, Queries, expected, no_keys

KIND = Kind(heads=3, head_dim=32)
KEYS = 900


@pytest.fixture(scope="module")
def cache(roomy_service):
    """A cache that no test of this module changes, and its keys."""
    keys = Draw(1).keys(KIND, KEYS)
    with Calls(roomy_service.address) as calls, calls.cache(KIND, keys) as made:
        yield made.id, keys


def test_the_first_answers_come_before_the_last_queries_are_sent(calls, cache):
    cache_id, keys = cache
    queries = Draw(2).queries(KIND, 90)
    with calls.start_search(KIND, cache_id, 64) as call:
        received = []
        for chunk in query_chunks(KIND, queries, 30):
            call.send(chunk)
            received.append(call.receive("chunk"))  # nothing more is sent before it is here
            assert received[-1].row_count == 30
        call.half_close()
        assert call.receive("done").row_count == 90
        assert not call.rest()
    assert np.array_equal(answers(received, 64)[0], expected(KIND, keys, queries, 64)[0])


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 1000], ids=lambda rows: f"{rows} rows")
@pytest.mark.parametrize("order", [types_pb2.RESULT_ORDER_SCORE, types_pb2.RESULT_ORDER_INDEX])
@pytest.mark.parametrize("want_scores", [False, True])
def test_any_cut_gives_the_same_bytes(calls, cache, chunk_rows, order, want_scores):
    cache_id, keys = cache
    queries = Draw(3).queries(KIND, 300)
    indices, scores = calls.search(
        KIND, cache_id, queries, 50, chunk_rows=chunk_rows, order=order, want_scores=want_scores
    )
    wanted = expected(KIND, keys, queries, 50, by_index=order == types_pb2.RESULT_ORDER_INDEX)
    assert np.array_equal(indices, wanted[0])
    assert np.array_equal(scores, wanted[1]) if want_scores else scores.shape[0] == 0


def test_chunks_larger_than_a_block(calls, cache):
    """A block of this service is 256 KiB: some 300 rows of this search; a chunk has many times that."""
    cache_id, keys = cache
    queries = Draw(4).queries(KIND, 3001)
    indices, _ = calls.search(KIND, cache_id, queries, 128, chunk_rows=3000)
    assert np.array_equal(indices, expected(KIND, keys, queries, 128)[0])


@pytest.mark.parametrize("kind", [
    Kind(heads=1, head_dim=16),
    Kind(heads=128, head_dim=256),
    Kind(heads=5, head_dim=48, key_format=FP16),
    Kind(heads=7, head_dim=80, key_format=FP32, ratio=3),
    Kind(heads=64, head_dim=128, key_format=FP8, ratio=4),
    Kind(heads=128, head_dim=256, key_format=FP32),
], ids=str)  # fmt: skip
def test_shapes_and_formats(calls, kind):
    draw = Draw(5)
    keys = draw.keys(kind, 530)
    with calls.cache(kind, keys) as made:
        queries = draw.queries(kind, 9, start_position=kind.ratio * 520)
        indices, scores = calls.search(kind, made.id, queries, 77, want_scores=True)
    wanted = expected(kind, keys, queries, 77)
    assert np.array_equal(indices, wanted[0])
    assert np.array_equal(scores, wanted[1])


@pytest.mark.parametrize("top_k", [1, KEYS - 1, KEYS, KEYS + 1, 4096])
def test_top_k_around_the_number_of_keys(calls, cache, top_k):
    cache_id, keys = cache
    queries = Draw(6).queries(KIND, 20, start_position=KEYS - 10)
    indices, scores = calls.search(KIND, cache_id, queries, top_k, want_scores=True)
    wanted = expected(KIND, keys, queries, top_k)
    assert np.array_equal(indices, wanted[0])
    assert np.array_equal(scores, wanted[1])


def test_positions_in_any_order_and_as_large_as_they_may_be(calls, cache):
    cache_id, keys = cache
    queries = Draw(7).queries(KIND, 200)
    queries.positions = Draw(8).random.integers(0, 2 * KEYS, 200)
    queries.positions[:4] = [0, 2**62, 2**40, KEYS - 1]
    indices, scores = calls.search(
        KIND, cache_id, queries, 60, chunk_rows=31, explicit_positions=True, want_scores=True
    )
    wanted = expected(KIND, keys, queries, 60)
    assert np.array_equal(indices, wanted[0])
    assert np.array_equal(scores, wanted[1])


def test_queries_that_see_no_key(calls):
    kind = Kind(heads=2, head_dim=16, ratio=8)
    draw = Draw(9)
    keys = draw.keys(kind, 4)
    with calls.cache(kind, keys) as made:
        queries = draw.queries(kind, 20)  # positions 0 to 6 see none
        indices, scores = calls.search(kind, made.id, queries, 3, want_scores=True)
    wanted = expected(kind, keys, queries, 3)
    assert (wanted[0][:7] == -1).all()
    assert np.array_equal(indices, wanted[0])
    assert np.array_equal(scores, wanted[1])


def test_a_layer_without_keys(calls):
    with calls.cache(KIND) as made:
        queries = Draw(10).queries(KIND, 5, start_position=100)
        indices, scores = calls.search(KIND, made.id, queries, 4, want_scores=True)
    wanted = expected(KIND, no_keys(KIND), queries, 4)
    assert np.array_equal(indices, wanted[0])
    assert np.array_equal(scores, wanted[1])


def test_layers_without_keys_of_different_shapes(calls):
    """They have the same pages, namely none; nothing else of one may serve another."""
    kinds = [Kind(heads=8, head_dim=256, key_format=FP32), Kind(heads=8, head_dim=16), Kind(heads=4, head_dim=64)]
    for kind in kinds:
        with calls.cache(kind) as made:
            queries = Draw(11).queries(kind, 2000, start_position=100)
            indices, scores = calls.search(kind, made.id, queries, 4, chunk_rows=500, want_scores=True)
        wanted = expected(kind, no_keys(kind), queries, 4)
        assert np.array_equal(indices, wanted[0])
        assert np.array_equal(scores, wanted[1])


def test_a_search_that_waits_for_queries_holds_no_memory(calls, cache):
    cache_id, keys = cache
    queries = Draw(12).queries(KIND, 3, start_position=KEYS)
    wanted, _ = expected(KIND, keys, queries, 8)
    with calls.start_search(KIND, cache_id, 8, start_position=KEYS) as call:
        for row in range(3):
            call.send(query_chunk(KIND, queries, row, 1))
            chunk = call.receive("chunk")
            assert np.array_equal(np.frombuffer(chunk.indices, np.int32), wanted[row])
            wait_for(lambda: calls.ledger("ingress").reserved_bytes == 0)
        call.half_close()
        assert call.receive("done").row_count == 3


@pytest.mark.parametrize("row_count", [0, 1])
def test_no_queries_at_all(calls, cache, row_count):
    with calls.start_search(KIND, cache[0], 4, row_count=row_count) as call:
        call.half_close()
        if row_count == 0:
            assert call.receive("done").row_count == 0
            assert not call.rest()
        else:
            assert call.refusal().error.field == "header.row_count"


def test_ties_go_to_the_lower_index(calls):
    draw = Draw(11)
    keys = draw.keys(KIND, 1)
    keys.values = np.repeat(keys.values, 700, axis=0)
    keys.scales = np.repeat(keys.scales, 700)
    with calls.cache(KIND, keys) as made:
        indices, _ = calls.search(KIND, made.id, draw.queries(KIND, 4, start_position=699), 300)
    assert (indices == np.arange(300)).all()


def test_ordinary_protobuf_and_the_copy_free_framing_are_the_same_on_the_wire(calls, cache):
    """Messages written field by field and by the framing; answers read by protobuf and by the framing."""
    cache_id, keys = cache
    queries = Draw(12).queries(KIND, 100)
    raw = calls.channel.stream_stream(
        "/streamindex.v1.SearchService/Search",
        request_serializer=lambda data: data,
        response_deserializer=framing.parse_search_response,
    )
    upload = calls.channel.stream_stream(
        "/streamindex.v1.KeyCacheService/AppendKeys",
        request_serializer=lambda data: data,
        response_deserializer=lambda data: data,
    )
    with calls.cache(KIND) as twin:
        data = keys.key_bytes(KIND)
        messages = [start_message(twin.id, KEYS).SerializeToString()]
        for row in range(0, KEYS, 100):
            part = data[row * KIND.row_bytes : (row + 100) * KIND.row_bytes]
            messages.append(framing.encode_key_chunk(row, 100, part, b"", crc32c(part)))
        messages.append(finish_message(KIND, keys).SerializeToString())
        list(upload(iter(messages), timeout=60))
        chunks = [message.chunk for message in query_chunks(KIND, queries, 30)]
        encoded = [
            framing.encode_query_chunk(c.row_offset, c.row_count, c.q, c.w, b"", crc32c(c.w, crc32c(c.q)))
            for c in chunks
        ]
        header = search_header(KIND, twin.id, 40, want_scores=True).SerializeToString()
        found = [m for m in raw(iter([header, *encoded]), timeout=60) if isinstance(m, framing.Chunk)]
    by_framing = b"".join(bytes(chunk.parts[0]) for chunk in found), b"".join(bytes(c.parts[1]) for c in found)
    indices, scores = calls.search(KIND, cache_id, queries, 40, chunk_rows=30, want_scores=True)
    assert by_framing == (indices.tobytes(), scores.tobytes())


def test_many_rows_hold_no_more_memory_than_few(calls, cache):
    """Four blocks are all that a search may hold, and 20,000 rows are a hundred blocks."""
    cache_id, keys = cache
    block = Draw(13).queries(KIND, 500, start_position=KEYS)
    wanted, _ = expected(KIND, keys, block, 8)
    rows = 20_000
    peaks = []
    with calls.start_search(KIND, cache_id, 8, start_position=KEYS) as call:
        # sent by another thread, as fast as it goes; nothing waits for an answer
        for first in range(0, rows, 500):
            message = query_chunk(KIND, block, 0, 500)
            message.chunk.row_offset = first
            call.send(message)
        call.half_close()
        received = 0
        for message in call.rpc:
            if message.WhichOneof("message") == "chunk":
                got = np.frombuffer(message.chunk.indices, np.int32).reshape(-1, 8)
                at = (received + np.arange(len(got))) % 500
                assert np.array_equal(got, wanted[at])
                received += len(got)
                peaks.append(calls.ledger("ingress").reserved_bytes)
        assert message.done.row_count == rows == received
    assert 0 < max(peaks) <= 4 * (1 << 18)


def test_many_searches_and_uploads_at_once(roomy_service):
    """Each on its own cache, and some on one; nobody sees another's rows."""
    kinds = [KIND, Kind(heads=2, head_dim=64, key_format=FP8, ratio=2), Kind(heads=4, head_dim=16, key_format=FP16)]
    shared_keys = Draw(14).keys(KIND, 700)
    start = threading.Barrier(12)
    with Calls(roomy_service.address) as calls, calls.cache(KIND, shared_keys) as shared:

        def work(number: int) -> None:
            draw, kind = Draw(100 + number), kinds[number % 3]
            with Calls(roomy_service.address) as mine:
                start.wait()
                for _ in range(2):
                    keys = draw.keys(kind, int(draw.random.integers(1, 900)))
                    with mine.cache(kind, keys) as made:
                        for name, of, rows in ((made.id, kind, keys), (shared.id, KIND, shared_keys)):
                            queries = draw.queries(of, 150, start_position=200)
                            found, _ = mine.search(of, name, queries, 33, chunk_rows=40)
                            assert np.array_equal(found, expected(of, rows, queries, 33)[0])

        with ThreadPoolExecutor(12) as pool:
            for done in [pool.submit(work, number) for number in range(12)]:
                done.result()
        wait_for(lambda: is_idle(calls.load()))


def test_sixty_streams_on_one_connection(calls, cache):
    """All open at once, some fourteen admitted at a time; rows go round robin."""
    cache_id, keys = cache
    queries = Draw(15).queries(KIND, 6)
    wanted, _ = expected(KIND, keys, queries, 10)
    searches = [calls.search_call() for _ in range(60)]
    for search in searches:
        search.send(search_header(KIND, cache_id, 10))
    for row in range(6):
        for search in searches:
            search.send(query_chunk(KIND, queries, row, 1))
    for search in searches:
        search.half_close()
    for search in searches:
        messages = search.rest()
        found, _ = answers([message.chunk for message in messages[1:-1]], 10)
        assert np.array_equal(found, wanted)


def test_a_half_precision_query_is_compared_exactly(calls):
    """Integers far apart in magnitude: float32 accumulation holds them, a narrower one would not."""
    kind = Kind(heads=1, head_dim=16, key_format=BF16)
    keys = Draw(16).keys(kind, 300)
    queries = Queries(np.full((1, 1, 16), 2, np.int8), np.array([[1024.0]], np.float32), np.array([299]))
    with calls.cache(kind, keys) as made:
        indices, scores = calls.search(kind, made.id, queries, 300, want_scores=True)
    wanted = expected(kind, keys, queries, 300)
    assert np.array_equal(indices, wanted[0])
    assert np.array_equal(scores, wanted[1])


def test_a_search_that_goes_on_elsewhere_sees_the_same_layer_or_is_refused(calls):
    draw = Draw(31)
    keys, more = draw.keys(KIND, 300), draw.keys(KIND, 20)
    queries = draw.queries(KIND, 5, start_position=299)
    with calls.cache(KIND, keys) as cache:
        with calls.search_call() as call:
            call.send(search_header(KIND, cache.id, 9))
            version = call.receive("accepted").layer_version
            call.half_close()
            call.rest()
        found, _ = calls.search(KIND, cache.id, queries, 9, expected_layer_version=version)
        assert np.array_equal(found, expected(KIND, keys, queries, 9)[0])
        append = partial(calls.upload, KIND, cache.id, more, first_row=300)
        for change in (append, partial(calls.truncate, cache.id, 310)):
            change()
            call = calls.search_call()
            call.send(search_header(KIND, cache.id, 9, expected_layer_version=version))
            refusal = call.refusal()
            assert refusal.error.reason == "LAYER_CHANGED"
            assert not refusal.error.HasField("retry_after_ms")
            assert int(refusal.error.metadata["layer_version"]) > version
            version = int(refusal.error.metadata["layer_version"])
