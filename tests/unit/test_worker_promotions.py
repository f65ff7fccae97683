"""Which copies of pages a tile waits for: those into memory that it reads, and no others."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.worker.device import Device
from streamindex_service.worker.key_store import KeyStore
from streamindex_service.worker.promotions import MemoryRanges, Promotions, view_ids_of

PAGE = 64
NUMBERS = itertools.count(1)  # of views, never used twice


def memory(*pages: int) -> MemoryRanges:
    return MemoryRanges.of(PAGE * np.array(pages, dtype=np.int64), PAGE)


class FakeEvent:
    """Comes when the test says so."""

    def __init__(self) -> None:
        self.made = False

    def query(self) -> bool:
        return self.made


@pytest.fixture
def promotions():
    return Promotions()


def awaited(promotions, *views: MemoryRanges):
    numbered = {next(NUMBERS): view for view in views}
    return promotions.awaited(numbered, numbered.__getitem__)


def test_pages_that_follow_each_other_are_one_range():
    ranges = memory(7, 3, 4, 9, 8, 3)
    assert (ranges.starts // PAGE).tolist() == [3, 7]
    assert (ranges.stops // PAGE).tolist() == [5, 10]
    uneven = MemoryRanges.of(np.array([100, 0, 20]), np.array([7, 20, 5]))
    assert (uneven.starts.tolist(), uneven.stops.tolist()) == ([0, 100], [25, 107])


@pytest.mark.parametrize("seed", range(20))
def test_ranges_overlap_where_they_have_a_page_in_common(seed):
    random = np.random.default_rng(seed)
    for _ in range(50):
        one, other = (random.choice(200, random.integers(0, 60), replace=False) for _ in range(2))
        wanted = bool(set(one.tolist()) & set(other.tolist()))
        assert memory(*one).overlaps(memory(*other)) is wanted
        assert memory(*other).overlaps(memory(*one)) is wanted


def test_a_range_within_another_overlaps_it():
    """A copy is as long as the pages in it; a view may show one in its middle."""
    copy, page = MemoryRanges.of(np.array([0]), np.array([10 * PAGE])), memory(5)
    assert copy.overlaps(page)
    assert page.overlaps(copy)
    assert not copy.overlaps(memory(10))  # they touch, no more


def test_a_tile_waits_for_pages_that_it_reads(promotions):
    event = FakeEvent()
    promotions.add(event, memory(4, 5, 9), [1])
    assert awaited(promotions, memory(1, 2, 3), memory(6, 7, 8), memory()) is None
    assert awaited(promotions, memory(1, 2, 3), memory(8, 9)) is event
    event.made = True
    assert awaited(promotions, memory(9)) is None
    assert len(promotions) == 0


def test_of_several_copies_the_last_one_counts(promotions):
    """They are made one after another: into other pages of a view, or into the same page twice."""
    events = [FakeEvent() for _ in range(4)]
    for event, pages in zip(events, ((1, 2), (3,), (2,), (8,)), strict=True):
        promotions.add(event, memory(*pages), [1])
    assert awaited(promotions, memory(1)) is events[0]
    assert awaited(promotions, memory(1, 3)) is events[1]
    assert awaited(promotions, memory(2), memory(3)) is events[2]
    events[0].made = True
    assert awaited(promotions, memory(1)) is None
    assert awaited(promotions, memory(2)) is events[2]  # what was there before does not count
    assert len(promotions) == 3


def test_nobody_looks_at_views_while_no_copy_is_pending(promotions):
    def looked(view_id):
        raise AssertionError("a view was looked at")

    assert promotions.awaited([1], looked) is None
    event = FakeEvent()
    promotions.add(event, memory(1), [1])
    with pytest.raises(AssertionError, match="looked at"):
        promotions.awaited([1], looked)
    event.made = True
    assert promotions.awaited([1], looked) is None


def test_a_view_is_compared_once_with_a_copy(promotions):
    """Steps of hundreds of sequences come again and again while a copy goes on."""
    event, asked = FakeEvent(), []

    def memory_of(view_id):
        asked.append(view_id)
        return memory(view_id)

    promotions.add(event, memory(5), [1])
    assert [promotions.awaited([3, 4], memory_of) for _ in range(3)] == [None] * 3
    assert [promotions.awaited([4, 5], memory_of) for _ in range(3)] == [event] * 3
    assert asked == [3, 4, 5]


def test_a_segment_is_read_until_its_last_copy_is_made(promotions):
    events = [FakeEvent() for _ in range(3)]
    for event, segments in zip(events, ((1, 2), (2, 2), (3,)), strict=True):
        promotions.add(event, memory(1), segments)
    assert [promotions.reading(segment) for segment in (1, 2, 3, 4)] == [*events, None]
    events[0].made = True
    assert [promotions.reading(segment) for segment in (1, 2)] == [None, events[1]]


def test_copies_that_were_made_are_forgotten_though_no_tile_comes(promotions):
    for _ in range(100):
        event = FakeEvent()
        promotions.add(event, memory(1), [1])
        event.made = True
    assert len(promotions) == 1


def test_views_lie_where_their_pages_do():
    """Keys with scales beside them, and KV rows; whole pages, for those are copied. A view that is gone, nowhere."""
    store = KeyStore(Device(torch.device("cpu"), "cpu", 1 << 30))
    store.extents.allocate(1, 1 << 20)
    store.extents.allocate(2, 1 << 20)
    bases = {extent: store.bytes_at(extent, 0, 1).data_ptr() for extent in (1, 2)}
    sizes = {}
    for view_id, kinds, page_bytes in (
        (10, {"key_format": 4, "head_dim": 128}, 256 * 132),
        (11, {"key_format": 1, "head_dim": 64}, 256 * 128),
        (12, {"kv_format": 1, "head_dim": 64}, 256 * 128),
    ):
        places = [(2, 3 * page_bytes), (1, 0), (2, 4 * page_bytes)]
        view = pb.DefineView(
            view_id=view_id, length_keys=700, complete=True, **kinds,
            extent_ids=[extent for extent, _ in places], extent_offsets=[start for _, start in places],
        )  # fmt: skip
        store.define_views(pb.DefineViews(views=[view]))
        wanted = sorted(((bases[1], page_bytes), (bases[2] + 3 * page_bytes, 2 * page_bytes)))
        found = store.memory_of(view_id)
        sizes[view_id] = list(zip(found.starts.tolist(), (found.stops - found.starts).tolist(), strict=True))
        assert sizes[view_id] == wanted
        store.drop_view(view_id)
        assert not len(store.memory_of(view_id).starts)


def test_a_tile_reads_all_its_views():
    search = pb.SearchTile(sequences=[pb.SearchSequence(view_id=3), pb.SearchSequence(view_id=5)])
    assert list(view_ids_of(search)) == [3, 5]
    attend = pb.AttendTile(sequences=[pb.AttendSequence(view_id=3, window_view_id=4), pb.AttendSequence(view_id=5)])
    assert list(view_ids_of(attend)) == [3, 4, 5]
