"""Estimates of device memory against what was measured, as a service tells them."""

from __future__ import annotations

from typing import Any

import grpc
from streamindex.v1 import server_pb2, server_pb2_grpc

from streamindex_service.testing.service import RunningService

LEAST_RATIO = 0.8  # of estimates from LARGE_BYTES on; none has more than 1


class Work:
    """Work whose peak is measured."""

    peak_bytes = 0


def load_of(service: RunningService) -> server_pb2.GetLoadResponse:
    """What GetLoad says."""
    with grpc.insecure_channel(service.address) as channel:
        return server_pb2_grpc.ServerServiceStub(channel).GetLoad(server_pb2.GetLoadRequest(), timeout=30)


def ratios(service: RunningService) -> Any:
    """Of the tiles so far."""
    return load_of(service).device.memory
