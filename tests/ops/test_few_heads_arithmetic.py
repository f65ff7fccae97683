"""The arithmetic of the kernel for few heads, program by program on a CPU, against float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from streamindex_service.ops.kv_rows import KvFormat
from streamindex_service.ops.sparse_attention import AttentionKernel, AttentionResult, Plan
from streamindex_service.ops.sparse_attention.plan import attention_tiles
from streamindex_service.ops.sparse_attention.problem import Problem
from tests.ops.attention_cases import (
    Inputs,
    in_pages,
    make_inputs,
    one_row_each,
    with_one_large_scale,
    with_scales,
    with_scales_by_amax,
)
from tests.ops.gluon_emulation import load_kernel

Attend = Callable[..., AttentionResult]
PACKED = pytest.mark.parametrize("kv_format", [KvFormat.FP8_D512, KvFormat.FP8_D576], ids=lambda each: each.value)


@pytest.fixture
def attend(monkeypatch: pytest.MonkeyPatch) -> Attend:
    """(inputs, splits, ends, processors) -> what the kernel makes of them; parts are combined here, in float64."""
    kernel = load_kernel(monkeypatch)

    def run(
        inputs: Inputs, splits: int = 1, ends: torch.Tensor | None = None, processors: int = 132
    ) -> AttentionResult:
        tokens, heads, key_dim = inputs.q.shape
        shape, dtype = (splits, tokens, heads), torch.bfloat16 if splits == 1 else torch.float32
        out, lse = torch.full((*shape, 512), torch.nan, dtype=dtype), torch.full(shape, torch.nan)
        problem = Problem(inputs.q, inputs.kv, inputs.indices, inputs.scale, inputs.sink, out[0], lse[0])
        tiles = attention_tiles(inputs.kv.format.value, heads, key_dim, 512, AttentionKernel.HOPPER_FEW_HEADS)
        kernel.launch(problem, Plan(0, splits=splits, tiles=tiles), ends, out, lse, processors)
        if splits == 1:
            return AttentionResult(out[0], lse[0])
        assert inputs.sink is None
        logs = lse.double() * torch.log(torch.tensor(2.0, dtype=torch.float64))
        weights = logs.softmax(dim=0).nan_to_num(0.0)[..., None]
        whole = logs.logsumexp(dim=0)
        return AttentionResult(
            (out.double() * weights).sum(dim=0).bfloat16(), whole.masked_fill(whole == -torch.inf, torch.inf).float()
        )

    return run


def packed_case(kv_format: KvFormat, **changes) -> Inputs:
    assert kv_format.packed is not None
    defaults = {"tokens": 3, "heads": 8, "width": 150, "key_dim": kv_format.packed.key_dim, "value_dim": 512}
    return make_inputs(kv_format=kv_format, **defaults | changes)


def rotary_queries(inputs: Inputs) -> Inputs:
    """Logits that no scale has a part in."""
    q = inputs.q.clone()
    q[..., : inputs.kv.format.packed.narrow] = 0.0
    return replace(inputs, q=q)


def assert_right(inputs: Inputs, result: AttentionResult) -> None:
    report = inputs.judge(result)
    assert report.wrong_rows == 0, f"{report.wrong_rows} wrong, worst error {report.largest_error} of its bound"


@PACKED
@pytest.mark.parametrize(("heads", "width"), [(8, 200), (20, 64), (12, 65), (32, 1)])
def test_within_the_error_bound(attend: Attend, kv_format: KvFormat, heads: int, width: int) -> None:
    inputs = packed_case(kv_format, heads=heads, width=width, amplitude=3.0)
    inputs.indices[0] = -1
    inputs.sink[:5] = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30, 88.0])
    assert_right(inputs, attend(inputs))


@PACKED
def test_parts_and_ends(attend: Attend, kv_format: KvFormat) -> None:
    inputs = packed_case(kv_format, heads=20, width=300, sink=False)
    inputs.indices[0] = -1
    inputs.indices[1, 70:] = -1
    assert_right(inputs, attend(inputs, splits=3))
    valid = (inputs.indices >= 0) & (inputs.indices < inputs.kv.rows)
    ends = (valid * torch.arange(1, 301, dtype=torch.int32)).amax(dim=1).int()
    assert ends[0] == 0
    assert_right(inputs, attend(inputs, ends=ends))


@PACKED
def test_rows_in_scattered_pages(attend: Attend, kv_format: KvFormat) -> None:
    inputs = packed_case(kv_format, heads=20, width=700, rows=900)
    inputs.indices[1] = -1
    kv, places = in_pages(inputs.kv, inputs.indices)
    expected, result = attend(inputs), attend(replace(inputs, kv=kv, indices=places))
    assert_right(inputs, result)
    assert torch.equal(result.out, expected.out)
    assert torch.equal(result.lse, expected.lse)


@PACKED
@pytest.mark.parametrize("processors", [1, 4])
def test_one_item_after_another(attend: Attend, kv_format: KvFormat, processors: int) -> None:
    inputs = packed_case(kv_format, tokens=5, heads=20, width=600, sink=False)
    inputs.indices[1] = -1
    inputs.indices[3, 70:] = -1
    ends = torch.tensor([600, 0, 600, 70, 1], dtype=torch.int32)
    inputs.indices[4, 1:] = -1
    for splits in (1, 3):
        assert_right(inputs, attend(inputs, splits=splits, ends=ends, processors=processors))


@PACKED
@pytest.mark.parametrize("spread", [12, 16, None], ids=["near", "farther", "far"])
def test_every_8_bit_number_is_widened_exactly(attend: Attend, kv_format: KvFormat, spread: int | None) -> None:
    inputs = one_row_each(kv_format, heads=1, device="cpu", spread=spread)
    values = inputs.kv.gather(torch.arange(70), torch.float64)[:, None, :512]
    assert torch.equal(attend(inputs).out.double(), values)


@pytest.mark.parametrize("spread", [12, 16, None], ids=["near", "farther", "far"])
def test_any_scale_costs_less_than_a_bit(attend: Attend, spread: int | None) -> None:
    inputs = one_row_each(KvFormat.FP8_D576, heads=1, device="cpu", powers=False, spread=spread)
    values = inputs.kv.gather(torch.arange(70), torch.float64)[:, None, :512]
    error = (attend(inputs).out.double() - values).abs()
    # bf16 of the output; of a share in f16, and of its product with e4m3's least number
    assert (error <= (2.0**-8 + 2.0**-9 + 2.0**-10) * values.abs()).all()


@PACKED
@pytest.mark.parametrize(
    ("least", "most"), [(-14, 0), (-30, 0), (-60, 60), (-100, 100), (-120, -100), (90, 110), (-3, 115)]
)
def test_scales_may_lie_anywhere(attend: Attend, kv_format: KvFormat, least: int, most: int) -> None:
    for width in (150, 1):  # of one entry the log-sum-exp may err least
        inputs = rotary_queries(with_scales(packed_case(kv_format, width=width), least, most))
        assert_right(inputs, attend(inputs))


@PACKED
@pytest.mark.parametrize("apart", [12, 13, 20])
@pytest.mark.parametrize("amplitude", [1.0, 8.0, 30.0])
def test_elements_of_small_scales_are_as_good(
    attend: Attend, kv_format: KvFormat, apart: int, amplitude: float
) -> None:
    """All rows have one group's scale far above the others', and weights lie far apart: small ones, small scales."""
    inputs = packed_case(kv_format, width=700, rows=900, amplitude=amplitude, sink=False)
    inputs = rotary_queries(with_one_large_scale(inputs, apart))
    assert_right(inputs, attend(inputs))


def test_scales_by_amax(attend: Attend) -> None:
    inputs = with_scales_by_amax(packed_case(KvFormat.FP8_D576, width=256, amplitude=4.0))
    assert_right(inputs, attend(inputs))  # nothing is rounded to bf16 on its way


@PACKED
@pytest.mark.parametrize(
    ("least", "most", "amplitude"), [(-20, 3, 2.0**-8), (98, 100, 2.0**-107), (-100, -98, 2.0**91)]
)
def test_scales_and_queries_make_up_for_each_other(
    attend: Attend, kv_format: KvFormat, least: int, most: int, amplitude: float
) -> None:
    inputs = packed_case(kv_format, width=40)
    inputs = with_scales(replace(inputs, q=(inputs.q.float() * amplitude).bfloat16()), least, most)
    assert_right(inputs, attend(inputs))


@PACKED
@pytest.mark.parametrize("amplitude", [0.0, 1e-40, 1e-30, 1e5, 1e30])
def test_queries_of_any_size(attend: Attend, kv_format: KvFormat, amplitude: float) -> None:
    inputs = packed_case(kv_format, width=40)
    inputs = replace(inputs, q=(inputs.q.float() * amplitude).bfloat16())
    assert_right(inputs, attend(inputs))


@PACKED
def test_what_is_no_number_stays_with_those_who_asked(attend: Attend, kv_format: KvFormat) -> None:
    inputs = packed_case(kv_format)
    inputs.q[0, 0, 3], inputs.q[1, 1, 5], inputs.q[2, 2, -1] = torch.nan, torch.inf, torch.nan
    lost = attend(inputs).out.isnan()
    assert lost.all(dim=2).nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]
    assert lost.any(dim=2).sum() == 3

    inputs = packed_case(kv_format)
    inputs.indices[inputs.indices == 5] = 6
    inputs.indices[1, 40] = 5
    inputs.kv.data[5, 17] = 0x7F
    lost = attend(inputs).out.isnan()
    assert lost[1].all()
    assert not lost[0].any()
    assert not lost[2].any()
