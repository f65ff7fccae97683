"""The metrics port of a real service: what Prometheus reads agrees with what GetLoad and the callers say."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from streamindex.v1 import search_pb2, server_pb2

from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, refused, start_message
from tests.support.http import free_port, request
from tests.support.promql import Series, legend_labels, missing
from tests.support.services import ROOMY, is_idle, wait_for
from tests.support.tensors import Draw, Kind

KIND = Kind(heads=2, head_dim=32)
ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
ALERTS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
SCRAPES = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
PANELS = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "streamindex.json").read_text())["panels"]


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def service(port: int) -> Iterator[RunningService]:
    with RunningService({**ROOMY, "metrics": {"port": port}}) as running:
        yield running


@pytest.fixture
def calls(service: RunningService) -> Iterator[Calls]:
    with Calls(service.address) as connection:
        yield connection


def scrape(port: int) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and labels."""
    answer = request(port, "/metrics")
    assert answer.status == 200
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            of_name = found.setdefault(sample.name, {})
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in of_name, f"{sample.name} twice with {labels}"
            of_name[labels] = sample.value
    return found


def value(found: dict[str, dict[tuple[tuple[str, str], ...], float]], name: str, **labels: str) -> float:
    return found.get(f"streamindex_{name}", {}).get(tuple(sorted(labels.items())), 0.0)


def test_ledgers_are_those_of_get_load(service, calls, port):
    with calls.cache(KIND, Draw(1).keys(KIND, 600)):
        found, load = scrape(port), calls.load()
    assert {ledger.name for ledger in load.ledgers} == {"hbm", "host", "ingress"}
    for ledger in load.ledgers:
        for figure in ("limit", "reserved", "peak", "spare"):
            said = getattr(ledger, f"{figure}_bytes")
            assert value(found, f"ledger_{figure}_bytes", ledger=ledger.name) == said, (ledger.name, figure)
    assert value(found, "key_caches") == 1
    assert value(found, "ready") == 1


def test_calls_tiles_and_bytes_are_counted(service, calls, port):
    draw = Draw(2)
    rows, queries = draw.keys(KIND, 600), draw.queries(KIND, 40, start_position=590)
    before = scrape(port)
    with calls.cache(KIND, rows) as cache:
        calls.search(KIND, cache.id, queries, 8)
        wait_for(lambda: is_idle(calls.load()))
    after = scrape(port)

    def more(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert more("calls_total", method="Search", code="OK") == 1
    assert more("calls_total", method="AppendKeys", code="OK") == 1
    assert more("call_duration_seconds_count", method="Search") == 1
    assert more("call_duration_seconds_sum", method="Search") > 0
    assert more("upload_bytes_total") == len(rows.key_bytes(KIND))
    assert more("queries_total") == 40
    tiles = more("tiles_total")
    assert tiles >= 1
    for phase in ("queue", "transfer", "device"):
        assert more("tile_phase_seconds_count", method="Search", phase=phase) == tiles
    device_s = more("tile_phase_seconds_sum", method="Search", phase="device")
    assert device_s == pytest.approx(more("device_busy_seconds_total"))
    assert more("promoted_pages_total") == 3
    assert value(after, "running_calls", method="Search") == 0


def test_refusals_are_counted_by_reason_those_of_a_batch_too(service, calls, port):
    before = scrape(port)
    refused(calls.get, "nobody's")
    request_of_two = search_pb2.SearchBatchRequest(items=[search_pb2.SearchBatchItem(key_cache_id="x")] * 2, top_k=4)
    calls.searches.SearchBatch(request_of_two, timeout=20)
    after = scrape(port)
    name = "refusals_total"
    assert value(after, name, reason="CACHE_NOT_FOUND") - value(before, name, reason="CACHE_NOT_FOUND") == 3
    assert value(after, "calls_total", method="GetKeyCache", code="NOT_FOUND") >= 1


def test_a_lost_worker_is_counted():
    port = free_port()
    with RunningService({**ROOMY, "metrics": {"port": port}}) as service:
        (worker,) = service.worker_pids()
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: value(scrape(port), "worker_restarts_total") == 1)
        wait_for(lambda: request(port, "/healthz").status == 200)
        assert value(scrape(port), "ready") == 1


def test_histograms_are_cumulative_and_end_with_all(service, calls, port):
    found = scrape(port)
    buckets: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    for labels, count in found["streamindex_call_duration_seconds_bucket"].items():
        rest = tuple(pair for pair in labels if pair[0] != "le")
        buckets.setdefault(rest, []).append((float(dict(labels)["le"]), count))
    assert buckets
    for labels, pairs in buckets.items():
        counts = [count for _, count in sorted(pairs)]
        assert counts == sorted(counts)
        assert counts[-1] == found["streamindex_call_duration_seconds_count"][labels]


