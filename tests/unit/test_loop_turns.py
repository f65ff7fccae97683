"""Turns of the event loop: one piece of work in each, first come first served."""

from __future__ import annotations

import asyncio

from streamindex_service.frontend.loop_turns import LoopTurns


async def test_streams_work_one_a_turn_in_order_and_one_alone_does_not_wait():
    loop = asyncio.get_running_loop()
    turns, log = LoopTurns(loop), []
    number = 0

    def count():
        nonlocal number
        number += 1
        counting[0] = loop.call_soon(count)

    counting = [loop.call_soon(count)]

    async def work(name):
        for _ in range(3):
            await turns.next((0,))
            log.append((name, number))
            await asyncio.sleep(0)

    await asyncio.gather(*(work(name) for name in "abc"))
    assert "".join(name for name, _ in log) == "abcabcabc"
    assert len({turn for _, turn in log}) == 9
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    before = number
    await turns.next((0,))
    assert number == before
    counting[0].cancel()


async def test_a_stream_that_ended_while_it_waited_holds_up_nobody():
    loop = asyncio.get_running_loop()
    turns = LoopTurns(loop)
    gone, waits = asyncio.create_task(turns.next((0,))), asyncio.create_task(turns.next((0,)))
    loop.call_soon(gone.cancel)  # once both wait, and before anybody is handed the turn
    await turns.next((0,))
    await asyncio.wait_for(waits, 10)
    assert gone.cancelled()


async def order_of(*works):
    """Names of streams, a letter for each turn: of (name, turns, rank, behind)."""
    turns, log = LoopTurns(asyncio.get_running_loop()), []

    async def work(name, pieces, rank, behind):
        for _ in range(pieces):
            await turns.next(rank, behind=behind)
            log.append(name)

    tasks = [asyncio.create_task(work(*each)) for each in works]
    await turns.next((0,))  # before any of them: all have to wait
    await asyncio.gather(*tasks)
    assert turns.waiting == 0
    return "".join(log)


async def test_the_lowest_rank_and_who_waits_longest_have_their_turns_in_turn():
    assert await order_of(("c", 4, (3,), False), ("b", 4, (2,), False), ("a", 4, (1,), False)) == "acabacabbcbc"


async def test_what_can_wait_gets_one_turn_in_four_by_its_rank_and_for_its_wait_in_turn():
    behind = [("z", 2, (2, 9), True), ("y", 2, (2, 3), True), ("x", 1, (1, 10), True)]
    order = await order_of(*behind, ("1", 6, (1,), False), ("2", 3, (2,), False))
    assert [order[turn] for turn in (3, 7, 11)] == ["x", "z", "y"]
    assert sorted(order) == sorted("zzyyx111111222")


async def test_ranks_of_those_who_went_for_their_wait_are_not_remembered():
    """One of the lowest rank is always there, so that nobody looks at the ranks of the others."""
    turns, first = LoopTurns(asyncio.get_running_loop()), True

    async def always():
        while first:
            await turns.next((0,))

    lowest = asyncio.create_task(always())
    most = 0
    for number in range(20):
        await asyncio.gather(*(turns.next((1, number, each)) for each in range(20)))
        most = max(most, len(turns._ahead._ranks))
    first = False
    await lowest
    assert 20 < most <= 2 * 21 + 64 + 1


async def test_what_can_wait_does_not_when_nobody_else_is_there():
    turns, number = LoopTurns(asyncio.get_running_loop()), 0
    for number in range(3):
        await asyncio.wait_for(turns.next((1, number)), 10)
    assert number == 2
