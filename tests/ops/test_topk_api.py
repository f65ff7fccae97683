"""What the operation refuses, what it says, and what a plan promises."""

import subprocess
import sys

import pytest
import torch

import streamindex_service.ops.topk as package
from streamindex_service.ops import KeyFormat, PagedKeys
from streamindex_service.ops.topk import (
    IMPLEMENTATIONS,
    LIMITS,
    MIN_WORKSPACE_BYTES,
    ReferenceTooLargeError,
    TopkInputError,
    UnsupportedImplementationError,
    WorkspaceTooSmallError,
    find_implementation,
    plan_for,
    topk,
)
from streamindex_service.ops.topk import plan as planning
from streamindex_service.ops.topk import reference as reference_module
from streamindex_service.ops.topk.plan import (
    HOPPER_SHARED_BYTES,
    ScoreKernel,
    choose_score_kernel,
    kernel_tiles,
    shared_queries,
)
from streamindex_service.ops.topk.problem import first_if_consecutive
from tests.ops.cases import kernel_device, make_inputs


def _search(**changes):
    inputs = make_inputs(rows=3, heads=4, head_dim=32, keys=300, key_format=KeyFormat.BF16, top_k=8)
    arguments = {
        "q": inputs.q, "w": inputs.w, "keys": inputs.keys, "positions": 297, "ratio": 1, "top_k": 8,
        "implementation": "chunked",
    } | changes  # fmt: skip
    return topk(
        arguments.pop("q"), arguments.pop("w"), arguments.pop("keys"), arguments.pop("positions"), **arguments
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("q", {"q": torch.zeros(3, 4, 32)}),
        ("q", {"q": torch.zeros(3, 4, 16, dtype=torch.bfloat16)}),
        ("q", {"q": torch.zeros(3, 129, 32, dtype=torch.bfloat16)}),
        ("q", {"q": torch.zeros(3, 0, 32, dtype=torch.bfloat16)}),
        ("q", {"q": torch.zeros(4, 3, 32, dtype=torch.bfloat16).transpose(0, 1)}),
        ("q", {"q": torch.zeros(3, 32, dtype=torch.bfloat16)}),
        ("w", {"w": torch.zeros(3, 5)}),
        ("w", {"w": torch.zeros(3, 4, dtype=torch.float64)}),
        ("ratio", {"ratio": 0}),
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": LIMITS.max_top_k + 1}),
        ("positions", {"positions": -1}),
        ("positions", {"positions": torch.tensor([1, 2])}),
        ("positions", {"positions": torch.tensor([1, 2, 3], dtype=torch.int32)}),
        ("positions", {"positions": torch.tensor([1, -2, 3])}),
        ("out_indices", {"out_indices": torch.zeros(3, 8, dtype=torch.int64)}),
        ("out_scores", {"out_scores": torch.zeros(3, 9)}),
    ],
)
def test_a_wrong_argument_is_named(field: str, changes: dict) -> None:
    with pytest.raises(TopkInputError, match=f"^{field}: ") as caught:
        _search(**changes)
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError)


def test_an_unknown_implementation_lists_the_valid_names() -> None:
    with pytest.raises(
        UnsupportedImplementationError, match=r"'fastest'.*valid names are reference, chunked"
    ) as caught:
        _search(implementation="fastest")
    assert "reference" in caught.value.valid_names


def test_kernels_are_refused_on_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedImplementationError, match=r"valid names are reference, chunked$"):
        find_implementation("triton", "cpu", KeyFormat.BF16)
    assert find_implementation("triton", "cuda", KeyFormat.FP8_E4M3).name == "triton"


def test_import_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, streamindex_service.ops.topk as t\n"
        "from streamindex_service.ops import PagedKeys\n"
        "k = PagedKeys.from_contiguous(torch.ones(5, 16))\n"
        "q, w = torch.ones(1, 1, 16), torch.ones(1, 1)\n"
        "print(t.topk(q, w, k, 9, ratio=1, top_k=2, implementation='chunked').indices)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[[0, 1]]" in done.stdout


