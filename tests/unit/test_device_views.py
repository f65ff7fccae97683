"""What the frontend tells the worker of pages: views, copies, extents."""

from __future__ import annotations

import asyncio
import time

import pytest

from streamindex_service.core.accounts import NO_QUOTA, Account
from streamindex_service.core.layers import Page
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool, PageSlot
from streamindex_service.core.residency import Residency
from streamindex_service.core.specs import RowKind
from streamindex_service.errors import DeviceMemoryError
from streamindex_service.frontend import views as views_module
from streamindex_service.frontend.device import DeviceWorker
from streamindex_service.frontend.host_memory import HostExtents
from streamindex_service.ipc.v1 import worker_pb2 as pb


class OneEpoch:
    """A governor that never loses anything."""

    epoch = 1
    in_doubt = 0

    def device_lost(self):
        pass

    def device_in_doubt(self):
        self.in_doubt += 1

    class residency:  # noqa: N801
        moves = 0


class Link:
    """Takes down what is sent."""

    alive = True

    def __init__(self):
        self.sent = []
        self.futures = []
        self._ids = iter(range(1, 1000))

    def next_id(self):
        return next(self._ids)

    def send(self, message, fd=None):
        self.sent.append(message)

    def request(self, message, work_id, fd=None):
        self.send(message, fd)
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]


class OneLink:
    def __init__(self):
        self.link = Link()


ACCOUNT = Account("owner", NO_QUOTA)


class Snapshot:
    pages = ()

    kind = RowKind.KEYS

    class spec:  # noqa: N801
        key_format, head_dim = 1, 16


def sent(device, kind):
    """Messages of a kind, in order."""
    return [getattr(message, kind) for message in device.supervisor.link.sent if message.HasField(kind)]


def defined(device):
    """What was told of views that were made, in order."""
    device.views.tell()  # as whoever submits a tile does
    return [view for message in sent(device, "define_views") for view in message.views]


def dropped(device):
    """Numbers of views of which the worker has heard that they are gone, in order."""
    device.views.tell()  # as the loop does
    return [view_id for message in sent(device, "drop_views") for view_id in message.view_ids]


async def test_a_view_serves_until_its_pages_move_and_goes_with_its_memory():
    device = DeviceWorker(HostExtents(lambda segment_id: None, Ledger("host", 1 << 30)), 2, time.monotonic)
    device.governor, device.supervisor = OneEpoch(), OneLink()
    device.governor.residency = residency = OneEpoch.residency()
    pages = tuple(Page(PageSlot(1, at), 1024, ACCOUNT, None, device=PageSlot(9, at)) for at in (0, 1024))
    view = device.view_of(None, Snapshot, pages, 300)
    assert device.view_of(view, Snapshot, pages, 300) is view
    residency.moves += 1  # somebody else's
    assert device.view_of(view, Snapshot, pages, 300) is view
    assert len(defined(device)) == 1
    pages[0].device = PageSlot(8, 0)
    residency.moves += 1
    second = device.view_of(view, Snapshot, pages, 300)
    assert [each.view_id for each in defined(device)] == [view.view_id, second.view_id]
    assert dropped(device) == [view.view_id]
    second.tiles = 1  # it is read: it stays until that has ended
    device.drop_extent(8)
    assert second.stale
    assert len(dropped(device)) == 1
    second.tiles = 0
    device.drop_view(second)
    device.drop_view(second)
    assert dropped(device) == [view.view_id, second.view_id]


def shown(*places):
    """A snapshot of a whole layer, and a device that has made nothing yet."""
    device = DeviceWorker(HostExtents(lambda segment_id: None, Ledger("host", 1 << 30)), 2, time.monotonic)
    device.governor, device.supervisor = OneEpoch(), OneLink()
    device.governor.residency = OneEpoch.residency()
    snapshot = Snapshot()
    snapshot.pages = tuple(Page(PageSlot(1, at), 1024, ACCOUNT, None, device=PageSlot(9, at)) for at in places)
    return device, snapshot


async def test_searches_of_a_layer_share_a_view_and_the_next_one_finds_it():
    device, snapshot = shown(0, 1024)
    first = device.view_of(None, snapshot, snapshot.pages, 300)
    assert device.view_of(None, snapshot, snapshot.pages, 300) is first  # of another search
    device.drop_view(first)
    device.drop_view(first)
    assert device.view_of(None, snapshot, snapshot.pages, 300) is first
    device.drop_view(first)
    assert len(defined(device)) == 1
    assert not dropped(device)
    snapshot.pages[0].device = PageSlot(9, 2048)
    device.governor.residency.moves += 1
    second = device.view_of(None, snapshot, snapshot.pages, 300)
    assert second is not first
    assert dropped(device) == [first.view_id]
    device.drop_view(second)
    device.drop_extent(9)  # what nobody uses must not hold memory that is given back
    assert dropped(device) == [first.view_id, second.view_id]
    assert not device.views._idle
    assert device.views._idle_pages == 0


