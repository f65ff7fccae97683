"""SparseAttendBatch: a ragged step of attention over many caches, every item as SparseAttend answers it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import streamindex_client
import torch
from streamindex_client import AttendBatchItem, InputError

from streamindex_service.ops.kv_rows import KvFormat
from streamindex_service.testing.service import RunningService
from tests.support.attend_batch import ASKED, SCALE, Sequence
from tests.support.attention import Shape
from tests.support.calls import Calls
from tests.support.services import ROOMY, is_idle, wait_for

SHAPE = Shape()
SHAPES = [
    SHAPE,
    Shape(key_dim=80),
    Shape(KvFormat.BF16, 576, 512),
    Shape(KvFormat.FP8_D512, 512, 512, ratio=1),
    Shape(KvFormat.FP8_D576, 576, 512),
]
GIVEN = ASKED | {"top_k": None}


@pytest.fixture(scope="module")
def client(roomy_service):
    with streamindex_client.connect(roomy_service.address) as made:
        yield made


@pytest.fixture(scope="module")
def sequences(client):
    """Ragged: early and late, one row and several, with fewer rows than are asked for and with more."""
    made = [
        Sequence(client, SHAPE, tokens, rows, seed)
        for seed, (tokens, rows) in enumerate([(1901, 1), (40, 3), (700, 2), (2400, 5), (3, 1), (1024, 1)])
    ]
    yield made
    for each in made:
        each.cache.delete()


def test_every_item_is_answered_as_by_sparse_attend(client, sequences, calls):
    results = client.sparse_attend_batch([each.item() for each in sequences], **ASKED)
    for sequence, result in zip(sequences, results, strict=True):
        sequence.check(result)
        assert result.indices is None
    wait_for(lambda: is_idle(calls.load()))


def test_caches_of_all_formats_in_one_call_with_a_sink(client):
    made = [Sequence(client, SHAPES[seed % 5], 300 + 40 * seed, 1 + seed % 3, seed) for seed in range(10)]
    sink = torch.tensor([0.5, -torch.inf, 3.0, torch.inf])
    results = client.sparse_attend_batch([each.item() for each in made], **ASKED, sink=sink)
    for sequence, result in zip(made, results, strict=True):
        sequence.check(result, sink=sink)
        sequence.cache.delete()


def test_the_indices_that_were_found_come_on_request(client, sequences):
    results = client.sparse_attend_batch([each.item() for each in sequences], **ASKED, want_indices=True)
    for sequence, result in zip(sequences, results, strict=True):
        assert torch.equal(result.indices, sequence.found())


def test_given_indices(client, sequences):
    generator = torch.Generator().manual_seed(1)
    indices = [
        torch.randint(-3, each.cache.length(0) + 5, (len(each.queries), 30), generator=generator, dtype=torch.int32)
        for each in sequences
    ]
    items = [each.given(some) for each, some in zip(sequences, indices, strict=True)]
    results = client.sparse_attend_batch(items, **GIVEN, want_indices=True)
    for sequence, some, result in zip(sequences, indices, results, strict=True):
        sequence.check(result, indices=some, index_q=None, index_w=None, top_k=None)
        assert result.indices is None  # what came is not sent back


def test_all_visible_rows(client, sequences):
    """Of sequences whose rows are not equally many, each as alone."""
    items = [each.item(index_q=None, index_w=None) for each in sequences]
    results = client.sparse_attend_batch(items, **GIVEN, all_visible=True, want_indices=True)
    for sequence, result in zip(sequences, results, strict=True):
        row = torch.arange(sequence.rows.kv.rows, dtype=torch.int32)
        visible = (sequence.queries.positions + 1) // SHAPE.ratio
        indices = torch.where(row < visible[:, None], row, -1).to(torch.int32)
        alone = sequence.alone(index_q=None, index_w=None, top_k=None, all_visible=True)
        assert torch.equal(result.out, alone.out)
        assert torch.equal(result.lse, alone.lse)
        sequence.check_right(result, indices)
        assert result.indices is None


def test_all_visible_rows_of_layers_of_all_lengths(client, calls):
    """Long ones beside short ones, with widths that take more workspace than the least."""
    shape = Shape(key_dim=512, value_dim=512, ratio=1, index_heads=1, index_dim=16)
    failures = client.load().memory_failures
    made = [Sequence(client, shape, tokens, 1, tokens, window=0) for tokens in (40, 3500, 41, 40, 1, 2000)]
    items = [each.item(index_q=None, index_w=None) for each in made]
    results = client.sparse_attend_batch(items, all_visible=True, scale=SCALE, want_lse=True)
    for sequence, result in zip(made, results, strict=True):
        row = torch.arange(sequence.rows.kv.rows, dtype=torch.int32)
        indices = torch.where(row <= sequence.queries.positions[:, None], row, -1).to(torch.int32)
        sequence.check_right(result, indices)
        sequence.cache.delete()
    assert client.load().memory_failures == failures


def test_no_window_and_no_indices(client, sequences):
    none = [torch.empty((len(each.queries), 0), dtype=torch.int32) for each in sequences]
    items = [each.given(some) for each, some in zip(sequences, none, strict=True)]
    for result in client.sparse_attend_batch(items, scale=SCALE, want_lse=True):
        assert not result.out.any()
        assert torch.isinf(result.lse).all()
    for sequence, result in zip(sequences, client.sparse_attend_batch(items, **GIVEN), strict=True):
        sequence.check_right(result, torch.empty((len(sequence.queries), 0), dtype=torch.int32))


def test_rows_that_no_block_holds_together(client, sequences, calls):
    """Of one item, and of all: blocks have 256 KiB here, some 160 rows of these."""
    long = Sequence(client, SHAPE, 900, 400, 20)
    others = [Sequence(client, SHAPE, 500 + seed, 70, seed) for seed in range(21, 26)]
    made = [sequences[0], *others, long, sequences[1]]
    results = client.sparse_attend_batch([each.item() for each in made], **ASKED, want_indices=True)
    for sequence, result in zip(made, results, strict=True):
        sequence.check(result)
        assert torch.equal(result.indices, sequence.found())
    for sequence in (long, *others):
        sequence.cache.delete()
    wait_for(lambda: is_idle(calls.load()))


def test_positions_in_any_order_and_far_apart(client, sequences):
    positions = torch.tensor([8000, 0, 7999, 3, 4000, 8000, 100])
    far = Sequence(client, SHAPE, 8001, 7, 30, positions)
    failures = client.load().memory_failures
    results = client.sparse_attend_batch([sequences[0].item(), far.item(), sequences[1].item()], **ASKED)
    for sequence, result in zip((sequences[0], far, sequences[1]), results, strict=True):
        sequence.check(result)
    assert client.load().memory_failures == failures  # nor was any tile tried in vain
    far.cache.delete()


def test_one_layer_several_times_and_forks_that_share_its_pages(client, sequences):
    sequence = sequences[3]
    fork = sequence.cache.fork()
    q = sequence.queries
    items = [sequence.item(), sequence.item(), AttendBatchItem(fork, 0, q.q, q.index_q, q.index_w, None, 2395)]
    for result in client.sparse_attend_batch(items * 3, **ASKED):
        sequence.check(result)
    fork.delete()


def test_layers_are_named_by_item(client):
    cache = SHAPE.create(client, layers=2)
    one, other = (Sequence(client, SHAPE, 600, 2, seed) for seed in (40, 41))
    for layer, sequence in enumerate((one, other)):
        sequence.rows.upload(cache, layer)
    q = one.queries
    item = {"q": q.q, "index_q": q.index_q, "index_w": q.index_w, "start_position": 598}
    results = client.sparse_attend_batch([AttendBatchItem(cache, layer, **item) for layer in (1, 0)], **ASKED)
    assert torch.equal(results[1].out, one.alone().out)
    assert not torch.equal(results[0].out, results[1].out)
    for each in (cache, one.cache, other.cache):
        each.delete()


def test_no_rows_and_no_items(client, sequences):
    nothing = sequences[0]
    q = nothing.queries
    empty = nothing.item(q=q.q[:0], index_q=q.index_q[:0], index_w=q.index_w[:0], positions=q.positions[:0])
    results = client.sparse_attend_batch([empty, sequences[1].item()], **ASKED)
    assert results[0].error is None
    assert results[0].out.shape == (0, SHAPE.heads, SHAPE.value_dim)
    sequences[1].check(results[1])
    assert client.sparse_attend_batch([], **ASKED) == []
    assert client.sparse_attend_batch([], **GIVEN) == []


def test_numpy_and_asyncio_get_the_same(roomy_service, client, sequences):
    sequence = sequences[3]
    q = sequence.queries
    bits = [tensor.view(torch.int16).numpy().view(np.uint16) for tensor in (q.q, q.index_q)]

    async def attend():
        async with streamindex_client.connect_async(roomy_service.address) as asynchronous:
            cache = await asynchronous.open_key_cache(sequence.cache.id)
            item = AttendBatchItem(cache, 0, bits[0], bits[1], q.index_w.numpy(), positions=q.positions.numpy())
            return await asynchronous.sparse_attend_batch([item], **ASKED, want_indices=True)

    (result,) = asyncio.run(attend())
    assert isinstance(result.out, np.ndarray)
    assert result.out.dtype == np.uint16
    alone = sequence.alone()
    assert result.out.tobytes() == alone.out.view(torch.int16).numpy().tobytes()
    assert np.array_equal(result.lse, alone.lse.numpy())
    assert np.array_equal(result.indices, sequence.found().numpy())


def test_a_client_refuses_what_makes_no_sense(client, sequences):
    good, q = sequences[1], sequences[1].queries
    indices = torch.zeros((3, 2), dtype=torch.int32)
    for item, asked, field in [
        (good.item(), {"scale": float("nan")}, "scale"),
        (good.item(), {"sink": torch.full((4,), torch.nan)}, "sink"),
        (good.item(), {"sink": torch.zeros(3)}, r"items[1].q"),
        (good.item(), {"window": -1}, "window"),
        (good.item(), {"top_k": 0}, "top_k"),
        (good.item(), {"top_k": None}, "items[0].indices"),
        (good.given(indices), {}, "items[1].indices"),
        (good.item(index_q=None), {}, "items[1].index_q"),
        (good.item(index_w=q.index_w[:2]), {}, "items[1].index_w"),
        (good.item(positions=None), {}, "items[1].positions"),
        (good.item(start_position=3), {}, "items[1].positions"),
        (good.item(q=q.q.float()), {}, "items[1].q"),
    ]:
        first = sequences[0] if "sink" not in asked or len(asked["sink"]) == 4 else None
        items = [first.item(), item] if first is not None else [item, item]
        wanted = field if first is not None else "items[0].q"
        with pytest.raises(InputError) as caught:
            client.sparse_attend_batch(items, **ASKED | asked)
        assert caught.value.field == wanted, field
    ragged = [sequences[0].given(torch.zeros((1, 2), dtype=torch.int32)), good.given(indices[:, :1])]
    with pytest.raises(InputError, match=r"items\[1\]\.indices"):
        client.sparse_attend_batch(ragged, **GIVEN)


def test_sequences_attend_in_one_tile(inside, monkeypatch):
    """All sequences of a kind whose rows a block holds, in whatever number; and their indices are found in one."""
    submit, tiles = inside.server.service.device.submit, []

    def seen(views, block, request_key, message):
        tile = message(0)
        kind = tile.WhichOneof("message")
        tiles.append((kind, [each.rows for each in getattr(tile, kind).sequences]))
        return submit(views, block, request_key, message)

    with streamindex_client.connect(inside.target) as client, Calls(inside.target) as calls:
        made = [Sequence(client, SHAPE, 200 + seed, 1 + seed % 3, seed) for seed in range(20)]
        other = Sequence(client, SHAPES[1], 300, 2, 50)
        monkeypatch.setattr(inside.server.service.device, "submit", seen)
        results = client.sparse_attend_batch([each.item() for each in [*made, other]], **ASKED)
        monkeypatch.undo()
        for sequence, result in zip([*made, other], results, strict=True):
            sequence.check(result)
            sequence.cache.delete()
        wait_for(lambda: is_idle(calls.load()))
    rows = [1 + seed % 3 for seed in range(20)]
    assert sorted(tiles) == [("attend_tile", rows), ("attend_tile", [2]), ("search_tile", rows), ("search_tile", [2])]


def test_more_items_than_calls_may_be_open():
    """A hundred, where 64 may be open: one call takes no more than half of them at a time."""
    settings = {**ROOMY, "limits": {"max_open_searches": 64}}
    with RunningService(settings) as service, streamindex_client.connect(service.address) as client:
        sequence = Sequence(client, SHAPE, 700, 1, 60)
        alone = sequence.alone()
        for result in client.sparse_attend_batch([sequence.item()] * 100, **ASKED):
            assert result.error is None, result.error
            assert torch.equal(result.out, alone.out)
