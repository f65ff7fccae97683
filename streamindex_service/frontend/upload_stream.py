"""AppendKeys: one stream that writes one upload."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from streamindex.checksum import combine, crc32c
from streamindex.framing import Chunk
from streamindex.v1 import key_cache_pb2 as pb

from streamindex_service.core.uploads import Upload
from streamindex_service.errors import (
    DigestError,
    InvalidArgumentError,
    MalformedMessageError,
    ServiceError,
    SlowConsumerError,
)
from streamindex_service.frontend import tensors
from streamindex_service.frontend.ingest import IngestLane
from streamindex_service.frontend.messages import MessageWriter, read_message
from streamindex_service.frontend.row_checks import row_check
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.staging import commit_upload, page_ranges, page_rows, write_rows
from streamindex_service.frontend.tensors import RowRange


class _Arrived(NamedTuple):
    """A chunk whose checksum is right."""

    chunk: Chunk
    keys_crc32c: int


class UploadStream:
    """Reads chunks and verifies their checksums, has them checked and copied on the ingest threads, acknowledges and
    commits."""

    def __init__(self, service: Service, upload: Upload, context: Any, writer: MessageWriter) -> None:
        self._service = service
        self._upload = upload
        self._context = context
        self._writer = writer
        self._checks = row_check(upload.cache.spec, upload.kind)
        form = upload.cache.spec.form(upload.kind)
        self._row_bytes = (form.row_bytes, form.scale_bytes)
        self._rows_taken = upload.rows_held
        self._reading: asyncio.Task[Any] | None = None
        self._heard_at = service.clock()
        self._too_slow: SlowConsumerError | None = None  # what the caller did not send, or read
        self._acknowledge_now = asyncio.Event()
        self._lane = IngestLane(
            service.ingest_threads,
            service.ingress_budget,
            news_bytes=int(service.settings.limits.upload_window_bytes) // 4,
            news=self._acknowledge_now.set,
            failed=self._stop_reading,
        )

    async def run(self) -> None:
        """Until the commit or the end of the stream. `close` must follow, whatever happens.

        Raises ServiceError; what is held can still be resumed.
        """
        acknowledger = asyncio.create_task(self._acknowledge())
        listener = asyncio.create_task(self._listen_for_silence())
        try:
            while (message := await self._next()) is not None:
                if isinstance(message, Chunk):
                    await self._take(message)
                elif message.WhichOneof("message") == "finish":
                    await self._lane.settle()
                    acknowledger.cancel()
                    await self._finish(message.finish)
                    return
                else:
                    raise MalformedMessageError("a header comes first and once, then chunks, then finish")
            # The end of the stream alone never commits; what is held stays for a resume.
            await self._lane.settle()
        except ServiceError:
            # Chunks before the refused one are held; if one of them is to be refused, that comes first.
            await self._lane.settle()
            raise
        finally:
            acknowledger.cancel()
            listener.cancel()

    async def close(self) -> None:
        """Let go of the upload.

        Work on a chunk cannot be stopped; the pages that it writes to must not go before it is done.
        """
        try:
            await self._lane.close()
        finally:
            self._too_slow = None  # raised, it holds the frames that hold this
            self._service.uploads.detach(self._upload)

    async def _next(self) -> Any:
        """The next message. Raises SlowConsumerError; what the work on a chunk has raised, even while none comes."""
        await self._service.pacing.before_reading()
        if (reason := self._lane.failure or self._too_slow) is not None:
            raise reason
        self._heard_at = self._service.clock()  # silence begins when there is somebody to listen
        self._reading = asyncio.current_task()
        try:
            return await read_message(self._context)
        except asyncio.CancelledError:
            reason = self._lane.failure or self._too_slow
            if reason is None or self._reading is None:
                raise
            self._reading.uncancel()
            raise reason from None
        finally:
            self._reading = None

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()

    async def _listen_for_silence(self) -> None:
        # One look a period, not a timer for every message: silence is noticed after one to two of them.
        period_s = self._service.settings.limits.slow_consumer_s
        while True:
            await asyncio.sleep(period_s)
            if self._reading is not None and self._service.clock() - self._heard_at >= period_s:
                self._end_for(SlowConsumerError("nothing came for too long; what is held can be resumed"))
                return

    def _end_for(self, reason: SlowConsumerError) -> None:
        self._too_slow = reason
        self._stop_reading()

    async def _take(self, chunk: Chunk) -> None:
        self._service.pacing.read(chunk.payload_bytes)
        limit = int(self._service.settings.limits.max_chunk_bytes)
        if chunk.payload_bytes > limit:
            raise InvalidArgumentError(
                f"a chunk may have {limit} bytes",
                field="chunk",
                metadata={"limit": limit, "received_bytes": chunk.payload_bytes},
            )
        if chunk.crc32c is None:
            raise InvalidArgumentError("chunk.crc32c is required", field="chunk.crc32c")
        if self._upload.committed:  # its rows are the layer's now; there is nothing to compare a chunk with
            raise InvalidArgumentError("the upload is committed; only finish can be sent again", field="chunk")
        tensors.check_part_sizes(chunk, ("keys", "scales"), self._row_bytes)
        # Here and not on a thread: the bytes are still in the processor's cache, and a thread's call that lets go of
        # the interpreter lock has to take it away from this loop afterwards, which costs more than the checksum.
        arrived = _Arrived(chunk, tensors.verify_checksum(chunk)[0])
        if self._upload.is_repeat(chunk.row_offset, chunk.row_count, self._rows_taken):
            await self._lane.settle()  # what it repeats must be there to be compared
            await self._lane.put(self._compare, arrived, chunk.payload_bytes)
        else:
            rows = chunk.row_offset + chunk.row_count
            await self._service.room.make(lambda: self._service.uploads.hold(self._upload, rows))
            self._rows_taken += chunk.row_count
            self._service.counters.upload_bytes += chunk.payload_bytes
            await self._lane.put(self._store, arrived, chunk.payload_bytes)

    async def _acknowledge(self) -> None:
        while True:
            await self._acknowledge_now.wait()
            self._acknowledge_now.clear()
            acknowledged = pb.UploadAcknowledged(row_offset=self._upload.rows_held)
            try:
                await self._writer.write(pb.AppendKeysResponse(acknowledged=acknowledged))
            except SlowConsumerError as error:  # nobody else hears of it before the finish
                self._end_for(error)
                return

    # On threads, with chunks that follow each other; what is returned counts them, in order.

    def _compare(self, arrived: Sequence[_Arrived]) -> list[Callable[[], None]]:
        for chunk, _ in arrived:
            targets = [
                RowRange(first, count, page_rows(self._service, self._upload.staged[page], self._row_bytes, row, count))
                for page, row, first, count in page_ranges(self._upload, chunk.row_offset, chunk.row_count)
            ]
            tensors.compare_rows(chunk, targets, self._row_bytes)
        return [lambda: None] * len(arrived)

    def _store(self, arrived: Sequence[_Arrived]) -> list[Callable[[], None]]:
        """Check and write chunks. What is found wrong after the write was never counted, and is written over."""
        chunks = [chunk for chunk, _ in arrived]
        if not self._checks.together:
            self._check_chunks(chunks)
            write_rows(self._service, self._upload, chunks, self._row_bytes)
        else:
            # Where they lie now, many chunks are one tensor, whose elements are checked in two calls. Every call that
            # lets go of the interpreter lock has to wait for it afterwards, and makes the loop wait.
            row = chunks[0].row_offset
            for stretch in write_rows(self._service, self._upload, chunks, self._row_bytes):
                self._checks.rows(stretch, row)
                row += len(stretch) // self._row_bytes[0]
        return [partial(self._count, each) for each in arrived]

    def _check_chunks(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            keys, scales = chunk.parts
            self._checks.rows(keys, chunk.row_offset)
            self._checks.scales(scales, chunk.row_offset)

    def _count(self, arrived: _Arrived) -> None:
        upload, chunk = self._upload, arrived.chunk
        keys, scales = chunk.parts
        upload.keys_crc32c = combine(upload.keys_crc32c, arrived.keys_crc32c, len(keys))
        upload.scales_crc32c = crc32c(scales, upload.scales_crc32c)
        upload.rows_held += chunk.row_count

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
            await commit_upload(self._service, upload, self._row_bytes)
        committed = pb.UploadCommitted(layer_keys=upload.layer_keys)
        await self._writer.write(pb.AppendKeysResponse(committed=committed))

    def _check_digest(self, finish: pb.AppendKeysFinish) -> None:
        wanted = [("keys_crc32c", self._upload.keys_crc32c)]
        if self._row_bytes[1]:
            wanted.append(("scales_crc32c", self._upload.scales_crc32c))
        for name, held in wanted:
            if not finish.HasField(name):
                raise InvalidArgumentError(f"finish.{name} is required", field=f"finish.{name}")
            if getattr(finish, name) != held:
                # The rows held are not the caller's: sending the finish again cannot help.
                if not self._upload.committed:
                    self._service.uploads.drop(self._upload)
                raise DigestError("the rows held do not have the digest of the finish", field=f"finish.{name}")
