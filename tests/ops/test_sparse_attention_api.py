"""What sparse attention refuses, its plans, and the formats of its rows."""

import os
import sys
from dataclasses import replace

import pytest
import torch

from streamindex_service.ops.kv_rows import KvFormat, KvRows, pack_rows
from streamindex_service.ops.sparse_attention import (
    MIN_WORKSPACE_BYTES,
    AttentionInputError,
    AttentionKernel,
    ReferenceTooLargeError,
    UnsupportedImplementationError,
    WorkspaceTooSmallError,
    api,
    plan_for,
    reference,
    sparse_attention,
)
from streamindex_service.ops.sparse_attention.plan import (
    Shape,
    attention_tiles,
    choose_attention_kernel,
    plan_triton,
)
from tests.ops.attention_cases import in_pages, make_inputs

GOOD = make_inputs(tokens=2, heads=4, width=8)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("q", {"q": GOOD.q.float()}),
        ("q", {"q": GOOD.q[0]}),
        ("q", {"q": torch.zeros(2, 129, 64, dtype=torch.bfloat16)}),
        ("q", {"q": torch.zeros(2, 4, 32, dtype=torch.bfloat16)}),
        ("q", {"q": torch.zeros(2 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 4, 64)}),
        ("value_dim", {"value_dim": 48}),
        ("value_dim", {"value_dim": 1024}),
        ("value_dim", {"value_dim": 16}),
        ("indices", {"indices": GOOD.indices.long()}),
        ("indices", {"indices": GOOD.indices[:1]}),
        ("indices", {"indices": GOOD.indices.T.contiguous().T}),
        ("sink", {"sink": torch.zeros(3)}),
        ("sink", {"sink": torch.zeros(4, dtype=torch.float64)}),
    ],
)
def test_refusals_name_the_argument(field: str, changes) -> None:
    case = replace(GOOD, **changes)
    with pytest.raises(AttentionInputError) as refusal:
        sparse_attention(
            case.q, case.kv, case.indices, scale=1.0, sink=case.sink, value_dim=case.value_dim, implementation="chunked"
        )
    assert refusal.value.field == field


def test_places_are_for_kernels_alone() -> None:
    kv, places = in_pages(GOOD.kv, GOOD.indices)
    with pytest.raises(AttentionInputError, match="not places") as refusal:
        sparse_attention(GOOD.q, kv, places, scale=1.0, value_dim=64, implementation="chunked")
    assert refusal.value.field == "kv"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_rows_in_pages_are_named_by_places() -> None:
    kv, _ = in_pages(GOOD.kv, GOOD.indices)
    with pytest.raises(AttentionInputError, match="int64") as refusal:
        sparse_attention(GOOD.q, kv, GOOD.indices, scale=1.0, value_dim=64, implementation="triton")
    assert refusal.value.field == "indices"


def test_outputs_must_fit() -> None:
    for name, out in (("out", torch.zeros(2, 4, 32).bfloat16()), ("out_lse", torch.zeros(2, 4).double())):
        with pytest.raises(AttentionInputError) as refusal:
            sparse_attention(
                GOOD.q, GOOD.kv, GOOD.indices, scale=1.0, value_dim=64, implementation="chunked", **{name: out}
            )
        assert refusal.value.field == name


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(UnsupportedImplementationError, match="reference, chunked") as refusal:
        GOOD.attend("fastest")
    assert "chunked" in refusal.value.valid_names


def test_plans_stay_within_the_workspace() -> None:
    shape = {"tokens": 5000, "heads": 128, "key_dim": 576, "value_dim": 512, "width": 1024}
    for implementation in ("chunked", "triton"):
        for budget in (MIN_WORKSPACE_BYTES, 256 << 20):
            plan = plan_for(implementation, "cpu", KvFormat.BF16, workspace_bytes=budget, **shape)
            assert plan is not None
            assert plan.workspace_bytes <= budget
        with pytest.raises(WorkspaceTooSmallError):
            plan_for(implementation, "cpu", KvFormat.BF16, workspace_bytes=MIN_WORKSPACE_BYTES - 1, **shape)
    assert plan_for("reference", "cpu", KvFormat.BF16, **shape) is None


def test_few_tokens_split_their_index_rows() -> None:
    def splits(tokens: int, width: int, workspace: int = 256 << 20) -> int:
        shape = Shape(tokens, 64, 512, 512, width, "bf16")
        return plan_triton(shape, workspace, 132, AttentionKernel.HOPPER).splits

    assert splits(1, 640) == 10
    assert splits(32, 640) == 4
    assert splits(200, 640) == 1
    assert splits(1, 100_000) == 64
    assert splits(66, 100_000) == 2
    assert splits(1, 1) == 1


