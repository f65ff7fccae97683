"""One measured run of sparse attention, and what its tables share: models, inputs, options, gate."""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Report, Row
from benchmarks.judge import sample_rows
from benchmarks.timing import measure, roof_tflops
from streamindex_service.ops import KeyFormat, KvFormat, KvRows
from streamindex_service.ops.kv_rows import pack_rows
from streamindex_service.ops.sparse_attention import (
    IMPLEMENTATIONS,
    Plan,
    check_sparse_attention,
    plan_for,
    sparse_attention,
)

_CHECKED_ROWS = 64
_FILL_ROWS = 8192


@dataclass(frozen=True)
class AttentionModel:
    """Dimensions of a model's sparse attention (as public model code gives them). window: of uncompressed rows;
    all_visible: nothing is chosen, a token attends all compressed rows before it, up to top_k."""

    name: str
    heads: int
    key_dim: int
    value_dim: int
    ratio: int
    top_k: int
    window: int
    packed: KvFormat
    all_visible: bool = False

    @property
    def width(self) -> int:
        """Entries of an index row."""
        return self.window + self.top_k

    @property
    def entry_flop(self) -> int:
        """Floating-point operations of both products for one entry of an index row."""
        return 2 * self.heads * (self.key_dim + self.value_dim)


V4_FLASH = AttentionModel("V4-Flash", 64, 512, 512, 4, 512, 128, KvFormat.FP8_D512)
V4_PRO = AttentionModel("V4-Pro", 128, 512, 512, 4, 1024, 128, KvFormat.FP8_D512)
V3_2 = AttentionModel("V3.2", 128, 576, 512, 1, 2048, 0, KvFormat.FP8_D576)
MODELS = {model.name: model for model in (V4_FLASH, V4_PRO, V3_2)}


@dataclass(frozen=True)
class AttentionRow(Row):
    """A measured attention. checked_rows: of which `wrong_rows` were wrong; largest_error: the worst error as a share
    of its bound. gathered_bytes_s: bytes of gathered rows a second."""

    model: str = ""
    tokens: int = 0
    implementation: str = ""
    plan: str = ""
    checked_rows: int = 0
    largest_error: float | None = None
    roof_tflops: float | None = None
    gathered_bytes_s: float | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and (self.wrong_rows is None or not self.checked_rows):
            raise ValueError(f"{self.case}: a time, and no judgement of the answers")


@dataclass(frozen=True)
class Attention:
    """Inputs of one attention; see `sparse_attention`."""

    model: AttentionModel
    q: Tensor
    kv: KvRows
    indices: Tensor
    sink: Tensor | None

    @property
    def tokens(self) -> int:
        return self.q.shape[0]

    @property
    def scale(self) -> float:
        return float(self.model.key_dim**-0.5)

    def entries(self) -> int:
        """Entries that name a row."""
        return int(((self.indices >= 0) & (self.indices < self.kv.rows)).sum())

    def run(self, implementation: str, out: Tensor, plan: Plan | None = None) -> None:
        sparse_attention(
            self.q, self.kv, self.indices, scale=self.scale, sink=self.sink, value_dim=self.model.value_dim,
            implementation=implementation, out=out, plan=plan,
        )  # fmt: skip

    def planned(self, implementation: str) -> Plan | None:
        """The plan that it would run with."""
        return plan_for(
            implementation, self.q.device, self.kv.format, tokens=self.tokens, heads=self.model.heads,
            key_dim=self.model.key_dim, value_dim=self.model.value_dim, width=self.indices.shape[1],
        )  # fmt: skip


