"""SearchBatch: a ragged step over many caches; every item succeeds or fails by itself."""

from __future__ import annotations

import contextlib

import grpc
import numpy as np
import pytest
from streamindex.v1 import search_pb2, types_pb2

from tests.support.calls import TIMEOUT_S, Calls, refused
from tests.support.calls import batch_item as item
from tests.support.services import is_idle, wait_for
from tests.support.tensors import FP8, FP16, Draw, Kind, expected

KIND = Kind(heads=3, head_dim=32)
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def batch(calls, items, top_k, **fields):
    request = search_pb2.SearchBatchRequest(items=items, top_k=top_k, **fields)
    results = calls.searches.SearchBatch(request, timeout=TIMEOUT_S).results
    assert len(results) == len(items)
    return results


def assert_answers(result, kind, keys, queries, top_k, want_scores=False, by_index=False):
    assert not result.HasField("error"), result.error
    indices, scores = expected(kind, keys, queries, top_k, by_index)
    assert np.array_equal(np.frombuffer(result.indices, np.int32).reshape(-1, top_k), indices)
    assert np.frombuffer(result.scores, np.float32).tobytes() == (scores.tobytes() if want_scores else b"")


@pytest.mark.parametrize("order", [types_pb2.RESULT_ORDER_SCORE, types_pb2.RESULT_ORDER_INDEX])
def test_many_caches_and_ragged_rows(calls, order):
    draw = Draw(1)
    kinds = [KIND, Kind(heads=2, head_dim=64, key_format=FP8, ratio=3), Kind(heads=8, head_dim=16, key_format=FP16)]
    with contextlib.ExitStack() as stack:
        made = []
        for number in range(40):
            kind = kinds[number % 3]
            keys = draw.keys(kind, int(draw.random.integers(1, 600)))
            queries = draw.queries(kind, number % 5, start_position=kind.ratio * len(keys) - 1)
            made.append((kind, stack.enter_context(calls.cache(kind, keys)).id, keys, queries))
        items = [item(kind, cache_id, queries) for kind, cache_id, _, queries in made]
        results = batch(calls, items, 50, order=order, want_scores=True)
        for (kind, _, keys, queries), result in zip(made, results, strict=True):
            by_index = order == types_pb2.RESULT_ORDER_INDEX
            assert_answers(result, kind, keys, queries, 50, want_scores=True, by_index=by_index)
            assert result.layer_keys == len(keys)
    wait_for(lambda: is_idle(calls.load()))


def test_it_answers_as_a_search_does(calls):
    draw = Draw(2)
    keys = draw.keys(KIND, 700)
    queries = draw.queries(KIND, 500, start_position=300)  # more rows than a block holds
    with calls.cache(KIND, keys) as cache:
        result = batch(calls, [item(KIND, cache.id, queries)], 128)[0]
        assert result.indices == calls.search(KIND, cache.id, queries, 128)[0].tobytes()


@pytest.mark.parametrize("kind", [KIND, Kind(heads=2, head_dim=32, key_format=FP8)], ids=["bf16", "fp8"])
def test_append_then_search_step_by_step(calls, kind):
    """As decoding does: a few keys a step, across page edges, and now and then a draft that is rejected."""
    draw = Draw(3)
    keys = draw.keys(kind, 250)
    with calls.cache(kind, keys) as cache:
        for count in (1, 1, 4, 1, 3, 300, 1):
            rows = draw.keys(kind, count)
            first = len(keys) - (2 if count == 4 else 0)  # a draft of two is written over
            keys = keys[:first] + rows
            queries = draw.queries(kind, count, start_position=first)
            if len(keys) < first + count:
                continue
            result = batch(calls, [item(kind, cache.id, queries, (first, rows))], 64)[0]
            assert_answers(result, kind, keys, queries, 64)
            assert result.layer_keys == len(keys)
        assert calls.get(cache.id).layer_keys[0] == len(keys)


def test_all_appends_come_before_any_search(calls):
    draw = Draw(4)
    keys, rows = draw.keys(KIND, 100), draw.keys(KIND, 50)
    queries = draw.queries(KIND, 2, start_position=1000)
    with calls.cache(KIND, keys) as cache:
        results = batch(calls, [item(KIND, cache.id, queries), item(KIND, cache.id, append=(100, rows))], 200)
        assert_answers(results[0], KIND, keys + rows, queries, 200)
        assert (results[1].layer_keys, results[1].indices) == (150, b"")
        again = batch(calls, [item(KIND, cache.id, queries, (100, rows))], 200)[0]  # safe to repeat
        assert_answers(again, KIND, keys + rows, queries, 200)
        assert again.layer_keys == 150


