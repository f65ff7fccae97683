"""Traces of a service in its own processes, sent to a collector that takes them, that hangs, or that is not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import streamindex_client
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider

from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, refused
from tests.support.http import free_port
from tests.support.services import ROOMY, wait_for
from tests.support.tensors import Draw, Kind

KIND = Kind(heads=2, head_dim=32)
FLUSH_S = 0.5


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans, by OTLP over gRPC. While `hangs` it answers nobody."""

    def __init__(self) -> None:
        self.spans = []
        self.asked = threading.Event()
        self._go_on = threading.Event()
        self._go_on.set()

    def hang(self) -> None:
        self._go_on.clear()

    def Export(self, request, context):
        self.asked.set()
        self._go_on.wait()
        self.spans += [
            span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans
        ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def __enter__(self):
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(self, *_):
        self._go_on.set()
        self._server.stop(None).wait()

    def named(self, name):
        return [span for span in self.spans if span.name.endswith(name)]


@pytest.fixture
def collector():
    with Collector() as running:
        yield running


def traced(endpoint, **others):
    return {**ROOMY, "traces": {"otlp_endpoint": endpoint, "flush_s": FLUSH_S, **others}}


def lines(service, event):
    found = [json.loads(line) for line in service.log_tail().splitlines() if line.startswith("{")]
    return [line for line in found if line["event"] == event]


def test_a_clients_span_is_the_parent_of_the_services(collector):
    draw, tracer = Draw(1), TracerProvider(shutdown_on_exit=False).get_tracer("test")
    keys, queries = draw.keys(KIND, 300), draw.queries(KIND, 5)
    with RunningService(traced(collector.endpoint)) as service:
        with Calls(service.address) as calls, calls.cache(KIND, keys) as cache:
            with streamindex_client.connect(service.address) as client, tracer.start_as_current_span("step") as step:
                client.open_key_cache(cache.id)
            calls.search(KIND, cache.id, queries, 8)
            refused(calls.delete, "nobody's")
            wait_for(lambda: lines(service, "refused"))
            (line,) = lines(service, "refused")
        wait_for(lambda: collector.named("device"))
        wait_for(lambda: collector.named("/GetKeyCache"))
    ours = step.get_span_context()
    (call,) = collector.named("/GetKeyCache")
    assert (call.trace_id.hex(), call.parent_span_id.hex()) == (f"{ours.trace_id:032x}", f"{ours.span_id:016x}")
    (search,), (tile,), (device,) = (collector.named(name) for name in ("/Search", "tile", "device"))
    assert not search.parent_span_id
    assert tile.parent_span_id == search.span_id
    assert device.parent_span_id == tile.span_id
    # what was not yet sent when the service was told to stop has come too; the log has the same trace ids
    refusal, deletion = sorted(collector.named("/DeleteKeyCache"), key=lambda span: span.start_time_unix_nano)
    assert line["trace_id"] == refusal.trace_id.hex() != deletion.trace_id.hex()


def test_a_collector_that_hangs_holds_up_no_call_and_no_stop(collector):
    collector.hang()
    service = RunningService(traced(collector.endpoint, max_queued_spans=8, export_timeout_s=60))
    service.start()
    try:
        draw = Draw(2)
        with Calls(service.address) as calls, calls.cache(KIND, draw.keys(KIND, 300)) as cache:
            calls.search(KIND, cache.id, draw.queries(KIND, 5), 8)
            assert collector.asked.wait(20)
            for _ in range(30):  # many times what may wait
                calls.search(KIND, cache.id, draw.queries(KIND, 5), 8)
            (worker,) = service.worker_pids()
            os.kill(worker, signal.SIGKILL)  # a process is started beside the exporter's call
            wait_for(lambda: calls.load().worker_restarts == 1 and calls.load().ready)
            calls.search(KIND, cache.id, draw.queries(KIND, 5), 8)
        assert not collector.spans, "the collector did not hang"
    finally:
        code = service.stop(grace_s=20)
    assert code == 0, "it had to be killed"


def test_a_collector_that_is_not_there_is_a_line_in_the_log():
    with RunningService(traced(f"http://127.0.0.1:{free_port()}")) as service, Calls(service.address) as calls:
        calls.capabilities()
        wait_for(lambda: lines(service, "spans_not_sent"))
        calls.capabilities()
        assert all(line.startswith("{") for line in service.log_tail().splitlines())
        assert len(lines(service, "spans_not_sent")) == 1


def test_without_the_extra_it_says_what_to_install(tmp_path):
    (tmp_path / "opentelemetry.py").write_text("raise ImportError('not installed')")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))),
        "STREAMINDEX_TRACES__OTLP_ENDPOINT": "http://127.0.0.1:4317",
        "STREAMINDEX_SERVER__TCP_ADDRESS": "",
        "STREAMINDEX_SERVER__UNIX_SOCKET": str(tmp_path / "s.sock"),
    }
    serve = [sys.executable, "-m", "streamindex_service", "serve"]
    done = subprocess.run(serve, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "traces.otlp_endpoint is set" in done.stderr
    assert "streamindex-service[otel]" in done.stderr
    assert "Traceback" not in done.stderr
    del environment["STREAMINDEX_TRACES__OTLP_ENDPOINT"]
    program = "import sys, streamindex_service.frontend.server; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
