"""Reports: a page that is whole in one file, and its picture, beside each summary.json and sweep.json."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.requests_file import Outcome

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
img { max-width: 100% } .passed { color: #176b2c } .failed { color: #a11 }
"""
_CALL_COLUMNS = {
    "scenario": "scenario",
    "call": "call",
    "count": "calls",
    "per_s": "calls/s",
    "mb_per_s": "MB/s",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "p99_ms": "p99 ms",
    "max_ms": "max ms",
    **{outcome.value: outcome.value for outcome in Outcome},
    "compared": "compared",
}


def write_reports(directory: Path) -> list[Path]:
    """Report what lies in DIR; the files written. Raises ImportError without matplotlib, LookupError for nothing."""
    from loadtests import figures

    written = []
    for name, title, draw, body in (
        ("summary", "Load test", figures.run_figure, _run_body),
        ("sweep", "Offered load, latency, refusals", figures.sweep_figure, _sweep_body),
    ):
        source = directory / f"{name}.json"
        if not source.exists():
            continue
        result = json.loads(source.read_text(encoding="utf-8"))
        picture, page = directory / f"{name}.png", directory / f"{name}.html"
        draw(result).savefig(picture)
        page.write_text(
            _document(f"{title}, profile {result['profile']}", body(result, _image(picture))), encoding="utf-8"
        )
        written += [page, picture]
    if not written:
        raise LookupError(f"there is neither summary.json nor sweep.json in {directory}")
    return written


def _run_body(summary: Mapping[str, Any], picture: str) -> list[str]:
    errors = [
        (row["scenario"], row["call"], number, error)
        for row in summary["calls"]
        for error, number in row["errors"].items()
    ]
    verdict = "passed" if summary["passed"] else "failed"
    text = f"{verdict}: {'; '.join(summary['reasons']) or 'every call was answered, and nothing was left behind'}"
    body = [
        f'<p class="{verdict}"><b>{html.escape(text)}</b></p>',
        f"<p>{summary['seconds']} s, {_origin(summary)}</p>",
        picture,
        "<h2>Calls</h2>",
        _table(_CALL_COLUMNS.values(), ([row[name] for name in _CALL_COLUMNS] for row in summary["calls"])),
        "<p>Latencies are of answered calls, as a caller sees them, tensors sent and received. MB are of tensors, both "
        "ways.</p>",
    ]
    if errors:
        body += ["<h2>Errors</h2>", _table(("scenario", "call", "times", "error"), errors)]
    return [*body, "<h2>Load</h2>", _table(("parameter", "value"), summary["parameters"].items())]


def _sweep_body(sweep: Mapping[str, Any], picture: str) -> list[str]:
    knee = sweep["knee_per_s"]
    return [
        f"<p><b>knee: {'none' if knee is None else f'{knee:.0f} calls a second'}</b>, the last load with a p99 of at "
        f"most {sweep['p99_limit_ms']:.0f} ms and at most 1 % of the calls refused, late or failed</p>",
        f"<p>{sweep['step_s']} s a step, {_origin(sweep)}</p>",
        picture,
        _table(sweep["steps"][0], (step.values() for step in sweep["steps"])),
        "<h2>Load</h2>",
        _table(("parameter", "value"), sweep["parameters"].items()),
    ]


def _document(title: str, body: Sequence[str]) -> str:
    """A page that needs no other file."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _table(names: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = ("".join(f"<td>{html.escape(_shown(value))}</td>" for value in row) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _image(picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    return f'<img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}">'


def _origin(result: Mapping[str, Any]) -> str:
    return html.escape(", ".join(f"{name} {value}" for name, value in result["header"].items()))


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
