"""Tiles over rows of several calls of attention: none that the device has no room for."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from streamindex.v1 import attention_pb2, types_pb2

from streamindex_service.config import Settings
from streamindex_service.core.band_queue import Band
from streamindex_service.core.estimates import DeviceSpeed
from streamindex_service.core.layers import Snapshot
from streamindex_service.core.sizes import KeyFormat, KvFormat
from streamindex_service.core.specs import CacheSpec, KvSpec, RowKind
from streamindex_service.frontend.attend_block import attend_layout
from streamindex_service.frontend.attend_requests import item_parameters
from streamindex_service.frontend.attend_tiles import AttendTiles
from streamindex_service.frontend.query_block import POSITIONS
from streamindex_service.frontend.tiles import TilePiece
from streamindex_service.frontend.tiles_together import joined
from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.ops.cached_attention import ATTENTION_TERMS

MIB = 1 << 20
SPEC = CacheSpec(
    1, 16, 1, KeyFormat.BF16, 1, "", 0, 60.0, types_pb2.PRIORITY_STANDARD, KvSpec(KvFormat.BF16, 512, 512, 1)
)
BLOCK_BYTES = 4 * MIB
# rows of an item, KV rows of its layer: one long and many short ones in turn, and all of one length
MIXED = [(1, 16_384) if number % 2 else (60, 8) for number in range(64)]
ALIKE = [(3, 2000)] * 64


def items(implementation: str, limit_bytes: int, shapes: list[tuple[int, int]]):
    """Parts of a block, and the bytes of a page."""
    settings = Settings()
    speed = DeviceSpeed()
    speed.observe(10**9, 1e-6)
    terms = pb.AttentionTerms(**asdict(ATTENTION_TERMS[implementation]))
    service = SimpleNamespace(
        settings=settings, hbm=SimpleNamespace(limit_bytes=limit_bytes), attention_speed=speed,
        blocks=SimpleNamespace(block_bytes=BLOCK_BYTES), governor=SimpleNamespace(tile_s=lambda band: 0.1),
        require_worker_info=lambda: SimpleNamespace(attention=SimpleNamespace(terms=terms)),
    )  # fmt: skip
    request = attention_pb2.SparseAttendBatchRequest(all_visible=True, scale=1.0)
    block, first, parts = SimpleNamespace(data=np.zeros(2 * BLOCK_BYTES, np.uint8)), 0, []
    search = SimpleNamespace(band=Band(types_pb2.PRIORITY_INTERACTIVE))
    for rows, kv_rows in shapes:
        item = attention_pb2.SparseAttendBatchItem(row_count=rows, positions=[kv_rows - 1] * rows)
        parameters = item_parameters(request, item, SPEC)
        layout = attend_layout(SPEC, parameters, True, 2 * BLOCK_BYTES)
        layout.part(block, POSITIONS, first, rows).view(np.int64)[:] = item.positions
        pages = tuple(object() for _ in range(-(-kv_rows // 256)))
        snapshot = Snapshot(SPEC, kv_rows, pages, 1, RowKind.KV, pages)
        tiles = AttendTiles(service, snapshot, None, parameters, layout, lambda: search, in_steps=True)
        parts.append((tiles, TilePiece(block, first, rows, 0, 0)))
        first += rows
    assert first <= layout.rows
    return parts, search


@pytest.mark.parametrize("limit_mib", [100, 300, 592, 700, 800, 4000])
@pytest.mark.parametrize("shapes", [MIXED, ALIKE], ids=["mixed", "alike"])
def test_a_tile_fits_a_device_that_holds_nothing_else(limit_mib, shapes):
    parts, search = items("triton", limit_mib * MIB, shapes)
    tiles = list(joined(parts, search))
    assert [part for tile in tiles for part in tile.parts] == parts
    for tile in tiles:
        need = tile.parts[0][0].need_together(tile.parts, smallest=False)
        assert len(need.pages) * SPEC.kv.form.page_bytes + need.floor_bytes <= limit_mib * MIB
        assert need.estimate_bytes <= need.floor_bytes
    if limit_mib == 4000:
        assert len(tiles) == 1


def test_index_rows_of_a_tile_take_no_more_than_a_workspace():
    parts, search = items("triton", 4000 * MIB, [(60, 8)] * 62 + [(1, 16_384)])
    tiles = list(joined(parts, search))
    assert len(tiles) > 1
    for tile in tiles:
        widest = max(each.width for each, _ in tile.parts)
        assert 8 * tile.rows * widest <= 256 * MIB


def test_where_rows_are_copied_those_of_one_length_are_together():
    parts, search = items("chunked", 4000 * MIB, [*ALIKE[:5], (3, 2001), *ALIKE[:2]])
    assert [len(tile.parts) for tile in joined(parts, search)] == [5, 1, 2]


def test_operations_are_those_of_the_rows_that_queries_see():
    ((tiles, piece),), _ = items("triton", 4000 * MIB, [(4, 1000)])
    layout = tiles._layout
    layout.part(piece.block, POSITIONS, 0, 4).view(np.int64)[:] = [0, 9, 99, 5000]
    assert tiles.flop_of(piece) == (1 + 10 + 100 + 1000) * 2 * 1024
