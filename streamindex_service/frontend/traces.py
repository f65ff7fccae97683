"""Whether calls are traced. OpenTelemetry is imported here, and only when the settings ask for it."""

from __future__ import annotations

from typing import Any

from streamindex_service.config import TraceSettings
from streamindex_service.telemetry.spans import Tracing


class ExtraMissingError(RuntimeError):
    """The packages of the extra `otel` cannot be imported."""


def tracing_of(settings: TraceSettings, log: Any) -> Tracing | None:
    """What makes spans; None without `traces.otlp_endpoint`. Raises ExtraMissingError."""
    if not settings.otlp_endpoint:
        return None
    try:
        from streamindex_service.tracing.otlp import otlp_tracing
    except ImportError as error:
        raise ExtraMissingError(
            f"traces.otlp_endpoint is set, and OpenTelemetry cannot be imported ({error}): "
            "pip install 'streamindex-service[otel]'"
        ) from error
    return otlp_tracing(settings, log)
