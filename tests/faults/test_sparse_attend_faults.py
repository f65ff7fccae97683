"""SparseAttend through what goes wrong: workers that die, pages that come and go, callers that leave."""

from __future__ import annotations

import os
import signal
import time

import grpc
import pytest
import streamindex_client
import torch
from streamindex.v1 import attention_pb2

from streamindex_service.testing.service import RunningService
from tests.support.attention import Queries, Rows, Shape, wrong_rows
from tests.support.calls import Calls, StreamCall
from tests.support.services import ROOMY, SMALL_DEVICE, is_idle, small_host, wait_for

SHAPE, TOKENS, TOP_K, WINDOW = Shape(), 3000, 40, 100


def arguments(queries: Queries, start: int):
    return {
        "layer": 0, "q": queries.q, "index_q": queries.index_q, "index_w": queries.index_w, "top_k": TOP_K,
        "start_position": start, "window": WINDOW, "scale": SHAPE.scale,
    }  # fmt: skip


def test_a_worker_killed_in_the_middle_costs_no_row_and_no_answer():
    rows, queries = Rows.drawn(SHAPE, TOKENS, 1), Queries.drawn(SHAPE, torch.arange(2000, 2600), 2)
    with RunningService(ROOMY) as service, streamindex_client.connect(service.address) as client:
        cache = SHAPE.create(client)
        rows.upload(cache)
        undisturbed = cache.sparse_attend_all(**arguments(queries, 2000)).out
        (worker,) = service.worker_pids()
        killed = []

        def chunks():
            for start in range(0, 600, 50):
                if start == 300:
                    os.kill(worker, signal.SIGKILL)
                    killed.append(start)
                part = slice(start, start + 50)
                yield queries.q[part], queries.index_q[part], queries.index_w[part]

        changed = arguments(queries, 2000) | {"q": chunks(), "index_q": None, "index_w": None}
        result = cache.sparse_attend_all(**changed)
        assert killed
        assert torch.equal(result.out, undisturbed)
        assert client.load().worker_restarts == 1
        assert service.worker_pids() != [worker]
        wait_for(lambda: is_idle(client_load(service)))


def client_load(service: RunningService):
    with Calls(service.address) as calls:
        return calls.load()


def test_the_caller_without_retries_is_told_that_the_worker_is_lost():
    rows = Rows.drawn(SHAPE, 600, 3)
    with RunningService(ROOMY) as service, streamindex_client.connect(service.address) as client:
        cache = SHAPE.create(client)
        rows.upload(cache)
        queries = Queries.drawn(SHAPE, torch.arange(500, 540), 4)
        indices = torch.zeros((40, 2), dtype=torch.int32)
        header = attention_pb2.SparseAttendHeader(
            key_cache_id=cache.id,
            given_indices=2,
            start_position=500,
            scale=1.0,
        )
        chunk = attention_pb2.AttendChunk(
            row_count=40, q=queries.q.view(torch.int16).numpy().tobytes(), indices=indices.numpy().tobytes()
        )
        request = attention_pb2.SparseAttendRequest
        with Calls(service.address) as calls, StreamCall(calls.attention.SparseAttend) as call:
            call.send(request(header=header))
            call.receive("accepted")
            (worker,) = service.worker_pids()
            os.kill(worker, signal.SIGSTOP)  # what it is given is on its way for as long as we like
            call.send(request(chunk=chunk))
            wait_for(lambda: calls.load().device.tiles > 0)
            os.kill(worker, signal.SIGKILL)
            refusal = call.refusal()
            assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
            assert refusal.error.HasField("retry_after_ms")
            wait_for(lambda: is_idle(calls.load()))


@pytest.mark.parametrize("with_disk", [False, True], ids=["evicted", "spilled"])
def test_rows_that_come_and_go_give_the_same_bits(with_disk, tmp_path):
    """Three caches of which the device holds one, and in the second case the host not all either."""
    settings = small_host(tmp_path) if with_disk else SMALL_DEVICE
    tokens = 24_000
    held = [Rows.drawn(SHAPE, tokens, seed) for seed in (5, 6, 7)]
    queries = Queries.drawn(SHAPE, torch.arange(tokens - 40, tokens), 8)
    start = tokens - 40
    with RunningService(settings) as service, streamindex_client.connect(service.address) as client:
        caches = [SHAPE.create(client) for _ in held]
        first = []
        for cache, rows in zip(caches, held, strict=True):
            rows.upload(cache)
            answer = cache.sparse_attend_all(**arguments(queries, start)).out
            indices = cache.search_all(
                layer=0, q=queries.index_q, w=queries.index_w, top_k=TOP_K, start_position=start, order="index"
            ).indices
            assert wrong_rows(SHAPE, rows, queries, indices, WINDOW, answer) == 0
            first.append(answer)
        if with_disk:
            wait_for(lambda: any(cache.refresh().spilled_bytes for cache in caches))
        for _ in range(2):
            for cache, answer in zip(caches, first, strict=True):
                assert torch.equal(cache.sparse_attend_all(**arguments(queries, start)).out, answer)
        with Calls(service.address) as calls:
            load = calls.load()
            assert load.device.evicted_pages > 0
            for ledger in load.ledgers:
                assert ledger.peak_bytes <= ledger.limit_bytes
            if with_disk:
                assert load.spill.restored_pages > 0
            for cache in caches:
                cache.delete()
            wait_for(lambda: is_idle(calls.load()))


def test_kv_rows_that_the_device_can_never_hold():
    shape = Shape(key_dim=512, value_dim=512)
    rows = Rows.drawn(shape, 16_000, 9)  # 4 MiB of KV rows, where 3 MiB are free beside the smallest workspace
    queries = Queries.drawn(shape, torch.arange(0, 3), 10)
    with RunningService(SMALL_DEVICE) as service, streamindex_client.connect(service.address) as client:
        cache = shape.create(client)
        cache.append(layer=0, kv_rows=rows.kv.data)
        with pytest.raises(streamindex_client.ExceedsBudgetError) as caught:
            cache.sparse_attend_all(
                layer=0, q=queries.q, indices=torch.zeros((3, 2), dtype=torch.int32), start_position=0, scale=1.0
            )
        figures = caught.value.metadata
        assert int(figures["needed_bytes"]) > int(figures["budget_bytes"])


def test_callers_that_leave_give_everything_back():
    rows, queries = Rows.drawn(SHAPE, TOKENS, 11), Queries.drawn(SHAPE, torch.arange(2000, 2900), 12)
    with RunningService(ROOMY) as service, streamindex_client.connect(service.address) as client:
        cache = SHAPE.create(client)
        rows.upload(cache)
        for _ in range(3):
            with cache.sparse_attend(**arguments(queries, 2000)) as stream:
                next(stream)
        with Calls(service.address) as calls:
            wait_for(lambda: calls.load().running_searches == 0)
            wait_for(lambda: calls.ledger("ingress").reserved_bytes == 0)
            began = time.monotonic()
            cache.delete()
            wait_for(lambda: is_idle(calls.load()))
            assert time.monotonic() - began < 20
