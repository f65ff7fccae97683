"""What every benchmark shares: models and inputs, timing, the roof, the correctness gate, and the form of a result
file.

A row is only written with its count of wrong rows, and a run with any wrong row exits with an error. The roof is the
8192³ matrix product of the same element type, measured in the same run.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamindex_service.ops import KeyFormat, PagedKeys
from streamindex_service.ops.topk import check_topk

ROOF_SIZE = 8192
_CHECKED_ROWS = 64
_FILL_ROWS = 4096


@dataclass(frozen=True)
class Model:
    """Indexer dimensions of a model (as public model code gives them)."""

    name: str
    heads: int
    head_dim: int
    ratio: int
    top_k: int

    def keys(self, tokens: int) -> int:
        return tokens // self.ratio

    def useful_flop(self, tokens: int) -> int:
        """2 · heads · head_dim for each (token, key) pair that the token sees."""
        whole, rest = divmod(tokens, self.ratio)
        # token t sees (t + 1) // ratio keys: each count 0..whole-1 occurs `ratio` times, but the first and the last
        pairs = self.ratio * whole * (whole - 1) // 2 + whole * (rest + 1)
        return 2 * self.heads * self.head_dim * pairs


V4_FLASH = Model("V4-Flash", heads=64, head_dim=128, ratio=4, top_k=512)
V4_PRO = Model("V4-Pro", heads=64, head_dim=128, ratio=4, top_k=1024)
V3_2 = Model("V3.2", heads=64, head_dim=128, ratio=1, top_k=2048)
GLM_5 = Model("GLM-5", heads=32, head_dim=128, ratio=1, top_k=2048)
MODELS = {model.name: model for model in (V4_FLASH, V4_PRO, V3_2, GLM_5)}


@dataclass(frozen=True)
class Prefill:
    """A whole causal prefill: every token of a sequence queries the keys before it."""

    model: Model
    tokens: int
    q: Tensor
    w: Tensor
    keys: PagedKeys


def make_prefill(model: Model, tokens: int, key_format: KeyFormat, device: str, seed: int = 0) -> Prefill:
    """Independent normal inputs, drawn in parts so that nothing larger than the inputs is ever allocated."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = key_format.torch_dtype

    def normal(*shape: int) -> Tensor:
        whole = torch.empty(shape, dtype=dtype, device=device)
        for start in range(0, shape[0], _FILL_ROWS):
            part = whole[start : start + _FILL_ROWS]
            part.copy_(torch.randn(part.shape, generator=generator, device=device))
        return whole

    q, k = normal(tokens, model.heads, model.head_dim), normal(model.keys(tokens), model.head_dim)
    w = torch.randn((tokens, model.heads), generator=generator, device=device)
    w *= model.head_dim**-0.5 * model.heads**-0.5
    scales = None
    if key_format.has_scales:
        scales = 0.5 + torch.rand(k.shape[0], generator=generator, device=device)
    return Prefill(model, tokens, q, w, PagedKeys.from_contiguous(k, scales))


@dataclass(frozen=True)
class Timing:
    """Median seconds of the timed repeats, and the peak of device bytes beyond what was held before."""

    seconds: float
    peak_bytes: int
    repeats: int


def measure(work: Callable[[], object], device: str, *, budget_s: float = 6.0, max_repeats: int = 10) -> Timing:
    """Run once to warm up, then as often as the budget allows (at least once), and take the median.

    On CUDA the time is between device events and the peak is the allocator's; on a CPU the peak is reported as 0.
    """
    if device == "cpu":
        return _measure_cpu(work, budget_s, max_repeats)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = _event_seconds(work)
    peak = torch.cuda.max_memory_allocated() - before
    repeats = max(1, min(max_repeats, int(budget_s / max(first, 1e-6))))
    return Timing(statistics.median(_event_seconds(work) for _ in range(repeats)), peak, repeats)


