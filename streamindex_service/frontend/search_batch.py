"""SearchBatch: a ragged decode step. Appends first, then every item's few rows; each item fails or not by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from streamindex.framing import Chunk
from streamindex.v1 import search_pb2 as pb

from streamindex_service.core.layers import KeyCache
from streamindex_service.core.sizes import SCALE_BYTES, KeyFormat, answer_row_bytes, key_row_bytes
from streamindex_service.core.specs import CacheSpec
from streamindex_service.errors import InvalidArgumentError, ServiceError
from streamindex_service.frontend import batch, requests, tensors
from streamindex_service.frontend.admission import AdmittedSearch, admit
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.neighbours import Neighbours
from streamindex_service.frontend.query_block import INDICES, SCORES, BlockLayout, fill_rows
from streamindex_service.frontend.service import Service
from streamindex_service.frontend.staging import commit_upload, write_rows


class BatchSearch:
    """One call. `deadline_s`: the caller's remaining time."""

    def __init__(
        self,
        service: Service,
        owner: str,
        request: pb.SearchBatchRequest,
        deadline_s: Callable[[], float | None],
    ) -> None:
        self._service = service
        self._owner = owner
        self._request = request
        self._deadline_s = deadline_s
        self._searches = Neighbours()

    async def run(self) -> pb.SearchBatchResponse:
        """Answer all items. Raises InvalidArgumentError for what concerns the whole call."""
        request = self._request
        self._parameters = requests.batch_parameters(request, self._service.settings)
        batch.check_size(self._service, request.items)
        rows = sum(item.row_count for item in request.items)
        answer_bytes = rows * answer_row_bytes(request.top_k, request.want_scores)
        batch.check_answers(self._service, len(request.items), answer_bytes)
        with (
            batch.step(self._service, self._parameters.band),
            batch.caches_kept(self._service, self._owner, request.items),
        ):
            return await self._answer()

    async def _answer(self) -> pb.SearchBatchResponse:
        # All appends before any search: an item may search the rows that another has appended.
        request = self._request
        results = [pb.SearchBatchResult() for _ in request.items]
        for item, result in zip(request.items, results, strict=True):
            try:
                await self._append(item, result)
            except ServiceError as error:
                batch.refuse(self._service, result, error)
        searches = [
            (item, result)
            for item, result in zip(request.items, results, strict=True)
            if item.row_count and not result.HasField("error")
        ]
        if len(searches) == 1:  # a task of its own would come a turn of the loop later
            await self._search(*searches[0])
        else:
            await self._search_all(searches)
        return pb.SearchBatchResponse(results=results)

    async def _search_all(self, searches: Sequence[tuple[pb.SearchBatchItem, pb.SearchBatchResult]]) -> None:
        turns = asyncio.Semaphore(batch.ITEMS_AT_ONCE)

        async def search(item: pb.SearchBatchItem, result: pb.SearchBatchResult) -> None:
            async with turns:
                await self._search(item, result)

        async with asyncio.TaskGroup() as group:
            for item, result in searches:
                group.create_task(search(item, result))

    async def _append(self, item: pb.SearchBatchItem, result: pb.SearchBatchResult) -> None:
        cache = self._service.caches.get(self._owner, item.key_cache_id)
        layer = self._service.caches.layer(cache, item.layer)
        self._check_item(item, cache)
        if item.HasField("append"):
            most = self._service.settings.limits.max_batch_rows
            if item.append.row_count > most:
                raise InvalidArgumentError(
                    f"append.row_count: at most {most} rows; longer uploads are streams",
                    field="append.row_count",
                    metadata={"limit": most},
                )
            await append_rows(self._service, cache, item.layer, item.append)
        result.layer_keys = layer.length_keys

    def _check_item(self, item: pb.SearchBatchItem, cache: KeyCache) -> None:
        requests.check_same_kind(item.query_format, item.convention, cache.spec)
        q, w, _, _, _ = self._layout(cache.spec).row_bytes
        batch.check_item(item, (("q", item.q, q), ("w", item.w, w)))

    def _layout(self, spec: CacheSpec) -> BlockLayout:
        block_bytes = self._service.blocks.block_bytes
        return BlockLayout.of(spec, self._request.top_k, self._request.want_scores, block_bytes)

    async def _search(self, item: pb.SearchBatchItem, result: pb.SearchBatchResult) -> None:
        try:
            cache = self._service.caches.get(self._owner, item.key_cache_id)
            with self._searches.part():
                async with await self._searches.beside(lambda: self._admit(cache, item.layer)) as admitted:
                    search = _ItemSearch(item, admitted, self._parameters.want_scores)
                    admitted.users.append(search)
                    result.indices, result.scores = await search.run()
                    self._service.counters.queries += item.row_count
        except ServiceError as error:
            batch.refuse(self._service, result, error)

    async def _admit(self, cache: KeyCache, layer: int) -> AdmittedSearch:
        return await admit(self._service, cache, layer, self._parameters, self._deadline_s)


