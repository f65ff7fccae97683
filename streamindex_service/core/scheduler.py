"""Who gets the device next: priority bands with ageing, and inside a band deficit round-robin by caller.

The unit is a turn: one tile of one search. A long search comes back with its next tile, so nobody holds the device
for longer than a tile, and the order is decided anew before each.

- Bands: interactive before standard before batch. One turn in `ageing_turns` goes to a band below whose oldest turn has
  waited `ageing_s`, to each such band in its turn: none starves, and those above lose no more than that.
- Inside a band the callers take part, not their searches: deficit round-robin (Shreedhar and Varghese, "Efficient Fair
  Queuing using Deficit Round-Robin", SIGCOMM 1995) over estimated device seconds. A caller's own turns go in order of
  arrival.
- Turns may be held back: those whose keys would displace others' before the last copy has paid for itself
  (`working_set.py`). Others go meanwhile, of their caller, their band, or a band below; the caller is owed as much of
  each round as any other has of it (`band_queue.py`). When others may make room, the caller goes that was
  held back first. A caller that has saved up the cost of its turn and an interval between two copies for each caller of
  its band waits for nothing any more, unless it is the only one.
- The queue is bounded in turns, bytes and seconds. The bounds are asked when a search comes (`refuse_hopeless`), never
  in the middle of one.

What is promised, in device seconds, with a the allowance of a round, m the largest cost of a turn, n the callers that
are busy, and h the longest interval between two copies for which a turn is held back (0 while all layers in use fit):

- Fairness: while a caller has turns queued, it gets at least its equal share of what its band gets, less
  a + 2 (m + n · h). A caller's deficit never passes m + n · h at the end of its visit; the rest is the proof of
  Shreedhar and Varghese. Without h this bound is the quantum of the settings; a is what is left of it, see
  `allowance_s`.
- Wait: a caller's turn with p of its own turns before it goes after at most R(p) = n · (r · (a + m) + n · h) device
  seconds given to its band, r = ceil(((p + 1) · (a + m) + n · h) / a) + 1. If it is held back, its caller's later turns
  may go before it: then it is R(p) + n · (p + 1) · (h + m + R(0)), unless a band above is active, whose layers stay.
  Its band gets all of the device while no band above it has turns that may go, else, after ageing_s, one turn in
  2 · ageing_turns or more, or one after each interval h.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from streamindex_service.core.band_queue import Admission, Band, BandQueue, Turn
from streamindex_service.errors import DeadlineUnreachableError, QueueFullError

_LEAST_RETRY_S, _MOST_RETRY_S = 0.1, 10.0
_LEAST_COST_S = 1e-6  # a turn that is thought to cost nothing would never use up an allowance


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds and weights of the queue; times in seconds. `max_turn_s` is what a turn is cut to (`worker.tile_s`)."""

    max_turns: int = 256
    max_bytes: int = 256 << 20
    max_s: float = 30.0
    ageing_s: float = 2.0
    ageing_turns: int = 4
    quantum_s: float = 0.5
    max_turn_s: float = 0.1

    @property
    def allowance_s(self) -> float:
        """What a caller may use in a round: the quantum less two of the largest turns, the error of the method."""
        return max(self.quantum_s - 2 * self.max_turn_s, self.max_turn_s)


