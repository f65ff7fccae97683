"""Inside a band: which of the turns that wait goes next. The method and its bounds are in `scheduler.py`."""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


class Band(enum.IntEnum):
    """Priorities, with the numbers of `streamindex.v1.Priority`; the smaller goes first."""

    INTERACTIVE = 1
    STANDARD = 2
    BATCH = 3


@dataclass(slots=True, eq=False)
class Turn:
    """One tile of a search, waiting for the device.

    cost_s: estimated device seconds, of which promotion_s bring keys there; size_bytes: rows that wait in memory.
    """

    caller: str
    band: Band
    cost_s: float
    size_bytes: int
    arrived_at: float
    promotion_s: float = 0.0
    alone: bool = False  # runs while nothing else does


class Admission(Protocol):
    """Says which turns have to wait for others to make room for their keys."""

    def as_of(self, band: Band) -> object:
        """Equal to what it was for as long as those turns of this band are held back that were, but for turns that came
        or have changed."""

    def held_s(self, turn: Turn) -> float:
        """0.0 when it may go; else the device seconds for which keys like its own are left where they are."""

    def gate_is_shut(self, band: Band) -> bool:
        """Whether `may_displace` says no to each turn of this band."""

    def may_displace(self, turn: Turn, *, for_age: bool) -> bool:
        """Whether others may be made to make room for it now. for_age: it would go because its band is old."""


@dataclass(slots=True, eq=False)
class _Caller:
    """`free`: the oldest turn that is not held back; `held`: the one for which others have to make room."""

    name: str
    turns: deque[Turn] = field(default_factory=deque)
    free: Turn | None = None
    held: Turn | None = None
    deficit_s: float = 0.0
    visited: bool = False  # has had the allowance of its present visit
    given_s: float = 0.0  # in this visit
    backlog_s: float = 0.0


_Choices = list[tuple[Turn, float]]


