"""The demo in its own process: the right answer, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FIELDS = {
    "device": str,
    "implementation": str,
    "keys": int,
    "queries": int,
    "top_k": int,
    "wrong_rows": int,
    "checked_rows": int,
    "upload_bytes_per_s": float,
    "search_rows_per_s": float,
    "peak_device_bytes": int,
    "budget_bytes": int,
}
PIPELINE_FIELDS = {name: kind for name, kind in FIELDS.items() if name != "search_rows_per_s"} | {
    "attention_implementation": str,
    "tokens": int,
    "window": int,
    "largest_error": float,
    "rows_per_s": float,
}


@contextmanager
def started(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A demo whose temporary files lie in `directory`."""
    with subprocess.Popen(
        [sys.executable, "-m", "streamindex_service", "demo", "--device", "cpu", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(directory), "PYTHONWARNINGS": "error"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def demo(directory: Path, *arguments: str, fields: dict[str, type] = FIELDS) -> tuple[dict[str, Any], str]:
    """Run it to its end; the JSON object of its last line, and all that it printed."""
    with started(directory, *arguments, "--json") as process:
        shown, errors = process.communicate(timeout=110)
    assert process.returncode == 0, errors
    assert not list(directory.iterdir())
    figures: dict[str, Any] = json.loads(shown.splitlines()[-1])
    assert {name: type(value) for name, value in figures.items()} == fields
    return figures, shown


@pytest.mark.parametrize(
    "shape",
    [
        "--key-format bf16 --ratio 4 --heads 8 --head-dim 64",
        "--key-format fp16 --ratio 1 --heads 3 --head-dim 16",
        "--key-format fp32 --ratio 2 --heads 4 --head-dim 48",
        "--key-format fp8_e4m3 --ratio 4 --heads 8 --head-dim 128",
    ],
    ids=lambda shape: shape.split()[1],
)
def test_synthetic_data_of_every_format(tmp_path: Path, shape: str) -> None:
    figures, _ = demo(tmp_path, "--synthetic", "--keys", "1111", "--queries", "77", "--top-k", "65", *shape.split())
    assert (figures["keys"], figures["queries"], figures["top_k"]) == (1111, 77, 65)
    assert (figures["wrong_rows"], figures["checked_rows"]) == (0, 77)
    assert figures["device"] == "cpu"
    assert 0 < figures["peak_device_bytes"] <= figures["budget_bytes"]


@pytest.mark.parametrize("kv_format", ["bf16", "fp8_d512", "fp8_d576"])
def test_the_pipeline(tmp_path: Path, kv_format: str) -> None:
    heads = ["--heads", "4", "--head-dim", "32", "--attention-heads", "4"]
    sizes = ["--keys", "333", "--queries", "21", "--top-k", "40", "--window", "50", *heads]
    figures, shown = demo(tmp_path, "--pipeline", "--kv-format", kv_format, *sizes, fields=PIPELINE_FIELDS)
    assert (figures["keys"], figures["tokens"], figures["queries"]) == (333, 1332, 21)
    assert (figures["wrong_rows"], figures["checked_rows"]) == (0, 21)
    assert 0 < figures["largest_error"] < 1
    assert 0 < figures["peak_device_bytes"] <= figures["budget_bytes"]
    assert "wrong rows: 0" in shown


def test_real_data(tmp_path: Path) -> None:
    figures, shown = demo(tmp_path)
    assert (figures["keys"], figures["queries"], figures["top_k"]) == (16_384, 256, 512)
    assert (figures["wrong_rows"], figures["checked_rows"]) == (0, 256)
    assert shown.count("of the best keys") >= 4
    assert "wrong rows: 0" in shown


@pytest.mark.parametrize("choice", [["--implementation", "magic"], ["--device", "cuda:63"]], ids=lambda each: each[1])
def test_what_is_not_there_is_told_at_once(tmp_path: Path, choice: list[str]) -> None:
    with started(tmp_path, "--synthetic", "--keys", "64", "--queries", "1", *choice) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert choice[1] in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with started(tmp_path, "--synthetic", "--keys", "262144", "--queries", "100000") as process:
        assert process.stdout is not None
        while "Ready" not in (line := process.stdout.readline()):
            assert line, process.communicate()[1]
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())
    assert not [pid for pid in processes() if f"TMPDIR={tmp_path}" in environment(pid)]


def processes() -> list[int]:
    """Every process there is."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def environment(pid: int) -> list[str]:
    """A process's environment; empty when it is gone or not ours."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []
