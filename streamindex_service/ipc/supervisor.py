"""Starts a worker, talks to it, watches it, and starts another when it dies or hangs.

What the frontend sees is `WorkerLink`: operations that are sent in order and answered by futures. Where the worker runs
and over what the messages travel is this module's business alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from streamindex_service.errors import DeviceMemoryError, HostMemoryError, InternalError, ServiceError, WorkerLostError
from streamindex_service.ipc import link
from streamindex_service.ipc.running import RunningTiles
from streamindex_service.ipc.v1 import worker_pb2 as pb


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker is started and watched. Times in seconds."""

    device: str
    implementation: str
    device_budget_bytes: int
    cpu_threads: int
    ready_timeout_s: float
    heartbeat_s: float
    heartbeat_timeout_s: float
    work_timeout_s: float
    restart_backoff_s: float
    max_restart_backoff_s: float
    environment: dict[str, str] = field(default_factory=dict)
    issue_ahead_s: float = 0.001
    log_level: str = "info"


@dataclass
class WorkerEvents:
    """What the supervisor tells.

    `ready(capabilities)`: work may come. `down(running)`: the worker's memory is gone, from this moment on; the device
    was not done with the tiles `running`, which it was given in this order. `lost(blamed)`: why is known now; `blamed`
    says whether the work it was given may have killed it. `unusable(why)`: the settings ask for a device or an
    implementation that is not here, and no worker will ever be ready.
    """

    ready: Callable[[pb.Ready], None]
    down: Callable[[list[int]], None]
    lost: Callable[[bool], None]
    unusable: Callable[[str], None]
    log: Callable[..., None]


class CancelledTileError(Exception):
    """A tile was dropped because it was cancelled."""


