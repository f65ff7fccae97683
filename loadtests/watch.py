"""The service's own view of a load: WatchLoad, sampled on a thread while locust runs in other processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from streamindex_client import Client, StreamIndexError
from streamindex_client.model import Load

from loadtests.target import Target

_INTERVAL_S = 0.5
_SETTLE_S = 10.0


@dataclass(frozen=True)
class Sample:
    """The load at a time of the host's monotonic clock."""

    at_s: float
    load: Load


@dataclass
class Watched:
    """Samples so far; `error` is what ended them early."""

    samples: list[Sample] = field(default_factory=list)
    error: str = ""
    left: list[str] = field(default_factory=list)


@contextmanager
def watched(target: Target) -> Iterator[Watched]:
    """Sample until the block ends; then see what is left of what the block made."""
    result = Watched()
    stop = threading.Event()
    with target.connect() as client:
        before = client.load()
        thread = threading.Thread(target=_sample, args=(client, result, stop), daemon=True)
        thread.start()
        try:
            yield result
        finally:
            stop.set()
            thread.join()
        result.left = _left(client, before)


def _sample(client: Client, result: Watched, stop: threading.Event) -> None:
    try:
        for load in client.watch_load(interval_s=_INTERVAL_S):
            result.samples.append(Sample(time.monotonic(), load))
            if stop.is_set():
                return
    except StreamIndexError as error:
        result.error = str(error)


def _left(client: Client, before: Load) -> list[str]:
    """What is there that was not before, once calls that were left have had time to end."""
    end = time.monotonic() + _SETTLE_S
    while (left := differences(before, client.load())) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def differences(before: Load, after: Load) -> list[str]:
    """What there is more of."""
    pairs = {
        "key caches": (before.key_caches, after.key_caches),
        "open uploads": (before.open_uploads, after.open_uploads),
        "running searches": (before.running_searches, after.running_searches),
        "worker restarts": (before.worker_restarts, after.worker_restarts),
    }
    # pages of a dropped cache leave the device when their place is needed, and are no leftover
    for name in ("host", "ingress"):
        pairs[f"bytes of {name}"] = (before.ledgers[name].reserved_bytes, after.ledgers[name].reserved_bytes)
    return [f"{after_ - before_:+,} {name}" for name, (before_, after_) in pairs.items() if after_ > before_]
