"""Which trace a call belongs to: the caller's, where the caller has OpenTelemetry."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["trace_headers"]

_TRACEPARENT = "traceparent"


def trace_headers(metadata: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """W3C headers of the span that is current in this thread or task.

    Empty when there is none, when `metadata` has a `traceparent` already, and where nobody has imported OpenTelemetry:
    then nobody has made a span.
    """
    if "opentelemetry.trace" not in sys.modules or any(key == _TRACEPARENT for key, _ in metadata):
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers)
    return tuple(headers.items())
