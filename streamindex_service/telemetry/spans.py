"""What is told of a call that is traced, whoever makes spans of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from streamindex_service.telemetry.trace import TraceContext


@dataclass(frozen=True, slots=True)
class TracedTile:
    """One tile, or one try of it. Times are seconds of the host's monotonic clock, which both processes read.

    It asked for its turn at `asked_s`; the worker was given it at `given_s` (None: never), and gave it to the device
    at `issued_s`; the device worked `device_s` on it, until `ended_s`; the answer was here at `answered_s`. The three
    of the worker are 0 when it did not answer. `error` is the reason, "" for none.
    """

    operation: str
    rows: int
    asked_s: float
    given_s: float | None
    issued_s: float
    ended_s: float
    device_s: float
    answered_s: float
    error: str = ""


class CallSpan(Protocol):
    """A call that is traced."""

    def tile(self, tile: TracedTile) -> None:
        """A tile of it is over."""

    def ended(self, code: str, reason: str) -> None:
        """It is over, with this gRPC code by name; `reason` is the refusal's, "" for none. Called once."""


class Tracing(Protocol):
    """Makes spans. Nothing of it waits for whoever collects them."""

    def start(self, path: str, request_id: str, headers: Mapping[str, str]) -> tuple[TraceContext, CallSpan | None]:
        """A call begins: /package.Service/Method, and the W3C headers that came with it. Its context, and its span,
        None where this call is not traced."""

    async def stop(self) -> None:
        """Send what is left, for a bounded time. No call may follow."""
