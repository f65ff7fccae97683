"""One request id and one trace id in the log lines of both processes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, refused
from tests.support.services import ROOMY, wait_for
from tests.support.tensors import Draw, Kind

KIND = Kind(heads=2, head_dim=32)
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
IDS = (("x-request-id", "the-request"), ("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01"))


def lines(service: RunningService, event: str) -> list[dict[str, Any]]:
    found = [
        json.loads(line) for line in service.log_tail().splitlines() if line.startswith("{") and line.endswith("}")
    ]
    return [line for line in found if line["event"] == event]


@pytest.fixture(scope="module")
def service():
    with RunningService({**ROOMY, "log": {"level": "debug"}}) as running:
        yield running


@pytest.fixture
def calls(service):
    with Calls(service.address) as connection:
        connection.metadata = IDS
        yield connection


def test_a_refusal_is_logged_with_the_callers_ids(service, calls):
    refused(calls.get, "nobody's")
    wait_for(lambda: lines(service, "refused"))
    line = lines(service, "refused")[-1]
    assert (line["request_id"], line["trace_id"]) == ("the-request", TRACE_ID)
    assert (line["component"], line["method"]) == ("frontend", "GetKeyCache")


def test_the_workers_line_about_a_tile_has_them_too(service, calls):
    draw = Draw(3)
    with calls.cache(KIND, draw.keys(KIND, 300)) as cache:
        calls.search(KIND, cache.id, draw.queries(KIND, 5), 8)
    wait_for(lambda: lines(service, "tile"))
    line = lines(service, "tile")[-1]
    assert line["component"] == "worker"
    assert (line["request_id"], line["trace_id"]) == ("the-request", TRACE_ID)
    assert line["rows"] == 5


def test_a_call_without_ids_gets_its_own(service):
    with Calls(service.address) as anonymous:
        refused(anonymous.get, "nobody's")
        refused(anonymous.get, "nobody's")
    wait_for(lambda: len(lines(service, "refused")) >= 2)
    one, other = lines(service, "refused")[-2:]
    assert re.fullmatch("[0-9a-f]{32}", one["trace_id"])
    assert one["trace_id"] != other["trace_id"]
    assert one["request_id"] != other["request_id"]