def test_ends_of_rows_are_found_where_that_can_save_a_turn() -> None:
    for tokens, expected in ((1, False), (32, False), (132, False), (133, True), (8192, True)):
        plan = plan_triton(Shape(tokens, 64, 512, 512, 640, "bf16"), 256 << 20, 132, AttentionKernel.HOPPER)
        assert plan.find_ends is expected


@pytest.mark.parametrize(("width", "heads", "parts"), [(640, 64, 4), (640, 128, 3), (128, 64, 1), (8320, 3, 2)])
def test_parts_that_are_asked_for(width: int, heads: int, parts: int) -> None:
    """Whatever the number of tokens; as many of these at a time as the workspace holds the parts of."""
    for tokens in (1, 7, 130, 5000):
        shape = Shape(tokens, heads, 512, 512, width, "fp8_d512")
        for budget in (MIN_WORKSPACE_BYTES, 64 << 20):
            plan = plan_triton(shape, budget, 132, AttentionKernel.PORTABLE, parts)
            assert plan.splits == parts
            assert plan.workspace_bytes <= budget
            assert 1 <= plan.token_chunk <= tokens
            if parts > 1:
                assert not plan.find_ends
                assert plan.workspace_bytes >= 4 * parts * min(plan.token_chunk, tokens) * heads * 513
                assert plan.token_chunk >= tokens or plan.token_chunk % 4 == 0


def test_parts_of_one_token_must_fit() -> None:
    shape = Shape(4, 128, 512, 512, 10**6, "bf16")
    with pytest.raises(WorkspaceTooSmallError):
        plan_triton(shape, MIN_WORKSPACE_BYTES, 132, AttentionKernel.PORTABLE, 64)


ALL_GLUON = {AttentionKernel.HOPPER, AttentionKernel.HOPPER_FEW_HEADS}


def test_the_kernel_is_chosen_by_device_and_shape() -> None:
    choose = choose_attention_kernel
    assert choose("bf16", 64, 512, (9, 0), gluon=ALL_GLUON) is AttentionKernel.HOPPER
    assert choose("bf16", 64, 512, (9, 0), gluon=()) is AttentionKernel.WITHOUT_GLUON
    assert choose("bf16", 64, 512, (10, 0), gluon=ALL_GLUON) is AttentionKernel.PORTABLE
    assert choose("bf16", 64, 512, None, gluon=()) is AttentionKernel.PORTABLE
    assert choose("bf16", 48, 512, (9, 0), gluon=ALL_GLUON) is AttentionKernel.PORTABLE
    assert choose("fp8_d512", 64, 512, (9, 0), gluon=ALL_GLUON) is AttentionKernel.HOPPER
    assert choose("fp8_d576", 128, 512, (8, 9), gluon=ALL_GLUON) is AttentionKernel.PORTABLE


@pytest.mark.parametrize("kv_format", ["fp8_d512", "fp8_d576"])
@pytest.mark.parametrize("heads", [1, 8, 12, 16, 20, 32])
def test_few_heads_of_packed_rows_have_a_kernel_of_their_own(heads: int, kv_format: str) -> None:
    choose = choose_attention_kernel
    assert choose(kv_format, heads, 512, (9, 0), gluon=ALL_GLUON) is AttentionKernel.HOPPER_FEW_HEADS
    assert choose(kv_format, heads, 512, (9, 0), gluon={AttentionKernel.HOPPER}) is AttentionKernel.WITHOUT_GLUON
    assert choose(kv_format, 64, 512, (9, 0), gluon={AttentionKernel.HOPPER}) is AttentionKernel.HOPPER
    assert choose(kv_format, 33, 512, (9, 0), gluon=ALL_GLUON) is AttentionKernel.PORTABLE
    assert choose(kv_format, heads, 512, (9, 1), gluon=ALL_GLUON) is AttentionKernel.PORTABLE
    assert choose("bf16", heads, 512, (9, 0), gluon=ALL_GLUON) is AttentionKernel.PORTABLE


def test_a_triton_that_lacks_what_a_kernel_needs_takes_the_portable_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    found = api.gluon_kernels.__wrapped__
    assert found() == ALL_GLUON
    monkeypatch.setattr("streamindex_service.ops.sparse_attention.hopper_few_heads.MISSING", ["mma_v2"])
    assert found() == {AttentionKernel.HOPPER}
    monkeypatch.setitem(sys.modules, "streamindex_service.ops.sparse_attention.hopper", None)
    assert found() == set()


