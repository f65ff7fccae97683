"""Which pages of window rows a call of attention holds: those that its queries can ask for, as far as it is known."""

from __future__ import annotations

import pytest
from streamindex.v1 import attention_pb2, types_pb2

from streamindex_service.config import Settings
from streamindex_service.core.sizes import KeyFormat, KvFormat
from streamindex_service.core.specs import CacheSpec, KvSpec
from streamindex_service.frontend.attend_requests import attend_parameters, item_parameters

SPEC = CacheSpec(
    2, 16, 4, KeyFormat.BF16, 1, "", 0, 60.0, types_pb2.PRIORITY_STANDARD, KvSpec(KvFormat.BF16, 32, 32, 2)
)


def stream(**fields) -> attention_pb2.SparseAttendHeader:
    return attention_pb2.SparseAttendHeader(**{"given_indices": 3, "scale": 1.0, "window": 128, **fields})


@pytest.mark.parametrize(
    ("fields", "pages"),
    [
        ({"start_position": 10_000, "row_count": 200}, (36, 40)),  # tokens 9,873 to 10,199, in groups of four pages
        ({"start_position": 10_000}, (36, 100)),  # who knows how many come
        ({"start_position": 100, "row_count": 1}, (0, 4)),
        ({"explicit_positions": True, "row_count": 200}, (0, 100)),
        ({"start_position": 10_000, "row_count": 200, "window": 0}, (0, 0)),
        ({"start_position": 2**40, "row_count": 9}, (100, 100)),  # refused when its rows come
        ({"start_position": 25_500, "row_count": 100}, (96, 100)),
    ],
)
def test_of_a_stream(fields, pages):
    assert attend_parameters(stream(**fields), SPEC, Settings()).window_pages(100) == pages


@pytest.mark.parametrize(
    ("positions", "pages"),
    [([20_000], (76, 80)), ([5000, 20_000, 300], (0, 80)), ([], (0, 100)), ([2**62], (100, 100))],
)
def test_of_an_item_of_a_step(positions, pages):
    request = attention_pb2.SparseAttendBatchRequest(given_indices=3, scale=1.0, window=128)
    item = attention_pb2.SparseAttendBatchItem(row_count=len(positions), positions=positions)
    assert item_parameters(request, item, SPEC).window_pages(100) == pages
