"""The live view, from figures alone."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from streamindex.v1 import server_pb2 as pb

from streamindex_service.core.meter import Meter
from streamindex_service.top import busy_share, watch

LOAD = pb.GetLoadResponse(
    ledgers=[pb.Ledger(name="hbm", limit_bytes=100 << 20, reserved_bytes=25 << 20, peak_bytes=50 << 20)],
    queued_searches=7,
    running_searches=3,
    residency=pb.KeyCacheResidency(device=1201, partial=33, none=40_007, spilled=555),
    ready=True,
    uptime_ms=2000,
    queue=pb.QueueLoad(
        tiles=9,
        bands=[
            pb.BandLoad(priority=1, tiles=2, wait=pb.Latency(p50_us=330, p99_us=440)),
            pb.BandLoad(priority=3, tiles=7),
        ],
        callers=[pb.CallerLoad(caller="[red]greedy", tiles=8, estimated_us=12_500)],
    ),
    device=pb.DeviceLoad(
        tiles=2,
        tiles_done=1234,
        busy_us=500_000,
        run=pb.Latency(p50_us=1500, p99_us=2500),
        memory=pb.MemoryEstimates(large_tiles=4321, last_ratio=0.97, least_ratio=0.9, most_ratio=0.99, failures=17),
    ),
)


def shown(*loads: pb.GetLoadResponse) -> str:
    text = io.StringIO()
    watch(loads, Console(file=text, width=120), "here:1")
    return text.getvalue()


def test_what_is_shown():
    text = shown(LOAD)
    for words in (
        "here:1",
        "3 running, 7 waiting",
        "1,201 · 33 · 40,007",
        "555",
        "25.0",
        "50.0",
        "100.0",
        "1,234",
        "1.50 · 2.50 ms",
        "25%",
        "0.970 · 0.900 to 0.990 of 4,321",
        "17",
    ):
        assert words in text
    assert "0.33 · 0.44" in text
    assert "not measured" in shown(pb.GetLoadResponse())
    assert "[red]greedy" in text  # a caller's name is text, whatever it is


@pytest.mark.parametrize(
    ("busy_us", "uptime_ms", "share"),
    [(500_000, 3000, 0.0), (1_000_000, 3000, 0.5), (9_000_000, 3000, 1.0), (0, 2000, 0.0)],
)
def test_how_busy_it_is_comes_from_two_looks(busy_us, uptime_ms, share):
    later = pb.GetLoadResponse(uptime_ms=uptime_ms, device=pb.DeviceLoad(busy_us=busy_us))
    assert busy_share(later, LOAD) == share


def test_quantiles_are_of_the_tiles_of_late():
    meter = Meter()
    assert meter.waits() == meter.runs() == (0.0, 0.0)
    for number in range(5000):
        meter.tile_done(0.5, number / 1000)
    assert (meter.tiles, meter.waits()) == (5000, (0.5, 0.5))
    assert meter.runs().p50_s == pytest.approx(4.488, abs=0.01)
    assert meter.runs().p99_s == pytest.approx(4.989, abs=0.01)
