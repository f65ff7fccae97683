"""`python -m streamindex_service.worker FD`: the device process, talking over the socket FD."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from dataclasses import asdict
from typing import Any

import torch

from streamindex_service.ipc import link
from streamindex_service.ipc.running import RunningTiles
from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.ops import compiled
from streamindex_service.ops.cached_attention import ATTENTION_TERMS
from streamindex_service.ops.sparse_attention import IMPLEMENTATIONS as ATTENTION
from streamindex_service.ops.topk import IMPLEMENTATIONS
from streamindex_service.telemetry import logs, trace
from streamindex_service.worker import canary
from streamindex_service.worker.commands import Command, Commands
from streamindex_service.worker.device import (
    Device,
    UnusableDeviceError,
    choose_attention,
    choose_implementation,
    default_budget_bytes,
    probe,
    reservable_bytes,
    supported,
)
from streamindex_service.worker.executor import DEVICE_FAILED_EXIT_CODE, Executor
from streamindex_service.worker.extents import MissingMemoryError
from streamindex_service.worker.key_store import FORMATS, KV_FORMATS

LINK_FAILED_EXIT_CODE = 4
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Worker:
    """One thread reads packets, one (the main one) executes them, one reports what the device has finished."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._send_lock = threading.Lock()
        self._log = logs.get("worker")

    def run(self) -> None:
        """Serve until the link closes or a Shutdown comes."""
        data, fd = link.receive(self._sock)
        assert fd is not None
        try:
            device = self._configure(pb.ToWorker.FromString(data).configure, RunningTiles.receive(fd))
        except UnusableDeviceError as error:
            failed = pb.Failed(kind=pb.FAILURE_KIND_UNUSABLE, detail=str(error))
            self._send(pb.FromWorker(failed=failed))
            return
        threading.Thread(target=self._read_or_end, name="reader", daemon=True).start()
        self._announce(device)
        while (taken := self._commands.take()) is not None:
            command, cancelled = taken
            if cancelled:
                assert command.tile is not None, "only tiles are cancelled"
                tile_id = command.tile.tile_id
                self._send(pb.FromWorker(failed=pb.Failed(id=tile_id, kind=pb.FAILURE_KIND_CANCELLED)))
            else:
                self._execute(command.message, command.fd)
        self._executor.finish()

    def _configure(self, configure: pb.Configure, running: RunningTiles) -> Device:
        if configure.log_level:
            logs.configure(configure.log_level)
        if configure.cpu_threads:
            torch.set_num_threads(configure.cpu_threads)
        device = probe(configure.device)
        self._implementation = choose_implementation(configure.implementation, device)
        self._attention = choose_attention(device)
        self._budget_bytes = configure.device_budget_bytes or default_budget_bytes(device)
        if device.is_cuda:
            torch.cuda.set_device(device.torch_device)
            # The governor keeps within what may be reserved; the allocator's cap stands behind it. What the allocator
            # keeps for later it gives back before it passes the cap.
            fraction = min(1.0, self._budget_bytes / device.total_bytes)
            torch.cuda.set_per_process_memory_fraction(fraction, device.torch_device)
        self._commands = Commands(
            configure.issue_ahead_us / 1e6, lacks_pages=lambda tile: self._executor.lacks_pages(tile)
        )
        self._executor = Executor(
            device, self._implementation, self._attention, self._send, self._commands.finished, running
        )
        canary.run(device, self._implementation, self._attention)
        if device.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device.torch_device)
        return device

    def _announce(self, device: Device) -> None:
        kind = device.torch_device.type
        numbers = {key_format: number for number, key_format in FORMATS.items()}
        attention = pb.AttentionSupport(
            implementation=self._attention,
            kv_formats=[
                number
                for number, kv_format in KV_FORMATS.items()
                if ATTENTION[self._attention].supports(device.torch_device, kv_format)
            ],
            terms=pb.AttentionTerms(**asdict(ATTENTION_TERMS[self._attention])),
        )
        ready = pb.Ready(
            device_name=device.name,
            device_type=kind,
            device_bytes=device.total_bytes,
            device_budget_bytes=reservable_bytes(device, self._budget_bytes),
            implementation=self._implementation,
            attention=attention,
            workspace=pb.WorkspaceTerms(**asdict(IMPLEMENTATIONS[self._implementation].terms(kind))),
            implementations=[
                pb.ImplementationSupport(
                    name=name,
                    key_formats=[numbers[key_format] for key_format in formats],
                    repeatable=kind in IMPLEMENTATIONS[name].repeatable,
                )
                for name, formats in supported(device).items()
            ],
        )
        self._log.info("worker_ready", device=device.name, implementation=self._implementation)
        self._send(pb.FromWorker(ready=ready))

    def _read_or_end(self) -> None:
        try:
            self._read()
        except BaseException:  # no room for a descriptor, say: whoever does not hear any more is of no use
            self._log.error("link_failed", exc_info=True)
            os._exit(LINK_FAILED_EXIT_CODE)

    def _read(self) -> None:
        while True:
            try:
                data, fd = link.receive(self._sock)
            except link.LinkClosedError:
                os._exit(0)  # the frontend is gone: nobody is left to work for
            message = pb.ToWorker.FromString(data)
            kind = message.WhichOneof("message")
            if kind == "ping":
                memory = self._executor.memory()
                pong = pb.Pong(
                    sequence=message.ping.sequence,
                    oldest_running_ms=self._executor.oldest_running_ms(),
                    allocated_bytes=memory.allocated_bytes,
                    peak_bytes=memory.peak_bytes,
                    reserved_bytes=memory.reserved_bytes,
                    compiled_kernels=compiled.count(),
                )
                self._send(pb.FromWorker(pong=pong))
            elif kind == "cancel_tiles":
                self._commands.cancel(list(message.cancel_tiles.tile_ids))
            elif kind == "shutdown":
                self._commands.close()
            else:
                self._commands.put(Command(message, fd))

    def _execute(self, message: pb.ToWorker, fd: int | None) -> None:
        with logs.bound(**_origin(message)):
            self._try(message, fd)

    def _try(self, message: pb.ToWorker, fd: int | None) -> None:
        try:
            self._dispatch_with_spares(message, fd)
        except (torch.OutOfMemoryError, MissingMemoryError) as error:
            self._log.warning(
                "no_device_memory",
                command=message.WhichOneof("message"),
                extents_bytes=self._executor.store.extents.size_bytes,
                **asdict(self._executor.memory()),
                detail=repr(error),
            )
            self._fail(message, pb.FAILURE_KIND_OUT_OF_MEMORY, error)
        except torch.AcceleratorError as error:
            self._fail(message, pb.FAILURE_KIND_DEVICE, error)
            self._log.error("device_failed", detail=repr(error))
            os._exit(DEVICE_FAILED_EXIT_CODE)
        except Exception as error:
            self._log.error("command_failed", command=message.WhichOneof("message"), exc_info=True)
            kind = pb.FAILURE_KIND_INTERNAL if self._executor.device_answers() else pb.FAILURE_KIND_DEVICE
            self._fail(message, kind, error)
            if kind == pb.FAILURE_KIND_DEVICE:
                os._exit(DEVICE_FAILED_EXIT_CODE)

    def _dispatch_with_spares(self, message: pb.ToWorker, fd: int | None) -> None:
        """Memory that is kept for later is there for whoever finds none: an answer is only written at the end, so
        nothing has been done yet."""
        extents = self._executor.store.extents
        try:
            self._dispatch(message, fd)
            return
        except torch.OutOfMemoryError:
            if not extents.spare_bytes:
                raise
        # out here: in the handler, the frames of the first try hold what it had
        extents.give_up_spares()
        self._dispatch(message, fd)

    def _dispatch(self, message: pb.ToWorker, fd: int | None) -> None:
        kind = message.WhichOneof("message")
        executor = self._executor
        if kind == "search_tile":
            self._log.debug("tile", tile_id=message.search_tile.tile_id, rows=message.search_tile.rows)
            executor.search_tile(message.search_tile)
        elif kind == "attend_tile":
            self._log.debug("tile", tile_id=message.attend_tile.tile_id, rows=message.attend_tile.rows)
            executor.attend_tile(message.attend_tile)
        elif kind == "load_pages":
            executor.load_pages(message.load_pages)
        elif kind == "define_views":
            executor.store.define_views(message.define_views)
            if operation_id := message.define_views.operation_id:
                self._send(pb.FromWorker(operation_done=pb.OperationDone(operation_id=operation_id)))
        elif kind == "drop_views":
            for view_id in message.drop_views.view_ids:
                executor.store.drop_view(view_id)
        elif kind == "allocate_extent":
            extent = message.allocate_extent
            executor.store.extents.allocate(extent.extent_id, extent.extent_bytes)
            done = pb.OperationDone(operation_id=extent.operation_id)
            self._send(pb.FromWorker(operation_done=done))
        elif kind == "free_extent":
            executor.store.extents.free(message.free_extent.extent_id)
        elif kind == "map_segment":
            assert fd is not None
            executor.segments.add(message.map_segment, fd)
            self._send(pb.FromWorker(operation_done=pb.OperationDone(operation_id=message.map_segment.operation_id)))
        elif kind == "unmap_segment":
            executor.unmap_segment(message.unmap_segment.segment_id)

    def _fail(self, message: pb.ToWorker, kind: pb.FailureKind, error: Exception) -> None:
        inner: Any = getattr(message, message.WhichOneof("message") or "")
        work_id = getattr(inner, "tile_id", 0) or getattr(inner, "operation_id", 0)
        failed = pb.FromWorker(failed=pb.Failed(id=work_id, kind=kind, detail=repr(error)[:4000]))
        if kind == pb.FAILURE_KIND_DEVICE:
            self._send(failed)  # this process ends: what it was running stays listed
        else:
            self._executor.fail(work_id, failed)

    def _send(self, message: pb.FromWorker) -> None:
        with self._send_lock:
            try:
                link.send(self._sock, message)
            except link.LinkClosedError:
                os._exit(0)


def _origin(message: pb.ToWorker) -> dict[str, str]:
    """Under which ids a command's log lines are written: those of the call that it is for."""
    kind = message.WhichOneof("message")
    if kind not in ("search_tile", "attend_tile"):
        return {}
    tile = message.search_tile if kind == "search_tile" else message.attend_tile
    if not tile.request_id:
        return {}
    context = trace.read(tile.traceparent)
    return {"request_id": tile.request_id, "trace_id": context.trace_id if context else ""}


def _end_with_frontend() -> None:
    """Have the kernel kill this process when the frontend ends: one that hangs does not see its link close."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    """Run a worker on the socket whose descriptor is the first argument."""
    _end_with_frontend()
    logs.configure()
    # The frontend decides when this process ends; a Ctrl-C in the terminal reaches both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # While one thread issues a tile, the others (a new tile has come, another is done) would wait up to 5 ms, the
    # default, for the interpreter.
    sys.setswitchinterval(0.0005)
    Worker(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
