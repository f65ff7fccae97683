"""Throughput alone, decode steps alone, and both at once, in one run, for a list of settings.

    python -m benchmarks.governor_mix --out benchmarks/results/governor_mix.json
    python -m benchmarks.governor_mix --set "scheduler.short_tile_s=0.002 worker.issue_ahead_s=0.0005" --set ""

For each `--set` a service of its own, with V4-Flash's shape: one `Search` of all rows alone; a victim that makes decode
steps (a SearchBatch of one row against 16,384 keys) alone; the same victim while others flood searches of a million
rows, all of which see all keys. The search, the victim and each flood are callers of their own, with a token and one
cache each; victim and floods are processes of their own. Reported: rows a second of the search, p50 and p99 of the
victim alone and beside the flood, rows a second of the flood meanwhile, and what the service itself says of its tiles:
how busy the device was, and how long tiles waited and ran. `ratio` is the victim's p99 alone to that beside the flood.
Nothing is written when a sampled row is wrong, a step is not answered as the first was, or, on a GPU with the defaults,
the victim's p99 beside the floods is more than twice that alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import streamindex_client
import torch
from streamindex.v1 import server_pb2
from streamindex_client import KeyCache

from benchmarks.callers import CHUNK_ROWS, WATCH, caller, load_of, queries, step_queries
from benchmarks.harness import V4_FLASH, Model, Report, Row
from streamindex_service.ops import PagedKeys
from streamindex_service.ops.topk import check_topk
from streamindex_service.testing.service import RunningService

TABLE = "governor_mix"
MIB = 1 << 20
TINY = Model("tiny", heads=4, head_dim=32, ratio=4, top_k=64)  # for a CPU
SEARCH, VICTIM = "search", "victim"  # callers
CHECKED_ROWS = 32
LEAST_RATIO = 0.5  # of the victim's p99 alone to that beside the floods
SETTLE_S = 1.0
# What is worth a look on a new device; the first are the defaults.
SETTINGS = (
    "",
    "worker.issue_ahead_s=0.0005",
    "worker.issue_ahead_s=0.002",
    "scheduler.short_tile_s=0.0015",
    "memory.search_block_bytes=8388608",
)


@dataclass(frozen=True)
class Sizes:
    """Of one run."""

    model: Model
    keys: int
    rows: int
    victim_keys: int
    steps: int
    floods: int


@dataclass(frozen=True)
class MixRow(Row):
    """`seconds` is the search alone. Latencies of the victim in milliseconds; `tile_*` of both kinds of tiles together,
    beside the flood."""

    settings: str = ""
    checked_rows: int = 0
    rows_per_s: float = 0.0
    device_busy: float = 0.0
    victim_alone_ms_p50: float = 0.0
    victim_alone_ms_p99: float = 0.0
    victim_beside_ms_p50: float = 0.0
    victim_beside_ms_p99: float = 0.0
    flood_rows_per_s: float = 0.0
    flood_device_busy: float = 0.0
    tile_wait_ms_p50: float = 0.0
    tile_wait_ms_p99: float = 0.0
    tile_run_ms_p50: float = 0.0
    tile_run_ms_p99: float = 0.0


def sections(text: str) -> dict[str, dict[str, Any]]:
    """Settings from "section.name=value section.name=value"."""
    found: dict[str, dict[str, Any]] = {}
    for each in text.split():
        name, _, value = each.partition("=")
        section, _, setting = name.partition(".")
        found.setdefault(section, {})[setting] = json.loads(value)
    return found


def settings_of(device: str, text: str) -> dict[str, dict[str, Any]]:
    """A service's, with those of the text on top."""
    base: dict[str, dict[str, Any]] = {
        "worker": {"device": device},
        "memory": {
            "device_budget_bytes": 8192 * MIB if device != "cpu" else 512 * MIB,
            "host_budget_bytes": 2048 * MIB,
        },
        "limits": {"max_caller_caches": 1},  # so each is a caller of its own, or is refused
        "log": {"level": "warning"},
    }
    for section, values in sections(text).items():
        base[section] = {**base.get(section, {}), **values}
    return base


def make_cache(client: streamindex_client.Client, model: Model, keys: np.ndarray) -> KeyCache:
    """One that holds the keys."""
    cache = client.create_key_cache(
        heads=model.heads, head_dim=model.head_dim, ratio=model.ratio, key_format="bf16", layers=1
    )
    cache.append(layer=0, keys=keys, first_row=0)
    return cache


