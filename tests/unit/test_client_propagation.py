"""The current span goes with each call of a client whose process has OpenTelemetry."""

from __future__ import annotations

import subprocess
import sys

from opentelemetry.sdk.trace import TracerProvider
from streamindex_client.aio_driver import AioDriver
from streamindex_client.propagation import trace_headers
from streamindex_client.sync_driver import SyncDriver

TRACER = TracerProvider(shutdown_on_exit=False).get_tracer("test")


def expected(span) -> str:
    its = span.get_span_context()
    return f"00-{its.trace_id:032x}-{its.span_id:016x}-{its.trace_flags:02x}"


def test_the_current_span_and_none():
    assert trace_headers(()) == ()
    with TRACER.start_as_current_span("step") as span:
        assert trace_headers((("x", "y"),)) == (("traceparent", expected(span)),)
    assert trace_headers(()) == ()


def test_a_traceparent_of_the_callers_own_wins():
    with TRACER.start_as_current_span("step"):
        assert trace_headers((("traceparent", "the caller's"),)) == ()


def test_both_clients_send_it_with_their_own_metadata():
    own = (("authorization", "Bearer x"),)
    with TRACER.start_as_current_span("step") as span:
        sent = [dict(driver(None, own, str)._tag("id")) for driver in (SyncDriver, AioDriver)]
    assert sent == [{**dict(own), "traceparent": expected(span), "x-request-id": "id"}] * 2


def test_opentelemetry_is_not_imported_for_it():
    program = (
        "import sys\n"
        "from streamindex_client.propagation import trace_headers\n"
        "assert trace_headers(()) == ()\n"
        "assert not any(name.partition('.')[0] == 'opentelemetry' for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
