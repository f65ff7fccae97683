"""One long Search through the service: memory that does not grow with the number of queries.

    python -m benchmarks.search_stream --quick --out benchmarks/results/search_stream.json

A whole prefill of V4-Flash's shape: S query rows (a chunk that repeats, at positions 0 to S - 1) against S / 4 keys,
with a device budget of 1 GiB. Reported: time to the first indices, rows a second, the peak of the device's allocator,
and the resident memory of both processes before, after a quarter of the rows, and at the end. The run fails, and
writes no figures, when a sampled row is wrong, the budget is passed, or a process grows after the first quarter.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import streamindex_client
import torch
from torch import Tensor

from benchmarks.harness import V4_FLASH, Report, Row
from streamindex_service.ops import PagedKeys
from streamindex_service.ops.topk import check_topk
from streamindex_service.testing.service import RunningService

TABLE = "search_stream"
MIB = 1 << 20
BUDGET_BYTES = 1 << 30
MAX_GROWTH_BYTES = 32 * MIB
CHUNK_ROWS = 256
CHECKED_ROWS = 64


@dataclass(frozen=True)
class StreamRow(Row):
    """`peak_bytes`: of the device's allocator, keys included; on a CPU of the device ledger."""

    rows_per_s: float = 0.0
    first_indices_s: float = 0.0
    budget_bytes: int = BUDGET_BYTES
    checked_rows: int = 0
    frontend_rss_bytes: dict[str, int] = field(default_factory=dict)
    worker_rss_bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class Stream:
    """What one search gave."""

    seconds: float = 0.0
    first_s: float = 0.0
    answered: int = 0
    frontend: dict[str, int] = field(default_factory=dict)
    worker: dict[str, int] = field(default_factory=dict)
    answers: dict[int, Tensor] = field(default_factory=dict)

    def look(self, service: RunningService, when: str) -> None:
        """Note the resident memory of both processes."""
        self.frontend[when] = resident_bytes(service.process.pid)
        self.worker[when] = sum(resident_bytes(pid) for pid in service.worker_pids())


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, shared pages included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    return 0


def blocks(q: Tensor, w: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The chunk again and again, `rows` rows in all."""
    for start in range(0, rows, len(q)):
        count = min(len(q), rows - start)
        yield q[:count], w[:count]


def search(service: RunningService, cache: streamindex_client.KeyCache, q: Tensor, w: Tensor, rows: int) -> Stream:
    """Search, keep a sample of the answers, watch the memory."""
    wanted = [int(each) for each in torch.linspace(0, rows - 1, min(CHECKED_ROWS, rows), dtype=torch.float64)]
    stream = Stream()
    # a short search of the last rows first, so that the largest tiles were held once before memory is looked at
    few = min(rows, 4 * CHUNK_ROWS)
    for _ in cache.search(layer=0, q=blocks(q, w, few), top_k=V4_FLASH.top_k, start_position=rows - few):
        pass
    stream.look(service, "before")
    start = time.perf_counter()
    for part in cache.search(layer=0, q=blocks(q, w, rows), top_k=V4_FLASH.top_k, start_position=0):
        stream.first_s = stream.first_s or time.perf_counter() - start
        stream.answered += part.rows
        while wanted and wanted[0] < part.row_offset + part.rows:
            row = wanted.pop(0)
            stream.answers[row] = part.indices[row - part.row_offset].clone()
        if "quarter" not in stream.frontend and stream.answered * 4 >= rows:
            stream.look(service, "quarter")
    stream.seconds = time.perf_counter() - start
    stream.look(service, "end")
    return stream


def wrong_rows(stream: Stream, q: Tensor, w: Tensor, k: Tensor, device: str) -> int:
    """Rows of the sample that are wrong, by the re-scoring check."""
    rows = torch.tensor(list(stream.answers), dtype=torch.int64)
    which = rows % len(q)
    report = check_topk(
        torch.stack(list(stream.answers.values())).to(device),
        q[which].to(device),
        w[which].to(device),
        PagedKeys.from_contiguous(k.to(device)),
        rows,
        ratio=V4_FLASH.ratio,
        top_k=V4_FLASH.top_k,
    )
    return report.wrong_rows


def measure(device: str, rows: int) -> StreamRow:
    """Start the service, upload, search, check."""
    model = V4_FLASH
    generator = torch.Generator().manual_seed(0)
    k = torch.randn((model.keys(rows), model.head_dim), generator=generator).to(torch.bfloat16)
    q = torch.randn((CHUNK_ROWS, model.heads, model.head_dim), generator=generator).to(torch.bfloat16)
    w = torch.randn((CHUNK_ROWS, model.heads), generator=generator) * (model.heads * model.head_dim) ** -0.5
    settings = {
        "worker": {"device": device},
        "memory": {"device_budget_bytes": BUDGET_BYTES},
        "log": {"level": "warning"},
    }
    with RunningService(settings) as service, streamindex_client.connect(service.address) as client:
        implementation = client.capabilities().implementation
        cache = client.create_key_cache(
            heads=model.heads, head_dim=model.head_dim, ratio=model.ratio, key_format="bf16", layers=1
        )
        cache.append(layer=0, keys=k, first_row=0)
        stream = search(service, cache, q, w, rows)
        load = client.load()
    wrong = wrong_rows(stream, q, w, k, device) + rows - stream.answered
    growth = max(each["end"] - each["quarter"] for each in (stream.frontend, stream.worker))
    return StreamRow(
        table=TABLE,
        case=f"{model.name} S={rows} through Search, {implementation}",
        dtype="bf16",
        seconds=stream.seconds,
        useful_tflops=model.useful_flop(rows) / stream.seconds / 1e12,
        roof_fraction=None,
        ratio=None,
        ratio_to=None,
        peak_bytes=load.device_peak_bytes or load.ledgers["hbm"].peak_bytes,
        wrong_rows=wrong,
        repeats=1,
        note=f"first indices after {stream.first_s * 1e3:.0f} ms, {rows / stream.seconds:,.0f} rows/s, growth after "
        f"the first quarter {growth / MIB:.1f} MiB",
        rows_per_s=rows / stream.seconds,
        first_indices_s=stream.first_s,
        checked_rows=len(stream.answers),
        frontend_rss_bytes=stream.frontend,
        worker_rss_bytes=stream.worker,
    )


def broken_promises(row: StreamRow) -> list[str]:
    """What the row shows that must not be."""
    growth = [each["end"] - each["quarter"] for each in (row.frontend_rss_bytes, row.worker_rss_bytes)]
    found = []
    if row.wrong_rows:
        found.append(f"{row.wrong_rows} wrong rows")
    if row.peak_bytes is not None and row.peak_bytes > row.budget_bytes:
        found.append(f"{row.peak_bytes} device bytes, the budget is {row.budget_bytes}")
    if max(growth) > MAX_GROWTH_BYTES:
        found.append(f"memory grew by {growth} bytes (frontend, worker)")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, help="query rows; on a GPU 1,048,576, quick 131,072")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = (131_072, 1_048_576) if arguments.device != "cpu" else (4096, 16_384)
    report = Report(arguments.device, arguments.out)
    row = measure(arguments.device, arguments.rows or sizes[0 if arguments.quick else 1])
    report.add(row)
    return report.finish(broken_promises(row))


if __name__ == "__main__":
    sys.exit(main())
