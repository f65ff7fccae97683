"""SearchBatch: a ragged decode step. Appends first, then every item's few rows; each item fails or not by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from streamindex.framing import Chunk
from streamindex.v1 import search_pb2 as pb

from streamindex_service.core.layers import KeyCache
from streamindex_service.core.sizes import answer_row_bytes
from streamindex_service.core.specs import CacheSpec, RowKind
from streamindex_service.errors import ServiceError
from streamindex_service.frontend import batch, requests
from streamindex_service.frontend.admission import AdmittedSearch, admit
from streamindex_service.frontend.appends import FewRows, append_rows
from streamindex_service.frontend.batch_group import BatchCall, BatchGroup, Member, Share, search_kind
from streamindex_service.frontend.host_memory import Block
from streamindex_service.frontend.index_tiles import IndexTiles
from streamindex_service.frontend.query_block import INDICES, SCORES, BlockLayout, fill_rows
from streamindex_service.frontend.requests import SearchParameters
from streamindex_service.frontend.service import Service


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
        self._call = BatchCall(deadline_s)
        self._layouts: dict[CacheSpec, BlockLayout] = {}

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
        response = pb.SearchBatchResponse()
        results = [response.results.add() for _ in request.items]  # one piece of memory: see `ipc.link.Fields`
        turn = batch.Turn()
        for item, result in zip(request.items, results, strict=True):
            try:
                await self._append(item, result)
            except ServiceError as error:
                batch.refuse(self._service, result, error)
            await turn.worked(len(item.append.keys))
        members = [
            (search_kind(member.cache.spec), member)
            for item, result in zip(request.items, results, strict=True)
            if item.row_count and (member := self._member(item, result)) is not None
        ]
        await self._call.answer(members, lambda: _SearchGroup(self._service, self._call, self._parameters))
        return response

    def _member(self, item: pb.SearchBatchItem, result: pb.SearchBatchResult) -> _SearchMember | None:
        """The item, if nothing is wrong with it so far."""
        if result.HasField("error"):
            return None
        try:
            cache = self._service.caches.get(self._owner, item.key_cache_id)
        except ServiceError as error:  # deleted since
            batch.refuse(self._service, result, error)
            return None
        return _SearchMember(self._service, item, result, cache, self._layout(cache.spec), self._parameters.want_scores)

    async def _append(self, item: pb.SearchBatchItem, result: pb.SearchBatchResult) -> None:
        cache = self._service.caches.get(self._owner, item.key_cache_id)
        layer = self._service.caches.layer(cache, item.layer)
        self._check_item(item, cache)
        if item.HasField("append"):
            asked = item.append
            parts = {"keys": asked.keys, "scales": asked.scales}
            few = FewRows.checked(self._service, cache.spec, RowKind.KEYS, asked.first_row, asked.row_count, parts)
            await append_rows(self._service, cache, item.layer, few)
        result.layer_keys = layer.length_keys

    def _check_item(self, item: pb.SearchBatchItem, cache: KeyCache) -> None:
        requests.check_same_kind(item.query_format, item.convention, cache.spec)
        q, w, _, _, _ = self._layout(cache.spec).row_bytes
        batch.check_item(item, (("q", item.q, q), ("w", item.w, w)))

    def _layout(self, spec: CacheSpec) -> BlockLayout:
        layout = self._layouts.get(spec)
        if layout is None:
            block_bytes = self._service.blocks.block_bytes
            # with scores: they are kept for keys that pass through the device page by page, beside others in a block
            layout = self._layouts[spec] = BlockLayout.of(spec, self._request.top_k, True, block_bytes)
        return layout


class _SearchMember(Member):
    """An item with rows."""

    def __init__(
        self,
        service: Service,
        item: pb.SearchBatchItem,
        result: pb.SearchBatchResult,
        cache: KeyCache,
        layout: BlockLayout,
        scored: bool,
    ) -> None:
        super().__init__(item, result, layout)
        self.cache = cache
        positions = np.array(item.positions, dtype=np.int64).tobytes()
        parts = (memoryview(item.q), memoryview(item.w), memoryview(positions))
        self.chunk = Chunk(0, item.row_count, parts, None)
        self._service = service
        self._indices: list[bytes] = []
        self._scores: list[bytes] = []
        self._scored = scored

    def refuse(self, error: ServiceError) -> None:
        """See `Member`."""
        if not self.failed:
            batch.refuse(self._service, self.result, error)

    def take(self, block: Block, at: int, rows: int) -> None:
        """See `Member`."""
        self._indices.append(self.layout.part(block, INDICES, at, rows).tobytes())
        self._scores.append(self.layout.part(block, SCORES, at, rows * self._scored).tobytes())

    def finish(self) -> None:
        """See `Member`."""
        self.result.indices, self.result.scores = b"".join(self._indices), b"".join(self._scores)


class _SearchGroup(BatchGroup[_SearchMember, AdmittedSearch]):
    """Items that are searched in one tile where they can be."""

    def __init__(self, service: Service, call: BatchCall, parameters: SearchParameters) -> None:
        super().__init__(service, call)
        self._parameters = parameters

    async def _open(self, member: _SearchMember) -> AdmittedSearch:
        admitted = await admit(
            self._service, member.cache, member.item.layer, self._parameters, self._call.deadline_s, among_others=True
        )
        assert admitted.tiles.layout == member.layout, "rows of two kinds in one block"
        return admitted

    def _fill(self, share: Share[_SearchMember, AdmittedSearch], block: Block) -> None:
        member = share.member
        fill_rows(
            member.layout, member.cache.spec, member.chunk, share.first, share.rows, block, share.at, share.first, None
        )

    def _index(self, admitted: AdmittedSearch) -> IndexTiles:
        return admitted.tiles
