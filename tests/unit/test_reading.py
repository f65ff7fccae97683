"""Who reads its next message: few at a time, in which order, and nobody for ever."""

from __future__ import annotations

import asyncio

import pytest

from streamindex_service.frontend.reading import Reading


def reading(places: int = 1) -> Reading:
    return Reading(asyncio.get_running_loop(), places)


async def test_so_many_read_at_a_time():
    few = reading(3)
    places = [await few.begin() for _ in range(3)]
    waits = asyncio.create_task(few.begin())
    await asyncio.sleep(0)
    assert (waits.done(), few.waiting) == (False, 1)
    places[1].give_back()
    (await waits).give_back()
    assert few.waiting == 0
    for place in (places[0], places[2]):
        place.give_back()
    for place in [await few.begin() for _ in range(3)]:  # all are there again
        place.give_back()


async def test_what_can_wait_comes_behind_by_its_rank_and_gets_one_place_in_four():
    one, log = reading(), []

    async def work(name, pieces, behind=None):
        for _ in range(pieces):
            place = await one.begin(behind)
            log.append(name)
            place.give_back()

    first = await one.begin()
    works = [work("z", 2, (2, 9)), work("a", 2, (2, 3)), work("u", 1, (1, 10)), work("1", 6), work("2", 3)]
    tasks = [asyncio.create_task(each) for each in works]
    await asyncio.sleep(0)
    assert one.waiting == 2
    first.give_back()
    await asyncio.gather(*tasks)
    found = "".join(log)
    assert "".join(each for each in found if each in "uaz") == "uaazz"
    behind = [at for at, name in enumerate(found) if name in "uaz"]
    assert behind[:2] == [3, 7]  # after that one alone is left, and waits for nobody between two places
    assert sorted(found) == sorted("zzaau111111222")


async def test_who_brings_nothing_keeps_its_place_from_others_for_a_moment_only():
    one = reading()
    kept = await one.begin()
    others = [await asyncio.wait_for(one.begin(), 10) for _ in range(3)]  # none of them gives its own back
    kept.give_back()  # too late to count
    waits = asyncio.create_task(one.begin())
    await asyncio.sleep(0)
    assert not waits.done()
    (await asyncio.wait_for(waits, 10)).give_back()
    others[-1].give_back()
    (await one.begin()).give_back()


async def test_a_place_is_given_back_once():
    one = reading()
    place = await one.begin()
    place.give_back()
    place.give_back()
    again = await one.begin()
    waits = asyncio.create_task(one.begin())
    await asyncio.sleep(0)
    assert not waits.done()
    again.give_back()
    (await waits).give_back()


@pytest.mark.parametrize("behind", [None, (2, 1)])
@pytest.mark.parametrize("given", [False, True])
async def test_a_stream_that_ends_while_it_waits_holds_up_nobody(behind, given):
    one = reading()
    place = await one.begin()
    gone, waits = asyncio.create_task(one.begin(behind)), asyncio.create_task(one.begin((3, 1)))
    await asyncio.sleep(0)
    if given:  # at the same moment
        place.give_back()
    gone.cancel()
    place.give_back()
    (await asyncio.wait_for(waits, 10)).give_back()
    assert gone.cancelled()
    (await one.begin()).give_back()
