"""Counters, trace contexts, and the ids of log lines."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from streamindex_service.telemetry import logs, trace
from streamindex_service.telemetry.counters import SECONDS, Counters, Histogram

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_value_on_a_bound_is_below_it():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.add(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.total == 7.5


def test_quantiles_are_upper_bounds():
    histogram = Histogram((1.0, 2.0, 3.0))
    assert histogram.quantile(0.5) == 0.0
    for value in [0.5] * 98 + [1.5, 9.0]:
        histogram.add(value)
    assert histogram.quantile(0.5) == 1.0
    assert histogram.quantile(0.99) == 2.0
    assert histogram.quantile(1.0) == float("inf")


def test_bounds_rise():
    assert list(SECONDS) == sorted(set(SECONDS))


def test_a_clock_that_disagrees_makes_no_negative_time():
    counters = Counters().of("Search")
    counters.tile_done(0.1, -0.002, 0.3)
    assert counters.transfer.total == 0.0
    assert (counters.queue.total, counters.device.total) == (0.1, 0.3)


def test_a_trace_goes_on():
    context = trace.of_call(PARENT)
    assert context.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert context.parent_id == "b7ad6b7169203331"
    assert context.span_id != context.parent_id
    assert context.traceparent == f"00-{context.trace_id}-{context.span_id}-01"
    passed_on = trace.read(context.traceparent)
    assert passed_on is not None
    assert (passed_on.trace_id, passed_on.span_id, passed_on.flags) == (context.trace_id, context.span_id, "01")


def test_later_versions_may_say_more():
    assert trace.of_call("cc" + PARENT[2:] + "-what-the-future-brings").parent_id == "b7ad6b7169203331"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00",
        PARENT + "-more",
        PARENT.upper(),
        "ff" + PARENT[2:],
        PARENT.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
        PARENT.replace("b7ad6b7169203331", "0" * 16),
        PARENT + "\n",
    ],
)
def test_a_malformed_header_starts_a_trace_of_its_own(header):
    one, other = trace.of_call(header), trace.of_call(header)
    assert one.parent_id == ""
    assert len(one.trace_id) == 32
    assert one.trace_id != other.trace_id


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    before, last_resort = structlog.get_config(), logging.lastResort
    yield
    structlog.configure(**before)
    logging.lastResort = last_resort


@pytest.mark.usefixtures("_logging_as_before")
def test_bound_ids_are_in_the_lines_within(capsys):
    logs.configure("debug")
    log = logs.get("worker")
    with logs.bound(request_id="r1", trace_id="t1"):
        log.debug("inside")
    log.debug("outside")
    inside, outside = map(json.loads, capsys.readouterr().err.splitlines())
    assert (inside["request_id"], inside["trace_id"]) == ("r1", "t1")
    assert "request_id" not in outside


def passed(limit: logs.Limit, event: str, method: str = "info") -> dict[str, object] | None:
    try:
        return dict(limit(None, method, {"event": event}))
    except structlog.DropEvent:
        return None


def test_lines_of_one_kind_are_bounded_by_the_second():
    now = [7.9]
    limit = logs.Limit(2, lambda: now[0])
    assert [passed(limit, "refused") is not None for _ in range(5)] == [True, True, False, False, False]
    assert passed(limit, "expired") == {"event": "expired"}, "another kind has its own bound"
    now[0] = 8.0
    assert passed(limit, "refused") == {"event": "refused", "left_out": 3}
    assert passed(limit, "refused") == {"event": "refused"}, "told once"
    assert passed(limit, "refused") is None


def test_lines_for_debugging_are_not_bounded():
    limit = logs.Limit(1, lambda: 1.0)
    assert all(passed(limit, "tile", "debug") for _ in range(10))


@pytest.mark.usefixtures("_logging_as_before")
def test_what_libraries_log_has_the_same_form(capsys, monkeypatch):
    logs.configure()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # a service has none; pytest has its own

    async def nobody_looks() -> None:
        asyncio.get_running_loop().call_exception_handler({"message": "of asyncio", "exception": ValueError("x")})

    asyncio.run(nobody_looks())
    logging.getLogger("a.library").warning("of %s", "a library")
    logging.getLogger("a.library").info("less severe")
    one, other = map(json.loads, capsys.readouterr().err.splitlines())
    assert (one["component"], one["event"], one["level"]) == ("asyncio", "library", "error")
    assert "of asyncio" in one["detail"]
    assert "ValueError: x" in one["exception"]
    assert (other["component"], other["detail"], other["level"]) == ("a.library", "of a library", "warning")