class WorkerLink:
    """One worker process: ordered messages to it, futures of its answers."""

    def __init__(
        self, sock: socket.socket, process: subprocess.Popen[bytes], events: WorkerEvents, running: RunningTiles
    ) -> None:
        self.process = process
        self.pong = pb.Pong()
        self.alive = True
        self.device_failed = False
        self.unusable = ""  # why no worker can ever be ready, if so
        # called once it is gone, before anything that waited hears of it
        self.down: Callable[[list[int]], None] = lambda running: None
        self._sock = sock
        self._running = running
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[pb.FromWorker]] = {}
        self._outbox: deque[tuple[pb.ToWorker, int | None]] = deque()
        self._writing = False
        self._pings = itertools.count(1)
        self._pong_waiters: list[asyncio.Future[None]] = []
        self._last_ping = 0
        self._ready: asyncio.Future[pb.Ready] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._on_readable)

    def send(self, message: pb.ToWorker, fd: int | None = None) -> None:
        """Send a message after all earlier ones. To a dead worker, nothing is sent.

        Raises OSError when it has to wait and there is no descriptor left to keep `fd` by.
        """
        if not self.alive:
            return
        if not self._outbox:  # at once, which takes no descriptor
            try:
                link.send(self._sock, message, fd)
            except BlockingIOError:
                pass
            except link.LinkClosedError:
                self.close()
                return
            else:
                return
        # The descriptor is duplicated: its owner may close it before the packet leaves.
        self._outbox.append((message, None if fd is None else os.dup(fd)))
        if not self._writing:
            self._flush()

    def request(self, message: pb.ToWorker, work_id: int, fd: int | None = None) -> asyncio.Future[pb.FromWorker]:
        """Send a message that will be answered under `work_id`.

        The future raises WorkerLostError, DeviceMemoryError, HostMemoryError, CancelledTileError or InternalError.
        """
        future: asyncio.Future[pb.FromWorker] = self._loop.create_future()
        if not self.alive:
            future.set_exception(WorkerLostError("the device process is gone"))
            return future
        try:
            self.send(message, fd)
        except OSError as error:
            future.set_exception(HostMemoryError("the host has no descriptors left", detail=repr(error)))
            return future
        if self.alive:
            self._waiting[work_id] = future
        else:  # it went while this was sent
            future.set_exception(WorkerLostError("the device process is gone"))
        return future

    def next_id(self) -> int:
        """A number that no other operation or tile of this worker has."""
        return next(self._ids)

    async def wait_ready(self) -> pb.Ready:
        """The worker's first message. Raises WorkerLostError."""
        return await asyncio.shield(self._ready)

    async def wait_gone(self) -> None:
        """Until the worker is gone."""
        await asyncio.shield(self._gone)

    def ping(self) -> bool:
        """Ask for a sign of life; False when the last one was not answered."""
        answered = self.pong.sequence >= self._last_ping
        self._last_ping = next(self._pings)
        self.send(pb.ToWorker(ping=pb.Ping(sequence=self._last_ping)))
        return answered

    async def refresh(self, timeout_s: float) -> None:
        """Bring `pong` up to date, or leave it as it is when no answer comes in time."""
        if not self.alive:
            return
        fresh: asyncio.Future[None] = self._loop.create_future()
        self._pong_waiters.append(fresh)
        self.send(pb.ToWorker(ping=pb.Ping(sequence=next(self._pings))))
        await asyncio.wait([fresh], timeout=timeout_s)

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()  # the socket closes with it; _on_closed does the rest

    def close(self) -> None:
        """Let go of the socket; everything that waits fails with WorkerLostError."""
        if not self.alive:
            return
        self.alive = False
        self._loop.remove_reader(self._sock.fileno())
        if self._writing:
            self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, fd in self._outbox:
            if fd is not None:
                os.close(fd)
        self._outbox.clear()
        # Not at once: this may be the end of a decision about what is on the device. What waits is told after it, or a
        # tile that comes back from the dead worker would make room there for one that had better wait for the next.
        self._loop.call_soon(self.down, self._running.oldest_first())
        self._running.close()
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(WorkerLostError("the device process was lost; a new one is starting"))
        for outcome in (self._ready, self._gone):
            if not outcome.done():
                if outcome is self._ready:
                    self._ready.set_exception(WorkerLostError("the device process did not start"))
                    self._ready.exception()  # nobody need be waiting for it
                else:
                    self._gone.set_result(None)

    def _flush(self) -> None:
        while self._outbox and self.alive:
            message, fd = self._outbox[0]
            try:
                link.send(self._sock, message, fd)
            except BlockingIOError:
                if not self._writing:
                    self._loop.add_writer(self._sock.fileno(), self._flush)
                    self._writing = True
                return
            except link.LinkClosedError:
                self.close()
                return
            self._outbox.popleft()
            if fd is not None:
                os.close(fd)
        if self._writing and self.alive:
            self._loop.remove_writer(self._sock.fileno())
            self._writing = False

    def _on_readable(self) -> None:
        for _ in range(64):  # then let other callbacks run
            try:
                data, _ = link.receive(self._sock)
            except BlockingIOError:
                return
            except link.LinkClosedError:
                self.close()
                return
            self._on_message(pb.FromWorker.FromString(data))

    def _on_message(self, message: pb.FromWorker) -> None:
        kind = message.WhichOneof("message")
        if kind == "pong":
            self.pong = message.pong
            waiters, self._pong_waiters = self._pong_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        elif kind == "ready":
            if not self._ready.done():
                self._ready.set_result(message.ready)
        elif kind == "operation_done":
            self._settle(message.operation_done.operation_id, message)
        elif kind == "tile_done":
            self._settle(message.tile_done.tile_id, message)
        elif kind == "failed":
            self._fail(message.failed)

    def _settle(self, work_id: int, message: pb.FromWorker) -> None:
        future = self._waiting.pop(work_id, None)
        if future is not None and not future.done():
            future.set_result(message)

    def _fail(self, failed: pb.Failed) -> None:
        error: Exception
        if failed.kind == pb.FAILURE_KIND_UNUSABLE:
            self.unusable = failed.detail
            return
        if failed.kind == pb.FAILURE_KIND_CANCELLED:
            error = CancelledTileError()
        elif failed.kind == pb.FAILURE_KIND_OUT_OF_MEMORY:
            error = DeviceMemoryError("the device had no memory for this request", detail=failed.detail)
        elif failed.kind == pb.FAILURE_KIND_DEVICE:
            self.device_failed = True
            error = WorkerLostError("the device failed; a new device process is starting", detail=failed.detail)
        else:
            error = InternalError(failed.detail)
        if isinstance(error, ServiceError):
            self._events.log("worker_failure", kind=pb.FailureKind.Name(failed.kind), detail=failed.detail)
        future = self._waiting.pop(failed.id, None)
        if future is not None and not future.done():
            future.set_exception(error)


