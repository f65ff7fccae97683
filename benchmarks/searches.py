"""One measured search of the topk operation, and what the tables of such searches share: options, inputs, gate."""

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import MODELS, Model, Report, Row
from benchmarks.inputs import Prefill, make_prefill
from benchmarks.judge import Judgement, judge
from benchmarks.timing import Timing, measure, roof_tflops
from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import (
    DEFAULT_WORKSPACE_BYTES,
    IMPLEMENTATIONS,
    Order,
    Plan,
    ReferenceTooLargeError,
    plan_for,
    topk,
)
from streamindex_service.ops.topk.problem import Problem
from streamindex_service.ops.topk.reference import run_reference

MIB = 1 << 20
UNWRITTEN = -77  # an index that no search gives


@dataclass(frozen=True)
class TopkRow(Row):
    """A measured search.

    model, tokens, implementation, top_k: what `case` says, for tables and pictures. query_chunk, key_tile: where they
    were chosen; workspace_bytes: what was offered. checked_rows: of which `wrong_rows` were wrong, with mean `recall`.
    fallback_rows: those that were read whole because their sample misled, None where nobody counted.
    roof_tflops: the roof as it was just before and after, see `Bench.measure_roof`.
    left_out: the part of the algorithm that an ablation leaves out. exact: whether a wrong row is a mistake; only a
    row that leaves something out may say no, and then its wrong rows are the result.
    """

    model: str = ""
    tokens: int = 0
    implementation: str = ""
    top_k: int = 0
    query_chunk: int | None = None
    key_tile: int | None = None
    workspace_bytes: int | None = None
    checked_rows: int = 0
    recall: float | None = None
    fallback_rows: int | None = None
    roof_tflops: float | None = None
    left_out: str = ""
    exact: bool = True

    def __post_init__(self) -> None:
        if self.seconds is not None and (self.wrong_rows is None or not self.checked_rows):
            raise ValueError(f"{self.case}: a time, and no judgement of the answers")
        if not self.exact and not self.left_out:
            raise ValueError(f"{self.case}: only a search that leaves a part out may have wrong rows")

    @property
    def errors(self) -> int:
        return (self.wrong_rows or 0) if self.exact else 0


@dataclass(frozen=True)
class Search:
    """One way to answer a prefill. work: fills `out` [rows, top_k] int32; the rest is as in TopkRow."""

    name: str
    implementation: str
    work: Callable[[Prefill, Tensor], None]
    query_chunk: int | None = None
    key_tile: int | None = None
    workspace_bytes: int | None = None
    note: str = ""
    fallback_rows: int | None = None
    left_out: str = ""
    exact: bool = True


def product_search(
    implementation: str,
    *,
    plan: Plan | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    name: str = "",
    note: str = "",
    fallback_rows: int | None = None,
    left_out: str = "",
) -> Search:
    """The operation itself, results by index: planned within a workspace, or by the plan given."""

    def work(prefill: Prefill, out: Tensor) -> None:
        run_topk(prefill, implementation, out, plan=plan, workspace_bytes=workspace_bytes)

    return Search(
        name or implementation,
        implementation,
        work,
        query_chunk=None if plan is None else plan.query_chunk,
        key_tile=None if plan is None else plan.key_tile,
        workspace_bytes=workspace_bytes if plan is None else None,
        note=note,
        fallback_rows=fallback_rows,
        left_out=left_out,
    )


def chunked_search(query_chunk: int, key_tile: int, note: str = "", name: str = "", left_out: str = "") -> Search:
    """The StreamIndex algorithm in torch, of given tiles."""
    note = f"chunk {query_chunk} tile {key_tile}{', ' if note else ''}{note}"
    return product_search("chunked", plan=Plan(query_chunk, key_tile, 0), note=note, name=name, left_out=left_out)


