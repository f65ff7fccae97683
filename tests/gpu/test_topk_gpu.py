"""The topk operation at real sizes on a CUDA device: answers, repeatability, memory, compilation, 64-bit addresses."""

import gc

import pytest
import torch

from streamindex_service.ops import KeyFormat, PagedKeys
from streamindex_service.ops.topk import MIN_WORKSPACE_BYTES, Order, Plan, api, check_topk, plan_for, topk
from streamindex_service.ops.topk import plan as planning
from streamindex_service.ops.topk.plan import ScoreKernel, Shape, choose_score_kernel, kernel_tiles
from streamindex_service.ops.topk.problem import Problem
from tests.ops.cases import Inputs, make_inputs, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16, FP16, FP32, FP8 = KeyFormat.BF16, KeyFormat.FP16, KeyFormat.FP32, KeyFormat.FP8_E4M3

# rows, keys, heads, head_dim, format, top_k, ratio
SHAPES = [
    (517, 20_001, 64, 128, BF16, 512, 4),
    (517, 20_001, 64, 128, FP8, 512, 4),
    (300, 33_333, 64, 128, FP8, 2048, 1),
    (300, 33_333, 32, 128, BF16, 2048, 1),
    (300, 33_333, 32, 128, FP8, 2048, 1),
    (130, 9_999, 128, 128, BF16, 1024, 1),
    (130, 9_999, 128, 128, FP8, 1024, 1),
    (259, 20_001, 64, 128, FP16, 512, 4),
    (130, 9_999, 128, 256, FP16, 4096, 1),
    (130, 9_999, 128, 256, FP8, 7, 1),
    (999, 5_555, 3, 48, BF16, 7, 128),
    (999, 5_555, 1, 16, FP8, 512, 1),
    (999, 5_555, 17, 208, FP16, 1, 1),
    (20, 3_001, 64, 128, FP32, 512, 1),
    (3, 70_001, 64, 128, BF16, 512, 1),
    (1, 262_144, 64, 128, FP8, 2048, 1),
]


def _id(case) -> str:
    rows, keys, heads, head_dim, key_format, top_k, ratio = case
    return f"R{rows}-S{keys}-H{heads}-D{head_dim}-{key_format.value}-K{top_k}-r{ratio}"


def _inputs(case, **changes) -> Inputs:
    rows, keys, heads, head_dim, key_format, top_k, ratio = case
    return make_inputs(
        rows=rows, heads=heads, head_dim=head_dim, keys=keys, key_format=key_format, top_k=top_k, ratio=ratio,
        device="cuda", **changes,
    )  # fmt: skip


def _kernels(inputs: Inputs) -> list[ScoreKernel]:
    """The score kernels that this device has for the inputs: the portable one, and Hopper's where it is chosen."""
    _, heads, head_dim = inputs.q.shape
    chosen = choose_score_kernel(
        inputs.keys.format.value, heads, head_dim, torch.cuda.get_device_capability(), gluon=api.has_gluon()
    )
    return [ScoreKernel.PORTABLE] + [ScoreKernel.HOPPER] * (chosen is ScoreKernel.HOPPER)


def _plans(inputs: Inputs, workspace_bytes: int = 256 << 20) -> list[Plan]:
    rows, heads, head_dim = inputs.q.shape
    key_format, width = inputs.keys.format, inputs.keys.length
    shape = Shape(rows, heads, head_dim, width, inputs.top_k, key_format.value, key_format.element_bytes)
    return [planning.plan_triton(shape, workspace_bytes, kernel) for kernel in _kernels(inputs)]


def _judge(inputs: Inputs, result, order: Order = Order.SCORE) -> None:
    report = check_topk(
        result.indices, inputs.q, inputs.w, inputs.keys, inputs.positions,
        ratio=inputs.ratio, top_k=inputs.top_k, order=order, scores=result.scores,
    )  # fmt: skip
    assert report.wrong_rows == 0, str(report)


