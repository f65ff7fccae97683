"""Which layers take part at a time when not all of them fit the device: load control, so that none thrashes.

With more layers in use than fit, least recent use under tiles that go round is the worst choice: every tile finds its
pages evicted by the others'. So the layers that are searched belong to a working set (Denning, "The working set model
for program behavior", CACM 1968) that fits, and are not evicted while they do. A layer that does not fit beside the
others displaces those that came first, and the copy has to pay for itself before the next of its band: the band's gate
is closed for `promotion_factor` times the copy's seconds, by the device seconds given since or on the clock, whichever
passes first. A layer also makes room, and no gate is asked,

- once its searches have ended and no tile has needed it for `linger_s`, in which its caller may come back with the next
  search; or once the device has had nothing to do for the seconds of its copy since, taken together: waiting any longer
  would cost more than to bring it again. It stays for `active_s` where only a lower band has use for its place, and no
  longer than that even if a search is open;
- for a layer of a higher band;
- at once, when the only search of it goes on with another window.

Belonging is only the right to stay: a layer that has left keeps its pages until somebody needs their memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from streamindex_service.core.band_queue import Band
from streamindex_service.core.layers import Page
from streamindex_service.core.ledger import Ledger


@dataclass(frozen=True, slots=True)
class WorkingSetLimits:
    """promotion_factor: times the seconds of a copy that a gate is closed for; promotion_wait_s: the most of that.
    linger_s: what a layer that nobody is there for stays at least, while the device has something else to do."""

    promotion_factor: float = 16.0
    promotion_wait_s: float = 5.0
    linger_s: float = 0.3


@dataclass(slots=True, eq=False)
class PageSet:
    """Pages that tiles need together: a layer, or a window of one. Forks that share its first page share it.

    turns: tiles that wait or are with the device, by band; searches: open ones that came for it last; copy_s: estimated
    seconds to bring all of it. band: the highest of any tile; of the last one, where there is none.
    """

    pages: Sequence[Page]
    band: Band
    copy_s: float
    size_bytes: int
    idle_since: float
    idled_s: float = 0.0  # of the device, until then
    turns: int = 0
    searches: int = 0
    admitted: bool = False
    turns_of: dict[Band, int] = field(default_factory=dict)

    def add_turn(self, band: Band) -> None:
        """A tile comes."""
        self.band = min(self.band, band) if self.turns else band
        self.turns += 1
        self.turns_of[band] = self.turns_of.get(band, 0) + 1

    def remove_turn(self, band: Band) -> None:
        """A tile is done, or waits no longer. What is there for lower bands alone must make room for a higher one: a
        tile of theirs may wait for room itself, beside other pages that it needs."""
        self.turns -= 1
        left = self.turns_of[band] = self.turns_of.get(band, 0) - 1
        assert left >= 0, "a tile of a page set ends twice"
        if not left and self.turns:
            self.band = min(each for each, turns in self.turns_of.items() if turns)

    @property
    def in_use(self) -> bool:
        """Whether a search or a tile is there for it."""
        return bool(self.turns or self.searches)

    @property
    def parts(self) -> tuple[PageSet, ...]:
        """What takes part or not by itself."""
        return (self,)


@dataclass(frozen=True, slots=True, eq=False)
class PageSets:
    """Page sets that a tile needs together, of which others need some with others yet: a decode step's, where sequences
    come and go. Each takes part by itself, so that none is counted twice and only what is new needs room."""

    parts: tuple[PageSet, ...]

    @property
    def admitted(self) -> bool:
        """Whether all are."""
        return all(part.admitted for part in self.parts)

    @property
    def band(self) -> Band:
        """The lowest of any."""
        return max(part.band for part in self.parts)

    @property
    def turns(self) -> int:
        """Tiles that wait or are with the device, of that which has most."""
        return max(part.turns for part in self.parts)

    @property
    def copy_s(self) -> float:
        """Estimated seconds to bring those that are not admitted."""
        return sum(part.copy_s for part in self.parts if not part.admitted)


Needed = PageSet | PageSets


@dataclass(slots=True)
class _Gate:
    """Closed until it is `opens_at` on the clock, or until `opens_given_s` device seconds have been given."""

    opens_at: float = -math.inf
    opens_given_s: float = -math.inf


class WorkingSet:
    """The page sets that are in use, and which of them are admitted. Pure: it is told the time.

    hbm: device memory, whose limit a worker may change when it starts. given_s: estimated device seconds of all turns
    that went to the device. idle_since: the device has nothing to do; infinite while it has. idled_s: how long it had
    nothing before that, in all.
    """

    def __init__(self, limits: WorkingSetLimits, hbm: Ledger, active_s: float) -> None:
        self.limits = limits
        self.given_s = 0.0
        self.idle_since = math.inf
        self.idled_s = 0.0
        self.changes = 0  # of what takes part, and of how much memory a page set needs
        self._hbm = hbm
        self._active_s = active_s
        self._known: dict[Page, PageSet] = {}  # by the first page
        self._admitted: dict[PageSet, None] = {}  # for longest first
        self._admitted_bytes = 0
        self._gates = {band: _Gate() for band in Band}

    def __len__(self) -> int:
        return len(self._admitted)

    @property
    def admitted_bytes(self) -> int:
        """Device memory of all that are admitted."""
        return self._admitted_bytes

    @property
    def complete(self) -> bool:
        """Whether all that are known are admitted: nobody has to wait for room."""
        return len(self._known) == len(self._admitted)

    def device_idles(self, now: float) -> None:
        """It has nothing to do from now on."""
        self.idle_since = now

    def device_works(self, now: float) -> None:
        """It has something to do."""
        self.idled_s, self.idle_since = self._idled_s(now), math.inf

    def ask(self, pages: Sequence[Page], band: Band, copy_s: float, now: float) -> PageSet | None:
        """A tile comes for these pages; None when it needs none."""
        if not pages:
            return None
        size_bytes = pages[0].page_bytes * len(pages)
        found = self._known.get(pages[0])
        if found is None:
            found = self._known[pages[0]] = PageSet(pages, band, copy_s, size_bytes, now)
        if found.admitted:
            self._admitted_bytes += size_bytes - found.size_bytes
        if found.size_bytes != size_bytes:
            self.changes += 1
        found.pages, found.copy_s, found.size_bytes = pages, copy_s, size_bytes
        found.add_turn(band)
        return found

    def ask_together(
        self, layers: Sequence[Sequence[Page]], band: Band, copy_s: Callable[[int], float], now: float
    ) -> Needed | None:
        """A tile comes for pages of several layers; None when it needs none. copy_s: seconds to bring so many bytes."""
        apart: dict[Page, Sequence[Page]] = {}
        for pages in layers:  # of forks, the one that has most of what they share
            if pages and len(pages) > len(apart.get(pages[0], ())):
                apart[pages[0]] = pages
        asked = (self.ask(pages, band, copy_s(pages[0].page_bytes * len(pages)), now) for pages in apart.values())
        parts = tuple(part for part in asked if part is not None)
        return PageSets(parts) if len(parts) > 1 else next(iter(parts), None)

    def taking_part(self, pages: Sequence[Page]) -> PageSet | None:
        """What these pages are of, if it takes part."""
        found = self._known.get(pages[0]) if pages else None
        return found if found is not None and found.admitted else None

    def turn_over(self, needed: Needed, band: Band, now: float) -> None:
        """One of its tiles, of this band, is done, or waits no longer."""
        for page_set in needed.parts:
            page_set.remove_turn(band)
            page_set.idle_since, page_set.idled_s = now, self._idled_s(now)
            self._forget_unused(page_set)

    def come(self, needed: Needed) -> None:
        """A search comes for it."""
        for page_set in needed.parts:
            page_set.searches += 1

    def go(self, needed: Needed, *, to_another: bool) -> None:
        """A search has ended, or goes on with other pages."""
        for page_set in needed.parts:
            page_set.searches -= 1
            assert page_set.searches >= 0, "a search leaves a page set twice"
            if to_another and page_set.admitted and not page_set.in_use:
                self._leave(page_set)
            self._forget_unused(page_set)

    def kept_pages(self) -> list[Sequence[Page]]:
        """Pages that are not evicted for others, set by set."""
        return [page_set.pages for page_set in self._admitted]

    def interval_s(self, needed: Needed) -> float:
        """How long others of its band wait at most before the next is displaced, once this one was brought."""
        return self.pays_for_s(needed.copy_s)

    def gate_is_open(self, band: Band, now: float) -> bool:
        """Whether a page set of this band may displace another of it."""
        gate = self._gates[band]
        return now >= gate.opens_at or self.given_s >= gate.opens_given_s

    def room_bytes(self, band: Band, now: float, displacing: Needed | None = None) -> int:
        """Device memory for a page set of this band and its tiles. displacing: what others of the band make room
        for."""
        room_bytes = self._hbm.limit_bytes - self._admitted_bytes
        own = set(displacing.parts) if displacing is not None else ()
        for other in self._admitted:
            if other in own:
                continue
            goes = other.band > band or (displacing is not None and other.band == band)
            # most have turns: they are not asked when they lapse, for this is asked several times a tile
            if goes or (not other.turns and self._lapses_at(other, band) <= now):
                room_bytes += other.size_bytes
        return room_bytes

    def fits(self, needed: Needed, workspace_bytes: int, room_bytes: int) -> bool:
        """Whether so much room is enough beside what takes part. Nobody needs more than all that there is."""
        if isinstance(needed, PageSet) and not needed.admitted:  # asked of all that wait, before each tile
            return min(needed.size_bytes + workspace_bytes, self._hbm.limit_bytes) <= room_bytes
        sizes = {True: 0, False: 0}  # bytes of what is admitted, and of what is not
        for page_set in needed.parts:
            sizes[page_set.admitted] += page_set.size_bytes
        return min(sizes[False] + workspace_bytes, self._hbm.limit_bytes - sizes[True]) <= room_bytes

    def would_displace(self, pages: Sequence[Page], band: Band, workspace_bytes: int, now: float) -> bool:
        """Whether a tile that came for these pages would find no room beside what takes part."""
        known = self._known.get(pages[0]) if pages else None
        if not pages or (known is not None and known.admitted):
            return False
        needed_bytes = min(pages[0].page_bytes * len(pages) + workspace_bytes, self._hbm.limit_bytes)
        if needed_bytes <= self._hbm.limit_bytes - self._admitted_bytes:
            return False  # without a look at each of those that take part
        return needed_bytes > self.room_bytes(band, now)

    def pays_for_s(self, copy_s: float) -> float:
        """Seconds in which a copy has to pay for itself."""
        return min(self.limits.promotion_factor * copy_s, self.limits.promotion_wait_s)

    def admit(self, needed: Needed, workspace_bytes: int, now: float, *, through_gate: bool) -> None:
        """It takes part from now on; those make room that must. through_gate: which is to be closed if any did."""
        band, own, interval_s, displaced = needed.band, set(needed.parts), self.interval_s(needed), False
        for other in self._in_order(band, now):
            if self.fits(needed, workspace_bytes, self._hbm.limit_bytes - self._admitted_bytes):
                break
            if other in own:
                continue
            displaced |= other.band <= band and self._lapses_at(other, band) > now
            self._leave(other)
        for page_set in needed.parts:
            if not page_set.admitted:
                page_set.admitted = True
                self._admitted[page_set] = None
                self._admitted_bytes += page_set.size_bytes
                self.changes += 1
        if displaced and through_gate:
            self._gates[band] = _Gate(now + interval_s, self.given_s + interval_s)

    def leave_one(self, needed: Needed, now: float) -> bool:
        """Another than this makes room; False when there is none."""
        own = set(needed.parts)
        other = next((each for each in self._in_order(needed.band, now) if each not in own), None)
        if other is not None:
            self._leave(other)
        return other is not None

    def lapse(self, now: float) -> None:
        """Those leave that nobody is there for any more, so that they are not remembered for ever."""
        for page_set in list(self._admitted):
            if not page_set.searches and self._lapses_at(page_set, Band.BATCH) <= now:
                self._leave(page_set)

    def clear(self) -> None:
        """Nothing is on the device any more, or everything must go: all have to come again."""
        for page_set in list(self._admitted):
            self._leave(page_set)

    def next_change(self, band: Band, now: float) -> float:
        """When there may be room for a page set of this band with nothing else happening; infinite when never."""
        changes = [self._gates[band].opens_at, *(self._lapses_at(other, band) for other in self._admitted)]
        return min((at for at in changes if at > now), default=math.inf)

    def _idled_s(self, now: float) -> float:
        """How long the device has had nothing to do, in all."""
        return self.idled_s + (now - self.idle_since if -math.inf < self.idle_since < now else 0.0)

    def _in_order(self, band: Band, now: float) -> list[PageSet]:
        """Who makes room for a page set of this band: those that lapsed, those below, its own, of these first those
        that nobody is there for; the first that came."""
        return sorted(self._admitted, key=lambda other: (self._lapses_at(other, band) > now, -other.band, other.in_use))

    def _lapses_at(self, page_set: PageSet, band: Band) -> float:
        """When it makes room for this band unasked, unless it is needed before; infinite while it is in use."""
        if page_set.turns:
            return math.inf
        if page_set.band < band:
            return page_set.idle_since + max(self._active_s, page_set.copy_s)
        if page_set.searches:
            return math.inf
        copied_at = page_set.idle_since + page_set.copy_s
        left_s = page_set.copy_s - (self.idled_s - page_set.idled_s)  # that it has to stand still for
        stood_still_at = self.idle_since + left_s if left_s > 0.0 else copied_at
        return max(copied_at, min(page_set.idle_since + self.limits.linger_s, stood_still_at))

    def _leave(self, page_set: PageSet) -> None:
        page_set.admitted = False
        del self._admitted[page_set]
        self._admitted_bytes -= page_set.size_bytes
        self.changes += 1
        self._forget_unused(page_set)

    def _forget_unused(self, page_set: PageSet) -> None:
        if not page_set.in_use and not page_set.admitted:
            self._known.pop(page_set.pages[0], None)
