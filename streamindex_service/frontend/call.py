"""The call that is being served: who makes it, and under which ids it is logged.

A task inherits it from the one that started it, so whatever is done for a call, at whatever depth, finds it here.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from streamindex_service.telemetry.counters import MethodCounters
from streamindex_service.telemetry.spans import CallSpan
from streamindex_service.telemetry.trace import TraceContext


@dataclass(slots=True, eq=False)
class Call:
    """One call. `counters` are its method's; `span` is None where it is not traced."""

    method: str
    request_id: str
    trace: TraceContext
    counters: MethodCounters
    caller: str = ""
    span: CallSpan | None = None


CURRENT: ContextVar[Call | None] = ContextVar("call", default=None)
"""None outside of calls."""
