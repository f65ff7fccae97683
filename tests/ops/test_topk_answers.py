"""Every implementation against the reference and the re-scoring check."""

import pytest
import torch

from streamindex_service.ops import KeyFormat, PagedKeys
from streamindex_service.ops.topk import Order, check_topk
from streamindex_service.ops.topk.problem import Problem
from tests.ops.cases import Inputs, kernel_device, make_inputs, poisoned_keys, same, small_plan

BF16, FP16, FP32, FP8 = KeyFormat.BF16, KeyFormat.FP16, KeyFormat.FP32, KeyFormat.FP8_E4M3
IMPLEMENTATIONS = ["chunked", "triton"]

# keys, heads, head_dim, format, top_k, ratio, rows
SHAPES = [
    (1000, 64, 128, BF16, 64, 4, 9),
    (1000, 64, 128, FP8, 64, 1, 9),
    (777, 32, 128, BF16, 512, 1, 7),
    (515, 128, 128, FP16, 7, 1, 5),
    (300, 128, 256, BF16, 512, 1, 3),
    (300, 3, 48, FP8, 7, 4, 19),
    (257, 1, 16, FP32, 1, 128, 5),
    (513, 1, 16, FP8, 32, 1, 70),
    (301, 3, 48, BF16, 4096, 1, 5),
    (256, 5, 80, FP16, 255, 1, 6),
    (1, 64, 128, BF16, 4, 1, 3),
]


def _id(case: tuple[int, int, int, KeyFormat, int, int, int]) -> str:
    keys, heads, head_dim, key_format, top_k, ratio, rows = case
    return f"S{keys}-H{heads}-D{head_dim}-{key_format.value}-K{top_k}-r{ratio}-R{rows}"


def _device(implementation: str) -> str:
    return kernel_device() if implementation == "triton" else "cpu"


def _inputs(case: tuple[int, int, int, KeyFormat, int, int, int], implementation: str, **changes: object) -> Inputs:
    keys, heads, head_dim, key_format, top_k, ratio, rows = case
    return make_inputs(
        rows=rows, heads=heads, head_dim=head_dim, keys=keys, key_format=key_format, top_k=top_k, ratio=ratio,
        device=_device(implementation), **changes,
    )  # fmt: skip


def _verdict(inputs: Inputs, result, order: Order) -> str:
    report = check_topk(
        result.indices, inputs.q, inputs.w, inputs.keys, inputs.positions,
        ratio=inputs.ratio, top_k=inputs.top_k, order=order, scores=result.scores,
    )  # fmt: skip
    return "right" if report.wrong_rows == 0 else str(report)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SHAPES, ids=_id)
def test_random_inputs_pass_the_check(case, implementation: str) -> None:
    inputs = _inputs(case, implementation)
    assert _verdict(inputs, inputs.search(implementation), Order.SCORE) == "right"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("order", list(Order), ids=lambda order: order.value)
@pytest.mark.parametrize("case", SHAPES, ids=_id)
def test_exact_inputs_equal_the_reference_bit_for_bit(case, order: Order, implementation: str) -> None:
    inputs = _inputs(case, implementation, values="integers")
    expected = inputs.search("reference", order=order)
    assert same(inputs.search(implementation, order=order), expected)
    without = inputs.search(implementation, order=order, want_scores=False)
    assert torch.equal(without.indices, expected.indices)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tiles", [(3, 256), (5, 512)], ids=["tile256", "tile512"])
