"""AppendKeys: one stream that writes one upload."""

from __future__ import annotations

import asyncio
from typing import Any

from streamindex.checksum import crc32c
from streamindex.framing import Chunk
from streamindex.v1 import key_cache_pb2 as pb

from streamindex_service.core.caches import edges
from streamindex_service.core.sizes import PAGE_KEYS, SCALE_BYTES, KeyFormat, key_row_bytes
from streamindex_service.core.uploads import Upload
from streamindex_service.errors import DigestError, InvalidArgumentError, MalformedMessageError
from streamindex_service.frontend import tensors
from streamindex_service.frontend.rpc import MessageReader, MessageWriter
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.tensors import Bytes, RowRange

# Acknowledgements are gathered for this long: at full speed one a chunk would cost more than it tells.
_ACKNOWLEDGE_EVERY_S = 0.002


class UploadStream:
    """Reads chunks, has them checked and copied on the ingest threads, acknowledges, commits."""

    def __init__(self, service: Service, upload: Upload, context: Any, writer: MessageWriter) -> None:
        self._service = service
        self._upload = upload
        self._context = context
        self._writer = writer
        spec = upload.cache.spec
        self._format = spec.key_format
        self._row_elements = spec.head_dim
        self._row_bytes = (
            key_row_bytes(spec.key_format, spec.head_dim),
            SCALE_BYTES if spec.key_format.has_scales else 0,
        )
        self._copying: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()

    async def run(self) -> None:
        """Until the commit or the end of the stream. Raises ServiceError; what is held can still be resumed."""
        acknowledger = asyncio.create_task(self._acknowledge())
        try:
            while (message := await MessageReader(self._context).next(self._copying)) is not None:
                if isinstance(message, Chunk):
                    await self._take(message)
                elif message.WhichOneof("message") == "finish":
                    await self._settle()
                    acknowledger.cancel()
                    await self._finish(message.finish)
                    return
                else:
                    raise MalformedMessageError("a header comes first and once, then chunks, then finish")
            # The end of the stream alone never commits; what is held stays for a resume.
            await self._settle()
        finally:
            acknowledger.cancel()
            if self._copying is not None:
                # The copy cannot be stopped; the pages that it writes to must not go before it is done.
                await asyncio.gather(self._copying, return_exceptions=True)

    async def _take(self, chunk: Chunk) -> None:
        limit = int(self._service.settings.limits.max_chunk_bytes)
        if chunk.payload_bytes > limit:
            raise InvalidArgumentError(
                f"a chunk may have {limit} bytes",
                field="chunk",
                metadata={"limit": limit, "received_bytes": chunk.payload_bytes},
            )
        if chunk.crc32c is None:
            raise InvalidArgumentError("chunk.crc32c is required", field="chunk.crc32c")
        tensors.check_part_sizes(chunk, ("keys", "scales"), self._row_bytes)
        # One copy at a time, so that rows are held in order; the next chunk is received meanwhile.
        await self._settle()
        repeat = self._upload.is_repeat(chunk.row_offset, chunk.row_count)
        if not repeat:
            self._service.uploads.hold(self._upload, chunk.row_count)
        await self._service.ingress_budget.reserve(chunk.payload_bytes)
        self._copying = asyncio.create_task(self._copy(chunk, repeat))

    async def _settle(self) -> None:
        # Forgotten only when it is done: whoever cleans up must know of a copy that runs.
        if self._copying is not None:
            await asyncio.shield(self._copying)
            self._copying = None

    async def _copy(self, chunk: Chunk, repeat: bool) -> None:
        loop = asyncio.get_running_loop()
        try:
            ranges = self._ranges(chunk.row_offset, chunk.row_count)
            work = self._compare if repeat else self._store
            keys_crc32c = await loop.run_in_executor(self._service.ingest_threads, work, chunk, ranges)
        finally:
            self._service.ingress_budget.release(chunk.payload_bytes)
        upload = self._upload
        if not repeat:
            keys, scales = chunk.parts
            upload.keys_crc32c = tensors.extend_digest(upload.keys_crc32c, keys_crc32c, len(keys))
            upload.scales_crc32c = crc32c(scales, upload.scales_crc32c)
            upload.rows_held += chunk.row_count
        self._progress.set()

    def _compare(self, chunk: Chunk, ranges: list[RowRange]) -> int:
        keys_crc32c, _ = tensors.verify_checksum(chunk)
        tensors.compare_rows(chunk, ranges, self._row_bytes)
        return keys_crc32c

    def _store(self, chunk: Chunk, ranges: list[RowRange]) -> int:
        keys_crc32c, _ = tensors.verify_checksum(chunk)
        keys, scales = chunk.parts
        first_row = chunk.row_offset
        tensors.check_finite(keys, self._format, self._row_elements, "keys", first_row)
        tensors.check_finite(scales, KeyFormat.FP32, 1, "scales", first_row)
        tensors.copy_rows(chunk, ranges, self._row_bytes)
        return keys_crc32c

    def _ranges(self, row_offset: int, row_count: int) -> list[RowRange]:
        """Where rows of the upload lie: one range for each page they touch."""
        ranges, done = [], 0
        while done < row_count:
            page, row = self._upload.place(row_offset + done)
            count = min(row_count - done, PAGE_KEYS - row)
            ranges.append(RowRange(done, count, self._targets(page, row, count)))
            done += count
        return ranges

    def _targets(self, page: int, row: int, count: int) -> tuple[Bytes, Bytes]:
        return page_rows(self._service, self._upload.staged[page], self._row_bytes, row, count)

    async def _acknowledge(self) -> None:
        while True:
            await self._progress.wait()
            self._progress.clear()
            acknowledged = pb.UploadAcknowledged(row_offset=self._upload.rows_held)
            await self._writer.write(pb.AppendKeysResponse(acknowledged=acknowledged))
            await asyncio.sleep(_ACKNOWLEDGE_EVERY_S)

    async def _finish(self, finish: pb.AppendKeysFinish) -> None:
        upload = self._upload
        if finish.row_count != upload.row_count or upload.rows_held != upload.row_count:
            raise InvalidArgumentError(
                f"the upload announced {upload.row_count} rows and holds {upload.rows_held}; "
                f"finish says {finish.row_count}",
                field="finish.row_count",
                metadata={"announced_rows": upload.row_count, "held_rows": upload.rows_held},
            )
        self._check_digest(finish)
        if not upload.committed:
            commit_upload(self._service, upload, self._row_bytes)
        committed = pb.UploadCommitted(layer_keys=upload.layer_keys)
        await self._writer.write(pb.AppendKeysResponse(committed=committed))

    def _check_digest(self, finish: pb.AppendKeysFinish) -> None:
        wanted = [("keys_crc32c", self._upload.keys_crc32c)]
        if self._format.has_scales:
            wanted.append(("scales_crc32c", self._upload.scales_crc32c))
        for name, held in wanted:
            if not finish.HasField(name):
                raise InvalidArgumentError(f"finish.{name} is required", field=f"finish.{name}")
            if getattr(finish, name) != held:
                # The rows held are not the caller's: sending the finish again cannot help.
                if not self._upload.committed:
                    self._service.uploads.drop(self._upload)
                raise DigestError("the rows held do not have the digest of the finish", field=f"finish.{name}")


def page_rows(service: Service, slot: Any, row_bytes: tuple[int, int], row: int, count: int) -> tuple[Bytes, Bytes]:
    """Rows [row, row + count) of a page in host memory: their keys and their scales, as bytes."""
    key_bytes, scale_bytes = row_bytes
    keys = service.host_extents.bytes_at(slot, row * key_bytes, count * key_bytes)
    scales = service.host_extents.bytes_at(slot, PAGE_KEYS * key_bytes + row * scale_bytes, count * scale_bytes)
    return keys, scales


def commit_upload(service: Service, upload: Upload, row_bytes: tuple[int, int]) -> None:
    """Make a complete upload visible. Raises CacheNotFoundError, LayerChangedError."""
    layer = upload.layer
    if upload.first_row <= layer.length_keys:  # else the commit refuses; so it does when the cache is gone
        first_page = upload.first_row // PAGE_KEYS
        for page, row, count in edges(layer, upload.first_row, upload.row_count):
            old = page_rows(service, layer.pages[page].host, row_bytes, row, count)
            new = page_rows(service, upload.staged[page - first_page], row_bytes, row, count)
            for source, target in zip(old, new, strict=True):
                target[:] = source
    service.uploads.commit(upload)
