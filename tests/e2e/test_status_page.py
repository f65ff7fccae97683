"""The status page in a headless browser, where there is one: Chromium by any of its names, or the one that
STREAMINDEX_BROWSER names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls
from tests.support.http import free_port, request
from tests.support.services import ROOMY, is_idle, wait_for
from tests.support.tensors import Draw, Kind

KIND = Kind(heads=2, head_dim=32)
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
BROWSER = os.environ.pop("STREAMINDEX_BROWSER", "") or next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this host")


def shown(url: str, profile: Path) -> tuple[str, str]:
    """The page's elements after some seconds, and the browser's log."""
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0",
            "--virtual-time-budget=4000", "--dump-dom", url,
        ],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


def cells(page: str, table: str) -> list[list[str]]:
    (inner,) = re.findall(rf'<table id="{table}">(.*?)</table>', page, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", inner, re.DOTALL)
    return [
        [re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows
    ]


def test_the_page_shows_what_the_service_does(tmp_path):
    port, draw = free_port(), Draw(5)
    with RunningService({**ROOMY, "metrics": {"port": port}}) as service, Calls(service.address) as calls:
        rows, queries = draw.keys(KIND, 600), draw.queries(KIND, 40, start_position=590)
        with calls.cache(KIND, rows) as cache:
            calls.search(KIND, cache.id, queries, 8)
            wait_for(lambda: is_idle(calls.load()))
            page, log = shown(f"http://127.0.0.1:{port}/", tmp_path)
            assert "Refused to" not in log, "the page's own policy stops it"
            assert "Uncaught" not in log
            assert '<span id="state" role="status" class="">ready</span>' in page
            ledgers = {row[0]: row for row in cells(page, "ledgers")}
            assert ledgers.keys() >= {"hbm", "host", "ingress"}
            assert ledgers["host"][-1] == "256"
            figures = dict(cells(page, "figures"))
            assert figures["key caches"] == "1"
            assert figures["tiles done"] == str(calls.load().device.tiles_done)
            assert [row[0] for row in cells(page, "queue")[1:4]] == ["interactive", "standard", "batch"]
            methods = {row[0]: row for row in cells(page, "calls")}
            assert methods["Search"][2:4] == ["1", "0"]
            (points,) = re.findall(r'<polyline id="busy" points="([^"]+)"', page)
            assert len(points.split()) >= 3, "it was not refreshed"


def test_the_page_says_when_nobody_answers(tmp_path):
    port = free_port()
    with RunningService({**ROOMY, "metrics": {"port": port, "allow_remote": True}}):
        page = tmp_path / "page.html"
        page.write_bytes(request(port, "/").body)
    found, _ = shown(page.as_uri(), tmp_path / "profile")
    assert '<span id="state" role="status" class="bad">no answer</span>' in found
