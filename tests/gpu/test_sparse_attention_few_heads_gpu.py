"""The kernel for few heads of packed rows on a device: answers, numbers at the ends of their range, repeatability.

Each number of heads is compiled by itself, so lengths are varied within a test.
"""

from dataclasses import replace

import pytest
import torch

from streamindex_service.ops.kv_rows import KvFormat, KvRows
from streamindex_service.ops.sparse_attention import AttentionKernel, AttentionResult, Plan, plan_for
from streamindex_service.ops.sparse_attention.plan import attention_tiles
from tests.ops.attention_cases import Inputs, make_inputs, one_row_each, with_one_large_scale, with_scales

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="a kernel for 9.0"
    ),
    pytest.mark.timeout(300),
]
PACKED = pytest.mark.parametrize("kv_format", [KvFormat.FP8_D512, KvFormat.FP8_D576], ids=lambda each: each.value)
LENGTHS = [(1, 1), (3, 63), (33, 64), (3, 65), (33, 640), (3, 1152), (33, 2048)]  # tokens, width


def _case(kv_format: KvFormat, **changes) -> Inputs:
    assert kv_format.packed is not None
    defaults = {"heads": 16, "rows": 20_000, "key_dim": kv_format.packed.key_dim, "value_dim": 512, "device": "cuda"}
    return make_inputs(kv_format=kv_format, **defaults | changes)


def _plan(inputs: Inputs, *, splits: int = 1, find_ends: bool = False) -> Plan:
    _, heads, key_dim = inputs.q.shape
    tiles = attention_tiles(inputs.kv.format.value, heads, key_dim, 512, AttentionKernel.HOPPER_FEW_HEADS)
    return Plan(0, tiles=tiles, splits=splits, find_ends=find_ends)


def _assert_right(inputs: Inputs, result: AttentionResult) -> None:
    report = inputs.judge(result)
    assert report.wrong_rows == 0, f"{report.wrong_rows} wrong, worst error {report.largest_error} of its bound"


def _without_scales_in_logits(inputs: Inputs) -> Inputs:
    assert inputs.kv.format.packed is not None
    inputs.q[..., : inputs.kv.format.packed.narrow] = 0.0
    return inputs


@PACKED
def test_few_heads_are_planned_for_it(kv_format: KvFormat) -> None:
    assert kv_format.packed is not None
    plan = plan_for(
        "triton", "cuda", kv_format, tokens=32, heads=12, key_dim=kv_format.packed.key_dim, value_dim=512, width=2048,
    )  # fmt: skip
    assert plan is not None
    assert plan.tiles is not None
    assert plan.tiles.kernel is AttentionKernel.HOPPER_FEW_HEADS
    assert plan.splits == torch.cuda.get_device_properties(0).multi_processor_count // 32


@pytest.mark.parametrize("splits", [1, 3])
@PACKED
@pytest.mark.parametrize("heads", [8, 16, 20, 32])
def test_within_the_error_bound(heads: int, kv_format: KvFormat, splits: int) -> None:
    for tokens, width in LENGTHS:
        inputs = _case(kv_format, heads=heads, tokens=tokens, width=width, amplitude=3.0)
        if tokens > 2:
            inputs.indices[0] = -1
            inputs.indices[1, width // 3 :] = -1
            inputs.indices[2, : width // 2] = 20_000
        if inputs.sink is not None:
            inputs.sink[:5] = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30, 88.0])
        _assert_right(inputs, inputs.attend("triton", _plan(inputs, splits=splits)))


@PACKED
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_that_end_early(kv_format: KvFormat, splits: int) -> None:
    inputs = _case(kv_format, tokens=300, width=700)
    for token in range(300):
        inputs.indices[token, 3 * token :] = -1
    _assert_right(inputs, inputs.attend("triton", _plan(inputs, splits=splits, find_ends=True)))


@pytest.mark.parametrize("spread", [12, 13, 24, None], ids=["near", "apart", "farther", "far"])
@pytest.mark.parametrize("powers", [True, False], ids=["powers", "any-scale"])
@PACKED
def test_every_8_bit_number_is_widened_exactly(kv_format: KvFormat, powers: bool, spread: int | None) -> None:
    inputs = one_row_each(kv_format, heads=16, device="cuda", powers=powers, spread=spread)
    values = inputs.kv.gather(torch.arange(70, device="cuda"), torch.float64)[:, None, :512]
    error = (inputs.attend("triton", _plan(inputs)).out.double() - values).abs()
    # with any scale: bf16 of the output, f16 of the scale's share and of its product with e4m3's least number
    assert (error <= (0.0 if powers else 2.0**-8 + 2.0**-9 + 2.0**-10) * values.abs()).all()


@PACKED
def test_scales_may_lie_anywhere(kv_format: KvFormat) -> None:
    for least, most in ((-14, 0), (-30, 0), (-60, 60), (-100, 100), (-120, -100), (90, 110), (-3, 115)):
        inputs = with_scales(_case(kv_format, tokens=33, width=150, rows=300), least, most)
        inputs = _without_scales_in_logits(inputs)
        for splits in (1, 3):
            _assert_right(inputs, inputs.attend("triton", _plan(inputs, splits=splits)))


