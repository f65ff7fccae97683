"""What the protocol logic asks of the world.

An operation is a generator: it yields effects, is sent their results and has failures thrown into it as
StreamIndexError, and returns its own result. The sync and the asyncio client are two interpreters of the same
operations; tests are a third. An operation does no I/O, holds no lock and never sleeps.

The sending half of a stream runs beside the operation, at the pace of the network: the interpreter asks the `Duplex`
for its next step and is told to send, to fetch input, to wait until the operation has moved on, or to half-close.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeAlias, TypeVar

from google.protobuf import message

from streamindex_client.contract import Method

__all__ = ["Call", "Close", "Duplex", "Effect", "Emit", "Notify", "Open", "Operation", "Pause", "Read", "Sleep", "Step"]


class Pause(Enum):
    """Why there is nothing to send now."""

    WAIT = "wait"  # until the operation has taken another message
    NEED_INPUT = "need input"  # feed the next block of the caller's iterator
    HALF_CLOSE = "half-close"  # nothing will follow


Step: TypeAlias = Pause | Callable[[], bytes]
"""A pause, or how to build the next message: to be called once, in order, outside any lock."""


class Duplex(Protocol):
    """The sending half of a stream."""

    @property
    def wants_input(self) -> bool:
        """Whether the next step can only be NEED_INPUT; asking changes nothing."""

    def next_step(self) -> Step:
        """What to do next."""

    def feed(self, block: Any) -> None:
        """The next block of the caller's iterator. Raises InputError."""

    def end_input(self) -> None:
        """The caller's iterator is at its end."""


@dataclass(frozen=True, slots=True)
class Call:
    """One unary call; its result is the response message."""

    method: Method
    request: message.Message
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Sleep:
    """Let time pass."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Open:
    """Start a stream, the only one of the operation, and its sending half."""

    method: Method
    duplex: Duplex
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Read:
    """The next message of the stream, as bytes; None at its end when the status is OK."""


@dataclass(frozen=True, slots=True)
class Close:
    """Cancel what is left of the stream."""


@dataclass(frozen=True, slots=True)
class Emit:
    """Hand a result to the caller."""

    value: Any


@dataclass(frozen=True, slots=True)
class Notify:
    """Call the caller back."""

    callback: Callable[[int, int], object]
    done: int
    total: int


Effect: TypeAlias = Call | Sleep | Open | Read | Close | Emit | Notify
Result = TypeVar("Result")
Operation: TypeAlias = Generator[Effect, Any, Result]
