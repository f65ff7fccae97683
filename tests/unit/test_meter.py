"""Figures of what the device did."""

from __future__ import annotations

from streamindex_service.core.band_queue import Band
from streamindex_service.core.meter import LARGE_BYTES, RATIO_BOUNDS, MemoryRatios, Meter


def test_ratios_of_large_tiles_are_counted_by_bounds():
    ratios = MemoryRatios()
    for part in (1.0, 0.81, 0.8, 0.97, 1.001, 0.3):
        ratios.add(int(part * 1000 * LARGE_BYTES), 1000 * LARGE_BYTES)
    assert ratios.large_tiles == sum(ratios.counts) == 6
    assert dict(zip((*RATIO_BOUNDS, "above"), ratios.counts, strict=True)) == {
        0.5: 1, 0.8: 1, 0.9: 1, 0.95: 0, 1.0: 2, "above": 1
    }  # fmt: skip
    assert (round(ratios.last, 3), round(ratios.least, 3), round(ratios.most, 3)) == (0.3, 0.3, 1.001)


def test_small_tiles_count_for_the_most_alone_and_what_was_not_measured_for_nothing():
    ratios = MemoryRatios()
    ratios.add(LARGE_BYTES - 1, LARGE_BYTES - 1)
    for measured, estimated in ((0, LARGE_BYTES), (LARGE_BYTES, 0)):
        ratios.add(measured, estimated)
    assert (ratios.large_tiles, ratios.least, ratios.most, ratios.most_of_any) == (0, 0.0, 0.0, 1.0)


def test_waits_are_told_by_band():
    meter = Meter()
    for waited_s in (0.1, 0.2, 0.3):
        meter.tile_done(waited_s, 0.01, Band.BATCH)
    meter.tile_done(0.001, 0.01, Band.INTERACTIVE)
    assert meter.waits(Band.BATCH).p50_s == 0.2
    assert meter.waits(Band.INTERACTIVE).p99_s == 0.001
    assert meter.waits(Band.STANDARD) == (0.0, 0.0)
    assert meter.waits().p50_s == 0.1
    assert (meter.tiles, round(meter.device_s, 3)) == (4, 0.04)
