"""Which turns have room on the device for their layers, and when those that have none may make others go.

Between the governor, which grants turns, and the working set, which knows layers and no turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from streamindex_service.core.band_queue import Band, Turn
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.turns import Need, OpenSearch, SearchTurn
from streamindex_service.core.working_set import Needed, WorkingSet

FED = 2  # turns that keep the device busy, however long they are: one runs, one is ready
_AMPLE_PART = 16  # of the budget: what a turn's workspace comes to before layers that are not needed now


class Room:
    """Room for layers beside the workspaces of turns; the scheduler's `Admission`.

    promotion_s: estimated seconds to bring so many bytes. `wake(delay_s)` has `woken` called so much later; without it
    nobody is held back while the device has nothing to do.
    """

    def __init__(
        self,
        working_set: WorkingSet,
        hbm: Ledger,
        clock: Callable[[], float],
        promotion_s: Callable[[int], float],
        wake: Callable[[float], object] | None,
    ) -> None:
        self._working_set = working_set
        self._hbm = hbm
        self._clock = clock
        self._promotion_s = promotion_s
        self._wake = wake
        self._room_bytes: dict[Band, int] = {}  # for layers of a band and their turns, as of this look
        self.wake_at = math.inf
        working_set.idle_since = -math.inf  # it has not had anything to do yet

    def device_idles(self) -> None:
        """It has nothing to do from now on."""
        self._working_set.device_idles(self._clock())

    def device_works(self) -> None:
        """It has something to do."""
        self._working_set.device_works(self._clock())

    # What searches come for.

    def come(self, search: OpenSearch, least: Need) -> None:
        """A search begins. Its rows are yet to come, and may be long in coming where many bring theirs: that it has
        come counts, where its layer takes part."""
        page_set = self._working_set.taking_part(least.pages)
        if page_set is not None:
            search.page_sets[least.speed] = page_set
            self._working_set.come(page_set)

    def go(self, search: OpenSearch) -> None:
        """A search is over."""
        for page_set in search.page_sets.values():
            self._working_set.go(page_set, to_another=False)

    def ask(self, search: OpenSearch, need: Need) -> Needed | None:
        """What a turn is for; the search has left what the same operation was for before."""
        now, page_set = self._clock(), None
        if need.layers:
            page_set = self._working_set.ask_together(need.layers, search.band, self._promotion_s, now)
        else:
            page_set = self._working_set.ask(need.pages, search.band, self._copy_s(need), now)
        before = search.page_sets.pop(need.speed, None)
        if page_set is not before:
            if before is not None:
                self._working_set.go(before, to_another=True)
            if page_set is not None:
                self._working_set.come(page_set)
        if page_set is not None:
            search.page_sets[need.speed] = page_set
        return page_set

    def turn_over(self, turn: SearchTurn) -> None:
        """A turn is done, or waits no longer."""
        if turn.page_set is not None:
            self._working_set.turn_over(turn.page_set, turn.open_search.band, self._clock())

    def admit(self, turn: SearchTurn, *, through_gate: bool) -> None:
        """The turn is the next: its pages take part from now on."""
        page_set = turn.page_set
        if page_set is not None and not page_set.admitted:
            self._working_set.admit(page_set, turn.workspaces_bytes, self._clock(), through_gate=through_gate)

    # Workspaces.

    def ample_bytes(self, need: Need) -> int:
        """Workspace with which a turn is fast: with its floor alone, the host's launches may be what takes the time."""
        return max(need.floor_bytes, min(need.want_bytes, self._hbm.limit_bytes // _AMPLE_PART))

    def workspaces_bytes(self, need: Need) -> int:
        """Of turns like this one that keep the device busy: layers take part beside these."""
        return FED * self.ample_bytes(need)

    # Who has to wait.

    def is_held_back(self, search: OpenSearch) -> bool:
        """Whether it has turns in the queue for which others have to make room on the device first."""
        if self._working_set.complete or not search.turns:
            return False
        return any(page_set.turns and not page_set.admitted for page_set in search.page_sets.values())

    def gathering_s(self, search: OpenSearch, needs: Iterable[Need]) -> float:
        """For how long rows of a search are gathered at most before a tile of them is asked for.

        needs: the least of each operation that it consists of. 0.0 unless a layer of one of these has to displace
        others: it is brought for as many rows as there can be, or few rows at a time would have it brought again and
        again.
        """
        return self._working_set.pays_for_s(max(map(self._copy_s, self._displacing(search, needs)), default=0.0))

    def lacks_layer(self, search: OpenSearch, needs: Iterable[Need]) -> bool:
        """Whether a layer that it needs does not take part yet."""
        return any(
            not self._has_layer(search, need) and need.pages and self._working_set.taking_part(need.pages) is None
            for need in needs
        )

    def lacks_room(self, search: OpenSearch, needs: Iterable[Need]) -> bool:
        """Whether others would have to make room for what it needs: its rows are of no use to the device yet."""
        return next(self._displacing(search, needs), None) is not None

    def as_of(self, band: Band) -> tuple[int, int]:
        """What `held_s` depends on, beside the turn itself."""
        return self._working_set.changes, self._room_of(band)

    def held_s(self, turn: Turn) -> float:
        """0.0 when a turn's pages take part, or there is room for them; else for how long copies close a gate."""
        assert isinstance(turn, SearchTurn)
        page_set = turn.page_set
        if page_set is None or page_set.admitted or turn.alone:
            return 0.0
        fits = self._working_set.fits(page_set, turn.workspaces_bytes, self._room_of(turn.band))
        return 0.0 if fits else self._working_set.interval_s(page_set)

    def look_anew(self) -> None:
        """There may be other room than when `held_s` was asked before."""
        self._room_bytes.clear()

    def gate_is_shut(self, band: Band) -> bool:
        """Whether no turn of this band may displace others, whichever it is."""
        return self._working_set.idle_since == math.inf and not self._working_set.gate_is_open(band, self._clock())

    def may_displace(self, turn: Turn, *, for_age: bool) -> bool:
        """Whether the gate is open for a turn, or the device stands still for as long as its copy takes.

        Layers of a higher band make room for a band that is old, and for no other.
        """
        assert isinstance(turn, SearchTurn)
        page_set, now = turn.page_set, self._clock()
        assert page_set is not None
        if self._wake is None and self._working_set.idle_since < math.inf:
            return True
        if not self._working_set.gate_is_open(turn.band, now) and now < self._stands_still_at(page_set):
            return False
        room_bytes = self._working_set.room_bytes(turn.band, now, displacing=page_set)
        return for_age or self._working_set.fits(page_set, turn.workspaces_bytes, room_bytes)

    def wake_for(self, held_back: Iterable[Turn]) -> None:
        """Come back when one of these may go, though nothing else happens."""
        if self._wake is None:
            return
        now, at, bands = self._clock(), math.inf, set()
        for turn in held_back:
            assert isinstance(turn, SearchTurn)
            assert turn.page_set is not None
            bands.add(turn.band)
            if now < (stands_still_at := self._stands_still_at(turn.page_set)) < at:
                at = stands_still_at
        for band in bands:  # the same for all turns of a band
            at = min(at, self._working_set.next_change(band, now))
        if at < self.wake_at:
            self.wake_at = at
            self._wake(at - now)

    def woken(self) -> None:
        """The time for which `wake` was asked has passed."""
        self.wake_at = math.inf

    def _displacing(self, search: OpenSearch, needs: Iterable[Need]) -> Iterator[Need]:
        now = self._clock()
        for need in needs:
            if self._has_layer(search, need):
                continue
            if self._working_set.would_displace(need.pages, search.band, self.workspaces_bytes(need), now):
                yield need

    def _room_of(self, band: Band) -> int:
        room_bytes = self._room_bytes.get(band)
        if room_bytes is None:
            room_bytes = self._room_bytes[band] = self._working_set.room_bytes(band, self._clock())
        return room_bytes

    @staticmethod
    def _has_layer(search: OpenSearch, need: Need) -> bool:
        own = search.page_sets.get(need.speed)  # perhaps a window of the layer, and it is under way
        return own is not None and own.admitted

    def _copy_s(self, need: Need) -> float:
        return self._promotion_s(need.pages[0].page_bytes * len(need.pages)) if need.pages else 0.0

    def _stands_still_at(self, page_set: Needed) -> float:
        """When the device will have had nothing to do for as long as a copy takes; infinite while it has."""
        return self._working_set.idle_since + page_set.copy_s
