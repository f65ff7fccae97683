"""What every benchmark shares: models, the form of a result file, and the gate that no wrong answer passes.

A row is only written with its count of wrong rows, and a run with a wrong row exits with an error and writes nothing.
Only a row that says which part of the algorithm it leaves out may have wrong rows as its result
(`benchmarks.searches.TopkRow`). Inputs are made in `benchmarks.inputs`, times taken in `benchmarks.timing`, answers
judged in `benchmarks.judge`; `benchmarks.render` turns result files into tables and pictures.
"""

import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.tables import CONSOLE_COLUMNS, head, line


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

    @property
    def pair_flop(self) -> int:
        """Floating-point operations of the products of one (token, key) pair."""
        return 2 * self.heads * self.head_dim

    def useful_flop(self, tokens: int) -> int:
        """2 · heads · head_dim for each (token, key) pair that the token sees."""
        whole, rest = divmod(tokens, self.ratio)
        # token t sees (t + 1) // ratio keys: each count 0..whole-1 occurs `ratio` times, but the first and the last
        pairs = self.ratio * whole * (whole - 1) // 2 + whole * (rest + 1)
        return self.pair_flop * pairs


V4_FLASH = Model("V4-Flash", heads=64, head_dim=128, ratio=4, top_k=512)
V4_PRO = Model("V4-Pro", heads=64, head_dim=128, ratio=4, top_k=1024)
V3_2 = Model("V3.2", heads=64, head_dim=128, ratio=1, top_k=2048)
GLM_5 = Model("GLM-5", heads=32, head_dim=128, ratio=1, top_k=2048)
MODELS = {model.name: model for model in (V4_FLASH, V4_PRO, V3_2, GLM_5)}


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

    @property
    def errors(self) -> int:
        """Wrong rows that must not be."""
        return self.wrong_rows or 0


class Report:
    """Rows of one run under one header, printed as markdown and written to `out` as JSON.

    Until the run ends what is there lies in `out` with `.partial` behind its name, for a run that is cut off.
    """

    def __init__(self, device: str, out: Path | None = None) -> None:
        self.header = header(device)
        self.rows: list[Row] = []
        self._out = out
        self._partial = None if out is None else out.with_name(out.name + ".partial")

    def start(self) -> None:
        """Print the header and the head of the table."""
        print(self.header, head(CONSOLE_COLUMNS), sep="\n", flush=True)

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        print(line(asdict(row), CONSOLE_COLUMNS), flush=True)
        if self._partial is not None:
            self._write(self._partial)
        return row

    @property
    def errors(self) -> int:
        return sum(row.errors for row in self.rows)

    def finish(self, broken: Sequence[str] = ()) -> int:
        """Write the figures, unless an answer was wrong or something else is `broken`; the exit code of the run."""
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)
        reasons = [f"{self.errors} wrong or missing rows"] * bool(self.errors) + list(broken)
        if reasons:
            print(f"nothing is written: {'; '.join(reasons)}", file=sys.stderr)
            return 1
        if self._out is not None:
            self._write(self._out)
        return 0

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {"header": self.header, "rows": [asdict(row) for row in self.rows]}
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


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
        "command": shlex.join(Path(each).name if "/" in each else each for each in sys.argv),  # no folder of the host
    }


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip().splitlines()[0] if result.stdout.strip() else "unknown"
