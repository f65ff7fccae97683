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
    """`free`: the oldest turn that is not held back; `held`: the one for which others have to make room.

    visited: has had the allowance of its present visit, unless it `waited`: nothing of its own could go. round: of its
    last visit; paid_s: how much of what the rounds before that came to it has had, and ahead_s of that round itself;
    given_s: in its present visit.
    """

    name: str
    turns: deque[Turn] = field(default_factory=deque)
    free: Turn | None = None
    held: Turn | None = None
    deficit_s: float = 0.0
    visited: bool = False
    waited: bool = False
    round: int = 0
    paid_s: float = 0.0
    ahead_s: float = 0.0
    given_s: float = 0.0
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
        self._number = 1  # of the present round
        self._most_s = 0.0  # that a visit of it stood for
        self._owed_s = 0.0  # what all rounds before it came to, for a caller with turns all the time
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
            if caller.visited and not caller.waited:
                self._end_visit(caller, self._allowance_s - caller.deficit_s)
        if not self.turns:
            self.backlog_s = self._owed_s = self._most_s = 0.0  # rounding does not add up over a day

    def next_turn(self, admission: Admission | None, *, for_age: bool = False) -> Turn | None:
        """Whose turn it is in the round; None when all are held back. Asked again before a change, it says the same.

        Without `admission` nothing is held back.
        """
        if admission is not None:
            self._look(admission)
            self.offered = self._first_that_may_displace(admission, for_age=for_age)
            if self.offered is None and not self._free:
                return None
        else:
            self.offered = None
        passed = 0
        while True:
            caller = self._round[0]
            choices = self._choices(caller, admission)
            if not caller.visited:
                self._begin_visit(caller, choices)
            for turn, behind_s in choices:
                if turn.cost_s + behind_s <= caller.deficit_s:
                    return turn
            # What is left of its allowance it has the next time. What was saved up has been counted as it was.
            self._end_visit(caller, 0.0 if caller.waited else max(caller.given_s, self._allowance_s))
            self._round.rotate(-1)
            passed += 1
            if passed == len(self._round):
                self._skip_rounds(admission)
                passed = 0

    def _begin_visit(self, caller: _Caller, choices: _Choices) -> None:
        """A caller has its allowance for the present round. Who is held back saves up what it falls behind: of each
        round as much as any caller had in it, and no more than the allowance. Callers who come with one short turn at a
        time do not use theirs, and rounds of those pass many times faster than the device.

        One sum for all, and what each has had of it: whoever is held back now and then has neither more nor less, in
        the long run, than who never is.
        """
        if caller.round == self._number:  # it comes again: everybody has been visited
            self._owed_s += min(self._most_s, self._allowance_s)
            self._most_s = 0.0
            self._number += 1
        if not caller.round:  # what was before it came is not owed to it
            caller.paid_s = self._owed_s
        caller.round, caller.visited = self._number, True
        caller.waited = all(behind_s for _, behind_s in choices)
        ahead_s = min(self._most_s, self._allowance_s) if caller.waited else self._allowance_s
        caller.deficit_s += self._owed_s - caller.paid_s + (ahead_s - caller.ahead_s)
        caller.paid_s, caller.ahead_s = self._owed_s, ahead_s

    def _end_visit(self, caller: _Caller, stood_for_s: float) -> None:
        """stood_for_s: what the caller had of the round, given or kept: not what it had saved up or leaves."""
        self._most_s = max(self._most_s, stood_for_s)
        caller.visited, caller.given_s = False, 0.0

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
        skipped_s = max(0, rounds) * self._allowance_s
        self._owed_s += skipped_s
        for caller in self._round:
            caller.deficit_s += skipped_s
            caller.paid_s += skipped_s