class Scheduler:
    """The queue of turns. Pure: it is told the time."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self.queued_bytes = 0
        self._bands = {band: BandQueue(band, limits.allowance_s) for band in Band}
        self._since_aged = 0  # turns taken since one went to a band for its age
        self._aged = deque(Band)  # which of the bands that are old goes: the one that went longest ago
        self._for_age: Turn | None = None  # was named for the age of its band

    def __len__(self) -> int:
        return sum(len(queue.turns) for queue in self._bands.values())

    def __iter__(self) -> Iterator[Turn]:
        for queue in self._bands.values():
            yield from queue.turns

    @property
    def backlog_s(self) -> float:
        """Estimated device seconds of everything queued."""
        return sum(queue.backlog_s for queue in self._bands.values())

    def highest_band(self) -> Band | None:
        """Of those that have turns queued."""
        return next((band for band, queue in self._bands.items() if queue.turns), None)

    def queued_by_band(self) -> dict[Band, int]:
        """Turns of each band."""
        return {band: len(queue.turns) for band, queue in self._bands.items()}

    def queued_by_caller(self) -> dict[str, tuple[int, float]]:
        """Turns of each caller that has any, and their estimated device seconds."""
        found: dict[str, tuple[int, float]] = {}
        for queue in self._bands.values():
            for caller in queue.callers.values():
                turns, seconds = found.get(caller.name, (0, 0.0))
                found[caller.name] = (turns + len(caller.turns), seconds + max(0.0, caller.backlog_s))
        return found

    def add(self, turn: Turn) -> None:
        """Queue a turn."""
        turn.cost_s = max(turn.cost_s, _LEAST_COST_S)
        self._bands[turn.band].add(turn)
        self.queued_bytes += turn.size_bytes

    def reprice(self, turn: Turn, cost_s: float, size_bytes: int, promotion_s: float) -> None:
        """A turn has grown while it waited."""
        cost_s = max(cost_s, _LEAST_COST_S)
        self._bands[turn.band].price(turn, cost_s - turn.cost_s)
        self.queued_bytes += size_bytes - turn.size_bytes
        turn.cost_s, turn.size_bytes, turn.promotion_s = cost_s, size_bytes, promotion_s

    def remove(self, turn: Turn) -> None:
        """A turn waits no longer."""
        self._bands[turn.band].remove(turn)
        self.queued_bytes -= turn.size_bytes

    def next_turn(self, now: float, admission: Admission | None = None) -> Turn | None:
        """The turn that goes next; it stays queued until `take`. None when none is queued, or all are held back."""
        self._for_age = None
        for old in self._old_bands(now):
            self._for_age = self._bands[old].next_turn(admission, for_age=True)
            if self._for_age is not None:
                return self._for_age
        for queue in self._bands.values():
            found = queue.next_turn(admission) if queue.turns else None
            if found is not None:
                return found
        return None

    def is_offered(self, turn: Turn) -> bool:
        """Whether it was named because others may make room for it, and not because its caller is too far behind."""
        return self._bands[turn.band].offered is turn

    def held_back(self) -> list[Turn]:
        """Of each caller and band, the turn for which others have to make room."""
        return [turn for queue in self._bands.values() for turn in queue.held_back()]

    def take(self, turn: Turn) -> None:
        """What `next_turn` named goes to the device."""
        self._since_aged += 1
        if turn is self._for_age:
            self._since_aged, self._for_age = 0, None
            self._aged.remove(turn.band)
            self._aged.append(turn.band)
        self._bands[turn.band].take(turn)
        self.queued_bytes -= turn.size_bytes

    def wait_s(self, caller: str, band: Band) -> float:
        """Estimated device seconds before a new turn of this caller goes: bands above, one round, its own before it."""
        wait_s = 0.0
        for other, queue in self._bands.items():
            if other < band:
                wait_s += queue.backlog_s
            elif other == band:
                own = queue.callers[caller].backlog_s if caller in queue.callers else 0.0
                rounds = 1 + own / self.limits.allowance_s
                wait_s += own
                for each in queue.callers.values():
                    if each.name != caller:
                        wait_s += min(each.backlog_s, rounds * self.limits.allowance_s)
        return max(0.0, wait_s)

    def refuse_hopeless(
        self,
        caller: str,
        band: Band,
        ahead_s: float,
        run_s: float,
        deadline_s: float | None,
        *,
        waiting: int = 0,
    ) -> None:
        """Refuse a search that had better not start.

        ahead_s: device seconds of what runs; run_s: of the search itself, as far as it is known; deadline_s: the
        caller's remaining time; waiting: searches that will have turns, and have none yet. Raises QueueFullError and
        DeadlineUnreachableError, with the figures.
        """
        limits = self.limits
        queued, backlog_s = len(self) + waiting, ahead_s + self.backlog_s
        wait_s = ahead_s + self.wait_s(caller, band)
        retry_after_ms = int(1000 * min(max(backlog_s, _LEAST_RETRY_S), _MOST_RETRY_S))
        for what, value, limit in (
            ("queued", queued, limits.max_turns),
            ("queued_bytes", self.queued_bytes, limits.max_bytes),
            ("queued_ms", int(1000 * backlog_s), int(1000 * limits.max_s)),
        ):
            if value >= limit:
                full: dict[str, int | str] = {
                    what: value,
                    "limit": limit,
                    "estimated_wait_ms": int(1000 * wait_s),
                }
                raise QueueFullError("the queue is full", metadata=full, retry_after_ms=retry_after_ms)
        if deadline_s is not None and wait_s + run_s > deadline_s:
            figures: dict[str, int | str] = {
                "estimated_wait_ms": int(1000 * wait_s),
                "estimated_run_ms": int(1000 * run_s),
                "deadline_ms": int(1000 * deadline_s),
            }
            raise DeadlineUnreachableError(
                "the search would not end before its deadline", metadata=figures, retry_after_ms=retry_after_ms
            )

    def _old_bands(self, now: float) -> list[Band]:
        """Bands of which one gets a turn for its age, the one that went longest ago if it can."""
        busy = [band for band, queue in self._bands.items() if queue.turns]
        if len(busy) < 2 or self._since_aged < self.limits.ageing_turns - 1:
            return []
        oldest = now - self.limits.ageing_s
        return [band for band in self._aged if band in busy[1:] and self._bands[band].oldest_at <= oldest]
