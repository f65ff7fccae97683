"""Every implementation of sparse attention against float64, on ordinary and on adversarial rows."""

from dataclasses import replace

import pytest
import torch

from streamindex_service.ops.kv_rows import KvFormat, KvRows, pack_rows
from streamindex_service.ops.sparse_attention import AttentionResult, Plan, Tiles
from streamindex_service.ops.sparse_attention.check import error_bounds
from streamindex_service.ops.sparse_attention.reference import exact_attention
from tests.ops.attention_cases import Inputs, make_inputs, one_row_each, with_scales_by_amax
from tests.ops.cases import kernel_device

EVERY = ["reference", "chunked", "triton"]
# tokens, heads, width, key_dim, value_dim, format
SHAPES = [
    (3, 5, 70, 64, 64, KvFormat.BF16),
    (2, 1, 1, 16, 16, KvFormat.BF16),
    (2, 16, 33, 80, 64, KvFormat.BF16),
    (1, 33, 129, 128, 64, KvFormat.BF16),
    (1, 64, 65, 512, 512, KvFormat.BF16),
    (1, 16, 40, 576, 512, KvFormat.BF16),
    (2, 16, 40, 512, 512, KvFormat.FP8_D512),
    (2, 3, 40, 576, 512, KvFormat.FP8_D576),
]


def _case(shape, **changes) -> Inputs:
    tokens, heads, width, key_dim, value_dim, kv_format = shape
    return make_inputs(
        tokens=tokens, heads=heads, width=width, key_dim=key_dim, value_dim=value_dim, kv_format=kv_format,
        device=kernel_device(), **changes,
    )  # fmt: skip


def _right(inputs: Inputs, implementation: str, plan: Plan | None = None) -> None:
    report = inputs.judge(inputs.attend(implementation, plan))
    assert report.wrong_rows == 0, f"{report.wrong_rows} wrong, worst error {report.largest_error} of its bound"


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no-sink"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"T{s[0]}-H{s[1]}-W{s[2]}-D{s[3]}-V{s[4]}-{s[5].value}")
def test_within_the_error_bound(shape, sink: bool, implementation: str) -> None:
    _right(_case(shape, sink=sink), implementation)


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no-sink"])
def test_split_index_rows(splits: int, sink: bool) -> None:
    inputs = _case((3, 5, 170, 80, 64, KvFormat.BF16), sink=sink)
    inputs.indices[1] = -1
    inputs.indices[2, 40:] = -1  # the later parts have nothing to attend
    _right(inputs, "triton", Plan(0, splits=splits, tiles=Tiles(16, 32, 4, 2)))


@pytest.mark.parametrize("implementation", EVERY)
def test_rows_with_nothing_to_attend(implementation: str) -> None:
    inputs = _case((4, 4, 40, 64, 64, KvFormat.BF16))
    inputs.indices[0] = -1
    inputs.indices[1] = 300
    inputs.indices[2, 1:] = -(2**31)
    inputs.indices[2, 0] = 2**31 - 1
    out, lse = inputs.attend(implementation)
    assert (out[:3] == 0).all()
    assert lse is not None
    assert (lse[:3] == torch.inf).all()
    assert lse[3].isfinite().all()
    _right(inputs, implementation)


# the interpreter's exp2 says so when a sink takes everything
@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("sink", [60.0, 80.0, 88.0])
def test_sinks_that_outweigh_large_values(sink: float, implementation: str) -> None:
    """As long as float32 holds the denominator, the output is what is left of the values."""
    inputs = _case((3, 4, 40, 64, 64, KvFormat.BF16), amplitude=0.0)
    inputs = replace(inputs, kv=KvRows(KvFormat.BF16, inputs.kv.data.nan_to_num(1.0) * 2.0**20))
    assert inputs.sink is not None
    inputs.sink[:] = sink
    result = inputs.attend(implementation)
    assert result.out.any()
    report = inputs.judge(result)
    assert report.wrong_rows == 0, report


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("amplitude", [0.0, 1e-30, 300.0, 1e6], ids=str)
def test_extreme_logits(amplitude: float, implementation: str) -> None:
    _right(_case((2, 4, 70, 64, 64, KvFormat.BF16), amplitude=amplitude, sink=False), implementation)