def _event_seconds(work: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _measure_cpu(work: Callable[[], object], budget_s: float, max_repeats: int) -> Timing:
    def seconds() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    first = seconds()
    repeats = max(1, min(max_repeats, int(budget_s / max(first, 1e-6))))
    return Timing(statistics.median(seconds() for _ in range(repeats)), 0, repeats)


def roof_tflops(key_format: KeyFormat, device: str) -> float:
    """TFLOP/s of a dense product [8192, 8192]² of that element type by the vendor's library (512² on a CPU, for smoke
    tests)."""
    n = ROOF_SIZE if device != "cpu" else 512
    a, b = (torch.randn((n, n), device=device) for _ in range(2))
    if key_format is KeyFormat.FP8_E4M3 and device != "cpu":
        one = torch.ones((), device=device)
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T

        def product() -> Tensor:
            return torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    else:
        dtype = torch.float32 if device == "cpu" else key_format.torch_dtype
        x, y = a.to(dtype), b.to(dtype)

        def product() -> Tensor:
            return torch.mm(x, y)

    def ten() -> None:
        for _ in range(10):
            product()

    return 10 * 2 * n**3 / measure(ten, device, budget_s=1.0).seconds / 1e12


def wrong_rows(prefill: Prefill, indices: Tensor, sample: int = _CHECKED_ROWS, first_position: int = 0) -> int:
    """Rows of a sample, spread over the sequence and always with its ends, that the re-scoring check finds wrong."""
    rows = torch.linspace(0, prefill.tokens - 1, min(sample, prefill.tokens), dtype=torch.float64).long().unique()
    on_device = rows.to(indices.device)
    report = check_topk(
        indices[on_device],
        prefill.q.view(torch.uint8)[on_device].view(prefill.q.dtype),  # not every float format can be indexed
        prefill.w[on_device],
        prefill.keys,
        rows + first_position,
        ratio=prefill.model.ratio,
        top_k=prefill.model.top_k,
    )
    if report.wrong_rows:
        print(f"WRONG: {report}", file=sys.stderr)
    return report.wrong_rows


@dataclass(frozen=True)
class Row:
    """One line of a table. `ratio` is how many times faster than `ratio_to` it is; None where it has no meaning or
    ran out of memory."""

    table: str
    case: str
    dtype: str
    seconds: float | None
    useful_tflops: float | None
    roof_fraction: float | None
    ratio: float | None
    ratio_to: str | None
    peak_bytes: int | None
    wrong_rows: int | None
    repeats: int = 0
    note: str = ""


class Report:
    """Rows of one run under one header, written as JSON and printed as markdown."""

    def __init__(self, device: str) -> None:
        self.header = header(device)
        self.rows: list[Row] = []

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        print(_markdown(row), flush=True)
        return row

    @property
    def wrong_rows(self) -> int:
        return sum(row.wrong_rows or 0 for row in self.rows)

    def finish(self, out: Path | None) -> int:
        """Write the figures, unless an answer was wrong; the exit code of the run."""
        if self.wrong_rows:
            print(f"{self.wrong_rows} wrong or missing rows: nothing is written", file=sys.stderr)
            return 1
        if out is not None:
            self.write(out)
        return 0

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {"header": self.header, "rows": [asdict(row) for row in self.rows]}
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


MARKDOWN_HEAD = (
    "| case | dtype | seconds | useful TFLOP/s | of the roof | ratio | peak MiB | wrong rows |\n|" + "---|" * 8
)


def _markdown(row: Row) -> str:
    def shown(value: float | None, form: str) -> str:
        return "—" if value is None else format(value, form)

    ratio = "—" if row.ratio is None else f"{row.ratio:.2f} × {row.ratio_to}"
    peak = "—" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
    cells = [
        f"{row.case} {row.note}".strip(),
        row.dtype,
        shown(row.seconds, ".4g"),
        shown(row.useful_tflops, ".1f"),
        shown(row.roof_fraction, ".3f"),
        ratio,
        peak,
        shown(row.wrong_rows, "d"),
    ]
    return "| " + " | ".join(cells) + " |"


def header(device: str) -> dict[str, str]:
    """Device, driver, versions, commit and date of a run."""
    triton_version = "none"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        pass
    on_gpu = device != "cpu"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": triton_version,
        # a tree that was copied without its history is told what it is
        "commit": os.environ.get("COMMIT") or _output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip().splitlines()[0] if result.stdout.strip() else "unknown"