@pytest.fixture(autouse=True)
def _give_memory_back():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize("case", SHAPES, ids=_id)
def test_random_inputs_pass_the_check(case, implementation: str) -> None:
    inputs = _inputs(case)
    _judge(inputs, inputs.search(implementation))
    if implementation == "triton":
        for plan in _plans(inputs):
            _judge(inputs, inputs.search(implementation, plan=plan))


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="another device")
def test_the_plan_names_its_score_kernel() -> None:
    def name(key_format: KeyFormat, heads: int, head_dim: int) -> str:
        plan = plan_for(
            "triton", "cuda", key_format, rows=10, heads=heads, head_dim=head_dim, keys=1000, top_k=64
        )  # fmt: skip
        assert plan is not None
        return plan.name

    assert api.has_gluon()
    for key_format in (BF16, FP16, FP8):
        for heads in (32, 64, 128):
            assert name(key_format, heads, 128).endswith(": hopper")
    assert name(BF16, 64, 64).endswith(": portable")
    assert name(BF16, 48, 128).endswith(": portable")
    assert name(FP32, 64, 128).endswith(": portable")


@pytest.mark.parametrize("order", list(Order), ids=lambda order: order.value)
@pytest.mark.parametrize("case", SHAPES, ids=_id)
def test_exact_inputs_equal_the_reference_bit_for_bit(case, order: Order) -> None:
    inputs = _inputs(case, values="integers")
    expected = inputs.search("reference", order=order)
    for plan in _plans(inputs):
        assert same(inputs.search("triton", order=order, plan=plan), expected), plan.name
        found = inputs.search("triton", order=order, plan=plan, want_scores=False)
        assert torch.equal(found.indices, expected.indices), plan.name


@pytest.mark.parametrize("case", [*SHAPES[:6], (517, 20_001, 64, 128, FP16, 512, 4)], ids=_id)
def test_chunk_tile_workspace_and_neighbours_change_no_bit(case) -> None:
    inputs = _inputs(case)
    for plan, least in zip(_plans(inputs), _plans(inputs, MIN_WORKSPACE_BYTES), strict=True):
        assert plan.tiles is not None
        whole = inputs.search("triton", plan=plan)
        for _ in range(5):
            assert same(inputs.search("triton", plan=plan), whole)
        assert same(inputs.search("triton", plan=least), whole)
        for chunk, tile in ((7, 256), (64, 4096), (500, 8192), (1, 65_536)):
            assert same(inputs.search("triton", plan=Plan(chunk, tile, 0, plan.tiles)), whole), (plan.name, chunk, tile)
        for start, stop in ((0, 1), (5, 6), (37, 164)):
            part = inputs.row(start, stop).search("triton", plan=plan)
            expected = type(part)(whole.indices[start:stop], whole.scores[start:stop])
            assert same(part, expected), (plan.name, start, stop)


def test_the_group_of_queries_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = pytest.importorskip("streamindex_service.ops.topk.hopper")
    for case in SHAPES[1:5]:
        inputs = _inputs(case)
        plan = _plans(inputs)[-1]
        whole = inputs.search("triton", plan=plan)
        for group in (1, 64, 96, 130, 512):
            with monkeypatch.context() as patch:
                patch.setattr(hopper, "shared_queries", lambda *_, group=group: group)
                assert same(inputs.search("triton", plan=plan), whole), (_id(case), group)


