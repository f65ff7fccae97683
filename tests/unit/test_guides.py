"""What the guides say of refusals and promises is what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from streamindex_service import errors

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
FAILURES = (ROOT / "docs" / "failure-modes.md").read_text()


def section(text: str, heading: str) -> str:
    _, _, rest = text.partition(f"\n## {heading}\n")
    assert rest, f"no section {heading}"
    return rest.partition("\n## ")[0]


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_every_reason_has_a_meaning_and_something_to_do():
    rows = table(section(OPERATIONS, "Refusals"))
    assert {row[0].strip("`") for row in rows} == set(errors.reasons())
    for reason, _, _, *meaning in rows:
        assert len(meaning) == 2, f"{reason}: what it means, what to do"
        assert all(len(part) > 10 for part in meaning), reason


def test_the_failure_modes_name_reasons_that_exist():
    words = set(re.findall(r"\b[A-Z]{4,}(?:_[A-Z]+)*\b", FAILURES)) - {"SIGTERM", "UNAVAILABLE"}
    assert words <= set(errors.reasons())
    caused_by_callers = {"CACHE_NOT_FOUND", "QUEUE_FULL", "HOST_MEMORY", "WORKER_LOST", "UPLOAD_CONFLICT", "POISON"}
    assert caused_by_callers <= words


def test_every_promise_names_a_test_that_exists():
    named = re.findall(r"(tests/\S+\.py)::(\w+)", FAILURES)
    rows = [line for line in FAILURES.splitlines() if line.startswith("| ") and not line.startswith("| what happens")]
    assert len(named) == len(rows) > 30
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in functions, f"{path} has no {name}"
