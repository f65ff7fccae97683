"""Parts of one call beside each other, where host memory does not hold the rows of all."""

from __future__ import annotations

import asyncio
import random

import pytest

from streamindex_service.errors import HostMemoryError
from streamindex_service.frontend.neighbours import Neighbours


class Memory:
    """Pieces that are taken one at a time with a wait before each: two who take may both find too few."""

    def __init__(self, free):
        self.free = free
        self.tries = 0

    async def take(self, pieces):
        self.tries += 1
        held = 0
        try:
            for _ in range(pieces):
                await asyncio.sleep(0)
                if not self.free:
                    raise HostMemoryError("none is left")
                self.free -= 1
                held += 1
        except BaseException:
            self.free += held
            raise
        return pieces


async def part(parts, memory, pieces, turns=3):
    """Whether it was served."""
    with parts.part():
        try:
            held = await parts.beside(lambda: memory.take(pieces))
        except HostMemoryError:
            return False
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
        finally:
            memory.free += held
        return True


def run_all(free, wanted, turns=3):
    parts, memory = Neighbours(), Memory(free)

    async def run():
        async with asyncio.timeout(10):
            return await asyncio.gather(*(part(parts, memory, pieces, turns) for pieces in wanted))

    served = asyncio.run(run())
    assert memory.free == free
    return served, memory


def test_what_fits_together_is_taken_at_once():
    served, memory = run_all(6, [3, 2, 1])
    assert served == [True] * 3
    assert memory.tries == 3


def test_two_that_each_hold_what_the_other_lacks():
    served, memory = run_all(4, [3, 3])
    assert served == [True] * 2
    assert memory.tries > 2  # they were in each other's way


def test_none_waits_for_a_neighbour_that_waits():
    """All fail in the same turn of the loop; the last to do so has nobody before it."""
    assert run_all(2, [2, 2, 2, 2])[0] == [True] * 4


def test_what_never_fits_is_refused_and_the_others_are_served():
    assert run_all(3, [2, 4, 2, 9])[0] == [True, False, True, False]


def test_alone_it_is_refused_at_once():
    served, memory = run_all(1, [2])
    assert served == [False]
    assert memory.tries == 1


@pytest.mark.parametrize("seed", range(200))
def test_each_is_served_that_fits_alone(seed):
    draw = random.Random(seed)
    free = draw.randint(1, 8)
    wanted = [draw.randint(1, 10) for _ in range(draw.randint(1, 16))]
    assert run_all(free, wanted, draw.randint(0, 5))[0] == [pieces <= free for pieces in wanted]


def test_a_part_that_is_cancelled_while_it_waits_leaves_the_others():
    async def run():
        parts, memory = Neighbours(), Memory(2)
        first = asyncio.create_task(part(parts, memory, 2, turns=50))
        await asyncio.sleep(0)
        second = asyncio.create_task(part(parts, memory, 2))
        third = asyncio.create_task(part(parts, memory, 2))
        for _ in range(10):
            await asyncio.sleep(0)
        second.cancel()
        assert await first
        assert await third
        with pytest.raises(asyncio.CancelledError):
            await second
        assert memory.free == 2

    asyncio.run(run())