@pytest.mark.parametrize("key_format", [BF16, FP8], ids=lambda key_format: key_format.value)
def test_a_whole_prefill_in_growing_chunks(key_format: KeyFormat) -> None:
    rows = 20_000
    inputs = _inputs((rows, rows // 4, 64, 128, key_format, 512, 4), positions=0)
    for plan in _plans(inputs, 64 << 20):
        assert plan.tiles is not None
        assert plan.grow
        grown = inputs.search("triton", order=Order.INDEX, plan=plan)
        fixed = inputs.search("triton", order=Order.INDEX, plan=Plan(512, 2048, 0, plan.tiles))
        assert same(grown, fixed), plan.name
        for start in (0, 2041, rows - 300):
            part = inputs.row(start, start + 300)
            window = slice(start, start + 300)
            _judge(part, type(grown)(grown.indices[window], grown.scores[window]), Order.INDEX)


@pytest.mark.parametrize("key_format", [BF16, FP8], ids=lambda key_format: key_format.value)
def test_unsorted_positions_from_none_to_all(key_format: KeyFormat) -> None:
    visible = torch.randint(0, 30_000, (400,), generator=torch.Generator().manual_seed(5))
    visible[:6] = torch.tensor([0, 1, 511, 512, 513, 30_000])
    positions = torch.where(visible > 0, visible * 4 - 1, 2)
    inputs = _inputs((400, 30_000, 64, 128, key_format, 512, 4), positions=positions, values="integers")
    for order in Order:
        expected = inputs.search("reference", order=order)
        for plan in _plans(inputs):
            assert same(inputs.search("triton", order=order, plan=plan), expected), plan.name


@pytest.mark.parametrize(
    "kind",
    [
        "zeros", "equal", "rising", "falling", "outlier", "periodic", "negative", "minus zeros", "tiny", "huge",
        "sampled lines low", "sampled lines high",
    ],
)  # fmt: skip
@pytest.mark.parametrize(("heads", "head_dim"), [(16, 16), (32, 128)])
def test_adversarial_rows(kind: str, heads: int, head_dim: int) -> None:
    keys, rows = 50_003, 40
    tiles = kernel_tiles("bf16", heads, head_dim)
    line = tiles.sample_line
    every = max(-(-keys // tiles.sample_lanes), tiles.sample_every)  # of so many lines of keys, one is sampled
    number = torch.arange(keys, device="cuda", dtype=torch.float32)
    column = {
        "zeros": -torch.ones(keys, device="cuda"),
        "equal": torch.ones(keys, device="cuda"),
        "rising": number,
        "falling": keys - number,
        "outlier": torch.where(number == 31_007, 1e4, 1.0),
        "periodic": (number % (line * every) == 0).float(),
        "negative": number % 77,
        "minus zeros": -(number % 2),
        "tiny": number * 1e-30,
        "huge": number * 1e30,
        "sampled lines low": (number // line % every != 0) * 512.0 + number % line,
        "sampled lines high": (number // line % every == 0) * 512.0 + number % line,
    }[kind]
    k = torch.zeros(keys, head_dim, device="cuda")
    # three parts of 8 bits each: a sum that bfloat16 products give exactly
    k[:, 0] = column.to(torch.bfloat16).float()
    k[:, 1] = (column - k[:, 0]).to(torch.bfloat16).float()
    k[:, 2] = (column - k[:, 0] - k[:, 1]).to(torch.bfloat16).float()
    q = torch.zeros(rows, heads, head_dim, device="cuda")  # as many heads as a block has, so that none is padding
    q[:, 0, :3] = 1
    w = torch.ones(rows, heads, device="cuda") * (-1 if kind in ("negative", "minus zeros") else 1)
    inputs = Inputs(q.bfloat16(), w, PagedKeys.from_contiguous(k.bfloat16()), keys - rows, 1, 512)
    expected = inputs.search("reference")
    for plan in _plans(inputs):
        assert same(inputs.search("triton", plan=plan), expected), plan.name
    if kind in (
        "zeros",
        "equal",
        "sampled lines low",
        "sampled lines high",
    ):  # the sample misleads: rows are read whole
        assert set(_survivors(inputs)) == {-1}
    if kind in ("rising", "falling"):
        assert min(_survivors(inputs)) >= inputs.top_k


def _survivors(inputs: Inputs) -> list[int]:
    from streamindex_service.ops.topk.triton import survivor_counts

    out = torch.empty((inputs.q.shape[0], inputs.top_k), dtype=torch.int32, device="cuda")
    problem = Problem(
        inputs.q, inputs.w, inputs.keys, inputs.positions, inputs.ratio, inputs.top_k, Order.INDEX, out, None
    )
    return survivor_counts(problem, _plans(inputs)[-1]).tolist()


def test_random_rows_do_not_fall_back() -> None:
    for keys in (2_500, 20_000, 65_536, 300_000):
        for top_k in (512, 2048):
            if keys >= 4 * top_k:
                counts = _survivors(_inputs((64, keys, 64, 128, FP8, top_k, 1)))
                assert counts.count(-1) <= 1, (keys, top_k, counts)


@pytest.mark.parametrize("key_format", [BF16, FP8], ids=lambda key_format: key_format.value)
def test_no_shape_compiles_anything_once_warm(key_format: KeyFormat) -> None:
    from streamindex_service.ops.topk.triton import compiled_variants

    def search(rows: int, keys: int, ratio: int, top_k: int, explicit: bool, budget: int = 256 << 20) -> None:
        inputs = make_inputs(
            rows=rows, heads=64, head_dim=128, keys=keys, key_format=key_format, top_k=top_k, ratio=ratio,
            device="cuda",
            positions=torch.arange(keys * ratio, keys * ratio + rows).flip(0) if explicit else None,
        )  # fmt: skip
        inputs.search("triton", workspace_bytes=budget)

    for keys in (4096, 30_000):  # without and with the sampled filter
        for explicit in (False, True):
            for top_k in (512, 1024, 2048, 4096):  # one for each shape of the selection among survivors
                search(16, keys, 4, top_k, explicit)
    warm = compiled_variants()
    assert warm > 0
    for rows in (1, 2, 15, 16, 33, 1024):
        for keys in (1, 16, 17, 255, 256, 257, 4095, 30_000):
            search(rows, keys, 1 + rows % 3, 1 + keys % 999, bool(keys % 2))
    search(700, 200_001, 1, 2048, False, MIN_WORKSPACE_BYTES)
    assert compiled_variants() == warm


# rows, keys, heads, head_dim, format, top_k, workspace
BUDGETS = [
    (4096, 65_536, 64, 128, FP8, 512, 256 << 20),
    (2048, 262_144, 64, 128, BF16, 512, 256 << 20),
    (2048, 262_144, 64, 128, BF16, 512, MIN_WORKSPACE_BYTES),
    (700, 100_001, 128, 256, FP16, 4096, MIN_WORKSPACE_BYTES),
    (9000, 3_000, 1, 16, BF16, 4096, 256 << 20),
    (9000, 257, 1, 16, BF16, 1, MIN_WORKSPACE_BYTES),
]


@pytest.mark.parametrize("implementation", ["triton", "chunked"])
@pytest.mark.parametrize("order", list(Order), ids=lambda order: order.value)
@pytest.mark.parametrize("positions", ["from the first", "from the last", "in no order"])
@pytest.mark.parametrize(
    "case", BUDGETS, ids=lambda case: f"R{case[0]}-S{case[1]}-H{case[2]}-K{case[5]}-{case[6] >> 20}MiB"
)
def test_allocator_peak_stays_within_the_plan(case, positions: str, order: Order, implementation: str) -> None:
    rows, keys, heads, head_dim, key_format, top_k, budget = case
    inputs = make_inputs(
        rows=rows, heads=heads, head_dim=head_dim, keys=keys, key_format=key_format, top_k=top_k, device="cuda",
        positions={"from the first": 0, "from the last": keys, "in no order": torch.arange(rows).flip(0)}[positions],
    )  # fmt: skip
    plan = plan_for(
        implementation, "cuda", key_format, rows=rows, heads=heads, head_dim=head_dim, keys=keys, top_k=top_k,
        workspace_bytes=budget,
    )  # fmt: skip
    assert plan is not None
    assert plan.workspace_bytes <= budget
    inputs.row(0, 2).search(implementation)  # the library's own workspace, which stays
    inputs.keys.key_table  # noqa: B018  (addresses belong to the keys)
    indices = torch.empty((rows, top_k), dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    topk(
        inputs.q, inputs.w, inputs.keys, inputs.positions, ratio=1, top_k=top_k, order=order,
        implementation=implementation, workspace_bytes=budget, out_indices=indices,
    )  # fmt: skip
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= plan.workspace_bytes, f"peak {peak}, planned {plan.workspace_bytes}"


def test_more_than_two_to_the_31_key_elements() -> None:
    keys, head_dim = (2**31) // 128 + 70_001, 128
    k = torch.empty(keys, head_dim, dtype=torch.bfloat16, device="cuda")
    for start in range(0, keys, 1 << 20):
        k[start : start + (1 << 20)].normal_()
    q = torch.randn(3, 4, head_dim, device="cuda").bfloat16()
    inputs = Inputs(q, torch.rand(3, 4, device="cuda"), PagedKeys.from_contiguous(k), keys - 2, 1, 512)
    assert int(inputs.keys.key_table.offsets.max()) > 2**31
    result = inputs.search("triton")
    assert int(result.indices.max()) > 2**31 // 128  # some of the best lie beyond
    _judge(inputs, result)


def test_more_than_two_to_the_31_query_elements() -> None:
    rows, heads, head_dim = 2**31 // (64 * 128) + 300, 64, 128
    q = torch.empty(rows, heads, head_dim, dtype=torch.float8_e4m3fn, device="cuda")
    for start in range(0, rows, 1 << 14):
        part = q[start : start + (1 << 14)]
        part.copy_(torch.randn(part.shape, device="cuda"))
    k, scales = torch.randn(700, head_dim, device="cuda").to(torch.float8_e4m3fn), 0.5 + torch.rand(700, device="cuda")
    inputs = Inputs(q, torch.randn(rows, heads, device="cuda"), PagedKeys.from_contiguous(k, scales), 0, 1, 64)
    result = inputs.search("triton", order=Order.INDEX)
    tail = inputs.row(rows - 500, rows)
    _judge(tail, type(result)(result.indices[-500:], result.scores[-500:]), Order.INDEX)
