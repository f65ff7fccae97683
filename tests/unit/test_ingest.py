"""The lane of a stream's chunks: order, bounds, and what happens around a piece of work that fails."""

from __future__ import annotations

import asyncio
import threading
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from streamindex_service.core.ledger import Ledger
from streamindex_service.errors import HostMemoryError
from streamindex_service.frontend.host_memory import IngressBudget
from streamindex_service.frontend.ingest import _AHEAD, _AT_ONCE, _GATHER_S, _TOGETHER, IngestLane


class Bench:
    """A lane, what it has counted, and gates at which its work waits."""

    def __init__(self, limit_bytes: int = 1000, news_bytes: int = 1000) -> None:
        self.threads = ThreadPoolExecutor(_AT_ONCE)
        self.ledger = Ledger("ingress", limit_bytes)
        self.counted: list[int] = []
        self.failed = 0
        self.gates = [threading.Event() for _ in range(20)]
        self.lane = IngestLane(self.threads, IngressBudget(self.ledger), news_bytes, lambda: None, self._failed)

    def _failed(self) -> None:
        self.failed += 1

    def work(self, number: int, error: Exception | None = None):
        def run(chunks):
            assert self.gates[number].wait(30)
            if error is not None:
                raise error
            return [lambda: self.counted.append(number)]

        return run

    async def put(self, work, size_bytes: int = 10) -> None:
        """Have a chunk worked on at once, as if the loop waited for it."""
        await self.lane.put(work, None, size_bytes)
        self.lane._start(now=True)

    async def close(self) -> None:
        for gate in self.gates:
            gate.set()
        await self.lane.close()
        self.threads.shutdown()
        assert self.ledger.reserved_bytes == 0


@pytest.fixture
async def bench():
    made = Bench()
    yield made
    await made.close()


async def test_chunks_are_counted_in_order_whichever_is_done_first(bench):
    for number in range(3):
        await bench.put(bench.work(number))
    for number in (2, 1):
        bench.gates[number].set()
    await asyncio.sleep(0.05)
    assert bench.counted == []
    bench.gates[0].set()
    await bench.lane.settle()
    assert bench.counted == [0, 1, 2]
    assert bench.ledger.reserved_bytes == 0


async def test_a_thread_begins_when_enough_chunks_wait(bench):
    for number in range(_TOGETHER - 1):
        await bench.lane.put(bench.work(number), None, 10)
        assert bench.lane._threads == 0
    await bench.lane.put(bench.work(_TOGETHER - 1), None, 10)
    assert bench.lane._threads == 1


async def test_a_few_chunks_are_not_left_lying(bench):
    counted = threading.Event()
    await bench.lane.put(lambda chunks: [counted.set], None, 10)
    assert await asyncio.to_thread(counted.wait, 30), "nobody waits for it, and no other comes"


async def test_a_chunk_that_comes_while_all_threads_are_busy_is_not_left_lying(bench):
    await hold_all_threads(bench)
    counted = threading.Event()
    await bench.lane.put(lambda chunks: [counted.set], None, 10)
    await asyncio.sleep(5 * _GATHER_S)  # it has waited for others, and no thread was free
    for gate in bench.gates:
        gate.set()
    assert await asyncio.to_thread(counted.wait, 30)


async def test_a_window_that_holds_few_chunks_is_served_at_once():
    bench = Bench(news_bytes=10)
    try:
        await bench.lane.put(bench.work(0), None, 10)
        assert bench.lane._threads == 1
    finally:
        await bench.close()


async def test_a_thread_leaves_few_chunks_to_gather(bench):
    calls: list[list[int]] = []
    begun, go_on = threading.Event(), threading.Event()

    def work(chunks):
        calls.append(chunks)
        begun.set()
        assert go_on.wait(30)
        return [partial(bench.counted.append, chunk) for chunk in chunks]

    for chunk in range(_TOGETHER):
        await bench.lane.put(work, chunk, 10)
    assert await asyncio.to_thread(begun.wait, 30)
    await bench.lane.put(work, _TOGETHER, 10)
    go_on.set()
    await bench.lane.settle()
    assert calls == [[*range(_TOGETHER)], [_TOGETHER]]
    assert bench.counted == [*range(_TOGETHER + 1)]


async def test_nothing_behind_a_failure_is_counted_and_the_budget_is_released_once(bench):
    error = ValueError("bad")
    await bench.put(bench.work(0))
    await bench.put(bench.work(1, error))
    await bench.put(bench.work(2))
    for number in (2, 1, 0):
        bench.gates[number].set()
    with pytest.raises(ValueError, match="bad"):
        await bench.lane.settle()
    with pytest.raises(ValueError, match="bad"):
        await bench.put(bench.work(3))
    assert bench.counted == [0]
    assert bench.failed == 1


