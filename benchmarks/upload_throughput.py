"""AppendKeys against a bare stream of raw bytes on the same kind of socket, in one run, over a unix socket and TCP.

    python -m benchmarks.upload_throughput --quick --out benchmarks/results/upload_throughput.json

The bare stream is the most that Python's gRPC can do: a sync client that sends the same bytes object of 1 MiB again and
again to an asyncio server in another process that drops it. AppendKeys does the whole job: chunks cut from a tensor,
checksums at both ends, a copy into the server's memory, acknowledgements, commit. Rounds of both alternate; figures are
medians. `ratio` is AppendKeys to bare.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import streamindex_client
from streamindex_client import ClientOptions

from benchmarks.harness import Report, Row
from streamindex_service.testing.service import RunningService

TABLE = "upload_throughput"
MIB = 1 << 20
CHUNK_BYTES = MIB
HEAD_DIM = 128
BARE_METHOD = "/benchmark.Bare/Upload"
_OPTIONS = [("grpc.max_receive_message_length", 64 * MIB), ("grpc.max_send_message_length", 64 * MIB)]


@dataclass(frozen=True)
class UploadRow(Row):
    """`bytes_per_s`: median of the rounds."""

    bytes_per_s: float = 0.0


async def serve_bare(socket_path: str) -> None:
    """A server that counts the bytes of a stream and drops them. Prints its TCP port once it listens."""

    async def upload(requests: object, context: object) -> bytes:
        total = 0
        async for request in requests:  # type: ignore[attr-defined]
            total += len(request)
        return str(total).encode()

    handler = grpc.method_handlers_generic_handler(
        "benchmark.Bare", {"Upload": grpc.stream_unary_rpc_method_handler(upload)}
    )
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix://{socket_path}")
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@contextmanager
def bare_server() -> Iterator[dict[str, str]]:
    """The bare server's addresses by kind of socket."""
    with tempfile.TemporaryDirectory(prefix="streamindex-") as directory:
        path = f"{directory}/bare.sock"
        command = [sys.executable, "-m", "benchmarks.upload_throughput", "--serve-bare", path]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            yield {"unix": f"unix://{path}", "tcp": f"127.0.0.1:{port}"}
        finally:
            process.terminate()
            process.wait(10)


def bare_seconds(channel: grpc.Channel, total_bytes: int) -> float:
    """Send so many bytes through the bare stream."""
    chunk = bytes(CHUNK_BYTES)
    call = channel.stream_unary(BARE_METHOD)
    start = time.perf_counter()
    answer = call(chunk for _ in range(total_bytes // CHUNK_BYTES))
    seconds = time.perf_counter() - start
    if int(answer) != total_bytes:
        raise RuntimeError("the bare stream lost bytes")
    return seconds


def append_seconds(client: streamindex_client.Client, keys: np.ndarray) -> tuple[float, int]:
    """Upload keys into a new cache; the seconds, and the rows that are missing."""
    cache = client.create_key_cache(heads=64, head_dim=HEAD_DIM, ratio=1, key_format="bf16", layers=1)
    start = time.perf_counter()
    held = cache.append(layer=0, keys=keys, first_row=0)
    seconds = time.perf_counter() - start
    cache.delete()
    return seconds, len(keys) - held


def compare(kind: str, bare: str, target: str, keys: np.ndarray, rounds: int) -> list[UploadRow]:
    """Both ways over one kind of socket."""
    bare_times, append_times, missing = [], [], 0
    options = ClientOptions(chunk_bytes=CHUNK_BYTES)
    with (
        grpc.insecure_channel(bare, _OPTIONS) as channel,
        streamindex_client.connect(target, options=options) as client,
    ):
        bare_seconds(channel, 32 * MIB)
        append_seconds(client, keys[: 32 * MIB // (2 * HEAD_DIM)])
        for _ in range(rounds):
            bare_times.append(bare_seconds(channel, keys.nbytes))
            seconds, lost = append_seconds(client, keys)
            append_times.append(seconds)
            missing += lost
    bare_s, append_s = statistics.median(bare_times), statistics.median(append_times)
    sizes = f"{keys.nbytes // MIB} MiB in chunks of 1 MiB"

    def row(case: str, seconds: float, ratio: float | None, wrong: int | None) -> UploadRow:
        rate = keys.nbytes / seconds
        note = f"{rate / 1e6:,.0f} MB/s, {sizes}"
        to = None if ratio is None else "bare stream"
        return UploadRow(
            TABLE, f"{case} over {kind}", "bf16", seconds, None, None, ratio, to, None, wrong, rounds, note, rate
        )

    return [
        row("bare raw-bytes stream", bare_s, None, None),
        row("AppendKeys", append_s, bare_s / append_s, missing),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, help="bytes of one round; 512, quick: 128")
    parser.add_argument("--rounds", type=int, help="7, quick: 3")
    parser.add_argument("--device", default="cpu", help="the service's; uploads do not touch it")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve-bare", metavar="PATH", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_bare:
        asyncio.run(serve_bare(arguments.serve_bare))
        return 0
    total_bytes = (arguments.mib or (128 if arguments.quick else 512)) * MIB
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    # any bits but those of NaN and Inf: an upload with them is refused
    keys = np.random.default_rng(0).integers(0, 0x7F80, (total_bytes // (2 * HEAD_DIM), HEAD_DIM), np.uint16)
    report = Report("cpu")
    settings = {
        "worker": {"device": arguments.device},
        "memory": {"host_budget_bytes": 3 * total_bytes},
        "log": {"level": "warning"},
    }
    with bare_server() as bare, RunningService(settings, tcp=True) as service:
        for kind, target in (("unix", service.address), ("tcp", service.tcp_address)):
            for row in compare(kind, bare[kind], target, keys, rounds):
                report.add(row)
    return report.finish(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
