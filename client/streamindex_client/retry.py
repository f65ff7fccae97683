"""Deadlines and the retry policy, as arithmetic over an injected clock."""

from __future__ import annotations

import random
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamindex_client.errors import DeadlineError, StreamIndexError
from streamindex_client.options import ClientOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamindex_client.options import RetryPolicy

__all__ = ["Deadline", "Environment", "Retrier"]


def _new_key() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Environment:
    """What the protocol logic takes from outside: options, time, chance, names."""

    options: ClientOptions = field(default_factory=ClientOptions)
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random
    new_key: Callable[[], str] = _new_key

    def deadline(self, timeout_s: float | None) -> Deadline:
        """The deadline of an operation that starts now."""
        return Deadline(self.clock, self.options.default_timeout_s if timeout_s is None else timeout_s)

    def retrier(self, deadline: Deadline) -> Retrier:
        """A fresh count of attempts."""
        return Retrier(self.options.retry, deadline, self.clock, self.chance)


class Deadline:
    """The end of a whole operation, retries included."""

    def __init__(self, clock: Callable[[], float], timeout_s: float | None) -> None:
        self._clock = clock
        self._end = None if timeout_s is None else clock() + timeout_s

    def remaining_s(self) -> float | None:
        """Seconds left; None without a deadline. Raises DeadlineError when none are."""
        if self._end is None:
            return None
        left = self._end - self._clock()
        if left <= 0:
            raise DeadlineError("the time given for the operation is over")
        return left


class Retrier:
    """Decides after each failure whether and when to try again."""

    def __init__(
        self, policy: RetryPolicy, deadline: Deadline, clock: Callable[[], float], chance: Callable[[], float]
    ) -> None:
        self._policy = policy
        self._deadline = deadline
        self._clock = clock
        self._chance = chance
        self._failures = 0
        self._since = clock()

    @property
    def failures(self) -> int:
        """Attempts that failed since the last progress."""
        return self._failures

    def progress(self) -> None:
        """The attempt has brought something new."""
        self._failures = 0
        self._since = self._clock()

    def delay_s(self, error: StreamIndexError, *, idempotent: bool = True) -> float:
        """Seconds to wait before the next attempt.

        Raises `error` itself if it must not or need not be tried again, DeadlineError (caused by it) if the next
        attempt would start too late. A call that is not idempotent is tried again only if the server offers it.
        """
        self._failures += 1
        if not error.retriable or (error.retry_after_s is None and not idempotent):
            raise error
        policy = self._policy
        if self._failures >= policy.max_attempts:
            raise error
        step = min(policy.max_s, policy.initial_s * policy.multiplier ** min(self._failures - 1, 64))
        delay = max(step * (1 - policy.jitter * self._chance()), 0.0)
        if error.retry_after_s is not None:
            # spread upwards: callers refused together must not come back together
            delay = max(delay, error.retry_after_s * (1 + 0.1 * policy.jitter * self._chance()))
        if self._clock() - self._since + delay > policy.max_total_s:
            raise error
        try:
            left = self._deadline.remaining_s()
        except DeadlineError as late:
            raise late from error
        if left is not None and delay >= left:
            raise DeadlineError(f"no time is left to try again after: {error}") from error
        return delay
