"""What the device has been doing: totals, how long tiles waited and ran lately, and how right the estimates were."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import NamedTuple

_LATELY = 1024  # tiles
_BAND_LATELY = 256  # of each band
LARGE_BYTES = 64 << 20  # estimates from here on are held to their bounds: below, roundings are a noticeable part
RATIO_BOUNDS = (0.5, 0.8, 0.9, 0.95, 1.0)


class Quantiles(NamedTuple):
    """Of the tiles of late, in seconds; zeros when there were none."""

    p50_s: float
    p99_s: float


class MemoryRatios:
    """Measured device memory of tiles, as parts of what was estimated. Never above 1, or the budget means nothing.

    `counts[i]` are the large tiles with a ratio of at most `RATIO_BOUNDS[i]` and above the bound before; the last of
    them are those above all. `most_of_any` is of tiles of any size.
    """

    def __init__(self) -> None:
        self.large_tiles = 0
        self.last = 0.0
        self.least = 0.0
        self.most = 0.0
        self.most_of_any = 0.0
        self.counts = [0] * (len(RATIO_BOUNDS) + 1)
        self.failures = 0  # tiles for which the device had no memory

    def add(self, measured_bytes: int, estimated_bytes: int) -> None:
        """One tile; nothing when one of the two is not known."""
        if not measured_bytes or not estimated_bytes:
            return
        ratio = measured_bytes / estimated_bytes
        self.most_of_any = max(self.most_of_any, ratio)
        if estimated_bytes < LARGE_BYTES:
            return
        self.least = min(self.least, ratio) if self.large_tiles else ratio
        self.large_tiles += 1
        self.last = ratio
        self.most = max(self.most, ratio)
        self.counts[bisect_left(RATIO_BOUNDS, ratio)] += 1


class Meter:
    """Counts tiles that are done."""

    def __init__(self) -> None:
        self.tiles = 0
        self.device_s = 0.0
        self.memory = MemoryRatios()
        self._lately: deque[tuple[float, float]] = deque(maxlen=_LATELY)
        self._waited: dict[int, deque[float]] = {}

    def tile_done(self, waited_s: float, device_s: float, band: int = 0) -> None:
        """A tile waited for its turn, then ran, for so long."""
        self.tiles += 1
        self.device_s += device_s
        self._lately.append((waited_s, device_s))
        self._waited.setdefault(band, deque(maxlen=_BAND_LATELY)).append(waited_s)

    def waits(self, band: int | None = None) -> Quantiles:
        """How long tiles waited, of one band or of all."""
        if band is not None:
            return _quantiles(list(self._waited.get(band, ())))
        return _quantiles([waited_s for waited_s, _ in self._lately])

    def runs(self) -> Quantiles:
        """How long they ran."""
        return _quantiles([device_s for _, device_s in self._lately])


def _quantiles(values: list[float]) -> Quantiles:
    if not values:
        return Quantiles(0.0, 0.0)
    values.sort()
    return Quantiles(values[(len(values) - 1) // 2], values[(len(values) - 1) * 99 // 100])
