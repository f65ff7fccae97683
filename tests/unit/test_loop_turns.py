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


async def test_what_can_wait_gets_one_turn_in_four_by_its_rank_and_for_its_wait_in_turn():
    turns, log = LoopTurns(asyncio.get_running_loop()), []

    async def work(name, pieces, behind=None):
        for _ in range(pieces):
            await turns.next(behind)
            log.append(name)

    works = [work("z", 2, (2, 9)), work("a", 2, (2, 3)), work("u", 1, (1, 10)), work("1", 6), work("2", 3)]
    tasks = [asyncio.create_task(each) for each in works]
    await turns.next((0,))  # before any of them: all have to wait
    await asyncio.gather(*tasks)
    assert "".join(log) == "121u212z111aza"
    assert turns.waiting == 0


async def test_what_can_wait_does_not_when_nobody_else_is_there():
    turns, number = LoopTurns(asyncio.get_running_loop()), 0
    for number in range(3):
        await asyncio.wait_for(turns.next((1, number)), 10)
    assert number == 2
