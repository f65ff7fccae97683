"""No length is a compile-time argument: launches are recorded under the interpreter, where nothing is compiled."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import Order
from tests.ops.cases import make_inputs, small_plan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a device test counts what is compiled")


class Launches:
    """variants: (kernel, its compile-time arguments, which arguments are tensors); specialized: arguments whose value
    the compiler would look at."""

    def __init__(self) -> None:
        self.variants: set[tuple[Any, ...]] = set()
        self.specialized: set[tuple[str, str]] = set()

    def record(self, kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        name = kernel.fn.__name__
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        types = tuple((key, str(value.dtype)) for key, value in values.items() if isinstance(value, torch.Tensor))
        self.variants.add((name, tuple(sorted(named.items())), types))
        free = set(kernel.kwargs.get("do_not_specialize") or ())
        plain = {key for key, value in values.items() if not isinstance(value, torch.Tensor)}
        self.specialized |= {(name, key) for key in plain - free}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    from triton.runtime.interpreter import InterpretedFunction

    seen, run = Launches(), InterpretedFunction.run

    def recorded(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        seen.record(kernel, arguments, named)
        return run(kernel, *arguments, grid=grid, warmup=warmup, **named)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    return seen


def _search(rows: int, keys: int, ratio: int, top_k: int, *, explicit: bool, order: Order = Order.INDEX) -> None:
    positions = torch.arange(keys * ratio, keys * ratio + rows).flip(0) if explicit else None
    inputs = make_inputs(
        rows=rows, heads=2, head_dim=16, keys=keys, key_format=KeyFormat.BF16, top_k=top_k, ratio=ratio,
        positions=positions,
    )  # fmt: skip
    inputs.search("triton", order=order, plan=small_plan(inputs, rows, -(-keys // 256) * 256))


def test_no_length_makes_a_new_variant(launches: Launches) -> None:
    for explicit in (False, True):
        for keys in (200, 700):  # without and with the sampled filter
            _search(2, keys, 4, 16, explicit=explicit)
    warm = set(launches.variants)
    assert len({kernel for kernel, *_ in warm}) >= 4  # scores, and the parts of the selection
    for rows, keys, ratio, top_k, explicit in (
        (1, 1, 1, 1, False), (3, 16, 2, 5, True), (5, 255, 1, 99, False), (2, 257, 3, 16, True),
        (4, 513, 128, 33, False), (1, 1024, 1, 16, True), (7, 1301, 5, 200, False),
    ):  # fmt: skip
        for order in Order:
            _search(rows, keys, ratio, top_k, explicit=explicit, order=order)
    assert launches.variants == warm


def test_no_number_is_specialized_upon(launches: Launches) -> None:
    _search(3, 700, 4, 16, explicit=False)
    assert launches.variants
    assert launches.specialized == set()
