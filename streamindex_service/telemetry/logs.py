"""Structured logs: one JSON object a line on standard error.

Callers cause lines, so there is a bound to them: of one kind, which is an `event`, so many a second. What is left out
is counted, in the next line of its kind and, where it is a refusal, in the metrics.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TextIO, cast

import structlog

MAX_LINES_PER_S = 100
"""Of one kind, where the settings say nothing else."""


class _Lines:
    """A stream of lines. One that it does not take, on a full disk say, is lost, and nothing else with it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


@dataclass(slots=True)
class _Kind:
    """Lines of one event in this second; `left_out` since the last one that was written."""

    second: int = -1
    lines: int = 0
    left_out: int = 0


class Limit:
    """A processor of structlog that lets `most` lines of an event pass in a second. Lines for debugging all pass.

    Events are names of ours, never text from a caller: there are few of them.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[str, _Kind] = {}

    def __call__(self, logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """The line, with what was left out before it. Raises structlog.DropEvent for one too many."""
        if method == "debug":
            return line
        second = int(self._clock())
        with self._lock:
            kind = self._kinds.setdefault(line["event"], _Kind())
            if kind.second != second:
                kind.second, kind.lines = second, 0
            if kind.lines >= self._most:
                kind.left_out += 1
                raise structlog.DropEvent
            kind.lines += 1
            left_out, kind.left_out = kind.left_out, 0
        if left_out:
            line["left_out"] = left_out
        return line


class _Forward(logging.Handler):
    """What libraries and asyncio say through `logging`, in our form."""

    def emit(self, record: logging.LogRecord) -> None:
        get(record.name).log(record.levelno, "library", detail=record.getMessage(), exc_info=record.exc_info)


def configure(level: str = "info", max_lines_per_s: int = MAX_LINES_PER_S) -> None:
    """Set the level (debug, info, warning, error), the bound and the form. Call once at the start of a process."""
    logging.lastResort = _Forward(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            Limit(max_lines_per_s),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Lines(sys.stderr))),
        cache_logger_on_first_use=False,
    )


def get(component: str) -> Any:
    """A logger whose lines name the component."""
    return structlog.get_logger(component=component)


def bound(**ids: str) -> AbstractContextManager[None]:
    """Within, every line of this thread or task carries these."""
    return structlog.contextvars.bound_contextvars(**ids)
