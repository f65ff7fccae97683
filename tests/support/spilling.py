"""A service whose host is too small, with a disk behind it: what its tests have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.calls import Calls
from tests.support.inprocess import InProcessServer
from tests.support.services import MIB, ROOMY, is_idle, wait_for
from tests.support.tensors import Draw, Kind, ModelCache, expected

KIND = Kind(heads=2, head_dim=64)  # a page has 32 KiB
PAGE_BYTES, PAGE_KEYS = 32_768, 256
HOST_BYTES = 4 * MIB  # 128 pages


def settings(directory: Path, **memory: Any) -> dict[str, dict[str, Any]]:
    """Nothing happens by itself: pages go when a test says so, or when somebody needs their memory."""
    return {
        **ROOMY,
        "server": {"sweep_s": 3600},
        "memory": {
            **ROOMY["memory"],
            "host_budget_bytes": HOST_BYTES,
            "extent_bytes": 65_536,
            "spill_dir": str(directory),
            "spill_bytes": 32 * MIB,
            "spill_pause_s": 0.05,
            **memory,
        },
    }


@contextmanager
def calls_that_leave_nothing(server: InProcessServer) -> Iterator[Calls]:
    """Calls on it; in the end no byte is held, in memory or on disk."""
    with Calls(server.target) as connection:
        yield connection
        wait_for(lambda: is_idle(connection.load()))
        wait_for(lambda: connection.ledger("host").reserved_bytes == 0)
        assert connection.ledger("spill").reserved_bytes == 0


def spill_all(server: InProcessServer) -> None:
    """Everything idle goes to disk."""
    room = server.server.service.room

    async def go() -> None:
        while await room._finished(room._free(1 << 40)):
            pass

    server.run(go)


def check(calls: Calls, kind: Kind, cache_id: str, model: ModelCache, layer: int = 0, seed: int = 0) -> None:
    """A search of a layer, whose answer must be the model's."""
    keys = model.layers[layer]
    queries = Draw(seed).queries(kind, 2, start_position=len(keys) + 1)
    top_k = max(1, min(4096, len(keys)))
    found = calls.search(kind, cache_id, queries, top_k, layer=layer, want_scores=True)
    for one, other in zip(found, expected(kind, keys, queries, top_k), strict=True):
        assert np.array_equal(one, other)


def filled(calls: Calls, kind: Kind, rows: int, seed: int, **others: Any) -> tuple[str, ModelCache]:
    """A cache with rows in each layer, and its model."""
    cache, model, draw = calls.create(kind, **others), ModelCache(kind), Draw(seed)
    for layer in range(kind.layers):
        keys = draw.keys(kind, rows)
        model.write(layer, 0, keys)
        calls.upload(kind, cache.id, keys, layer=layer, chunk_rows=4096)
    return cache.id, model
