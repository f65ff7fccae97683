"""`python -m streamindex_service.testing.faulty_frontend FOLDER serve`: the service with failpoints, for tests alone.

The frontend is what `streamindex` runs, with wrappers around some methods. Its workers come from `faulty_worker`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

from streamindex_service import cli
from streamindex_service.core.residency import Residency
from streamindex_service.frontend import segment_closer, service, spill, staging
from streamindex_service.frontend.device import DeviceWorker
from streamindex_service.frontend.host_memory import HostExtents
from streamindex_service.frontend.spill_files import SpillFiles
from streamindex_service.frontend.upload_stream import UploadStream
from streamindex_service.ipc.supervisor import Supervisor, WorkerLink
from streamindex_service.testing.failpoints import (
    Action,
    Failpoints,
    Point,
    Seam,
    act_on_worker,
    fail_call,
    install,
    workers_of,
)

_PR_SET_CHILD_SUBREAPER = 36
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # it forks


class ForkedWorker:
    """What the supervisor takes a `subprocess.Popen` for: a child that something else has started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def kill(self) -> None:
        """SIGKILL, unless it was waited for."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        if self._code is None:
            fd = os.pidfd_open(self.pid)
            try:
                if not select.select([fd], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            finally:
                os.close(fd)
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


class WorkerSource:
    """The process that forks workers."""

    def __init__(self, folder: str) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "streamindex_service.testing.faulty_worker", folder, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD},
            )
        (Path(folder) / "source.pid").write_text(str(self.process.pid))

    def start_worker(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        """In place of `Supervisor._start_process`."""
        socket.send_fds(self._socket, [b"one"], [theirs.fileno()])
        return cast("subprocess.Popen[bytes]", ForkedWorker(int(self._socket.recv(16))))

    def stop(self) -> None:
        """It ends when the socket does."""
        self._socket.close()
        self.process.wait()


class FullPool(ThreadPoolExecutor):
    """A pool whose threads are all there from the start: by itself it makes one when work waits, so how many there are
    would be chance, and a thread more than before no sign of one that was left behind."""

    def __init__(self, max_workers: int, thread_name_prefix: str) -> None:
        super().__init__(max_workers, thread_name_prefix)
        all_there = threading.Barrier(max_workers + 1)
        for _ in range(max_workers):
            self.submit(all_there.wait)
        all_there.wait()


def main(folder: str) -> None:
    """Serve, with failpoints in a folder."""
    for module in (service, spill, segment_closer):
        setattr(module, "ThreadPoolExecutor", FullPool)  # noqa: B010
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    source = WorkerSource(folder)
    setattr(Supervisor, "_start_process", source.start_worker)  # noqa: B010
    install(_seams(), partial(_come_by, Failpoints(Path(folder)), source.process.pid))
    try:
        cli.main()
    finally:
        source.stop()


def _come_by(points: Failpoints, source_pid: int, point: Point) -> None:
    action = points.take(point)
    if action is Action.KILL_FRONTEND:
        os.kill(os.getpid(), signal.SIGKILL)
    elif action is Action.FAIL_CALL:
        fail_call()
    elif action is not None:
        act_on_worker(workers_of(os.getpid(), [source_pid]), action)


def _sends(*kinds: str) -> Any:
    return lambda link, message, fd=None: message.WhichOneof("message") in kinds


def _hears(kind: str) -> Any:
    return lambda link, message: message.HasField(kind)


def _seams() -> list[Seam]:
    tiles = _sends("search_tile", "attend_tile")
    return [
        Seam(Point.SEGMENT_MADE, HostExtents, "_create", after=True),
        Seam(Point.SEGMENT_HANDED_OVER, WorkerLink, "send", after=True, when=_sends("map_segment")),
        Seam(Point.PROMOTION_BEGUN, DeviceWorker, "load", after=True),
        Seam(Point.PAGES_ASKED_FOR, WorkerLink, "send", after=True, when=_sends("load_pages")),
        Seam(Point.EVICTION_DECIDED, Residency, "_evict", after=True),
        Seam(Point.TILE_SUBMITTED, WorkerLink, "send", after=False, when=tiles),
        Seam(Point.TILE_SENT, WorkerLink, "send", after=True, when=tiles),
        Seam(Point.TILE_ANSWERED, WorkerLink, "_on_message", after=False, when=_hears("tile_done")),
        Seam(Point.READY_HEARD, WorkerLink, "_on_message", after=False, when=_hears("ready")),
        Seam(Point.ROWS_STAGED, UploadStream, "_store", after=True),
        Seam(Point.UPLOAD_COMMITTED, staging, "_commit", after=True),
        Seam(Point.SPILL_WRITTEN, SpillFiles, "write", after=True),
        Seam(Point.SPILL_READ, SpillFiles, "read", after=True),
    ]


if __name__ == "__main__":
    folder = sys.argv.pop(1)
    main(folder)
