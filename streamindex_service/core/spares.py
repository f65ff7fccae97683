"""Pieces of freed memory, kept for the next that is needed.

The first touch of fresh memory costs more than writing it again: the system has to find and clear every page of it. So
a bounded number of bytes stays as it is. What is kept may hold what its last owner wrote.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from streamindex_service.core.ledger import Ledger

Memory = TypeVar("Memory")


class Spares(Generic[Memory]):
    """At most `limit_bytes`, counted as the ledger's spare bytes. `drop` lets go of a piece; the oldest goes first."""

    def __init__(self, ledger: Ledger, limit_bytes: int, drop: Callable[[Memory], None]) -> None:
        self._ledger = ledger
        self._limit_bytes = limit_bytes
        self._drop = drop
        self._kept: deque[tuple[int, Memory]] = deque()  # (bytes, piece), oldest first

    def keep(self, memory: Memory, size_bytes: int) -> None:
        """Take a piece that the ledger no longer counts as reserved; older ones go if there are too many bytes."""
        self._kept.append((size_bytes, memory))
        self._ledger.spare_bytes += size_bytes
        while self._ledger.spare_bytes > self._limit_bytes or self._ledger.surplus_bytes:
            self._drop_oldest()

    def take(self, size_bytes: int) -> Memory | None:
        """Give out the newest piece of exactly this length, which is reserved already; it is no longer spare."""
        for index in range(len(self._kept) - 1, -1, -1):
            if self._kept[index][0] == size_bytes:
                memory = self._kept[index][1]
                del self._kept[index]
                self._ledger.spare_bytes -= size_bytes
                return memory
        return None

    def make_room(self) -> None:
        """Drop what the ledger's reservations leave no room for."""
        while self._ledger.surplus_bytes:
            self._drop_oldest()

    def drop_all(self) -> bool:
        """Drop everything; whether there was anything."""
        had_any = bool(self._kept)
        while self._kept:
            self._drop_oldest()
        return had_any

    def _drop_oldest(self) -> None:
        size_bytes, memory = self._kept.popleft()
        self._ledger.spare_bytes -= size_bytes
        self._drop(memory)