def test_items_fail_by_themselves(calls):
    draw = Draw(5)
    keys, rows = draw.keys(KIND, 100), draw.keys(KIND, 5)
    queries = draw.queries(KIND, 2, start_position=99)
    nan = np.full(5 * 32, 0x7FC0, np.uint16).tobytes()
    bad_w = queries.w.copy()
    bad_w[1, 2] = np.nan
    with calls.cache(KIND, keys) as cache, calls.cache(KIND, keys) as apart:
        append = search_pb2.SearchBatchItem.Append
        wrong = [
            (item(KIND, "kc_nowhere", queries), "CACHE_NOT_FOUND", "key_cache_id"),
            (item(KIND, cache.id, queries, layer=1), "INVALID_ARGUMENT", "layer"),
            (item(KIND, cache.id, queries, convention="x"), "CONVENTION_MISMATCH", "convention"),
            (item(KIND, cache.id, queries, query_format=FP16), "CONVENTION_MISMATCH", "query_format"),
            (item(KIND, cache.id, queries, query_format=0), "INVALID_ARGUMENT", "query_format"),
            (item(KIND, cache.id, queries, q=b"\0"), "INVALID_ARGUMENT", "q"),
            (item(KIND, cache.id, queries, w=b""), "INVALID_ARGUMENT", "w"),
            (item(KIND, cache.id, queries, positions=[1]), "INVALID_ARGUMENT", "positions"),
            (item(KIND, cache.id, queries, positions=[1, 2**64 - 1]), "INVALID_ARGUMENT", "positions"),
            (item(KIND, cache.id, queries, row_count=3), "INVALID_ARGUMENT", "positions"),
            (item(KIND, cache.id, queries, w=bad_w.astype("<f4").tobytes()), "NON_FINITE", "w"),
            (item(KIND, apart.id, append=(101, rows)), "OFFSET_GAP", None),
            (item(KIND, apart.id, append=(2**64 - 1, rows)), "INVALID_ARGUMENT", None),
            (item(KIND, apart.id, append=append(first_row=100)), "INVALID_ARGUMENT", None),
            (item(KIND, apart.id, append=append(row_count=2**32 - 1)), "INVALID_ARGUMENT", "append.row_count"),
            (item(KIND, apart.id, append=append(row_count=7)), "INVALID_ARGUMENT", "chunk.keys"),
            (item(KIND, apart.id, append=append(row_count=5, keys=nan)), "NON_FINITE", "keys"),
        ]
        results = batch(calls, [item(KIND, cache.id, queries), *(one for one, _, _ in wrong)], 20)
        assert_answers(results[0], KIND, keys, queries, 20)
        for (one, reason, field), result in zip(wrong, results[1:], strict=True):
            assert result.error.reason == reason, one
            assert field is None or result.error.field == field
            assert result.error.code
            assert not result.indices
            assert not result.error.HasField("retry_after_ms")
        assert calls.get(apart.id).layer_keys[0] == 100
    wait_for(lambda: is_idle(calls.load()))
    assert calls.load().open_uploads == 0


def test_an_append_is_told_of_though_its_search_failed(calls):
    draw = Draw(6)
    queries = draw.queries(KIND, 1)
    with calls.cache(KIND) as cache:
        queries.w[:] = np.inf
        result = batch(calls, [item(KIND, cache.id, queries, (0, draw.keys(KIND, 7)))], 5)[0]
        assert (result.error.reason, result.layer_keys) == ("NON_FINITE", 7)
        assert calls.get(cache.id).layer_keys[0] == 7


@pytest.mark.parametrize(
    ("fields", "items", "field"),
    [
        ({"top_k": 0}, 0, "top_k"),
        ({"top_k": 4097}, 0, "top_k"),
        ({"top_k": 5, "mode": 7}, 0, "mode"),
        ({"top_k": 5, "order": 7}, 0, "order"),
        ({"top_k": 5}, 1025, "items"),
    ],
)
def test_what_concerns_the_whole_call(calls, fields, items, field):
    request = search_pb2.SearchBatchRequest(items=[search_pb2.SearchBatchItem()] * items, **fields)
    refusal = refused(calls.searches.SearchBatch, request, timeout=TIMEOUT_S)
    assert (refusal.code, refusal.error.field) == (INVALID, field)


