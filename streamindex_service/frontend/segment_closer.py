"""Segments that go: unmapped on a thread, for that takes the system about a tenth of the time of filling them.

A cache of tens of GiB, deleted, would hold up the event loop for seconds.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class SegmentCloser:
    """Closes segments one after another, on a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="unmap")
        self._lock = threading.Lock()
        self._pending_bytes = 0

    @property
    def pending_bytes(self) -> int:
        """Memory that was given up and may not have gone."""
        with self._lock:
            return self._pending_bytes

    def close(self, held: list[Any], size_bytes: int) -> None:
        """Close what is in a list of one. Its memory goes with the last reference to it, which must be the list's."""
        with self._lock:
            self._pending_bytes += size_bytes
        self._thread.submit(self._close, held, size_bytes)

    def settle(self) -> None:
        """Wait until all that was to be closed is closed."""
        self._thread.submit(lambda: None).result()

    def stop(self) -> None:
        """Close the rest; nothing comes after it."""
        self._thread.shutdown(wait=True)

    def _close(self, held: list[Any], size_bytes: int) -> None:
        held.pop().close()
        with self._lock:
            self._pending_bytes -= size_bytes
