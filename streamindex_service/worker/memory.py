"""What the device's allocator holds, and how much of it was one tile's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from streamindex_service.worker.device import Device


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes: held now; the most held since the start, with what was kept for later; taken from the device, in use or
    kept; and of these, free beside memory in use, so that the device does not get them back."""

    allocated_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0
    split_bytes: int = 0


class HasPeak(Protocol):
    """Work whose peak is measured."""

    peak_bytes: int


class MemoryWatch:
    """The allocator's own counts, which follow the calls that issue work, not the device that does it.

    A tile's peak is what these calls came to hold beyond what was held before; keys are held before. Memory of earlier
    tiles may go back meanwhile: the peak may be told too small by that, never too large. spare_bytes: of what
    is held, kept for later.
    """

    def __init__(self, device: Device, spare_bytes: Callable[[], int] = lambda: 0) -> None:
        self._device = device
        self._spare_bytes = spare_bytes
        self._lock = threading.Lock()
        self._peak_bytes = 0  # before the count was last begun anew

    def now(self) -> DeviceMemory:
        """Zeros on a CPU. From any thread."""
        if not self._device.is_cuda:
            return DeviceMemory()
        with self._lock:
            stats = self._stats()
            peak_bytes = max(self._peak_bytes, stats["allocated_bytes"]["all"]["peak"])
        allocated, reserved, split = (
            stats[name]["all"]["current"] for name in ("allocated_bytes", "reserved_bytes", "inactive_split_bytes")
        )
        return DeviceMemory(allocated - self._spare_bytes(), peak_bytes, reserved, split)

    @contextmanager
    def peak_of(self, work: HasPeak) -> Iterator[None]:
        """Note what is held at most within the block, of a GPU."""
        with self._lock:
            before = self._stats()["allocated_bytes"]["all"]
            self._peak_bytes = max(self._peak_bytes, before["peak"])
            torch.cuda.reset_peak_memory_stats(self._device.torch_device)
        yield
        work.peak_bytes = max(0, self._stats()["allocated_bytes"]["all"]["peak"] - before["current"])

    def _stats(self) -> dict[str, Any]:
        found: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(self._device.torch_device)
        return found
