"""A byte budget with a hard limit."""

from __future__ import annotations


class Ledger:
    """Counts reserved bytes; never lets them pass the limit.

    Whoever reserves must release the same number of bytes; `assert` stands for our own bugs.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.reserved_bytes = 0
        self.peak_bytes = 0

    @property
    def free_bytes(self) -> int:
        """What can still be reserved."""
        return self.limit_bytes - self.reserved_bytes

    def try_reserve(self, size_bytes: int) -> bool:
        """Reserve, or change nothing and answer False."""
        assert size_bytes >= 0
        if size_bytes > self.free_bytes:
            return False
        self.reserved_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
        return True

    def release(self, size_bytes: int) -> None:
        """Give back what was reserved."""
        assert 0 <= size_bytes <= self.reserved_bytes, f"{self.name}: {size_bytes} of {self.reserved_bytes}"
        self.reserved_bytes -= size_bytes
