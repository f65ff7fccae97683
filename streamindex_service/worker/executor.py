"""Runs the frontend's commands on the device, in the order in which it is given them.

On a GPU streams overlap: rows of the next tile are copied in while the present one is computed and the answers
of the last one are copied out. Attention has a stream of its own: the indices of the next rows are found while the
present ones attend. So have the copies of pages: only tiles that read those pages wait for them (`promotions.py`).
Commands are issued by one thread; others wait for the device and report, so that neither a copy nor a message ever
holds up the issuing. On a CPU the same code runs without streams.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from streamindex_service.ipc.running import RunningTiles
from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.ops.cached_attention import CachedSequence
from streamindex_service.ops.paged_keys import PagedKeys
from streamindex_service.ops.topk import KeySequence, Order, TopkResult, topk_sequences
from streamindex_service.worker.attention import AttendTensors, attend, sequences_of
from streamindex_service.worker.device import Device
from streamindex_service.worker.key_store import KeyStore, SegmentMap, make_page_tables
from streamindex_service.worker.memory import DeviceMemory, MemoryWatch
from streamindex_service.worker.partial import merge, shift_positions
from streamindex_service.worker.promotions import MemoryRanges, Promotions, page_runs, view_ids_of

DEVICE_FAILED_EXIT_CODE = 3
_ORDERS = {0: Order.SCORE, 1: Order.SCORE, 2: Order.INDEX}


@dataclass
class _Issued:
    """Work that the device has been given."""

    work_id: int
    started: float
    reply: Callable[[float, float], pb.FromWorker]  # from seconds on the device, and when it was done
    peak_bytes: int = 0
    start_event: torch.cuda.Event | None = None
    end_event: torch.cuda.Event | None = None


class Executor:
    """One device. `send` and `finished` (of the work with this number) may be called from several threads.

    running: where the frontend finds the tiles that the device has. Work that raises is not over: it may be tried
    again, and until `fail` it counts as running.
    """

    def __init__(
        self,
        device: Device,
        implementation: str,
        attention: str,
        send: Callable[[pb.FromWorker], None],
        finished: Callable[[int], None] = lambda work_id: None,
        running: RunningTiles | None = None,
    ) -> None:
        if device.is_cuda:
            self._promote = _stream(device)
            self._copy_in = _stream(device)
            self._compute = _stream(device)
            self._attend = _stream(device)
            self._copy_out = _stream(device)
        self.segments = SegmentMap(device)
        self.store = KeyStore(device, self._promote if device.is_cuda else None)
        self._promotions: Promotions[torch.cuda.Event] = Promotions()
        self._device = device
        self._implementation = implementation
        self._attention = attention
        self._memory = MemoryWatch(device, lambda: self.store.extents.spare_bytes)
        self._send = send
        self._finished = finished
        # Each kind of work has a queue and a reporter of its own: one says nothing of when another is done.
        self._issued: queue.Queue[_Issued | None] = queue.Queue()
        self._attending: queue.Queue[_Issued | None] = queue.Queue()
        self._loading: queue.Queue[_Issued | None] = queue.Queue()
        self._running: dict[int, float] = {}  # work id -> when it started
        self._tiles = running
        self._lock = threading.Lock()
        self._queues = (self._issued, self._attending, self._loading)
        self._reporters = [
            threading.Thread(target=self._report, args=(issued,), name="reporter", daemon=True)
            for issued in self._queues
        ]
        for reporter in self._reporters:
            reporter.start()

    def oldest_running_ms(self) -> int:
        """How long the oldest unfinished work has been running."""
        with self._lock:
            oldest = min(self._running.values(), default=None)
        return 0 if oldest is None else int(1000 * (time.monotonic() - oldest))

    def memory(self) -> DeviceMemory:
        """What the device's allocator says; zeros on a CPU."""
        return self._memory.now()

    def device_answers(self) -> bool:
        """False when the device is in an error that stays. Not every library says so with an exception of its own."""
        if self._device.is_cuda:
            try:
                torch.cuda.synchronize(self._device.torch_device)
            except RuntimeError:
                return False
        return True

    def finish(self) -> None:
        """Wait until everything issued is reported."""
        for issued, reporter in zip(self._queues, self._reporters, strict=True):
            issued.put(None)
            reporter.join()

    def fail(self, work_id: int, reply: pb.FromWorker) -> None:
        """Work that raised is not tried again: tell so. What never began is told of all the same."""
        self._end(work_id, reply)

    def unmap_segment(self, segment_id: int) -> None:
        """Let go of a segment, once no copy reads it any more."""
        if self._device.is_cuda:
            self._copy_in.synchronize()
            if (event := self._promotions.reading(segment_id)) is not None:
                event.synchronize()
        self.segments.drop(segment_id)

    def lacks_pages(self, tile: pb.SearchTile | pb.AttendTile) -> bool:
        """Whether pages that a tile reads are still being copied. For the thread that issues work."""
        try:
            return self._awaited(tile) is not None
        except torch.AcceleratorError:  # the tile meets it again
            return False

    def load_pages(self, message: pb.LoadPages) -> None:
        """Copy pages from segments to the device."""
        work = self._begin(
            message.operation_id,
            lambda *_: pb.FromWorker(operation_done=pb.OperationDone(operation_id=message.operation_id)),
        )
        self._copy_pages(message, work)
        self._loading.put(work)

    def _copy_pages(self, message: pb.LoadPages, work: _Issued) -> None:
        runs = list(page_runs(message))
        pairs = [
            (
                self.store.bytes_at(run.extent_id, run.to_bytes, run.size_bytes),
                self.segments.bytes_at(run.segment_id, run.start_bytes, run.size_bytes),
            )
            for run in runs
        ]
        if not self._device.is_cuda:
            for target, source in pairs:
                target.copy_(source)
            return
        with torch.cuda.stream(self._promote):
            # It waits for no tile: pages lose their place only when no tile uses them, and one that runs has them
            # pinned until it was reported. What was copied to the same place before goes first, by the stream.
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            work.end_event = _event(timing=False)
            work.end_event.record()
        addresses = np.array([target.data_ptr() for target, _ in pairs], dtype=np.int64)
        sizes = np.array([run.size_bytes for run in runs], dtype=np.int64)
        self._promotions.add(work.end_event, MemoryRanges.of(addresses, sizes), (run.segment_id for run in runs))

    def _awaited(self, tile: pb.SearchTile | pb.AttendTile) -> torch.cuda.Event | None:
        return self._promotions.awaited(view_ids_of(tile), self.store.memory_of)

    def search_tile(self, message: pb.SearchTile) -> None:
        """Search some rows; the answers are in the message's spans when TileDone is sent."""
        with self._tile(message.tile_id, self._issued) as work:
            sequences = [KeySequence(each.rows, self.store.view(each.view_id)) for each in message.sequences]
            if self._device.is_cuda:
                # Addresses of pages stay for as long as the view: they are no tile's memory.
                with torch.cuda.stream(self._compute):
                    make_page_tables([each.keys for each in sequences], self._implementation)
                with self._memory.peak_of(work):
                    self._search_on_gpu(message, sequences, work)
            else:
                self._search_on_cpu(message, sequences)

    def attend_tile(self, message: pb.AttendTile) -> None:
        """Attention of some rows; the answers are in the message's spans when TileDone is sent."""
        with self._tile(message.tile_id, self._attending) as work:
            sequences = sequences_of(message, self.store)
            host = AttendTensors.of(message, sequences[0].compressed.key_dim, self.segments)
            if self._device.is_cuda:
                with self._memory.peak_of(work):
                    self._attend_on_gpu(message, sequences, host, work)
            else:
                attend(message, sequences, host.q, host.indices, host.positions, self._attention, host.out, host.lse)

    @contextmanager
    def _tile(self, tile_id: int, issued: queue.Queue[_Issued | None]) -> Iterator[_Issued]:
        """The device is given a tile within; it is reported when it is done, and what was issued before it."""

        def reply(seconds: float, ended: float) -> pb.FromWorker:
            done = pb.TileDone(
                tile_id=tile_id,
                device_us=int(1e6 * seconds),
                peak_bytes=work.peak_bytes,
                issued_us=int(1e6 * work.started),
                ended_us=int(1e6 * ended),
            )
            return pb.FromWorker(tile_done=done)

        work = self._begin(tile_id, reply)
        if self._tiles is not None:
            with self._lock:
                self._tiles.add(tile_id)
        yield work
        issued.put(work)

    def _begin(self, work_id: int, reply: Callable[[float, float], pb.FromWorker]) -> _Issued:
        started = time.monotonic()
        with self._lock:
            self._running.setdefault(work_id, started)  # it may be tried again
        return _Issued(work_id, started, reply)

    def _end(self, work_id: int, reply: pb.FromWorker) -> None:
        with self._lock:
            self._running.pop(work_id, None)
            if self._tiles is not None:
                self._tiles.remove(work_id)
        self._send(reply)  # first: the frontend's way back takes longer than the issue of the next tile
        self._finished(work_id)

    def _host_tensors(
        self, message: pb.SearchTile, keys: PagedKeys
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        at, rows, heads = self.segments.tensor_at, message.rows, message.heads
        q = at(message.q, keys.format.torch_dtype, (rows, heads, keys.head_dim))
        w = at(message.w, torch.float32, (rows, heads))
        positions = at(message.positions, torch.int64, (rows,))
        indices = at(message.indices, torch.int32, (rows, message.top_k))
        has_scores = message.HasField("scores")
        scores = at(message.scores, torch.float32, (rows, message.top_k)) if has_scores else None
        return q, w, positions, indices, scores

    def _search_on_cpu(self, message: pb.SearchTile, sequences: Sequence[KeySequence]) -> None:
        q, w, positions, indices, scores = self._host_tensors(message, sequences[0].keys)
        if not message.merge:
            self._topk(message, q, w, sequences, positions, out_indices=indices, out_scores=scores)
            return
        assert scores is not None
        positions, sees = shift_positions(positions, message.first_key, message.ratio)
        found = self._topk(message, q, w, sequences, positions, order=Order.SCORE)
        assert found.scores is not None
        order = _ORDERS[message.order]
        merged = merge((indices, scores), (found.indices, found.scores), sees, message.first_key, order)
        indices.copy_(merged[0])
        scores.copy_(merged[1])

    def _topk(
        self,
        message: pb.SearchTile,
        q: torch.Tensor,
        w: torch.Tensor,
        sequences: Sequence[KeySequence],
        positions: torch.Tensor,
        *,
        order: Order | None = None,
        out_indices: torch.Tensor | None = None,
        out_scores: torch.Tensor | None = None,
    ) -> TopkResult:
        return topk_sequences(
            q, w, sequences, positions,
            ratio=message.ratio, top_k=message.top_k, order=order or _ORDERS[message.order],
            implementation=self._implementation, workspace_bytes=message.workspace_bytes,
            want_scores=message.HasField("scores"), out_indices=out_indices, out_scores=out_scores,
        )  # fmt: skip

    def _search_on_gpu(self, message: pb.SearchTile, sequences: Sequence[KeySequence], work: _Issued) -> None:
        q_host, w_host, positions, indices_host, scores_host = self._host_tensors(message, sequences[0].keys)
        device = self._device.torch_device
        best = None
        with torch.cuda.stream(self._copy_in):
            q = q_host.to(device, non_blocking=True)
            w = w_host.to(device, non_blocking=True)
            if message.merge:
                assert scores_host is not None
                best = indices_host.to(device, non_blocking=True), scores_host.to(device, non_blocking=True)
                positions, sees = shift_positions(positions, message.first_key, message.ratio)
                sees = sees.to(device)
        self._compute.wait_stream(self._copy_in)
        if (event := self._awaited(message)) is not None:
            self._compute.wait_event(event)
        with torch.cuda.stream(self._compute):
            for tensor in (q, w, *(best or ())):
                tensor.record_stream(self._compute)
            work.start_event = _event(timing=True)
            work.start_event.record()
            if best is None:
                result = self._topk(message, q, w, sequences, positions)
                answer = result.indices, result.scores
            else:
                result = self._topk(message, q, w, sequences, positions, order=Order.SCORE)
                assert result.scores is not None
                sees.record_stream(self._compute)
                found = result.indices, result.scores
                answer = merge(best, found, sees, message.first_key, _ORDERS[message.order])
            computed = _event(timing=True)
            computed.record()
        hosts = (indices_host, scores_host)
        pairs = ((h, t) for h, t in zip(hosts, answer, strict=True) if h is not None and t is not None)
        self._copy_answers(pairs, computed, work)

    def _attend_on_gpu(
        self, message: pb.AttendTile, sequences: Sequence[CachedSequence], host: AttendTensors, work: _Issued
    ) -> None:
        device = self._device.torch_device
        with torch.cuda.stream(self._copy_in):
            q = host.q.to(device, non_blocking=True)
            indices = None if host.indices is None else host.indices.to(device, non_blocking=True)
        self._attend.wait_stream(self._copy_in)
        if (event := self._awaited(message)) is not None:
            self._attend.wait_event(event)
        with torch.cuda.stream(self._attend):
            for tensor in (q, indices):
                if tensor is not None:
                    tensor.record_stream(self._attend)
            work.start_event = _event(timing=True)
            work.start_event.record()
            result = attend(message, sequences, q, indices, host.positions, self._attention)
            computed = _event(timing=True)
            computed.record()
        self._copy_answers(host.answers(result), computed, work)

    def _copy_answers(
        self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], computed: torch.cuda.Event, work: _Issued
    ) -> None:
        """Copy (where to, what) to host memory once it is computed; the work is done then."""
        self._copy_out.wait_event(computed)
        with torch.cuda.stream(self._copy_out):
            for host, tensor in pairs:
                tensor.record_stream(self._copy_out)
                host.copy_(tensor, non_blocking=True)
            work.end_event = _event(timing=True)
            work.end_event.record()

    def _report(self, issued: queue.Queue[_Issued | None]) -> None:
        while (work := issued.get()) is not None:
            try:
                seconds = self._wait(work)
            except Exception as error:  # asynchronous CUDA errors surface here
                failed = pb.Failed(id=work.work_id, kind=pb.FAILURE_KIND_DEVICE, detail=repr(error))
                self._send(pb.FromWorker(failed=failed))
                os._exit(DEVICE_FAILED_EXIT_CODE)  # a CUDA context that has failed once fails for ever
            self._end(work.work_id, work.reply(seconds, time.monotonic()))

    def _wait(self, work: _Issued) -> float:
        if work.end_event is None:
            return time.monotonic() - work.started
        work.end_event.synchronize()
        if work.start_event is None:
            return time.monotonic() - work.started
        return float(work.start_event.elapsed_time(work.end_event)) / 1000


def _stream(device: Device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device.torch_device)  # type: ignore[no-untyped-call]


def _event(*, timing: bool) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]