async def test_a_page_that_moves_is_copied_anew_before_anything_reads_it_and_its_view_is_made_anew():
    extents = HostExtents(lambda segment_id: None, Ledger("host", 1 << 30))
    extents.make(1, 1 << 16)
    device = DeviceWorker(extents, 2, time.monotonic)
    device.governor, device.supervisor = OneEpoch(), OneLink()
    hbm = Ledger("hbm", 8192)
    residency = Residency(hbm, PagePool(hbm, 4096, device.make_extent, device.drop_extent), device.load)
    device.governor.residency = residency
    link = device.supervisor.link

    def layer(first, size, count):
        made = Snapshot()
        made.pages = tuple(Page(PageSlot(1, first + at * size), size, ACCOUNT, None) for at in range(count))
        return made

    stays, gone = layer(0, 1024, 2), [layer(8192 + at * 1024, 1024, 1) for at in range(6)]
    views = {}
    for each in (stays, *gone):
        assert residency.try_place(each.pages, 0)
        views[each] = device.view_of(None, each, each.pages, 256 * len(each.pages))
        residency.unpin(each.pages)
    assert len(defined(device)) == len(views)
    for future in link.futures:  # the copies are made
        future.set_result(pb.FromWorker())
    await asyncio.sleep(0)
    for each in (gone[0], gone[1], *gone[3:]):  # one is left in the second extent
        residency.let_go(each.pages)
        residency.drop(each.pages[0])
    residency.kept = lambda: [stays.pages, gone[2].pages]
    del link.sent[:]
    other = layer(32_768, 2048, 2)
    assert residency.try_place(other.pages, 0)
    kinds = [message.WhichOneof("message") for message in link.sent]
    assert kinds == ["drop_views", "free_extent", "allocate_extent"]  # nothing reads the extent that goes
    assert set(dropped(device)) == {views[each].view_id for each in gone[2:]}
    assert [gone[2].pages[0].copies, *(page.copies for page in stays.pages)] == [1, 0, 0]
    del link.sent[:]
    # Whoever is next sends the copies first, of what has moved too, though the view is of something else.
    assert device.view_of(views[stays], stays, stays.pages, 512) is views[stays]
    assert [message.WhichOneof("message") for message in link.sent if not message.HasField("map_segment")] == [
        "load_pages",
        "load_pages",
    ]
    first, second = sent(device, "load_pages")
    place = gone[2].pages[0].device
    assert (first.page_bytes, list(first.extent_ids), list(first.extent_offsets)) == (
        1024, [place.extent_id], [place.offset_bytes],
    )  # fmt: skip
    assert list(first.segment_offsets) == [gone[2].pages[0].host.offset_bytes]
    assert place.extent_id == stays.pages[0].device.extent_id
    assert (second.page_bytes, len(second.extent_ids)) == (2048, 2)
    assert device.view_of(None, gone[2], gone[2].pages, 256) is not views[gone[2]]
    (made,) = defined(device)
    assert (list(made.extent_ids), list(made.extent_offsets)) == ([place.extent_id], [place.offset_bytes])


@pytest.mark.parametrize(("name", "most"), [("_MOST_IDLE_PAGES", 3), ("_MOST_IDLE_VIEWS", 1)])
async def test_views_without_a_search_are_bounded_and_a_window_s_is_not_kept(monkeypatch, name, most):
    monkeypatch.setattr(views_module, name, most)
    device, one = shown(0, 1024)
    other = Snapshot()
    other.pages = one.pages[:1] + one.pages[1:]  # another layer of the same pages
    views = [device.view_of(None, each, each.pages, 300) for each in (one, other)]
    for view in views:
        device.drop_view(view)
    assert dropped(device) == [views[0].view_id]
    window = device.view_of(None, one, one.pages[:1], 256)
    device.drop_view(window)
    assert dropped(device)[-1] == window.view_id


async def test_pages_that_lost_their_place_before_they_were_copied():
    """A search is let in, cancelled before it says what it reads, and its pages are evicted and freed."""
    extents = HostExtents(lambda segment_id: None, Ledger("host", 1 << 30))
    extents.make(1, 8192)
    device = DeviceWorker(extents, 2, time.monotonic)
    device.governor = OneEpoch()
    device.supervisor = OneLink()
    gone, moved, kept = (
        Page(PageSlot(1, offset), 1024, ACCOUNT, None, device=PageSlot(9, offset)) for offset in (0, 1024, 2048)
    )
    freed = Page(
        PageSlot(2, 0), 1024, ACCOUNT, None, device=PageSlot(9, 4096)
    )  # its extent in the host is gone as well
    for page in (gone, moved, freed, kept):
        device.load(page)
    gone.device = freed.device = None
    moved.device = PageSlot(9, 0)

    device.view_of(None, Snapshot, (moved, kept), 1)
    loads = [message.load_pages for message in device.supervisor.link.sent if message.HasField("load_pages")]
    copied = [
        (start, to) for load in loads for start, to in zip(load.segment_offsets, load.extent_offsets, strict=True)
    ]
    assert copied == [(1024, 0), (2048, 2048)]
    extents.drop(1)


