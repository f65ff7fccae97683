"""Sparse attention at real sizes on a CUDA device: answers, repeatability, memory, compilation, 64-bit addresses."""

from dataclasses import replace

import pytest
import torch

from streamindex_service.ops.kv_rows import KvFormat
from streamindex_service.ops.sparse_attention import (
    AttentionKernel,
    Plan,
    Tiles,
    check_sparse_attention,
    plan_for,
    sparse_attention,
)
from streamindex_service.ops.sparse_attention.plan import HOPPER_CAPABILITY, MAX_FEW_HEADS, attention_tiles
from tests.ops.attention_cases import device_case, make_inputs, one_row_each, shape_name, with_scales_by_amax

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
# tokens, heads, width, key_dim, format
SHAPES = [
    (300, 64, 640, 512, KvFormat.BF16),
    (150, 128, 1152, 512, KvFormat.BF16),
    (150, 128, 2048, 576, KvFormat.BF16),
    (150, 64, 2048, 576, KvFormat.BF16),
    (300, 16, 333, 512, KvFormat.BF16),
    (300, 33, 333, 576, KvFormat.BF16),
    (300, 64, 640, 512, KvFormat.FP8_D512),
    (150, 128, 2048, 576, KvFormat.FP8_D576),
    (1, 64, 640, 512, KvFormat.BF16),
    (32, 64, 640, 512, KvFormat.FP8_D512),
    (128, 64, 640, 512, KvFormat.FP8_D512),
    (32, 128, 2048, 576, KvFormat.FP8_D576),
    (7, 128, 2048, 576, KvFormat.FP8_D576),
]

# packed ones too: they are widened where they lie, and a missing barrier would show as bits that change
REPEATED = [*SHAPES[:3], *SHAPES[6:8], *SHAPES[9:12]]


def _hopper(**changes) -> Plan:
    tiles = Tiles(64, 64, 4, 2, AttentionKernel.HOPPER, messages=1)
    return Plan(0, tiles=replace(tiles, **changes))


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no-sink"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
def test_within_the_error_bound(shape, sink: bool, implementation: str) -> None:
    inputs = device_case(shape, sink=sink)
    if sink and inputs.sink is not None:
        inputs.sink[0], inputs.sink[1], inputs.sink[2] = torch.inf, -torch.inf, 1e30
    report = inputs.judge(inputs.attend(implementation))
    assert report.wrong_rows == 0, f"{report.wrong_rows} wrong, worst error {report.largest_error} of its bound"


hopper_only = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="a kernel for 9.0"
)


@hopper_only
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("find_ends", [True, False], ids=["ends", "width"])
@pytest.mark.parametrize("kv_format", ["bf16", "packed"])
@pytest.mark.parametrize("key_dim", [512, 576])
@pytest.mark.parametrize("heads", [64, 128])
def test_hopper_kernel_in_all_its_forms(heads: int, key_dim: int, kv_format: str, find_ends: bool, splits: int) -> None:
    packed = KvFormat.FP8_D512 if key_dim == 512 else KvFormat.FP8_D576
    inputs = device_case((700, heads, 700, key_dim, packed if kv_format == "packed" else KvFormat.BF16), amplitude=4.0)
    tiles = attention_tiles(inputs.kv.format.value, heads, key_dim, 512, AttentionKernel.HOPPER)
    report = inputs.judge(inputs.attend("triton", Plan(0, tiles=tiles, splits=splits, find_ends=find_ends)))
    assert report.wrong_rows == 0, f"{report.wrong_rows} wrong, worst error {report.largest_error} of its bound"


@pytest.mark.parametrize("amplitude", [1.0, 4.0])
@pytest.mark.parametrize("heads", [16, 33, 64, 128])
def test_scales_that_are_no_powers_of_two(heads: int, amplitude: float) -> None:
    inputs = with_scales_by_amax(device_case((150, heads, 700, 576, KvFormat.FP8_D576), amplitude=amplitude))
    few_on_hopper = heads <= MAX_FEW_HEADS and torch.cuda.get_device_capability() == HOPPER_CAPABILITY
    report = inputs.judge(inputs.attend("triton"), rounds_rows=not few_on_hopper)
    assert report.wrong_rows == 0, f"{report.wrong_rows} wrong, worst error {report.largest_error} of its bound"


@hopper_only
@pytest.mark.parametrize("amplitude", [0.0, 1e-30, 300.0, 1e6], ids=str)
@pytest.mark.parametrize("kv_format", [KvFormat.BF16, KvFormat.FP8_D512], ids=lambda f: f.value)
def test_extreme_logits_of_the_hopper_kernel(kv_format: KvFormat, amplitude: float) -> None:
    inputs = device_case((150, 64, 700, 512, kv_format), amplitude=amplitude)
    report = inputs.judge(inputs.attend("triton"))
    assert report.wrong_rows == 0, f"{report.wrong_rows} wrong, worst error {report.largest_error} of its bound"


