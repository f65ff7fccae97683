"""Where the time of the top-k operation goes, and what other kernels would make of it.

    python -m benchmarks.topk_variants --out benchmarks/results/topk_variants.json

Four tables, V4-Flash dimensions: `profile` (each kernel of the operation on the last chunk of a prefill, and the sum
against the whole), `scores` (score kernels on that chunk), `select` (selections on its scores) and `whole` (complete
prefills, some on two streams). Every variant is compared with the operation first: `error` is the largest difference
of scores relative to the largest score, or the number of rows that differ.

Variants run in child processes, which are started anew when one fails or takes too long; kernels are compiled before
by several processes side by side.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import V4_FLASH, header, make_prefill, measure, roof_tflops, wrong_rows
from streamindex_service.ops import KeyFormat, PagedKeys
from streamindex_service.ops.topk import Order, topk
from streamindex_service.ops.topk.plan import PAGE_KEYS, Shape, plan_triton
from streamindex_service.ops.topk.problem import Problem

MODEL = V4_FLASH
FLOP_PER_PAIR = 2 * MODEL.heads * MODEL.head_dim
WORKSPACE_BYTES = 256 << 20
VARIANT_TIMEOUT_S = 25
START_TIMEOUT_S = 60
COMPILERS = 8
MAX_SCORE_ERROR = 1e-5
MAX_CHUNK_ROWS = 8192
# rows of scores no longer than this are selected from registers
DIRECT_KEYS = (2048, 4096, 8192, 16384)
SEGMENTS, CAPACITY, LANES, SAMPLE = 4, 1024, 2048, 4096


@dataclass(frozen=True)
class Variant:
    """One measurement. `shape`: tokens of the prefill; `kind`: which builder; `options`: its arguments."""

    table: str
    dtype: str
    tokens: int
    kind: str
    options: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        parts = [self.table, self.dtype, str(self.tokens), self.kind, *map(str, self.options)]
        return " ".join(parts).replace("True", "yes").replace("False", "no")

    @property
    def format(self) -> KeyFormat:
        return KeyFormat(self.dtype)


# operation's own score kernel: keys, queries of a tile, warps, stages, queries of a group
TRITON_SCORES = [
    (256, 1, 8, 3, 128),
    (256, 1, 8, 3, 256),
    (256, 2, 8, 2, 128),
    (256, 2, 8, 3, 128),
    (256, 2, 16, 2, 128),
    (256, 2, 16, 3, 256),
    (128, 1, 4, 3, 128),
    (128, 2, 4, 2, 128),
]
# two accumulators: keys, warps, stages, queries of a group, keys in registers
PAIR_SCORES = [
    (256, 8, 3, 128, True),
    (256, 8, 3, 256, True),
    (256, 8, 3, 128, False),
    (128, 4, 3, 128, True),
]
# a warpgroup each: keys, warpgroups, queries of a tile, stages, queries of a group, keys in registers, registers
WARPGROUP_SCORES = [
    (256, 2, 2, 3, 128, False, 232),
    (256, 2, 2, 3, 256, False, 232),
    (256, 2, 2, 3, 512, False, 232),
    (256, 2, 1, 4, 256, True, 168),
    (256, 4, 2, 3, 256, False, 112),
    (256, 4, 2, 3, 256, True, 112),
    (512, 4, 1, 4, 256, False, 112),
]
# segments: block, warps, stages, blocks without survivors skipped
SEGMENT_SELECTS = [
    (4096, 4, 1, False),
    (2048, 4, 1, False),
    (1024, 1, 1, False),
    (1024, 1, 1, True),
    (512, 1, 3, False),
]
BEST_SEGMENT = (1024, 1, 1, False)


def variants() -> list[Variant]:
    """Every measurement, in order."""
    found: list[Variant] = []
    for dtype in ("fp8_e4m3", "bf16"):
        found.append(Variant("profile", dtype, 0, "roof"))
        found += [Variant("profile", dtype, tokens, "operation") for tokens in (32_768, 262_144, 1_048_576)]
        for tokens in (262_144,):
            found += [Variant("scores", dtype, tokens, "triton", o) for o in TRITON_SCORES]
            found += [Variant("scores", dtype, tokens, "pair", o) for o in PAIR_SCORES]
            found += [
                Variant("scores", dtype, tokens, "warpgroup", o)
                for o in WARPGROUP_SCORES
                # bfloat16 keys do not fit the registers of four warpgroups
                if not (dtype == "bf16" and o[1] == 4 and o[5])
            ]
        for tokens in (32_768,):
            found += [Variant("scores", dtype, tokens, "triton", TRITON_SCORES[0])]
            found += [Variant("scores", dtype, tokens, "pair", PAIR_SCORES[0])]
            found += [Variant("scores", dtype, tokens, "warpgroup", o) for o in WARPGROUP_SCORES[:2]]
    for tokens in (32_768, 65_536):
        found += [Variant("select", "fp8_e4m3", tokens, "present", (order,)) for order in ("index", "score")]
        for width_warps in ((8,), (16,)) if tokens > 32_768 else ((4,), (8,)):
            found += [Variant("select", "fp8_e4m3", tokens, "direct", (*width_warps, o)) for o in ("index", "score")]
    for tokens in (262_144, 1_048_576):
        found += [Variant("select", "fp8_e4m3", tokens, "present", (order,)) for order in ("index", "score")]
        found += [Variant("select", "fp8_e4m3", tokens, "present wide", o) for o in ((4096, 8), (8192, 8), (8192, 16))]
        found += [Variant("select", "fp8_e4m3", tokens, "segments", (*o, 4, "index")) for o in SEGMENT_SELECTS]
        found += [Variant("select", "fp8_e4m3", tokens, "segments", (*BEST_SEGMENT, w, "score")) for w in (4, 8)]
    for dtype in ("fp8_e4m3", "bf16"):
        for tokens in (32_768, 65_536, 262_144):
            found.append(Variant("whole", dtype, tokens, "operation"))
            found += [Variant("whole", dtype, tokens, "triton", o) for o in ((1, 256), (2, 256))]
            found += [Variant("whole", dtype, tokens, "best", o) for o in ((1, 256), (2, 256), (1, 64))]
    return found


class Launcher:
    """Launches kernels, or only compiles them."""

    def __init__(self, compile_only: bool) -> None:
        self.compile_only = compile_only

    def __call__(self, kernel, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
        if self.compile_only:
            kernel.warmup(*arguments, grid=grid, **options)
        else:
            kernel[grid](*arguments, **options)


@dataclass
class Chunk:
    """Rows row_start to row_start + rows of a prefill whose first token is `first_position`."""

    q: Tensor
    w: Tensor
    keys: PagedKeys
    first_position: int
    row_start: int
    rows: int

    @property
    def width(self) -> int:
        return min((self.first_position + self.row_start + self.rows) // MODEL.ratio, self.keys.length)

    def pairs(self) -> int:
        position = torch.arange(self.rows, dtype=torch.int64) + self.first_position + self.row_start
        return int(((position + 1) // MODEL.ratio).clamp(max=self.keys.length).sum())


def make_chunk(key_format: KeyFormat, tokens: int, device: str) -> tuple[Chunk, int]:
    """The last chunk of a prefill as the operation would cut it, and the row length of its scores."""
    keys = MODEL.keys(tokens)
    shape = Shape(tokens, MODEL.heads, MODEL.head_dim, keys, MODEL.top_k, key_format.value, key_format.element_bytes)
    plan = plan_triton(shape, WORKSPACE_BYTES)
    rows = plan.query_chunk
    part = make_prefill(MODEL, rows, key_format, device)
    generator = torch.Generator(device).manual_seed(1)
    k = torch.randn((keys, MODEL.head_dim), generator=generator, device=device).to(key_format.torch_dtype)
    scales = 0.5 + torch.rand(keys, generator=generator, device=device) if key_format.has_scales else None
    chunk = Chunk(part.q, part.w, PagedKeys.from_contiguous(k, scales), tokens - rows, 0, rows)
    return chunk, plan.key_tile


class ScoreKernel:
    """A score kernel with its options, bound to a prefill's inputs."""

    def __init__(
        self, launcher: Launcher, kind: str, options: tuple[Any, ...], q: Tensor, w: Tensor, keys: PagedKeys
    ) -> None:
        self.launcher, self.kind, self.options, self.q, self.w, self.keys = launcher, kind, options, q, w, keys
        if kind != "triton":
            from triton.experimental.gluon import language as gl
            from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

            queries = 2 if kind == "pair" else options[2]
            element = gl.float8e4nv if keys.format is KeyFormat.FP8_E4M3 else gl.bfloat16
            block = [queries * MODEL.heads, MODEL.head_dim]
            layout = gl.NVMMASharedLayout.get_default_for(block, element)
            self.descriptor = TensorDescriptor.from_tensor(q.view(-1, MODEL.head_dim), block, layout)

    def __call__(self, scores: Tensor, chunk: Chunk) -> None:
        from benchmarks import topk_variant_kernels as kernels
        from streamindex_service.ops.topk.triton import _INTERPRETED, _score_kernel

        table, scale_table = self.keys.key_table, self.keys.scale_table
        scaled = scale_table is not None
        scale_arguments = (scale_table.anchor, scale_table.offsets) if scale_table else (table.offsets, table.offsets)
        scalars = (
            chunk.row_start, chunk.rows, 0, self.keys.length, chunk.first_position, MODEL.ratio, scores.stride(0),
        )  # fmt: skip
        common = {"HEADS": MODEL.heads, "HEAD_DIM": MODEL.head_dim, "PAGE": PAGE_KEYS, "HAS_SCALES": scaled}
        arguments = (self.w, table.anchor, table.offsets, *scale_arguments)
        if self.kind == "triton":
            block, queries, warps, stages, group = self.options
            self.launcher(
                _score_kernel, (-(-chunk.width // block), -(-chunk.rows // group)),
                self.q, *arguments, table.offsets, scores, *scalars, **common,
                HEADS_PAD=MODEL.heads, DIM_PAD=MODEL.head_dim, BLOCK_KEYS=block, BLOCK_QUERIES=queries,
                QUERY_GROUP=group, EXPLICIT=False, STAGES=stages, WIDEN=_INTERPRETED, num_warps=warps,
                num_stages=stages,
            )  # fmt: skip
        elif self.kind == "pair":
            block, warps, stages, group, in_registers = self.options
            self.launcher(
                kernels.gluon_score_kernel, (-(-chunk.width // block), -(-chunk.rows // group)),
                self.descriptor, *arguments, scores, *scalars, **common,
                BLOCK_KEYS=block, QUERY_GROUP=group, STAGES=stages, IN_REGISTERS=in_registers, WARPS=warps,
                num_warps=warps,
            )  # fmt: skip
        else:
            block, workers, queries, stages, group, in_registers, registers = self.options
            self.launcher(
                kernels.gluon_ws_score_kernel, (-(-chunk.width // block), -(-chunk.rows // group)),
                self.descriptor, *arguments, scores, *scalars, **common,
                BLOCK_KEYS=block, QUERY_GROUP=group, STAGES=stages, IN_REGISTERS=in_registers, QUERIES=queries,
                WORKERS=workers, WORKER_REGISTERS=registers, num_warps=4,
            )  # fmt: skip


class Selection:
    """The candidate selection with its buffers for `rows` rows; `parts` names its kernels."""

    def __init__(
        self, launcher: Launcher, rows: int, device: str, segment: tuple[Any, ...], finish_warps: int,
        direct_warps: int | None, order: str,
    ) -> None:  # fmt: skip
        self.launcher, self.segment, self.finish_warps = launcher, segment, finish_warps
        self.direct_warps, self.sort = direct_warps, order == "score"
        self.thresholds = torch.empty(rows, dtype=torch.int32, device=device)
        self.survivor_scores = torch.empty((rows, SEGMENTS, CAPACITY), dtype=torch.float32, device=device)
        self.survivor_indices = torch.empty((rows, SEGMENTS, CAPACITY), dtype=torch.int32, device=device)
        self.counts = torch.empty((rows, SEGMENTS), dtype=torch.int32, device=device)
        self.misled = torch.zeros(rows, dtype=torch.int32, device=device)
        self.scratch = torch.empty((rows if self.sort else 1, MODEL.top_k), dtype=torch.int64, device=device)

    @staticmethod
    def bytes_per_row(order: str) -> int:
        return SEGMENTS * (CAPACITY * 8 + 4) + 8 + (8 * MODEL.top_k if order == "score" else 0)

    def parts(self, scores: Tensor, chunk: Chunk, out: Tensor) -> dict[str, Callable[[], None]]:
        """The kernels to launch one after the other; `out` [rows, top_k] int32 is the chunk's."""
        from benchmarks import topk_variant_kernels as kernels

        width, launcher = chunk.width, self.launcher
        tail = {"TOP_K_PAD": 1 << (MODEL.top_k - 1).bit_length(), "SORT": self.sort, "SCORES": False}
        seen = (chunk.row_start, chunk.keys.length, chunk.first_position, MODEL.ratio)
        if width <= DIRECT_KEYS[-1]:
            lanes = next(keys for keys in DIRECT_KEYS if width <= keys)
            warps = self.direct_warps or max(4, lanes // 1024)
            return {
                "direct": lambda: launcher(
                    kernels.direct_kernel, (chunk.rows,), scores, out, scores, self.scratch, *seen, scores.stride(0),
                    MODEL.top_k, WIDTH=lanes, num_warps=warps, **tail,
                )
            }  # fmt: skip
        every = max(16, -(-width // SAMPLE))
        block, warps, stages, skip = self.segment
        segment_keys = -(-width // SEGMENTS // block) * block
        return {
            "threshold": lambda: launcher(
                kernels.threshold_kernel, (chunk.rows,), scores, self.thresholds, *seen, scores.stride(0), MODEL.top_k,
                every, SAMPLE=SAMPLE, num_warps=4,
            ),
            "segments": lambda: launcher(
                kernels.segment_kernel, (SEGMENTS, chunk.rows), scores, self.thresholds, self.survivor_scores,
                self.survivor_indices, self.counts, *seen, scores.stride(0), segment_keys,
                SEGMENTS=SEGMENTS, CAPACITY=CAPACITY, BLOCK=block, STAGES=stages, SKIP=skip, num_warps=warps,
            ),
            "finish": lambda: launcher(
                kernels.finish_kernel, (chunk.rows,), self.survivor_scores, self.survivor_indices, self.counts,
                self.misled, out, scores, self.scratch, *seen, MODEL.top_k,
                SEGMENTS=SEGMENTS, CAPACITY=CAPACITY, LANES=LANES, num_warps=self.finish_warps, **tail,
            ),
        }  # fmt: skip

    def __call__(self, scores: Tensor, chunk: Chunk, out: Tensor) -> None:
        for launch in self.parts(scores, chunk, out).values():
            launch()


def repeated_seconds(work: Callable[[], object], device: str, budget_s: float = 0.4) -> float:
    """Seconds of one of several calls issued without a wait between them; the median of a few such series."""
    work()
    once = max(measure(work, device, budget_s=0.0).seconds, 1e-6)
    count = max(1, min(50, int(budget_s / 4 / once)))

    def several() -> None:
        for _ in range(count):
            work()

    return measure(several, device, budget_s=budget_s, max_repeats=5).seconds / count


class Bench:
    """Runs variants in this process, keeping the inputs of the last shape."""

    def __init__(self, device: str, compile_only: bool, best: dict[str, Any]) -> None:
        self.device, self.compile_only, self.best = device, compile_only, best
        self.launcher = Launcher(compile_only)
        self.key: tuple[Any, ...] | None = None
        self.held: tuple[Any, ...] = ()

    def run(self, variant: Variant) -> dict[str, object]:
        return getattr(self, f"_{variant.table}")(variant)

    def _hold(self, key: tuple[Any, ...], make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        if self.key != key:
            self.key, self.held = None, ()
            torch.cuda.empty_cache()
            self.key, self.held = key, make()
        return self.held

    def _chunk(self, variant: Variant) -> tuple[Chunk, Tensor, Tensor]:
        """The chunk, its scores by the operation's kernel, and a score buffer to write."""

        def make() -> tuple[Any, ...]:
            chunk, key_tile = make_chunk(variant.format, variant.tokens, self.device)
            scores = torch.zeros((chunk.rows, key_tile), dtype=torch.float32, device=self.device)
            ScoreKernel(Launcher(False), "triton", TRITON_SCORES[0], chunk.q, chunk.w, chunk.keys)(scores, chunk)
            return chunk, scores, torch.empty_like(scores)

        if self.compile_only:  # few rows will do
            keys = MODEL.keys(variant.tokens)
            small = self._hold(
                ("small", variant.dtype),
                lambda: make_chunk(variant.format, 4 * DIRECT_KEYS[-1] * MODEL.ratio, self.device),
            )[0]
            chunk = Chunk(small.q, small.w, small.keys, keys * MODEL.ratio - 8, 0, 8)
            empty = torch.empty((8, keys), dtype=torch.float32, device=self.device)
            return chunk, empty, empty
        return self._hold(("chunk", variant.dtype, variant.tokens), make)

    def _scores(self, variant: Variant) -> dict[str, object]:
        chunk, expected, scores = self._chunk(variant)
        kernel = ScoreKernel(self.launcher, variant.kind, variant.options, chunk.q, chunk.w, chunk.keys)
        if self.compile_only:
            kernel(scores, chunk)
            return {}
        scores.fill_(float("nan"))
        kernel(scores, chunk)
        error = 0.0
        rows = torch.arange(chunk.rows, device=self.device)
        visible = ((rows + chunk.first_position + 1) // MODEL.ratio).clamp(max=chunk.keys.length)
        largest = float(expected.abs().max())
        for start in range(0, chunk.rows, 64):
            seen = torch.arange(chunk.width, device=self.device)[None, :] < visible[start : start + 64, None]
            pair = scores[start : start + 64, : chunk.width], expected[start : start + 64, : chunk.width]
            difference = (pair[0] - pair[1]).abs().nan_to_num(nan=float("inf"))
            error = max(error, float(torch.where(seen, difference, 0.0).max()) / largest)
        again = scores.clone()
        kernel(again, chunk)
        repeatable = torch.equal(again.view(torch.int32), scores.view(torch.int32))
        seconds = repeated_seconds(lambda: kernel(scores, chunk), self.device)
        return {
            "seconds": seconds, "tflops": chunk.pairs() * FLOP_PER_PAIR / seconds / 1e12, "error": error,
            "note": "" if repeatable else "NOT REPEATABLE",
        }  # fmt: skip

    def _select(self, variant: Variant) -> dict[str, object]:
        chunk, scores, _ = self._chunk(variant)
        order = variant.options[-1] if variant.kind != "present wide" else "index"
        if variant.kind.startswith("present"):
            return self._select_present(variant, chunk, scores, order)
        if variant.kind == "direct":
            selection = Selection(self.launcher, chunk.rows, self.device, BEST_SEGMENT, 4, variant.options[0], order)
        else:
            selection = Selection(
                self.launcher, chunk.rows, self.device, variant.options[:4], variant.options[4], None, order
            )
        out = torch.empty((chunk.rows, MODEL.top_k), dtype=torch.int32, device=self.device)
        parts = selection.parts(scores, chunk, out)
        for launch in parts.values():
            launch()
        if self.compile_only:
            return {}
        expected = self._expected(variant, chunk, scores, order)
        counts = selection.counts.sum(1).float()
        wrong = int(((out != expected).any(1) & (selection.misled == 0)).sum())
        times = {name: repeated_seconds(launch, self.device, 0.2) for name, launch in parts.items()}
        seconds = repeated_seconds(lambda: selection(scores, chunk, out), self.device)
        note = f"misled {int(selection.misled.sum())}"
        if "segments" in parts:
            note += f", survivors {float(counts.mean()):.0f} to {float(counts.max()):.0f}"
        return {**self._select_row(chunk, seconds, wrong, times, note), "misled": int(selection.misled.sum())}

    def _select_row(
        self, chunk: Chunk, seconds: float, wrong: int, times: dict[str, float], note: str
    ) -> dict[str, object]:
        read = 4 * chunk.pairs() / seconds / 1e9
        return {"seconds": seconds, "error": wrong, "parts": times, "note": f"{read:.0f} GB/s of scores, {note}"}

    def _problem(self, chunk: Chunk, order: str, out: Tensor) -> Problem:
        return Problem(
            chunk.q, chunk.w, chunk.keys, chunk.first_position, MODEL.ratio, MODEL.top_k, Order(order), out, None
        )

    def _expected(self, variant: Variant, chunk: Chunk, scores: Tensor, order: str) -> Tensor:
        from streamindex_service.ops.topk.triton import run_triton

        out = torch.empty((chunk.rows, MODEL.top_k), dtype=torch.int32, device=self.device)
        run_triton(self._problem(chunk, order, out), self._plan(chunk))
        return out

    def _plan(self, chunk: Chunk):
        name, size = chunk.keys.format.value, chunk.keys.format.element_bytes
        shape = Shape(chunk.rows, MODEL.heads, MODEL.head_dim, chunk.width, MODEL.top_k, name, size)
        return plan_triton(shape, WORKSPACE_BYTES)

    def _present_parts(
        self, chunk: Chunk, scores: Tensor, order: str, out: Tensor, wide: tuple[int, int] | None
    ) -> dict[str, Callable[[], object]]:
        """The operation's selection kernel by kernel, as `_search_chunk` launches them."""
        from streamindex_service.ops.topk import triton as operation

        tiles = self._plan(chunk).tiles
        block, warps = wide or (tiles.select_block, tiles.select_warps)
        workspace = operation._Workspace(self._problem(chunk, order, out), self._plan(chunk))
        old, new = workspace.lists
        scalars = (
            chunk.row_start, 0, chunk.width, chunk.keys.length, chunk.first_position, MODEL.ratio, scores.stride(0),
            MODEL.top_k, MODEL.top_k, workspace.capacity,
        )  # fmt: skip
        positions = chunk.keys.key_table.offsets
        filtered = chunk.width >= max(tiles.filter_keys, 8 * MODEL.top_k)
        held: dict[str, Tensor] = {}
        parts: dict[str, Callable[[], object]] = {}
        if filtered:
            parts["filter"] = lambda: self.launcher(
                operation._filter_kernel, (chunk.rows,), scores, *old, *workspace.survivors, positions, *scalars,
                BLOCK=block, EVERY=tiles.sample_every, EXPLICIT=False, num_warps=warps,
            )  # fmt: skip
        parts["select"] = lambda: self.launcher(
            operation._select_kernel, (chunk.rows,), scores, *old, *workspace.survivors, *new, positions, *scalars,
            BLOCK=tiles.select_block, FILTERED=filtered, EXPLICIT=False, num_warps=tiles.select_warps,
        )  # fmt: skip

        def sort() -> None:
            held["order"] = torch.sort(new[0], dim=1, descending=True, stable=True)[1]

        if order == "score":
            parts["sort"] = sort
            parts["gather"] = lambda: held.__setitem__("indices", new[1].gather(1, held["order"]))
        parts["copy"] = lambda: out.copy_(held.get("indices", new[1]))
        return parts

    def _select_present(self, variant: Variant, chunk: Chunk, scores: Tensor, order: str) -> dict[str, object]:
        out = torch.empty((chunk.rows, MODEL.top_k), dtype=torch.int32, device=self.device)
        wide = variant.options if variant.kind == "present wide" else None
        parts = self._present_parts(chunk, scores, order, out, wide)
        if self.compile_only:
            for name in ("filter", "select"):
                parts.get(name, lambda: None)()
            return {}
        for launch in parts.values():
            launch()
        wrong = int((out != self._expected(variant, chunk, scores, order)).any(1).sum())
        times = {name: repeated_seconds(launch, self.device, 0.2) for name, launch in parts.items()}

        def together() -> None:
            for launch in parts.values():
                launch()

        return self._select_row(chunk, repeated_seconds(together, self.device), wrong, times, "")

    def _profile(self, variant: Variant) -> dict[str, object]:
        if variant.kind == "roof":
            if self.compile_only:
                return {}
            return {"seconds": 0.0, "tflops": roof_tflops(variant.format, self.device), "error": 0}
        chunk, expected, scores = self._chunk(variant)
        out = torch.empty((chunk.rows, MODEL.top_k), dtype=torch.int32, device=self.device)
        kernel = ScoreKernel(self.launcher, "triton", TRITON_SCORES[0], chunk.q, chunk.w, chunk.keys)
        selecting = self._present_parts(chunk, scores, "index", out, None)
        if self.compile_only:
            kernel(scores, chunk)
            for name in ("filter", "select"):
                selecting.get(name, lambda: None)()
            return {}
        from streamindex_service.ops.topk import triton as operation

        problem, plan = self._problem(chunk, "index", out), self._plan(chunk)
        scores.copy_(expected)
        parts: dict[str, Callable[[], object]] = {"scores": lambda: kernel(scores, chunk), **selecting}
        times = {name: repeated_seconds(launch, self.device) for name, launch in parts.items()}
        workspace = operation._Workspace(problem, plan)
        seconds = repeated_seconds(
            lambda: operation._search_chunk(problem, plan, workspace, 0, chunk.rows, chunk.width), self.device
        )
        begin = time.perf_counter()
        for _ in range(10):
            operation._search_chunk(problem, plan, workspace, 0, chunk.rows, chunk.width)
        host = (time.perf_counter() - begin) / 10
        torch.cuda.synchronize()
        sum_of_parts = sum(times.values())
        return {
            "seconds": seconds, "tflops": chunk.pairs() * FLOP_PER_PAIR / seconds / 1e12, "error": 0, "parts": times,
            "note": f"{chunk.rows} rows, whole - parts {1e6 * (seconds - sum_of_parts):.0f}, host {1e6 * host:.0f} us",
        }  # fmt: skip

    def _whole(self, variant: Variant) -> dict[str, object]:
        if self.compile_only:  # the other tables compile all but the short rows' kernels
            return {}
        (prefill,) = self._hold(
            ("whole", variant.dtype, variant.tokens),
            lambda: (make_prefill(MODEL, variant.tokens, variant.format, self.device),),
        )
        out = torch.empty((variant.tokens, MODEL.top_k), dtype=torch.int32, device=self.device)
        host = [0.0]
        if variant.kind == "operation":

            def work() -> None:
                begin = time.perf_counter()
                topk(
                    prefill.q, prefill.w, prefill.keys, 0, ratio=MODEL.ratio, top_k=MODEL.top_k, order=Order.INDEX,
                    implementation="triton", out_indices=out,
                )  # fmt: skip
                host[0] = time.perf_counter() - begin

            note = ""
        else:
            streams, mib = variant.options
            kind, options = "triton", TRITON_SCORES[0]
            if variant.kind == "best":
                kind, options = self.best[variant.dtype]
            segment = self.best.get("segment", BEST_SEGMENT)
            kernel = ScoreKernel(self.launcher, kind, options, prefill.q, prefill.w, prefill.keys)
            pipeline = Pipeline(self.launcher, kernel, segment, prefill.tokens, streams, mib << 20, self.device)

            def work() -> None:
                begin = time.perf_counter()
                pipeline.run(out)
                host[0] = time.perf_counter() - begin

            note = f"{kind} {options}, {segment}, {len(pipeline.chunks)} chunks, "
        work()  # compiles what only short rows need
        timing = measure(work, self.device, budget_s=1.2, max_repeats=5)
        misled = 0 if variant.kind == "operation" else pipeline.misled_rows()
        return {
            "seconds": timing.seconds, "tflops": MODEL.useful_flop(variant.tokens) / timing.seconds / 1e12,
            "error": wrong_rows(prefill, out, 32), "peak_bytes": timing.peak_bytes,
            "note": f"{note}host {1e3 * host[0]:.1f} ms, misled rows {misled}",
        }  # fmt: skip


class Pipeline:
    """A whole prefill by a score kernel and the candidate selection, in chunks that fill the workspace; with two
    streams, the scores of a chunk run beside the selection of the one before."""

    def __init__(
        self,
        launcher: Launcher,
        kernel: ScoreKernel,
        segment: tuple[Any, ...],
        tokens: int,
        streams: int,
        workspace_bytes: int,
        device: str,
    ) -> None:
        self.kernel, self.streams, self.device = kernel, streams, device
        budget = workspace_bytes // streams
        extra = Selection.bytes_per_row("index")
        self.chunks: list[Chunk] = []
        start = 0
        while start < tokens:
            rows = min(MAX_CHUNK_ROWS, tokens - start)
            while rows > 128 and rows * (4 * self._stride(start + rows) + extra) > budget:
                rows -= 128
            self.chunks.append(Chunk(kernel.q, kernel.w, kernel.keys, 0, start, rows))
            start += rows
        most = max(chunk.rows * self._stride(chunk.row_start + chunk.rows) for chunk in self.chunks)
        rows = max(chunk.rows for chunk in self.chunks)
        self.buffers = [torch.empty(most, dtype=torch.float32, device=device) for _ in range(streams)]
        self.selections = [Selection(launcher, rows, device, segment, 4, None, "index") for _ in range(streams)]
        self.side = torch.cuda.Stream() if streams == 2 else None

    @staticmethod
    def _stride(stop: int) -> int:
        return max(1, -(-(stop // MODEL.ratio) // PAGE_KEYS)) * PAGE_KEYS

    def _scores_of(self, number: int) -> Tensor:
        chunk = self.chunks[number]
        stride = self._stride(chunk.row_start + chunk.rows)
        return self.buffers[number % self.streams][: chunk.rows * stride].view(chunk.rows, stride)

    def run(self, out: Tensor) -> None:
        main = torch.cuda.current_stream() if self.side is not None else None
        free: list[torch.cuda.Event | None] = [None, None]
        if self.side is not None:
            self.side.wait_stream(main)
        for number, chunk in enumerate(self.chunks):
            place, scores = number % self.streams, self._scores_of(number)
            target = out[chunk.row_start : chunk.row_start + chunk.rows]
            if chunk.width == 0:
                target.fill_(-1)
                continue
            if self.side is None:
                self.kernel(scores, chunk)
                self.selections[0](scores, chunk, target)
                continue
            if free[place] is not None:
                main.wait_event(free[place])
            self.kernel(scores, chunk)
            self.side.wait_event(main.record_event())
            with torch.cuda.stream(self.side):
                self.selections[place](scores, chunk, target)
                free[place] = self.side.record_event()
        if self.side is not None:
            main.wait_stream(self.side)

    def misled_rows(self) -> int:
        """Rows of the last chunks whose sample misled."""
        return sum(int(selection.misled.sum()) for selection in self.selections)


def child(names: list[str], best: dict[str, Any], device: str, compile_only: bool) -> int:
    """Run the named variants, a line of JSON each on the standard output."""
    torch.set_grad_enabled(False)
    wanted = {variant.name: variant for variant in variants()}
    bench = Bench(device, compile_only, best)
    for name in names:
        print(json.dumps({"start": name}), flush=True)
        try:
            result = bench.run(wanted[name])
            if device != "cpu":
                torch.cuda.synchronize()
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            traceback.print_exc(file=sys.stderr)
            result = {"failure": f"{type(cause).__name__}: {str(cause)[:300]}"}
        print(json.dumps({"name": name, **result}), flush=True)
        if "failure" in result and not compile_only:
            return 1  # the device may be unusable for this process
    return 0


def _spawn(
    names: list[str], best: dict[str, Any], device: str, log: Path, compile_only: bool = False
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.topk_variants", "--child", "--device", device]
    command += ["--compile-only"] * compile_only
    with log.open("a") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ.copy()
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps([names, best]))
    process.stdin.close()
    process.stdin = None  # else communicate() would flush it
    return process


def compile_all(names: list[str], device: str, log: Path) -> None:
    """Fill Triton's cache from several processes; whatever fails here fails again, and is reported, when it is run."""
    names = [name for name in names if not name.startswith("whole")]
    processes = [_spawn(names[part::COMPILERS], {}, device, log, compile_only=True) for part in range(COMPILERS)]
    deadline = time.monotonic() + 120
    for process in processes:
        try:
            process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def run_all(
    names: list[str],
    best: dict[str, Any],
    device: str,
    log: Path,
    deadline: float,
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Run variants in a child, and in a new one after each that failed or hung."""
    left = list(names)
    while left and time.monotonic() < deadline:
        process = _spawn(left, best, device, log)
        lines: queue.Queue[str | None] = queue.Queue()

        def read(process: subprocess.Popen[str] = process, lines: queue.Queue[str | None] = lines) -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        wait, running = START_TIMEOUT_S, left[0]
        while left:
            try:
                line = lines.get(timeout=max(0.1, min(wait, deadline - time.monotonic())))
            except queue.Empty:
                done({"name": running, "failure": f"no answer in {wait} s"})
                left.remove(running)
                kind = running.split()[0:4:3]
                for other in [name for name in left if name.split()[0:4:3] == kind and kind[0] == "scores"]:
                    done({"name": other, "failure": "left out: one of its kind did not answer"})
                    left.remove(other)
                break
            if line is None:  # it ended without a word
                done({"name": running, "failure": f"the process ended, exit status {process.wait()}"})
                left.remove(running)
                break
            message = json.loads(line) if line.startswith("{") else {}
            wait = VARIANT_TIMEOUT_S
            if "start" in message:
                running = message["start"]
            elif "name" in message:
                done(message)
                left.remove(message["name"])
                if "failure" in message:
                    break
        process.kill()
        process.wait()
    for name in left:
        done({"name": name, "failure": "no time left"})


def find_best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest right score kernel of each dtype, and the fastest right segment options."""
    best: dict[str, Any] = {"fp8_e4m3": ["triton", TRITON_SCORES[0]], "bf16": ["triton", TRITON_SCORES[0]]}
    scores = [row for row in rows if row["table"] == "scores" and row["tokens"] == 262_144 and "tflops" in row]
    for row in sorted(scores, key=lambda row: row["tflops"]):
        if row["error"] < MAX_SCORE_ERROR and not row["note"]:
            best[row["dtype"]] = [row["kind"], row["options"]]
    segments = [row for row in rows if row["kind"] == "segments" and row["tokens"] == 262_144 and "seconds" in row]
    segments = [row for row in segments if row["options"][-1] == "index" and not row["error"] + row["misled"]]
    if segments:
        best["segment"] = min(segments, key=lambda row: row["seconds"])["options"][:4]
    return best


def show(variant: Variant, result: dict[str, Any], roofs: dict[str, float]) -> str:
    """One line of the table."""
    label = f"{variant.name:<62}"
    if "failure" in result:
        return f"{label} FAILED {result['failure'][:160]}"
    cells = [f"{1e6 * result['seconds']:11.1f} us"]
    if "tflops" in result:
        roof = roofs.get(variant.dtype)
        cells.append(f"{result['tflops']:7.1f} TFLOP/s" + (f" {result['tflops'] / roof:.3f}" if roof else ""))
    cells.append(f"error {result['error']:.2g}")
    for name, seconds in result.get("parts", {}).items():
        cells.append(f"{name} {1e6 * seconds:.1f}")
    return " ".join([label, *cells, result.get("note", "")])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", default=[""], help="variants whose names start so")
    parser.add_argument("--budget-s", type=float, default=420)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*json.load(sys.stdin), arguments.device, arguments.compile_only)
    chosen = {v.name: v for v in variants() if any(v.name.startswith(start) for start in arguments.only)}
    if arguments.list:
        print("\n".join(chosen))
        return 0
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    roofs: dict[str, float] = {}
    log = Path(tempfile.mkdtemp()) / "errors.log"

    def done(result: dict[str, Any]) -> None:
        variant = chosen[result["name"]]
        if variant.kind == "roof" and "tflops" in result:
            roofs[variant.dtype] = result["tflops"]
        rows.append({**asdict(variant), **result})
        print(show(variant, result, roofs), flush=True)

    compile_all(list(chosen), arguments.device, log)
    print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    deadline = begin + arguments.budget_s
    run_all([name for name in chosen if not name.startswith("whole")], {}, arguments.device, log, deadline, done)
    best = find_best(rows)
    print(f"after {time.monotonic() - begin:.0f} s; best: {best}", flush=True)
    run_all([name for name in chosen if name.startswith("whole")], best, arguments.device, log, deadline, done)
    print(f"{time.monotonic() - begin:.0f} s; messages of the children: {log}", flush=True)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        body = {"header": header(arguments.device), "rows": rows}
        arguments.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
