"""A gRPC server that does as little as it can, and the bare stream of bytes to it.

python -m streamindex_service.bench.bare PATH        the server, on the unix socket PATH; prints its TCP port
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
from streamindex.v1 import key_cache_pb2 as pb

MIB = 1 << 20
CHUNK_BYTES = MIB
OPTIONS = [("grpc.max_receive_message_length", 64 * MIB), ("grpc.max_send_message_length", 64 * MIB)]
_BARE_METHOD = "/streamindex.bench.Bare/Upload"
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
    answer: bytes = pb.CreateKeyCacheResponse(key_cache=cache).SerializeToString()
    return answer


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
            grpc.method_handlers_generic_handler("streamindex.bench.Bare", bare),
            grpc.method_handlers_generic_handler("streamindex.v1.KeyCacheService", caches),
        )
    )
    server.add_insecure_port(f"unix://{socket_path}")
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


@contextmanager
def bare_server() -> Iterator[dict[str, str]]:
    """The bare server's addresses by kind of socket."""
    with tempfile.TemporaryDirectory(prefix="streamindex-") as directory:
        path = f"{directory}/bare.sock"
        command = [sys.executable, "-m", "streamindex_service.bench.bare", path]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            yield {"unix": f"unix://{path}", "tcp": f"127.0.0.1:{port}"}
        finally:
            process.terminate()
            process.wait(10)


def chunks_of(keys: Any) -> list[bytes]:
    """The bytes of a tensor in chunks, as a caller has them before a bare stream."""
    whole = octets(keys)
    return [bytes(whole[start : start + CHUNK_BYTES]) for start in range(0, len(whole), CHUNK_BYTES)]


def bare_seconds(channel: grpc.Channel, chunks: Sequence[bytes]) -> float:
    """Send them through the bare stream."""
    call = channel.stream_unary(_BARE_METHOD)
    start = time.perf_counter()
    answer = call(iter(chunks))
    seconds = time.perf_counter() - start
    if int(answer) != sum(map(len, chunks)):
        raise RuntimeError("the bare stream lost bytes")
    return seconds


def octets(part: Any) -> memoryview:
    """The bytes of an array."""
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
