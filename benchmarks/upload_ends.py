"""The two ends of an upload by themselves: a server that does nothing, and a client that has nothing left to do.

python -m benchmarks.upload_ends PATH        the server, on the unix socket PATH; prints its TCP port
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from streamindex import checksum, framing
from streamindex.v1 import key_cache_pb2 as pb
from streamindex_client.contract import APPEND_KEYS

MIB = 1 << 20
CHUNK_BYTES = MIB
OPTIONS = [("grpc.max_receive_message_length", 64 * MIB), ("grpc.max_send_message_length", 64 * MIB)]
_BARE_METHOD = "/benchmark.Bare/Upload"
_WIDEST_WINDOW_BYTES = (1 << 32) - 1  # the contract's largest; a round is shorter
_LONGEST_CONTROL_MESSAGE_BYTES = 1 << 10  # what is longer is a chunk


async def _count(requests: AsyncIterator[bytes], context: object) -> bytes:
    total = 0
    async for request in requests:
        total += len(request)
    return str(total).encode()


async def _create(data: bytes, context: object) -> bytes:
    spec = pb.CreateKeyCacheRequest.FromString(data).spec
    cache = pb.KeyCache(id="bare", spec=spec, layer_keys=[0] * spec.layers)
    return pb.CreateKeyCacheResponse(key_cache=cache).SerializeToString()


async def _delete(data: bytes, context: object) -> bytes:
    return b""


async def _append(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    """As little of AppendKeys as the client bears: no window, no acknowledgement, no look at a chunk."""
    async for request in requests:
        if len(request) > _LONGEST_CONTROL_MESSAGE_BYTES:
            continue
        message = pb.AppendKeysRequest.FromString(request)
        if message.WhichOneof("message") == "header":
            accepted = pb.UploadAccepted(
                upload_id="bare", max_chunk_bytes=CHUNK_BYTES, window_bytes=_WIDEST_WINDOW_BYTES
            )
            yield pb.AppendKeysResponse(accepted=accepted).SerializeToString()
        else:
            committed = pb.UploadCommitted(layer_keys=message.finish.row_count)
            yield pb.AppendKeysResponse(committed=committed).SerializeToString()


async def serve(socket_path: str) -> None:
    """Drop what comes. Prints the TCP port once it listens."""
    server = grpc.aio.server(options=OPTIONS)
    bare = {"Upload": grpc.stream_unary_rpc_method_handler(_count)}
    caches = {
        "CreateKeyCache": grpc.unary_unary_rpc_method_handler(_create),
        "DeleteKeyCache": grpc.unary_unary_rpc_method_handler(_delete),
        "AppendKeys": grpc.stream_stream_rpc_method_handler(_append),
    }
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("benchmark.Bare", bare),
            grpc.method_handlers_generic_handler("streamindex.v1.KeyCacheService", caches),
        )
    )
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
        command = [sys.executable, "-m", "benchmarks.upload_ends", path]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            yield {"unix": f"unix://{path}", "tcp": f"127.0.0.1:{port}"}
        finally:
            process.terminate()
            process.wait(10)


def chunks_of(keys: Any) -> list[bytes]:
    """The bytes of a tensor in chunks, as a caller has them before a bare stream."""
    octets = _octets(keys)
    return [bytes(octets[start : start + CHUNK_BYTES]) for start in range(0, len(octets), CHUNK_BYTES)]


def bare_seconds(channel: grpc.Channel, chunks: Sequence[bytes]) -> float:
    """Send them through the bare stream."""
    call = channel.stream_unary(_BARE_METHOD)
    start = time.perf_counter()
    answer = call(iter(chunks))
    seconds = time.perf_counter() - start
    if int(answer) != sum(map(len, chunks)):
        raise RuntimeError("the bare stream lost bytes")
    return seconds


class EncodedUpload:
    """An upload whose messages are made before the clock starts. `keys`: [rows, head_dim] uint16."""

    def __init__(self, keys: Any) -> None:
        rows = CHUNK_BYTES // keys[0].nbytes
        empty = memoryview(b"")
        chunks = [(start, keys[start : start + rows]) for start in range(0, len(keys), rows)]
        self._rows = len(keys)
        self._chunks = [
            framing.encode_key_chunk(start, len(part), _octets(part), empty, checksum.crc32c(part))
            for start, part in chunks
        ]
        finish = pb.AppendKeysFinish(row_count=len(keys), keys_crc32c=checksum.crc32c(keys))
        self._finish = pb.AppendKeysRequest(finish=finish).SerializeToString()

    def seconds(self, channel: grpc.Channel, cache_id: str) -> tuple[float, int]:
        """Send it into layer 0 of an empty cache; the seconds, and the rows that are missing."""
        start = pb.AppendKeysHeader.Start(key_cache_id=cache_id, row_count=self._rows)
        header = pb.AppendKeysRequest(header=pb.AppendKeysHeader(start=start)).SerializeToString()
        begin = time.perf_counter()
        held = 0
        for data in channel.stream_stream(APPEND_KEYS.path)(iter((header, *self._chunks, self._finish))):
            answer = pb.AppendKeysResponse.FromString(data)
            if answer.HasField("refused"):
                raise RuntimeError(answer.refused.message)
            held = answer.committed.layer_keys
        return time.perf_counter() - begin, self._rows - held


def _octets(part: Any) -> memoryview:
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
