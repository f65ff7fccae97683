"""Attention through the service, from a caller's arrays to its answers: steps of decode, and a prefill.

    python -m benchmarks.attend_calls --quick --out benchmarks/results/attend_calls.json

One service on a unix socket; a case after another, each with caches of its own (`benchmarks.attend_cases`).

A step is a `SparseAttendBatch` of one token of each of several sequences, with indices that are found (`top_k`), and
with the same ones given; where a layer of ratio 128 has no indexer, of all rows that a token sees: sent without a list
(`all_visible`), and with that list given. The first of these once more with the rows of its tokens brought along:
they are written first, a window row, a KV row and a key in each cache, though a layer of ratio 4 or 128 gets the latter
two with every fourth or 128th token alone; they are the same as before.

Callers are processes of their own (`benchmarks.attend_steps`) that repeat a step for a while: one alone, call after
call, then four at the same time, each with queries of its own on the same sequences, or, for steps of one sequence, on
a sequence of its own. A latency is that of the client library's call, from arrays to arrays; steps a second include
that a caller compares every answer. Repeated steps find their rows in the device's cache if they fit it, which a model
with many layers does not. `seconds` is the p50 alone, `ratio` the steps a second of the four to those of one.

A prefill is the last rows of the context (a chunk of queries that repeats) in one stream: as a `Search` alone, as
`SparseAttend` with the indices that it found given, and as `SparseAttend` that finds them, in turn; seconds are
medians. `overlap`, also the `ratio`, is (search + attention) / together: 1 if nothing of one were done during the other
and nothing saved. `device_share` is the time of the tiles by the time that passed. Where it is far below 1 it is
messages that take the time; the last case, few heads over a long context, is one whose search has more to do than its
transport. Tiles of search and attention that run side by side count both: the share may be above 1.

`device_us` is what the service says: from a tile's first kernel to the end of the copy of its answers, tiles of search
and attention together; those of a stream are told by its `done`, those of steps are the device's `busy_us` by the
number of steps. Compiling is over before anything is timed.

The first answer of every step is judged before it is timed, and every later one must be the same to the bit, as must
the answer to indices that were found and are given. Steps of all rows are judged with and without their list, which
need not have the same bits. Of a stream a sample of rows is judged, all rows of the two ways to attend are compared
once, and the sample in every timed run. Nothing is written when a row is wrong, a worker was lost, a tile found no
memory, or a GPU's service does not run its kernels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import streamindex_client
import torch
from streamindex_client import Client
from torch import Tensor

from benchmarks.attend_cases import Case, Held, Judged, Queries, appended, cases_of, judge, upload
from benchmarks.attend_steps import (
    APPENDED,
    CALLERS,
    OF_ITEMS,
    Arrays,
    ask,
    file_of,
    given,
    items_of,
    selection_of,
    started,
    step_of,
    time_steps,
    visible_rows,
)
from benchmarks.callers import CHUNK_ROWS, Caller
from benchmarks.harness import Report, Row
from benchmarks.judge import CHECKED_ROWS, sample_rows
from streamindex_service.testing.service import RunningService

TABLE = "attend_calls"
MIB = 1 << 20
DISTINCT_ROWS = 512  # of a prefill's queries; then they repeat


@dataclass(frozen=True)
class Times:
    """How long is measured: steps for so many milliseconds, prefills in so many rounds."""

    steps_ms: int
    rounds: int


@dataclass(frozen=True)
class CallRow(Row):
    """What steps and prefills have in common. largest_error: of an output, as a share of its bound; request_bytes and
    answer_bytes: of the arrays of a call, of a prefill the one that finds its indices. `peak_bytes` are those since the
    service started."""

    model: str = ""
    heads: int = 0
    context: int = 0
    implementation: str = ""
    checked_rows: int = 0
    largest_error: float = 0.0
    request_bytes: int = 0
    answer_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.checked_rows:
            raise ValueError(f"{self.case}: a time, and no judgement of the answers")


@dataclass(frozen=True)
class StepRow(CallRow):
    """Steps of `sequences` tokens. indices: found, given or all_visible; appends: rows of the tokens come with them;
    alone: one caller, beside: four."""

    sequences: int = 0
    indices: str = ""
    appends: bool = False
    alone_steps: int = 0
    alone_ms_p50: float = 0.0
    alone_ms_p99: float = 0.0
    alone_steps_per_s: float = 0.0
    alone_device_us: float = 0.0
    beside_steps: int = 0
    beside_ms_p50: float = 0.0
    beside_ms_p99: float = 0.0
    beside_steps_per_s: float = 0.0
    beside_device_us: float = 0.0


@dataclass(frozen=True)
class PrefillRow(CallRow):
    """A prefill of `rows` rows; `seconds`, device_us and device_share are those of index and attention together."""

    rows: int = 0
    top_k: int = 0
    rows_per_s: float = 0.0
    device_us: float = 0.0
    device_share: float = 0.0
    search_s: float = 0.0
    search_rows_per_s: float = 0.0
    search_device_us: float = 0.0
    attention_s: float = 0.0
    attention_rows_per_s: float = 0.0
    attention_device_us: float = 0.0
    overlap: float = 0.0


class Bench:
    """A service, and processes that call it."""

    def __init__(self, client: Client, callers: Sequence[Caller], directory: Path, device: str, times: Times) -> None:
        self._client = client
        self._callers = callers
        self._directory = directory
        self._device = device
        self._times = times
        self._numbers = iter(range(1 << 30))
        known = client.capabilities()
        self.implementation = known.implementation
        self.attention = known.attention_implementation

    def rows(self, case: Case) -> Iterator[CallRow]:
        """Everything about a case."""
        held = list(upload(case, self._client, self._device))
        try:
            for sequences in case.steps:
                yield from self._steps(case, held, sequences)
            if case.rows:
                prefill = Prefill(case, held[-1], self._device).measure(self._times.rounds)
                yield prefill(**self._row(case))  # asked for the peak once it was reached
        finally:
            for each in held:
                each.cache.delete()

    def _row(self, case: Case) -> dict[str, Any]:
        """What all rows of a case say."""
        load = self._client.load()
        return {
            "table": TABLE, "dtype": case.attention.packed.value, "useful_tflops": None, "roof_fraction": None,
            "peak_bytes": load.device_peak_bytes or load.ledgers["hbm"].peak_bytes, "model": case.attention.name,
            "heads": case.attention.heads, "context": case.context, "implementation": self.attention,
        }  # fmt: skip

    def _steps(self, case: Case, held: Sequence[Held], sequences: int) -> Iterator[StepRow]:
        """Steps of so many sequences, in both ways to select their rows."""
        ways: dict[tuple[str, bool], list[Arrays]] = {}
        judged: dict[tuple[str, bool], Judged] = {}
        for number in range(CALLERS):
            some = [held[(number * sequences + each) % len(held)] for each in range(sequences)]
            queries = Queries.drawn(case, sequences, self._device, 100 + number)
            for step, verdict in self._judged_ways(case, some, queries):
                way = selection_of(step), "kv_rows" in step
                ways.setdefault(way, []).append(step)
                judged[way] = judged.get(way, Judged()) + verdict
        for way, steps in ways.items():
            yield self._step_row(case, steps, judged[way], appends=way[1])

    def _judged_ways(self, case: Case, some: Sequence[Held], queries: Queries) -> Iterator[tuple[Arrays, Judged]]:
        """A step without given indices, with what it appends if it is one of many, and with given indices, each with
        the answer that must come, and its judgement."""
        step = step_of(case, some, queries)
        judged, indices, out = self._judged(case, some, queries, step)
        yield {**step, "out": out}, judged
        if len(some) > 1:
            yield {**step, **appended(case, some), "out": out}, judged
        listed = given(step, indices)
        if case.index is None:  # a list may be attended in another order than rows that need none
            judged, _, out = self._judged(case, some, queries, listed)
        yield {**listed, "out": out}, judged

    def _judged(
        self, case: Case, some: Sequence[Held], queries: Queries, step: Arrays
    ) -> tuple[Judged, npt.NDArray[np.int32], npt.NDArray[np.uint16]]:
        """Make a step once and judge it; the indices that it attends [sequences, entries], and what comes."""
        results = ask(self._client, items_of(step, [each.cache for each in some]), step)
        out = np.concatenate([result.out for result in results])
        found = selection_of(step) == "found"
        indices = np.concatenate([result.indices for result in results]) if found else visible_rows(case, some)
        judged = Judged()
        for row, each in enumerate(some):
            one = slice(row, row + 1)
            position = torch.tensor([each.position])
            judged += judge(case, each, queries.select(torch.tensor([row])), position, indices[one], out[one])
        return judged, indices, out

    def _step_row(self, case: Case, steps: Sequence[Arrays], judged: Judged, *, appends: bool) -> StepRow:
        """Time them, alone and beside each other."""
        number, sequences, indices = next(self._numbers), len(steps[0]["ids"]), selection_of(steps[0])
        files = [file_of(self._directory, number, str(caller)) for caller in range(len(steps))]
        for file, step in zip(files, steps, strict=True):
            np.savez(file, **step)  # type: ignore[arg-type]
        alone, beside = (
            time_steps(self._client, some, number, self._times.steps_ms) for some in (self._callers[:1], self._callers)
        )
        for file in files:
            file.unlink()
        return StepRow(
            **self._row(case),
            case=f"{case.name}, {sequences} x 1 token, indices {indices}{', rows appended' if appends else ''}",
            seconds=alone.ms(0.5) / 1e3,
            ratio=beside.per_s / alone.per_s,
            ratio_to="one caller",
            wrong_rows=judged.wrong + alone.changed + beside.changed,
            repeats=len(alone.times),
            note=f"p50 {alone.ms(0.5):.2f} ms, p99 {alone.ms(0.99):.2f}, device {alone.device_us:.0f} us; {CALLERS} "
            f"callers p50 {beside.ms(0.5):.2f}, p99 {beside.ms(0.99):.2f}, {beside.per_s:,.0f} steps/s",
            checked_rows=judged.rows,
            largest_error=judged.largest,
            sequences=sequences,
            indices=indices,
            appends=appends,
            request_bytes=sum(steps[0][each].nbytes for each in (*OF_ITEMS, *APPENDED) if each in steps[0]),
            answer_bytes=steps[0]["out"].nbytes,
            alone_steps=len(alone.times),
            alone_ms_p50=alone.ms(0.5),
            alone_ms_p99=alone.ms(0.99),
            alone_steps_per_s=alone.per_s,
            alone_device_us=alone.device_us,
            beside_steps=len(beside.times),
            beside_ms_p50=beside.ms(0.5),
            beside_ms_p99=beside.ms(0.99),
            beside_steps_per_s=beside.per_s,
            beside_device_us=beside.device_us,
        )


@dataclass(frozen=True)
class Ran:
    """A stream that was run: its seconds, the device's time, and the answers of the rows that were kept."""

    seconds: float
    device_us: int
    kept: npt.NDArray[Any]


