"""The pipeline's story: upload keys and KV rows, find indices and attend, check every output row."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import streamindex_client
import torch
from rich.console import Console
from streamindex_client import KeyCache, KvSpec
from torch import Tensor

from streamindex_service.demo.interrupt import interrupt_closes
from streamindex_service.demo.options import DemoError, DemoOptions
from streamindex_service.demo.progress import progress
from streamindex_service.demo.start import check_choices, show_rows, with_service
from streamindex_service.demo.verify import Verifier
from streamindex_service.demo.workload import Workload, load_workload
from streamindex_service.ops.kv_rows import KvFormat, KvRows, pack_rows
from streamindex_service.ops.sparse_attention import check_sparse_attention

_VALUE_DIM = 512
# Answers kept for the check; beyond it, every n-th row's is.
_KEPT_ANSWER_BYTES = 1 << 30
_CHECKED_TOGETHER = 64  # rows
_DISTINCT_QUERY_BYTES = 64 << 20  # of attention queries; beyond, they repeat, at other positions


@dataclass(frozen=True)
class PipelineFigures:
    """What the demo measured; the JSON object's fields.

    `rows_per_s` is from the first byte sent to the last answer received. A row is wrong when one of its indices or its
    output is. `largest_error`: of an output, as a share of what rounding may do. `peak_device_bytes`: of the device's
    allocator, on a CPU of the device ledger.
    """

    device: str
    implementation: str
    attention_implementation: str
    keys: int
    tokens: int
    queries: int
    top_k: int
    window: int
    wrong_rows: int
    checked_rows: int
    largest_error: float
    upload_bytes_per_s: float
    rows_per_s: float
    peak_device_bytes: int
    budget_bytes: int


@dataclass(frozen=True)
class _Data:
    """`index` has the keys and the indexer's queries. kv: a row for each key; window: one for each token; q: [distinct,
    attention heads, key_dim] bf16, of which row i of the call has row i modulo `distinct`; sink: [attention heads]."""

    index: Workload
    kv: KvRows
    window: KvRows
    q: Tensor
    sink: Tensor
    window_tokens: int

    @property
    def scale(self) -> float:
        """Of the logits."""
        return float(self.q.shape[2] ** -0.5)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The whole call as (q, index_q, index_w, positions)."""
        start = 0
        for index_q, index_w, positions in self.index.blocks():
            rows = torch.arange(start, start + len(positions)) % len(self.q)
            yield self.q[rows], index_q, index_w, positions
            start += len(positions)


def run_pipeline(options: DemoOptions) -> int:
    """Run it and print its findings; gives the number of wrong rows. Raises DemoError."""
    check_choices(options)
    console = Console(soft_wrap=True)
    console.print(f"Data: random numbers, seed {options.seed}", highlight=False)
    data = _make(options)
    figures = with_service(console, options, lambda address: _measure(console, address, options, data))
    _show(console, figures)
    if options.as_json:
        console.print(json.dumps(asdict(figures)), markup=False, highlight=False)
    return figures.wrong_rows


