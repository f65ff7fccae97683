"""The status page, live in a headless browser, where there is one: Chromium by any of its names, or the one that
STREAMINDEX_BROWSER names."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack

import pytest

from streamindex_service.testing.service import RunningService
from tests.support.browser import NAMES, Browser, find_browser
from tests.support.calls import Calls, query_chunk, refused
from tests.support.http import free_port
from tests.support.services import ROOMY, is_idle, wait_for
from tests.support.tensors import Draw, Kind

KIND = Kind(heads=2, head_dim=32)
BROWSER = find_browser()
STATE = "document.getElementById('state')?.textContent"  # the page may not be there yet
# Two tiles at the device, so that others wait; a worker that is stopped is not taken for one that hangs.
SETTINGS = {
    **ROOMY,
    "scheduler": {"max_device_tiles": 2},
    "worker": {**ROOMY["worker"], "heartbeat_timeout_s": 600, "work_timeout_s": 600},
}

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH, STREAMINDEX_BROWSER names none"
)


def table(name):
    """JavaScript: the texts of a table's cells."""
    return (
        f"Array.from(document.querySelectorAll('#{name} tr'), "
        "(row) => Array.from(row.cells, (cell) => cell.textContent))"
    )


def cells(browser, name):
    """Rows of a table by their first cell."""
    return {row[0]: row[1:] for row in browser.evaluate(table(name))}


def becomes(browser, name, row, column, text):
    """Wait until a row, by its first cell, is there and says so in this column of the others."""
    browser.until(table(name), lambda rows: [text] == [each[1:][column] for each in rows if each[0] == row])


@pytest.fixture
def page(tmp_path):
    """A service, calls on it, and a browser that shows its page, from before the first call on."""
    port = free_port()
    with (
        RunningService({**SETTINGS, "metrics": {"port": port}}) as service,
        Calls(service.address) as calls,
        Browser(str(BROWSER), tmp_path / "profile") as browser,
    ):
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until(STATE, lambda text: text == "ready")
        yield service, calls, browser, f"http://127.0.0.1:{port}/"


def test_figures_change_while_the_page_is_looked_at(page):
    _, calls, browser, address = page
    draw = Draw(5)
    assert cells(browser, "figures")["tiles done"] == ["0"]
    assert "Search" not in cells(browser, "calls")
    in_use = cells(browser, "ledgers")["host"][1]
    with calls.cache(KIND, draw.keys(KIND, 30_000)) as cache:
        becomes(browser, "figures", "key caches", 0, "1")
        calls.search(KIND, cache.id, draw.queries(KIND, 40, start_position=590), 8)
        becomes(browser, "calls", "Search", 1, "1")
        assert float(cells(browser, "ledgers")["host"][1]) > float(in_use)
        wait_for(lambda: is_idle(calls.load()))
        becomes(browser, "figures", "tiles done", 0, str(calls.load().device.tiles_done))
        resident_mib = f"{calls.load().device.resident_bytes / (1 << 20):.1f}"
        assert cells(browser, "figures")["keys on the device, MiB"] == [resident_mib]
        becomes(browser, "figures", "on the device wholly · partly · not at all", 0, "1 · 0 · 0")
        assert cells(browser, "figures")["wholly or partly on disk"] == ["0"]
        found = cells(browser, "calls")["Search"]
        assert found[2] == "0"
        assert all(latency.startswith("≤ ") and latency != "≤ 0 ms" for latency in found[3:])
        refused(calls.get, "nobody's")
        becomes(browser, "calls", "GetKeyCache", 2, "1")
    becomes(browser, "figures", "key caches", 0, "0")
    ledgers = cells(browser, "ledgers")
    assert ledgers.keys() >= {"hbm", "host", "ingress"}
    assert ledgers["host"][-1] == "256"
    assert browser.problems == []
    assert len(browser.requests) > 3, "it was not refreshed"
    assert [url for url in browser.requests if not url.startswith((address, "data:"))] == []


def test_what_waits_for_the_device_is_shown(page):
    service, calls, browser, _ = page
    draw = Draw(6)
    (worker,) = service.worker_pids()
    with calls.cache(KIND, draw.keys(KIND, 300)) as cache, ExitStack() as searches:
        os.kill(worker, signal.SIGSTOP)
        try:
            for _ in range(5):
                search = searches.enter_context(calls.start_search(KIND, cache.id, 8))
                search.send(query_chunk(KIND, draw.queries(KIND, 5), 0, 5))
            wait_for(lambda: calls.load().queue.tiles == 3)
            becomes(browser, "queue", "standard", 0, "3")
            becomes(browser, "figures", "searches running · waiting", 0, "2 · 3")
            assert [row[0] for row in browser.evaluate(table("queue"))[1:4]] == ["interactive", "standard", "batch"]
            browser.until("document.getElementById('waiting-now').textContent", lambda text: text == "3")
        finally:
            os.kill(worker, signal.SIGCONT)
    becomes(browser, "queue", "standard", 0, "0")
    points = browser.evaluate("document.getElementById('waiting').getAttribute('points')")
    heights = {point.partition(",")[2] for point in points.split()}
    assert len(heights) >= 2, "the curve of waiting tiles is flat"
    assert browser.problems == []


def test_the_page_says_when_nobody_answers_any_more(page):
    service, _, browser, _ = page
    assert browser.evaluate("document.getElementById('state').className") == ""
    service.stop()
    browser.until(STATE, lambda text: text == "no answer")
    assert browser.evaluate("document.getElementById('state').className") == "bad"
