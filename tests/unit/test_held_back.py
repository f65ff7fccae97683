"""Which searches are held back, and what that means for ingress memory."""

from __future__ import annotations

import asyncio

import pytest

from streamindex_service.core.band_queue import Band
from streamindex_service.core.estimates import DeviceSpeed
from streamindex_service.core.governor import Governor, GovernorLimits
from streamindex_service.core.layers import Page, Snapshot
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool
from streamindex_service.core.residency import Residency
from streamindex_service.core.scheduler import QueueLimits
from streamindex_service.core.turns import Grant, Need, OpenSearch
from streamindex_service.errors import QueueFullError
from streamindex_service.frontend.host_memory import IngressBudget

PAGE_BYTES = 100
LAYER_PAGES = 8  # of ten that fit


class World:
    """A governor, and searches of layers of which one fits."""

    def __init__(self, pages: int = 10) -> None:
        pool = PagePool(Ledger("hbm", pages * PAGE_BYTES), PAGE_BYTES, lambda *_: None, lambda *_: None)
        residency = Residency(pool.ledger, pool, lambda page: None)
        self.now = 0.0
        self.governor = Governor(residency, lambda: self.now, GovernorLimits(), wake=lambda delay_s: None)
        # its gates are closed: nobody makes room for others
        self.governor.room.may_displace = lambda turn, *, for_age: False  # type: ignore[method-assign]
        self.governor.device_ready()
        self.granted: dict[OpenSearch, list[Grant]] = {}

    def search(self, pages: tuple[Page, ...], band: Band = Band.BATCH) -> OpenSearch:
        least = self.need(pages[:LAYER_PAGES])  # a larger layer passes in windows
        search = self.governor.open(Snapshot(None, 0, pages, 1), "a", band, least, 0.0, None)
        self.granted[search] = []
        return search

    def turn(self, search: OpenSearch, pages: tuple[Page, ...], speed: DeviceSpeed | None = None) -> bool:
        """Whether it was granted at once."""
        granted = self.granted[search]
        before = len(granted)
        self.governor.request(search, self.need(pages, speed), granted.append, pytest.fail)
        return len(granted) > before

    def finished(self, search: OpenSearch) -> bool:
        """All that it was granted is done, and it is over."""
        for grant in self.granted.pop(search):
            self.governor.finish(grant, 1e-9)
        self.governor.close(search)
        return True

    @staticmethod
    def need(pages: tuple[Page, ...], speed: DeviceSpeed | None = None) -> Need:
        return Need(pages, PAGE_BYTES // 2, PAGE_BYTES // 2, 1, speed=speed)


def layer(pages: int = LAYER_PAGES) -> tuple[Page, ...]:
    return tuple(Page(None, PAGE_BYTES, None, None) for _ in range(pages))


def test_only_who_has_turns_that_wait_for_room_is_held_back():
    world, (there, waits) = World(), (layer(), layer())
    runs, held = world.search(there), world.search(waits)
    assert world.turn(runs, there)
    assert not world.turn(held, waits)
    assert world.governor.room.is_held_back(held)
    assert not world.governor.room.is_held_back(runs)
    new, same, empty = world.search(layer(1), Band.INTERACTIVE), world.search(there), world.search(())
    assert not any(map(world.governor.room.is_held_back, (new, same, empty)))
    assert world.turn(same, there)
    assert not world.governor.room.is_held_back(same)


def test_a_call_is_held_back_that_has_room_for_half_of_what_it_does():
    """Attention needs index keys and KV rows: its turn for these waits."""
    world, (keys, rows) = World(), (layer(), layer())
    attend = world.search(keys)
    assert world.turn(attend, keys)
    assert not world.turn(attend, rows, DeviceSpeed())
    assert world.governor.room.is_held_back(attend)


async def test_a_new_search_does_not_wait_behind_those_that_come_again_and_again():
    """Others take ingress memory without end; who has no rows yet has it in its turn."""
    world, (there, waits) = World(), (layer(), layer())
    runs, held = world.search(there), world.search(waits)
    assert world.turn(runs, there)
    assert not world.turn(held, waits)
    new = world.search(there, Band.INTERACTIVE)
    budget, given, got = IngressBudget(Ledger("ingress", 2)), 0, False

    async def busy() -> None:
        nonlocal given
        while not got and given < 1000:
            await budget.reserve(1, lambda: world.governor.room.is_held_back(runs))
            given += 1
            await asyncio.sleep(0)
            budget.release(1)

    others = [asyncio.create_task(busy()) for _ in range(3)]
    await asyncio.sleep(0)
    await budget.reserve(1, lambda: world.governor.room.is_held_back(new))
    got = True
    budget.release(1)
    await asyncio.gather(*others)
    assert given < 20


def test_a_decode_step_waits_for_no_room_while_its_layers_are_there():
    """Sequences come, go and change places: what the steps have in common is not counted once for each."""
    world, layers = World(), [layer(2) for _ in range(5)]
    before: Grant | None = None
    for order in ([0, 1, 2, 3], [1, 2, 3, 0], [2, 0, 3, 1], [3, 2], [0, 3, 1, 2]):
        some = [layers[number] for number in order]
        search = world.search(some[0], Band.INTERACTIVE)
        pages = tuple(page for each in some for page in each)
        need = Need(pages, PAGE_BYTES // 2, PAGE_BYTES // 2, 1, layers=some)
        world.governor.request(search, need, world.granted[search].append, pytest.fail)
        (grant,) = world.granted[search]
        if before is not None:
            world.governor.finish(before)
            world.governor.close(before.turn.open_search)
        before = grant
    new = world.search(layers[4], Band.INTERACTIVE)
    assert not world.turn(new, layers[4])  # this one has to be brought, and its gate is shut
    assert world.governor.room.is_held_back(new)


def test_rows_gather_for_a_layer_that_has_to_displace_another_and_for_no_other():
    """As long as the copy has to pay for itself; what is there, or finds room, or is for nobody, goes at once."""
    world, (there, waits) = World(), (layer(), layer())
    governor = world.governor

    def gathers_s(pages: tuple[Page, ...], band: Band = Band.BATCH) -> float:
        search = world.search(pages, band)
        seconds = governor.room.gathering_s(search, [world.need(pages)])
        assert governor.room.lacks_room(search, [world.need(pages)]) == (seconds > 0.0)
        assert world.finished(search)
        return seconds

    assert gathers_s(there) == gathers_s(waits) == 0.0  # all is free
    runs = world.search(there)
    assert world.turn(runs, there)
    limits, copy_s = governor.working_set.limits, governor.speed.promotion_s(LAYER_PAGES * PAGE_BYTES)
    assert 0.0 < limits.promotion_factor * copy_s < limits.promotion_wait_s
    assert gathers_s(waits) == limits.promotion_factor * copy_s
    assert governor.room.gathering_s(runs, [world.need(there)]) == 0.0
    assert [gathers_s(pages) for pages in (there, layer(1), ())] == [0.0] * 3
    assert gathers_s(waits, Band.INTERACTIVE) == 0.0  # for a higher band the other makes room at once
    governor.speed.copy_bytes_per_s = 1.0
    assert gathers_s(waits) == limits.promotion_wait_s
    assert world.finished(runs)
    world.now = 1.0
    assert gathers_s(waits) == 0.0  # nobody is there for the other any more


def test_a_layer_stays_for_a_search_that_has_come_for_it_and_has_no_rows_yet():
    """The next search of a layer may begin long before its rows get through."""
    world, (there, waits) = World(), (layer(), layer())
    first, other = world.search(there), world.search(waits)
    assert world.turn(first, there)
    second = world.search(there)
    assert world.finished(first)
    world.now = 1.0  # nobody would be there for it any more
    assert not world.turn(other, waits)
    assert world.governor.room.lacks_room(world.search(waits), [world.need(waits)])
    assert world.turn(second, there)
    assert world.finished(second)
    world.now = 2.0
    world.governor.pump()
    assert len(world.granted[other]) == 1


def test_a_layer_that_passes_in_windows_gathers_no_more_once_it_is_under_way():
    world, whole = World(), layer(40)
    search = world.search(whole)
    assert world.turn(search, whole[8:16])
    assert world.governor.room.gathering_s(search, [world.need(whole[:8])]) == 0.0
    assert world.governor.room.gathering_s(world.search(whole), [world.need(whole[:8])]) > 0.0


def test_attention_gathers_for_the_rows_that_it_reads():
    """With given indices it reads no keys; with a search, the keys may be there and the KV rows not."""
    world, keys, rows, other = World(), layer(1), layer(), layer()
    governor, speed = world.governor, DeviceSpeed()
    first = world.search(keys)
    assert world.turn(first, rows, speed)
    given, both = world.need(rows, speed), [world.need(keys), world.need(rows, speed)]
    assert governor.room.gathering_s(world.search(keys), [given]) == 0.0
    assert governor.room.gathering_s(world.search(keys), both) == 0.0
    assert world.finished(first)
    world.now = 1.0
    call, busy = world.search(keys), world.search(other)
    assert world.turn(call, keys)
    assert world.turn(busy, other)
    assert governor.room.gathering_s(call, both) > 0.0
    assert governor.room.gathering_s(call, both[:1]) == 0.0


@pytest.mark.parametrize("cold", [1, 2, 3])
def test_layers_that_are_being_copied_leave_the_device_to_those_that_are_there(cold):
    world = World(pages=100)
    world.governor.speed.copy_bytes_per_s = LAYER_PAGES * PAGE_BYTES  # a copy: one second
    warm = layer()
    runs = world.search(warm)
    assert world.turn(runs, warm)
    world.governor.finish(world.granted[runs].pop(), 1e-3)
    coming = [world.turn(world.search(pages), pages) for pages in (layer() for _ in range(cold))]
    assert coming == [True, True, False][:cold]  # a copy is on its way, and the next
    assert world.turn(world.search(warm), warm) == (cold < 3)  # behind one that waits its own turn it waits too
    assert world.turn(world.search(warm), warm) == (cold < 3)
    assert not world.turn(world.search(warm), warm)  # one runs, one is ready


def test_a_search_whose_rows_wait_is_in_the_queue_once():
    """Nobody is let in behind more than may be queued, though those have no turns yet."""
    world, pages = World(), layer()
    search = world.search(pages)
    world.governor.scheduler.limits = QueueLimits(max_turns=1)
    assert world.governor.queued == 0
    search.rows_wait = True
    assert (world.governor.queued, world.governor.running) == (1, 0)
    with pytest.raises(QueueFullError) as caught:
        world.search(layer())
    assert caught.value.metadata["queued"] == "1"
    world.governor.device_lost()  # its turn waits
    assert not world.turn(search, pages)
    with pytest.raises(QueueFullError) as caught:
        world.search(layer())
    assert (caught.value.metadata["queued"], world.governor.queued) == ("1", 1)
