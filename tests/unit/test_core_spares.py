"""Spare memory: found again, bounded, and never in the way."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool
from streamindex_service.core.spares import SpareLimits, Spares
from streamindex_service.errors import HostMemoryError
from streamindex_service.frontend.host_memory import BlockPool, HostExtents, IngressBudget
from streamindex_service.frontend.segment_closer import SegmentCloser
from streamindex_service.ipc.segments import Segment


class Pool:
    """A page pool over memory with spares, as the service has it; `pieces` is what the system has given."""

    def __init__(self, limit: int, spare: int, extent: int = 1024, pieces: int = 1000, idle_s: float = 1e9) -> None:
        self.limits = SpareLimits(spare, pieces, idle_s)
        self.now_s = 0.0
        self.ledger = Ledger("x", limit)
        self.spares: Spares[int] = Spares(self.ledger, self.limits, self._drop, lambda: self.now_s)
        self.pool = PagePool(self.ledger, extent, self._make, self._free)
        self.pieces: dict[int, int] = {}  # piece -> bytes
        self.of_extent: dict[int, int] = {}
        self.made = 0

    def _make(self, extent_id: int, size: int) -> None:
        piece = self.spares.take(size)
        if piece is None:
            self.spares.make_room()
            piece = self.made = self.made + 1
            self.pieces[piece] = size
        assert piece not in self.of_extent.values()
        self.of_extent[extent_id] = piece
        self.check()

    def _free(self, extent_id: int) -> None:
        piece = self.of_extent.pop(extent_id)
        self.spares.keep(piece, self.pieces[piece])

    def _drop(self, piece: int) -> None:
        assert piece not in self.of_extent.values()
        del self.pieces[piece]

    def check(self) -> None:
        ledger = self.ledger
        assert ledger.reserved_bytes == sum(self.pieces[piece] for piece in self.of_extent.values())
        assert ledger.reserved_bytes + ledger.spare_bytes == sum(self.pieces.values()) <= ledger.limit_bytes
        assert 0 <= ledger.spare_bytes <= self.limits.size_bytes
        assert len(self.spares) == len(self.pieces) - len(self.of_extent) <= self.limits.pieces


@pytest.mark.parametrize("seed", range(20))
def test_random_histories(seed):
    random = np.random.default_rng(seed)
    limit, spare, pieces = (int(random.integers(*span)) for span in ((3_000, 40_000), (0, 12_000), (1, 6)))
    world = Pool(limit, spare, extent=4096, pieces=pieces, idle_s=200.0)
    pages: list = []
    for step in range(1500):
        if random.random() < 0.5 + 0.3 * np.sin(step / 100):
            size = int(random.choice([512, 1024, 1280]))
            room = world.pool.room(size)
            slot = world.pool.try_allocate(size)
            assert (slot is None) == (room == 0), "spare memory refuses nothing"
            pages += [slot] if slot is not None else []
        elif pages:
            world.pool.free(pages.pop(int(random.integers(len(pages)))))
        world.now_s += 1.0
        if not step % 50:
            world.spares.expire()
        world.check()
    for slot in pages:
        world.pool.free(slot)
    assert world.ledger.reserved_bytes == 0
    world.check()


def test_a_freed_piece_is_taken_again_before_a_new_one_is_made():
    world = Pool(limit=10_000, spare=2048)
    first = world.pool.try_allocate(512)
    world.pool.free(first)
    assert (world.ledger.reserved_bytes, world.ledger.spare_bytes) == (0, 1024)
    second = world.pool.try_allocate(256)  # pages of another size, as long in all
    assert second.extent_id != first.extent_id
    assert (world.ledger.reserved_bytes, world.ledger.spare_bytes, world.made) == (1024, 0, 1)


def test_the_oldest_goes_first():
    world = Pool(limit=10_000, spare=2048)
    for slot in [world.pool.try_allocate(1024) for _ in range(4)]:
        world.pool.free(slot)
    assert set(world.pieces) == {3, 4}


def test_the_whole_budget_can_be_reserved_whatever_is_spare():
    world = Pool(limit=4096, spare=4096)
    for slot in [world.pool.try_allocate(1024) for _ in range(4)]:
        world.pool.free(slot)
    assert (world.ledger.spare_bytes, world.ledger.free_bytes) == (4096, 4096)
    assert None not in [world.pool.try_allocate(640) for _ in range(6)]  # no spare piece has their length


def test_the_number_of_pieces_is_bounded_whatever_their_length():
    world = Pool(limit=10_000, spare=10_000, pieces=3)
    for slot in [world.pool.try_allocate(1024) for _ in range(5)]:
        world.pool.free(slot)
    assert (set(world.pieces), len(world.spares)) == ({3, 4, 5}, 3)


def test_what_nobody_takes_goes_after_a_time():
    world = Pool(limit=10_000, spare=10_000, idle_s=60.0)
    slots = [world.pool.try_allocate(1024) for _ in range(4)]
    for slot in slots[:2]:
        world.pool.free(slot)
    world.now_s = 40.0
    world.pool.free(world.pool.try_allocate(1024))  # the newest, used again, is kept anew
    world.pool.free(slots[2])
    for now_s, left in ((59.9, {1, 2, 3, 4}), (60.0, {2, 3, 4}), (99.9, {2, 3, 4}), (100.0, {4})):
        world.now_s = now_s
        world.spares.expire()
        world.check()
        assert set(world.pieces) == left
    assert (world.ledger.spare_bytes, world.ledger.reserved_bytes) == (0, 1024)


# --- segments ---

ROOMY = SpareLimits(1 << 20, 1000, 60.0)


def test_segments_are_dropped_and_told_only_when_they_really_go():
    told: list[int] = []
    ledger = Ledger("host", 1 << 20)
    extents = HostExtents(told.append, ledger, SpareLimits(8192, 1000, 60.0))
    extents.make(1, 8192)
    segment = extents._segments[1]
    extents.drop(1)
    assert told == []
    extents.make(2, 8192)
    assert extents._segments[2] is segment
    extents.make(3, 8192)
    extents.drop(2)
    extents.drop(3)
    assert told == [segment.segment_id]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(segment.segment.fd)
    assert ledger.spare_bytes == 8192


def test_spare_segments_go_before_the_system_is_said_to_have_no_more(monkeypatch):
    told: list[int] = []
    extents = HostExtents(told.append, Ledger("host", 1 << 20), ROOMY)
    extents.make(1, 4096)
    extents.drop(1)
    create = os.memfd_create

    def scarce(*arguments):
        if not told:
            raise OSError("no descriptors")
        return create(*arguments)

    monkeypatch.setattr(os, "memfd_create", scarce)
    extents.make(2, 8192)
    assert len(told) == 1
    told.clear()
    with pytest.raises(HostMemoryError):
        extents.make(3, 8192)


class Scarce:
    """A system that has memory for a write only once enough segments are gone."""

    def __init__(self, monkeypatch, needed: int, code: int = errno.ENOMEM) -> None:
        self.told: list[int] = []
        self.tries = 0
        write = os.pwritev

        def scarce(*arguments):
            self.tries += 1
            if len(self.told) < needed:
                raise OSError(code, "no memory")
            return write(*arguments)

        monkeypatch.setattr(os, "pwritev", scarce)

    def extents(self) -> HostExtents:
        extents = HostExtents(self.told.append, Ledger("host", 1 << 20), ROOMY, loop=asyncio.get_running_loop())
        for extent_id in (1, 2, 3):
            extents.make(extent_id, 4096)
        extents.drop(1)
        extents.drop(2)
        return extents


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOSPC])
async def test_a_write_for_which_there_is_no_memory_has_what_is_spare(monkeypatch, code):
    system = Scarce(monkeypatch, needed=2, code=code)
    extents = system.extents()
    (stretch,) = await asyncio.to_thread(extents.write, [(3, 16, memoryview(b"rows"))])
    assert stretch.tobytes() == b"rows"
    assert (len(system.told), system.tries) == (2, 2)


async def test_a_write_on_the_loop_has_what_is_spare_and_does_not_wait_for_the_loop(monkeypatch):
    """As the rows are written that an item of a batch appends."""
    system = Scarce(monkeypatch, needed=2)
    extents = system.extents()
    (stretch,) = extents.write([(3, 16, memoryview(b"rows"))])
    assert stretch.tobytes() == b"rows"
    assert (len(system.told), system.tries) == (2, 2)


@pytest.mark.parametrize(("code", "dropped", "tries"), [(errno.ENOMEM, 2, 2), (errno.EIO, 0, 1)])
async def test_a_write_that_fails_all_the_same_is_refused(monkeypatch, code, dropped, tries):
    system = Scarce(monkeypatch, needed=9, code=code)
    extents = system.extents()
    with pytest.raises(HostMemoryError):
        await asyncio.to_thread(extents.write, [(3, 0, memoryview(b"rows"))])
    assert (len(system.told), system.tries) == (dropped, tries)


async def test_spare_segments_go_for_a_search(monkeypatch):
    system = Scarce(monkeypatch, needed=0)
    extents = system.extents()
    create = os.memfd_create

    def scarce(*arguments):
        if not system.told:
            raise OSError(errno.EMFILE, "no descriptors")
        return create(*arguments)

    monkeypatch.setattr(os, "memfd_create", scarce)
    ingress = Ledger("ingress", 1 << 20)
    blocks = BlockPool(IngressBudget(ingress), 4096, 8192, extents.drop_spares)
    await blocks.acquire()
    assert (len(system.told), ingress.reserved_bytes) == (2, 4096)
    system.told.clear()
    await blocks.acquire()
    with pytest.raises(HostMemoryError):
        await blocks.acquire()
    assert ingress.reserved_bytes == 2 * 4096


# --- who takes ingress memory ---


async def test_who_can_wait_comes_after_all_others():
    """Asked anew with all that is given back: who no longer can is not behind those who came later."""
    budget, order = IngressBudget(Ledger("ingress", 2)), []
    await budget.reserve(2)
    patient = {"first": True, "second": True}

    async def take(name):
        await budget.reserve(1, lambda: patient.get(name, False))
        order.append(name)

    tasks = [asyncio.create_task(take(name)) for name in ("first", "second", "third", "fourth")]
    await asyncio.sleep(0)
    for given_back, expected in enumerate(("third", "second", "fourth", "first"), 1):
        budget.release(1)
        await asyncio.wait_for(asyncio.shield(tasks[["first", "second", "third", "fourth"].index(expected)]), 10)
        assert len(order) == given_back
        patient["second"] = False
    assert order == ["third", "second", "fourth", "first"]
    assert budget.ledger.reserved_bytes == 2


async def test_who_can_wait_and_gives_up_is_in_nobodys_way():
    budget = IngressBudget(Ledger("ingress", 1))
    await budget.reserve(1)
    waiting = asyncio.create_task(budget.reserve(1, lambda: True))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    budget.release(1)
    await asyncio.wait_for(budget.reserve(1), 10)
    assert budget.ledger.reserved_bytes == 1


# --- closing on a thread ---


class SlowClose:
    """Segments that take until `go_on` to close, and the threads that close them."""

    def __init__(self, monkeypatch) -> None:
        self.go_on, self.threads = threading.Event(), []
        close = Segment.close

        def slow(segment):
            self.threads.append(threading.current_thread().name)
            assert self.go_on.wait(60)
            close(segment)

        monkeypatch.setattr(Segment, "close", slow)


@pytest.fixture
def closer():
    closer = SegmentCloser()
    yield closer
    closer.stop()


def test_segments_are_closed_on_another_thread_and_their_memory_goes(monkeypatch, closer):
    slow = SlowClose(monkeypatch)
    extents = HostExtents(lambda _: None, Ledger("host", 1 << 20), closer=closer)
    extents.make(1, 8192)
    mapping = weakref.ref(extents._segments[1].segment)
    extents.drop(1)
    assert closer.pending_bytes == 8192  # it came back while the segment is still there
    slow.go_on.set()
    closer.settle()
    assert (closer.pending_bytes, mapping()) == (0, None)
    assert all(name.startswith("unmap") for name in slow.threads)


def test_memory_that_is_needed_at_once_is_waited_for(monkeypatch, closer):
    slow = SlowClose(monkeypatch)
    ledger = Ledger("host", 3 * 4096)
    extents = HostExtents(lambda _: None, ledger, closer=closer)
    pool = PagePool(ledger, 4096, extents.make, extents.drop)
    pages = [pool.try_allocate(4096) for _ in range(2)]
    pool.free(pages.pop())
    pages.append(pool.try_allocate(4096))  # the third part of the budget was never touched
    assert closer.pending_bytes == 4096
    with ThreadPoolExecutor(1) as pool_thread:
        third = pool_thread.submit(pool.try_allocate, 4096)
        with pytest.raises(TimeoutError):
            third.result(0.2)
        slow.go_on.set()
        assert third.result(60) is not None
    assert closer.pending_bytes == 0
