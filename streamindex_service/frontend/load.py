"""How busy the service is: the figures of GetLoad and WatchLoad."""

from __future__ import annotations

import math

from streamindex.v1 import server_pb2 as pb

from streamindex_service.core.census import Census, Residence
from streamindex_service.core.meter import RATIO_BOUNDS, MemoryRatios, Quantiles
from streamindex_service.frontend.service import Service

_FRESH_TIMEOUT_S = 0.5  # for the device's own figures; a worker that hangs must not hang this
_CALLERS_SHOWN = 32  # those with most work waiting


async def load_of(service: Service, caller: str) -> pb.GetLoadResponse:
    """The figures of this moment, for this caller: others have labels for names."""
    link = service.supervisor.link
    if link is not None:
        await link.refresh(_FRESH_TIMEOUT_S)
    governor, residency, meter = service.governor, service.governor.residency, service.governor.meter
    return pb.GetLoadResponse(
        ledgers=[
            pb.Ledger(
                name=ledger.name,
                limit_bytes=ledger.limit_bytes,
                reserved_bytes=ledger.reserved_bytes,
                peak_bytes=ledger.peak_bytes,
                spare_bytes=ledger.spare_bytes,
            )
            for ledger in (service.hbm, service.host, service.ingress, service.room.ledger)
            if ledger is not None
        ],
        queued_searches=governor.queued,
        running_searches=governor.running,
        key_caches=len(service.caches),
        open_uploads=service.uploads.open_uploads,
        worker_restarts=service.supervisor.restarts,
        ready=not governor.paused,
        device_allocated_bytes=link.pong.allocated_bytes if link else 0,
        device_peak_bytes=link.pong.peak_bytes if link else 0,
        uptime_ms=int(1000 * (service.clock() - service.started_at)),
        queue=_queue(service, caller),
        spill=pb.SpillLoad(spilled_pages=service.room.spilled_pages, restored_pages=service.room.restored_pages),
        device=pb.DeviceLoad(
            tiles=governor.in_flight,
            estimated_us=_us(governor.in_flight_s),
            tiles_done=meter.tiles,
            busy_us=_us(meter.device_s),
            resident_bytes=residency.resident_bytes,
            promoted_pages=residency.promoted_pages,
            evicted_pages=residency.evicted_pages,
            wait=_latency(meter.waits()),
            run=_latency(meter.runs()),
            memory=_estimates(meter.memory),
            moved_pages=residency.moved_pages,
        ),
        device_reserved_bytes=link.pong.reserved_bytes if link else 0,
        residency=_residency(service.caches.census),
    )


def _residency(census: Census) -> pb.KeyCacheResidency:
    caches = census.by_residence
    return pb.KeyCacheResidency(
        device=caches[Residence.DEVICE],
        partial=caches[Residence.PARTIAL],
        none=caches[Residence.NONE],
        spilled=census.spilled,
    )


def _queue(service: Service, asking: str) -> pb.QueueLoad:
    scheduler = service.governor.scheduler
    by_caller = sorted(scheduler.queued_by_caller().items(), key=lambda each: each[1][1], reverse=True)
    return pb.QueueLoad(
        tiles=len(scheduler),
        bytes=scheduler.queued_bytes,
        estimated_us=_us(scheduler.backlog_s),
        bands=[
            pb.BandLoad(
                priority=int(band),  # type: ignore[arg-type]
                tiles=tiles,
                wait=_latency(service.governor.meter.waits(band)),
            )
            for band, tiles in scheduler.queued_by_band().items()
        ],
        callers=[
            pb.CallerLoad(
                caller=caller if caller == asking else service.label_of(caller),
                tiles=tiles,
                estimated_us=_us(seconds),
                own=caller == asking,
            )
            for caller, (tiles, seconds) in by_caller[:_CALLERS_SHOWN]
        ],
    )


def _estimates(found: MemoryRatios) -> pb.MemoryEstimates:
    return pb.MemoryEstimates(
        large_tiles=found.large_tiles,
        last_ratio=found.last,
        least_ratio=found.least,
        most_ratio=found.most,
        most_ratio_of_any=found.most_of_any,
        buckets=[
            pb.RatioBucket(bound=bound, tiles=tiles)
            for bound, tiles in zip((*RATIO_BOUNDS, math.inf), found.counts, strict=True)
        ],
        failures=found.failures,
    )


def _latency(found: Quantiles) -> pb.Latency:
    return pb.Latency(p50_us=_us(found.p50_s), p99_us=_us(found.p99_s))


def _us(seconds: float) -> int:
    return max(0, int(1e6 * seconds))
