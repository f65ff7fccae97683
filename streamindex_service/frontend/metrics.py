"""The service's figures as Prometheus metrics; docs/operations.md lists them.

They are read where they are kept, when somebody asks: nothing is counted for this alone but `telemetry.counters`.
`families` is called on the event loop, so that figures agree with each other; what it gives is plain values, which may
be written out on another thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from streamindex_service import __version__, errors
from streamindex_service.core.band_queue import Band
from streamindex_service.core.meter import RATIO_BOUNDS
from streamindex_service.frontend.service import Service
from streamindex_service.ipc.v1 import worker_pb2

_PREFIX = "streamindex_"
_REASONS = errors.reasons()
Row = tuple[Sequence[str], float]
Figure = tuple[str, str, float]


def families(service: Service) -> list[Metric]:
    """All metrics, at this moment."""
    parts = (_server, _ledgers, _queue, _caches, _device, _estimates, _calls, _tiles)
    return [metric for part in parts for metric in part(service)]


def _server(service: Service) -> Iterator[Metric]:
    info = service.worker_info
    labels = [__version__, info.device_name if info else "", info.implementation if info else ""]
    yield _gauge("build_info", "Always 1.", ["version", "device", "implementation"], [(labels, 1)])
    yield _gauge("ready", "1 when a worker is ready for work.", rows=[((), not service.governor.paused)])
    yield _gauge("uptime_seconds", "Since the start.", rows=[((), service.clock() - service.started_at)])
    restarts = service.supervisor.restarts
    yield _counter("worker_restarts_total", "Workers that were lost and replaced.", rows=[((), restarts)])


def _ledgers(service: Service) -> Iterator[Metric]:
    ledgers = [each for each in (service.hbm, service.host, service.ingress, service.room.ledger) if each is not None]
    for figure, text in (
        ("limit", "Budget of a ledger."),
        ("reserved", "Bytes of it that are in use."),
        ("peak", "Most that were in use at a time since the start."),
        ("spare", "Bytes kept for reuse within the budget; they go as soon as somebody needs the room."),
    ):
        rows: list[Row] = [([ledger.name], getattr(ledger, f"{figure}_bytes")) for ledger in ledgers]
        yield _gauge(f"ledger_{figure}_bytes", text, ["ledger"], rows)


def _queue(service: Service) -> Iterator[Metric]:
    figures: dict[Band, list[float]] = {band: [0, 0, 0.0] for band in Band}
    for turn in service.governor.scheduler:
        of_band = figures[turn.band]
        of_band[0] += 1
        of_band[1] += turn.size_bytes
        of_band[2] += turn.cost_s
    for at, (name, text) in enumerate(
        (
            ("queue_tiles", "Tiles that wait for the device."),
            ("queue_bytes", "Query rows that wait for the device."),
            ("queue_device_seconds", "Estimated device time of what waits."),
        )
    ):
        rows: list[Row] = [([band.name.lower()], found[at]) for band, found in figures.items()]
        yield _gauge(name, text, ["band"], rows)
    governor = service.governor
    states: list[Row] = [(["queued"], governor.queued), (["running"], governor.running)]
    yield _gauge("open_searches", "Searches between header and end.", ["state"], states)


def _caches(service: Service) -> Iterator[Metric]:
    room, counters = service.room, service.counters
    yield _gauge("key_caches", "Key caches.", rows=[((), len(service.caches))])
    census = service.caches.census
    residences: list[Row] = [([each.value], caches) for each, caches in census.by_residence.items()]
    text = "Key caches with rows, by how much of them is on the device."
    yield _gauge("key_caches_with_rows", text, ["residency"], residences)
    yield _gauge("spilled_key_caches", "Key caches with rows on disk.", rows=[((), census.spilled)])
    yield _gauge(
        "open_uploads", "Uploads that were begun and are not committed.", rows=[((), service.uploads.open_uploads)]
    )
    for name, text, value in (
        ("upload_bytes_total", "Payload of keys that were taken.", counters.upload_bytes),
        ("queries_total", "Query rows that were taken.", counters.queries),
        ("spilled_pages_total", "Pages that went from host memory to disk.", room.spilled_pages),
        ("restored_pages_total", "Pages that came back.", room.restored_pages),
    ):
        yield _counter(name, text, rows=[((), value)])


def _device(service: Service) -> Iterator[Metric]:
    governor, residency, meter = service.governor, service.governor.residency, service.governor.meter
    pong = service.supervisor.link.pong if service.supervisor.link else worker_pb2.Pong()
    gauges: list[Figure] = [
        ("device_tiles", "Tiles that the worker has.", governor.in_flight),
        ("device_resident_bytes", "Key pages on the device.", residency.resident_bytes),
        ("device_allocated_bytes", "Held by the device's allocator; 0 on a CPU.", pong.allocated_bytes),
        ("device_allocator_reserved_bytes", "Taken from the device, in use or kept.", pong.reserved_bytes),
        ("device_peak_bytes", "Most allocated since the worker's start.", pong.peak_bytes),
    ]
    counters: list[Figure] = [
        ("tiles_total", "Tiles that are done.", meter.tiles),
        ("device_busy_seconds_total", "What they took on the device.", meter.device_s),
        ("promoted_pages_total", "Pages that were copied to the device.", residency.promoted_pages),
        ("evicted_pages_total", "Pages that lost their place there to others.", residency.evicted_pages),
        (
            "moved_pages_total",
            "Pages that were copied to another place there to give back memory.",
            residency.moved_pages,
        ),
        ("device_memory_failures_total", "Tiles for which the device had no memory.", meter.memory.failures),
        ("compiled_kernels_total", "Kernels that the worker compiled or loaded.", pong.compiled_kernels),
    ]
    for name, text, value in gauges:
        yield _gauge(name, text, rows=[((), value)])
    for name, text, value in counters:
        yield _counter(name, text, rows=[((), value)])


def _estimates(service: Service) -> Iterator[Metric]:
    found = service.governor.meter.memory
    text = "Measured device memory of large tiles as a part of its estimate; above 1 is a defect."
    ratios = HistogramMetricFamily(f"{_PREFIX}device_memory_estimate_ratio", text)
    ratios.add_metric((), buckets=_buckets(RATIO_BOUNDS, found.counts), sum_value=None)
    yield ratios
    rows: list[Row] = [((), found.most_of_any)]
    yield _gauge("device_memory_estimate_ratio_max", "The largest ratio of tiles of any size.", rows=rows)


def _calls(service: Service) -> Iterator[Metric]:
    methods = service.counters.methods.items()
    running: list[Row] = [([name], counted.running) for name, counted in methods]
    yield _gauge("running_calls", "Calls that are being served.", ["method"], running)
    ended: list[Row] = [
        ([name, code], number) for name, counted in methods for code, number in {"OK": 0, **counted.codes}.items()
    ]
    yield _counter("calls_total", "Calls that are over, by gRPC status.", ["method", "code"], ended)
    refusals: list[Row] = [([reason], service.counters.refusals[reason]) for reason in _REASONS]
    yield _counter("refusals_total", "Calls, and items of batches, refused with this reason.", ["reason"], refusals)
    durations = HistogramMetricFamily(f"{_PREFIX}call_duration_seconds", "Calls, from start to end.", labels=["method"])
    for name, counted in methods:
        seconds = counted.duration
        durations.add_metric([name], _buckets(seconds.bounds, seconds.counts), seconds.total)
    yield durations


def _tiles(service: Service) -> Iterator[Metric]:
    text = "Tiles by phase: queue (until its turn), transfer (to the device, behind others, and back), device."
    phases = HistogramMetricFamily(f"{_PREFIX}tile_phase_seconds", text, labels=["method", "phase"])
    for name, counted in service.counters.methods.items():
        for phase in ("queue", "transfer", "device"):
            seconds = getattr(counted, phase)
            if any(seconds.counts):
                phases.add_metric([name, phase], _buckets(seconds.bounds, seconds.counts), seconds.total)
    yield phases


def _gauge(name: str, text: str, labels: Sequence[str] = (), rows: Iterable[Row] = ()) -> Metric:
    return _filled(GaugeMetricFamily(_PREFIX + name, text, labels=labels), rows)


def _counter(name: str, text: str, labels: Sequence[str] = (), rows: Iterable[Row] = ()) -> Metric:
    return _filled(CounterMetricFamily(_PREFIX + name, text, labels=labels), rows)


def _filled(family: Any, rows: Iterable[Row]) -> Metric:
    for labels, value in rows:
        family.add_metric(labels, value)
    assert isinstance(family, Metric)
    return family


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    names = [*map(str, bounds), "+Inf"]
    assert len(names) == len(counts)
    return list(zip(names, map(float, itertools.accumulate(counts)), strict=True))
