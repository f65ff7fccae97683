"""Which of the streams whose layers do not take part yet bring rows all the same."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from streamindex_service.core.band_queue import Band

_MOST = 8  # streams of a band and those above it
_LOOK_S = 0.005  # whether a layer has taken part, or a stream has left
_LISTEN_S = 0.05  # whether those that are ahead still bring rows


class Stream(Protocol):
    """A stream of rows, of one caller and band; those with a lower `age` are older."""

    band: Band
    age: int

    @property
    def caller(self) -> str:
        """Whose it is."""

    def lacks_layer(self) -> bool:
        """Whether what its rows need does not take part yet."""

    def brings_rows(self) -> bool:
        """Whether all that it can bring now is there, or it was still coming a moment ago."""


class ReadAhead:
    """A few streams have rows ready for when their layers take part; what the others send stays on the wire, but for a
    message each.

    Were all of them to bring a block, as many blocks as there are callers would take memory, leave the processor's
    cache between being read and being sent to the device, and have the scheduler choose among all of them for every
    tile. When a layer takes part another stream comes forward, the highest band first, inside it the callers in turn.
    A stream that brings nothing keeps nobody from it.

    changes: a number that is another one whenever a layer has taken part. Waits are bounded: `next` says by how much.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, changes: Callable[[], int]) -> None:
        self._loop = loop
        self._changes = changes
        self._ahead: dict[Stream, None] = {}
        self._waiting: dict[Stream, tuple[asyncio.Future[None], float]] = {}  # and until when at the latest
        self._left_s: dict[Stream, float] = {}  # of each that has waited: for how long it still may
        self._seen = -1
        self._listen_at = -math.inf  # each stream is asked then, changed or not; also the end of the first wait
        self._timer: asyncio.TimerHandle | None = None

    async def next(self, stream: Stream, most_s: float) -> None:
        """Wait until a stream that lacks its layer may bring rows, or need not wait for that any more: `most_s` at
        most, in all that it waits until it has its layer."""
        left_s = self._left_s.get(stream, most_s)
        if stream in self._ahead or left_s <= 0.0:
            return
        if not any(each.band <= stream.band for each in self._waiting) and self._places()[stream.band] > 0:
            self._ahead[stream] = None
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        until = self._loop.time() + left_s
        self._waiting[stream] = turn, until
        self._listen_at = min(self._listen_at, until)
        try:
            if self._timer is None:
                self._listen_at = -math.inf
                self._look()
            await turn
        finally:
            self._waiting.pop(stream, None)
        self._left_s[stream] = until - self._loop.time()

    def leave(self, stream: Stream) -> None:
        """It has its layer, or has ended."""
        if stream in self._ahead:
            del self._ahead[stream]
            self._listen_at = -math.inf  # its place is another's
        self._left_s.pop(stream, None)

    def _look(self) -> None:
        self._timer = None
        now, changes = self._loop.time(), self._changes()
        try:
            if changes != self._seen or now >= self._listen_at:
                self._let_some_in(now, changed=changes != self._seen)
                self._seen = changes
                self._listen_at = min((until for _, until in self._waiting.values()), default=math.inf)
                self._listen_at = min(self._listen_at, now + _LISTEN_S)
        finally:
            if self._waiting:
                self._timer = self._loop.call_later(_LOOK_S, self._look)

    def _let_some_in(self, now: float, *, changed: bool) -> None:
        self._ahead = {each: None for each in self._ahead if each.brings_rows() and each.lacks_layer()}
        for stream, (_, until) in list(self._waiting.items()):
            if now >= until or (changed and not stream.lacks_layer()):
                self._let_in(stream)
        places = self._places()
        if all(places[each.band] <= 0 for each in self._waiting):
            return
        for stream in self._in_order():
            if places[stream.band] > 0 and self._let_in(stream):
                self._ahead[stream] = None
                for band in places:
                    places[band] -= stream.band <= band

    def _places(self) -> dict[Band, int]:
        """For how many more there are, of each band."""
        taken = Counter(each.band for each in self._ahead)
        return {band: _MOST - sum(taken[above] for above in Band if above <= band) for band in Band}

    def _let_in(self, stream: Stream) -> bool:
        turn, _ = self._waiting.pop(stream)
        if turn.done():  # it has ended
            return False
        turn.set_result(None)
        return True

    def _in_order(self) -> list[Stream]:
        before = Counter(stream.caller for stream in self._ahead)
        ranks: dict[Stream, tuple[int, int, int]] = {}
        for stream in sorted(self._waiting, key=lambda each: each.age):
            ranks[stream] = (int(stream.band), before[stream.caller], stream.age)
            before[stream.caller] += 1
        return sorted(ranks, key=lambda each: ranks[each])