def _make(options: DemoOptions) -> _Data:
    index = load_workload(options)
    tokens = options.key_count * options.tokens_per_key
    if options.query_count > tokens:
        raise DemoError(
            f"{options.query_count} queries stand at the last of {tokens} tokens; ask for fewer, or more keys"
        )
    positions = torch.arange(tokens - options.query_count, tokens)
    index = Workload(index.k, index.scales, index.q, index.w, positions, index.ratio, index.key_format)
    kv_format = KvFormat(options.kv_format)
    packing = kv_format.packed
    key_dim = _VALUE_DIM if packing is None else packing.key_dim
    generator = torch.Generator().manual_seed(options.seed + 1)

    def rows(count: int) -> Tensor:
        return torch.randn((count, key_dim), generator=generator)

    row_bytes = 2 * options.attention_heads * key_dim
    distinct = min(options.query_count, max(1, _DISTINCT_QUERY_BYTES // row_bytes))
    q = torch.randn((distinct, options.attention_heads, key_dim), generator=generator)
    return _Data(
        index,
        pack_rows(rows(options.key_count), kv_format),
        pack_rows(rows(tokens), kv_format),
        q.to(torch.bfloat16),
        torch.randn(options.attention_heads, generator=generator),
        options.window,
    )


def _measure(console: Console, address: str, options: DemoOptions, data: _Data) -> PipelineFigures:
    """Upload, run the pipeline and check."""
    with streamindex_client.connect(address) as client, interrupt_closes(client.close):
        capabilities = client.capabilities()
        names = f"{capabilities.implementation}, attention {capabilities.attention_implementation}"
        console.print(f"Ready: {capabilities.device}, implementation {names}", highlight=False)
        cache = client.create_key_cache(
            heads=data.index.q.shape[1],
            head_dim=data.index.k.shape[1],
            ratio=data.index.ratio,
            key_format=options.key_format,
            layers=1,
            kv=KvSpec(options.kv_format, data.q.shape[2], _VALUE_DIM, options.attention_heads),
        )
        upload_bytes_per_s = _upload(console, cache, data)
        rows, out, run_s = _run(console, cache, data, options.top_k)
        indices = _indices(console, cache, data, options.top_k)[rows]
        load = client.load()
    wrong_indices = Verifier(data.index, options.top_k, options.device).wrong(rows, indices)
    wrong, largest = _check(console, data, rows, indices, out)
    hbm = load.ledgers["hbm"]
    return PipelineFigures(
        device=capabilities.device,
        implementation=capabilities.implementation,
        attention_implementation=capabilities.attention_implementation,
        keys=len(data.index.k),
        tokens=data.window.rows,
        queries=data.index.rows,
        top_k=options.top_k,
        window=data.window_tokens,
        wrong_rows=int((wrong | wrong_indices).sum()),
        checked_rows=len(rows),
        largest_error=round(largest, 3),
        upload_bytes_per_s=round(upload_bytes_per_s, 1),
        rows_per_s=round(data.index.rows / run_s, 1),
        peak_device_bytes=load.device_peak_bytes or hbm.peak_bytes,
        budget_bytes=hbm.limit_bytes,
    )


def _upload(console: Console, cache: KeyCache, data: _Data) -> float:
    """Keys, KV rows and window rows, one after another; bytes a second."""
    index = data.index
    start = time.monotonic()
    with progress(console, "Uploading keys", len(index.k)) as told:
        cache.append(layer=0, keys=index.k, scales=index.scales, first_row=0, progress=lambda done, _: told(done))
    with progress(console, "Uploading KV rows", data.kv.rows) as told:
        cache.append(
            layer=0, kv_rows=data.kv.data, scales=data.kv.scales, first_row=0, progress=lambda done, _: told(done)
        )
    with progress(console, "Uploading window rows", data.window.rows) as told:
        cache.append(
            layer=0,
            window_rows=data.window.data,
            scales=data.window.scales,
            first_row=0,
            progress=lambda done, _: told(done),
        )
    kv_bytes = data.kv.rows * data.kv.row_bytes + data.window.rows * data.window.row_bytes
    return (index.key_bytes + kv_bytes) / (time.monotonic() - start)


def _run(console: Console, cache: KeyCache, data: _Data, top_k: int) -> tuple[Tensor, Tensor, float]:
    """Attend with all rows; the rows whose outputs were kept, those outputs, and the seconds it took."""
    heads = data.q.shape[1]
    stride = math.ceil(data.index.rows * heads * _VALUE_DIM * 2 / _KEPT_ANSWER_BYTES)
    rows = torch.arange(0, data.index.rows, stride)
    kept = torch.full((len(rows), heads, _VALUE_DIM), torch.nan, dtype=torch.bfloat16)  # a row left out is wrong
    with progress(console, "Index and attention", data.index.rows) as told:
        start = time.monotonic()
        for part in cache.sparse_attend(
            layer=0,
            q=data.chunks(),
            top_k=top_k,
            window=data.window_tokens,
            scale=data.scale,
            sink=data.sink,
            progress=lambda done, _total: told(done),
        ):
            lead = -part.row_offset % stride
            if lead < part.rows:
                begin = (part.row_offset + lead) // stride
                chosen = part.out[lead::stride]
                kept[begin : begin + len(chosen)] = chosen
        return rows, kept, time.monotonic() - start


def _indices(console: Console, cache: KeyCache, data: _Data, top_k: int) -> Tensor:
    """What a search finds for the same rows, which is what the attention has read."""
    found = []
    with progress(console, "Searching for the same indices", data.index.rows) as told:
        for part in cache.search(layer=0, q=data.index.blocks(), top_k=top_k, order="index"):
            found.append(part.indices)
            told(part.row_offset + part.rows)
    return torch.cat(found)


def _check(console: Console, data: _Data, rows: Tensor, indices: Tensor, out: Tensor) -> tuple[Tensor, float]:
    """Rows whose output is wrong by the float64 reference, and the largest error as a share of its bound."""
    keys, tokens = data.kv.rows, data.window.rows
    scales = None
    if data.kv.scales is not None and data.window.scales is not None:
        scales = torch.cat([data.kv.scales, data.window.scales])
    both = KvRows(data.kv.format, torch.cat([data.kv.data, data.window.data]), scales)
    recent = data.index.positions[rows][:, None] - data.window_tokens + 1 + torch.arange(data.window_tokens)
    recent = torch.where((recent >= 0) & (recent < tokens), recent + keys, -1).to(torch.int32)
    entries = torch.cat([recent, indices], dim=1).contiguous()
    wrong, largest = torch.zeros(len(rows), dtype=torch.bool), 0.0
    with progress(console, "Checking against the reference", len(rows)) as told:
        for start in range(0, len(rows), _CHECKED_TOGETHER):
            part = slice(start, start + _CHECKED_TOGETHER)
            report = check_sparse_attention(
                out[part], None, data.q[rows[part] % len(data.q)], both, entries[part], scale=data.scale, sink=data.sink
            )
            wrong[part] = report.wrong
            largest = max(largest, report.largest_error)
            told(min(part.stop, len(rows)))
    return wrong, largest


def _show(console: Console, figures: PipelineFigures) -> None:
    mib = 1 << 20
    rows = {
        "device": f"{figures.device}, implementation {figures.implementation}, attention "
        f"{figures.attention_implementation}",
        "rows held": f"{figures.keys:,} keys and KV rows, {figures.tokens:,} window rows, uploaded at "
        f"{figures.upload_bytes_per_s / mib:,.1f} MiB/s",
        "queries": f"{figures.queries:,} answered at {figures.rows_per_s:,.1f} rows/s, top_k {figures.top_k}, window "
        f"{figures.window}",
        "rows checked": f"{figures.checked_rows:,} of {figures.queries:,}, largest error {figures.largest_error:.3f} "
        "of its bound",
        "wrong rows": str(figures.wrong_rows),
        "device memory": f"{figures.peak_device_bytes / mib:,.1f} MiB at most, budget "
        f"{figures.budget_bytes / mib:,.0f} MiB",
    }
    show_rows(console, rows)
