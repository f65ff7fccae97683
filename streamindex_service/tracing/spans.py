"""Spans of calls and tiles.

A call is a server span; its parent is in the `traceparent` that came with it. Below it each tile is a span with three
parts: `queue` until its turn, `transfer` to the device, behind other tiles and copies, and `device`. Tiles after the
first few are told in groups, each of twice as many as the one before: a call of a million tiles has a few dozen spans.

The worker has no OpenTelemetry and no connection but that to the frontend: it says when a tile began and ended, and the
spans of both processes are made here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from streamindex_service import __version__
from streamindex_service.telemetry.spans import CallSpan, TracedTile
from streamindex_service.telemetry.trace import TraceContext

# OpenTelemetry's semantic conventions: of a server, these are its own failures; the others are the caller's.
_SERVER_ERRORS = frozenset(("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"))
_PROPAGATOR = TraceContextTextMapPropagator()


class SpanTracing:
    """Makes spans with a provider. `max_tiles` of a call have spans of their own."""

    def __init__(self, provider: TracerProvider, max_tiles: int) -> None:
        self._tracer = provider.get_tracer("streamindex_service", __version__)
        self._max_tiles = max_tiles

    def start(self, path: str, request_id: str, headers: Mapping[str, str]) -> tuple[TraceContext, CallSpan | None]:
        """A call begins; see `telemetry.spans.Tracing`."""
        parent = _PROPAGATOR.extract(headers, Context())
        attributes = {
            "rpc.system.name": "grpc",
            "rpc.method": path.lstrip("/"),
            "streamindex.request_id": request_id,
        }
        span = self._tracer.start_span(path.lstrip("/"), parent, SpanKind.SERVER, attributes)
        its = span.get_span_context()
        context = TraceContext(f"{its.trace_id:032x}", f"{its.span_id:016x}", flags=f"{its.trace_flags:02x}")
        return context, _CallSpan(self._tracer, span, self._max_tiles) if span.is_recording() else None

    async def stop(self) -> None:
        """Nothing is left: the provider is its owner's."""


class _CallSpan:
    def __init__(self, tracer: Tracer, span: Span, max_tiles: int) -> None:
        self._tracer = tracer
        self._span = span
        self._within = set_span_in_context(span, Context())
        # Tiles are told in seconds of the monotonic clock, spans are in nanoseconds of the wall clock.
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._max_tiles = max_tiles
        self._tiles = 0
        self._group = _Sum()
        self._group_size = max_tiles
        self._all = _Sum()

    def tile(self, tile: TracedTile) -> None:
        """A tile of the call is over. After the end of the call it is too late to tell."""
        if not self._span.is_recording():
            return
        self._all.add(tile)
        if self._tiles < self._max_tiles:
            self._tiles += 1
            self._one(tile)
            return
        self._group.add(tile)
        if self._group.tiles == self._group_size:
            self._end_group()
            self._group_size *= 2

    def ended(self, code: str, reason: str) -> None:
        """The call is over."""
        if self._group.tiles:
            self._end_group()
        if self._all.tiles:
            self._span.set_attributes(self._all.attributes())
        self._span.set_attribute("rpc.response.status_code", code)
        if reason:
            self._span.set_attribute("error.type", reason)
        if code in _SERVER_ERRORS:
            self._span.set_status(Status(StatusCode.ERROR, reason))
        self._span.end()

    def _one(self, tile: TracedTile) -> None:
        attributes: dict[str, str | int] = {
            "streamindex.operation": tile.operation,
            "streamindex.rows": tile.rows,
        }
        span = self._tracer.start_span("tile", self._within, attributes=attributes, start_time=self._at(tile.asked_s))
        within = set_span_in_context(span, Context())
        given_s = tile.answered_s if tile.given_s is None else tile.given_s
        self._part("queue", within, tile.asked_s, given_s)
        if tile.ended_s:  # the worker's clock is ours, but it may have been read a little before what it is compared to
            ended_s = min(tile.answered_s, max(given_s, tile.ended_s))
            began_s = max(given_s, ended_s - tile.device_s)
            transfer = self._part("transfer", within, given_s, began_s, end=False)
            transfer.add_event("issued", timestamp=self._at(min(max(given_s, tile.issued_s), began_s)))
            transfer.end(self._at(began_s))
            self._part("device", within, began_s, ended_s)
        if tile.error:
            span.set_attribute("error.type", tile.error)
            span.set_status(Status(StatusCode.ERROR, tile.error))
        span.end(self._at(tile.answered_s))

    def _part(self, name: str, within: Context, start_s: float, end_s: float, end: bool = True) -> Span:
        span = self._tracer.start_span(name, within, start_time=self._at(start_s))
        if end:
            span.end(self._at(end_s))
        return span

    def _end_group(self) -> None:
        group, self._group = self._group, _Sum()
        attributes = group.attributes()
        span = self._tracer.start_span("tiles", self._within, attributes=attributes, start_time=self._at(group.start_s))
        if group.failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._at(group.end_s))

    def _at(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset_ns


class _Sum:
    """Of many tiles."""

    def __init__(self) -> None:
        self.tiles = self.failed = self._rows = 0
        self._queue_s = self._transfer_s = self._device_s = 0.0
        self.start_s, self.end_s = float("inf"), 0.0

    def add(self, tile: TracedTile) -> None:
        """One more."""
        given_s = tile.answered_s if tile.given_s is None else tile.given_s
        self.tiles += 1
        self.failed += bool(tile.error)
        self._rows += tile.rows
        self._queue_s += given_s - tile.asked_s
        self._transfer_s += max(0.0, tile.answered_s - given_s - tile.device_s)
        self._device_s += tile.device_s
        self.start_s = min(self.start_s, tile.asked_s)
        self.end_s = max(self.end_s, tile.answered_s)

    def attributes(self) -> dict[str, int | float]:
        """Their sums; the times of tiles that overlapped count one by one."""
        return {
            "streamindex.tiles": self.tiles,
            "streamindex.failed_tiles": self.failed,
            "streamindex.rows": self._rows,
            "streamindex.queue_s": self._queue_s,
            "streamindex.transfer_s": self._transfer_s,
            "streamindex.device_s": self._device_s,
        }
