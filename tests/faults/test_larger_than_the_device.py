"""Layers that the device does not hold as a whole: the same answer, bit for bit, whatever the budget."""

from __future__ import annotations

import numpy as np
import pytest
from streamindex.v1 import search_pb2, types_pb2

from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, batch_item
from tests.support.services import TIGHT, is_idle, wait_for
from tests.support.tensors import BF16, FP8, Draw, Kind, expected

MIB = 1 << 20
PAGE = 256


@pytest.fixture(scope="module", params=[17, 18], ids=["17 MiB", "18 MiB"])
def small(request):
    """Room for 0.75 or 1.75 MiB of keys beside a tile."""
    memory = {**TIGHT["memory"], "device_budget_bytes": request.param * MIB, "extent_bytes": MIB // 8}
    with RunningService({**TIGHT, "memory": memory}) as service, Calls(service.address) as calls:
        yield calls
        wait_for(lambda: is_idle(calls.load()))


@pytest.mark.parametrize("key_format", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("ratio", [1, 4])
def test_the_answer_is_that_of_a_device_that_holds_it(small, calls, key_format, ratio):
    draw = Draw(1)
    kind = Kind(heads=2, head_dim=64, key_format=key_format, ratio=ratio)
    keys = draw.keys(kind, 100 * PAGE + 17)
    with small.cache(kind, keys) as cache, calls.cache(kind, keys) as whole:
        for start in (0, ratio * 40 * PAGE - 30, ratio * len(keys)):  # across the edges of windows, and beyond the end
            queries = draw.queries(kind, 60, start_position=start)
            for order in (types_pb2.RESULT_ORDER_SCORE, types_pb2.RESULT_ORDER_INDEX):
                for top_k in (1, 300):
                    asked = {"want_scores": True, "order": order}
                    found, scores = small.search(kind, cache.id, queries, top_k, **asked)
                    at_once, scores_at_once = calls.search(kind, whole.id, queries, top_k, **asked)
                    assert np.array_equal(found, at_once)
                    assert scores.tobytes() == scores_at_once.tobytes()
            found, scores = small.search(kind, cache.id, queries, 300)
            assert np.array_equal(found, expected(kind, keys, queries, 300)[0])
            assert not scores.size
    assert small.ledger("hbm").peak_bytes <= small.ledger("hbm").limit_bytes


def test_positions_in_any_order_and_ties_everywhere(small):
    kind = Kind(heads=2, head_dim=64)
    draw = Draw(2)
    keys = draw.keys(kind, 90 * PAGE)
    queries = draw.queries(kind, 50, start_position=0)
    queries.positions[:] = draw.random.permutation(np.linspace(0, 95 * PAGE, 50).astype(np.int64))
    queries.w[::3] = -np.abs(queries.w[::3])  # zeros and below: plateaus
    with small.cache(kind, keys) as cache:
        found, scores = small.search(kind, cache.id, queries, 700, explicit_positions=True, want_scores=True)
        wanted = expected(kind, keys, queries, 700)
        assert np.array_equal(found, wanted[0])
        assert np.array_equal(scores, wanted[1])
        request = search_pb2.SearchBatchRequest(items=[batch_item(kind, cache.id, queries)], top_k=700)
        (result,) = small.searches.SearchBatch(request, timeout=60).results
        assert np.array_equal(np.frombuffer(result.indices, np.int32).reshape(50, 700), wanted[0])
        assert result.scores == b""


@pytest.mark.parametrize("want_scores", [False, True], ids=["indices", "scores"])
def test_beside_others_in_a_step(small, want_scores):
    """One that passes in windows between those that are a tile together, of more rows than its merges hold; and more
    of those than fit together."""
    kind, draw, made = Kind(heads=2, head_dim=64), Draw(5), []
    for pages in (3, 90, 2, 1, 5, 4):
        keys = draw.keys(kind, pages * PAGE - 11)
        cache_id = small.create(kind).id
        small.upload(kind, cache_id, keys)
        made.append((cache_id, keys, draw.queries(kind, 3, start_position=len(keys) - 2)))
    items = [batch_item(kind, cache_id, queries) for cache_id, _, queries in made]
    request = search_pb2.SearchBatchRequest(items=items, top_k=300, want_scores=want_scores)
    for _ in range(2):
        results = small.searches.SearchBatch(request, timeout=60).results
        for result, (_, keys, queries) in zip(results, made, strict=True):
            assert not result.HasField("error"), result.error
            wanted = expected(kind, keys, queries, 300)
            assert np.array_equal(np.frombuffer(result.indices, np.int32).reshape(3, 300), wanted[0])
            assert result.scores == (wanted[1].tobytes() if want_scores else b"")
    for cache_id, _, _ in made:
        small.delete(cache_id)
    assert small.ledger("hbm").peak_bytes <= small.ledger("hbm").limit_bytes


def test_keys_written_while_it_is_searched_are_not_seen(small):
    kind = Kind(heads=2, head_dim=64)
    draw = Draw(3)
    keys = draw.keys(kind, 90 * PAGE)
    queries = draw.queries(kind, 5, start_position=100 * PAGE)
    with small.cache(kind, keys) as cache:
        before, _ = small.search(kind, cache.id, queries, 40)
        more = draw.keys(kind, 3 * PAGE)
        small.upload(kind, cache.id, more, first_row=50 * PAGE + 3)
        after, _ = small.search(kind, cache.id, queries, 40)
        assert np.array_equal(before, expected(kind, keys, queries, 40)[0])
        assert not np.array_equal(before, after)
