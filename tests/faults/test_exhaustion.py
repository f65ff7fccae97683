"""A frontend without descriptors, and one whose disks and memory take no more: it refuses, waits, and lives."""

from __future__ import annotations

import contextlib
import os
import resource
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from streamindex.v1 import server_pb2

from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, answers, key_chunks, query_chunks, search_header
from tests.support.resources import figures_of, fill_ingress, more_than
from tests.support.services import MIB, ROOMY, is_idle, wait_for
from tests.support.tensors import Draw, Kind, expected

KIND, KEYS, ROWS, TOP_K = Kind(heads=2, head_dim=64), 4000, 5, 30
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
RETRYABLE_REASONS = {"HOST_MEMORY", "WORKER_LOST"}


def settings(spill_dir):
    memory = {
        **ROOMY["memory"],
        "host_budget_bytes": 8 * MIB,
        "ingress_budget_bytes": 4 * MIB,
        "extent_bytes": 65_536,
        "spare_bytes": 0,
        "ingest_threads": 2,
        "spill_dir": str(spill_dir),
        "spill_bytes": 64 * MIB,
        "spill_pause_s": 0.05,
    }
    return {**ROOMY, "memory": memory}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with RunningService(settings(tmp_path_factory.mktemp("spill"))) as running:
        with Calls(running.address) as calls:
            (worker,) = running.worker_pids()
            fill_ingress(calls, worker)
        yield running


@contextlib.contextmanager
def limited(service, which, most):
    """The soft limit of the running frontend, for the length of a block."""
    pid = service.process.pid
    soft, hard = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (most, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, which, (soft, hard))


class World:
    """A cache that the device has seen, one that it has not, and what every search of them must give."""

    def __init__(self, calls):
        self.calls = calls
        draw = Draw(1)
        self.keys = [draw.keys(KIND, KEYS) for _ in range(2)]
        self.queries = draw.queries(KIND, ROWS, start_position=KEYS)
        self.ids = []
        for keys in self.keys:
            self.ids.append(calls.create(KIND).id)
            calls.upload(KIND, self.ids[-1], keys)
        self.search(0)

    def search(self, number):
        """Right, or a refusal that may be retried; whether it was right."""
        with self.calls.search_call() as call:
            call.send(search_header(KIND, self.ids[number], TOP_K, start_position=KEYS))
            call.send(*query_chunks(KIND, self.queries, 2))
            call.half_close()
            messages, error = call.to_the_end()
        found = answers([m.chunk for m in messages if m.WhichOneof("message") == "chunk"], TOP_K)[0]
        wanted = expected(KIND, self.keys[number], self.queries, TOP_K)[0]
        assert np.array_equal(found, wanted[: len(found)])
        if error is None:
            assert len(found) == ROWS
            return True
        refused = messages[-1].refused
        assert refused.reason in RETRYABLE_REASONS, refused
        assert refused.HasField("retry_after_ms")
        return False

    def close(self):
        for cache_id in self.ids:
            self.calls.delete(cache_id)


@pytest.fixture
def world(service):
    pid = service.process.pid
    with Calls(service.address) as calls:
        calls.load()  # there is a connection
        before = figures_of(pid)
        made = World(calls)
        yield made
        made.close()
        wait_for(lambda: is_idle(calls.load()))
        wait_for(lambda: not any(ledger.reserved_bytes for ledger in calls.load().ledgers))
        wait_for(lambda: not more_than(before, figures_of(pid)) or print(more_than(before, figures_of(pid))))
        assert calls.load().worker_restarts == 0


def highest_descriptor(pid):
    return max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("free", [0, 1, 3])
def test_no_descriptors(service, world, free):
    """Nobody who has a connection loses it; searches are right or refused; connections that come wait."""
    with (
        limited(service, resource.RLIMIT_NOFILE, highest_descriptor(service.process.pid) + 1 + free),
        ThreadPoolExecutor(8) as pool,
    ):
        assert world.search(0)  # it needs none
        world.search(1)  # its pages have to be brought
        for _ in range(3):
            upload, _ = world.calls.start_upload(world.ids[0], 8 * KEYS)
            with upload:
                upload.send(*key_chunks(KIND, Draw(2).keys(KIND, 8 * KEYS), KEYS))
                refusal = upload.refusal()
            assert (refusal.code, refusal.error.reason) == (EXHAUSTED, "HOST_MEMORY")
        connections = [Calls(service.address) for _ in range(8)]
        waiting = [
            pool.submit(connection.server.GetLoad, server_pb2.GetLoadRequest(), wait_for_ready=True, timeout=60)
            for connection in connections
        ]
        world.search(1)
        assert world.search(0)
        assert sum(each.done() for each in waiting) <= free
    for each in waiting:
        each.result()
    for connection in connections:
        connection.close()
    wait_for(lambda: world.search(0) and world.search(1))
