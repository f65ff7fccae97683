"""What a tile of attention is expected to take, against what the allocator says it took: the operation by itself, and
the tiles of SparseAttend and SparseAttendBatch as the service tells them."""

from __future__ import annotations

import pytest
import streamindex_client
import torch

from streamindex_service.core.meter import LARGE_BYTES
from streamindex_service.ops.kv_rows import KvFormat
from streamindex_service.testing.service import RunningService
from streamindex_service.worker.device import probe
from streamindex_service.worker.memory import MemoryWatch
from tests.support.attend_batch import Sequence
from tests.support.attention import Queries, Rows, Shape
from tests.support.attention_tiles import ALL_VISIBLE, TILES, Tile
from tests.support.estimates import LEAST_RATIO, Work, ratios

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20
DEVICE = "cuda:0"
TOP_K, WINDOW = 512, 128
TRIES = 30  # steps until the service has seen how fast they are, and takes them whole

V4 = Shape(KvFormat.BF16, 512, 512, heads=64, index_heads=64, index_dim=128)
PACKED = Shape(KvFormat.FP8_D512, 512, 512, heads=128, index_heads=64, index_dim=128)
GLM = Shape(KvFormat.FP8_D576, 576, 512, heads=128, index_heads=64, index_dim=128, ratio=1)
PORTABLE = Shape(KvFormat.BF16, 80, 64, heads=5, index_heads=32, index_dim=64)
# A tile is bounded by a block: larger ones than usual, so that tiles pass 64 MiB.
SETTINGS = {
    "worker": {"device": DEVICE},
    "memory": {
        "device_budget_bytes": 4096 * MIB,
        "host_budget_bytes": 4096 * MIB,
        "ingress_budget_bytes": 1024 * MIB,
        "search_block_bytes": 64 * MIB,
    },
}


@pytest.mark.parametrize("want_lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize(
    ("spec", "width", "window", "parts"), [*TILES, *((spec, None, *rest) for spec, *rest in ALL_VISIBLE)]
)
def test_a_tile_takes_what_is_reserved_for_it(spec, width, window, parts, want_lse):
    tile = Tile(spec, width, window, parts, want_lse)
    sequences, (q, indices, positions) = tile.sequences(DEVICE), tile.inputs()
    watch, work = MemoryWatch(probe(DEVICE)), Work()
    for _ in range(2):  # the first compiles
        with watch.peak_of(work):
            tile.attend(q.to(DEVICE), None if indices is None else indices.to(DEVICE), positions, sequences)
        torch.cuda.synchronize()
    estimate = tile.estimate_bytes()
    ratio = work.peak_bytes / estimate
    assert ratio <= 1.0, f"{work.peak_bytes} bytes, reserved were {estimate}"
    if estimate >= LARGE_BYTES:
        assert ratio >= LEAST_RATIO, f"{work.peak_bytes} bytes, reserved were {estimate}"


@pytest.mark.parametrize(
    ("shape", "tokens", "large"),
    [(V4, 80_000, True), (PACKED, 80_000, True), (GLM, 20_000, True), (PORTABLE, 20_000, False)],
    ids=lambda each: f"{each.kv_format.value}-D{each.key_dim}" if isinstance(each, Shape) else None,
)
def test_tiles_of_sparse_attend_take_what_the_governor_reserves(shape, tokens, large):
    """Early and late in the sequence, with a window and without, with indices of the caller's own, one row alone."""
    rows = Rows.drawn(shape, tokens, 1)
    with RunningService(SETTINGS) as service, streamindex_client.connect(service.address) as client:
        cache = shape.create(client)
        rows.upload(cache)
        for attempt in range(TRIES):
            count = 1000
            for start in (0, tokens - count):
                queries = Queries.drawn(shape, torch.arange(start, start + count), 2)
                asked = {"layer": 0, "q": queries.q, "positions": queries.positions, "scale": shape.scale}
                index = {"index_q": queries.index_q, "index_w": queries.index_w, "top_k": TOP_K}
                cache.sparse_attend_all(**asked, **index, window=WINDOW, want_lse=True)
                if attempt == 0:
                    found = cache.search_all(
                        layer=0, q=queries.index_q, w=queries.index_w, top_k=2 * TOP_K, positions=queries.positions,
                        order="index",
                    ).indices  # fmt: skip
                    cache.sparse_attend_all(**asked, indices=found, window=0)
                    one = {name: value[:1] if torch.is_tensor(value) else value for name, value in asked.items()}
                    cache.sparse_attend_all(**one, indices=found[:1], window=WINDOW)
            memory = ratios(service)
            if memory.large_tiles > 1 or not large:
                break
    assert 0.0 < memory.most_ratio_of_any <= 1.0, memory
    assert (memory.large_tiles > 0) >= large
    if memory.large_tiles:
        assert memory.least_ratio >= LEAST_RATIO, memory
    assert memory.failures == 0


@pytest.mark.parametrize("kv_format", [KvFormat.BF16, KvFormat.FP8_D512], ids=lambda each: each.value)
def test_tiles_of_a_decode_step_take_what_the_governor_reserves(kv_format):
    """Rows of many sequences in one tile: all that a block has, of 128 heads, for their KV rows stay where they are."""
    shape = Shape(kv_format, 512, 512, heads=128, index_heads=64, index_dim=128)
    asked = {"top_k": TOP_K, "window": WINDOW, "scale": shape.scale}
    with RunningService(SETTINGS) as service, streamindex_client.connect(service.address) as client:
        # ragged: with fewer rows than indices, and with more
        made = [Sequence(client, shape, 1500 + 13 * number, 3 + number % 3, number, **asked) for number in range(80)]
        items = [each.item() for each in made]
        for _ in range(TRIES):
            results = client.sparse_attend_batch(items, **asked, want_lse=True)
            assert all(result.error is None for result in results)
            memory = ratios(service)
            if memory.large_tiles > 1:
                break
    assert 0.0 < memory.most_ratio_of_any <= 1.0, memory
    assert memory.large_tiles > 0, "no tile had enough rows"
    assert memory.least_ratio >= LEAST_RATIO, memory
    assert memory.failures == 0
