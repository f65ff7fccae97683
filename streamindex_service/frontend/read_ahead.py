"""Which of the streams whose rows the device has no use for yet bring some all the same."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Protocol

from streamindex_service.core.band_queue import Band

_MOST = 8  # streams of a band and those above it; an admission takes one, and the next has brought a block before long
_LOOK_S = 0.01


class Stream(Protocol):
    """A stream of rows, of one caller and band; those with a lower `age` are older."""

    band: Band
    age: int

    @property
    def caller(self) -> str:
        """Whose it is."""

    def lacks_room(self) -> bool:
        """Whether others would have to make room on the device for what its rows need."""

    def brings_rows(self) -> bool:
        """Whether all that it can bring now is there, or it was still coming a moment ago."""


class ReadAhead:
    """A few streams have rows ready for when others make room for them; what the others send stays on the wire.

    Were all of them to bring a block, as many blocks as there are callers would take memory, leave the processor's
    cache between being read and being sent to the device, and have the scheduler choose among all of them for every
    tile. For each layer that takes part another stream comes forward, the highest band first, inside it the callers in
    turn. Nobody waits for this who would not wait for room; and a stream that brings nothing keeps nobody from it.

    room_for: changes when there may be room for a band that had none. Waits are bounded: `next` says by how much.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, room_for: Callable[[Band], Hashable]) -> None:
        self._loop = loop
        self._room_for = room_for
        self._ahead: dict[Stream, None] = {}
        self._waiting: dict[Stream, tuple[asyncio.Future[None], float]] = {}  # and until when at the latest
        self._seen: dict[Band, Hashable] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def next(self, stream: Stream, most_s: float) -> None:
        """Wait until a stream that lacks room may bring rows, or need not wait for it any more; `most_s` at most."""
        if stream in self._ahead:
            return
        if not self._waiting and self._has_place(stream):
            self._ahead[stream] = None
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting[stream] = turn, self._loop.time() + most_s
        if self._timer is None:
            self._look()
        try:
            await turn
        finally:
            self._waiting.pop(stream, None)

    def leave(self, stream: Stream) -> None:
        """It has ended."""
        self._ahead.pop(stream, None)

    def _look(self) -> None:
        """Nobody tells when there is room, of which time is a part."""
        self._timer = None
        self._ahead = {each: None for each in self._ahead if each.brings_rows() and each.lacks_room()}
        now, seen = self._loop.time(), {band: self._room_for(band) for band in Band}
        for stream, (_, until) in list(self._waiting.items()):
            if now >= until or (seen[stream.band] != self._seen.get(stream.band) and not stream.lacks_room()):
                self._let_in(stream)
        self._seen = seen
        while any(map(self._has_place, self._waiting)):
            self._let_in(next(filter(self._has_place, self._in_order())))
        if self._waiting:
            self._timer = self._loop.call_later(_LOOK_S, self._look)

    def _has_place(self, stream: Stream) -> bool:
        return sum(each.band <= stream.band for each in self._ahead) < _MOST

    def _let_in(self, stream: Stream) -> None:
        turn, _ = self._waiting.pop(stream)
        self._ahead[stream] = None
        if not turn.done():  # else it has ended
            turn.set_result(None)

    def _in_order(self) -> list[Stream]:
        before = Counter(stream.caller for stream in self._ahead)
        ranks: dict[Stream, tuple[int, int, int]] = {}
        for stream in sorted(self._waiting, key=lambda each: each.age):
            ranks[stream] = (int(stream.band), before[stream.caller], stream.age)
            before[stream.caller] += 1
        return sorted(ranks, key=lambda each: ranks[each])
