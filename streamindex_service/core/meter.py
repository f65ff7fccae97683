"""What the device has been doing: totals, and how long tiles waited and ran lately."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

_LATELY = 1024  # tiles


class Quantiles(NamedTuple):
    """Of the tiles of late, in seconds; zeros when there were none."""

    p50_s: float
    p99_s: float


class Meter:
    """Counts tiles that are done."""

    def __init__(self) -> None:
        self.tiles = 0
        self.device_s = 0.0
        self._lately: deque[tuple[float, float]] = deque(maxlen=_LATELY)

    def tile_done(self, waited_s: float, device_s: float) -> None:
        """A tile waited for its turn, then ran, for so long."""
        self.tiles += 1
        self.device_s += device_s
        self._lately.append((waited_s, device_s))

    def waits(self) -> Quantiles:
        """How long tiles waited."""
        return _quantiles([waited_s for waited_s, _ in self._lately])

    def runs(self) -> Quantiles:
        """How long they ran."""
        return _quantiles([device_s for _, device_s in self._lately])


def _quantiles(values: list[float]) -> Quantiles:
    if not values:
        return Quantiles(0.0, 0.0)
    values.sort()
    return Quantiles(values[(len(values) - 1) // 2], values[(len(values) - 1) * 99 // 100])