@hopper_only
@pytest.mark.parametrize("kv_format", [KvFormat.BF16, KvFormat.FP8_D512], ids=lambda f: f.value)
def test_hopper_kernel_with_other_tiles(kv_format: KvFormat) -> None:
    inputs = device_case((700, 64, 700, 512, kv_format))
    tiles = Tiles(64, 32, 4, 4, AttentionKernel.HOPPER, messages=2)
    assert inputs.judge(inputs.attend("triton", Plan(0, tiles=tiles))).wrong_rows == 0


@hopper_only
@pytest.mark.parametrize("powers", [True, False], ids=["powers", "any-scale"])
@pytest.mark.parametrize("kv_format", [KvFormat.FP8_D512, KvFormat.FP8_D576], ids=lambda f: f.value)
def test_every_8_bit_number_is_widened_exactly(kv_format: KvFormat, powers: bool) -> None:
    inputs = one_row_each(kv_format, heads=64, device="cuda", powers=powers)
    values = inputs.kv.gather(torch.arange(70, device="cuda"), torch.float64)[:, None, :512]
    error = (inputs.attend("triton").out.double() - values).abs()
    # with any scale: the rounding of bf16, and those of the scale's second part and of its product
    assert (error <= (0.0 if powers else 2.0**-8 + 2.0**-15) * values.abs()).all()


@pytest.mark.parametrize("shape", REPEATED, ids=shape_name)
def test_repeats_and_neighbours_change_no_bit(shape) -> None:
    inputs = device_case(shape)
    plan = plan_for(
        "triton", "cuda", shape[4], tokens=shape[0], heads=shape[1], key_dim=shape[3], value_dim=512,
        width=shape[2],
    )  # fmt: skip
    first = inputs.attend("triton", plan)
    for _ in range(20):
        again = inputs.attend("triton", plan)
        assert torch.equal(again.out.view(torch.int16), first.out.view(torch.int16))
        assert again.lse is not None
        assert first.lse is not None
        assert torch.equal(again.lse, first.lse)
    part = inputs.part(7, 25).attend("triton", plan)
    assert torch.equal(part.out, first.out[7:25])


def test_no_length_compiles_anything_new() -> None:
    from streamindex_service.ops.sparse_attention.triton import compiled_variants

    def attend(tokens: int, width: int, rows: int) -> None:
        device_case((tokens, 64, width, 512, KvFormat.BF16), rows=rows).attend("triton")

    attend(300, 640, 20_000)
    attend(3, 640, 20_000)
    attend(3, 16, 20_000)  # few tokens, and too few entries for a split
    warm = compiled_variants()
    assert warm > 0
    for tokens, width, rows in ((1, 1, 20_001), (16, 16, 20_016), (1024, 128, 32_768), (255, 77, 20_003)):
        attend(tokens, width, rows)
    assert compiled_variants() == warm


@pytest.mark.parametrize("implementation", ["triton", "chunked"])
@pytest.mark.parametrize("tokens", [1, 40, 3000])
def test_allocator_peak_stays_within_the_plan(tokens: int, implementation: str) -> None:
    inputs = device_case((tokens, 64, 640, 512, KvFormat.BF16))
    shape = {"tokens": tokens, "heads": 64, "key_dim": 512, "value_dim": 512, "width": 640}
    plan = plan_for(implementation, "cuda", KvFormat.BF16, **shape)
    assert plan is not None
    inputs.attend(implementation)  # the library's own workspace, which stays
    out = torch.empty((tokens, 64, 512), dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sparse_attention(
        inputs.q, inputs.kv, inputs.indices, scale=inputs.scale, sink=inputs.sink, implementation=implementation,
        out=out,
    )  # fmt: skip
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= plan.workspace_bytes, f"peak {peak}, planned {plan.workspace_bytes}"


def test_more_than_two_to_the_31_elements() -> None:
    rows, tokens = 2**31 // 512 + 5000, 2**31 // (64 * 512) + 40
    inputs = make_inputs(tokens=1, heads=64, width=64, key_dim=512, value_dim=512, device="cuda")
    data = torch.empty((rows, 512), dtype=torch.bfloat16, device="cuda").normal_()
    q = torch.empty((tokens, 64, 512), dtype=torch.bfloat16, device="cuda").normal_()
    indices = torch.randint(rows - 6000, rows + 10, (tokens, 64), dtype=torch.int32, device="cuda")
    kv = replace(inputs.kv, data=data)
    result = sparse_attention(q, kv, indices, scale=512**-0.5, implementation="triton", want_lse=True)
    assert result.lse is not None
    tail = slice(tokens - 40, tokens)
    report = check_sparse_attention(
        result.out[tail], result.lse[tail], q[tail], kv, indices[tail], scale=512**-0.5, sink=None
    )
    assert report.wrong_rows == 0
