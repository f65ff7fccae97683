"""Settings of the services under test, and waiting for what a service tells only when it is asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

MIB = 1 << 20
WAIT_S = 20.0

CPU = {"device": "cpu", "cpu_threads": 1}
ROOMY = {
    "server": {"sweep_s": 0.1},
    "memory": {
        "device_budget_bytes": 256 * MIB,
        "host_budget_bytes": 256 * MIB,
        "ingress_budget_bytes": 16 * MIB,
        "extent_bytes": MIB,
        "search_block_bytes": MIB // 4,
        "search_blocks": 4,
        "workspace_bytes": 16 * MIB,
        "workspace_floor_bytes": 16 * MIB,
    },
    "worker": CPU,
}
# A tile needs 16 MiB of workspace and up to 1/4 MiB of staging: 3 MiB are left for pages, and one tile runs at a time.
TIGHT = {
    "server": {"sweep_s": 0.1, "max_caches": 6, "max_uploads": 3, "upload_ttl_s": 1.0},
    "limits": {"slow_consumer_s": 1.0, "max_open_searches": 64, "max_layer_keys": 65_536},
    "scheduler": {"max_queued_tiles": 8},
    "memory": {
        **ROOMY["memory"],
        "device_budget_bytes": 19 * MIB + MIB // 4,
        "host_budget_bytes": 8 * MIB + 12 * 1024,  # pages, and the records of a few caches
        "host_high_watermark": 1.0,  # to the last byte
        "host_critical_watermark": 1.0,
        "extent_bytes": MIB // 4,
    },
    "worker": CPU,
}
# 3 MiB for pages as well, and no end of host memory: the keys are there, the device is what they do not fit.
SMALL_DEVICE = {
    **ROOMY,
    "memory": {**ROOMY["memory"], "device_budget_bytes": 19 * MIB + MIB // 4, "extent_bytes": MIB // 4},
}


def small_host(directory: Any) -> dict[str, dict[str, Any]]:
    """The same with a host that is too small as well, and a disk behind it; all that is idle goes there at once."""
    memory = {
        **SMALL_DEVICE["memory"],
        "host_budget_bytes": 14 * MIB,
        "spill_dir": str(directory),
        "spill_bytes": 64 * MIB,
        "host_high_watermark": 1.0,
        "host_critical_watermark": 1.0,
        "spill_watermark": 0.5,
        "spill_idle_s": 0.05,
    }
    return {**SMALL_DEVICE, "memory": memory}


def is_idle(load: Any) -> bool:
    """No search, and nothing on its way."""
    ingress = next(ledger for ledger in load.ledgers if ledger.name == "ingress")
    return load.running_searches == 0 and load.queued_searches == 0 and ingress.reserved_bytes == 0


def wait_for(condition: Callable[[], Any], wait_s: float = WAIT_S) -> None:
    """Ask until it is so: for what the service tells only when it is asked."""
    end = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.01)
