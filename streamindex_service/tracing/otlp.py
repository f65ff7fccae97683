"""Spans to a collector, by OTLP over gRPC, on a thread of the exporter's own. What the collector does not take is
dropped: a call never waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import uuid
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from streamindex_service import __version__
from streamindex_service.config import TraceSettings
from streamindex_service.tracing.spans import SpanTracing

_BATCH_SPANS = 512
_QUIET_S = 60.0


class OtlpTracing(SpanTracing):
    """Spans that go to a collector."""

    def __init__(self, settings: TraceSettings) -> None:
        self._flush_s = settings.flush_s
        self._exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint, timeout=settings.export_timeout_s)
        resource = Resource.create(
            {
                "service.name": os.environ.get("OTEL_SERVICE_NAME", "streamindex"),
                "service.version": __version__,
                "service.instance.id": str(uuid.uuid4()),
            }
        )
        self._provider = TracerProvider(
            ParentBased(TraceIdRatioBased(settings.sample_share)), resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                self._exporter,
                max_queue_size=settings.max_queued_spans,
                max_export_batch_size=min(_BATCH_SPANS, settings.max_queued_spans),
                schedule_delay_millis=1000,
                export_timeout_millis=1000 * settings.export_timeout_s,
            )
        )
        super().__init__(self._provider, settings.max_tiles)

    async def stop(self) -> None:
        """Send what is left, for `traces.flush_s` at most; then it is given up."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # nobody waits any more, and the loop is closed
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=flush, name="flush-spans", daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), self._flush_s)
        except TimeoutError:
            self._exporter.shutdown()


class _ToLog(logging.Handler):
    """What the exporter has to say becomes a line of our log, and not more often than once in a while."""

    def __init__(self, log: Any) -> None:
        super().__init__(logging.WARNING)
        self._log = log
        self._quiet_until = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """A line."""
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_S
            self._log.warning("spans_not_sent", detail=record.getMessage())


def otlp_tracing(settings: TraceSettings, log: Any) -> OtlpTracing:
    """Spans to `traces.otlp_endpoint`."""
    theirs = logging.getLogger("opentelemetry")
    theirs.handlers = [_ToLog(log)]
    theirs.propagate = False
    return OtlpTracing(settings)
