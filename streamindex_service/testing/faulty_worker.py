"""`python -m streamindex_service.testing.faulty_worker FOLDER FD`: workers with failpoints, for tests alone.

Importing torch takes seconds, and a test that kills workers by the hundred waits for it each time. So this process
imports once, and forks a worker whenever its frontend asks over the socket FD: a packet with the worker's end of its
link as a descriptor, answered by the worker's process id. The worker is forked twice over, so that it becomes the
frontend's own child (which is its subreaper), to be waited for and to be blamed like any other. It runs what
`streamindex_service.worker` runs, with wrappers around some methods. When the frontend is gone, this goes as well.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch

from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.testing.failpoints import Action, Failpoints, Point, Seam, fail_call, install
from streamindex_service.worker import __main__ as worker
from streamindex_service.worker import canary, executor
from streamindex_service.worker.commands import Commands
from streamindex_service.worker.executor import Executor
from streamindex_service.worker.key_store import KeyStore, SegmentMap

RUBBISH = 0x5A  # in every byte; no answer looks like it


def main(arguments: list[str]) -> None:
    """Fork workers until the frontend is gone. Arguments: the folder of the failpoints, the socket's descriptor."""
    points, frontend = Failpoints(Path(arguments[0])), socket.socket(fileno=int(arguments[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    install(_seams(), partial(_come_by, points))
    for name in ("_search_on_cpu", "attend"):
        owner: Any = Executor if name.startswith("_") else executor
        setattr(owner, name, _tearing(getattr(owner, name), points))
    while True:
        _, fds, _, _ = socket.recv_fds(frontend, 16, 1)
        if not fds:
            os._exit(0)  # nothing is to be tidied up, and torch takes its time for it
        frontend.send(str(_fork_twice(frontend, fds[0])).encode())
        os.close(fds[0])


def _fork_twice(frontend: socket.socket, fd: int) -> int:
    """A worker that is the frontend's child; its process id."""
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.close(writing)
            frontend.close()
            _run_worker(fd, parent)
        os.write(writing, str(child).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(between, 0)  # from now on the worker has its new parent
    with os.fdopen(reading) as pipe:
        return int(pipe.read())


def _run_worker(fd: int, first_parent: int) -> None:
    while os.getppid() == first_parent:  # it ends at once, and a worker ends with its parent
        time.sleep(0.001)
    try:
        sys.argv = [sys.argv[0], str(fd)]
        worker.main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _come_by(points: Failpoints, point: Point) -> None:
    action = points.take(point)
    if action is not None:
        _act(action)


def _act(action: Action) -> None:
    if action is Action.FAIL_CALL:
        fail_call()
    elif action is Action.KILL_FRONTEND:
        os.kill(os.getppid(), signal.SIGKILL)
    else:
        os.kill(os.getpid(), signal.SIGKILL if action is Action.KILL_WORKER else signal.SIGSTOP)


def _tearing(compute: Any, points: Failpoints) -> Any:
    """The computation of a tile on a CPU; at TILE_TORN half of what it wrote is overwritten."""

    def torn(*arguments: Any, **named: Any) -> Any:
        result = compute(*arguments, **named)
        action = points.take(Point.TILE_TORN)
        if action is None:
            return result
        if isinstance(arguments[0], Executor):
            segments, message = arguments[0].segments, arguments[1]
            size_bytes = 4 * message.rows * message.top_k
            answer = segments.bytes_at(message.indices.segment_id, message.indices.offset_bytes, size_bytes)
        else:
            answer = arguments[6].view(-1).view(torch.uint8)
        answer[: -(-answer.numel() // 2)] = RUBBISH
        _act(action)
        return result

    return torn


def _is_tile(_: Any, command: Any) -> bool:
    return command.tile is not None


def _answers_tile(_: Any, work: Any, reply: pb.FromWorker | None = None) -> bool:
    return reply is not None and reply.HasField("tile_done")


def _seams() -> list[Seam]:
    return [
        Seam(Point.CANARY_BEGUN, canary, "run", after=False),
        Seam(Point.READY_SAID, worker.Worker, "_announce", after=True),
        Seam(Point.SEGMENT_RECEIVED, SegmentMap, "add", after=False),
        Seam(Point.SEGMENT_MAPPED, SegmentMap, "add", after=True),
        Seam(Point.PAGES_RECEIVED, Executor, "load_pages", after=False),
        Seam(Point.PAGES_COPIED, Executor, "_copy_pages", after=True),
        Seam(Point.VIEW_DEFINED, KeyStore, "define_views", after=True),
        Seam(Point.TILE_RECEIVED, Commands, "put", after=False, when=_is_tile),
        Seam(Point.TILE_BEGUN, Executor, "search_tile", after=False),
        Seam(Point.TILE_BEGUN, Executor, "attend_tile", after=False),
        Seam(Point.TILE_COMPUTED, Executor, "_end", after=False, when=_answers_tile),
        Seam(Point.TILE_ANNOUNCED, Executor, "_end", after=True, when=_answers_tile),
        Seam(Point.VIEW_DROPPED, KeyStore, "drop_view", after=False),
        Seam(Point.SEGMENT_DROPPED, Executor, "unmap_segment", after=False),
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
