"""Runs the benchmarks, each in a process of its own: python -m benchmarks --out DIR [--only NAME] [--quick]."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

# name -> whether it needs a GPU
BENCHMARKS = {"topk_scaling": True, "topk_profile": True, "upload_throughput": False, "search_stream": False}
_TIMEOUT_S = 3600
_PLAIN_WIDTH = 160


def run_one(name: str, out: Path, quick: bool) -> bool:
    """Run one benchmark; whether its answers were right."""
    target = out / f"{name}.json"
    target.unlink(missing_ok=True)  # no old figures under a new run's name
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(target)]
    print(f"== {name}", flush=True)
    try:
        return subprocess.run(command + ["--quick"] * quick, check=False, timeout=_TIMEOUT_S).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{name}: not done in {_TIMEOUT_S} s", file=sys.stderr)
        return False


def show(name: str, path: Path) -> None:
    """Print a result file's rows."""
    result = json.loads(path.read_text())
    header = result["header"]
    table = Table(title=f"{name} on {header['device']}, torch {header['torch']}, commit {header['commit']}")
    for column in ("case", "dtype", "seconds", "ratio", "wrong rows", "note"):
        table.add_column(column)
    for row in result["rows"]:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.4g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} × {row['ratio_to']}"
        wrong = "" if row["wrong_rows"] is None else str(row["wrong_rows"])
        table.add_row(row["case"], row["dtype"], seconds, ratio, wrong, row["note"])
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where NAME.json goes")
    parser.add_argument("--only", choices=list(BENCHMARKS), action="append", help="may be given more than once")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.only or BENCHMARKS:
        if BENCHMARKS[name] and not torch.cuda.is_available():
            print(f"== {name}: needs a GPU, left out", flush=True)
            continue
        if not run_one(name, arguments.out, arguments.quick):
            failed.append(name)
        if (path := arguments.out / f"{name}.json").is_file():
            show(name, path)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
