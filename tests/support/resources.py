"""What processes hold, as the system counts it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_MEMFD = "memfd:streamindex"  # how the system calls a segment


@dataclass(frozen=True)
class ProcessFigures:
    """What a process holds. `segments`: descriptors of shared memory; `mapped_segments`: those in its address space;
    `resident_bytes`: memory of its own and shared memory, in RAM and in swap, but no pages of files, which the system
    brings and drops as it likes."""

    descriptors: int
    threads: int
    segments: int
    mapped_segments: int
    resident_bytes: int


def figures_of(pid: int) -> ProcessFigures:
    """Figures of a process of this user. Raises OSError when it is gone."""
    names = descriptors_of(pid)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem", "VmSwap"))
    mapped = sum(_MEMFD in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    segments = sum(_MEMFD in name for name in names)
    return ProcessFigures(len(names), int(status["Threads"]), segments, mapped, 1024 * kib)


def descriptors_of(pid: int) -> list[str]:
    """What each open descriptor is of."""
    names = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(os.readlink(entry))
        except FileNotFoundError:  # closed meanwhile
            continue
    return names
