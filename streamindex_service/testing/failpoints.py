"""Points at which frontend and worker hand over to each other, and what a test can have happen there.

    with tempfile.TemporaryDirectory() as folder:
        points = Failpoints(Path(folder))
        # a service started as `python -m streamindex_service.testing.faulty_frontend FOLDER serve`
        points.arm(Point.TILE_BEGUN, Action.KILL)
        ...
        points.was_reached(Point.TILE_BEGUN)

The service itself knows nothing of them: no setting, variable or message reaches them, and there is no code for them on
any path. `faulty_frontend` and `faulty_worker` are programs of their own, which put wrappers around the methods below
before they start; they are started by tests. See docs/decisions/0027.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from streamindex_service.testing.service import process_children

_STATE_S = 10.0  # the longest wait for a signal to have its effect
_LOOK_S = 0.001


class Point(StrEnum):
    """Where something can be made to happen. The first part of a name is what is handed over."""

    # In the frontend.
    SEGMENT_MADE = "segment.made"  # host memory for pages, which no worker knows of
    SEGMENT_HANDED_OVER = "segment.handed_over"  # its descriptor is sent
    PROMOTION_BEGUN = "promotion.begun"  # pages have places on the device, and nothing is copied
    PAGES_ASKED_FOR = "pages.asked_for"  # the copies are asked for
    EVICTION_DECIDED = "eviction.decided"  # a page has lost its place
    TILE_SUBMITTED = "tile.submitted"  # before it is sent
    TILE_SENT = "tile.sent"
    TILE_ANSWERED = "tile.answered"  # the answer is announced, and nobody has heard it
    READY_HEARD = "ready.heard"  # likewise that a worker is ready
    ROWS_STAGED = "rows.staged"  # of an upload; not acknowledged
    UPLOAD_COMMITTED = "upload.committed"  # and not told
    SPILL_WRITTEN = "spill.written"  # pages are on disk and in memory
    SPILL_READ = "spill.read"  # a page was read back, and nobody sees it
    # In the worker.
    CANARY_BEGUN = "canary.begun"  # before the first search
    READY_SAID = "ready.said"  # a worker is ready, and has taken nothing
    SEGMENT_RECEIVED = "segment.received"  # its descriptor is here, and it is not mapped
    SEGMENT_MAPPED = "segment.mapped"  # and nobody was told
    PAGES_RECEIVED = "pages.received"  # copies are asked for, and none is made
    PAGES_COPIED = "pages.copied"  # and not reported
    VIEW_DEFINED = "view.defined"  # likewise
    TILE_RECEIVED = "tile.received"  # read from the link
    TILE_BEGUN = "tile.begun"  # its turn has come
    TILE_TORN = "tile.torn"  # half of its answer is rubbish, and stays so
    TILE_COMPUTED = "tile.computed"  # its answer is written, and not announced
    TILE_ANNOUNCED = "tile.announced"
    VIEW_DROPPED = "view.dropped"  # what an eviction or a deletion leads to
    SEGMENT_DROPPED = "segment.dropped"  # its unmapping is asked for

    @property
    def in_frontend(self) -> bool:
        """Whether the frontend comes by, else the worker does."""
        return self in _IN_FRONTEND


_IN_FRONTEND = frozenset(list(Point)[: list(Point).index(Point.CANARY_BEGUN)])


class Action(StrEnum):
    """What happens at a point, whoever comes by."""

    KILL_WORKER = "kill-worker"  # SIGKILL
    STOP_WORKER = "stop-worker"  # SIGSTOP: it hangs
    KILL_FRONTEND = "kill-frontend"
    FAIL_CALL = "fail-call"  # what is done there raises OSError, as when the system has no memory left


class Failpoints:
    """The points of one service, by files in a folder that it was started with.

    A point that is armed acts once, for the first who comes by: its file is renamed, which one process can do.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    # For a test.

    def arm(self, point: Point, action: Action) -> None:
        """Have it happen there, once, from now on."""
        (self._folder / f"{point}.reached").unlink(missing_ok=True)
        unready = self._folder / f"{point}.unready"
        unready.write_text(action)
        unready.rename(self._armed(point))

    def disarm(self) -> None:
        """No point is armed any more."""
        for path in self._folder.glob("*.armed"):
            path.unlink(missing_ok=True)

    def was_reached(self, point: Point) -> bool:
        """Whether what it was armed with last has happened, or is about to."""
        return (self._folder / f"{point}.reached").exists()

    # For the process that comes by.

    def take(self, point: Point) -> Action | None:
        """What is to happen here now."""
        reached = self._folder / f"{point}.reached"
        try:
            self._armed(point).rename(reached)
        except FileNotFoundError:
            return None
        return Action(reached.read_text())

    def _armed(self, point: Point) -> Path:
        return self._folder / f"{point}.armed"


@dataclass(frozen=True)
class Seam:
    """A point before or after a method or function of `owner`; `when(*arguments)` says of which calls."""

    point: Point
    owner: Any
    name: str
    after: bool
    when: Callable[..., bool] = lambda *arguments: True


def install(seams: Sequence[Seam], come_by: Callable[[Point], None]) -> None:
    """Put a wrapper around each method that has a point. For the start of a process, before it has threads.

    Raises AttributeError for a method that is no longer there.
    """
    for seam in seams:
        setattr(seam.owner, seam.name, _wrapped(getattr(seam.owner, seam.name), seam, come_by))


def _wrapped(inner: Callable[..., Any], seam: Seam, come_by: Callable[[Point], None]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        concerned = seam.when(*arguments)
        if concerned and not seam.after:
            come_by(seam.point)
        result = inner(*arguments, **named)
        if concerned and seam.after:
            come_by(seam.point)
        return result

    return wrapper


def fail_call() -> None:
    """Raises OSError."""
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def act_on_worker(pids: Sequence[int], action: Action) -> None:
    """Kill or stop workers from outside; over when the system says that it is so."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if action is Action.KILL_WORKER else signal.SIGSTOP)
        end = time.monotonic() + _STATE_S
        while process_state(pid) not in ("T", "Z", ""):
            assert time.monotonic() < end, f"process {pid} goes on"
            time.sleep(_LOOK_S)


def workers_of(frontend: int, others: Sequence[int]) -> list[int]:
    """Children of a frontend without those that are no workers."""
    return [pid for pid in process_children(frontend) if pid not in others]


def process_state(pid: int) -> str:
    """The letter of /proc: R, S, T (stopped), Z (ended and not waited for) and so on; "" when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