@PACKED
def test_elements_of_small_scales_are_as_good(kv_format: KvFormat) -> None:
    for apart in (12, 13, 20):
        for amplitude in (1.0, 8.0, 30.0):
            inputs = _case(kv_format, tokens=33, width=8320, amplitude=amplitude, sink=False)
            inputs = _without_scales_in_logits(with_one_large_scale(inputs, apart))
            for splits in (1, 3):
                _assert_right(inputs, inputs.attend("triton", _plan(inputs, splits=splits)))


@PACKED
def test_scales_and_queries_make_up_for_each_other(kv_format: KvFormat) -> None:
    for least, most, amplitude in ((-20, 3, 2.0**-8), (98, 100, 2.0**-107), (-100, -98, 2.0**91)):
        inputs = _case(kv_format, tokens=33, width=150, rows=300)
        inputs = with_scales(replace(inputs, q=(inputs.q.float() * amplitude).bfloat16()), least, most)
        _assert_right(inputs, inputs.attend("triton", _plan(inputs)))


@PACKED
def test_queries_of_any_size(kv_format: KvFormat) -> None:
    for amplitude in (0.0, 1e-40, 1e-30, 1e5, 1e30):
        inputs = _case(kv_format, tokens=33, width=150)
        inputs = replace(inputs, q=(inputs.q.float() * amplitude).bfloat16())
        _assert_right(inputs, inputs.attend("triton", _plan(inputs)))


@PACKED
def test_what_is_no_number_stays_with_those_who_asked(kv_format: KvFormat) -> None:
    inputs = _case(kv_format, tokens=3, width=150, rows=300)
    inputs.q[0, 0, 3], inputs.q[1, 1, 5], inputs.q[2, 2, -1] = torch.nan, torch.inf, torch.nan
    lost = inputs.attend("triton", _plan(inputs)).out.isnan()
    assert lost.all(dim=2).nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]
    assert lost.any(dim=2).sum() == 3

    inputs = _case(kv_format, tokens=3, width=150, rows=300)
    inputs.indices[inputs.indices == 5] = 6
    inputs.indices[1, 40] = 5
    inputs.kv.data[5, 17] = 0x7F
    lost = inputs.attend("triton", _plan(inputs)).out.isnan()
    assert lost.all(dim=2).all(dim=1).tolist() == [False, True, False]
    assert lost.any(dim=2).any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("splits", [1, 3])
@PACKED
def test_repeats_and_neighbours_change_no_bit(kv_format: KvFormat, splits: int, far: bool) -> None:
    inputs = _case(kv_format, tokens=150, width=700, rows=300)
    if far:  # some blocks in bf16, others not
        inputs = _without_scales_in_logits(with_scales(inputs, -14, 0))
    plan = _plan(inputs, splits=splits)
    first = inputs.attend("triton", plan)
    assert first.lse is not None
    for _ in range(20):
        again = inputs.attend("triton", plan)
        assert again.lse is not None
        assert torch.equal(again.out.view(torch.int16), first.out.view(torch.int16))
        assert torch.equal(again.lse, first.lse)
    assert torch.equal(inputs.part(7, 25).attend("triton", plan).out, first.out[7:25])
    if splits == 1:  # where rows end is found, or not, for reasons of speed alone
        ended = inputs.attend("triton", replace(plan, find_ends=True))
        assert torch.equal(ended.out.view(torch.int16), first.out.view(torch.int16))


@PACKED
def test_no_length_compiles_anything_new(kv_format: KvFormat) -> None:
    from streamindex_service.ops.sparse_attention.triton import compiled_variants

    def attend(tokens: int, width: int, rows: int) -> None:
        _case(kv_format, heads=4, tokens=tokens, width=width, rows=rows).attend("triton")

    before = compiled_variants()
    attend(300, 640, 20_000)
    attend(3, 640, 20_000)
    attend(3, 16, 20_000)  # few tokens, and too few entries for a split
    warm = compiled_variants()
    assert warm > before  # no other test has four heads
    for tokens, width, rows in ((1, 1, 20_001), (16, 16, 20_016), (1024, 128, 32_768), (255, 77, 20_003)):
        attend(tokens, width, rows)
    assert compiled_variants() == warm


def test_rows_beyond_two_to_the_31_bytes() -> None:
    rows = 2**31 // 576 + 5000
    data = torch.randint(0, 64, (rows, 576), dtype=torch.uint8, device="cuda")  # no NaN, rotary elements below 1
    scales = torch.full((rows, 8), 118, dtype=torch.uint8, device="cuda")
    inputs = _case(KvFormat.FP8_D512, tokens=33, width=150)
    indices = torch.randint(rows - 6000, rows + 10, (33, 150), dtype=torch.int32, device="cuda")
    inputs = replace(inputs, kv=KvRows(KvFormat.FP8_D512, data, scales), indices=indices)
    _assert_right(inputs, inputs.attend("triton", _plan(inputs, splits=3)))