async def test_views_of_a_step_are_told_and_forgotten_together(monkeypatch):
    """In the order in which they were made, no more to a message than it holds, and before they are gone."""
    monkeypatch.setattr(views_module, "PAGES_PER_MESSAGE", 4)
    monkeypatch.setattr(views_module, "_VIEWS_PER_MESSAGE", 3)
    monkeypatch.setattr(views_module, "_NUMBERS_PER_MESSAGE", 4)
    device, whole = shown(*range(0, 16_384, 1024))
    link = device.supervisor.link
    counts = [3, 1, 1, 0, 0, 0, 9, 4, 2]
    made = [device.view_of(None, whole, whole.pages[:count], 256 * count) for count in counts]
    untold = [view for view in made if view.defined is None]
    assert untold == made[-1:]  # two of its pages wait for more
    assert len(link.futures) == 5
    assert defined(device)[-1].view_id == made[-1].view_id
    messages = sent(device, "define_views")
    assert [[(len(each.extent_ids), each.complete) for each in message.views] for message in messages] == [
        [(3, True), (1, True)], [(1, True), (0, True), (0, True)], [(0, True), (4, False)], [(4, False)],
        [(1, True)], [(4, True)], [(2, True)],
    ]  # fmt: skip
    assert [view.defined for view in made] == [link.futures[at] for at in (0, 0, 1, 1, 1, 2, 3, 4, 5)]
    assert [message.operation_id > 0 for message in messages] == [True, True, True, False, True, True, True]
    assert list(device.views) != []
    del link.sent[:]
    for view in made:
        device.drop_view(view)
    assert not link.sent  # more may go in this turn of the loop
    await asyncio.sleep(0)
    assert [len(each.view_ids) for each in sent(device, "drop_views")] == [4, 4, 1]
    assert dropped(device) == [view.view_id for view in made]
    assert list(device.views) == []
    views = [device.view_of(None, whole, whole.pages[:1], 256) for _ in range(2)]
    device.drop_view(views[0])  # its tile was never submitted
    await asyncio.sleep(0)
    assert [message.WhichOneof("message") for message in link.sent[3:]] == ["define_views", "drop_views"]
    device.view_of(None, whole, whole.pages[:3], 768)
    device.drop_view(views[1])
    device.on_down(())
    await asyncio.sleep(0)
    assert len(link.sent) == 5  # what the worker was to hear it need not
    assert all(view.stale for view in views)
    device.supervisor.link = Link()  # nor does the next one
    view = device.view_of(None, whole, whole.pages[:2], 512)
    assert not device.supervisor.link.sent  # nothing else is waiting that would fill a message
    assert [each.view_id for each in defined(device)] == [view.view_id]
    assert dropped(device) == []


async def test_views_go_before_their_memory_when_the_device_is_in_doubt():
    """As when one of them could not be made: all that is on the device is forgotten."""
    device, snapshot = shown(0, 1024)
    device.make_extent(9, 1 << 16)
    view = device.view_of(None, snapshot, snapshot.pages, 300)
    assert len(defined(device)) == 1
    link = device.supervisor.link
    del link.sent[:]
    view.defined.set_exception(DeviceMemoryError("no memory"))
    await asyncio.sleep(0)
    assert [message.WhichOneof("message") for message in link.sent] == ["drop_views", "free_extent"]
    assert device.governor.in_doubt == 1
    assert view.stale


async def test_a_view_of_many_pages_comes_in_several_messages(monkeypatch):
    monkeypatch.setattr(views_module, "PAGES_PER_MESSAGE", 2)
    device = DeviceWorker(HostExtents(lambda number: None, Ledger("host", 0)), 2, time.monotonic)
    device.supervisor, device.governor = OneLink(), OneEpoch()
    places = [PageSlot(7 + number // 3, 4096 * number) for number in range(5)]
    pages = [Page(PageSlot(1, 0), 4096, ACCOUNT, None, device=place) for place in places]
    device.view_of(None, Snapshot(), pages, 1234)
    messages = defined(device)
    assert [list(zip(each.extent_ids, each.extent_offsets, strict=True)) for each in messages] == [
        places[:2], places[2:4], places[4:],
    ]  # fmt: skip
    assert [each.complete for each in messages] == [False, False, True]
    assert {(each.view_id, each.key_format, each.head_dim, each.length_keys) for each in messages} == {(1, 1, 16, 1234)}
    assert len(device.supervisor.link.futures) == 1  # the last is answered