class Supervisor:
    """Keeps one worker running. `link` is the present one, None between two."""

    def __init__(self, options: WorkerOptions, events: WorkerEvents) -> None:
        self.link: WorkerLink | None = None
        self.restarts = 0
        self._options = options
        self._events = events
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Start the first worker and watch from now on."""
        self._task = asyncio.create_task(self._run(), name="worker-supervisor")

    async def stop(self, grace_s: float) -> None:
        """Ask the worker to finish, wait `grace_s`, then end it."""
        self._stopping = True
        if self.link is not None and self.link.alive:
            self.link.send(pb.ToWorker(shutdown=pb.Shutdown()))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.link.wait_gone(), grace_s)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.link is not None:
            await self._end(self.link)

    async def _run(self) -> None:
        backoff_s = self._options.restart_backoff_s
        while not self._stopping:
            try:
                worker = self._spawn()
            except OSError as error:  # no descriptors or no memory, say: later there may be some
                self._events.log("worker_not_started", detail=repr(error), backoff_s=backoff_s)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, self._options.max_restart_backoff_s)
                continue
            self.link = worker
            try:
                async with asyncio.timeout(self._options.ready_timeout_s):
                    ready = await worker.wait_ready()
                # Its end may have been read with its readiness. Nobody had been told of it then: nobody is to be now,
                # or its memory would be believed in from there on.
                if not worker.alive:
                    raise WorkerLostError("the device process ended as soon as it was ready")
            except (TimeoutError, WorkerLostError):
                self._events.log("worker_not_ready", backoff_s=backoff_s)
                await self._end(worker)
                if worker.unusable:
                    self._events.unusable(worker.unusable)
                    return
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, self._options.max_restart_backoff_s)
                continue
            backoff_s = self._options.restart_backoff_s
            worker.down = self._events.down
            self._events.ready(ready)
            hung = await self._watch(worker)
            worker.close()
            code = await self._end(worker)
            if self._stopping:
                return
            self.restarts += 1
            # SIGKILL and SIGTERM come from outside; everything else may be the fault of what the worker was given.
            blamed = hung or worker.device_failed or code not in (-signal.SIGKILL, -signal.SIGTERM)
            self._events.log("worker_lost", exit_code=code, hung=hung, blamed=blamed)
            self._events.lost(blamed)

    def _spawn(self) -> WorkerLink:
        ours, theirs = link.make_pair()
        with contextlib.ExitStack() as unless_started:
            unless_started.callback(ours.close)
            with theirs:
                running = RunningTiles.create()
                unless_started.callback(running.close)
                process = self._start_process(theirs)
            unless_started.pop_all()
        worker = WorkerLink(ours, process, self._events, running)
        configure = pb.Configure(
            device=self._options.device,
            implementation=self._options.implementation,
            device_budget_bytes=self._options.device_budget_bytes,
            cpu_threads=self._options.cpu_threads,
            issue_ahead_us=int(1e6 * self._options.issue_ahead_s),
            log_level=self._options.log_level,
        )
        worker.send(pb.ToWorker(configure=configure), running.fd)
        return worker

    def _start_process(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        # The descriptor's number is not 0, 1 or 2; nothing else of ours is inherited.
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "streamindex_service.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **self._options.environment},
        )

    async def _watch(self, worker: WorkerLink) -> bool:
        """Until the worker is gone; True if it hung and was killed for it."""
        silent_s = 0.0
        while worker.alive:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(worker.wait_gone(), self._options.heartbeat_s)
            if not worker.alive:
                break
            silent_s = 0.0 if worker.ping() else silent_s + self._options.heartbeat_s
            stuck = worker.pong.oldest_running_ms > 1000 * self._options.work_timeout_s
            if silent_s > self._options.heartbeat_timeout_s or stuck:
                self._events.log("worker_hung", silent_s=silent_s, running_ms=worker.pong.oldest_running_ms)
                worker.kill()
                return True
        return False

    async def _end(self, worker: WorkerLink) -> int:
        """Make sure that the process is gone; return its exit code."""
        worker.close()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(2.0):
                # A worker whose link is closed exits by itself; its exit code tells why it died.
                return await loop.run_in_executor(None, lambda: worker.process.wait(1.5))
        except (TimeoutError, subprocess.TimeoutExpired):
            worker.process.kill()
            return await loop.run_in_executor(None, worker.process.wait)
