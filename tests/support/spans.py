"""Spans that were made, by name and parent."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from streamindex_service.tracing.spans import SpanTracing
from tests.support.services import wait_for


class KeptSpans:
    """Tracing that keeps its spans in memory."""

    def __init__(self, max_tiles: int) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = SpanTracing(provider, max_tiles)

    def clear(self) -> None:
        self._exporter.clear()

    @property
    def all(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all if span.name == name]

    def call(self, method: str) -> ReadableSpan:
        """The span of the only call of this method; it ends a little after the caller has its answer."""
        wait_for(lambda: [span for span in self.all if span.name.endswith(f"/{method}")])
        (span,) = [span for span in self.all if span.name.endswith(f"/{method}")]
        return span

    def below(self, parent: ReadableSpan, name: str) -> list[ReadableSpan]:
        return [span for span in self.named(name) if span.parent and span.parent.span_id == parent.context.span_id]
