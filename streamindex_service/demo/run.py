"""The demo's story: start, upload, search, check, show."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import streamindex_client
import torch
from rich.console import Console
from rich.panel import Panel
from torch import Tensor

from streamindex_service.demo.interrupt import interrupt_closes
from streamindex_service.demo.options import DemoOptions
from streamindex_service.demo.passages import best_passages, excerpt
from streamindex_service.demo.pipeline import run_pipeline
from streamindex_service.demo.progress import progress
from streamindex_service.demo.start import check_choices, show_rows, with_service
from streamindex_service.demo.verify import Verification, Verifier
from streamindex_service.demo.workload import Workload, load_workload

if TYPE_CHECKING:
    from streamindex_client import KeyCache

# Answers kept for the check; beyond it, every n-th row's is.
_KEPT_ANSWER_BYTES = 1 << 30
_SHOWN_QUERIES = (0.55, 0.95)  # of the query rows, as shares


@dataclass(frozen=True)
class Figures:
    """What the demo measured; the JSON object's fields.

    `search_rows_per_s` is from the first byte sent to the last answer received. `peak_device_bytes`: of the device's
    allocator, on a CPU of the device ledger.
    """

    device: str
    implementation: str
    keys: int
    queries: int
    top_k: int
    wrong_rows: int
    checked_rows: int
    upload_bytes_per_s: float
    search_rows_per_s: float
    peak_device_bytes: int
    budget_bytes: int


def run(options: DemoOptions) -> int:
    """Run the demo and print its findings; gives the number of wrong rows. Raises DemoError."""
    if options.pipeline:
        return run_pipeline(options)
    check_choices(options)
    console = Console(soft_wrap=True)
    workload = load_workload(options)
    source = workload.text.source if workload.text else f"random numbers, seed {options.seed}"
    console.print(f"Data: {source}", highlight=False)
    figures, verification, indices = with_service(
        console, options, lambda address: _measure(console, address, options, workload)
    )
    if workload.text is not None:
        _show_passages(console, workload, indices)
    _show_figures(console, figures, verification, repeats=workload.repeats)
    if options.as_json:
        console.print(json.dumps(asdict(figures)), markup=False, highlight=False)
    return figures.wrong_rows


def _measure(
    console: Console, address: str, options: DemoOptions, workload: Workload
) -> tuple[Figures, Verification, Tensor]:
    """Upload, search and check; the figures, how the check went, and the answers."""
    with streamindex_client.connect(address) as client, interrupt_closes(client.close):
        capabilities = client.capabilities()
        console.print(f"Ready: {capabilities.device}, implementation {capabilities.implementation}", highlight=False)
        cache = client.create_key_cache(
            heads=workload.q.shape[1],
            head_dim=workload.k.shape[1],
            ratio=workload.ratio,
            key_format=options.key_format,
            layers=1,
        )
        upload_s = _upload(console, cache, workload)
        rows, indices, search_s = _search(console, cache, workload, options.top_k)
        load = client.load()
    verification = _verify(console, workload, options, rows, indices)
    hbm = load.ledgers["hbm"]
    figures = Figures(
        device=capabilities.device,
        implementation=capabilities.implementation,
        keys=len(workload.k),
        queries=workload.rows,
        top_k=options.top_k,
        wrong_rows=verification.wrong_rows,
        checked_rows=verification.checked_rows,
        upload_bytes_per_s=round(workload.key_bytes / upload_s, 1),
        search_rows_per_s=round(workload.rows / search_s, 1),
        peak_device_bytes=load.device_peak_bytes or hbm.peak_bytes,
        budget_bytes=hbm.limit_bytes,
    )
    return figures, verification, indices


def _upload(console: Console, cache: KeyCache, workload: Workload) -> float:
    with progress(console, "Uploading keys", len(workload.k)) as told:
        start = time.monotonic()
        cache.append(
            layer=0, keys=workload.k, scales=workload.scales, first_row=0, progress=lambda done, _total: told(done)
        )
        return time.monotonic() - start


def _search(console: Console, cache: KeyCache, workload: Workload, top_k: int) -> tuple[Tensor, Tensor, float]:
    """Search all rows; the rows whose answers were kept, those answers, and the seconds it took."""
    stride = math.ceil(workload.rows * top_k * 4 / _KEPT_ANSWER_BYTES)
    rows = torch.arange(0, workload.rows, stride)
    kept = torch.full((len(rows), top_k), -2, dtype=torch.int32)  # -2 is never right: a row left out is found
    with progress(console, "Searching", workload.rows) as told:
        start = time.monotonic()
        for part in cache.search(layer=0, q=workload.blocks(), top_k=top_k):
            first, stop = part.row_offset, part.row_offset + part.rows
            lead = -first % stride
            if lead < part.rows:
                begin = (first + lead) // stride
                chosen = part.indices[lead::stride]
                kept[begin : begin + len(chosen)] = chosen
            told(stop)
        return rows, kept, time.monotonic() - start


def _verify(console: Console, workload: Workload, options: DemoOptions, rows: Tensor, indices: Tensor) -> Verification:
    verifier = Verifier(workload, options.top_k, options.device)
    with progress(console, "Checking against the reference", 100) as told:
        return verifier.check(rows, indices, told)


def _show_passages(console: Console, workload: Workload, indices: Tensor) -> None:
    assert workload.text is not None
    text, spans = workload.text.text, workload.text.spans
    for share in _SHOWN_QUERIES:
        row = int(share * (workload.rows - 1))
        position = int(workload.positions[row])
        start, stop = spans[position]
        lines = [f"Query {row}, at token {position}: {excerpt(text, start, stop, before=160, after=0)}"]
        for number, passage in enumerate(best_passages(indices[row].tolist(), text, spans), 1):
            where = f"tokens {passage.first_token}-{passage.last_token}"
            lines.append(f"{number}. {passage.text}\n   ({where}, {passage.keys} of the best keys)")
        body = "\n".join(lines)
        if console.is_terminal:
            console.print(Panel(body, title="What a query picked", highlight=False), markup=False, soft_wrap=False)
        else:
            console.print(body, markup=False, highlight=False)


def _show_figures(console: Console, figures: Figures, verification: Verification, *, repeats: bool) -> None:
    mib = 1 << 20
    checked = f"{figures.checked_rows:,} of {figures.queries:,}"
    if figures.checked_rows < figures.queries:
        checked += ", evenly spread: checking all would take too long"
    rows = {
        "device": f"{figures.device}, implementation {figures.implementation}",
        "keys": f"{figures.keys:,} uploaded at {figures.upload_bytes_per_s / mib:,.1f} MiB/s",
        "queries": f"{figures.queries:,} searched at {figures.search_rows_per_s:,.0f} rows/s, top_k {figures.top_k}"
        + (", repeating" if repeats else ""),
        "rows checked": f"{checked} (in {verification.seconds:.1f} s on {verification.device})",
        "wrong rows": str(figures.wrong_rows),
        "device memory": f"{figures.peak_device_bytes / mib:,.1f} MiB at most, budget "
        f"{figures.budget_bytes / mib:,.0f} MiB",
    }
    show_rows(console, rows)