def test_the_operations_guide_lists_exactly_these_metrics(service, calls, port):
    body = request(port, "/metrics").body.decode()
    families = [family for family in text_string_to_metric_families(body) if family.name.startswith("streamindex_")]
    exported = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert exported == set(re.findall(r"`(streamindex_[a-z_]+)", OPERATIONS))
    assert all(family.documentation for family in families)


@pytest.fixture
def exported(calls, port) -> dict[str, Series]:
    """Labels of all series that there are once a search was served, by sample, and Prometheus's own `up`."""
    draw = Draw(4)
    with calls.cache(KIND, draw.keys(KIND, 300)) as cache:
        calls.search(KIND, cache.id, draw.queries(KIND, 5), 8)
    found = {name: [dict(labels) for labels in series] for name, series in scrape(port).items()}
    return {**found, "up": [{"job": each["job_name"]} for each in SCRAPES]}


def test_what_the_alerts_ask_for_is_exported(exported):
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    for rule in rules:
        assert missing(rule["expr"], exported) == [], rule["alert"]
        assert rule.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}, rule["alert"]
        assert re.fullmatch(r"\d+[sm]", rule.get("for", "1m"))
        assert rule["labels"].keys() == {"severity"}
        assert rule["annotations"].keys() == {"summary", "description"}


def test_what_the_dashboard_asks_for_is_exported(exported):
    for panel in PANELS:
        for target in panel["targets"]:
            assert missing(target["expr"], exported) == [], panel["title"]
            shown = legend_labels(target.get("legendFormat") or "")
            labels = {label for name in exported if name in target["expr"] for each in exported[name] for label in each}
            assert shown <= labels, panel["title"]


def test_what_callers_make_up_makes_no_series(calls, port):
    """Every series is held for as long as the service runs, and in Prometheus longer than that."""

    def series() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        found = scrape(port)
        return {(name, labels) for name in found if name.startswith("streamindex_") for labels in found[name]}

    before = series()
    for number in range(20):
        for path in ("/streamindex.v1.SearchService/Made{}", "/streamindex.v1.Made{}/Search", "/made.up{}/Search"):
            with pytest.raises(grpc.RpcError) as caught:
                calls.channel.unary_unary(path.format(number))(b"", timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        metadata = (("x-request-id", f"id-{number}"), ("x-made-up", "x" * number))
        calls.server.GetLoad(server_pb2.GetLoadRequest(), timeout=20, metadata=metadata)
    assert series() == before


def test_a_query_for_what_nobody_exports_is_found(exported):
    for query, what in (
        ("streamindex_redy == 0", "streamindex_redy"),
        ('streamindex_ledger_limit_bytes{ledger="device"} > 1', "ledger='device'"),
        ('rate(streamindex_refusals_total{reason=~"QUEUE_FULL|QUEUE_EMPTY"}[5m])', "reason='QUEUE_EMPTY'"),
        ("1 - sum by (caller) (streamindex_queue_tiles)", "by caller"),
    ):
        (found,) = missing(query, exported)
        assert what in found
    with pytest.raises(ValueError, match="parenthesis"):
        missing("sum(streamindex_ready", exported)


def test_the_process_itself_is_measured(service, port):
    found = scrape(port)
    assert found["process_resident_memory_bytes"][()] > 1 << 20
    assert found["process_open_fds"][()] > 3


def test_openmetrics_is_spoken_to_who_asks_for_it(service, port):
    answer = request(port, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.body.rstrip().endswith(b"# EOF")


def test_the_page_allows_nothing_but_what_is_in_it(service, port):
    answer = request(port, "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", answer.body.decode()), "something from elsewhere"
    assert b"innerHTML" not in answer.body


def test_the_pages_figures_name_no_caller(service, calls, port):
    with calls.cache(KIND):
        status = json.loads(request(port, "/status.json").body)
    assert int(status["load"]["key_caches"]) == 1
    assert {each["method"] for each in status["calls"]} >= {"CreateKeyCache", "GetLoad"}
    assert "anonymous" not in json.dumps(status)


def test_not_ready_while_draining():
    port = free_port()
    with (
        RunningService({**ROOMY, "metrics": {"port": port}}) as service,
        Calls(service.address) as calls,
        calls.cache(KIND) as cache,
        calls.append_call() as call,
    ):
        call.send(start_message(cache.id, 10))
        call.receive("accepted")
        service.process.terminate()
        wait_for(lambda: request(port, "/healthz").status == 503)
        assert request(port, "/livez").status == 200
