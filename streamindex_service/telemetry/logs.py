"""Structured logs: one JSON object a line on standard error."""

from __future__ import annotations

import contextlib
import logging
import sys
from contextlib import AbstractContextManager
from typing import Any, TextIO, cast

import structlog


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


def configure(level: str = "info") -> None:
    """Set the level (debug, info, warning, error) and the form. Call once at the start of a process."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
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
