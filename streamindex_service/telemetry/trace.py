"""W3C Trace Context (https://www.w3.org/TR/trace-context/): which trace a call belongs to."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

TRACEPARENT = "traceparent"
HEADERS = frozenset((TRACEPARENT, "tracestate"))
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """`trace_id` is the whole trace's, `span_id` this service's part of it, `parent_id` the caller's, "" for none."""

    trace_id: str
    span_id: str
    parent_id: str = ""
    flags: str = "00"

    @property
    def traceparent(self) -> str:
        """What is passed on."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def of_call(traceparent: str | None) -> TraceContext:
    """The context of a call that came with this header; a trace of its own when there is none or it is malformed.

    A malformed header is no reason to refuse a call (section 3.2.2.5 of the recommendation).
    """
    span_id = os.urandom(8).hex()
    match = _FORM.fullmatch(traceparent) if traceparent is not None else None
    if match is not None:
        version, trace_id, parent_id, flags, rest = match.groups()
        is_known = version != "ff" and (version != "00" or rest is None)
        if is_known and trace_id.strip("0") and parent_id.strip("0"):
            return TraceContext(trace_id, span_id, parent_id, flags)
    return TraceContext(os.urandom(16).hex(), span_id)


def read(traceparent: str) -> TraceContext | None:
    """A context that was passed on within the service; None when there is none."""
    match = _FORM.fullmatch(traceparent)
    return None if match is None else TraceContext(match[2], match[3], flags=match[4])
