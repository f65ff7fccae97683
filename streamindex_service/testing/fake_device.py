"""A device of numbers: memory that is exactly as large as it is said to be, and tiles and copies one after another.

As in the worker two tiles at most have begun, and of the others those of the highest band go first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from streamindex_service.core.layers import Page
from streamindex_service.core.pages import PageSlot
from streamindex_service.testing.virtual_time import VirtualTime


class BudgetBrokenError(AssertionError):
    """The device was asked for more memory than the budget, or for memory that it does not have."""


@dataclass(slots=True, eq=False)
class FakeTile:
    """Work on the device. `ended(outcome)` is told "done", "no memory" or "lost", once."""

    pages: Sequence[Page]
    places: Sequence[PageSlot | None]  # where it reads them
    content: Sequence[int]  # of the pages, as they must be
    workspace_bytes: int
    ended: Callable[[str], object]
    seconds: float
    band: int = 0
    outcome: str = "done"
    over: bool = False


_BEGUN = 2  # tiles: one runs, one is ready


class FakeDevice:
    """An allocator that enforces its budget, pages that remember what was copied to them, tiles by band."""

    def __init__(self, time: VirtualTime, budget_bytes: int, copy_bytes_per_s: float) -> None:
        self.budget_bytes = budget_bytes
        self.loaded_pages = 0
        self._copy_bytes_per_s = copy_bytes_per_s
        self.extents: dict[int, int] = {}
        self.workspace_bytes = 0
        self.tiles: list[FakeTile] = []  # in order of arrival
        self._begun: list[FakeTile] = []
        self._time = time
        self._content: dict[PageSlot, int] = {}
        self._busy_until = 0.0

    @property
    def used_bytes(self) -> int:
        """What is allocated."""
        return sum(self.extents.values()) + self.workspace_bytes

    def make_extent(self, extent_id: int, extent_bytes: int) -> None:
        """Allocate. Raises BudgetBrokenError."""
        self.extents[extent_id] = extent_bytes
        self._check()

    def drop_extent(self, extent_id: int) -> None:
        """Give back."""
        del self.extents[extent_id]
        self._content = {slot: what for slot, what in self._content.items() if slot.extent_id != extent_id}

    def load(self, slot: PageSlot, page_bytes: int, content: int) -> None:
        """Copy a page here. Raises BudgetBrokenError."""
        if slot.extent_id not in self.extents:
            raise BudgetBrokenError(f"a page was put into extent {slot.extent_id}, which is not there")
        self._content[slot] = content
        self.loaded_pages += 1
        copy_s = page_bytes / self._copy_bytes_per_s
        self._busy_until = max(self._busy_until, self._time.now_s) + copy_s

    def run(self, tile: FakeTile) -> None:
        """Do a tile after those that go before it. Raises BudgetBrokenError."""
        self.workspace_bytes += tile.workspace_bytes
        self._check()
        self.tiles.append(tile)
        self._begin()

    def _begin(self) -> None:
        while len(self._begun) < min(_BEGUN, len(self.tiles)):
            tile = min((tile for tile in self.tiles if tile not in self._begun), key=lambda tile: tile.band)
            self._begun.append(tile)
            self._busy_until = max(self._busy_until, self._time.now_s) + tile.seconds
            self._time.after(self._busy_until - self._time.now_s, partial(self._finish, tile))

    def crash(self) -> None:
        """Everything here is lost."""
        lost, self.tiles = self.tiles, []
        self._begun.clear()
        self.extents.clear()
        self._content.clear()
        self.workspace_bytes, self._busy_until = 0, 0.0
        for tile in lost:
            tile.over = True
        for tile in lost:
            tile.ended("lost")

    def forget(self) -> None:
        """Give back all extents. Tiles that run keep what they read."""
        for tile in self.tiles:
            tile.pages = ()
        for extent_id in list(self.extents):
            self.drop_extent(extent_id)

    def _finish(self, tile: FakeTile) -> None:
        if tile.over:
            return
        if tile.pages and tile.outcome == "done":
            if list(tile.places) != [page.device for page in tile.pages]:
                raise BudgetBrokenError("pages lost their places while a tile read them")
            found = [self._content.get(place) if place else None for place in tile.places]
            if found != list(tile.content):
                raise BudgetBrokenError(f"a tile read pages {found}, not {list(tile.content)}")
        tile.over = True
        self.tiles.remove(tile)
        self._begun.remove(tile)
        self.workspace_bytes -= tile.workspace_bytes
        self._begin()
        tile.ended(tile.outcome)

    def _check(self) -> None:
        if self.used_bytes > self.budget_bytes:
            raise BudgetBrokenError(f"{self.used_bytes} bytes are allocated, of {self.budget_bytes}")
