"""Device memory and throughput while callers offer four times what fits, against the same work at exactly what fits.

    python -m benchmarks.governor_memory --quick --out benchmarks/results/governor_memory.json

64 key caches, of which the device budget holds 16 beside their workspaces. All of them are searched at once, by 64
callers, each with a token, a connection and one cache; and, in turn with that, 16 at a time: the same searches. Hosts
are shared and one round differs from the next by a fifth: the ratio is that of many rounds of both, in turn. The memory
of the device is sampled from outside, through NVML, every few milliseconds, all the while. The context is what the
service takes beyond its allocator's memory once every cache has been searched.

The run fails, and writes no figures, when the memory passes budget and context, a tile found no memory, a worker was
lost, an answer was wrong or not that of all the others, or the throughput is more than 10 % below that of what fits.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import streamindex_client
import torch
from streamindex_client import KeyCache

from benchmarks.callers import WATCH, Caller, caller, load_of, work_queries
from benchmarks.device_memory import Sampler, nvml_used_bytes
from benchmarks.harness import V4_FLASH, Model, Report, Row
from streamindex_service.ops import PagedKeys
from streamindex_service.ops.topk import check_topk
from streamindex_service.testing.service import RunningService

TABLE = "governor_memory"
MIB = 1 << 20
TINY = Model("tiny", heads=4, head_dim=32, ratio=4, top_k=64)  # for a CPU
LEAST_THROUGHPUT = 0.9
TIMES = 4  # what is offered, in times of what fits
_PERIOD_S = 0.003
_CPU_PERIOD_S = 0.05  # there the service is asked


@dataclass(frozen=True)
class Sizes:
    """Of one run. `fitting` caches of `keys` fit the budget; `processes` of callers divide them evenly."""

    model: Model
    keys: int
    fitting: int
    processes: int
    rows: int
    searches: int
    rounds: int
    budget_bytes: int
    extent_bytes: int

    @property
    def caches(self) -> int:
        return TIMES * self.fitting


@dataclass(frozen=True)
class MemoryRow(Row):
    """`seconds` of the work at four times what fits; `ratio` of its throughput to that at what fits.

    `peak_bytes`: the most that was in use on the device, beyond what was before the service started; of it
    `context_bytes` are not the allocator's. `over_round_s` and `fitting_round_s` are the seconds of single rounds, in
    turn; `ratio_error` is the standard error that their differences give the ratio.
    """

    checked_rows: int = 0
    budget_bytes: int = 0
    context_bytes: int = 0
    samples: int = 0
    rows_per_s: float = 0.0
    fitting_rows_per_s: float = 0.0
    over_round_s: tuple[float, ...] = ()
    fitting_round_s: tuple[float, ...] = ()
    ratio_error: float | None = None
    failures: int = 0
    worker_restarts: int = 0
    promoted_pages: int = 0
    evicted_pages: int = 0


@dataclass
class Outcome:
    """Of several rounds."""

    seconds: list[float] = field(default_factory=list)
    rows: int = 0
    changed: int = 0
    checksums: set[int] = field(default_factory=set)
    indices: list[int] = field(default_factory=list)

    @property
    def rows_per_s(self) -> float:
        return self.rows / sum(self.seconds)


def make_caches(service: RunningService, sizes: Sizes, keys: np.ndarray) -> dict[str, KeyCache]:
    """One of each caller, by its token; all with the same keys."""
    caches, model = {}, sizes.model
    for name, token in service.tokens.items():
        if name == WATCH:
            continue
        with streamindex_client.connect(service.address, token=token) as client:
            cache = client.create_key_cache(
                heads=model.heads, head_dim=model.head_dim, ratio=model.ratio, key_format="bf16", layers=1
            )
            cache.append(layer=0, keys=keys, first_row=0)
        caches[token] = cache
    return caches


@contextmanager
def callers_of(address: str, caches: Mapping[str, KeyCache], sizes: Sizes) -> Iterator[list[Caller]]:
    """Processes that share the caches out; each has searched its own once."""
    options = {
        "position": sizes.keys * sizes.model.ratio, "top_k": sizes.model.top_k, "rows": sizes.rows,
        "count": sizes.searches,
    }  # fmt: skip
    with ExitStack() as stack:
        owned = list(caches.items())
        shares = [dict(owned[number :: sizes.processes]) for number in range(sizes.processes)]
        callers = [stack.enter_context(caller("work", address, share, **options)) for share in shares]
        for each in callers:
            each.wait_ready()
        yield callers


def run_work(callers: Sequence[Caller], at_once: int, outcome: Outcome) -> None:
    """Search all caches, so many at once."""
    begin = time.perf_counter()
    for each in callers:
        each.go(at_once // len(callers))
    figures = [each.done() for each in callers]
    outcome.seconds.append(time.perf_counter() - begin)
    outcome.rows += sum(each["rows"] for each in figures)
    outcome.changed += sum(each["changed"] for each in figures)
    outcome.checksums.update(each["checksum"] for each in figures)
    outcome.indices = figures[0]["indices"]


def ratio_error(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Standard error of sum(one) / sum(other), which are measured in turn; None for a single pair, which tells none.

    From what the ratio is without each of the pairs (the jackknife: Efron, "The Jackknife, the Bootstrap and Other
    Resampling Plans", SIAM 1982).
    """
    pairs, ones, others = len(one), sum(one), sum(other)
    if pairs < 2:
        return None
    without = [(ones - a) / (others - b) for a, b in zip(one, other, strict=True)]
    mean = sum(without) / pairs
    return math.sqrt((pairs - 1) / pairs * sum((each - mean) ** 2 for each in without))