def test_many_tiles_and_ties_across_them(tiles: tuple[int, int], implementation: str) -> None:
    inputs = _inputs((1100, 8, 32, BF16, 200, 1, 11), implementation, values="integers")
    assert same(inputs.search(implementation, plan=small_plan(inputs, *tiles)), inputs.search("reference"))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_plateau_of_zeros_is_broken_by_index(implementation: str) -> None:
    # no product is positive: every score is ReLU's zero, and the first keys win
    device = _device(implementation)
    k = -torch.ones(700, 32, dtype=torch.bfloat16, device=device)
    q = torch.ones(4, 3, 32, dtype=torch.bfloat16, device=device)
    inputs = Inputs(q, torch.ones(4, 3, device=device), poisoned_keys(k, None), 696, 1, 100)
    result = inputs.search(implementation)
    assert torch.equal(result.indices.cpu(), torch.arange(100, dtype=torch.int32).expand(4, 100))
    assert not result.scores.any()


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("heads", [1, 16, 64])  # padded heads add a +0.0 that would hide the sign: so full blocks too
def test_minus_zero_equals_plus_zero(heads: int, implementation: str) -> None:
    # ReLU cuts every product of an even key, and the negative gate makes its zero a −0.0; odd keys score below zero
    device = _device(implementation)
    k = torch.ones(300, 16, device=device)
    k[::2] = -1.0
    q = torch.ones(2, heads, 16, device=device)
    w = torch.full((2, heads), -1.0, device=device)
    inputs = Inputs(q.half(), w, poisoned_keys(k.half(), None), 299, 1, 160)
    result = inputs.search(implementation)
    evens, odds = torch.arange(0, 300, 2), torch.arange(1, 300, 2)
    assert result.indices[0].tolist() == [*evens.tolist(), *odds[:10].tolist()]
    assert not torch.signbit(result.scores[0, :150]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gates", ["negative", "positive"])
def test_gates_of_one_sign(gates: str, implementation: str) -> None:
    inputs = _inputs((600, 16, 32, BF16, 50, 1, 6), implementation, gates=gates)
    assert _verdict(inputs, inputs.search(implementation), Order.SCORE) == "right"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("order", list(Order), ids=lambda order: order.value)
def test_visible_from_none_to_all_with_unsorted_positions(order: Order, implementation: str) -> None:
    top_k, ratio = 64, 4
    visible = [600, 0, 63, 64, 65, 1, 10_000, 300, 0, 599]
    positions = torch.tensor([v * ratio - 1 if v else 2 for v in visible])
    inputs = _inputs(
        (600, 8, 32, BF16, top_k, ratio, len(visible)), implementation, positions=positions, values="integers"
    )
    result = inputs.search(implementation, order=order, plan=small_plan(inputs, 4, 256))
    assert same(result, inputs.search("reference", order=order))
    assert (result.indices >= 0).sum(dim=1).tolist() == [min(v, top_k) for v in visible]


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_no_key_at_all(implementation: str) -> None:
    device = _device(implementation)
    empty = PagedKeys.from_contiguous(torch.empty(0, 16))
    inputs = Inputs(torch.ones(2, 1, 16, device=device), torch.ones(2, 1, device=device), empty, 5, 1, 3)
    result = inputs.search(implementation)
    assert (result.indices == -1).all()
    assert (result.scores == -torch.inf).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1e-18, 1e15], ids=["tiny", "huge"])
def test_magnitudes(scale: float, implementation: str) -> None:
    inputs = _inputs((600, 4, 32, BF16, 50, 1, 4), implementation)
    scaled = Inputs((inputs.q * scale).contiguous(), inputs.w, inputs.keys, inputs.positions, 1, 50)
    assert _verdict(scaled, scaled.search(implementation), Order.SCORE) == "right"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rising_scores_and_one_outlier(implementation: str) -> None:
    device = _device(implementation)
    k = torch.zeros(900, 16, dtype=torch.float16, device=device)
    k[:, 0] = torch.arange(900, device=device)
    k[411, 0] = 30_000
    q = torch.zeros(3, 1, 16, dtype=torch.float16, device=device)
    q[:, :, 0] = 1
    inputs = Inputs(q, torch.ones(3, 1, device=device), poisoned_keys(k, None), 897, 1, 40)
    assert same(inputs.search(implementation, plan=small_plan(inputs, 2, 256)), inputs.search("reference"))


def test_pages_of_several_extents() -> None:
    # one extent holds pages out of order, as a slab does after evictions
    device = kernel_device()
    slab = torch.randint(-2, 3, (6, 256, 32), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(device)
    other = torch.randint(-2, 3, (256, 32), generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).to(device)
    keys = PagedKeys(BF16, 32, 1000, (slab[4], other, slab[0], slab[5]))
    whole = PagedKeys.from_contiguous(torch.cat(keys.pages)[:1000])
    q = torch.randint(-2, 3, (5, 8, 32), generator=torch.Generator().manual_seed(3)).to(torch.bfloat16).to(device)
    w = torch.ones(5, 8, device=device)
    for implementation in IMPLEMENTATIONS:
        found = Inputs(q, w, keys, 995, 1, 30).search(implementation)
        assert same(found, Inputs(q, w, whole, 995, 1, 30).search("reference"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("first", [2**31 - 2, 2**33 - 2, 2**40])
def test_positions_beyond_32_bits(first: int, implementation: str) -> None:
    inputs = make_inputs(
        rows=4, heads=2, head_dim=16, keys=700, key_format=BF16, top_k=50, ratio=min(first // 300, 2**31 - 1),
        positions=first,
        values="integers", device=_device(implementation),
    )  # fmt: skip
    assert same(inputs.search(implementation), inputs.search("reference"))


def test_a_large_position_is_no_wider_argument() -> None:
    from streamindex_service.ops.topk.triton import _chunk_positions

    def given(first: int) -> torch.Tensor | None:
        inputs = make_inputs(
            rows=4, heads=2, head_dim=16, keys=700, key_format=BF16, top_k=50, positions=first, device=kernel_device()
        )  # fmt: skip
        out = torch.empty((4, 50), dtype=torch.int32, device=kernel_device())
        problem = Problem(inputs.q, inputs.w, inputs.keys, first, 1, 50, Order.INDEX, out, None)
        return _chunk_positions(problem, 1, 4)

    assert given(2**31 - 4) is None
    assert given(2**31 - 3).tolist() == [2**31 - 2, 2**31 - 1, 2**31]