class Prefill:
    """The last rows of a sequence."""

    def __init__(self, case: Case, held: Held, device: str) -> None:
        assert case.index is not None, "a prefill finds its indices"
        self._case = case
        self._held = held
        self._top_k = case.index.top_k
        self._start = case.context - case.rows
        self._queries = Queries.drawn(case, min(DISTINCT_ROWS, case.rows), device, 7)
        self._arrays = self._queries.arrays()
        self._asked: dict[str, Any] = {
            "layer": 0, "start_position": self._start, "window": case.attention.window, "scale": case.scale,
            "sink": self._arrays.get("sink"),
        }  # fmt: skip

    def measure(self, rounds: int) -> Callable[..., PrefillRow]:
        """Judge it, then time the three ways in turn; a row that lacks what all rows of a case say."""
        case, everything = self._case, np.arange(self._case.rows)
        sample = sample_rows(case.rows, CHECKED_ROWS)
        indices = self._search(everything).kept
        ways: dict[str, Callable[[npt.NDArray[Any]], Ran]] = {
            "search": self._search,
            "attention": lambda kept: self._attend_given(indices, kept),
            "together": self._attend,
        }
        out = self._attend(everything).kept
        different = (out != ways["attention"](everything).kept).any(axis=(1, 2))
        judged = self._judge(sample, indices[sample.numpy()], out[sample.numpy()])
        right = {"search": indices[sample.numpy()], "attention": out[sample.numpy()], "together": out[sample.numpy()]}
        runs: dict[str, list[Ran]] = {name: [] for name in ways}
        changed = 0
        for _ in range(rounds):
            for name, way in ways.items():
                runs[name].append(way(sample.numpy()))
                changed += int((runs[name][-1].kept != right[name]).reshape(len(sample), -1).any(axis=1).sum())
        seconds = {name: statistics.median(run.seconds for run in some) for name, some in runs.items()}
        device_us = {name: statistics.median(run.device_us for run in some) for name, some in runs.items()}
        overlap = (seconds["search"] + seconds["attention"]) / seconds["together"]
        share = device_us["together"] / 1e6 / seconds["together"]
        return partial(
            PrefillRow,
            case=f"{case.name}, prefill of {case.rows} rows",
            seconds=seconds["together"],
            ratio=overlap,
            ratio_to="search, then attention",
            wrong_rows=judged.wrong + int(different.sum()) + changed,
            repeats=rounds,
            note=f"{case.rows / seconds['together']:,.0f} rows/s; search {seconds['search']:.3f} s, attention "
            f"{seconds['attention']:.3f}; device {device_us['search'] / 1e3:.1f}, {device_us['attention'] / 1e3:.1f}, "
            f"together {device_us['together'] / 1e3:.1f} ms, {share:.2f} of the time",
            checked_rows=judged.rows,
            largest_error=judged.largest,
            request_bytes=case.rows * sum(self._arrays[each][0].nbytes for each in ("q", "index_q", "index_w")),
            answer_bytes=out.nbytes,
            rows=case.rows,
            top_k=self._top_k,
            rows_per_s=case.rows / seconds["together"],
            device_us=device_us["together"],
            device_share=share,
            search_s=seconds["search"],
            search_rows_per_s=case.rows / seconds["search"],
            search_device_us=device_us["search"],
            attention_s=seconds["attention"],
            attention_rows_per_s=case.rows / seconds["attention"],
            attention_device_us=device_us["attention"],
            overlap=overlap,
        )

    def _judge(self, rows: Tensor, indices: npt.NDArray[Any], out: npt.NDArray[Any]) -> Judged:
        queries = self._queries.select(rows % len(self._queries.q))
        return judge(self._case, self._held, queries, self._start + rows, indices, out)

    def _chunks(self, *names: str) -> Iterator[tuple[int, tuple[npt.NDArray[Any], ...]]]:
        """Number of the first row, and the arrays of these names, chunk by chunk."""
        distinct, rows = len(self._queries.q), self._case.rows
        for start in range(0, rows, CHUNK_ROWS):
            first = start % distinct
            stop = min(first + CHUNK_ROWS, distinct, first + rows - start)
            yield start, tuple(self._arrays[name][first:stop] for name in names)

    def _search(self, kept: npt.NDArray[Any]) -> Ran:
        chunks = (chunk for _, chunk in self._chunks("index_q", "index_w"))
        begin = time.perf_counter()
        stream = self._held.cache.search(
            layer=0, q=chunks, top_k=self._top_k, order="index", start_position=self._start
        )  # fmt: skip
        return self._run(begin, stream, kept, lambda some: some.indices)

    def _attend(self, kept: npt.NDArray[Any]) -> Ran:
        chunks = (chunk for _, chunk in self._chunks("q", "index_q", "index_w"))
        begin = time.perf_counter()
        stream = self._held.cache.sparse_attend(q=chunks, top_k=self._top_k, **self._asked)
        return self._run(begin, stream, kept, lambda some: some.out)

    def _attend_given(self, indices: npt.NDArray[Any], kept: npt.NDArray[Any]) -> Ran:
        chunks = ((q, indices[start : start + len(q)]) for start, (q,) in self._chunks("q"))
        begin = time.perf_counter()
        stream = self._held.cache.sparse_attend(q=chunks, indices=self._top_k, **self._asked)
        return self._run(begin, stream, kept, lambda some: some.out)

    def _run(self, begin: float, stream: Any, kept: npt.NDArray[Any], answer: Callable[[Any], Any]) -> Ran:
        """Read a stream to its end. kept: rows whose answers are, ascending."""
        found, answered = [], 0
        for some in stream:
            answered += some.rows
            first, stop = np.searchsorted(kept, (some.row_offset, some.row_offset + some.rows))
            if first < stop:
                found.append(answer(some)[kept[first:stop] - some.row_offset])
        seconds = time.perf_counter() - begin
        if answered != self._case.rows:
            raise RuntimeError(f"{self._case.name}: {answered} rows of {self._case.rows} were answered")
        return Ran(seconds, stream.summary.device_us, np.concatenate(found))


