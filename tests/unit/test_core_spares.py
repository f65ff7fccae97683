"""Spare memory: found again, bounded, and never in the way."""

from __future__ import annotations

import os

import numpy as np
import pytest

from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool
from streamindex_service.core.spares import Spares
from streamindex_service.errors import HostMemoryError
from streamindex_service.frontend.host_memory import HostExtents


class Pool:
    """A page pool over memory with spares, as the service has it; `pieces` is what the system has given."""

    def __init__(self, limit: int, spare: int, extent: int = 1024) -> None:
        self.spare = spare
        self.ledger = Ledger("x", limit)
        self.spares: Spares[int] = Spares(self.ledger, spare, self._drop)
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
        assert 0 <= ledger.spare_bytes <= self.spare


@pytest.mark.parametrize("seed", range(20))
def test_random_histories(seed):
    random = np.random.default_rng(seed)
    world = Pool(limit=int(random.integers(3_000, 40_000)), spare=int(random.integers(0, 12_000)), extent=4096)
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


# --- segments ---


def test_segments_are_dropped_and_told_only_when_they_really_go():
    told: list[int] = []
    ledger = Ledger("host", 1 << 20)
    extents = HostExtents(told.append, ledger, 8192)
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
    extents = HostExtents(told.append, Ledger("host", 1 << 20), 1 << 20)
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