def reference_search() -> Search:
    """Every score materialised in float32, then sorted."""

    def work(prefill: Prefill, out: Tensor) -> None:
        model = prefill.model
        problem = Problem(
            prefill.q, prefill.w, prefill.keys, prefill.positions, model.ratio, model.top_k, Order.INDEX, out, None
        )
        run_reference(problem, torch.float32)

    return Search("reference", "reference", work, note="float32")


def run_topk(
    prefill: Prefill,
    implementation: str,
    out: Tensor,
    *,
    plan: Plan | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    order: Order = Order.INDEX,
    out_scores: Tensor | None = None,
) -> None:
    """`topk` of a prefill into `out` [rows, top_k] int32."""
    topk(
        prefill.q, prefill.w, prefill.keys, prefill.positions, ratio=prefill.model.ratio, top_k=prefill.model.top_k,
        order=order, implementation=implementation, workspace_bytes=workspace_bytes, out_indices=out,
        out_scores=out_scores, plan=plan,
    )  # fmt: skip


def planned(prefill: Prefill, implementation: str, workspace_bytes: int = DEFAULT_WORKSPACE_BYTES) -> Plan:
    """The plan that `topk` would run that prefill with."""
    model, keys = prefill.model, prefill.keys
    plan = plan_for(
        implementation, prefill.device, keys.format, rows=prefill.rows, heads=model.heads, head_dim=model.head_dim,
        keys=int(prefill.visible().max()), top_k=model.top_k, workspace_bytes=workspace_bytes,
    )  # fmt: skip
    assert plan is not None, "an implementation with tiles"
    return plan


@dataclass
class Bench:
    """One run of a table. budget_s: of the repeats of one row; max_repeats: the most of them."""

    table: str
    device: str
    report: Report
    budget_s: float = 3.0
    max_repeats: int = 10
    roofs: dict[KeyFormat, list[float]] = field(default_factory=dict)

    def measure_roof(self, key_format: KeyFormat) -> float:
        """The roof of that format now, in TFLOP/s; the median of all that were measured goes to the header.

        A device that is held to a power limit multiplies faster when it comes from rest (by a fifth, on an H200), so a
        figure is held against the roof beside it, not against one from the start of the run.
        """
        measured = self.roofs.setdefault(key_format, [])
        if not measured or self.device != "cpu":
            measured.append(roof_tflops(key_format, self.device))
            self.report.header[f"roof_tflops_{key_format.value}"] = f"{statistics.median(measured):.1f}"
        return measured[-1]

    def prefill(self, model: Model, tokens: int, key_format: KeyFormat, values: str = "normal") -> Prefill:
        """New inputs; what the last ones left is given back first."""
        self.give_back()
        return make_prefill(model, tokens, key_format, self.device, values=values)

    def give_back(self) -> None:
        """Return cached device memory, so that a large row has all of it."""
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def run(
        self,
        prefill: Prefill,
        search: Search,
        baseline: TopkRow | None = None,
        judged: Callable[[Prefill, Tensor], Judgement] = judge,
    ) -> TopkRow:
        """Measure, judge and add one row. Out of memory is a result: a row without figures."""
        # no answer: memory given back by the last row may hold a right one
        out = torch.full((prefill.rows, prefill.model.top_k), UNWRITTEN, dtype=torch.int32, device=self.device)
        roofs: list[float] = []
        beside = partial(self._note_roof, roofs, prefill.keys.format)
        timing, reason = self._measure(lambda: search.work(prefill, out), beside)
        if timing is None:
            self.give_back()
            row = self._row(prefill, search, f"{search.note}, {reason}".strip(", "))
        else:
            beside()
            row = self._row(
                prefill, search, search.note, timing, judged(prefill, out), statistics.mean(roofs), baseline
            )  # fmt: skip
        self.report.add(row)
        return row

    def _note_roof(self, roofs: list[float], key_format: KeyFormat) -> None:
        roofs.append(self.measure_roof(key_format))

    def _measure(self, work: Callable[[], None], when_warm: Callable[[], None]) -> tuple[Timing | None, str]:
        """A timing, or why there is none."""
        try:
            timing = measure(
                work, self.device, budget_s=self.budget_s, max_repeats=self.max_repeats, when_warm=when_warm
            )  # fmt: skip
            return timing, ""
        except (torch.OutOfMemoryError, ReferenceTooLargeError) as error:
            return None, without_figures(error, self.device)

    def _row(
        self,
        prefill: Prefill,
        search: Search,
        note: str,
        timing: Timing | None = None,
        judgement: Judgement | None = None,
        roof: float = 0.0,
        baseline: TopkRow | None = None,
    ) -> TopkRow:
        model, tflops, ratio = prefill.model, None, None
        if timing is not None:
            tflops = prefill.useful_flop() / timing.seconds / 1e12
            if baseline is not None and baseline.seconds is not None:
                ratio = baseline.seconds / timing.seconds
        return TopkRow(
            table=self.table,
            case=f"{model.name} S={prefill.rows} k={model.top_k} {search.name}",
            dtype=prefill.keys.format.value,
            seconds=None if timing is None else timing.seconds,
            useful_tflops=tflops,
            roof_fraction=None if tflops is None else tflops / roof,
            ratio=ratio,
            ratio_to=None if ratio is None or baseline is None else _name(baseline),
            peak_bytes=None if timing is None else timing.peak_bytes,
            wrong_rows=None if judgement is None else judgement.wrong_rows,
            repeats=0 if timing is None else timing.repeats,
            note=note,
            model=model.name,
            tokens=prefill.rows,
            implementation=search.implementation,
            top_k=model.top_k,
            query_chunk=search.query_chunk,
            key_tile=search.key_tile,
            workspace_bytes=search.workspace_bytes,
            checked_rows=0 if judgement is None else judgement.checked_rows,
            recall=None if judgement is None else judgement.recall,
            fallback_rows=search.fallback_rows,
            roof_tflops=None if timing is None else roof,
            left_out=search.left_out,
            exact=search.exact,
        )


