"""How many key caches are on the device, wholly or in part, and how many lie on disk: counted as their pages move.

The load of a service is asked for twice a second and more, and a service may hold 100,000 caches: nobody looks at all
of them to tell. Each knows the pages of all its layers, and a page that moves changes the census only when its cache
comes to be something else by it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Residence(enum.Enum):
    """How much of a cache that has rows is on the device, rows of all its kinds together."""

    DEVICE = "device"
    PARTIAL = "partial"
    NONE = "none"


# Where each is counted, in the order above: numbers, because a page that comes or goes may change it.
_NO_ROWS, _DEVICE, _PARTIAL, _NONE = range(4)


class Census:
    """Caches with rows, by residence; `spilled` are those of them with rows on disk and not in host memory, whatever
    their residence is: a page on disk may have a copy on the device."""

    __slots__ = ("counts", "spilled")

    def __init__(self) -> None:
        self.counts = [0, 0, 0, 0]  # the first tells nothing: caches are not counted when they are made
        self.spilled = 0

    @property
    def by_residence(self) -> dict[Residence, int]:
        """How many there are of each."""
        return {each: self.counts[at] for at, each in enumerate(Residence, 1)}


@dataclass(slots=True, eq=False)
class CachePages:
    """Pages of one cache, those that it shares counted in full: all, on the device, and on disk."""

    census: Census
    pages: int = 0
    resident: int = 0
    spilled: int = 0
    _at: int = 0  # of the census's counts

    def add(self, pages: int, resident: int, spilled: int) -> None:
        """So many more, or less, of each."""
        was_spilled = self.spilled > 0
        self.pages += pages
        self.resident += resident
        self.spilled += spilled
        self.census.spilled += (self.spilled > 0) - was_spilled
        self._sort()

    def placed(self, pages: int) -> None:
        """So many of its pages are on the device now."""
        self.resident += pages
        if self.resident == pages or self.resident == self.pages:  # thousands of pages come at a time
            self._sort()

    def displaced(self, pages: int) -> None:
        """So many are not any more."""
        self.resident -= pages
        if not self.resident or self.resident + pages == self.pages:
            self._sort()

    def _sort(self) -> None:
        if not self.pages:
            found = _NO_ROWS
        elif self.resident == self.pages:
            found = _DEVICE
        else:
            found = _PARTIAL if self.resident else _NONE
        if found != self._at:
            counts = self.census.counts
            counts[self._at] -= 1
            counts[found] += 1
            self._at = found