class BandQueue:
    """The callers of a band, in the order of the round.

    Hundreds of turns may be held back, and one is chosen after each that comes or ends: what `Admission` said of a turn
    is noted, and asked again when that or the turn has changed.
    """

    def __init__(self, band: Band, allowance_s: float) -> None:
        self.turns: dict[Turn, None] = {}  # oldest first
        self.callers: dict[str, _Caller] = {}
        self.backlog_s = 0.0
        self.offered: Turn | None = None  # of those that are held back the one that others may make room for
        self._band = band
        self._allowance_s = allowance_s
        self._round: deque[_Caller] = deque()
        self._held: dict[_Caller, None] = {}  # those of whom a turn is; who waits longest is first
        self._free: dict[_Caller, None] = {}  # those of whom one is not
        self._visits: deque[float] = deque()  # device seconds given in each of the last visits
        self._most_given_s = 0.0  # in any of them
        self._held_s: dict[Turn, float] = {}  # what `Admission` has said
        self._as_of: object = None
        self._changed: dict[_Caller, None] = {}  # those to be looked at again

    @property
    def oldest_at(self) -> float:
        """When the turn came that waits longest."""
        return next(iter(self.turns)).arrived_at

    def add(self, turn: Turn) -> None:
        """It waits from now on."""
        caller = self.callers.get(turn.caller)
        if caller is None:
            caller = self.callers[turn.caller] = _Caller(turn.caller)
            self._round.append(caller)
        caller.turns.append(turn)
        self.turns[turn] = None
        self.price(turn, turn.cost_s)

    def price(self, turn: Turn, more_s: float) -> None:
        """The turn costs so much more, or less, than it was counted with."""
        caller = self.callers[turn.caller]
        self.backlog_s += more_s
        caller.backlog_s += more_s
        self._held_s.pop(turn, None)
        self._changed[caller] = None

    def take(self, turn: Turn) -> None:
        """It goes to the device: its caller pays."""
        caller = self.callers[turn.caller]
        caller.deficit_s -= turn.cost_s
        caller.given_s += turn.cost_s
        self.remove(turn)

    def remove(self, turn: Turn) -> None:
        """It waits no longer."""
        caller = self.callers[turn.caller]
        del self.turns[turn]
        caller.turns.remove(turn)
        if caller.held is turn:
            caller.held = None
            del self._held[caller]
        self.price(turn, -turn.cost_s)
        if not caller.turns:  # what it has not used is not kept for later (Shreedhar and Varghese, section 3)
            del self.callers[turn.caller], self._changed[caller]
            self._free.pop(caller, None)
            self._round.remove(caller)
            self._end_visit(caller)
        if not self.turns:
            self.backlog_s = 0.0  # rounding does not add up over a day

    def next_turn(self, admission: Admission | None, *, for_age: bool = False) -> Turn | None:
        """Whose turn it is in the round; None when all are held back. Asked again before a change, it says the same.

        Without `admission` nothing is held back.
        """
        if admission is not None:
            self._look(admission)
            self.offered = self._first_that_may_displace(admission, for_age=for_age)
            if self.offered is None and not self._free:
                return None
        passed = 0
        while True:
            caller = self._round[0]
            choices = self._choices(caller, admission)
            if not caller.visited:
                caller.deficit_s += self._allowance_of(choices)
                caller.visited = True
            for turn, behind_s in choices:
                if turn.cost_s + behind_s <= caller.deficit_s:
                    return turn
            self._end_visit(caller)
            self._round.rotate(-1)
            passed += 1
            if passed == len(self._round):
                self._skip_rounds(admission)
                passed = 0

    def _end_visit(self, caller: _Caller) -> None:
        if caller.given_s:
            self._visits.append(caller.given_s)
            while len(self._visits) > len(self._round) + 1:
                self._visits.popleft()
            self._most_given_s = max(self._visits)
        caller.visited, caller.given_s = False, 0.0

    def _allowance_of(self, choices: _Choices) -> float:
        """For a visit. Who is held back saves up what it falls behind: no more than another caller was given since its
        last visit. Callers who come with one short turn at a time do not use their allowances, and rounds of those pass
        many times faster than the device.
        """
        if not all(behind_s for _, behind_s in choices):
            return self._allowance_s
        return min(self._most_given_s, self._allowance_s)

    def held_back(self) -> Iterable[Turn]:
        """Of each caller the turn for which others have to make room."""
        return [caller.held for caller in self._held if caller.held is not None]

    def _look(self, admission: Admission) -> None:
        """Find out what is held back."""
        as_of = admission.as_of(self._band)
        if as_of != self._as_of:
            self._as_of = as_of
            self._held_s.clear()
            self._changed = dict.fromkeys(self._round)
        for caller in self._changed:
            caller.free = None
            self._free.pop(caller, None)
            for turn in caller.turns:
                if not self._held_s_of(turn, admission):
                    caller.free = turn
                    self._free[caller] = None
                    break
                if caller.held is None:
                    caller.held = turn
                    self._held[caller] = None
        self._changed.clear()

    def _held_s_of(self, turn: Turn, admission: Admission) -> float:
        held_s = self._held_s.get(turn)
        if held_s is None:
            held_s = self._held_s[turn] = admission.held_s(turn)
        return held_s

    def _first_that_may_displace(self, admission: Admission, *, for_age: bool) -> Turn | None:
        if not self._held or admission.gate_is_shut(self._band):
            return None
        for turn in self.held_back():
            # Where it is not any more, it was held back, and there is room by now.
            if self._held_s_of(turn, admission) and admission.may_displace(turn, for_age=for_age):
                return turn
        return None

    def _choices(self, caller: _Caller, admission: Admission | None) -> _Choices:
        """What a caller may have once its deficit is a turn's cost and so much more, the older first."""
        if admission is None:
            return [(caller.turns[0], 0.0)]
        choices = [(caller.free, 0.0)] if caller.free is not None else []
        held_s = self._held_s_of(caller.held, admission) if caller.held is not None else 0.0
        if caller.held is not None and held_s:
            if caller.held is self.offered:
                behind_s = 0.0
            else:  # who is alone is behind nobody: it would only make its own searches displace each other
                behind_s = len(self._round) * held_s if len(self._round) > 1 else math.inf
            first = not choices or caller.held.arrived_at <= choices[0][0].arrived_at
            choices.insert(0 if first else 1, (caller.held, behind_s))
        return choices

    def _skip_rounds(self, admission: Admission | None) -> None:
        """Rounds in which nobody could afford its turn, all at once: a single row may cost many allowances."""
        missing_s = min(
            turn.cost_s + behind_s - caller.deficit_s
            for caller in self._round
            for turn, behind_s in self._choices(caller, admission)
        )
        rounds = math.ceil(missing_s / self._allowance_s) - 1
        for caller in self._round:
            caller.deficit_s += max(0, rounds) * self._allowance_s
