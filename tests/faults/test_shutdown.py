"""The end of a service, asked for or not."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from streamindex.v1 import key_cache_pb2, server_pb2

from streamindex_service.config import Settings
from streamindex_service.frontend.server import Server
from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, answers, query_chunks, refused, search_header
from tests.support.services import ROOMY, wait_for
from tests.support.tensors import Draw, Kind, expected

KIND = Kind(heads=3, head_dim=32)
SERVING, NOT_SERVING = 1, 2
AFTER_DRAIN_S = 10  # tests/unit/test_deployment.py has the same


@pytest.fixture
def service():
    running = RunningService(ROOMY)
    running.start()
    yield running
    running.stop(grace_s=2.0)


def is_gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_sigterm_lets_running_calls_end_and_refuses_new_ones(service):
    draw = Draw(1)
    keys, queries = draw.keys(KIND, 700), draw.queries(KIND, 90, start_position=600)
    with Calls(service.address) as calls:
        cache = calls.create(KIND)
        calls.upload(KIND, cache.id, keys)
        workers = service.worker_pids()
        chunks = query_chunks(KIND, queries, 30)
        watching = calls.server.WatchLoad(server_pb2.WatchLoadRequest(interval_ms=60_000), timeout=60)
        assert next(watching).load.ready
        call = calls.start_search(KIND, cache.id, 40, start_position=600)
        call.send(chunks[0])
        received = [call.receive("chunk")]
        service.process.send_signal(signal.SIGTERM)
        calls.wait_health(NOT_SERVING)
        assert refused(lambda: next(watching)).error.reason == "DRAINING"  # at once: nobody waits for those who watch
        request = key_cache_pb2.GetKeyCacheRequest(key_cache_id=cache.id)
        refusal = refused(calls.key_caches.GetKeyCache, request)
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        with calls.search_call() as late:
            late.send(search_header(KIND, cache.id, 5))
            refusal = late.refusal()
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        for chunk in chunks[1:]:
            call.send(chunk)
            received.append(call.receive("chunk"))
        call.half_close()
        assert call.receive("done").row_count == 90
        assert not call.rest()
        assert np.array_equal(answers(received, 40)[0], expected(KIND, keys, queries, 40)[0])
    assert service.process.wait(20) == 0
    assert not service.socket_path.exists()
    assert all(is_gone(pid) for pid in workers)


def test_a_second_signal_stops_at_once(service):
    with Calls(service.address) as calls:
        cache = calls.create(KIND)
        call = calls.start_search(KIND, cache.id, 5)
        service.process.send_signal(signal.SIGTERM)
        calls.wait_health(NOT_SERVING)
        service.process.send_signal(signal.SIGTERM)
        _, error = call.to_the_end()
        assert error is not None
    assert service.process.wait(10) == 0  # well below the 25 s of a drain
    assert not service.socket_path.exists()


def test_what_outlasts_the_drain_is_cancelled_and_the_service_ends():
    """A caller that hangs and a device that does; within AFTER_DRAIN_S, which is what those who stop it leave."""
    worker_settings = {**ROOMY["worker"], "heartbeat_timeout_s": 600, "work_timeout_s": 600}  # it is not replaced
    settings = {**ROOMY, "server": {**ROOMY["server"], "drain_s": 1.0}, "worker": worker_settings}
    with RunningService(settings) as service:
        draw = Draw(3)
        with Calls(service.address) as calls:
            cache = calls.create(KIND)
            calls.upload(KIND, cache.id, draw.keys(KIND, 300))
            (worker,) = service.worker_pids()
            health = calls.health_stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(health).status == SERVING
            silent = calls.start_search(KIND, cache.id, 5)
            os.kill(worker, signal.SIGSTOP)
            waiting = calls.start_search(KIND, cache.id, 5)
            waiting.send(*query_chunks(KIND, draw.queries(KIND, 5), 5))
            waiting.half_close()
            wait_for(lambda: calls.load().device.tiles == 1)
            service.process.send_signal(signal.SIGTERM)
            assert next(health).status == NOT_SERVING
            for call in (silent, waiting):
                _, error = call.to_the_end()
                assert error is not None
        assert service.process.wait(1 + AFTER_DRAIN_S) == 0
        (line,) = [line for line in service.log_tail().splitlines() if '"event": "calls_cancelled"' in line]
        assert json.loads(line)["count"] == 2
        assert is_gone(worker)
        assert not service.socket_path.exists()


def test_a_killed_frontend_leaves_no_process_and_its_socket_can_be_taken_over(service):
    draw = Draw(2)
    keys = draw.keys(KIND, 300)
    with Calls(service.address) as calls:
        cache = calls.create(KIND)
        calls.upload(KIND, cache.id, keys)
        call = calls.start_search(KIND, cache.id, 5)
        workers = service.worker_pids()
        assert len(workers) == 1
        os.kill(service.process.pid, signal.SIGKILL)
        _, error = call.to_the_end()
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    service.process.wait(10)
    wait_for(lambda: all(is_gone(pid) for pid in workers))
    assert service.socket_path.exists()  # nobody was left to remove it
    service.start()
    with Calls(service.address) as calls:
        # its caches are lost, which is told as for any id that is not there
        request = key_cache_pb2.GetKeyCacheRequest(key_cache_id=cache.id)
        assert refused(calls.key_caches.GetKeyCache, request).error.reason == "CACHE_NOT_FOUND"


async def test_stopped_while_its_worker_starts(tmp_path):
    server = {"tcp_address": "", "unix_socket": str(tmp_path / "s.sock")}
    starting = Server(Settings(**{**ROOMY, "server": server, "metrics": {"port": 0}}))
    await starting.start()
    await asyncio.sleep(0)  # the supervisor's first step starts it
    worker = starting.service.supervisor.link.process.pid
    await starting.stop(0)
    assert is_gone(worker)
    assert not (tmp_path / "s.sock").exists()
