"""Index rows: a window and what a search found, as rows of one KV tensor."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from streamindex_service.ops.index_rows import (
    IMPLEMENTATIONS,
    IndexRowsInputError,
    UnsupportedImplementationError,
    assemble_index_rows,
)
from streamindex_service.ops.index_rows.problem import Problem, check_problem


def _expected(
    found: Tensor, positions: list[int], window: int, window_row: int, compressed_row: int
) -> list[list[int]]:
    rows = []
    for position, entries in zip(positions, found.tolist(), strict=True):
        recent = range(position - window + 1, position + 1)
        local = [at + window_row if at >= 0 and at + window_row >= 0 else -1 for at in recent]
        rows.append(local + [-1 if entry < 0 else entry + compressed_row for entry in entries])
    return rows


def _found(tokens: int, top_k: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(0, 5000, (tokens, top_k), generator=generator, dtype=torch.int32)
    found[torch.rand((tokens, top_k), generator=generator) < 0.2] = -1
    return found


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
@pytest.mark.parametrize(
    ("tokens", "window", "top_k", "window_row", "first"),
    [(9, 4, 6, 0, 0), (3, 128, 512, 7, 100), (2, 700, 700, 0, 650), (5, 0, 8, 0, 3), (5, 8, 0, 0, 3), (9, 6, 3, -4, 0)],
)  # fmt: skip
def test_window_then_found(implementation: str, tokens: int, window: int, top_k: int, window_row: int, first: int):
    found = _found(tokens, top_k)
    options = {"window": window, "window_row": window_row, "compressed_row": 9000, "implementation": implementation}
    expected = _expected(found, list(range(first, first + tokens)), window, window_row, 9000)
    out = torch.full((tokens, window + top_k), -77, dtype=torch.int32)
    assert assemble_index_rows(found, first, out=out, **options) is out
    assert out.tolist() == expected
    positions = torch.arange(first, first + tokens).flip(0)
    other = assemble_index_rows(found, positions, **options)
    assert other.tolist() == _expected(found, positions.tolist(), window, window_row, 9000)


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
@pytest.mark.parametrize("first", [5, None], ids=["first", "positions"])
def test_every_token_may_have_a_row_0_of_its_own(implementation: str, first: int | None):
    found, window_rows = _found(4, 3), torch.tensor([0, 500, -3, 70])
    at = [5, 6, 7, 8] if first is not None else [0, 300, 6, 1]
    rows = assemble_index_rows(
        found, torch.tensor(at) if first is None else first,
        window=6, window_row=window_rows, compressed_row=9000, implementation=implementation,
    )  # fmt: skip
    expected = [
        _expected(found[i : i + 1], at[i : i + 1], 6, row, 9000)[0] for i, row in enumerate(window_rows.tolist())
    ]
    assert rows.tolist() == expected


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
def test_no_token_is_no_row(implementation: str) -> None:
    found = torch.empty((0, 8), dtype=torch.int32)
    rows = assemble_index_rows(found, 5, window=4, compressed_row=0, implementation=implementation)
    assert rows.shape == (0, 12)


GOOD = Problem(_found(3, 4), 5, 2, 0, 10, torch.empty((3, 6), dtype=torch.int32))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("found", {"found": GOOD.found.long()}),
        ("found", {"found": GOOD.found[0]}),
        ("found", {"found": GOOD.found.T.contiguous().T}),
        ("window", {"window": -1}),
        ("positions", {"positions": -1}),
        ("positions", {"positions": 2**31}),
        ("positions", {"positions": torch.zeros(2, dtype=torch.int64)}),
        ("positions", {"positions": torch.zeros(3, dtype=torch.int32)}),
        ("window_row", {"window_row": torch.zeros(2, dtype=torch.int64)}),
        ("window_row", {"window_row": torch.zeros(3, dtype=torch.int32)}),
        ("compressed_row", {"compressed_row": -1}),
        ("compressed_row", {"compressed_row": 2**31}),
        ("out", {"out": GOOD.out.long()}),
        ("out", {"out": GOOD.out[:2]}),
    ],
)
def test_refusals_name_the_argument(field: str, changes) -> None:
    with pytest.raises(IndexRowsInputError) as refusal:
        check_problem(replace(GOOD, **changes))
    assert refusal.value.field == field


def test_names_are_never_replaced() -> None:
    with pytest.raises(UnsupportedImplementationError, match="valid names are reference"):
        assemble_index_rows(GOOD.found, 0, window=2, compressed_row=0, implementation="fast")
