"""What the device ledger says, beside what lies on the device: extents, pages in them, tables of views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamindex_service.frontend.service import Service
from tests.support.calls import Calls
from tests.support.services import is_idle, wait_for
from tests.support.tensors import Draw, Kind

ROUNDED_BYTES = 512  # of every tensor, by the allocator of CUDA devices


@dataclass(frozen=True)
class OnDevice:
    """As the frontend has it at rest. extents: id -> bytes. table_bytes: of the tables of page addresses that views of
    index keys keep there: one of keys, and one of scales."""

    reserved_bytes: int
    extents: dict[int, int]
    pages: int
    table_bytes: int

    @classmethod
    def of(cls, service: Service, kinds: Sequence[Kind]) -> OnDevice:
        """Checks the pages on the way: each has a place of its own, in an extent of its size. kinds: of all caches with
        index keys."""
        residency = service.governor.residency
        pool = residency.device
        extents = {number: extent.slots * extent.page_bytes for number, extent in pool._extents.items()}
        placed = [(page.device, page.page_bytes) for page in residency.pages()]
        assert len(set(placed)) == len(placed) == pool.pages_in_use == len(residency)
        for place, page_bytes in placed:
            assert pool._extents[place.extent_id].page_bytes == page_bytes
            assert place.offset_bytes % page_bytes == 0
            assert place.offset_bytes + page_bytes <= extents[place.extent_id]
        assert sum(page_bytes for _, page_bytes in placed) == residency.resident_bytes == pool.page_bytes_in_use
        tables_of = {page_bytes_of(kind): 1 + kind.has_scales for kind in kinds}
        tables = 0
        for view in service.device.views:
            if view.pages:
                rounded = -(-8 * len(view.pages) // ROUNDED_BYTES) * ROUNDED_BYTES
                tables += tables_of.get(view.pages[0].page_bytes, 0) * rounded
        return cls(service.hbm.reserved_bytes, extents, len(placed), tables)


def page_bytes_of(kind: Kind) -> int:
    """Of index keys."""
    return 256 * (kind.row_bytes + 4 * kind.has_scales)


def churn(calls: Calls, kinds: Sequence[Kind], sizes: Sequence[int], at_rest: Callable[[], None]) -> None:
    """Caches of ragged sizes come, grow, are forked, searched, cut and deleted; `at_rest` is called again and again
    with nothing on its way, at last without any cache."""
    draw, chunk_rows = Draw(1), 4096

    def rest() -> None:
        wait_for(lambda: is_idle(calls.load()))
        at_rest()

    def search(kind: Kind, cache_id: str, rows: int = 5) -> None:
        calls.search(kind, cache_id, draw.queries(kind, rows, start_position=max(sizes) * kind.ratio), 40)

    made = [(kind, calls.create(kind).id) for kind in kinds for _ in sizes]
    for (kind, cache_id), keys in zip(made, [*sizes] * len(kinds), strict=True):
        calls.upload(kind, cache_id, draw.keys(kind, keys), chunk_rows=chunk_rows)
    rest()
    for _ in range(2):
        for kind, cache_id in made:
            search(kind, cache_id)
            rest()
    forks = [(kind, calls.fork(cache_id).id) for kind, cache_id in made[::2]]
    for number, (kind, cache_id) in enumerate(forks):
        first_row = calls.get(cache_id).layer_keys[0]
        calls.upload(kind, cache_id, draw.keys(kind, 300 + number), first_row=first_row, chunk_rows=chunk_rows)
        search(kind, cache_id)
    rest()
    for kind, cache_id in made[1::3]:
        calls.truncate(cache_id, 100)
        search(kind, cache_id)
    rest()
    everything = [*made, *forks]
    for number, (_, cache_id) in enumerate(everything):
        calls.delete(cache_id)
        if number % 4 == 1 and number + 1 < len(everything):
            search(*everything[-1])
        rest()
