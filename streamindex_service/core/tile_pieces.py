"""A tile for which the device had no memory: alone, then in ever smaller pieces, then not at all."""

from __future__ import annotations

from collections import deque

_PIECES = 4  # a tile that is too large is cut in so many


class TilePieces:
    """What is left to compute of rows [first, first + rows), and how it is tried next.

    As it is at first; after a want of memory alone; after another in quarters with the smallest workspace, and so on.
    A piece of one row cannot become smaller; it is tried as often as the others.
    """

    def __init__(self, first: int, rows: int, retries: int) -> None:
        self._left: deque[tuple[int, int]] = deque([(first, rows)])
        self._retries = retries
        self._wants = 0

    @property
    def current(self) -> tuple[int, int] | None:
        """First row and rows of the piece to run; None when all is done."""
        return self._left[0] if self._left else None

    @property
    def alone(self) -> bool:
        """Whether nothing else may run beside it."""
        return self._wants > 0

    @property
    def smallest(self) -> bool:
        """Whether it is to do with the smallest workspace."""
        return self._wants > 1

    def computed(self) -> None:
        """The present piece is done."""
        self._left.popleft()

    def no_memory(self) -> bool:
        """There was no memory for the present piece. False: it has been tried as often as it may."""
        self._wants += 1
        if self._wants > self._retries:
            return False
        if self.smallest:
            self._left = deque(piece for whole in self._left for piece in _cut(*whole))
        return True


def _cut(first: int, rows: int) -> list[tuple[int, int]]:
    size = -(-rows // _PIECES)
    return [(start, min(size, first + rows - start)) for start in range(first, first + rows, size)]
