"""Runs the benchmarks, each in a process of its own: python -m benchmarks --out DIR [--only NAME] [--quick].

`--data FILE` is the data set of topk_real_data, by default the one that ships.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.tables import COLUMNS

# name -> whether it needs a GPU
BENCHMARKS = {
    "topk_parity": False,
    "topk_real_data": False,
    "topk_scaling": True,
    "topk_decode": True,
    "topk_profile": True,
    "topk_design": True,
    "topk_ablations": True,
    "attention_prefill": False,
    "attention_decode": False,
    "attention_pages": True,
    "attention_backward": False,
    "compressor": False,
    "csa_pipeline": False,
    "upload_throughput": False,
    "search_stream": False,
    "attend_calls": False,
    "governor_mix": False,
    "governor_memory": True,
}
SHOWN = ("case", "dtype", "seconds", "of the roof", "ratio", "wrong rows", "recall", "note")
_TIMEOUT_S = 3600
_PLAIN_WIDTH = 160


def run_one(name: str, out: Path, options: list[str]) -> bool:
    """Run one benchmark; whether its answers were right."""
    target = out / f"{name}.json"
    target.unlink(missing_ok=True)  # no old figures under a new run's name
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(target)]
    print(f"== {name}", flush=True)
    begin = time.monotonic()
    try:
        right = subprocess.run(command + options, check=False, timeout=_TIMEOUT_S).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{name}: not done in {_TIMEOUT_S} s", file=sys.stderr)
        return False
    print(f"== {name}: {time.monotonic() - begin:.0f} s", flush=True)
    return right


def options_of(name: str, arguments: argparse.Namespace) -> list[str]:
    """What is handed on to that benchmark."""
    options = ["--quick"] * arguments.quick
    if arguments.data is not None and name == "topk_real_data":
        options += ["--data", str(arguments.data)]
    return options


def show(name: str, path: Path) -> None:
    """Print a result file's rows."""
    result = json.loads(path.read_text())
    header = result["header"]
    table = Table(title=f"{name} on {header['device']}, torch {header['torch']}, commit {header['commit']}")
    columns = [column for column in COLUMNS if column.title in SHOWN]
    for column in columns:
        table.add_column(column.title)
    for row in result["rows"]:
        table.add_row(*(column.shown(row) for column in columns))
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where NAME.json goes")
    parser.add_argument("--only", choices=list(BENCHMARKS), action="append", help="may be given more than once")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--data", type=Path, metavar="FILE", help="safetensors, for topk_real_data")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.only or BENCHMARKS:
        if BENCHMARKS[name] and not torch.cuda.is_available():
            print(f"== {name}: needs a GPU, left out", flush=True)
            continue
        if not run_one(name, arguments.out, options_of(name, arguments)):
            failed.append(name)
        if (path := arguments.out / f"{name}.json").is_file():
            show(name, path)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
