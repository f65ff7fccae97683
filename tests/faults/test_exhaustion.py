"""A frontend without descriptors, and one whose disks and memory take no more: it refuses, waits, and lives."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from streamindex.v1 import server_pb2

from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, answers, key_chunks, query_chunks, search_header
from tests.support.faulty_service import FaultyService
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
        "ingest_threads": 1,
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
            blocks = figures_of(running.process.pid).segments
            world = World(calls)  # every thread that there is has had something to do
            world.fill_host()
            world.close()
            wait_for(lambda: figures_of(running.process.pid).segments == blocks)
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
        self.more = draw.keys(KIND, 4 * KEYS)
        assert self.search(0)

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

    def upload_is_refused(self):
        """For want of memory, and may be tried again."""
        upload, _ = self.calls.start_upload(self.ids[0], len(self.more), KEYS)
        with upload:
            upload.send(*key_chunks(KIND, self.more, KEYS))
            refusal = upload.refusal()
        assert (refusal.code, refusal.error.reason) == (EXHAUSTED, "HOST_MEMORY")

    def upload_goes_on(self):
        """There is room again; nothing of what was there has changed."""

        def taken():
            with contextlib.suppress(grpc.RpcError):
                return self.calls.upload(KIND, self.ids[0], self.more, KEYS, chunk_rows=KEYS) == KEYS + len(self.more)

        wait_for(taken)
        self.keys[0] += self.more
        wait_for(lambda: self.search(0) and self.search(1))

    def fill_host(self):
        """More than the host holds: what is idle goes to disk, and comes back."""
        draw = Draw(3)
        for _ in range(3):
            self.keys.append(draw.keys(KIND, 6 * KEYS))
            self.ids.append(self.calls.create(KIND).id)
            self.calls.upload(KIND, self.ids[-1], self.keys[-1], chunk_rows=KEYS)
        for number in range(len(self.ids)):
            wait_for(lambda: self.search(number))  # noqa: B023

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
        wait_for(lambda: not more_than(before, figures_of(pid)))
        assert calls.load().worker_restarts == 0


def limit_with(pid, free):
    """The limit under which a process can open so many descriptors more."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    unused = (number for number in itertools.count() if number not in used)
    return next(itertools.islice(unused, free, None))


@pytest.mark.parametrize("free", [0, 1, 3])
def test_no_descriptors(service, world, free):
    """Nobody who has a connection loses it; searches are right or refused; connections that come wait."""
    most = limit_with(service.process.pid, free)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(8))
        with limited(service, resource.RLIMIT_NOFILE, most):
            assert world.search(0)
            assert world.search(1)  # its pages have to be brought, in segments that the worker has not seen
            for _ in range(3):
                world.upload_is_refused()
            connections = [stack.enter_context(Calls(service.address)) for _ in range(8)]
            waiting = [pool.submit(load_when_connected, connection) for connection in connections]
            for number in (0, 1):
                world.search(number)  # right, or refused: the room for an upload was sought on disk
            assert sum(each.done() for each in waiting) <= free
        for each in waiting:
            assert each.result().ready
    world.upload_goes_on()


def load_when_connected(calls):
    return calls.server.GetLoad(server_pb2.GetLoadRequest(), wait_for_ready=True, timeout=60)


def test_no_disk_and_no_memory(service, world):
    """Neither the directory for spilled keys nor shared memory takes a byte: as with RLIMIT_FSIZE, so with ENOSPC."""
    spilled = world.calls.load().spill.spilled_pages
    with limited(service, resource.RLIMIT_FSIZE, 1):
        assert world.search(0)
        assert world.search(1)
        world.upload_is_refused()
        assert world.calls.load().spill.spilled_pages == spilled
        assert world.search(0)
        assert world.search(1)
    world.upload_goes_on()
    world.fill_host()
    assert world.calls.load().spill.spilled_pages > spilled


def test_a_log_on_a_full_disk_costs_lines_and_nothing_else():
    """Every write to standard error fails, from the first to the last, and a worker dies meanwhile."""
    running = FaultyService(ROOMY)  # whose next worker is ready at once
    running.redirect_log(Path("/dev/full"))
    with running as service, Calls(service.address) as calls:
        world = World(calls)
        (worker,) = service.worker_pids()
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: calls.load().worker_restarts == 1 and calls.load().ready)
        assert world.search(0)
        with calls.search_call() as call:  # a refusal is a line as well
            call.send(search_header(KIND, "absent", TOP_K))
            assert call.refusal().error.reason == "CACHE_NOT_FOUND"
        world.close()
        assert service.stop() == 0