def make_attention(
    model: AttentionModel, tokens: int, context: int, kv_format: KvFormat, device: str, seed: int = 0
) -> Attention:
    """The last `tokens` tokens of `context`, each with its window and top_k random compressed rows in order.

    Rows: those of the context if the model has a window, then one for each `ratio` tokens.
    """
    generator = torch.Generator(device).manual_seed(seed)
    local, compressed = (context if model.window else 0), context // model.ratio
    keys = torch.empty((local + compressed, model.key_dim), dtype=torch.bfloat16, device=device)
    q = torch.empty((tokens, model.heads, model.key_dim), dtype=torch.bfloat16, device=device)
    for whole in (keys, q):
        for start in range(0, whole.shape[0], _FILL_ROWS):
            part = whole[start : start + _FILL_ROWS]
            part.copy_(torch.randn(part.shape, generator=generator, device=device))
    indices = torch.empty((tokens, model.width), dtype=torch.int32, device=device)
    position = torch.arange(context - tokens, context, device=device)[:, None]
    places = torch.arange(model.window, device=device)[None, :]
    indices[:, : model.window] = position - model.window + 1 + places  # the first are negative: none
    chosen = torch.rand((tokens, model.top_k), generator=generator, device=device)
    seen = ((position + 1) // model.ratio).clamp(min=1)
    # entries of a short sequence may stand twice, which changes no cost
    indices[:, model.window :] = local + (chosen.sort(dim=1).values * seen).long()
    sink = torch.randn(model.heads, generator=generator, device=device) if model.window else None
    return Attention(model, q, pack_rows(keys, kv_format), indices, sink)


@dataclass
class AttentionBench:
    """One run of a table. budget_s: of the repeats of one row; max_repeats: the most of them."""

    table: str
    device: str
    report: Report
    budget_s: float = 1.0
    max_repeats: int = 10
    roofs: list[float] = field(default_factory=list)

    def measure_roof(self) -> float:
        """The roof in bf16 now, in TFLOP/s: both products are made in it, whatever the rows' format."""
        if not self.roofs or self.device != "cpu":
            self.roofs.append(roof_tflops(KeyFormat.BF16, self.device))
            self.report.header["roof_tflops_bf16"] = f"{statistics.median(self.roofs):.1f}"
        return self.roofs[-1]

    def run(
        self,
        attention: Attention,
        implementation: str,
        *,
        plan: Plan | None = None,
        note: str = "",
        baseline: AttentionRow | None = None,
        work: Callable[[Tensor], None] | None = None,
    ) -> AttentionRow:
        """Measure, judge and add one row. work: fills `out` [tokens, heads, value_dim] bf16, if not the operation."""
        model = attention.model
        shape = (attention.tokens, model.heads, model.value_dim)
        # no answer: memory given back by the last row may hold a right one
        out = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=self.device)
        fill = work or (lambda into: attention.run(implementation, into, plan))
        roofs: list[float] = []
        timing = measure(
            lambda: fill(out), self.device, budget_s=self.budget_s, max_repeats=self.max_repeats,
            when_warm=lambda: roofs.append(self.measure_roof()),
        )  # fmt: skip
        roofs.append(self.measure_roof())
        checked, wrong_rows, largest_error = judge_attention(attention, out)
        used = plan or attention.planned(implementation)
        entries = attention.entries()
        tflops = model.entry_flop * entries / timing.seconds / 1e12
        same = baseline is not None and baseline.seconds is not None
        row = AttentionRow(
            table=self.table,
            case=f"{model.name} T={attention.tokens} W={model.width} {implementation}",
            dtype=attention.kv.format.value,
            seconds=timing.seconds,
            useful_tflops=tflops,
            roof_fraction=tflops / statistics.mean(roofs),
            ratio=baseline.seconds / timing.seconds if same else None,
            ratio_to=f"{baseline.implementation} {baseline.dtype}" if same else None,
            peak_bytes=timing.peak_bytes,
            wrong_rows=wrong_rows,
            repeats=timing.repeats,
            note=note,
            model=model.name,
            tokens=attention.tokens,
            implementation=implementation,
            plan="" if used is None else used.name,
            checked_rows=checked,
            largest_error=largest_error,
            roof_tflops=statistics.mean(roofs),
            gathered_bytes_s=entries * attention.kv.row_bytes / timing.seconds,
        )
        self.report.add(row)
        return row


def judge_attention(attention: Attention, out: Tensor) -> tuple[int, int, float]:
    """A sample of tokens against float64: how many, how many were wrong, and the worst error as a share of its
    bound."""
    rows = sample_rows(attention.tokens, _CHECKED_ROWS).to(out.device)
    report = check_sparse_attention(
        out[rows], None, attention.q[rows], attention.kv, attention.indices[rows], scale=attention.scale,
        sink=attention.sink,
    )  # fmt: skip
    if report.wrong_rows:
        print(f"wrong rows: {report.wrong_rows}, error {report.largest_error} of its bound", file=sys.stderr)
    return len(rows), report.wrong_rows, report.largest_error


def options(
    description: str | None,
    *,
    quick: str,
    models: Sequence[str],
    formats: Sequence[str] = ("bf16", "packed"),
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS),
    usual: Sequence[str] = ("chunked", "triton"),
    sizes: str = "TOKENS",
) -> argparse.ArgumentParser:
    """The options that every table of attention has, without that of implementations or sizes where these are none.
    usual: of the implementations, those that run if none is named; sizes: what they count."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(models), default=list(models))
    if sizes:
        parser.add_argument("--sizes", type=int, nargs="+", metavar=sizes)
    parser.add_argument("--formats", nargs="+", choices=list(formats), default=list(formats))
    if implementations:
        parser.add_argument("--implementations", nargs="+", choices=list(implementations), default=list(usual))
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes")
    return parser


def begin(table: str, arguments: argparse.Namespace) -> AttentionBench:
    """The run that the options ask for, its header printed."""
    report = Report(arguments.device, arguments.out)
    report.start()
    if arguments.quick:
        return AttentionBench(table, arguments.device, report, budget_s=0.3, max_repeats=5)
    return AttentionBench(table, arguments.device, report)


def formats_of(arguments: argparse.Namespace, model: AttentionModel) -> list[KvFormat]:
    """The formats asked for, of that model."""
    return [KvFormat.BF16 if name == "bf16" else model.packed for name in arguments.formats]


def usable(arguments: argparse.Namespace, kv_format: KvFormat) -> list[str]:
    """Those of the implementations asked for that run on the device and format."""
    return [name for name in arguments.implementations if IMPLEMENTATIONS[name].supports(arguments.device, kv_format)]