@pytest.mark.parametrize("rows", [(4097,), (2048, 2049), (2**32 - 1, 2**32 - 1)])
def test_rows_of_all_items_together(calls, rows):
    items = [search_pb2.SearchBatchItem(row_count=count) for count in rows]
    request = search_pb2.SearchBatchRequest(items=items, top_k=5)
    refusal = refused(calls.searches.SearchBatch, request, timeout=TIMEOUT_S)
    assert (refusal.code, refusal.error.field) == (INVALID, "items.row_count")
    assert refusal.error.metadata["limit"] == "4096"


def test_answers_longer_than_a_message_are_refused_before_the_work(calls):
    """4,096 rows of 4,096 indices and scores are 128 MiB; a message has 64."""
    items = [search_pb2.SearchBatchItem(row_count=4096)]
    request = search_pb2.SearchBatchRequest(items=items, top_k=4096, want_scores=True)
    refusal = refused(calls.searches.SearchBatch, request, timeout=TIMEOUT_S)
    assert refusal.code is INVALID
    assert refusal.error.metadata["needed_bytes"] == str(128 << 20)


def test_a_message_longer_than_the_limit(calls):
    request = search_pb2.SearchBatchRequest(items=[search_pb2.SearchBatchItem(q=bytes(65 << 20))], top_k=5)
    with pytest.raises(grpc.RpcError) as caught:
        calls.searches.SearchBatch(request, timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_no_items(calls):
    assert len(batch(calls, [], 5)) == 0


def test_sequences_are_searched_in_one_tile(inside, monkeypatch):
    """All of a kind whose rows a block holds, in the order of the items; another kind has a tile of its own."""
    submit, tiles, draw, made = inside.server.service.device.submit, [], Draw(9), []

    def seen(views, block, request_key, message):
        tile = message(0).search_tile
        tiles.append((tile.heads, [each.rows for each in tile.sequences]))
        assert len(views) == len(tile.sequences)
        return submit(views, block, request_key, message)

    with Calls(inside.target) as calls, contextlib.ExitStack() as stack:
        for number in range(30):
            kind = KIND if number % 3 else Kind(heads=4, head_dim=32)
            keys = draw.keys(kind, 100 + 37 * number)
            queries = draw.queries(kind, 1 + number % 4, start_position=len(keys) - 2)
            made.append((kind, stack.enter_context(calls.cache(kind, keys)).id, keys, queries))
        items = [item(kind, cache_id, queries) for kind, cache_id, _, queries in made]
        monkeypatch.setattr(inside.server.service.device, "submit", seen)
        results = batch(calls, items, 60, want_scores=True)
        monkeypatch.undo()
        for (kind, _, keys, queries), result in zip(made, results, strict=True):
            assert_answers(result, kind, keys, queries, 60, want_scores=True)
        wait_for(lambda: is_idle(calls.load()))
    wanted = [(heads, [len(queries) for kind, _, _, queries in made if kind.heads == heads]) for heads in (3, 4)]
    assert sorted(tiles) == wanted


def test_one_cache_in_many_items(calls):
    """Forks and the cache itself, the same item twice: pages that several of a tile read are pinned once for each."""
    draw = Draw(10)
    keys = draw.keys(KIND, 900)
    with calls.cache(KIND, keys) as cache:
        forks = [(calls.fork(cache.id, length).id, length) for length in (900, 600, 256)]
        asked = [(cache.id, 900), *forks, forks[0], (cache.id, 900)]
        queries = [draw.queries(KIND, 2, start_position=898) for _ in asked]
        items = [item(KIND, cache_id, rows) for (cache_id, _), rows in zip(asked, queries, strict=True)]
        for _ in range(2):
            for result, (_, length), rows in zip(batch(calls, items, 70), asked, queries, strict=True):
                assert_answers(result, KIND, keys[:length], rows, 70)
        for cache_id, _ in forks:
            calls.delete(cache_id)
    wait_for(lambda: is_idle(calls.load()))
