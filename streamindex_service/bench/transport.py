"""How fast this host moves a tensor between two processes, and what share of that the service reaches.

Over each kind of socket the same bytes go through a plain socket, a bare gRPC stream of chunks of 1 MiB, and
AppendKeys, which checks, copies and acknowledges them as well. Rounds of all three alternate, so that whatever else the
host does falls on all of them. Figures are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import streamindex_client
from rich.table import Table
from streamindex_client import Client, ClientOptions, KeyFormat

from streamindex_service.bench.bare import CHUNK_BYTES, MIB, OPTIONS, bare_seconds, bare_server, chunks_of, octets
from streamindex_service.bench.drain import Address, drain, send_seconds
from streamindex_service.testing.service import RunningService

HEAD_DIM = 128
ROW_BYTES = 2 * HEAD_DIM
_WARM_UP_BYTES = 16 * MIB

Keys = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Rate:
    """One way over one kind of socket. Shares are of the plain socket and of the bare stream of the same kind."""

    kind: str
    way: str
    bytes_per_s: float
    share_of_socket: float
    share_of_grpc: float | None


def transport(total_bytes: int, rounds: int) -> list[Rate]:
    """Measure with tensors of `total_bytes`, `rounds` times. Raises ServiceStartError, StreamIndexError."""
    keys = random_keys(total_bytes)
    settings: dict[str, dict[str, Any]] = {
        "worker": {"device": "cpu"},  # uploads do not touch it
        "memory": {"host_budget_bytes": 3 * total_bytes},
        "log": {"level": "warning"},
    }
    rates = []
    with drain() as sockets, bare_server() as bare, RunningService(settings, tcp=True) as service:
        for kind, target in (("unix", service.address), ("tcp", service.tcp_address)):
            rates += _compare(kind, sockets[kind], bare[kind], target, keys, rounds)
    return rates


def table(rates: Sequence[Rate]) -> Table:
    """The figures for people."""
    shown = Table("socket", "way", box=None)
    for name in ("MB/s", "of the socket", "of bare gRPC"):
        shown.add_column(name, justify="right")
    for rate in rates:
        of_grpc = "" if rate.share_of_grpc is None else f"{rate.share_of_grpc:.0%}"
        shown.add_row(rate.kind, rate.way, f"{rate.bytes_per_s / 1e6:,.0f}", f"{rate.share_of_socket:.0%}", of_grpc)
    return shown


def random_keys(total_bytes: int) -> Keys:
    """Keys [rows, 128] bf16, as their bits: any but those of NaN and Inf, which an upload is refused for."""
    return np.random.default_rng(0).integers(0, 0x7F80, (total_bytes // ROW_BYTES, HEAD_DIM), np.uint16)


def append_seconds(client: Client, keys: Keys) -> tuple[float, int]:
    """Upload keys into a new cache; the seconds, and the rows that are missing."""
    cache = client.create_key_cache(heads=64, head_dim=HEAD_DIM, ratio=1, key_format=KeyFormat.BF16, layers=1)
    start = time.perf_counter()
    held = cache.append(layer=0, keys=keys, first_row=0)
    seconds = time.perf_counter() - start
    cache.delete()
    return seconds, len(keys) - held


def _compare(kind: str, plain: Address, bare: str, target: str, keys: Keys, rounds: int) -> list[Rate]:
    chunks = chunks_of(keys)
    with (
        grpc.insecure_channel(bare, OPTIONS) as channel,
        streamindex_client.connect(target, options=ClientOptions(chunk_bytes=CHUNK_BYTES)) as client,
    ):
        ways: dict[str, Callable[[Keys], float]] = {
            "socket": lambda part: send_seconds(plain, octets(part)),
            "gRPC stream": lambda part: bare_seconds(channel, chunks[: max(1, part.nbytes // CHUNK_BYTES)]),
            "AppendKeys": lambda part: _uploaded_seconds(client, part),
        }
        for way in ways.values():
            way(keys[: _WARM_UP_BYTES // ROW_BYTES])
        measured = [{name: way(keys) for name, way in ways.items()} for _ in range(rounds)]
    seconds = {name: statistics.median(turn[name] for turn in measured) for name in ways}
    return [
        Rate(
            kind,
            name,
            keys.nbytes / took,
            seconds["socket"] / took,
            None if name == "socket" else seconds["gRPC stream"] / took,
        )
        for name, took in seconds.items()
    ]


def _uploaded_seconds(client: Client, keys: Keys) -> float:
    seconds, missing = append_seconds(client, keys)
    if missing:
        raise RuntimeError(f"{missing} rows of an upload are missing")
    return seconds
