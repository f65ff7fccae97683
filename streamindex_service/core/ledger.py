"""A byte budget with a hard limit."""

from __future__ import annotations


class Ledger:
    """Counts reserved bytes; never lets them pass the limit.

    Whoever reserves must release the same number of bytes; `assert` stands for our own bugs. `spare_bytes` are taken
    from the system and not reserved: memory kept for reuse, by an owner who gives it up when a reservation needs the
    room, so that they never refuse one.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.reserved_bytes = 0
        self.peak_bytes = 0
        self.spare_bytes = 0

    @property
    def free_bytes(self) -> int:
        """What can still be reserved."""
        return self.limit_bytes - self.reserved_bytes

    @property
    def surplus_bytes(self) -> int:
        """What reserved and spare bytes together have above the limit."""
        return max(0, self.reserved_bytes + self.spare_bytes - self.limit_bytes)

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