@pytest.mark.parametrize("implementation", EVERY)
def test_an_entry_that_stands_twice_counts_twice(implementation: str) -> None:
    keys = torch.zeros(3, 64)
    keys[0], keys[1], keys[2] = 1.0, -2.0, 4.0
    q = torch.zeros(1, 2, 64, dtype=torch.bfloat16)  # all weights equal
    indices = torch.tensor([[0, 1, 1, 1, -1, 2, 2, 2]], dtype=torch.int32)
    kv = pack_rows(keys.to(kernel_device()), KvFormat.BF16)
    inputs = Inputs(q.to(kernel_device()), kv, indices.to(kernel_device()), None, 1.0, 64)
    out, lse = inputs.attend(implementation)
    assert out[0, 0, 0].item() == (1.0 - 3 * 2.0 + 3 * 4.0) / 7
    assert lse is not None
    assert lse[0, 0].item() == pytest.approx(1.9459101, abs=1e-6)


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_neighbours_change_no_bit(implementation: str) -> None:
    inputs = _case((6, 5, 70, 64, 64, KvFormat.BF16))
    plan = Plan(0, token_chunk=2, tiles=Tiles(16, 32, 4, 2)) if implementation == "triton" else None
    whole = inputs.attend(implementation, plan)
    assert whole.lse is not None
    for start, stop in ((0, 1), (1, 6), (3, 5)):
        out, lse = inputs.part(start, stop).attend(implementation, plan)
        assert torch.equal(out, whole.out[start:stop])
        assert lse is not None
        assert torch.equal(lse, whole.lse[start:stop])


@pytest.mark.parametrize("implementation", EVERY)
def test_no_rows_no_entries_no_tokens(implementation: str) -> None:
    inputs = _case((2, 4, 8, 64, 64, KvFormat.BF16))
    empty = KvRows(KvFormat.BF16, inputs.kv.data[:0])
    for case in (replace(inputs, kv=empty), replace(inputs, indices=inputs.indices[:, :0].contiguous())):
        out, lse = case.attend(implementation)
        assert (out == 0).all()
        assert lse is not None
        assert (lse == torch.inf).all()
    assert inputs.part(0, 0).attend(implementation).out.shape == (0, 4, 64)


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize("kv_format", [KvFormat.FP8_D512, KvFormat.FP8_D576], ids=lambda f: f.value)
def test_every_8_bit_number_is_widened_exactly(kv_format: KvFormat, implementation: str) -> None:
    inputs = one_row_each(kv_format, heads=2, device=kernel_device())
    values = inputs.kv.gather(torch.arange(70, device=kernel_device()), torch.float64)[:, :512]
    out = inputs.attend(implementation).out
    assert torch.equal(out.double(), values[:, None, :].expand(70, 2, 512))


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("amplitude", [1.0, 4.0])
def test_scales_that_are_no_powers_of_two(amplitude: float, implementation: str) -> None:
    inputs = with_scales_by_amax(_case((4, 16, 256, 576, 512, KvFormat.FP8_D576), amplitude=amplitude))
    report = inputs.judge(inputs.attend(implementation), rounds_rows=implementation == "triton")
    assert report.wrong_rows == 0, report


def test_rows_that_are_rounded_have_a_bound_of_their_own() -> None:
    exact = _case((4, 16, 256, 576, 512, KvFormat.FP8_D576), amplitude=4.0)
    rounded = with_scales_by_amax(exact)

    def lse_bound(inputs: Inputs, *, rounds_rows: bool) -> float:
        right = exact_attention(
            inputs.q, inputs.kv, inputs.indices, scale=inputs.scale, sink=inputs.sink, value_dim=512
        )
        return float(error_bounds(right, inputs.q, inputs.scale, rounds_rows=rounds_rows)[1].max())

    assert 0.0 < lse_bound(exact, rounds_rows=True) == lse_bound(exact, rounds_rows=False) < 0.01
    assert lse_bound(rounded, rounds_rows=False) < 0.01 < lse_bound(rounded, rounds_rows=True) < 0.5
    result = rounded.attend("reference")
    assert result.lse is not None
    for wrong in (result.out.roll(1, dims=2), result.lse), (result.out, result.lse + 0.5):
        assert rounded.judge(AttentionResult(*wrong), rounds_rows=True).wrong_rows == 4


def test_the_judge_sees_a_wrong_output() -> None:
    inputs = _case((3, 5, 70, 64, 64, KvFormat.BF16))
    out, lse = inputs.attend("reference")
    assert lse is not None
    for change, expected in ((0.05, 1), (torch.nan, 1), (torch.inf, 1)):
        worse = out.clone()
        worse[1, 2, 3] += change
        assert inputs.judge(type(inputs.attend("reference"))(worse, lse)).wrong.tolist() == [
            False,
            bool(expected),
            False,
        ]
    moved = lse.clone()
    moved[2, 0] += 1e-3
    assert inputs.judge(type(inputs.attend("reference"))(out, moved)).wrong.tolist() == [False, False, True]