def test_exports_exist() -> None:
    assert all(hasattr(package, name) for name in package.__all__)
    assert list(package.__all__) == sorted(package.__all__, key=lambda name: (not name.isupper(), name.islower(), name))


def test_the_reference_refuses_what_it_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference_module.MAX_PRODUCT_BYTES, "cpu", 1000)
    with pytest.raises(ReferenceTooLargeError, match="MAX_PRODUCT_BYTES"):
        _search(implementation="reference")


def test_no_rows() -> None:
    for name in IMPLEMENTATIONS:
        inputs = make_inputs(
            rows=0, heads=4, head_dim=32, keys=300, key_format=KeyFormat.BF16, top_k=8,
            device=kernel_device() if name == "triton" else "cpu",
        )  # fmt: skip
        assert inputs.search(name).indices.shape == (0, 8)


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("budget", [MIN_WORKSPACE_BYTES, 64 << 20, 256 << 20], ids=["16MiB", "64MiB", "256MiB"])
@pytest.mark.parametrize("keys", [1, 4097, 262_144, 2**31 - 1])
@pytest.mark.parametrize("rows", [1, 100, 1_048_576])
@pytest.mark.parametrize(("heads", "head_dim", "top_k"), [(1, 16, 1), (64, 128, 512), (128, 256, 4096)])
def test_every_plan_fits_its_workspace(
    implementation: str, device: str, budget: int, keys: int, rows: int, heads: int, head_dim: int, top_k: int
) -> None:
    plan = plan_for(
        implementation, device, KeyFormat.BF16, rows=rows, heads=heads, head_dim=head_dim, keys=keys, top_k=top_k,
        workspace_bytes=budget,
    )  # fmt: skip
    assert plan is not None
    assert plan.workspace_bytes <= budget
    assert 1 <= plan.query_chunk <= rows
    assert plan.key_tile % 256 == 0
    assert plan.key_tile >= 256


@pytest.mark.parametrize(
    ("format_name", "heads", "head_dim", "capability", "gluon", "expected"),
    [
        ("bf16", 64, 128, (9, 0), True, ScoreKernel.HOPPER),
        ("bf16", 32, 128, (9, 0), True, ScoreKernel.HOPPER),
        ("fp8_e4m3", 64, 128, (9, 0), True, ScoreKernel.HOPPER),
        ("fp8_e4m3", 32, 128, (9, 0), True, ScoreKernel.HOPPER),
        ("fp16", 64, 128, (9, 0), True, ScoreKernel.HOPPER),
        ("bf16", 64, 128, (9, 0), False, ScoreKernel.WITHOUT_GLUON),
        ("fp32", 64, 128, (9, 0), False, ScoreKernel.PORTABLE),
        ("bf16", 48, 128, (9, 0), True, ScoreKernel.PORTABLE),
        ("bf16", 64, 64, (9, 0), True, ScoreKernel.PORTABLE),
        ("bf16", 64, 128, (10, 0), True, ScoreKernel.PORTABLE),
        ("bf16", 64, 128, None, True, ScoreKernel.PORTABLE),
    ],
)
def test_the_score_kernel_is_chosen_by_device_and_shape(
    format_name: str, heads: int, head_dim: int, capability: tuple | None, gluon: bool, expected: ScoreKernel
) -> None:
    assert choose_score_kernel(format_name, heads, head_dim, capability, gluon=gluon) is expected
    if expected is not ScoreKernel.WITHOUT_GLUON:
        tiles = kernel_tiles(format_name, heads, head_dim, expected)
        assert tiles.score_kernel is expected
        assert 256 % tiles.block_keys == 0  # a block's keys lie in one page


def test_a_plan_says_that_gluon_is_missing() -> None:
    shape = planning.Shape(100, 64, 128, 5000, 512, "bf16", 2)
    plan = planning.plan_triton(shape, 256 << 20, ScoreKernel.WITHOUT_GLUON)
    assert plan.name == "triton, score kernel: portable, for this Triton lacks what the hopper kernel needs"
    assert plan.tiles is not None
    assert plan.tiles.block_keys == kernel_tiles("bf16", 64, 128).block_keys


