"""Which streams bring rows before their layers take part."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from streamindex_service.core.band_queue import Band
from streamindex_service.frontend.read_ahead import _LISTEN_S, _LOOK_S, ReadAhead
from tests.support.virtual_loop import run_virtually

PLACES = 8
LONG_S, SOON_S = 60.0, 1.1 * _LOOK_S


@dataclass(eq=False)
class Stream:
    age: int
    caller: str = "a"
    band: Band = Band.STANDARD
    lacks: bool = True
    brings: bool = True
    asked: int = 0

    def lacks_layer(self):
        return self.lacks

    def brings_rows(self):
        self.asked += 1
        return self.brings


class World:
    """Streams that come for a place; `inside` those that have had one, in that order."""

    def __init__(self) -> None:
        self.changes = 0
        self.read_ahead = ReadAhead(asyncio.get_running_loop(), lambda: self.changes)
        self.inside: list[Stream] = []
        self.tasks: dict[Stream, asyncio.Task[None]] = {}

    async def come(self, *streams: Stream, most_s: float = LONG_S, settle_s: float = 3 * _LISTEN_S) -> None:
        for stream in streams:
            self.tasks[stream] = asyncio.create_task(self._come(stream, most_s))
        await self.settle(settle_s)

    async def _come(self, stream: Stream, most_s: float) -> None:
        await self.read_ahead.next(stream, most_s)
        self.inside.append(stream)

    async def settle(self, seconds: float = 3 * _LISTEN_S) -> None:
        """Long enough for several looks, if nothing else is said."""
        await asyncio.sleep(seconds)

    async def takes_part(self, stream: Stream, settle_s: float = 3 * _LISTEN_S) -> None:
        stream.lacks = False
        self.changes += 1
        await self.settle(settle_s)


def virtually(test):
    """A test of a world, in virtual time."""

    async def scenario() -> None:
        world = World()
        try:
            await test(world)
        finally:
            for task in world.tasks.values():
                task.cancel()
            await asyncio.gather(*world.tasks.values(), return_exceptions=True)
        assert not world.read_ahead._waiting

    def run() -> None:
        run_virtually(scenario())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@virtually
async def test_so_many_are_ahead_and_one_more_for_each_layer_that_takes_part(world):
    streams = [Stream(age) for age in range(PLACES + 3)]
    await world.come(*streams)
    assert world.inside == streams[:PLACES]
    await world.read_ahead.next(streams[0], LONG_S)  # who is inside does not wait again
    await world.takes_part(streams[3])
    assert world.inside == streams[: PLACES + 1]
    world.read_ahead.leave(streams[5])
    await world.settle()
    assert world.inside == streams[: PLACES + 2]


@virtually
async def test_callers_come_in_turn_and_of_each_the_oldest(world):
    many = [Stream(age, "many") for age in range(PLACES + 2)]
    others = [Stream(100, "one"), Stream(101, "two"), Stream(102, "one")]
    await world.come(*many)
    await world.come(*reversed(others))
    for stream in many[:4]:
        await world.takes_part(stream)
    assert world.inside[PLACES:] == [others[0], others[1], others[2], many[PLACES]]


@virtually
async def test_a_band_waits_for_those_above_it_and_not_for_those_below(world):
    below = [Stream(age, band=Band.BATCH) for age in range(PLACES)]
    above = [Stream(100 + age, band=Band.INTERACTIVE) for age in range(PLACES)]
    await world.come(*below)
    await world.come(*above)
    assert world.inside == [*below, *above]
    late = [Stream(200, band=Band.BATCH), Stream(201, band=Band.STANDARD)]
    await world.come(*late)
    for stream in below:
        await world.takes_part(stream)
    assert world.inside == [*below, *above], "the places of both are taken by the band above"
    await world.takes_part(above[0])
    assert world.inside[2 * PLACES :] == [late[1]]


@virtually
async def test_who_brings_nothing_keeps_nobody_from_it(world):
    silent = [Stream(age) for age in range(PLACES)]
    last = Stream(100)
    await world.come(*silent, last)
    assert last not in world.inside
    silent[2].brings = False
    await world.settle()
    assert world.inside[-1] is last


@virtually
async def test_whose_layer_comes_for_another_does_not_wait_any_more(world):
    first = [Stream(age) for age in range(PLACES)]
    waits, same = Stream(100), Stream(101)
    await world.come(*first, waits, same)
    await world.takes_part(same)
    assert world.inside == [*first, same]


@virtually
async def test_nobody_waits_for_longer_than_it_may(world):
    streams = [Stream(age) for age in range(PLACES + 2)]
    await world.come(*streams[: PLACES + 1])
    await world.come(streams[-1], most_s=0.01)
    assert world.inside == [*streams[:PLACES], streams[-1]]


@virtually
async def test_a_stream_that_ended_while_it_waited_takes_no_place(world):
    streams = [Stream(age) for age in range(PLACES + 2)]
    await world.come(*streams)
    world.tasks[streams[PLACES]].cancel()
    await world.takes_part(streams[0])
    assert world.inside == [*streams[:PLACES], streams[-1]]


@virtually
async def test_a_stream_waits_no_longer_in_all_than_once(world):
    """And afresh once it has had its layer."""
    streams = [Stream(age) for age in range(PLACES)]
    late = Stream(100)
    await world.come(*streams)
    await world.come(late, most_s=0.01)
    assert world.inside[-1] is late
    for _ in range(20):
        await asyncio.wait_for(world.read_ahead.next(late, LONG_S), 10.0)
    world.read_ahead.leave(late)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(world.read_ahead.next(late, LONG_S), 0.05)


@virtually
async def test_those_who_have_waited_long_enough_take_no_places(world):
    streams = [Stream(age) for age in range(PLACES)]
    herd, waits = [Stream(100 + age) for age in range(50)], Stream(200)
    await world.come(*streams)
    await world.come(*herd, most_s=0.01)
    assert world.inside == [*streams, *herd]
    await world.come(waits)
    await world.takes_part(streams[0])
    assert world.inside[-1] is waits


@virtually
async def test_a_look_that_fails_is_not_the_last(world):
    streams = [Stream(age) for age in range(PLACES + 1)]
    await world.come(*streams)
    broken = streams[0]
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    broken.lacks_layer = lambda: 1 / 0
    await world.settle()
    del broken.lacks_layer
    await world.takes_part(broken)
    assert world.inside == streams


@virtually
async def test_a_look_that_fails_forgets_nothing(world):
    streams, waits = [Stream(age) for age in range(PLACES)], Stream(100)
    await world.come(*streams, waits)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    streams[0].lacks_layer = lambda: 1 / 0
    await world.takes_part(waits, SOON_S)
    assert waits not in world.inside
    del streams[0].lacks_layer
    await world.settle(SOON_S)
    assert world.inside[-1] is waits


@virtually
async def test_what_happens_is_seen_at_the_next_look(world):
    streams = [Stream(age) for age in range(PLACES + 3)]
    await world.come(*streams)
    await world.takes_part(streams[0], SOON_S)
    assert world.inside == streams[: PLACES + 1]
    world.read_ahead.leave(streams[1])
    await world.settle(SOON_S)
    assert world.inside == streams[: PLACES + 2]
    late = Stream(100)
    await world.come(late, most_s=_LOOK_S / 2, settle_s=SOON_S)
    assert world.inside == [*streams[: PLACES + 2], late]


@virtually
async def test_a_place_that_is_free_already_is_taken_at_once(world):
    streams = [Stream(age) for age in range(PLACES + 1)]
    await world.come(*streams[:PLACES])
    streams[3].brings = False  # of which nobody tells
    await world.come(streams[-1], settle_s=0.0)
    await world.settle(0.0)
    assert world.inside == streams


@virtually
async def test_nobody_is_asked_more_often_than_is_of_use(world):
    streams = [Stream(age) for age in range(PLACES + 20)]
    await world.come(*streams)
    asked = [stream.asked for stream in streams]
    await world.settle(1.0)
    most = 1.0 / _LISTEN_S + 1
    assert all(stream.asked - before <= most for stream, before in zip(streams, asked, strict=True))


@virtually
async def test_what_counts_is_the_time_that_a_stream_has_waited(world):
    """Not the time in which it had a place, and lost it because its caller thought."""
    streams = [Stream(age) for age in range(PLACES + 1)]
    thinks = streams[0]
    await world.come(*streams[1:])
    await world.come(thinks, most_s=2.0)
    streams[1].lacks = False
    await world.settle()
    assert world.inside[-1] is thinks
    await asyncio.sleep(2.1)
    thinks.brings = False
    await world.come(Stream(100))
    assert world.inside[-1] is not thinks
    thinks.brings = True
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(world.read_ahead.next(thinks, LONG_S), 0.03)


@virtually
async def test_a_band_above_comes_at_once_though_others_wait(world):
    below = [Stream(age, band=Band.BATCH) for age in range(PLACES + 1)]
    await world.come(*below)
    with pytest.raises(StopIteration):  # without having waited for anything
        world.read_ahead.next(Stream(100, band=Band.STANDARD), LONG_S).send(None)
