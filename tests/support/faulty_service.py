"""A service with failpoints, in its own processes."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamindex_service.testing.failpoints import Failpoints, process_state, workers_of
from streamindex_service.testing.service import RunningService, process_children

_PROGRAM = "streamindex_service.testing.faulty_frontend"


class FaultyService(RunningService):
    """`points` are its failpoints. Its workers start within a tenth of a second."""

    def __init__(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="failpoints-")
        self.points = Failpoints(Path(self._folder.name))
        super().__init__(settings, program=("-m", _PROGRAM, self._folder.name))

    def worker_pids(self) -> list[int]:
        """See RunningService; without the process that forks them."""
        source = Path(self._folder.name) / "source.pid"
        return workers_of(self.process.pid, [int(source.read_text())] if source.exists() else [])

    def processes(self) -> list[int]:
        """The frontend and everything that it started."""
        return [self.process.pid, *process_children(self.process.pid)]

    def kill_frontend(self) -> None:
        """As nothing can prevent."""
        os.kill(self.process.pid, signal.SIGKILL)

    def stop(self, grace_s: float = 30.0) -> int | None:
        """See RunningService."""
        try:
            return super().stop(grace_s)
        finally:
            self._folder.cleanup()


def is_gone(pid: int) -> bool:
    """Ended, whether or not somebody has waited for it."""
    return process_state(pid) in ("", "Z")
