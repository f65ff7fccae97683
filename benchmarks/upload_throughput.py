"""AppendKeys against a bare stream of raw bytes on the same kind of socket, in one run, over a unix socket and TCP.

    python -m benchmarks.upload_throughput --quick --out benchmarks/results/upload_throughput.json

The bare stream is the most that Python's gRPC can do: a sync client that sends the bytes of the same tensor, cut
before into chunks of 1 MiB, to an asyncio server in another process that drops them. AppendKeys does the whole job:
chunks cut from the tensor, checksums at both ends, checks, a copy into the server's memory, acknowledgements, commit.
Rounds of all cases alternate; figures are medians. `ratio` is to the bare stream. Beside it stands the bare stream of
one chunk of zeros sent again and again: not a tensor's upload, for all of its source is one page in the nearest cache,
but what an empty gRPC call moves.

`--breakdown` takes the ends apart: chunks that were encoded before to our server, and our client to a server that drops
them. The one that is nearer to AppendKeys is the end that limits it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import streamindex_client
from streamindex_client import Client, ClientOptions

from benchmarks.harness import Report, Row
from benchmarks.upload_ends import EncodedUpload
from streamindex_service.bench.bare import CHUNK_BYTES, MIB, OPTIONS, bare_seconds, bare_server, chunks_of
from streamindex_service.bench.transport import HEAD_DIM, ROW_BYTES, append_seconds, random_keys
from streamindex_service.testing.service import RunningService

TABLE = "upload_throughput"
_ZEROS = "bare stream of one chunk of zeros"
_WARM_UP_ROWS = 32 * MIB // ROW_BYTES

Case = Callable[[np.ndarray], tuple[float, int]]
"""Uploads keys once: the seconds, and the rows that are missing."""


@dataclass(frozen=True)
class UploadRow(Row):
    """`bytes_per_s`: median of the rounds."""

    bytes_per_s: float = 0.0


def encoded_seconds(client: Client, channel: grpc.Channel, keys: np.ndarray) -> tuple[float, int]:
    """The same with messages that are made before, through plain gRPC."""
    upload = EncodedUpload(keys)
    cache = client.create_key_cache(heads=64, head_dim=HEAD_DIM, ratio=1, key_format="bf16", layers=1)
    measured = upload.seconds(channel, cache.id)
    cache.delete()
    return measured


def compare(kind: str, bare: str, target: str, keys: np.ndarray, rounds: int, breakdown: bool) -> list[UploadRow]:
    """All cases over one kind of socket."""
    options = ClientOptions(chunk_bytes=CHUNK_BYTES)
    chunks, zeros = chunks_of(keys), [bytes(CHUNK_BYTES)]
    with (
        grpc.insecure_channel(bare, OPTIONS) as bare_channel,
        grpc.insecure_channel(target, OPTIONS) as channel,
        streamindex_client.connect(bare, options=options) as bare_client,
        streamindex_client.connect(target, options=options) as client,
    ):
        cases: dict[str, Case] = {
            "bare raw-bytes stream": lambda rows: (bare_seconds(bare_channel, chunks[: rows.nbytes // CHUNK_BYTES]), 0),
            "AppendKeys": lambda rows: append_seconds(client, rows),
            _ZEROS: lambda rows: (
                bare_seconds(bare_channel, zeros * (rows.nbytes // CHUNK_BYTES)),
                0,
            ),
        }
        if breakdown:
            cases |= {
                "encoded chunks to our server": lambda rows: encoded_seconds(client, channel, rows),
                "our client to a bare server": lambda rows: append_seconds(bare_client, rows),
            }
        return _rows(kind, cases, keys, rounds)


def _rows(kind: str, cases: dict[str, Case], keys: np.ndarray, rounds: int) -> list[UploadRow]:
    """The first case is what the others are compared with."""
    for case in cases.values():
        case(keys[:_WARM_UP_ROWS])
    measured = [{name: case(keys) for name, case in cases.items()} for _ in range(rounds)]
    seconds = {name: statistics.median(turn[name][0] for turn in measured) for name in cases}
    first = next(iter(cases))
    rows = []
    for name in cases:
        rate = keys.nbytes / seconds[name]
        note = f"{rate / 1e6:,.0f} MB/s, {keys.nbytes // MIB} MiB in chunks of 1 MiB"
        if name != _ZEROS:
            note += f", {seconds[_ZEROS] / seconds[name]:.2f} of {_ZEROS}"
        ratio, to, wrong = None, None, None
        if name != first:
            ratio, to, wrong = seconds[first] / seconds[name], "bare stream", sum(turn[name][1] for turn in measured)
        case_name = f"{name} over {kind}"
        rows.append(
            UploadRow(TABLE, case_name, "bf16", seconds[name], None, None, ratio, to, None, wrong, rounds, note, rate)
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, help="bytes of one round; 512, quick: 128")
    parser.add_argument("--rounds", type=int, help="7, quick: 3")
    parser.add_argument("--device", default="cpu", help="the service's; uploads do not touch it")
    parser.add_argument("--breakdown", action="store_true", help="each end by itself as well")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    total_bytes = (arguments.mib or (128 if arguments.quick else 512)) * MIB
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    keys = random_keys(total_bytes)
    report = Report("cpu", arguments.out)
    settings = {
        "worker": {"device": arguments.device},
        "memory": {"host_budget_bytes": 3 * total_bytes},
        "log": {"level": "warning"},
    }
    with bare_server() as bare, RunningService(settings, tcp=True) as service:
        for kind, target in (("unix", service.address), ("tcp", service.tcp_address)):
            for row in compare(kind, bare[kind], target, keys, rounds, arguments.breakdown):
                report.add(row)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
