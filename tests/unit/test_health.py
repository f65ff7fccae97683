"""The health service: what those who ask and those who watch are told, whatever other watchers do."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2

from streamindex_service.frontend.health import HealthServicer

SERVING, NOT_SERVING, UNKNOWN = (
    health_pb2.HealthCheckResponse.ServingStatus.Value(name) for name in ("SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
)


class Watcher:
    """A peer, which reads or does not, and what it was told."""

    def __init__(self, health: HealthServicer, name: str, *, reads: bool) -> None:
        self.reads = asyncio.Event()
        if reads:
            self.reads.set()
        self.told: asyncio.Queue[int] = asyncio.Queue()
        self.writes = 0
        self.task = asyncio.create_task(health.Watch(health_pb2.HealthCheckRequest(service=name), self))

    async def write(self, message) -> None:
        self.writes += 1
        await self.reads.wait()
        self.told.put_nowait(message.status)

    async def next(self) -> int:
        return await asyncio.wait_for(self.told.get(), 20)

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class Asker:
    async def abort(self, code):
        raise grpc.aio.AbortError(code)


async def checked(health, name=""):
    return (await health.Check(health_pb2.HealthCheckRequest(service=name), Asker())).status


async def test_a_watcher_who_does_not_read_holds_up_nobody():
    health = HealthServicer(8)
    health.set(["", "a"], ready=False)
    lazy, other = Watcher(health, "", reads=False), Watcher(health, "", reads=True)
    assert await other.next() == NOT_SERVING
    assert lazy.writes == 1
    for ready, state in ((True, SERVING), (False, NOT_SERVING), (True, SERVING)):
        health.set(["", "a"], ready=ready)
        assert await checked(health) == await checked(health, "a") == state
        assert await other.next() == state
    health.end()
    assert await other.next() == NOT_SERVING
    health.set(["", "a"], ready=True)  # too late
    assert await checked(health) == NOT_SERVING
    assert (lazy.writes, lazy.told.empty()) == (1, True)
    lazy.reads.set()  # what it had not read, and the state of now was the same
    assert await lazy.next() == NOT_SERVING
    for watcher in (lazy, other):
        await watcher.close()
    assert lazy.told.empty()
    assert other.told.empty()


async def test_a_watcher_who_reads_late_is_told_what_is_so_by_then():
    health = HealthServicer(8)
    health.set([""], ready=False)
    late = Watcher(health, "", reads=False)
    await asyncio.sleep(0)
    health.set([""], ready=True)
    late.reads.set()
    assert [await late.next(), await late.next()] == [NOT_SERVING, SERVING]
    await late.close()


async def test_names_that_there_are_not():
    health = HealthServicer(8)
    health.set([""], ready=True)
    with pytest.raises(grpc.aio.AbortError):
        await checked(health, "absent")
    watcher = Watcher(health, "later", reads=True)
    assert await watcher.next() == UNKNOWN
    health.set(["later"], ready=True)
    assert await watcher.next() == SERVING
    await watcher.close()
