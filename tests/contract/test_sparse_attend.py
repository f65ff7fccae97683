"""SparseAttend over real sockets: every answer row against float64, however the work is cut and wherever rows lie."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest
import streamindex_client
import torch
from streamindex_client import ClientOptions, FailedPreconditionError, InputError

from streamindex_service.ops.kv_rows import KvFormat, pack_rows
from tests.support.attention import Queries, Rows, Shape, wrong_rows

SHAPE, TOKENS, TOP_K, WINDOW = Shape(), 1901, 40, 100
FORMATS = [
    SHAPE,
    Shape(key_dim=80),
    Shape(KvFormat.BF16, 576, 512, heads=2),
    Shape(KvFormat.FP8_D512, 512, 512, heads=2),
    Shape(KvFormat.FP8_D576, 576, 512, heads=2, ratio=1),
]


@pytest.fixture(scope="module")
def client(roomy_service):
    with streamindex_client.connect(roomy_service.address, options=ClientOptions(chunk_bytes=60_000)) as made:
        yield made


@pytest.fixture(scope="module")
def rows():
    return Rows.drawn(SHAPE, TOKENS, 1)


@pytest.fixture(scope="module")
def cache(client, rows):
    made = SHAPE.create(client)
    rows.upload(made)
    yield made
    made.delete()


def span(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count)


def found_indices(cache, queries: Queries, top_k: int) -> torch.Tensor:
    """What a search finds, in the order that attention reads."""
    return cache.search_all(
        layer=0, q=queries.index_q, w=queries.index_w, top_k=top_k, positions=queries.positions, order="index"
    ).indices


@pytest.mark.parametrize("shape", FORMATS, ids=lambda s: f"{s.kv_format.value}-D{s.key_dim}")
def test_every_format_is_answered_from_a_search(client, shape):
    rows = Rows.drawn(shape, 700, 2)
    queries = Queries.drawn(shape, span(600, 90), 3)
    cache = shape.create(client)
    rows.upload(cache)
    keys = 700 // shape.ratio
    assert (cache.length(0), cache.kv_length(0), cache.window_length(0)) == (keys, keys, 700)
    sink = torch.tensor([0.5, -torch.inf, 3.0, torch.inf])[: shape.heads]
    answer = cache.sparse_attend_all(
        layer=0, q=queries.q, index_q=queries.index_q, index_w=queries.index_w, top_k=24, start_position=600,
        window=64, scale=shape.scale, sink=sink, want_lse=True,
    )  # fmt: skip
    assert answer.out.dtype == torch.bfloat16
    assert (answer.summary.kv_rows, answer.summary.window_rows, answer.summary.rows) == (keys, 700, 90)
    indices = found_indices(cache, queries, 24)
    assert wrong_rows(shape, rows, queries, indices, 64, answer.out, answer.lse, sink) == 0
    assert answer.summary.implementation == "chunked"
    cache.delete()


def test_given_indices_are_what_a_search_would_find_to_the_bit(cache, rows):
    queries = Queries.drawn(SHAPE, span(1500, 300), 4)
    found = cache.sparse_attend_all(
        layer=0, q=queries.q, index_q=queries.index_q, index_w=queries.index_w, top_k=TOP_K, start_position=1500,
        window=WINDOW, scale=SHAPE.scale,
    )  # fmt: skip
    indices = found_indices(cache, queries, TOP_K)
    given = cache.sparse_attend_all(
        layer=0, q=queries.q, indices=indices, start_position=1500, window=WINDOW, scale=SHAPE.scale
    )
    assert torch.equal(given.out, found.out)
    assert wrong_rows(SHAPE, rows, queries, indices, WINDOW, found.out) == 0


@pytest.mark.parametrize("window", [0, 40], ids=lambda w: f"W{w}")
def test_a_layer_of_ratio_128_is_attended_whole(client, window):
    """All visible rows, more than a search may find, after more tokens than have windows to keep."""
    shape, held, seen = Shape(key_dim=16, value_dim=16, heads=2, ratio=128), 6000, 5990
    generator = torch.Generator().manual_seed(11)
    first = 128 * seen
    rows = Rows(
        torch.zeros((0, shape.index_dim), dtype=torch.bfloat16),
        pack_rows(torch.randn((held, 16), generator=generator), shape.kv_format),
        pack_rows(torch.randn((first + 200 if window else 0, 16), generator=generator), shape.kv_format),
    )
    cache = shape.create(client)
    cache.append(layer=0, kv_rows=rows.kv.data, first_row=0)
    if window:
        cache.append(layer=0, window_rows=rows.window.data, first_row=0)
    queries = Queries.drawn(shape, span(first - 3, 5), 12)
    visible = (queries.positions + 1) // 128
    assert visible.tolist() == [seen - 1, seen - 1, seen, seen, seen]
    row = torch.arange(seen, dtype=torch.int32)
    indices = torch.where(row < visible[:, None], row, -1).to(torch.int32)
    answer = cache.sparse_attend_all(
        layer=0, q=queries.q, indices=indices, positions=queries.positions, window=window, scale=shape.scale,
        want_lse=True,
    )  # fmt: skip
    assert wrong_rows(shape, rows, queries, indices, window, answer.out, answer.lse) == 0
    whole = {"all_visible": True, "window": window, "scale": shape.scale, "want_lse": True}
    visible = cache.sparse_attend_all(layer=0, q=queries.q, positions=queries.positions, **whole)
    assert wrong_rows(shape, rows, queries, indices, window, visible.out, visible.lse) == 0
    one = cache.sparse_attend_all(layer=0, q=queries.q[:1], start_position=first - 3, **whole)
    assert torch.equal(one.out, visible.out[:1])
    assert torch.equal(one.lse, visible.lse[:1])
    cache.delete()


def test_all_visible_rows_come_from_an_iterator_of_queries(cache, rows):
    queries = Queries.drawn(SHAPE, span(1801, 100), 13)  # up to the last token, which sees all 475 rows
    row = torch.arange(rows.kv.rows, dtype=torch.int32)
    indices = torch.where(row < ((queries.positions + 1) // SHAPE.ratio)[:, None], row, -1).to(torch.int32)
    asked = {"layer": 0, "start_position": 1801, "all_visible": True, "window": WINDOW, "scale": SHAPE.scale}
    chunks = ((queries.q[at : at + 33],) for at in range(0, 100, 33))
    streamed = cache.sparse_attend_all(q=chunks, **asked)
    assert wrong_rows(SHAPE, rows, queries, indices, WINDOW, streamed.out) == 0
    assert torch.equal(cache.sparse_attend_all(q=queries.q, **asked).out, streamed.out)
    with pytest.raises(FailedPreconditionError, match="NO_KV_ROWS"):
        cache.sparse_attend_all(q=queries.q, **asked | {"start_position": 1804, "window": 0})


def test_no_cut_changes_a_bit(cache):
    """Chunks of the caller, tiles of the service, and rows alone."""
    queries = Queries.drawn(SHAPE, span(0, 300), 5)

    def attend(part: slice) -> torch.Tensor:
        return cache.sparse_attend_all(
            layer=0, q=queries.q[part], index_q=queries.index_q[part], index_w=queries.index_w[part], top_k=TOP_K,
            start_position=part.start, window=WINDOW, scale=SHAPE.scale,
        ).out  # fmt: skip

    whole = attend(slice(0, 300))
    assert torch.equal(torch.cat([attend(slice(at, min(at + 77, 300))) for at in range(0, 300, 77)]), whole)
    assert torch.equal(attend(slice(299, 300)), whole[299:])


def test_chunks_of_an_iterator_of_any_lengths(cache, rows):
    queries = Queries.drawn(SHAPE, span(900, 211), 6)
    cuts = [0, 1, 1, 40, 200, 211]
    told = []

    def chunks():
        for start, stop in itertools.pairwise(cuts):
            part = slice(start, stop)
            yield queries.q[part], queries.index_q[part], queries.index_w[part], queries.positions[part]

    with cache.sparse_attend(
        layer=0, q=chunks(), top_k=TOP_K, window=WINDOW, scale=SHAPE.scale,
        progress=lambda done, total: told.append((done, total)),
    ) as stream:  # fmt: skip
        parts = list(stream)
    assert [part.row_offset for part in parts] == [0, *np.cumsum([part.rows for part in parts])[:-1].tolist()]
    assert told[-1] == (211, 0)
    out = torch.cat([part.out for part in parts])
    assert wrong_rows(SHAPE, rows, queries, found_indices(cache, queries, TOP_K), WINDOW, out) == 0


def test_positions_in_any_order_and_far_apart(cache, rows):
    positions = torch.randint(0, TOKENS, (150,), generator=torch.Generator().manual_seed(7))
    positions[:4] = torch.tensor([0, TOKENS - 1, 0, 1000])
    queries = Queries.drawn(SHAPE, positions, 8)
    answer = cache.sparse_attend_all(
        layer=0, q=queries.q, index_q=queries.index_q, index_w=queries.index_w, top_k=TOP_K,
        positions=positions, window=WINDOW, scale=SHAPE.scale, want_lse=True,
    )  # fmt: skip
    indices = found_indices(cache, queries, TOP_K)
    assert wrong_rows(SHAPE, rows, queries, indices, WINDOW, answer.out, answer.lse) == 0


def test_indices_that_name_nothing_and_rows_without_any(cache, rows):
    queries = Queries.drawn(SHAPE, span(50, 40), 9)
    indices = torch.randint(-5, 600, (40, 30), generator=torch.Generator().manual_seed(10), dtype=torch.int32)
    indices[3] = -1
    indices[4] = 2**31 - 1
    indices[5] = 7  # one row many times
    arguments = {"layer": 0, "q": queries.q, "indices": indices, "start_position": 50, "scale": SHAPE.scale}
    bare = cache.sparse_attend_all(**arguments, want_lse=True)
    assert wrong_rows(SHAPE, rows, queries, indices, 0, bare.out, bare.lse) == 0
    assert not bare.out[3:5].any()
    assert torch.isinf(bare.lse[3:5]).all()
    sunk = cache.sparse_attend_all(**arguments, sink=torch.full((SHAPE.heads,), 1.5), window=20, want_lse=True)
    sink = torch.full((SHAPE.heads,), 1.5)
    assert wrong_rows(SHAPE, rows, queries, indices, 20, sunk.out, sunk.lse, sink) == 0
    window_alone = cache.sparse_attend_all(**arguments | {"indices": indices[:, :0]}, window=20)
    assert wrong_rows(SHAPE, rows, queries, indices[:, :0], 20, window_alone.out) == 0


def test_no_queries_are_answered_with_no_rows(cache):
    queries = Queries.drawn(SHAPE, span(0, 0), 11)
    answer = cache.sparse_attend_all(
        layer=0, q=queries.q, index_q=queries.index_q, index_w=queries.index_w, top_k=5, start_position=0,
        scale=1.0, want_lse=True,
    )  # fmt: skip
    assert answer.out.shape == (0, SHAPE.heads, SHAPE.value_dim)
    assert answer.lse.shape == (0, SHAPE.heads)


def test_an_empty_layer_has_nothing_to_attend(client):
    cache = SHAPE.create(client)
    queries = Queries.drawn(SHAPE, span(0, 7), 12)
    answer = cache.sparse_attend_all(
        layer=0, q=queries.q, index_q=queries.index_q, index_w=queries.index_w, top_k=5, start_position=0, scale=1.0
    )
    assert not answer.out.any()
    cache.delete()


def test_numpy_in_and_numpy_out(cache, rows):
    queries = Queries.drawn(SHAPE, span(1000, 20), 13)
    bits = [tensor.view(torch.int16).numpy().view(np.uint16) for tensor in (queries.q, queries.index_q)]
    answer = cache.sparse_attend_all(
        layer=0, q=bits[0], index_q=bits[1], index_w=queries.index_w.numpy(), top_k=TOP_K, start_position=1000,
        window=WINDOW, scale=SHAPE.scale, want_lse=True,
    )  # fmt: skip
    assert isinstance(answer.out, np.ndarray)
    assert answer.out.dtype == np.uint16
    out = torch.from_numpy(answer.out.astype(np.int32)).to(torch.int16).view(torch.bfloat16)
    indices = found_indices(cache, queries, TOP_K)
    assert wrong_rows(SHAPE, rows, queries, indices, WINDOW, out, torch.tensor(answer.lse)) == 0


def test_the_asyncio_client_gets_the_same(roomy_service, cache):
    queries = Queries.drawn(SHAPE, span(300, 50), 14)
    arguments = {
        "layer": 0, "q": queries.q, "index_q": queries.index_q, "index_w": queries.index_w, "top_k": TOP_K,
        "start_position": 300, "window": WINDOW, "scale": SHAPE.scale,
    }  # fmt: skip
    told = []

    async def attend():
        async with streamindex_client.connect_async(roomy_service.address) as client:
            same = await client.open_key_cache(cache.id)
            return await same.sparse_attend_all(**arguments, progress=lambda *figures: told.append(figures))

    assert torch.equal(asyncio.run(attend()).out, cache.sparse_attend_all(**arguments).out)
    assert told[-1] == (50, 50)


def test_forks_and_truncation_and_rewritten_rows(client, rows):
    cache = SHAPE.create(client)
    rows.upload(cache)
    queries = Queries.drawn(SHAPE, span(800, 60), 15)

    def check(which, held: Rows) -> None:
        answer = which.sparse_attend_all(
            layer=0, q=queries.q, index_q=queries.index_q, index_w=queries.index_w, top_k=TOP_K, start_position=800,
            window=WINDOW, scale=SHAPE.scale,
        )  # fmt: skip
        indices = found_indices(which, queries, TOP_K)
        assert wrong_rows(SHAPE, held, queries, indices, WINDOW, answer.out) == 0

    twin = cache.fork(keys=300)
    twin.refresh()
    assert (twin.length(0), twin.kv_length(0), twin.window_length(0)) == (300, 300, 301 * SHAPE.ratio - 1)
    other = Rows.drawn(SHAPE, 500, 16)
    other.upload(twin)  # over the first rows, which the cache keeps
    mixed = rows.cut(300, 1203)
    mixed.keys[:125] = other.keys
    mixed.kv.data[:125] = other.kv.data
    mixed.window.data[:500] = other.window.data
    check(twin, mixed)
    check(cache, rows)
    cache.truncate(230, window_rows=870)
    assert (cache.length(0), cache.kv_length(0), cache.window_length(0)) == (230, 230, 870)
    check(cache, rows.cut(230, 870))
    check(twin, mixed)
    short = cache.fork(window_rows=865)
    assert (short.length(0), short.kv_length(0), short.window_length(0)) == (230, 230, 865)
    check(short, rows.cut(230, 865))
    for made in (cache, twin, short):
        made.delete()


def test_a_client_refuses_what_makes_no_sense(client, cache):
    q = Queries.drawn(SHAPE, span(0, 3), 17)
    good = {"layer": 0, "q": q.q, "index_q": q.index_q, "index_w": q.index_w, "top_k": 3, "start_position": 0}
    good |= {"scale": 1.0}
    for wrong, field in [
        ({"top_k": None}, "top_k"),
        ({"indices": torch.zeros((3, 2))}, "top_k"),
        ({"q": q.q[:, :2]}, "q"),
        ({"q": q.q.float()}, "q"),
        ({"index_q": None}, "index_q"),
        ({"index_w": q.index_w[:2]}, "index_w"),
        ({"sink": torch.zeros(3)}, "sink"),
        ({"sink": torch.full((4,), torch.nan)}, "sink"),
        ({"scale": float("nan")}, "scale"),
        ({"window": -1}, "window"),
        ({"start_position": None}, "start_position"),
        ({"positions": torch.arange(3)}, "positions"),
        ({"layer": 1}, "layer"),
    ]:
        with pytest.raises(InputError) as caught:
            cache.sparse_attend_all(**good | wrong)
        assert caught.value.field == field, wrong
    with pytest.raises(InputError):
        cache.append(layer=0, keys=q.q, kv_rows=q.q)
    with pytest.raises(InputError):
        cache.append(layer=0)
    bare = client.create_key_cache(heads=3, head_dim=32, ratio=4, key_format="bf16", layers=1)
    for call in (lambda: bare.sparse_attend_all(**good), lambda: bare.append(layer=0, kv_rows=q.q[:, 0])):
        with pytest.raises(InputError):
            call()
    bare.delete()
