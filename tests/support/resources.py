"""What processes hold, as the system counts it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from tests.support.calls import Calls, query_chunk, search_header
from tests.support.services import wait_for
from tests.support.tensors import Draw, Kind

COUNTED = ("descriptors", "threads", "segments", "mapped_segments")
_GRPC_POOL = "event_engine"
_MEMFD = "memfd:streamindex"  # how the system calls a segment


@dataclass(frozen=True)
class ProcessFigures:
    """What a process holds.

    `threads` are without those of gRPC's own pool, `grpc_threads`, which are more after a crowd of events and fewer
    after a rest, as gRPC thinks fit. `segments`: descriptors of shared memory; `mapped_segments`: those in its address
    space. `resident_bytes`: memory of its own and shared memory, in RAM and in swap, but no pages of files, which the
    system brings and drops as it likes.
    """

    descriptors: int
    threads: int
    grpc_threads: int
    segments: int
    mapped_segments: int
    resident_bytes: int


def more_than(base: ProcessFigures, now: ProcessFigures) -> list[str]:
    """What a process has more of than before, memory left aside."""
    return [
        f"{getattr(base, name)} {name} became {getattr(now, name)}"
        for name in COUNTED
        if getattr(now, name) > getattr(base, name)
    ]


def figures_of(pid: int) -> ProcessFigures:
    """Figures of a process of this user. Raises OSError when it is gone."""
    names = descriptors_of(pid)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem", "VmSwap"))
    mapped = sum(_MEMFD in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    segments = sum(_MEMFD in name for name in names)
    grpc_threads = _threads_called(pid, _GRPC_POOL)
    threads = int(status["Threads"]) - grpc_threads
    return ProcessFigures(len(names), threads, grpc_threads, segments, mapped, 1024 * kib)


def _threads_called(pid: int, name: str) -> int:
    count = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            count += (task / "comm").read_text().strip() == name
    return count


def descriptors_of(pid: int) -> list[str]:
    """What each open descriptor is of."""
    names = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(os.readlink(entry))
        except FileNotFoundError:  # closed meanwhile
            continue
    return names


def fill_ingress(calls: Calls, worker: int) -> None:
    """Have every block of ingress memory in use at once. Their segments stay with the service, and are as many as they
    ever will be."""
    kind, draw = Kind(heads=2, head_dim=32), Draw(0)
    ledger = calls.ledger("ingress")
    with calls.cache(kind, draw.keys(kind, 300)) as cache:
        rows = query_chunk(kind, draw.queries(kind, 4, start_position=300), 0, 4)
        os.kill(worker, signal.SIGSTOP)
        try:
            made = []
            for _ in range(32):
                call = calls.search_call()
                call.send(search_header(kind, cache.id, 8, start_position=300), rows)
                call.half_close()
                made.append(call)
            wait_for(lambda: calls.ledger("ingress").reserved_bytes == ledger.limit_bytes)
        finally:
            os.kill(worker, signal.SIGCONT)
        for call in made:
            assert call.rest()[-1].done.row_count == 4


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had."""
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(kib) << 10
