"""The ablations' variants, and the fused kernels' rows of each table: on the device, else under the interpreter."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import topk_ablations, topk_real_data
from benchmarks.harness import Model, Report
from benchmarks.inputs import Prefill, make_prefill
from benchmarks.judge import judge
from benchmarks.searches import Bench, planned, product_search, run_topk
from benchmarks.topk_design import tiled_search
from benchmarks.topk_profile import part_name
from benchmarks.variants.half_precision import search_in_half
from benchmarks.variants.no_merge import search_without_merge, tile_of
from streamindex_service.ops import KeyFormat
from tests.ops.cases import kernel_device

DEVICE = kernel_device()
MODEL = Model("Small", heads=2, head_dim=16, ratio=1, top_k=20)


def _last_rows(keys: int, rows: int, key_format: KeyFormat = KeyFormat.BF16, values: str = "normal") -> Prefill:
    return make_prefill(MODEL, rows, key_format, DEVICE, first_position=keys - rows, values=values)


def _found(prefill: Prefill, work: Any) -> torch.Tensor:
    out = torch.full((prefill.rows, prefill.model.top_k), -77, dtype=torch.int32, device=DEVICE)
    work(prefill, out)
    return out


def _exact(prefill: Prefill) -> torch.Tensor:
    return _found(prefill, lambda p, out: run_topk(p, "reference", out))


class TestNoMerge:
    @pytest.mark.parametrize("implementation", ["chunked", "triton"])
    @pytest.mark.parametrize("key_format", [KeyFormat.BF16, KeyFormat.FP8_E4M3])
    def test_each_tile_gives_its_best(self, implementation: str, key_format: KeyFormat) -> None:
        prefill = _last_rows(1024, 3, key_format, "integers")
        found = _found(
            prefill,
            lambda p, out: search_without_merge(p, out, implementation=implementation, query_chunk=2, tiles=4),
        )
        for tile in range(4):
            keys = tile_of(prefill.keys, tile, 1)
            part = replace(prefill, keys=keys, positions=1023, model=replace(MODEL, top_k=5))
            seen = replace(part, positions=torch.tensor([256 if tile < 3 else n for n in (254, 255, 256)]) - 1)
            assert torch.equal(found[:, 5 * tile : 5 * tile + 5], _exact(seen) + 256 * tile)

    def test_one_tile_is_the_whole_algorithm(self) -> None:
        prefill = make_prefill(MODEL, 60, KeyFormat.BF16, DEVICE, values="integers")  # rows that see fewer than top_k
        found = _found(
            prefill, lambda p, out: search_without_merge(p, out, implementation="chunked", query_chunk=7, tiles=1)
        )
        assert torch.equal(found, _exact(prefill))

    def test_best_keys_in_one_tile_are_lost(self) -> None:
        prefill = _last_rows(1024, 2)
        for page in prefill.keys.pages[1:]:
            page.zero_()  # what is left there scores nothing
        found = _found(
            replace(prefill, w=prefill.w.abs()),
            lambda p, out: search_without_merge(p, out, implementation="chunked", query_chunk=2, tiles=4),
        )
        judgement = judge(replace(prefill, w=prefill.w.abs()), found)
        assert (judgement.wrong_rows, judgement.recall) == (2, 0.25)


class TestHalfPrecision:
    def test_exact_scores_give_the_exact_answer(self) -> None:
        # integers below 256 are bfloat16 numbers: only rounding can make this search wrong
        prefill = make_prefill(MODEL, 90, KeyFormat.BF16, DEVICE, values="integers")
        found = _found(prefill, lambda p, out: search_in_half(p, out, dtype=torch.bfloat16, query_chunk=16))
        assert torch.equal(found, _exact(prefill))

    def test_close_scores_are_confused(self) -> None:
        prefill = _last_rows(1024, 8)
        found = _found(prefill, lambda p, out: search_in_half(p, out, dtype=torch.bfloat16, query_chunk=8))
        judgement = judge(prefill, found)
        assert judgement.wrong_rows > 0
        assert 0.8 < judgement.recall < 1.0


class TestFusedKernels:
    def test_without_the_filter_the_answer_is_the_same(self) -> None:
        prefill = _last_rows(2304, 2)
        search = topk_ablations.without_filter(prefill)
        assert search.exact
        assert torch.equal(_found(prefill, search.work), _found(prefill, product_search("triton").work))
        assert judge(prefill, _found(prefill, search.work)).wrong_rows == 0

    def test_random_order_changes_no_row(self) -> None:
        prefill = make_prefill(MODEL, 40, KeyFormat.BF16, DEVICE)
        mixed = topk_ablations.shuffled(prefill)
        order = mixed.positions
        assert isinstance(order, torch.Tensor)
        assert sorted(order.tolist()) == list(range(40)) != order.tolist()
        work = product_search("triton").work
        assert torch.equal(_found(mixed, work), _found(prefill, work)[order.to(DEVICE)])

    @pytest.mark.parametrize("tiles", [(1, 256), (3, 1024)])
    def test_design_tiles_are_those_asked_for(self, tiles: tuple[int, int]) -> None:
        prefill = _last_rows(1100, 3)
        bench = Bench("t", DEVICE, Report(DEVICE), budget_s=0.0, max_repeats=1)
        row = bench.run(prefill, tiled_search(prefill, "triton", *tiles))
        assert (row.query_chunk, row.key_tile, row.wrong_rows, row.recall) == (*tiles, 0, 1.0)

    def test_ablations_of_the_kernels(self) -> None:
        bench = Bench("t", DEVICE, Report(DEVICE), budget_s=0.0, max_repeats=1)
        topk_ablations.run_size(bench, _last_rows(2304, 2), ["triton"], query_chunk=2)
        rows = {row.left_out: row for row in bench.report.rows}
        assert set(rows) == {"", "threshold filter", "merge", "tile skipping"}
        assert bench.report.errors == 0
        assert rows["threshold filter"].ratio_to == "triton bf16"

    def test_fallback_of_real_rows_is_counted(self) -> None:
        prefill = _last_rows(2304, 3)
        assert topk_real_data.fallback_rows(prefill) == 0
        flat = replace(prefill, w=torch.zeros_like(prefill.w))  # every score is zero
        assert topk_real_data.fallback_rows(flat) == 3
        assert topk_real_data.fallback_rows(_last_rows(300, 3)) is None
        assert planned(prefill, "triton").tiles is not None


def test_parts_of_a_profile_are_named_by_their_kernels() -> None:
    assert part_name("_score_kernel", {}) == "score"
    assert part_name("select_kernel", {"MANY": True}) == "select of many"
    assert part_name("select_kernel", {"MANY": False}) == "select of few"