@pytest.mark.parametrize(("rows", "row_bytes"), [(1, 8192), (840, 8192), (2048, 8192), (2049, 8192), (8192, 32_768)])
def test_queries_that_are_read_at_a_time_fit_the_cache_in_equal_parts(rows: int, row_bytes: int) -> None:
    group = shared_queries(rows, row_bytes)
    groups = -(-rows // group)
    assert (group - 8) * row_bytes < HOPPER_SHARED_BYTES
    assert groups == -(-rows * row_bytes // HOPPER_SHARED_BYTES)
    assert groups * group - rows < 8 * groups


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([7], 7),
        ([7, 8, 9], 7),
        ([7, 9, 9], [7, 9, 9]),
        ([9, 8, 7], [9, 8, 7]),
        ([3, 3], [3, 3]),
        ([0, 2, 1, 3], [0, 2, 1, 3]),
        ([], []),
    ],
)
def test_consecutive_positions_are_given_by_the_first(positions: list[int], expected: int | list[int]) -> None:
    found = first_if_consecutive(torch.tensor(positions, dtype=torch.int64))
    assert (found if isinstance(found, int) else found.tolist()) == expected


def test_less_than_the_floor_is_refused_with_figures() -> None:
    with pytest.raises(WorkspaceTooSmallError) as caught:
        _search(workspace_bytes=MIN_WORKSPACE_BYTES - 1)
    assert (caught.value.offered_bytes, caught.value.floor_bytes) == (MIN_WORKSPACE_BYTES - 1, MIN_WORKSPACE_BYTES)


@pytest.mark.parametrize(
    "parts",
    [
        {"length": 257},
        {"pages": (torch.zeros(256, 32),)},
        {"pages": (torch.zeros(255, 16),)},
        {"pages": (torch.zeros(256, 16).half(),)},
        {"scale_pages": (torch.ones(256),)},
        {"length": -1},
    ],
)
def test_key_pages_that_disagree_are_refused(parts: dict) -> None:
    whole = {"format": KeyFormat.FP32, "head_dim": 16, "length": 200, "pages": (torch.zeros(256, 16),)}
    PagedKeys(**whole)
    with pytest.raises(ValueError, match="pages"):
        PagedKeys(**(whole | parts))


def test_scales_come_with_e4m3_only() -> None:
    k = torch.zeros(10, 16).to(torch.float8_e4m3fn)
    assert PagedKeys.from_contiguous(k, torch.ones(10)).scale_pages is not None
    with pytest.raises(ValueError, match="scale_pages"):
        PagedKeys.from_contiguous(k)
    with pytest.raises(ValueError, match="scales"):
        PagedKeys.from_contiguous(k, torch.ones(9))


def test_page_offsets_reach_every_extent() -> None:
    k = torch.arange(700 * 16, dtype=torch.float32).view(700, 16)
    keys = PagedKeys.from_contiguous(k)
    table = keys.key_table
    assert table.anchor.data_ptr() == keys.pages[0].data_ptr()
    expected = [(page.data_ptr() - keys.pages[0].data_ptr()) // 4 for page in keys.pages]
    assert table.offsets.tolist() == expected
    assert not (table.offsets % 16).any()
    assert keys.pages[0].data_ptr() == k.data_ptr()  # no copy


def test_a_misaligned_page_is_named() -> None:
    slab = torch.zeros(2 * 256 * 16 + 8)
    pages = (slab[: 256 * 16].view(256, 16), slab[256 * 16 + 8 :].view(256, 16))
    with pytest.raises(ValueError, match=r"pages\[1\]: not aligned"):
        PagedKeys(KeyFormat.FP32, 16, 512, pages).key_table  # noqa: B018


def test_the_last_row_may_stand_at_the_last_position() -> None:
    rows = 3
    assert torch.equal(_search(positions=2**62 - rows + 1).indices, _search(positions=300).indices)
    with pytest.raises(TopkInputError) as caught:
        _search(positions=2**62 - rows + 2)
    assert caught.value.field == "positions"