def _name(row: TopkRow) -> str:
    return f"{row.implementation} {row.dtype}"


def without_figures(error: Exception, device: str) -> str:
    """Why a search that ran out of memory has none."""
    if isinstance(error, ReferenceTooLargeError):
        needed = f"{error.needed_bytes / 2**30:.0f} GiB of products"
        if device != "cpu" and error.needed_bytes > torch.cuda.get_device_properties(device).total_memory:
            return f"out of memory: {needed}"
        return f"beyond the reference's bound: {needed}"
    return "out of memory"


def options(description: str | None, *, quick: str, any_model: bool = True) -> argparse.ArgumentParser:
    """The options that every table has. quick: what --quick does; any_model: whether models and lengths are chosen."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    if any_model:
        parser.add_argument("--models", nargs="+", choices=list(MODELS), help="of which the indexer is taken")
        parser.add_argument("--sizes", type=int, nargs="+", metavar="TOKENS")
    formats = [key_format.value for key_format in KeyFormat]
    parser.add_argument("--formats", nargs="+", choices=formats)
    parser.add_argument("--implementations", nargs="+", choices=list(IMPLEMENTATIONS))
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes")
    return parser


def begin(table: str, arguments: argparse.Namespace) -> Bench:
    """The run that the options ask for, its header printed."""
    report = Report(arguments.device, arguments.out)
    report.start()
    if arguments.quick:
        return Bench(table, arguments.device, report, budget_s=0.5, max_repeats=5)
    return Bench(table, arguments.device, report)


def usable(names: Sequence[str], device: str, key_format: KeyFormat) -> list[str]:
    """Those of the implementations that run on that device and format."""
    return [name for name in names if IMPLEMENTATIONS[name].supports(device, key_format)]


def formats_of(arguments: argparse.Namespace, default: Sequence[KeyFormat]) -> list[KeyFormat]:
    """The formats asked for."""
    return [KeyFormat(name) for name in arguments.formats] if arguments.formats else list(default)