async def test_a_chunk_put_between_a_failure_and_the_news_of_it(bench):
    await bench.put(bench.work(0, ValueError("bad")))
    bench.gates[0].set()
    bench.gates[1].set()
    # the thread has failed; the loop, which does not run meanwhile, has not heard of it
    deadline = threading.Event()
    while bench.lane._error is None:
        deadline.wait(0.001)
    with pytest.raises(ValueError, match="bad"):
        await bench.put(bench.work(1))
    await asyncio.sleep(0.05)
    assert bench.counted == []


async def test_a_lane_waits_for_room_in_the_budget():
    bench = Bench(limit_bytes=25)
    try:
        for number in range(2):
            await bench.lane.put(bench.work(number), None, 10)
        third = asyncio.create_task(bench.lane.put(bench.work(2), None, 10))
        await asyncio.sleep(0.05)
        assert not third.done()
        bench.gates[0].set()
        await asyncio.wait_for(third, 30)
    finally:
        await bench.close()
    assert bench.counted[0] == 0


async def test_closing_drops_what_no_thread_has_begun(bench):
    for number in range(_AT_ONCE + 3):
        await bench.put(bench.work(number))
    closing = asyncio.create_task(bench.lane.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    for gate in bench.gates:
        gate.set()
    await closing
    assert bench.counted == list(range(_AT_ONCE))


@pytest.mark.parametrize("bad", [None, 0, 1, _TOGETHER, _AHEAD - _AT_ONCE - 1])
async def test_chunks_that_wait_are_worked_on_together_and_a_bad_one_is_found_among_them(bench, bad):
    many = _AHEAD - _AT_ONCE
    calls: list[list[int]] = []

    def work(chunks):
        calls.append(chunks)
        if bad in chunks:
            raise ValueError(str(bad))
        return [partial(bench.counted.append, chunk) for chunk in chunks]

    for number in range(_AT_ONCE):  # then no thread is free
        await bench.put(bench.work(number))
    for chunk in range(many):
        await bench.lane.put(work, chunk, 10)
    for gate in bench.gates:
        gate.set()
    if bad is None:
        await bench.lane.settle()
    else:
        with pytest.raises(ValueError, match=str(bad)):
            await bench.lane.settle()
    assert max(map(len, calls)) == _TOGETHER
    assert bench.counted == [*range(_AT_ONCE), *range(many if bad is None else bad)]


async def hold_all_threads(bench) -> None:
    for number in range(_AT_ONCE):
        await bench.put(bench.work(number))


@pytest.mark.parametrize("bad", range(_TOGETHER))
async def test_work_stops_at_the_first_bad_chunk(bench, bad):
    calls: list[list[int]] = []

    def work(chunks):
        calls.append(chunks)
        if any(chunk >= bad for chunk in chunks):
            raise ValueError(str(min(chunk for chunk in chunks if chunk >= bad)))
        return [partial(bench.counted.append, chunk) for chunk in chunks]

    await hold_all_threads(bench)
    for chunk in range(_TOGETHER):
        await bench.lane.put(work, chunk, 10)
    bench.gates[0].set()
    bench.gates[1].set()
    with pytest.raises(ValueError, match=str(bad)):
        await bench.lane.settle()
    assert calls == [[*range(_TOGETHER)], *([chunk] for chunk in range(bad + 1))]
    assert bench.counted == [*range(_AT_ONCE), *range(bad)]


async def test_want_of_memory_is_met_once(bench):
    calls: list[list[int]] = []

    def work(chunks):
        calls.append(chunks)
        raise HostMemoryError("none")

    await hold_all_threads(bench)
    for chunk in range(_TOGETHER):
        await bench.lane.put(work, chunk, 10)
    bench.gates[0].set()
    bench.gates[1].set()
    with pytest.raises(HostMemoryError):
        await bench.lane.settle()
    assert calls == [[*range(_TOGETHER)]]


@pytest.mark.parametrize("together", [1, _TOGETHER])
async def test_a_failure_holds_nothing_of_the_work(bench, together):
    seen = weakref.WeakSet()

    class Chunk:
        pass

    def write(chunks):
        stretches = [np.zeros(8) for _ in chunks]
        seen.update(chunks)
        try:
            raise OSError("inner")
        except OSError as error:
            raise ValueError(f"{len(stretches)} bad") from error

    await hold_all_threads(bench)
    for _ in range(together):
        await bench.lane.put(write, Chunk(), 10)
    for gate in bench.gates:
        gate.set()
    with pytest.raises(ValueError, match="bad") as caught:
        await bench.lane.settle()
    await asyncio.to_thread(bench.threads.shutdown)  # they are done too
    assert not seen, "without the garbage collector"
    assert "in write" in "".join(traceback.format_exception(caught.value)), "where it was raised is still told"
