"""Memory and order on a CUDA device: one answer whatever the budget, and a decode step beside a flood."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import streamindex_client
import torch
from streamindex.v1 import search_pb2

from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, batch_item
from tests.support.tensors import BF16, Draw, Kind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GIB = 1 << 30
HEADS, HEAD_DIM, TOP_K = 64, 128, 512


def _bf16(random: np.random.Generator, *shape: int) -> np.ndarray:
    values = random.standard_normal(shape, dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def test_one_budget_any_size():
    """A layer of 293 MiB on a quarter of a GiB, where it passes in windows, and on a hundred: the same bits."""
    random = np.random.default_rng(1)
    count, rows = 1_200_000, 200
    k, q = _bf16(random, count, HEAD_DIM), _bf16(random, rows, HEADS, HEAD_DIM)
    w = random.standard_normal((rows, HEADS)).astype(np.float32)
    answers = []
    for budget in (GIB // 4, GIB, 100 * GIB):
        settings = {"worker": {"device": "cuda:0"}, "memory": {"device_budget_bytes": budget, "host_budget_bytes": GIB}}
        with RunningService(settings) as service, streamindex_client.connect(service.address) as client:
            cache = client.create_key_cache(heads=HEADS, head_dim=HEAD_DIM, ratio=1, key_format="bf16", layers=1)
            cache.append(layer=0, keys=k)
            parts = list(cache.search(layer=0, q=q, w=w, top_k=TOP_K, start_position=count - 100, want_scores=True))
            answers.append([np.concatenate([getattr(p, name) for p in parts]) for name in ("indices", "scores")])
            assert 0 < client.load().device_peak_bytes <= budget
    for indices, scores in answers[1:]:
        assert np.array_equal(indices, answers[0][0])
        assert scores.tobytes() == answers[0][1].tobytes()


@pytest.mark.xfail(
    reason="not reached: 23 ms beside the flood, 4.7 ms alone; a step waits for the tile that runs, about 15 ms long"
)
def test_a_decode_step_beside_a_flood():
    """Its p99 is at most twice its p99 alone, while another floods searches of a million tokens."""
    kind = Kind(heads=HEADS, head_dim=HEAD_DIM, ratio=4, key_format=BF16)
    draw = Draw(2)
    settings = {
        "worker": {"device": "cuda:0"},
        "memory": {"device_budget_bytes": 8 * GIB, "host_budget_bytes": 4 * GIB},
    }
    with RunningService(settings) as service, Calls(service.address) as victim, Calls(service.address) as greedy:
        large, small = greedy.create(kind), victim.create(kind)
        greedy.upload(kind, large.id, draw.keys(kind, 262_144), chunk_rows=4096)
        victim.upload(kind, small.id, draw.keys(kind, 16_384), chunk_rows=4096)
        step = batch_item(kind, small.id, draw.queries(kind, 1, start_position=65_536))
        request = search_pb2.SearchBatchRequest(items=[step], top_k=TOP_K)

        def p99_s(steps: int = 1000) -> float:
            times = []
            for _ in range(steps):
                started = time.perf_counter()
                assert not victim.searches.SearchBatch(request, timeout=30).results[0].HasField("error")
                times.append(time.perf_counter() - started)
            return float(np.quantile(times[steps // 10 :], 0.99))

        alone_s = p99_s()
        queries = draw.queries(kind, 2048, start_position=1_000_000)
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                greedy.search(kind, large.id, queries, TOP_K)

        floods = [threading.Thread(target=flood) for _ in range(4)]
        for each in floods:
            each.start()
        try:
            time.sleep(2.0)
            beside_s = p99_s()
        finally:
            stop.set()
            for each in floods:
                each.join()
    assert beside_s <= 2 * alone_s, f"p99 {1e3 * beside_s:.2f} ms beside the flood, {1e3 * alone_s:.2f} ms alone"
