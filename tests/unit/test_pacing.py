"""Streams hold back while decode steps are being answered, one message at a time, and no longer."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from streamindex_service.frontend.pacing import Pacing


class Clock:
    """A loop's clock and timers, driven by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self._timers: list[tuple[float, object]] = []
        self._loop = asyncio.get_running_loop()

    def time(self) -> float:
        return self.now

    def create_future(self) -> asyncio.Future[None]:
        return self._loop.create_future()

    def call_at(self, when, call):
        self._timers.append((when, call))
        return call

    async def advance(self, seconds: float) -> None:
        """Let time pass, timer by timer, and whoever was told go on."""
        end = self.now + seconds
        await asyncio.sleep(0)
        while due := sorted((timer for timer in self._timers if timer[0] <= end), key=lambda timer: timer[0]):
            self._timers.remove(due[0])
            self.now = max(self.now, due[0][0])
            due[0][1]()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        self.now = end


@pytest.fixture
async def clock():
    return Clock()


def _streams(pacing: Pacing, clock: Clock, count: int, size_bytes: int):
    """Streams without end, and (when, who) of each message that they read."""
    log: list[tuple[float, int]] = []

    async def stream(name: int) -> None:
        while True:
            await pacing.before_reading()
            log.append((clock.now, name))
            pacing.read(size_bytes)
            await asyncio.sleep(0)

    return [asyncio.create_task(stream(name)) for name in range(count)], log


@pytest.mark.parametrize(("busy_ms", "apart_ms"), [(0.0, 2.0), (1.4, 2.0), (3.0, 4.0), (30.0, 8.0)])
async def test_where_a_message_takes_more_of_the_loop_s_time_fewer_are_read(clock, busy_ms, apart_ms):
    busy = [0.0]
    pacing = Pacing(clock, 512 << 20, lambda: busy[0])
    told = []

    async def stream() -> None:
        while True:
            await pacing.before_reading()
            told.append(clock.now)
            busy[0] += busy_ms / 1000
            pacing.read(1 << 20)
            await asyncio.sleep(0)

    with pacing.step():
        task = asyncio.create_task(stream())
        await clock.advance(0.2)
    task.cancel()
    apart = [later - earlier for earlier, later in itertools.pairwise(told[2:])]
    assert len(apart) >= 20
    assert apart == pytest.approx([apart_ms / 1000] * len(apart), rel=0.05)


async def test_without_decode_steps_nobody_waits(clock):
    pacing = Pacing(clock, 512 << 20, lambda: 0.0)
    for _ in range(1000):
        with pytest.raises(StopIteration):  # it ends without having waited for anything
            pacing.before_reading().send(None)
        pacing.read(1 << 20)


@pytest.mark.parametrize(("size_bytes", "most"), [(1 << 20, 53), (1 << 18, 206)])
async def test_beside_a_decode_step_streams_take_turns_and_bring_half_a_gib_a_second(clock, size_bytes, most):
    pacing = Pacing(clock, 512 << 20, lambda: 0.0)
    with pacing.step():
        tasks, log = _streams(pacing, clock, 4, size_bytes)
        await clock.advance(0.1)
    for task in tasks:
        task.cancel()
    assert most - 2 <= len(log) <= most
    assert len({when for when, _ in log[4:]}) == len(log) - 4, "never two at once"
    counts = [sum(name == each for _, name in log) for each in range(4)]
    assert max(counts) - min(counts) <= 1


async def test_a_little_after_the_last_step_all_go_on_at_once(clock):
    pacing = Pacing(clock, 512 << 20, lambda: 0.0)
    with pacing.step():
        pacing.read(64 << 20)
        reads = [asyncio.create_task(pacing.before_reading()) for _ in range(5)]
        await clock.advance(0.0)
        assert [read.done() for read in reads] == [True] + [False] * 4
    await clock.advance(0.009)
    assert [read.done() for read in reads] == [True] + [False] * 4
    await clock.advance(0.2)
    assert all(read.done() for read in reads)


async def test_a_stream_that_ended_while_it_waited_holds_up_nobody(clock):
    pacing = Pacing(clock, 512 << 20, lambda: 0.0)
    with pacing.step():
        pacing.read(1 << 20)
        reads = [asyncio.create_task(pacing.before_reading()) for _ in range(3)]
        await asyncio.sleep(0)
        reads[0].cancel()
        reads[1].cancel()
        await asyncio.sleep(0)
        await clock.advance(0.0)
        assert reads[2].done()
        assert not reads[2].cancelled()