def callers_of(sizes: Sizes) -> list[str]:
    """Their names."""
    return [WATCH, SEARCH, VICTIM, *(flood_name(number) for number in range(sizes.floods))]


def flood_name(number: int) -> str:
    """Of one that floods."""
    return f"flood-{number}"


class Mix:
    """One service, and what its callers search: many keys, but for the victim, whose are few.

    `client` is that of the search alone.
    """

    def __init__(self, service: RunningService, client: streamindex_client.Client, sizes: Sizes) -> None:
        self.address = service.address
        self.sizes = sizes
        self.wrong = 0
        self._tokens = service.tokens
        random = np.random.default_rng(1)
        self._keys = [
            (random.standard_normal((count, sizes.model.head_dim), dtype=np.float32).view(np.uint32) >> 16).astype("u2")
            for count in (sizes.keys, sizes.victim_keys)
        ]
        self._large = make_cache(client, sizes.model, self._keys[0])
        self._small = self._owned(VICTIM, self._keys[1])
        self.floods = [self._owned(flood_name(number), self._keys[0]) for number in range(sizes.floods)]

    def _owned(self, name: str, keys: np.ndarray) -> dict[str, KeyCache]:
        """A caller's cache, by its token."""
        token = self._tokens[name]
        with streamindex_client.connect(self.address, token=token) as client:
            return {token: make_cache(client, self.sizes.model, keys)}

    def load(self) -> server_pb2.GetLoadResponse:
        """What the service says of itself."""
        return load_of(self.address, self._tokens[WATCH])

    def search(self, rows: int) -> float:
        """One search of the last rows of the sequence; its seconds. Counts the rows that are wrong."""
        sizes, model = self.sizes, self.sizes.model
        q, w = queries(CHUNK_ROWS, model.heads, model.head_dim, seed=4)
        start, blocks = sizes.keys * model.ratio - rows, ((q, w) for _ in range(rows // CHUNK_ROWS))
        wanted = [int(each) for each in np.linspace(0, rows - 1, CHECKED_ROWS)]
        sample: dict[int, np.ndarray] = {}
        begin, answered = time.perf_counter(), 0
        for part in self._large.search(layer=0, q=blocks, top_k=model.top_k, start_position=start):
            while wanted and wanted[0] < part.row_offset + part.rows:
                row = wanted.pop(0)
                sample[row] = part.indices[row - part.row_offset].copy()
            answered += part.rows
        seconds = time.perf_counter() - begin
        which = np.array(list(sample)) % CHUNK_ROWS
        positions = [start + row for row in sample]
        self.wrong += (
            rows - answered + self._wrong_rows(0, np.stack(list(sample.values())), q[which], w[which], positions)
        )
        return seconds

    def steps(self) -> tuple[float, float]:
        """Decode steps; p50 and p99 in seconds. Counts those that are wrong."""
        sizes, model = self.sizes, self.sizes.model
        position = sizes.victim_keys * model.ratio - 1
        options = {"position": position, "top_k": model.top_k, "count": sizes.steps}
        with caller("steps", self.address, self._small, **options) as victim:
            victim.wait_ready()
            found = victim.figures()
        indices = np.array([found["indices"]], np.int32)
        (small,) = self._small.values()
        self.wrong += found["changed"] + self._wrong_rows(1, indices, *step_queries(small), [position])
        return float(np.quantile(found["seconds"], 0.5)), float(np.quantile(found["seconds"], 0.99))

    def _wrong_rows(self, which: int, indices: np.ndarray, q: np.ndarray, w: np.ndarray, positions: list[int]) -> int:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"

        def bf16(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).to(device)

        report = check_topk(
            torch.from_numpy(indices).to(device),
            bf16(q),
            torch.from_numpy(w).to(device),
            PagedKeys.from_contiguous(bf16(self._keys[which])),
            torch.tensor(positions, dtype=torch.int64),
            ratio=self.sizes.model.ratio,
            top_k=self.sizes.model.top_k,
        )
        return int(report.wrong_rows)


def busy_share(before: server_pb2.GetLoadResponse, after: server_pb2.GetLoadResponse) -> float:
    """How much of the time between the two the device worked, from 0 to 1."""
    passed_us = 1000 * (after.uptime_ms - before.uptime_ms)
    return (after.device.busy_us - before.device.busy_us) / passed_us if passed_us else 0.0


def measure(device: str, sizes: Sizes, text: str) -> MixRow:
    """Start a service, and measure all of it."""
    settings = settings_of(device, text)
    with ExitStack() as stack:
        service = stack.enter_context(RunningService(settings, callers=callers_of(sizes)))
        client = stack.enter_context(streamindex_client.connect(service.address, token=service.tokens[SEARCH]))
        mix = Mix(service, client, sizes)
        mix.search(min(sizes.rows, 16 * CHUNK_ROWS))  # compiles, and learns how fast the device is
        loads = [mix.load()]
        seconds = mix.search(sizes.rows)
        loads.append(mix.load())
        alone = mix.steps()
        flood_options = {"position": sizes.keys * sizes.model.ratio, "top_k": sizes.model.top_k}
        floods = [stack.enter_context(caller("flood", service.address, cache, **flood_options)) for cache in mix.floods]
        for flood in floods:
            flood.wait_ready()
        time.sleep(SETTLE_S)
        loads.append(mix.load())
        beside = mix.steps()
        loads.append(mix.load())
        flooded = [flood.figures() for flood in floods]
        device_peak_bytes = loads[-1].device_peak_bytes or None
    run, wait = loads[-1].device.run, loads[-1].device.wait
    flood_rate = sum(each["rows"] / each["seconds"] for each in flooded)
    return MixRow(
        table=TABLE,
        case=f"{sizes.model.name}, {sizes.rows} rows x {sizes.keys} keys, {sizes.floods} floods: {text or 'defaults'}",
        dtype="bf16",
        seconds=seconds,
        useful_tflops=None,
        roof_fraction=None,
        ratio=alone[1] / beside[1],
        ratio_to="p99 alone",
        peak_bytes=device_peak_bytes,
        wrong_rows=mix.wrong,
        repeats=1,
        note=f"{sizes.rows / seconds:,.0f} rows/s, victim p99 {1e3 * alone[1]:.2f} ms alone, {1e3 * beside[1]:.2f} ms "
        f"beside {flood_rate:,.0f} rows/s",
        settings=text,
        checked_rows=CHECKED_ROWS + 2,
        rows_per_s=sizes.rows / seconds,
        device_busy=busy_share(loads[0], loads[1]),
        victim_alone_ms_p50=1e3 * alone[0],
        victim_alone_ms_p99=1e3 * alone[1],
        victim_beside_ms_p50=1e3 * beside[0],
        victim_beside_ms_p99=1e3 * beside[1],
        flood_rows_per_s=flood_rate,
        flood_device_busy=busy_share(loads[2], loads[3]),
        tile_wait_ms_p50=wait.p50_us / 1e3,
        tile_wait_ms_p99=wait.p99_us / 1e3,
        tile_run_ms_p50=run.p50_us / 1e3,
        tile_run_ms_p99=run.p99_us / 1e3,
    )


def sizes_of(device: str, *, quick: bool) -> Sizes:
    """What is measured there."""
    if device == "cpu":
        return Sizes(TINY, 4096, 2048, 1024, steps=50, floods=1)
    return Sizes(V4_FLASH, 262_144, 32_768 if quick else 131_072, 16_384, steps=300 if quick else 1000, floods=4)


def broken_promises(row: MixRow) -> list[str]:
    """What the row shows that must not be; other settings than the defaults promise nothing."""
    assert row.ratio is not None
    if row.settings or row.ratio >= LEAST_RATIO:
        return []
    return [f"{row.victim_beside_ms_p99:.2f} ms of p99 beside the floods, {row.victim_alone_ms_p99:.2f} ms alone"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", dest="settings", metavar="TEXT", help="'' are the defaults")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = Report(arguments.device, arguments.out)
    report.start()
    texts = arguments.settings or (SETTINGS[:1] if arguments.quick or arguments.device == "cpu" else SETTINGS)
    broken = []
    for text in texts:
        row = report.add(measure(arguments.device, sizes_of(arguments.device, quick=arguments.quick), text))
        print({name: value for name, value in vars(row).items() if name not in Row.__dataclass_fields__}, flush=True)
        if arguments.device != "cpu":  # how fast it is there says nothing
            broken += broken_promises(row)
    return report.finish(broken)


if __name__ == "__main__":
    sys.exit(main())