def wrong_rows(outcomes: list[Outcome], sizes: Sizes, keys: np.ndarray, cache: KeyCache) -> int:
    """Answers that differ from the others, and whether the first row of them is wrong."""

    def bf16(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)

    q, w = work_queries(cache)
    report = check_topk(
        torch.tensor([outcomes[0].indices], dtype=torch.int32),
        bf16(q[:1]),
        torch.from_numpy(w[:1]),
        PagedKeys.from_contiguous(bf16(keys)),
        torch.tensor([sizes.keys * sizes.model.ratio]),
        ratio=sizes.model.ratio,
        top_k=sizes.model.top_k,
    )
    different = len(set().union(*(outcome.checksums for outcome in outcomes))) - 1
    return int(report.wrong_rows) + different + sum(outcome.changed for outcome in outcomes)


def settings_of(device: str, sizes: Sizes, cache_bytes: int) -> dict[str, dict[str, Any]]:
    """Of the service, whose caches have so many bytes each."""
    return {
        "worker": {"device": device},
        "memory": {
            "device_budget_bytes": sizes.budget_bytes,
            "host_budget_bytes": 2 * sizes.caches * cache_bytes + 64 * MIB,
            "extent_bytes": sizes.extent_bytes,
            "ingress_budget_bytes": 1024 * MIB,
        },
        "scheduler": {"max_queued_bytes": 1024 * MIB},
        "limits": {"max_caller_caches": 1},  # so each is a caller of its own, or is refused
        "log": {"level": "warning"},
    }