class _ItemSearch:
    """One item, in as many tiles as it takes; nearly always one."""

    def __init__(self, item: pb.SearchBatchItem, admitted: AdmittedSearch, scored: bool) -> None:
        self._item = item
        self._admitted = admitted
        self._tiles = admitted.tiles
        self._layout = admitted.tiles.layout
        self._scored = scored
        self._series = batch.TileSeries()
        self._block: Block | None = None

    async def run(self) -> tuple[bytes, bytes]:
        """Indices and scores of the rows. Raises ServiceError."""
        item, cache = self._item, self._admitted.snapshot.spec
        positions = np.array(item.positions, dtype=np.int64).tobytes()
        parts = (memoryview(item.q), memoryview(item.w), memoryview(positions))
        chunk = Chunk(0, item.row_count, parts, None)
        self._block = block = await self._admitted.service.blocks.acquire()
        indices, scores = [], []
        first = 0
        while first < item.row_count:
            left = item.positions[first : first + self._layout.rows]
            count = min(len(left), self._tiles.tile_rows(self._tiles.keys_seen(max(left))))
            fill_rows(self._layout, cache, chunk, first, count, block, 0, first, None)
            keys = self._tiles.keys_seen(max(left[:count]))
            await self._series.run(self._tiles, block, 0, count, keys)
            indices.append(self._layout.part(block, INDICES, 0, count).tobytes())
            scores.append(self._layout.part(block, SCORES, 0, count * self._scored).tobytes())
            first += count
        return b"".join(indices), b"".join(scores)

    @property
    def runs(self) -> bool:
        """Whether the device has something of it, or will have."""
        return self._series.runs

    async def stop(self) -> None:
        """Wait for the device."""
        await self._series.stop()

    def give_back(self) -> None:
        """Give the block back."""
        if self._block is not None:
            self._admitted.service.blocks.release(self._block)


async def append_rows(service: Service, cache: KeyCache, layer: int, append: pb.SearchBatchItem.Append) -> None:
    """Write a few rows at an index, at once. Raises ServiceError; then nothing is written."""
    spec = cache.spec
    row_bytes = (key_row_bytes(spec.key_format, spec.head_dim), SCALE_BYTES if spec.key_format.has_scales else 0)
    chunk = Chunk(0, append.row_count, (memoryview(append.keys), memoryview(append.scales)), None)
    tensors.check_part_sizes(chunk, ("keys", "scales"), row_bytes)
    tensors.check_finite(chunk.parts[0], spec.key_format, spec.head_dim, "keys", 0)
    tensors.check_finite(chunk.parts[1], KeyFormat.FP32, 1, "scales", 0)
    most, uploads, rows = service.settings.limits.max_layer_keys, service.uploads, append.row_count
    upload = await service.room.make(lambda: uploads.start(cache, layer, append.first_row, rows, most))
    uploads.attach(upload)
    try:
        await service.room.make(lambda: uploads.hold(upload, rows))
        write_rows(service, upload, [chunk], row_bytes)
        upload.rows_held = rows
        await commit_upload(service, upload, row_bytes)
        service.counters.upload_bytes += chunk.payload_bytes
    finally:
        uploads.close(upload)
