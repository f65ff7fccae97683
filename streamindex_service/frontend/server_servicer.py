"""What the server is, and how busy."""

from __future__ import annotations

from typing import Any

from streamindex.v1 import server_pb2 as pb
from streamindex.v1 import types_pb2

from streamindex_service import __version__
from streamindex_service.frontend import requests
from streamindex_service.frontend.service import Service

_FRESH_TIMEOUT_S = 0.5  # for the device's own figures; a worker that hangs must not hang this


class ServerServicer:
    """streamindex.v1.ServerService."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def get_capabilities(self, request: pb.GetCapabilitiesRequest, context: Any) -> pb.GetCapabilitiesResponse:
        """GetCapabilities."""
        worker = self._service.require_worker_info()
        limits = self._service.settings.limits
        return pb.GetCapabilitiesResponse(
            service_version=__version__,
            device=worker.device_name,
            implementation=worker.implementation,
            implementations=[
                pb.Implementation(name=i.name, key_formats=i.key_formats, repeatable=i.repeatable)
                for i in worker.implementations
            ],
            key_formats=sorted(int(f) for f in self._service.formats),  # type: ignore[misc]
            limits=pb.Limits(
                max_heads=requests.MAX_HEADS,
                max_head_dim=requests.MAX_HEAD_DIM,
                max_top_k=limits.max_top_k,
                max_layers=limits.max_layers,
                max_layer_keys=limits.max_layer_keys,
                max_chunk_bytes=int(limits.max_chunk_bytes),
                max_batch_items=limits.max_batch_items,
                max_batch_rows=limits.max_batch_rows,
            ),
            search_modes=[types_pb2.SEARCH_MODE_EXACT],
        )

    async def get_load(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:
        """GetLoad."""
        service = self._service
        link = service.supervisor.link
        if link is not None:
            await link.refresh(_FRESH_TIMEOUT_S)
        return pb.GetLoadResponse(
            ledgers=[
                pb.Ledger(
                    name=ledger.name,
                    limit_bytes=ledger.limit_bytes,
                    reserved_bytes=ledger.reserved_bytes,
                    peak_bytes=ledger.peak_bytes,
                    spare_bytes=ledger.spare_bytes,
                )
                for ledger in (service.hbm, service.host, service.ingress)
            ],
            queued_searches=service.governor.queued,
            running_searches=service.governor.running,
            key_caches=len(service.caches),
            open_uploads=service.uploads.open_uploads,
            worker_restarts=service.supervisor.restarts,
            ready=not service.governor.paused,
            device_allocated_bytes=link.pong.allocated_bytes if link else 0,
            device_peak_bytes=link.pong.peak_bytes if link else 0,
            uptime_ms=int(1000 * (service.clock() - service.started_at)),
        )
