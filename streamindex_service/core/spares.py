"""Pieces of freed memory, kept for the next that is needed.

The first touch of fresh memory costs more than writing it again: the system has to find and clear every page of it. So
a bounded number of bytes stays as it is, in a bounded number of pieces, since each may cost its owner more than bytes
(a descriptor, a mapping), and for a bounded time. What is kept may hold what its last owner wrote.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from streamindex_service.core.ledger import Ledger

Memory = TypeVar("Memory")


@dataclass(frozen=True, slots=True)
class SpareLimits:
    """What may be kept: bytes, pieces, and for how long (seconds) when nobody takes it."""

    size_bytes: int
    pieces: int
    idle_s: float


@dataclass(frozen=True, slots=True)
class _Spare(Generic[Memory]):
    memory: Memory
    size_bytes: int
    since_s: float


class Spares(Generic[Memory]):
    """Pieces within the limits, counted as the ledger's spare bytes. `drop` lets go of a piece; the oldest goes first.

    `clock` gives seconds, and never goes back.
    """

    def __init__(
        self, ledger: Ledger, limits: SpareLimits, drop: Callable[[Memory], None], clock: Callable[[], float]
    ) -> None:
        self._ledger = ledger
        self._limits = limits
        self._drop = drop
        self._clock = clock
        self._kept: deque[_Spare[Memory]] = deque()  # oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, memory: Memory, size_bytes: int) -> None:
        """Take a piece that the ledger no longer counts as reserved; older ones go if it is too much."""
        self._kept.append(_Spare(memory, size_bytes, self._clock()))
        self._ledger.spare_bytes += size_bytes
        while (
            self._ledger.spare_bytes > self._limits.size_bytes
            or len(self._kept) > self._limits.pieces
            or self._ledger.surplus_bytes
        ):
            self._drop_oldest()

    def take(self, size_bytes: int) -> Memory | None:
        """Give out the newest piece of exactly this length, which is reserved already; it is no longer spare."""
        for index in range(len(self._kept) - 1, -1, -1):
            if self._kept[index].size_bytes == size_bytes:
                memory = self._kept[index].memory
                del self._kept[index]
                self._ledger.spare_bytes -= size_bytes
                return memory
        return None

    def make_room(self) -> None:
        """Drop what the ledger's reservations leave no room for."""
        while self._ledger.surplus_bytes:
            self._drop_oldest()

    def expire(self) -> None:
        """Drop what nobody has taken for too long."""
        oldest_s = self._clock() - self._limits.idle_s
        while self._kept and self._kept[0].since_s <= oldest_s:
            self._drop_oldest()

    def drop_all(self) -> bool:
        """Drop everything; whether there was anything."""
        had_any = bool(self._kept)
        while self._kept:
            self._drop_oldest()
        return had_any

    def _drop_oldest(self) -> None:
        spare = self._kept.popleft()
        self._ledger.spare_bytes -= spare.size_bytes
        self._drop(spare.memory)
