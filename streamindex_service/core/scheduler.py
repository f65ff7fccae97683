"""Who gets the device next: priority bands with ageing, and inside a band deficit round-robin by caller.

The unit is a turn: one tile of one search. A long search comes back with its next tile, so nobody holds the device
for longer than a tile, and the order is decided anew before each.

- Bands: interactive before standard before batch. One turn in `ageing_turns` goes to a band below whose oldest turn has
  waited `ageing_s`, to each such band in its turn: none starves, and those above lose no more than that.
- Inside a band the callers take part, not their searches: deficit round-robin (Shreedhar and Varghese, "Efficient Fair
  Queuing using Deficit Round-Robin", SIGCOMM 1995) over estimated device seconds. A caller's own turns go in order of
  arrival, but for one rule: while the next one would have to bring keys to the device, the search that ran last may go
  on, up to one round's allowance. Two searches whose layers do not fit together then change places once a round, and
  not with every tile.
- The queue is bounded in turns, bytes and seconds. The bounds are asked when a search comes (`refuse_hopeless`), never
  in the middle of one.

What is promised, with a the allowance of a round and m the largest cost of a turn (both in device seconds):

- Fairness: while a caller has turns queued, it gets at least its equal share of what its band gets, less a + 2 m. The
  quantum of the settings is this bound; a is what is left of it, see `allowance_s`.
- Wait: a caller's turn with p of its own turns before it, n callers being busy, goes after at most
  (rounds(p) + 1) · n · (a + m) device seconds given to its band, rounds(p) = ceil((p + 1) · (a + m) / a). Its band
  gets all of the device while no band above it has turns, else, after ageing_s, one turn in 2 · ageing_turns or more.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from streamindex_service.errors import DeadlineUnreachableError, QueueFullError

_LEAST_RETRY_S, _MOST_RETRY_S = 0.1, 10.0
_LEAST_COST_S = 1e-6  # a turn that is thought to cost nothing would never use up an allowance


class Band(enum.IntEnum):
    """Priorities, with the numbers of `streamindex.v1.Priority`; the smaller goes first."""

    INTERACTIVE = 1
    STANDARD = 2
    BATCH = 3


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


@dataclass(slots=True, eq=False)
class Turn:
    """One tile of a search, waiting for the device.

    cost_s: estimated device seconds, of which promotion_s bring keys there; size_bytes: rows that wait in memory;
    search: the same object for all turns of a search.
    """

    caller: str
    band: Band
    search: object
    cost_s: float
    size_bytes: int
    arrived_at: float
    promotion_s: float = 0.0
    alone: bool = False  # runs while nothing else does


@dataclass(slots=True, eq=False)
class _Caller:
    name: str
    turns: deque[Turn] = field(default_factory=deque)
    deficit_s: float = 0.0
    visited: bool = False  # has had the allowance of its present visit
    backlog_s: float = 0.0
    last_search: object = None
    stint_s: float = 0.0  # device seconds that it has had in a row

    def next_turn(self, allowance_s: float) -> Turn:
        """The oldest, or one more of the search that ran last where that saves a promotion."""
        oldest = self.turns[0]
        if oldest.search is self.last_search or not oldest.promotion_s:
            return oldest
        same = next((turn for turn in self.turns if turn.search is self.last_search), None)
        return oldest if same is None or self.stint_s + same.cost_s > allowance_s else same


class _BandQueue:
    """The callers of a band, in the order of the round."""

    def __init__(self, allowance_s: float) -> None:
        self.turns: dict[Turn, None] = {}  # oldest first
        self.callers: dict[str, _Caller] = {}
        self.backlog_s = 0.0
        self._allowance_s = allowance_s
        self._round: deque[_Caller] = deque()

    def add(self, turn: Turn) -> None:
        caller = self.callers.get(turn.caller)
        if caller is None:
            caller = self.callers[turn.caller] = _Caller(turn.caller)
            self._round.append(caller)
        caller.turns.append(turn)
        self.turns[turn] = None
        self.price(turn, turn.cost_s)

    def price(self, turn: Turn, more_s: float) -> None:
        """The turn costs so much more, or less, than it was counted with."""
        self.backlog_s += more_s
        self.callers[turn.caller].backlog_s += more_s

    def take(self, turn: Turn) -> None:
        """It goes to the device: its caller pays."""
        caller = self.callers[turn.caller]
        caller.deficit_s -= turn.cost_s
        caller.stint_s = turn.cost_s + (caller.stint_s if turn.search is caller.last_search else 0.0)
        caller.last_search = turn.search
        self.remove(turn)

    def remove(self, turn: Turn) -> None:
        caller = self.callers[turn.caller]
        del self.turns[turn]
        caller.turns.remove(turn)
        self.price(turn, -turn.cost_s)
        if not caller.turns:  # what it has not used is not kept for later (Shreedhar and Varghese, section 3)
            del self.callers[turn.caller]
            self._round.remove(caller)
        if not self.turns:
            self.backlog_s = 0.0  # rounding does not add up over a day

    def next_turn(self) -> Turn:
        """Whose turn it is in the round. Asked again before anything has changed, it answers the same."""
        passed = 0
        while True:
            caller = self._round[0]
            if not caller.visited:
                caller.deficit_s += self._allowance_s
                caller.visited = True
            turn = caller.next_turn(self._allowance_s)
            if turn.cost_s <= caller.deficit_s:
                return turn
            caller.visited = False
            self._round.rotate(-1)
            passed += 1
            if passed == len(self._round):
                self._skip_rounds()
                passed = 0

    def _skip_rounds(self) -> None:
        """Rounds in which nobody could afford its turn, all at once: a single row may cost many allowances."""
        missing_s = min(caller.next_turn(self._allowance_s).cost_s - caller.deficit_s for caller in self._round)
        rounds = math.ceil(missing_s / self._allowance_s) - 1
        for caller in self._round:
            caller.deficit_s += max(0, rounds) * self._allowance_s


class Scheduler:
    """The queue of turns. Pure: it is told the time."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self.queued_bytes = 0
        self._bands = {band: _BandQueue(limits.allowance_s) for band in Band}
        self._since_aged = 0  # turns taken since one went to a band for its age
        self._aged = deque(Band)  # which of the bands that are old goes: the one that went longest ago

    def __len__(self) -> int:
        return sum(len(queue.turns) for queue in self._bands.values())

    def __iter__(self) -> Iterator[Turn]:
        for queue in self._bands.values():
            yield from queue.turns

    @property
    def backlog_s(self) -> float:
        """Estimated device seconds of everything queued."""
        return sum(queue.backlog_s for queue in self._bands.values())

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

    def next_turn(self, now: float) -> Turn | None:
        """The turn that goes next; it stays queued until `take`."""
        band = self._next_band(now)
        return None if band is None else self._bands[band].next_turn()

    def take(self, turn: Turn) -> None:
        """What `next_turn` named goes to the device."""
        self._since_aged += 1
        if any(queue.turns for band, queue in self._bands.items() if band < turn.band):
            self._since_aged = 0
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

    def refuse_hopeless(self, caller: str, band: Band, ahead_s: float, run_s: float, deadline_s: float | None) -> None:
        """Refuse a search that had better not start.

        ahead_s: device seconds of what runs; run_s: of the search itself, as far as it is known; deadline_s: the
        caller's remaining time. Raises QueueFullError and DeadlineUnreachableError, with the figures.
        """
        limits = self.limits
        queued, backlog_s = len(self), ahead_s + self.backlog_s
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

    def _next_band(self, now: float) -> Band | None:
        busy = [band for band, queue in self._bands.items() if queue.turns]
        if not busy:
            return None
        if len(busy) > 1 and self._since_aged >= self.limits.ageing_turns - 1:
            for band in self._aged:
                if band in busy[1:] and now - next(iter(self._bands[band].turns)).arrived_at >= self.limits.ageing_s:
                    return band
        return busy[0]