def measure(device: str, sizes: Sizes) -> MemoryRow:
    """Start the service, upload, do the work both ways once, then offer what fits and four times that in turn."""
    model, on_gpu = sizes.model, device != "cpu"
    keys = np.random.default_rng(1).standard_normal((sizes.keys, model.head_dim), dtype=np.float32)
    keys = (keys.view(np.uint32) >> 16).astype(np.uint16)
    read: Callable[[], int] = lambda: 0  # noqa: E731
    if on_gpu:
        read = nvml_used_bytes(str(torch.cuda.get_device_properties(device).uuid))
    before = read()
    fits, over = Outcome(), Outcome()
    with RunningService(
        settings_of(device, sizes, keys.nbytes), callers=[WATCH, *(f"caller-{n}" for n in range(sizes.caches))]
    ) as service:
        ask = functools.partial(load_of, service.address, service.tokens[WATCH])
        if not on_gpu:
            read = lambda: next(each for each in ask().ledgers if each.name == "hbm").reserved_bytes  # noqa: E731
        caches = make_caches(service, sizes, keys)
        warm = Outcome()
        with (
            Sampler(read, _PERIOD_S if on_gpu else _CPU_PERIOD_S) as sampler,
            callers_of(service.address, caches, sizes) as callers,
        ):
            run_work(callers, sizes.fitting, warm)
            load = ask()
            context = read() - before - load.device_reserved_bytes if on_gpu else 0
            run_work(callers, sizes.caches, warm)  # the first touch of a block costs as much as many copies to it
            for _ in range(sizes.rounds):
                run_work(callers, sizes.fitting, fits)
                run_work(callers, sizes.caches, over)
        load = ask()
        if load.device.memory.failures:
            print(service.log_tail(), file=sys.stderr)
    ratios = [fit / more for fit, more in zip(fits.seconds, over.seconds, strict=True)]
    error = ratio_error(fits.seconds, over.seconds)
    said = "" if error is None else f"± {error:.3f}; "
    return MemoryRow(
        table=TABLE,
        case=f"{sizes.caches} callers, {sizes.caches * keys.nbytes // MIB} MiB of keys, budget "
        f"{sizes.budget_bytes // MIB} MiB",
        dtype="bf16",
        seconds=sum(over.seconds) / sizes.rounds,
        useful_tflops=None,
        roof_fraction=None,
        ratio=over.rows_per_s / fits.rows_per_s,
        ratio_to="what fits",
        peak_bytes=sampler.most - before,
        wrong_rows=wrong_rows([warm, fits, over], sizes, keys, next(iter(caches.values()))),
        repeats=sizes.rounds,
        note=f"{said}{over.rows_per_s:,.0f} rows/s at {TIMES} times what fits, {fits.rows_per_s:,.0f} at what "
        f"fits, single rounds {min(ratios):.2f} to {max(ratios):.2f}; context {context / MIB:.0f} MiB, "
        f"{sampler.samples} samples",
        checked_rows=3,
        budget_bytes=sizes.budget_bytes,
        context_bytes=context,
        samples=sampler.samples,
        rows_per_s=over.rows_per_s,
        fitting_rows_per_s=fits.rows_per_s,
        over_round_s=tuple(over.seconds),
        fitting_round_s=tuple(fits.seconds),
        ratio_error=error,
        failures=load.device.memory.failures,
        worker_restarts=load.worker_restarts,
        promoted_pages=load.device.promoted_pages,
        evicted_pages=load.device.evicted_pages,
    )


def broken_promises(row: MemoryRow) -> list[str]:
    """What the row shows that must not be."""
    found = []
    assert row.peak_bytes is not None
    assert row.ratio is not None
    if row.peak_bytes > row.budget_bytes + row.context_bytes:
        found.append(f"{row.peak_bytes} bytes in use, budget {row.budget_bytes} and context {row.context_bytes}")
    for name, count in (("tiles without memory", row.failures), ("lost workers", row.worker_restarts)):
        if count:
            found.append(f"{count} {name}")
    if row.wrong_rows:
        found.append(f"{row.wrong_rows} wrong answers")
    if row.ratio < LEAST_THROUGHPUT:
        found.append(f"{row.ratio:.2f} of the throughput of what fits")
    if not row.evicted_pages:
        found.append("nothing was evicted: all of it fitted")
    return found


def sizes_of(device: str, *, quick: bool) -> Sizes:
    """What is measured there."""
    if device == "cpu":
        return Sizes(TINY, 16_384, 2, 2, 256, 1, 1, budget_bytes=40 * MIB, extent_bytes=MIB)
    # 16 × 64 MiB of keys; what is left of the budget are three workspaces of the largest tiles
    return Sizes(V4_FLASH, 262_144, 16, 8, 1024, 4, 5 if quick else 10, 1600 * MIB, extent_bytes=32 * MIB)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = Report(arguments.device, arguments.out)
    report.start()
    row = measure(arguments.device, sizes_of(arguments.device, quick=arguments.quick))
    report.add(row)
    print({name: value for name, value in vars(row).items() if name not in Row.__dataclass_fields__}, flush=True)
    return report.finish(broken_promises(row))


if __name__ == "__main__":
    sys.exit(main())
