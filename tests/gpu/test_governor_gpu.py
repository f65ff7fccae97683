"""Memory and order on a CUDA device: whatever the budget, beside a flood, and with less memory than was promised."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import streamindex_client
import torch

from benchmarks import governor_memory, governor_mix
from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, query_chunk, search_header
from tests.support.tensors import BF16, Draw, Kind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GIB, MIB = 1 << 30, 1 << 20
DEVICE = "cuda:0"
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


def test_a_decode_step_beside_a_flood():
    """Its p99 is at most twice its p99 alone, while others flood searches of a million tokens."""
    row = governor_mix.measure(DEVICE, governor_mix.sizes_of(DEVICE, quick=True), "")
    assert row.wrong_rows == 0
    assert row.victim_beside_ms_p99 <= 2 * row.victim_alone_ms_p99, row


def test_four_times_what_fits():
    """Device memory stays within budget and context, no tile finds none, and no throughput is lost."""
    row = governor_memory.measure(DEVICE, governor_memory.sizes_of(DEVICE, quick=True))
    assert governor_memory.broken_promises(row) == [], row


HOG = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def hog(left_bytes: int) -> Iterator[None]:
    """Another process that holds all of the device's memory but so much."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOG, str(left_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_hogs_the_device():
    """What has less memory than the budget says runs in smaller tiles, what has none is refused; the worker lives."""
    kind, draw = Kind(heads=HEADS, head_dim=HEAD_DIM, ratio=1, key_format=BF16), Draw(3)
    settings = {
        "worker": {"device": DEVICE},
        "memory": {"device_budget_bytes": 8 * GIB, "host_budget_bytes": 4 * GIB},
    }
    count, rows = 1_048_576, 112  # 256 MiB of keys; a tile wants as much for its workspace
    keys, queries = draw.keys(kind, count), draw.queries(kind, rows, start_position=count - rows)
    with RunningService(settings) as service, Calls(service.address) as calls:
        small, large = calls.create(kind), calls.create(kind)
        calls.upload(kind, small.id, keys[:4096], chunk_rows=4096)
        calls.upload(kind, large.id, keys, chunk_rows=4096)
        calls.search(kind, small.id, queries, TOP_K)  # loads all kernels
        assert calls.load().device.memory.failures == 0
        with hog(left_bytes=64 * MIB):  # the keys find no place
            with calls.search_call() as call:
                call.send(search_header(kind, large.id, TOP_K, start_position=count - rows))
                call.send(query_chunk(kind, queries, 0, rows))
                call.half_close()
                refusal = call.refusal()
            assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEVICE_MEMORY")
            assert refusal.error.retry_after_ms
        refused = calls.load().device.memory.failures
        assert refused > 0
        with hog(left_bytes=(256 + 64) * MIB):  # the keys, and a small workspace
            in_pieces, _ = calls.search(kind, large.id, queries, TOP_K)
        load = calls.load()
        assert load.device.memory.failures > refused
        assert load.worker_restarts == 0
        undisturbed, _ = calls.search(kind, large.id, queries, TOP_K)
        assert np.array_equal(in_pieces, undisturbed)