# What is run where.


def times_of(device: str, *, quick: bool) -> Times:
    if device == "cpu":
        return Times(steps_ms=100, rounds=1)
    return Times(steps_ms=400 if quick else 700, rounds=3)


def settings_of(device: str) -> dict[str, dict[str, Any]]:
    """Of the service."""
    return {
        "worker": {"device": device},
        "memory": {
            "device_budget_bytes": 8192 * MIB if device != "cpu" else 512 * MIB,
            "host_budget_bytes": 8192 * MIB if device != "cpu" else 1024 * MIB,
        },
        "log": {"level": "warning"},
    }


def broken_promises(device: str, load: streamindex_client.Load, implementations: Sequence[str]) -> list[str]:
    """What must not be, besides wrong rows."""
    found = []
    if device != "cpu" and set(implementations) != {"triton"}:
        found.append(f"the service runs {' and '.join(implementations)}")
    for name, count in (("tiles without memory", load.memory_failures), ("lost workers", load.worker_restarts)):
        if count:
            found.append(f"{count} {name}")
    return found


def measure(device: str, cases: Sequence[Case], times: Times, report: Report) -> list[str]:
    """Start a service and its callers, add the rows of all cases; promises that were broken."""
    with ExitStack() as stack:
        service = stack.enter_context(RunningService(settings_of(device)))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamindex-steps-")))
        client = stack.enter_context(streamindex_client.connect(service.address))
        callers = [
            stack.enter_context(started(service.address, directory, str(number)))
            for number in range(CALLERS if any(case.steps for case in cases) else 0)
        ]
        bench = Bench(client, callers, directory, device, times)
        for case in cases:
            for row in bench.rows(case):
                report.add(row)
                if row.wrong_rows:
                    return []  # the report says so, and there is no more to be measured
        return broken_promises(device, client.load(), [bench.implementation, bench.attention])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="shorter contexts, fewer cases, less time for each")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes")
    arguments = parser.parse_args(argv)
    report = Report(arguments.device, arguments.out)
    report.start()
    quick = arguments.quick
    cases, times = cases_of(arguments.device, quick=quick), times_of(arguments.device, quick=quick)
    return report.finish(measure(arguments.device, cases, times, report))


if __name__ == "__main__":
    sys.exit(main())
