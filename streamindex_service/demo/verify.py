"""Checks a search's answers against the definition, row by row, in chunks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from streamindex_service.demo.workload import Workload
from streamindex_service.ops.paged_keys import PagedKeys
from streamindex_service.ops.topk.check import CheckReport, Verdict, check_topk

TIME_LIMIT_S = 60.0
_CHUNK_ROWS = 64
_TRIAL_ROWS = 8


@dataclass(frozen=True)
class Verification:
    """How many rows were checked, how many of those are wrong, and on what device."""

    checked_rows: int
    wrong_rows: int
    device: str
    seconds: float


class Verifier:
    """Judges rows of one workload's answer on the best device there is."""

    def __init__(self, workload: Workload, top_k: int, device: str = "auto") -> None:
        cuda = device != "cpu" and torch.cuda.is_available()
        self._device = torch.device(device if device.startswith("cuda") else "cuda" if cuda else "cpu")
        self._workload = workload
        self._top_k = top_k
        scales = None if workload.scales is None else workload.scales.to(self._device)
        self._keys = PagedKeys.from_contiguous(workload.k.to(self._device), scales)

    def check(
        self, rows: Tensor, indices: Tensor, told: Callable[[int], None], time_limit_s: float = TIME_LIMIT_S
    ) -> Verification:
        """Check `indices` [len(rows), top_k], the answers to these rows; `told` hears the share done in percent.

        All of them if a trial of a few predicts that it takes no longer than `time_limit_s`, else an evenly spread
        sample of as many as fit.
        """
        start = time.monotonic()
        chosen = self._choose(rows, indices, time_limit_s)
        wrong = 0
        for first in range(0, len(chosen), _CHUNK_ROWS):
            part = chosen[first : first + _CHUNK_ROWS]
            wrong += self._wrong_rows(rows[part], indices[part])
            told(100 * (first + len(part)) // len(chosen))
        return Verification(len(chosen), wrong, str(self._device), time.monotonic() - start)

    def wrong(self, rows: Tensor, indices: Tensor) -> Tensor:
        """Which of these rows' answers are wrong: [len(rows)] bool on the CPU. Checks all, however long it takes."""
        parts = range(0, len(rows), _CHUNK_ROWS)
        found = [self._report(rows[a : a + _CHUNK_ROWS], indices[a : a + _CHUNK_ROWS]).verdicts for a in parts]
        return torch.cat(found) != Verdict.RIGHT

    def _choose(self, rows: Tensor, indices: Tensor, time_limit_s: float) -> Tensor:
        everything = torch.arange(len(rows))
        if len(rows) <= _CHUNK_ROWS:
            return everything
        trial = _spread(len(rows), _TRIAL_ROWS)
        self._wrong_rows(rows[trial[:1]], indices[trial[:1]])  # warms up
        start = time.monotonic()
        self._wrong_rows(rows[trial], indices[trial])
        seconds_per_product = (time.monotonic() - start) / self._products(rows[trial]).sum().item()
        predicted_s = seconds_per_product * self._products(rows).sum().item()
        if predicted_s <= time_limit_s:
            return everything
        return _spread(len(rows), max(_TRIAL_ROWS, int(len(rows) * time_limit_s / predicted_s)))

    def _products(self, rows: Tensor) -> Tensor:
        """Keys that each row sees, at least one: the work of checking it, up to a factor."""
        visible = (self._workload.positions[rows] + 1) // self._workload.ratio
        return visible.clamp(1, max(1, self._keys.length))

    def _wrong_rows(self, rows: Tensor, indices: Tensor) -> int:
        return self._report(rows, indices).wrong_rows

    def _report(self, rows: Tensor, indices: Tensor) -> CheckReport:
        q, w, positions = self._workload.select(rows)
        return check_topk(
            indices.to(self._device),
            q.to(self._device),
            w.to(self._device),
            self._keys,
            positions,
            ratio=self._workload.ratio,
            top_k=self._top_k,
        )


def _spread(count: int, chosen: int) -> Tensor:
    """`chosen` of the numbers below `count`, evenly spread, first and last among them."""
    chosen = min(count, chosen)
    return torch.arange(chosen) * (count - 1) // max(1, chosen - 1)
