"""Views: pages of layers, as the worker knows them and tiles name them.

A decode step makes a few for each of its sequences, and they go when it has ended. Each message of its own would cost
both processes more than what is in it: those that are made while a tile is put together are told in one message, and
those that go in one turn of the loop in another.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from streamindex_service.core.layers import Page, Snapshot
from streamindex_service.core.pages import PageSlot
from streamindex_service.core.specs import RowKind
from streamindex_service.ipc.link import PAGES_PER_MESSAGE, Fields
from streamindex_service.ipc.supervisor import WorkerLink
from streamindex_service.ipc.v1 import worker_pb2 as pb

# Of views that no search uses: each keeps a page table on the device, and numbers of its pages here and in the worker.
_MOST_IDLE_PAGES = 16_384
_MOST_IDLE_VIEWS = 1024
# Of one message, beside PAGES_PER_MESSAGE pages of all: a view without its pages takes less than 64 bytes and a page
# 20, which comes to 72 KiB of the 128 that a packet may have. Numbers of views that go take less than 16 bytes each.
_VIEWS_PER_MESSAGE = 512
_NUMBERS_PER_MESSAGE = 2048

Answer = asyncio.Future[pb.FromWorker]


@dataclass(slots=True, eq=False)
class View:
    """Pages of a snapshot as one worker knows them.

    `moves` is what the governor's residency counted when it was made; `extents` are what its pages lie in. `defined`
    is the worker's answer, None until it is told. While tiles of it are with the worker it stays, `stale` or not.
    `is_whole`: all pages of a layer, so that other searches have a use for it; `users` are those that have it now.
    """

    view_id: int
    worker: WorkerLink
    pages: Sequence[Page]
    places: list[PageSlot | None]
    extents: frozenset[int]
    moves: int
    is_whole: bool
    defined: Answer | None = None
    users: int = 1
    tiles: int = 0
    stale: bool = False


class DeviceViews:
    """The views of one worker at a time.

    moves: how often pages have lost their place so far. watch: called with every answer that the worker owes.
    """

    def __init__(self, moves: Callable[[], int], watch: Callable[[Answer], None]) -> None:
        self._moves = moves
        self._watch = watch
        self._views: set[View] = set()
        self._whole: dict[int, View] = {}  # of them, those of whole layers that are not stale, by identity of the pages
        self._idle: OrderedDict[View, None] = OrderedDict()  # of these, those without users, unused for longest first
        self._idle_pages = 0
        # What the worker has not been told yet: `DefineView`s, the pages in them, the views whose last part is among
        # them, and views that have gone.
        self._parts: list[Fields] = []
        self._part_pages = 0
        self._made: list[View] = []
        self._gone: list[View] = []

    def __iter__(self) -> Iterator[View]:
        return iter(self._views)

    def of(
        self, view: View | None, worker: WorkerLink, snapshot: Snapshot, pages: Sequence[Page], length_keys: int
    ) -> View:
        """A view of resident pages: this one if it still is right, or another search's of the same pages, or a new one,
        of which the worker hears with `tell`."""
        if view is not None:
            if self._serves(view, worker):
                return view
            self._retire(view)
        known = self._whole.get(id(pages))
        if known is not None:
            if self._serves(known, worker):
                self._use(known)
                return known
            self._retire(known)
        return self._make(worker, snapshot, pages, length_keys)

    def drop(self, view: View) -> None:
        """A search has no more use for it. A view of a whole layer stays for the next search of it, as long as it is
        right."""
        if not view.stale:
            view.users -= 1
        if view.stale or (view.users == 0 and not view.is_whole):
            self._retire(view)
        elif view.users == 0:
            self._idle[view] = None
            self._idle_pages += len(view.pages)
            while self._idle_pages > _MOST_IDLE_PAGES or len(self._idle) > _MOST_IDLE_VIEWS:
                self._retire(next(iter(self._idle)))

    def tile_done(self, views: Sequence[View]) -> None:
        """A tile is done with these."""
        for view in views:
            view.tiles -= 1
            if view.stale:
                self._retire(view)

    def retire_those_in(self, extent_id: int) -> None:
        """What reads this extent goes, and the worker has heard of it when this returns."""
        for view in [view for view in self._views if extent_id in view.extents]:
            self._retire(view)
        self.tell()

    def retire_all(self) -> None:
        """Likewise everything."""
        for view in list(self._views):
            self._retire(view)
        self.tell()

    def forget(self) -> None:
        """The worker is gone."""
        for view in self._views:
            view.stale = True
        for some in (self._views, self._whole, self._idle, self._parts, self._made, self._gone):
            some.clear()
        self._idle_pages = self._part_pages = 0

    def tell(self) -> None:
        """Let the worker hear of the views that were made, and then of those that have gone."""
        if self._made:
            self._tell_made(self._made[0].worker)
        gone, self._gone = self._gone, []
        for first in range(0, len(gone), _NUMBERS_PER_MESSAGE):
            some = gone[first : first + _NUMBERS_PER_MESSAGE]
            some[0].worker.send(pb.ToWorker(drop_views={"view_ids": [view.view_id for view in some]}))

    def _tell_made(self, worker: WorkerLink) -> None:
        """What was put together so far: it is no more than a message holds."""
        made, parts = self._made, self._parts
        self._made, self._parts, self._part_pages = [], [], 0
        # Without an answer go messages of one part alone, of a view that has more: it has as many pages as a message
        # holds, and nothing is made of it yet that could fail.
        operation = worker.next_id() if made else 0
        message = pb.ToWorker(define_views={"operation_id": operation, "views": parts})
        if not made:
            worker.send(message)
            return
        answer = worker.request(message, operation)
        for view in made:
            view.defined = answer
        self._watch(answer)

    def _serves(self, view: View, worker: WorkerLink) -> bool:
        """Whether its pages are where it says. Nobody looks at each while none has lost its place."""
        if view.stale or view.worker is not worker:
            return False
        moves = self._moves()
        if view.moves != moves:
            if view.places != [page.device for page in view.pages]:
                return False
            view.moves = moves
        return True

    def _use(self, view: View) -> None:
        view.users += 1
        if view in self._idle:
            del self._idle[view]
            self._idle_pages -= len(view.pages)

    def _make(self, worker: WorkerLink, snapshot: Snapshot, pages: Sequence[Page], length_keys: int) -> View:
        places = [page.device for page in pages]
        extents = frozenset(place.extent_id for place in places if place is not None)
        # all empty layers have the same pages, whatever their keys would be
        is_whole = bool(pages) and pages is snapshot.pages
        view = View(worker.next_id(), worker, pages, places, extents, self._moves(), is_whole)
        self._define(view, snapshot, length_keys)
        self._views.add(view)
        if is_whole:
            self._whole[id(pages)] = view
        return view

    def _define(self, view: View, snapshot: Snapshot, length_keys: int) -> None:
        """Put together what the worker has to know."""
        kv, places = snapshot.spec.kv if snapshot.kind is not RowKind.KEYS else None, view.places
        count = max(1, -(-len(places) // PAGES_PER_MESSAGE))
        for part in range(count):
            some = places[part * PAGES_PER_MESSAGE : (part + 1) * PAGES_PER_MESSAGE]
            if self._part_pages + len(some) > PAGES_PER_MESSAGE or len(self._parts) == _VIEWS_PER_MESSAGE:
                self._tell_made(view.worker)
            extent_ids = [slot.extent_id for slot in some if slot is not None]
            assert len(extent_ids) == len(some), "a pinned page is not on the device"
            fields: Fields = {
                "view_id": view.view_id,
                "key_format": int(snapshot.spec.key_format) if kv is None else 0,
                "kv_format": 0 if kv is None else int(kv.kv_format),
                "head_dim": snapshot.spec.head_dim if kv is None else kv.key_dim,
                "length_keys": length_keys,
                "extent_ids": extent_ids,
                "extent_offsets": [slot.offset_bytes for slot in some if slot is not None],
                "complete": part == count - 1,
            }
            self._parts.append(fields)
            self._part_pages += len(some)
        self._made.append(view)

    def _retire(self, view: View) -> None:
        """No more tiles of it; the worker forgets it once it has none."""
        view.stale = True
        if self._whole.get(id(view.pages)) is view:
            del self._whole[id(view.pages)]
        if view in self._idle:
            del self._idle[view]
            self._idle_pages -= len(view.pages)
        if view.tiles == 0 and view in self._views:
            self._views.discard(view)
            if not self._gone:
                asyncio.get_running_loop().call_soon(self.tell)
            self._gone.append(view)
