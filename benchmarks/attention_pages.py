"""Attention over rows in scattered pages: read where they lie, against copied behind each other first.

    python -m benchmarks.attention_pages --out benchmarks/results/attention_pages.json

A step of decode is one token of each of 32 sequences; a tile of prefill the last 1,024 tokens of one sequence. Rows lie
in pages of 256 that are shuffled. Four ways: `tensor`, the kernel alone over rows of one tensor, as if there were no
pages; `pages`, the places of all rows and the kernel that reads them there, as the service does; `copied`, the rows
copied out of their pages and the kernel over the copies. `seconds` are those of a step within a graph of several, each
with rows of its own, so that they come from memory; what tells the device of the pages is there already. `called` are
those of a step that is called by itself, pages told anew, as the service does. Index rows are split over programs as in
the service whose tiles have as many rows; `unsplit` is `pages` with each in one. `ratio` is to `copied`; every output
is that of `tensor` bit for bit, which is judged, as is that of `unsplit`.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.attention import (
    MODELS,
    Attention,
    AttentionBench,
    AttentionModel,
    AttentionRow,
    begin,
    formats_of,
    judge_attention,
    make_attention,
    options,
)
from benchmarks.attention_decode import CONTEXT, CPU_CONTEXT, V4_HCA, in_one_go, make_decode
from benchmarks.timing import measure
from streamindex_service.core.attention_estimates import parts_of
from streamindex_service.core.sizes import KvFormat as KvFormatOfCore
from streamindex_service.core.specs import KvSpec
from streamindex_service.ops import KvFormat, KvRows
from streamindex_service.ops.cached_attention import ATTENTION_TERMS, CachedSequence, attend_cached
from streamindex_service.ops.cached_attention.copies import Copies, lay_out
from streamindex_service.ops.cached_attention.places import Places
from streamindex_service.ops.extent_pages import ExtentPages
from streamindex_service.ops.paged_keys import PAGE_KEYS
from streamindex_service.ops.paged_kv_rows import PagedKvRows, PlacedKvRows
from streamindex_service.ops.sparse_attention import plan_for, sparse_attention

TABLE = "attention_pages"
SEQUENCES, TILE_TOKENS, PREFILL_CONTEXT = 32, 1024, 65_536
CPU_SEQUENCES, CPU_TILE_TOKENS = 2, 8
WORKSPACE_BYTES = ATTENTION_TERMS["triton"].least_bytes - ATTENTION_TERMS["triton"].fixed_bytes
HEADS = (16, None)  # of packed rows; None: all of the model's
_CALLS = 8
WAYS = ("tensor", "copied", "pages", "unsplit")


@dataclass(frozen=True)
class PagedRow(AttentionRow):
    """A measured step. heads: of a query; shape: decode or prefill; call_s: seconds of a step that is called by
    itself."""

    shape: str = ""
    heads: int = 0
    call_s: float | None = None


@dataclass(frozen=True)
class Step:
    """Queries, and the same rows as one tensor, in pages, and ready to be copied."""

    whole: Attention
    sequences: list[CachedSequence]
    positions: Tensor
    own: Tensor  # indices [tokens, top_k] of each sequence's own compressed rows
    places: Places
    copies: Copies
    parts: int  # of an index row, as the service splits it

    def attend(self, kv: KvRows | PlacedKvRows, entries: Tensor, out: Tensor, parts: int | None = None) -> None:
        """parts: of an index row; None: as many as in the service."""
        w, device = self.whole, self.own.device
        plan = plan_for(
            "triton", device, kv.format, tokens=w.tokens, heads=w.model.heads, key_dim=w.model.key_dim,
            value_dim=w.model.value_dim, width=entries.shape[1], workspace_bytes=WORKSPACE_BYTES,
            parts=self.parts if parts is None else parts,
        )  # fmt: skip
        sparse_attention(
            w.q, kv, entries, scale=w.scale, sink=w.sink, value_dim=w.model.value_dim, implementation="triton",
            out=out, plan=plan,
        )  # fmt: skip

    def run(self, way: str, out: Tensor) -> None:
        """What the device does for it."""
        if way == "tensor":
            self.attend(self.whole.kv, self.whole.indices, out)
        elif way in ("pages", "unsplit"):
            entries = self.places.entries(self.own, self.own.shape[1])
            self.attend(self.places.rows, entries, out, 1 if way == "unsplit" else None)
        else:
            # imported here: Triton need not be installed where it is not asked for
            from benchmarks.variants.attention_copied import copied

            window = self.whole.model.window
            self.attend(*copied(self.copies, self.own, self.places.positions, window, self.places.table), out)

    def call(self, out: Tensor) -> None:
        """As the service does."""
        w = self.whole
        attend_cached(
            w.q, self.own, self.positions, self.sequences, window=w.model.window, scale=w.scale, sink=w.sink,
            value_dim=w.model.value_dim, implementation="triton",
            workspace_bytes=ATTENTION_TERMS["triton"].least_bytes, parts=self.parts, out=out,
        )  # fmt: skip


def shuffled(kv: KvRows, bounds: list[tuple[int, int]], seed: int = 0) -> list[PagedKvRows]:
    """Pieces of `kv`, rows [first, stop) of it each, in pages of one allocation that lie in any order."""
    rows = kv.data.view(torch.uint8).view(kv.rows, -1)
    size = PAGE_KEYS * kv.row_bytes
    counts = [-(-(stop - first) // PAGE_KEYS) for first, stop in bounds]
    order = np.random.default_rng(seed).permutation(sum(counts))
    extent = torch.empty((sum(counts), size), dtype=torch.uint8, device=kv.device)
    pieces, used = list[PagedKvRows](), 0
    for (first, stop), count in zip(bounds, counts, strict=True):
        slots = order[used : used + count]
        used += count
        for number, slot in enumerate(slots.tolist()):
            part = slice(first + PAGE_KEYS * number, min(first + PAGE_KEYS * (number + 1), stop))
            held = rows[part].flatten()
            extent[slot, : held.numel()] = held
            if kv.scales is not None:
                beside = kv.scales[part].flatten()
                extent[slot, PAGE_KEYS * rows.shape[1] :][: beside.numel()] = beside
        starts, which = slots.astype(np.int64) * size, np.zeros(count, dtype=np.int64)
        pages = ExtentPages([extent.flatten()], which, starts, (size,), torch.uint8)
        pieces.append(PagedKvRows(kv.format, kv.key_dim, stop - first, pages))
    return pieces


def row_parts(model: AttentionModel, rows: int) -> int:
    """As the service splits index rows whose tiles have so many rows."""
    kv = KvSpec(KvFormatOfCore.BF16, model.key_dim, model.value_dim, model.heads)  # whatever the format
    return parts_of(kv, model.width, rows)


def cut(whole: Attention, parts: list[Tensor], caches: list[int], local: int, rows_each: int) -> list[Step]:
    """Steps over caches of `rows_each` rows, window rows first. parts: tokens [n] of each step; caches: of each of its
    sequences in turn, as many tokens each."""
    bounds = [
        bound
        for first in range(0, whole.kv.rows, rows_each)
        for bound in ((first, first + local), (first + local, first + rows_each))
    ]
    pieces = shuffled(whole.kv, bounds)
    window, device = whole.model.window, whole.kv.device
    steps = []
    for number, tokens in enumerate(parts):
        of_step = caches[number * len(caches) // len(parts) : (number + 1) * len(caches) // len(parts)]
        each = len(tokens) // len(of_step)
        sequences = [CachedSequence(each, pieces[2 * cache + 1], pieces[2 * cache]) for cache in of_step]
        part = slice(int(tokens[0]), int(tokens[-1]) + 1)
        step = Attention(whole.model, whole.q[part], whole.kv, whole.indices[part], whole.sink)
        base = torch.tensor(of_step, device=device).repeat_interleave(each)[:, None] * rows_each
        named = step.indices[:, window:]
        own = torch.where(named >= 0, named - base - local, -1).to(torch.int32)
        newest = (step.indices[:, window - 1] - base[:, 0]) if window else torch.zeros(len(tokens), device=device)
        positions = newest.to(torch.int64).cpu()
        steps.append(
            Step(
                step, sequences, positions, own, Places.of(sequences, positions, window, device),
                lay_out(sequences, positions, own.shape[1], window, device),
                row_parts(whole.model, len(tokens)),
            )
        )  # fmt: skip
    return steps


def decode_steps(model: AttentionModel, kv_format: KvFormat, device: str) -> tuple[Attention, list[Step]]:
    """Steps of one token of each sequence, and all of them as one."""
    on_cpu = device == "cpu"
    context = CPU_CONTEXT if on_cpu else model.top_k * model.ratio if model.all_visible else CONTEXT
    made = make_decode(model, CPU_SEQUENCES if on_cpu else SEQUENCES, 1, context, kv_format, device)
    local = min(context, CONTEXT) if model.window else 0
    rows_each = local + context // model.ratio
    caches = list(range(made.whole.kv.rows // rows_each))
    caches *= made.steps * made.sequences // len(caches)
    return made.whole, cut(
        made.whole, list(torch.arange(made.whole.tokens).split(made.tokens)), caches, local, rows_each
    )


def prefill_steps(model: AttentionModel, kv_format: KvFormat, device: str) -> tuple[Attention, list[Step]]:
    """One step, the last tokens of a sequence."""
    on_cpu = device == "cpu"
    context = CPU_CONTEXT if on_cpu else PREFILL_CONTEXT
    whole = make_attention(model, CPU_TILE_TOKENS if on_cpu else TILE_TOKENS, context, kv_format, device)
    local = context if model.window else 0
    return whole, cut(whole, [torch.arange(whole.tokens)], [0], local, whole.kv.rows)


def run_case(bench: AttentionBench, shape: str, whole: Attention, steps: list[Step]) -> None:
    """Every way, one after the other, and each once more in the opposite order."""
    model, device = whole.model, bench.device
    shape_of_out = (whole.tokens, model.heads, model.value_dim)
    expected, expected_unsplit = (torch.empty(shape_of_out, dtype=torch.bfloat16, device=device) for _ in range(2))
    tokens = whole.tokens // len(steps)

    def every(way: str, out: Tensor) -> Callable[[], None]:
        def run() -> None:
            for step, part in zip(steps, out.split(tokens), strict=True):
                step.run(way, part)

        return run

    every("tensor", expected)()
    every("unsplit", expected_unsplit)()
    right = {way: expected_unsplit if way == "unsplit" else expected for way in WAYS}
    judged = {way: judge_attention(whole, right[way]) for way in ("tensor", "unsplit")}
    seconds = dict.fromkeys(WAYS, 0.0)
    peaks = {}
    other = dict.fromkeys(WAYS, 0)
    for ways in (WAYS, WAYS[::-1]):
        for way in ways:
            out = torch.full_like(expected, torch.nan)
            peaks[way] = measure(partial(steps[0].run, way, out[:tokens]), device, budget_s=0.0).peak_bytes
            timing = measure(
                in_one_go(every(way, out), device), device, budget_s=bench.budget_s / 4, max_repeats=bench.max_repeats,
                when_warm=bench.measure_roof,
            )  # fmt: skip
            seconds[way] += timing.seconds / len(steps) / 2
            other[way] = max(other[way], int((out != right[way]).any(dim=2).any(dim=1).sum()))
    out = torch.full_like(expected, torch.nan)
    calls = min(_CALLS, len(steps))

    def call() -> None:
        for step, part in zip(steps[:calls], out.split(tokens), strict=False):
            step.call(part)

    call_s = measure(call, device, budget_s=bench.budget_s / 4).seconds / calls
    called = slice(0, calls * tokens)
    other["pages"] = max(other["pages"], int((out[called] != expected[called]).any(dim=2).any(dim=1).sum()))
    for way in WAYS:
        checked, wrong_rows, largest_error = judged["unsplit" if way == "unsplit" else "tensor"]
        tflops = model.entry_flop * whole.entries() / len(steps) / seconds[way] / 1e12
        bench.report.add(
            PagedRow(
                table=TABLE,
                case=f"{shape} {model.name} {model.heads} heads {tokens} tokens W={model.width} {way}",
                dtype=whole.kv.format.value,
                seconds=seconds[way],
                useful_tflops=tflops,
                roof_fraction=tflops / statistics.median(bench.roofs),
                ratio=seconds["copied"] / seconds[way],
                ratio_to="copied",
                peak_bytes=peaks[way],
                wrong_rows=wrong_rows + other[way],
                note=f"called {call_s * 1e6:.0f} µs" if way == "pages" else "",
                model=model.name,
                tokens=tokens,
                implementation=way,
                checked_rows=checked,
                largest_error=largest_error,
                shape=shape,
                heads=model.heads,
                call_s=call_s if way == "pages" else None,
            )
        )


def main(argv: list[str] | None = None) -> int:
    models = {**MODELS, V4_HCA.name: V4_HCA}
    parser = options(__doc__, quick="one model", models=list(models), implementations=(), sizes="")
    arguments = parser.parse_args(argv)
    bench = begin(TABLE, arguments)
    for name in arguments.models[:1] if arguments.quick else arguments.models:
        model = models[name]
        for heads in HEADS:
            for kv_format in formats_of(arguments, model):
                if heads is not None and kv_format is KvFormat.BF16:
                    continue
                case = replace(model, heads=heads or model.heads)
                run_case(bench, "decode", *decode_steps(case, kv_format, bench.device))
                if not model.all_visible:
                    run_case(bench, "prefill", *prefill_steps(case, kv_format, bench.device))
    return bench.report.finish()


if __name__ == "__main__":
    sys.exit(main())
