"""Structured logs: one JSON object a line on standard error."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager
from typing import Any

import structlog


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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def get(component: str) -> Any:
    """A logger whose lines name the component."""
    return structlog.get_logger(component=component)


def bound(**ids: str) -> AbstractContextManager[None]:
    """Within, every line of this thread or task carries these."""
    return structlog.contextvars.bound_contextvars(**ids)
