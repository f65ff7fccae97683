"""A client of an upload that has nothing left to do: its messages are made before the clock starts."""

from __future__ import annotations

import time
from typing import Any

import grpc
from streamindex import checksum, framing
from streamindex.v1 import key_cache_pb2 as pb
from streamindex_client.contract import APPEND_KEYS

from streamindex_service.bench.bare import CHUNK_BYTES, octets


class EncodedUpload:
    """An upload whose messages are made before the clock starts. `keys`: [rows, head_dim] uint16."""

    def __init__(self, keys: Any) -> None:
        rows = CHUNK_BYTES // keys[0].nbytes
        empty = memoryview(b"")
        chunks = [(start, keys[start : start + rows]) for start in range(0, len(keys), rows)]
        self._rows = len(keys)
        self._chunks = [
            framing.encode_key_chunk(start, len(part), octets(part), empty, checksum.crc32c(part))
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
