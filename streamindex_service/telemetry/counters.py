"""What is counted while calls run, and read only when somebody asks. Standard library; used on one event loop.

Counting is an addition, or a search among a dozen bounds: names, labels and text are made when they are read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Bounds of latencies: a decode step takes milliseconds, a long prefill minutes."""


class Histogram:
    """Values by size: `counts[i]` are those of at most `bounds[i]` and above the bound before, the last of them the
    rest."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def quantile(self, share: float) -> float:
        """The bound under which this share of the values lies; 0 when there are none, infinity beyond the last."""
        wanted, seen = share * sum(self.counts), 0
        if not wanted:
            return 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            seen += count
            if seen >= wanted:
                return bound
        return float("inf")


class MethodCounters:
    """Of one method. Times in seconds.

    A tile's phases: `queue` until it was its turn; `device` what the device took, as it measured it; `transfer` the
    rest until its answer was there, which is the worker link, copies of keys and rows, and tiles in front of it.
    """

    __slots__ = ("codes", "device", "duration", "queue", "running", "transfer")

    def __init__(self) -> None:
        self.running = 0
        self.codes: Counter[str] = Counter()
        self.duration = Histogram()
        self.queue = Histogram()
        self.transfer = Histogram()
        self.device = Histogram()

    def ended(self, code: str, duration_s: float) -> None:
        """A call is over, with this gRPC code by name."""
        self.codes[code] += 1
        self.duration.add(duration_s)

    def tile_done(self, queue_s: float, transfer_s: float, device_s: float) -> None:
        """One of its tiles is."""
        self.queue.add(queue_s)
        self.transfer.add(max(0.0, transfer_s))  # two clocks
        self.device.add(device_s)


class Counters:
    """Of a service. `methods` has a closed set of names: those of the contract."""

    def __init__(self) -> None:
        self.methods: dict[str, MethodCounters] = {}
        self.refusals: Counter[str] = Counter()  # by reason, those of a batch's items included
        self.upload_bytes = 0  # payload of chunks and of appends in batches that were taken
        self.queries = 0  # query rows that were taken

    def of(self, method: str) -> MethodCounters:
        """A method's counters."""
        found = self.methods.get(method)
        if found is None:
            found = self.methods[method] = MethodCounters()
        return found
