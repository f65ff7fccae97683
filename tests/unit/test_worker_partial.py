"""Parts of a layer, searched apart and merged: bitwise the answer of the whole."""

from __future__ import annotations

import itertools

import pytest
import torch

from streamindex_service.core.accounts import NO_QUOTA, Account
from streamindex_service.core.layers import Page, Snapshot
from streamindex_service.core.pages import PageSlot
from streamindex_service.core.windows import windows_of
from streamindex_service.ops.paged_keys import PagedKeys
from streamindex_service.ops.topk import Order, topk
from streamindex_service.worker.partial import merge, shift_positions
from tests.support.core_world import spec

ROWS, HEADS, DIM = 40, 2, 16


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("cuts", [(256,), (512, 768), tuple(range(256, 1024, 256))])
def test_the_parts_make_the_whole(implementation, order, ratio, cuts):
    random = torch.Generator().manual_seed(7)
    keys = torch.randint(-2, 3, (1000, DIM), generator=random).bfloat16()  # ties everywhere
    q = torch.randint(-2, 3, (ROWS, HEADS, DIM), generator=random).bfloat16()
    w = torch.randint(-1, 2, (ROWS, HEADS), generator=random).float()
    positions = torch.randint(0, 1100 * ratio, (ROWS,), generator=random)
    positions[0], positions[1] = 0, 256 * ratio - 1

    def run(part, at, way):
        return topk(
            q, w, PagedKeys.from_contiguous(part.clone()), at,
            ratio=ratio, top_k=300, order=way, implementation=implementation, want_scores=True,
        )  # fmt: skip

    whole = run(keys, positions, order)
    edges = [0, *cuts, 1000]
    best = run(keys[: edges[1]], positions, Order.SCORE)
    for start, stop in itertools.pairwise(edges[1:]):
        shifted, sees = shift_positions(positions, start, ratio)
        found = run(keys[start:stop], shifted, Order.SCORE)
        way = order if stop == 1000 else Order.SCORE
        best = merge(tuple(best), tuple(found), sees, start, way)
    assert torch.equal(best[0], whole.indices)
    assert torch.equal(best[1], whole.scores)


def layer(pages):
    account = Account("owner", NO_QUOTA)
    made = tuple(Page(PageSlot(1, number), 8192, account, None) for number in range(pages))
    return Snapshot(spec(), max(0, pages * 256 - 5), made, 1)


@pytest.mark.parametrize(("pages", "budget", "sizes"), [
    (0, 10_000, [0]),
    (4, 4 * 8192 + 100, [4]),
    (4, 4 * 8192 + 99, [1, 1, 1, 1]),  # 50 bytes of a merge: room for three, windows of one
    (9, 8 * 8192 + 150, [4, 4, 1]),
    (3, 50, [1, 1, 1]),
])  # fmt: skip
def test_a_layer_is_cut_where_it_does_not_fit(pages, budget, sizes):
    snapshot = layer(pages)
    windows = windows_of(snapshot, budget, 100, 50)
    assert [len(window.pages) for window in windows] == sizes
    assert [page for window in windows for page in window.pages] == list(snapshot.pages)
    assert sum(window.keys for window in windows) == snapshot.length_keys
    assert [window.first_key for window in windows] == [256 * sum(sizes[:number]) for number in range(len(sizes))]