@pytest.mark.parametrize(
    ("tokens", "heads", "width", "splits"), [(32, 16, 2048, 4), (32, 32, 2048, 2), (1, 16, 640, 10), (133, 8, 640, 1)]
)
def test_few_heads_are_taken_sixteen_at_a_time(tokens: int, heads: int, width: int, splits: int) -> None:
    shape = Shape(tokens, heads, 512, 512, width, "fp8_d512")
    plan = plan_triton(shape, 256 << 20, 132, AttentionKernel.HOPPER_FEW_HEADS)
    assert plan.splits == splits
    assert plan.find_ends is (tokens * -(-heads // 16) > 132)
    assert plan.workspace_bytes >= (4 * splits * tokens * heads * 513 if splits > 1 else 0)


@pytest.mark.parametrize(("heads", "key_dim"), [(64, 512), (128, 512), (64, 576), (128, 576)])
def test_hopper_tiles_fit_the_shared_memory(heads: int, key_dim: int) -> None:
    tiles = attention_tiles("bf16", heads, key_dim, 512, AttentionKernel.HOPPER)
    queries, rows = 64 * key_dim * 2, tiles.stages * tiles.block_entries * (key_dim * 2 + 4)
    messages = tiles.messages * 64 * (tiles.block_entries * 2 + 4)
    assert queries + rows + messages <= (227 << 10) - 256  # what a block may have, less its barriers


@pytest.mark.parametrize("kv_format", [KvFormat.FP8_D512, KvFormat.FP8_D576], ids=lambda each: each.value)
def test_tiles_of_few_heads_fit_the_shared_memory(kv_format: KvFormat) -> None:
    packing = kv_format.packed
    assert packing is not None
    tiles = attention_tiles(kv_format.value, 16, packing.key_dim, 512, AttentionKernel.HOPPER_FEW_HEADS)
    groups = 512 // packing.group
    # values with room for 512, rotary elements, scales and a bias; shares twice and an exponent, weights twice; queries
    stage = tiles.block_entries * (512 + 128 + max(packing.scale_bytes, 16) + 4)
    block = tiles.block_entries * (6 * groups + 4 + 2 * 2 * 16)
    assert tiles.stages * stage + block + 16 * 512 * 2 + (4 << 10) <= (227 << 10)  # and scratch of the compiler's own


def test_the_reference_refuses_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_GATHERED_BYTES", {"cpu": 1000})
    with pytest.raises(ReferenceTooLargeError):
        GOOD.attend("reference")


@pytest.mark.parametrize(("kv_format", "row_bytes"), [(KvFormat.FP8_D512, 584), (KvFormat.FP8_D576, 656)])
def test_packed_rows(kv_format: KvFormat, row_bytes: int) -> None:
    packing = kv_format.packed
    assert packing is not None
    keys = torch.randn(50, packing.key_dim, generator=torch.Generator().manual_seed(1)) * 10
    keys[3] = 0.0
    keys[4] *= 1e-6
    kv = pack_rows(keys, kv_format)
    assert kv.row_bytes == row_bytes
    found = kv.gather(torch.arange(50), torch.float64)
    narrow, wide = found[:, : packing.narrow], keys[:, : packing.narrow].double()
    # e4m3 has 4 significant bits, and is absolute below 2^-6 of a scale, which is at most amax / 224 or 1e-4 / 224
    amax = wide.unflatten(1, (-1, packing.group)).abs().amax(dim=2).clamp(min=1e-4).repeat_interleave(packing.group, 1)
    assert ((narrow - wide).abs() <= torch.maximum(wide.abs() * 2**-4, amax / 224 * 2**-10)).all()
    assert torch.equal(found[:, packing.narrow :], keys[:, packing.narrow :].bfloat16().double())


def test_rows_refuse_parts_that_disagree() -> None:
    data, scales = torch.zeros(4, 576, dtype=torch.uint8), torch.zeros(4, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="scales"):
        KvRows(KvFormat.FP8_D512, data)
    with pytest.raises(ValueError, match="scales"):
        KvRows(KvFormat.FP8_D512, data, scales[:3])
    with pytest.raises(ValueError, match="8 bytes"):
        KvRows(KvFormat.FP8_D512, data, torch.zeros(33, dtype=torch.uint8)[1:].view(4, 8))
    with pytest.raises(ValueError, match="scales"):
        KvRows(KvFormat.BF16, torch.zeros(4, 64, dtype=torch.bfloat16), scales)
    with pytest.raises(ValueError, match="data"):
        KvRows(KvFormat.FP8_D576, data)
    with pytest.raises(ValueError, match="data"):
        KvRows(KvFormat.BF16, torch.zeros(4, 64))
    with pytest.raises(ValueError, match="16 bytes"):
        KvRows(KvFormat.BF16, torch.zeros(4 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 64))
    with pytest.raises(ValueError, match="keys"):
        pack_rows(torch.zeros(4, 64), KvFormat.FP8_D512)


@pytest.mark.parametrize("kv_format", list(KvFormat), ids=lambda each: each.value)
def test_no_rows_are_packed_as_some_are(kv_format: KvFormat) -> None:
    key_dim = kv_format.packed.key_dim if kv_format.packed else 64
    some, none = (pack_rows(torch.zeros(rows, key_dim), kv_format) for rows in (3, 0))
    assert none.rows == 0
    assert none.row_bytes == some.row_bytes
    assert (none.scales is None) == (some.scales is None)
