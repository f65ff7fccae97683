"""Steps of decode as callers make them, each caller in a process of its own.

    python -m benchmarks.attend_steps ADDRESS DIR NAME

For a line of input with the number of a step a caller reads that step from DIR, warms up and says `ready`; for the
next, milliseconds, it repeats the step for so long and says what it measured as one line of JSON; until standard input
ends. A step attends rows that a search finds (it has `top_k`), given ones (`indices`), or, with neither, all that a
token sees. It may bring the rows of its tokens, which are written first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import streamindex_client
from streamindex_client import AttendBatchItem, AttendBatchResult, Client, KeyCache

from benchmarks.callers import READY, Caller, running

if TYPE_CHECKING:  # a caller starts without torch
    from benchmarks.attend_cases import Case, Held, Queries

CALLERS = 4
OF_ITEMS = ("q", "index_q", "index_w", "indices")
# What items append: [sequences, rows, ...] each, and the number of the first row.
APPENDED = ("keys", "key_scales", "kv_rows", "kv_scales", "window_rows", "window_scales")
_FIRST = ("first_key", "first_kv_row", "first_window_row")
_WARM_STEPS = 10

Arrays = dict[str, npt.NDArray[Any]]
"""A step: ids, positions, q; index_q, index_w and top_k, or indices, or none of them; sink, window, scale; what it
appends; out, once it is judged."""


def step_of(case: Case, some: Sequence[Held], queries: Queries) -> Arrays:
    """A step of these sequences that gives no indices; queries have a row for each."""
    top_k = {} if case.index is None else {"top_k": np.array(case.index.top_k)}
    return {
        "ids": np.array([held.cache.id for held in some]),
        "positions": np.array([held.position for held in some]),
        "window": np.array(case.attention.window),
        "scale": np.array(case.scale),
        **top_k,
        **queries.arrays(),
    }


def visible_rows(case: Case, some: Sequence[Held]) -> npt.NDArray[np.int32]:
    """Every row that a sequence has, -1 behind them: [sequences, rows of the context]."""
    row = np.arange(case.context // case.attention.ratio, dtype=np.int32)
    return np.stack([np.where(row < held.kv.rows, row, np.int32(-1)) for held in some])


def given(step: Arrays, indices: npt.NDArray[np.int32]) -> Arrays:
    """The same step with its indices given."""
    left_out = ("index_q", "index_w", "top_k", *APPENDED, *_FIRST)
    return {**{name: array for name, array in step.items() if name not in left_out}, "indices": indices}


def selection_of(step: Mapping[str, npt.NDArray[Any]]) -> str:
    """found, given or all_visible."""
    return "found" if "top_k" in step else "given" if "indices" in step else "all_visible"


def items_of(step: Mapping[str, npt.NDArray[Any]], caches: Sequence[KeyCache]) -> list[AttendBatchItem]:
    """What is sent."""
    items = []
    for row, cache in enumerate(caches):
        arrays: dict[str, Any] = {name: step[name][row : row + 1] for name in OF_ITEMS if name in step}
        arrays |= {name: step[name][row] for name in APPENDED if name in step}
        arrays |= {name: int(step[name][row]) for name in _FIRST if name in step}
        items.append(AttendBatchItem(cache, 0, **arrays, start_position=int(step["positions"][row])))
    return items


def ask(
    client: Client, items: Sequence[AttendBatchItem], step: Mapping[str, npt.NDArray[Any]]
) -> list[AttendBatchResult]:
    """Make a step, and if it was not judged yet have the indices that it finds. Raises the error of an item."""
    selection = selection_of(step)
    results = client.sparse_attend_batch(
        items, top_k=int(step["top_k"]) if selection == "found" else None, all_visible=selection == "all_visible",
        window=int(step["window"]), scale=float(step["scale"]), sink=step.get("sink"),
        want_indices=selection == "found" and "out" not in step,
    )  # fmt: skip
    for result in results:
        if result.error is not None:
            raise result.error
    return results


def repeat(client: Client, items: Sequence[AttendBatchItem], step: Arrays, seconds: float) -> dict[str, Any]:
    """The step again and again, for so long; every answer must be `out`."""
    times, changed = list[float](), 0
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < seconds:
        before = time.perf_counter()
        results = ask(client, items, step)
        times.append(time.perf_counter() - before)
        changed += sum(not np.array_equal(one.out[0], out) for one, out in zip(results, step["out"], strict=True))
    return {"times": times, "changed": changed, "seconds": time.perf_counter() - begin}


def file_of(directory: Path, number: int, name: str) -> Path:
    """Where a caller of that name finds its step of that number."""
    return directory / f"{number}-{name}.npz"


def serve(address: str, directory: Path, name: str) -> None:
    """What a caller does, until standard input ends."""
    with streamindex_client.connect(address) as client:
        for number in sys.stdin:
            with np.load(file_of(directory, int(number), name)) as file:
                step = dict(file)
            items = items_of(step, [client.open_key_cache(str(each)) for each in step["ids"]])
            for _ in range(_WARM_STEPS):
                ask(client, items, step)
            print(READY, flush=True)
            print(json.dumps(repeat(client, items, step, int(sys.stdin.readline()) / 1e3)), flush=True)


def started(address: str, directory: Path, name: str) -> AbstractContextManager[Caller]:
    """A caller in a process of its own."""
    return running([sys.executable, "-m", "benchmarks.attend_steps", address, str(directory), name])


@dataclass(frozen=True)
class Timed:
    """Steps of one caller or of several: their seconds, how many a second, the device's time for one, and answers that
    were not the first."""

    times: list[float]
    per_s: float
    device_us: float
    changed: int

    def ms(self, quantile: float) -> float:
        return 1e3 * float(np.quantile(self.times, quantile))


def time_steps(client: Client, callers: Sequence[Caller], number: int, milliseconds: int) -> Timed:
    """Let these make their steps of that number for so long, at the same time."""
    for each in callers:
        each.go(number)
    for each in callers:
        each.wait_ready()
    before = client.load().device_busy_us
    for each in callers:
        each.go(milliseconds)
    figures = [each.done() for each in callers]
    busy_us = client.load().device_busy_us - before
    times = [seconds for each in figures for seconds in each["times"]]
    return Timed(
        times,
        sum(len(each["times"]) / each["seconds"] for each in figures),
        busy_us / len(times),
        sum(each["changed"] for each in figures),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("directory", type=Path)
    parser.add_argument("name", help="of the caller")
    arguments = parser.parse_args()
    serve(arguments.address, arguments.directory, arguments.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
