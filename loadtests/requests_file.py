"""One line for each call: what a locust process writes, and what a summary is made of."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TextIO

PATTERN = "requests-*.csv"


class Outcome(StrEnum):
    """What became of a call."""

    OK = "ok"
    REFUSED = "refused"  # the service said: not now
    FAILED = "failed"
    WRONG = "wrong"  # the answer is not the reference's
    BROKEN = "broken"  # the load test itself failed


@dataclass(frozen=True, slots=True)
class Request:
    """A call. `end_s` is on the host's monotonic clock; `moved_bytes` are tensors, both ways.

    `compared`: its answer was held against the reference.
    """

    end_s: float
    scenario: str
    call: str
    latency_ms: float
    moved_bytes: int
    outcome: Outcome
    compared: bool = False
    error: str = ""


class RequestsFile:
    """Writes calls as they end."""

    def __init__(self, directory: Path, name: str) -> None:
        self._file: TextIO = (directory / PATTERN.replace("*", name)).open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._rows.writerow(each.name for each in fields(Request))

    def write(self, request: Request) -> None:
        """Add a line."""
        self._rows.writerow(astuple(request))

    def close(self) -> None:
        """Write what is held back."""
        self._file.close()


def read_requests(directory: Path) -> Iterator[Request]:
    """All calls of all processes, in no order."""
    for path in sorted(directory.glob(PATTERN)):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield Request(
                    float(row["end_s"]),
                    row["scenario"],
                    row["call"],
                    float(row["latency_ms"]),
                    int(row["moved_bytes"]),
                    Outcome(row["outcome"]),
                    row["compared"] == "True",
                    row["error"],
                )
