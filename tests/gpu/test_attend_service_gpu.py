"""SparseAttend through the whole service on a CUDA device: the kernels' answers, a killed worker, and the memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import streamindex_client
import torch

from streamindex_service.ops.kv_rows import KvFormat
from streamindex_service.testing.service import RunningService
from tests.support.attend_batch import ASKED, Sequence
from tests.support.attention import Queries, Rows, Shape, wrong_rows
from tests.support.decoding import Decoding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20
TOP_K, WINDOW = 512, 128
SHAPES = [
    Shape(KvFormat.BF16, 512, 512, heads=64, index_heads=64, index_dim=128),
    Shape(KvFormat.FP8_D512, 512, 512, heads=128, index_heads=64, index_dim=128),
    Shape(KvFormat.FP8_D576, 576, 512, heads=128, index_heads=64, index_dim=128, ratio=1),
    Shape(KvFormat.BF16, 80, 64, heads=5, index_heads=32, index_dim=64),  # the portable kernel
]
SETTINGS = {"worker": {"device": "cuda:0"}, "memory": {"device_budget_bytes": 1024 * MIB}}


def span(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count)


def arguments(shape: Shape, queries: Queries) -> dict[str, object]:
    return {
        "layer": 0, "q": queries.q, "index_q": queries.index_q, "index_w": queries.index_w, "top_k": TOP_K,
        "positions": queries.positions, "window": WINDOW, "scale": shape.scale,
    }  # fmt: skip


@pytest.fixture(scope="module")
def service():
    with RunningService(SETTINGS) as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    with streamindex_client.connect(service.address) as made:
        yield made


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.kv_format.value}-D{s.key_dim}-H{s.heads}")
def test_answers_of_the_kernels(client, shape):
    tokens = 9001
    rows, queries = Rows.drawn(shape, tokens, 1), Queries.drawn(shape, span(tokens - 300, 300), 2)
    cache = shape.create(client)
    rows.upload(cache)
    sink = torch.randn(shape.heads, generator=torch.Generator().manual_seed(3))
    answer = cache.sparse_attend_all(**arguments(shape, queries), sink=sink, want_lse=True)
    assert answer.summary.implementation == "triton"
    search = {"q": queries.index_q, "w": queries.index_w, "top_k": TOP_K, "positions": queries.positions}
    indices = cache.search_all(layer=0, order="index", **search).indices
    assert wrong_rows(shape, rows, queries, indices, WINDOW, answer.out, answer.lse, sink) == 0
    # given indices, rows alone and other chunks: the same bits
    given = cache.sparse_attend_all(
        layer=0, q=queries.q, indices=indices, positions=queries.positions, window=WINDOW, scale=shape.scale, sink=sink
    )
    assert torch.equal(given.out, answer.out)
    for start, stop in ((0, 1), (17, 60), (299, 300)):
        part = slice(start, stop)
        some = Queries(queries.q[part], queries.index_q[part], queries.index_w[part], queries.positions[part])
        again = cache.sparse_attend_all(**arguments(shape, some), sink=sink)
        assert torch.equal(again.out, answer.out[part])
    cache.delete()


@pytest.mark.parametrize("heads", [16, 64])
def test_layers_of_ratio_128_are_attended_whole(client, heads):
    """In a stream and in a step of several sequences; each the same bits whatever is beside it."""
    shape = Shape(KvFormat.FP8_D512, 512, 512, heads=heads, index_heads=1, index_dim=16, ratio=128)
    made = [Sequence(client, shape, tokens, 2, tokens, window=WINDOW) for tokens in (60_000, 300, 20_000)]
    asked = {"all_visible": True, "window": WINDOW, "scale": shape.scale, "want_lse": True}
    items = [each.item(index_q=None, index_w=None) for each in made]
    for each, item, result in zip(made, items, client.sparse_attend_batch(items, **asked), strict=True):
        assert result.error is None, result.error
        (alone,) = client.sparse_attend_batch([item], **asked)
        assert torch.equal(alone.out, result.out)
        assert torch.equal(alone.lse, result.lse)
        q = each.queries
        stream = each.cache.sparse_attend_all(layer=0, q=q.q, positions=q.positions, **asked)
        one = each.cache.sparse_attend_all(layer=0, q=q.q[1:], positions=q.positions[1:], **asked)
        assert torch.equal(one.out, stream.out[1:])
        row = torch.arange(each.rows.kv.rows, dtype=torch.int32)
        indices = torch.where(row < ((q.positions + 1) // 128)[:, None], row, -1).to(torch.int32)
        for some in (result, stream):
            assert wrong_rows(shape, each.rows, q, indices, WINDOW, some.out, some.lse) == 0
        each.cache.delete()


def test_indices_that_name_nothing_and_positions_far_apart(client):
    shape = SHAPES[0]
    rows = Rows.drawn(shape, 6000, 4)
    generator = torch.Generator().manual_seed(5)
    queries = Queries.drawn(shape, torch.randint(0, 6000, (90,), generator=generator), 6)
    indices = torch.randint(-5, 1600, (90, 300), generator=generator, dtype=torch.int32)
    indices[7] = -1
    cache = shape.create(client)
    rows.upload(cache)
    for window in (0, WINDOW):
        answer = cache.sparse_attend_all(
            layer=0, q=queries.q, indices=indices, positions=queries.positions, window=window, scale=shape.scale,
            want_lse=True,
        )  # fmt: skip
        assert wrong_rows(shape, rows, queries, indices, window, answer.out, answer.lse) == 0
    cache.delete()


def test_a_worker_killed_in_the_middle_costs_no_row_and_no_answer():
    shape = SHAPES[0]
    rows, queries = Rows.drawn(shape, 8000, 7), Queries.drawn(shape, span(7000, 600), 8)
    with RunningService(SETTINGS) as service, streamindex_client.connect(service.address) as client:
        cache = shape.create(client)
        rows.upload(cache)
        undisturbed = cache.sparse_attend_all(**arguments(shape, queries)).out
        (worker,) = service.worker_pids()

        def chunks():
            for start in range(0, 600, 50):
                if start == 300:
                    os.kill(worker, signal.SIGKILL)
                part = slice(start, start + 50)
                yield queries.q[part], queries.index_q[part], queries.index_w[part]

        changed = arguments(shape, queries) | {"q": chunks(), "start_position": 7000}
        changed |= {"index_q": None, "index_w": None, "positions": None}
        assert torch.equal(cache.sparse_attend_all(**changed).out, undisturbed)
        load = client.load()
        assert load.worker_restarts == 1
        assert 0 < load.device_peak_bytes <= 1024 * MIB


def test_no_tile_takes_more_memory_than_was_estimated(service, client):
    shape = SHAPES[0]
    rows, queries = Rows.drawn(shape, 40_000, 9), Queries.drawn(shape, span(39_000, 1000), 10)
    cache = shape.create(client)
    rows.upload(cache)
    cache.sparse_attend_all(**arguments(shape, queries))
    load = client.load()
    assert load.memory_failures == 0
    assert load.device_peak_bytes <= 1024 * MIB
    for ledger in load.ledgers.values():
        assert ledger.peak_bytes <= ledger.limit_bytes
    cache.delete()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.kv_format.value}-D{s.key_dim}")
def test_a_ragged_step_is_answered_as_row_by_row(client, shape):
    """Early and late in their sequences, with fewer rows than indices and with more, one row and several."""
    sizes = [(9001, 1), (300, 2), (5000, 1), (40, 3), (7777, 1), (2, 1)]
    asked = {"top_k": TOP_K, "window": WINDOW, "scale": shape.scale}
    made = [Sequence(client, shape, tokens, rows, seed, **asked) for seed, (tokens, rows) in enumerate(sizes)]
    sink = torch.randn(shape.heads, generator=torch.Generator().manual_seed(3))
    results = client.sparse_attend_batch(
        [each.item() for each in made], **asked, sink=sink, want_lse=True, want_indices=True
    )
    for sequence, result in zip(made, results, strict=True):
        sequence.check(result, sink=sink)
        assert torch.equal(result.indices, sequence.found())
    indices = [each.found()[:, :100].contiguous() for each in made]
    items = [each.given(some) for each, some in zip(made, indices, strict=True)]
    given = client.sparse_attend_batch(items, **asked | {"top_k": None}, want_lse=True)
    for sequence, some, result in zip(made, indices, given, strict=True):
        sequence.check(result, indices=some, index_q=None, index_w=None, top_k=None)
        sequence.cache.delete()
    load = client.load()
    assert load.memory_failures == 0
    assert load.device_peak_bytes <= 1024 * MIB


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.kv_format.value}-D{s.key_dim}")
def test_steps_that_bring_their_rows(client, shape):
    """Pages that are on the device already are joined with new rows, and brought anew."""
    made = [Decoding(client, shape, 1100, held, seed) for seed, held in enumerate((254, 1020, 3))]
    for counts in ((1, 1, 1), (3, 1, 2), (1, 8, 1)):
        steps = [each.step(count) for each, count in zip(made, counts, strict=True)]
        results = client.sparse_attend_batch([item for item, _ in steps], **ASKED, want_indices=True)
        for each, (_, queries), result in zip(made, steps, results, strict=True):
            each.check(client, result, queries)
    for each in made:
        each.cache.delete()


def test_a_step_whose_worker_is_killed_can_be_asked_again():
    shape = SHAPES[0]
    asked = {"top_k": TOP_K, "window": WINDOW, "scale": shape.scale}
    with RunningService(SETTINGS) as service, streamindex_client.connect(service.address) as client:
        made = [Sequence(client, shape, 3000 + 100 * seed, 1, seed, **asked) for seed in range(8)]
        items = [each.item() for each in made]
        right = client.sparse_attend_batch(items, **asked)
        (worker,) = service.worker_pids()
        os.kill(worker, signal.SIGKILL)
        for _ in range(20):  # items that were with the worker fail; the others wait for the next one
            results = client.sparse_attend_batch(items, **asked)
            errors = [result.error for result in results if result.error is not None]
            assert all(isinstance(error, streamindex_client.WorkerLostError) for error in errors)
            if not errors:
                break
        for before, after in zip(right, results, strict=True):
            assert torch.equal(before.out, after.out)
        assert client.load().worker_restarts == 1


@pytest.mark.parametrize("kv_format", ["bf16", "fp8_d512", "fp8_d576"])
def test_the_pipeline_s_demo(kv_format):
    sizes = ["--keys", "8192", "--queries", "512", "--kv-format", kv_format, "--json"]
    command = [sys.executable, "-m", "streamindex_service", "demo", "--pipeline", "--device", "cuda:0", *sizes]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["attention_implementation"] == "triton"
    assert (result["wrong_rows"], result["checked_rows"]) == (0, 512)
    assert 0 < result["peak_device_bytes"] <= result["budget_bytes"]
