"""SparseAttendBatch: a ragged decode step of attention; each item fails or not by itself.

Rows that items append are written first, all of them before anything attends. Items of one kind, as they nearly always
are, pass through blocks in groups: their indices are found as in a SearchBatch, and then their rows attend together.
"""

from __future__ import annotations

from collections.abc import Callable

from streamindex.v1 import attention_pb2 as pb
from streamindex.v1 import types_pb2

from streamindex_service.core.band_queue import Band
from streamindex_service.core.specs import RowKind
from streamindex_service.errors import InvalidArgumentError, ServiceError
from streamindex_service.frontend import batch, requests
from streamindex_service.frontend.appends import FewRows, append_rows, naming
from streamindex_service.frontend.attend_block import INDICES, LSE, OUT, PARTS, attend_layout, part_bytes
from streamindex_service.frontend.attend_group import AttendGroup, AttendMember, refuse
from streamindex_service.frontend.attend_requests import check_asked, item_parameters
from streamindex_service.frontend.batch_group import BatchCall, search_kind
from streamindex_service.frontend.service import Service

# Keys last: a search of keys that have no KV rows is refused.
_APPEND_ORDER = (RowKind.WINDOW, RowKind.KV, RowKind.KEYS)


class BatchAttention:
    """One call. `deadline_s`: the caller's remaining time."""

    def __init__(
        self,
        service: Service,
        owner: str,
        request: pb.SparseAttendBatchRequest,
        deadline_s: Callable[[], float | None],
    ) -> None:
        self._service = service
        self._owner = owner
        self._request = request
        self._call = BatchCall(deadline_s)
        found = request.want_indices and request.WhichOneof("selection") == "top_k"
        self._kept = (OUT, LSE, INDICES) if found else (OUT, LSE)

    async def run(self) -> pb.SparseAttendBatchResponse:
        """Answer all items. Raises InvalidArgumentError for what concerns the whole call."""
        request, service = self._request, self._service
        check_asked(request, service.settings)
        batch.check_size(service, request.items)
        response = pb.SparseAttendBatchResponse()
        results = [response.results.add() for _ in request.items]  # one piece of memory: see `ipc.link.Fields`
        members = [
            member
            for item, result in zip(request.items, results, strict=True)
            if (member := self._checked(item, result)) is not None
        ]
        answer_bytes = sum(
            member.item.row_count * member.layout.row_bytes[tensor] for member in members for tensor in self._kept
        )
        batch.check_answers(service, len(results), answer_bytes)
        band = Band(request.priority or types_pb2.PRIORITY_INTERACTIVE)
        with batch.step(service, band), batch.caches_kept(service, self._owner, request.items):
            turn = batch.Turn()
            for member in members:
                if member.item.appends:
                    await turn.worked(await self._append(member))
            for member in members:
                _tell_lengths(member)
            asked = [each for each in members if not each.failed and (each.rows or not each.item.appends)]
            kinds = [((each.parameters.kv, search_kind(each.cache.spec), each.layout), each) for each in asked]
            await self._call.answer(kinds, lambda: AttendGroup(service, self._call))
        return response

    async def _append(self, member: AttendMember) -> int:
        """Write its rows, of each kind as a whole or not at all, if nothing is wrong with any of them; their bytes."""
        service, cache, layer = self._service, member.cache, member.item.layer
        appends: dict[RowKind, tuple[int, FewRows]] = {}
        try:
            appends = self._checked_appends(member)
            for kind in _APPEND_ORDER:
                if kind in appends:
                    number, few = appends[kind]
                    with naming(f"appends[{number}]"):
                        await append_rows(service, cache, layer, few)
        except ServiceError as error:
            member.refuse(error)
        return sum(few.chunk.payload_bytes for _, few in appends.values())

    def _checked_appends(self, member: AttendMember) -> dict[RowKind, tuple[int, FewRows]]:
        """What it appends, and the number among its appends. Raises ServiceError."""
        service, cache = self._service, member.cache
        found: dict[RowKind, tuple[int, FewRows]] = {}
        for number, asked in enumerate(member.item.appends):
            with naming(f"appends[{number}]"):
                requests.within("row_kind", asked.row_kind, 0, max(RowKind))
                kind = RowKind(asked.row_kind or RowKind.KEYS)
                if kind in found:
                    raise InvalidArgumentError("an item appends rows of a kind at most once", field="row_kind")
                parts = {"rows": asked.rows, "scales": asked.scales}
                few = FewRows.checked(service, cache.spec, kind, asked.first_row, asked.row_count, parts)
                few.check_place(service, cache, member.item.layer)
                found[kind] = number, few
        return found

    def _checked(self, item: pb.SparseAttendBatchItem, result: pb.SparseAttendBatchResult) -> AttendMember | None:
        """The item, if nothing is wrong with it so far."""
        service = self._service
        try:
            cache = service.caches.get(self._owner, item.key_cache_id)
            service.caches.layer(cache, item.layer)
            parameters = item_parameters(self._request, item, cache.spec)
            layout = attend_layout(cache.spec, parameters, True, service.blocks.block_bytes)
            sizes = dict(zip(PARTS, part_bytes(layout, parameters), strict=True))
            tensors = [(name, getattr(item, name), size) for name, size in sizes.items() if name != "positions"]
            batch.check_item(item, tensors)
        except ServiceError as error:
            refuse(service, result, error)
            return None
        return AttendMember(service, item, result, cache, parameters, layout, self._kept)


def _tell_lengths(member: AttendMember) -> None:
    """How long the layer is. Of a cache that was deleted meanwhile nothing is left; whoever goes on hears of that."""
    cache, result = member.cache, member.result
    layer = member.item.layer
    result.layer_keys = cache.layers[layer].length_keys
    result.kv_rows = cache.kv_layers[layer].length_keys
    result.window_rows = cache.window_layers[layer].length_keys
