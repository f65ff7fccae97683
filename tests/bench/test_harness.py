"""The gate, the judge and the inputs that all benchmarks share."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import timing
from benchmarks.harness import MODELS, Model, Report, Row
from benchmarks.inputs import Prefill, make_prefill
from benchmarks.judge import judge, recall_of_rows, sample_rows
from benchmarks.searches import (
    Bench,
    Search,
    TopkRow,
    chunked_search,
    product_search,
    reference_search,
    run_topk,
    usable,
)
from benchmarks.timing import keep_up, measure
from streamindex_service.ops import KeyFormat
from streamindex_service.ops.topk import reference

HEADER = {"device", "driver", "torch", "triton", "commit", "date"}
FIELDS = {
    "table", "case", "dtype", "seconds", "useful_tflops", "roof_fraction", "ratio", "ratio_to", "peak_bytes",
    "wrong_rows",
}  # fmt: skip
BF16, FP8 = KeyFormat.BF16, KeyFormat.FP8_E4M3


def _row(**changes: object) -> TopkRow:
    row = TopkRow("t", "a case", "bf16", 1.0, 2.0, 0.5, None, None, 0, 0, model="Tiny", checked_rows=4, recall=1.0)
    return replace(row, **changes)


def _bench(out: Path | None = None) -> Bench:
    return Bench("t", "cpu", Report("cpu", out), budget_s=0.0, max_repeats=1)


def _answer(prefill: Prefill) -> torch.Tensor:
    out = torch.empty((prefill.rows, prefill.model.top_k), dtype=torch.int32)
    run_topk(prefill, "chunked", out)
    return out


class TestGate:
    def test_wrong_rows_write_nothing(self, tmp_path: Path) -> None:
        report = Report("cpu", tmp_path / "a.json")
        report.add(_row())
        report.add(_row(wrong_rows=1))
        assert report.finish() == 1
        assert not list(tmp_path.iterdir())

    def test_a_run_that_is_cut_off_leaves_its_rows(self, tmp_path: Path) -> None:
        report = Report("cpu", tmp_path / "a.json")
        report.add(_row())
        (partial,) = tmp_path.iterdir()
        assert partial.name == "a.json.partial"
        assert [row["case"] for row in json.loads(partial.read_text())["rows"]] == ["a case"]
        assert report.finish() == 0
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

    def test_a_plain_row_is_judged_too(self, tmp_path: Path) -> None:
        report = Report("cpu", tmp_path / "a.json")
        report.add(Row("t", "a case", "bf16", 1.0, None, None, None, None, None, 3))
        assert report.finish() == 1

    def test_only_what_leaves_a_part_out_may_be_wrong(self, tmp_path: Path) -> None:
        report = Report("cpu", tmp_path / "a.json")
        report.add(_row(wrong_rows=4, recall=0.5, left_out="merge", exact=False))
        assert report.finish() == 0
        (written,) = json.loads((tmp_path / "a.json").read_text())["rows"]
        assert (written["wrong_rows"], written["recall"], written["exact"]) == (4, 0.5, False)

    def test_leaving_out_what_only_saves_time_excuses_nothing(self) -> None:
        report = Report("cpu")
        report.add(_row(wrong_rows=1, left_out="threshold filter"))
        assert report.finish() == 1

    def test_nothing_else_can_call_itself_inexact(self) -> None:
        with pytest.raises(ValueError, match="leaves a part out"):
            _row(exact=False)

    @pytest.mark.parametrize("changes", [{"wrong_rows": None}, {"checked_rows": 0}])
    def test_no_time_without_a_judgement(self, changes: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="no judgement"):
            _row(**changes)

    def test_a_search_that_answers_wrongly_is_caught(self, tiny: Model) -> None:
        def one_key_off(prefill: Prefill, out: torch.Tensor) -> None:
            out.copy_(_answer(prefill))
            out[-1, 0] = -1

        bench = _bench()
        row = bench.run(make_prefill(tiny, 300, BF16, "cpu"), Search("broken", "broken", one_key_off))
        assert row.wrong_rows == 1
        assert bench.report.finish() == 1

    def test_a_search_that_writes_nothing_is_caught(self, tiny: Model) -> None:
        bench, prefill = _bench(), make_prefill(tiny, 300, BF16, "cpu")
        bench.run(prefill, chunked_search(64, 256))  # its buffer is free again, and right
        row = bench.run(prefill, Search("idle", "idle", lambda prefill, out: None))
        assert row.wrong_rows == row.checked_rows == 64


class TestRows:
    def test_form_of_a_result_file(self, tiny: Model, tmp_path: Path) -> None:
        bench = _bench(tmp_path / "a.json")
        prefill = make_prefill(tiny, 400, BF16, "cpu")
        baseline = bench.run(prefill, chunked_search(64, 256))
        row = bench.run(prefill, reference_search(), baseline)
        assert bench.report.finish() == 0
        result = json.loads((tmp_path / "a.json").read_text())
        assert HEADER | {"roof_tflops_bf16"} <= set(result["header"])
        assert all(set(each) >= FIELDS for each in result["rows"])
        assert row.ratio_to == "chunked bf16"
        assert row.ratio == pytest.approx(baseline.seconds / row.seconds)
        assert row.useful_tflops == pytest.approx(tiny.useful_flop(400) / row.seconds / 1e12)
        assert row.roof_tflops == bench.measure_roof(BF16)
        assert row.roof_fraction == pytest.approx(row.useful_tflops / row.roof_tflops)

    def test_out_of_memory_is_a_row_without_figures(self, tiny: Model) -> None:
        def too_much(prefill: Prefill, out: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("no more")

        bench = _bench()
        row = bench.run(make_prefill(tiny, 50, BF16, "cpu"), Search("large", "large", too_much, note="float32"))
        assert (row.seconds, row.wrong_rows, row.note) == (None, None, "float32, out of memory")
        assert bench.report.finish() == 0

    def test_beyond_the_references_bound(self, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(reference.MAX_PRODUCT_BYTES, "cpu", 1000)
        row = _bench().run(make_prefill(tiny, 50, BF16, "cpu"), reference_search())
        assert row.seconds is None
        assert "beyond the reference's bound" in row.note

    def test_unusable_implementations_are_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert usable(["triton", "chunked"], "cpu", BF16) == ["chunked"]


class TestJudge:
    @pytest.mark.parametrize("key_format", [BF16, FP8])
    def test_right_answers_have_a_recall_of_one(self, tiny: Model, key_format: KeyFormat) -> None:
        prefill = make_prefill(tiny, 700, key_format, "cpu")
        judgement = judge(prefill, _answer(prefill), sample=50)
        assert (judgement.checked_rows, judgement.wrong_rows, judgement.recall) == (50, 0, 1.0)

    def test_ties_at_the_threshold_cost_nothing(self, tiny: Model) -> None:
        prefill = make_prefill(tiny, 700, BF16, "cpu", values="integers")
        assert recall_of_rows(prefill, _answer(prefill)).tolist() == [1.0] * 700

    @pytest.mark.parametrize("instead", [-1, "twice"])
    def test_each_lost_key_costs_its_share(self, tiny: Model, instead: int | str) -> None:
        prefill = make_prefill(tiny, 700, BF16, "cpu")
        found = _answer(prefill)
        found[:, 0] = found[:, 1] if instead == "twice" else instead
        recall = recall_of_rows(prefill, found)
        assert recall[-1] == 31 / 32
        assert recall[9] == 4 / 5  # sees five keys
        assert recall[3] == 1 / 2
        assert recall[0] == 1.0  # sees none

    def test_rows_are_those_of_their_positions(self, tiny: Model) -> None:
        prefill = make_prefill(tiny, 700, BF16, "cpu")
        rows = torch.tensor([699, 3, 350])
        part = prefill.select(rows)
        assert part.visible().tolist() == [350, 2, 175]
        assert torch.equal(_answer(part), _answer(prefill)[rows])
        assert judge(part, _answer(part)).wrong_rows == 0

    def test_sample_has_both_ends(self) -> None:
        assert sample_rows(1000, 3).tolist() == [0, 499, 999]
        assert sample_rows(2, 64).tolist() == [0, 1]
        assert sample_rows(1, 64).tolist() == [0]


class TestInputs:
    @pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
    @pytest.mark.parametrize("tokens", [1, 7, 8, 1001])
    def test_useful_work_counts_every_seen_pair(self, model: Model, tokens: int) -> None:
        pairs = sum(min((token + 1) // model.ratio, model.keys(tokens)) for token in range(tokens))
        assert model.useful_flop(tokens) == pairs * 2 * model.heads * model.head_dim
        assert (
            make_prefill(replace(model, head_dim=16), tokens, BF16, "cpu").useful_flop() == pairs * 2 * model.heads * 16
        )

    @pytest.mark.parametrize("key_format", list(KeyFormat), ids=lambda key_format: key_format.value)
    def test_integers_have_exact_scores(self, tiny: Model, key_format: KeyFormat) -> None:
        prefill = make_prefill(tiny, 200, key_format, "cpu", values="integers")
        k, scales = prefill.keys.gather(0, 100, torch.float64)
        double = reference.indexer_scores(prefill.q, prefill.w, k, scales)
        assert torch.equal(double.float().double(), double)
        assert (double * 4 % 1 == 0).all()

    def test_the_last_chunk_of_a_prefill(self, tiny: Model) -> None:
        prefill = make_prefill(tiny, 10, BF16, "cpu", first_position=91)
        assert prefill.keys.length == 50
        assert prefill.visible().tolist() == [46, 46, 47, 47, 48, 48, 49, 49, 50, 50]

    def test_the_same_seed_gives_the_same_inputs(self, tiny: Model) -> None:
        one, other = (make_prefill(tiny, 30, FP8, "cpu", seed=4) for _ in range(2))
        assert torch.equal(one.q.view(torch.uint8), other.q.view(torch.uint8))
        assert torch.equal(one.w, other.w)


@pytest.mark.parametrize(("run_s", "runs"), [(0.1, 4), (0.33, 1), (3.0, 1)])
def test_work_is_kept_up_for_some_time_and_once_at_least(run_s: float, runs: int) -> None:
    told, now = [], [0.0]

    def wait() -> None:
        told.append("done")
        now[0] += run_s

    keep_up(lambda: told.append("work"), 0.33, wait, clock=lambda: now[0])
    assert told == ["work", "done"] * runs


def test_measure_runs_once_more_than_it_counts_without_a_device() -> None:
    runs: list[str] = []
    found = measure(
        lambda: runs.append("run"), "cpu", budget_s=1.0, max_repeats=4, when_warm=lambda: runs.append("roof")
    )
    assert runs == ["run", "roof"] + ["run"] * 4
    assert found.repeats == 4


def test_a_run_of_many_seconds_counts_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds_of", lambda work, device: work() or 47.0)
    runs: list[str] = []
    found = measure(lambda: runs.append("run"), "cpu", budget_s=1000.0, when_warm=lambda: runs.append("roof"))
    assert runs == ["run", "roof"]
    assert (found.seconds, found.repeats) == (47.0, 1)


def test_a_plan_is_kept_in_the_row(tiny: Model) -> None:
    row = _bench().run(make_prefill(tiny, 100, BF16, "cpu"), chunked_search(16, 256))
    assert (row.query_chunk, row.key_tile, row.workspace_bytes) == (16, 256, None)
    row = _bench().run(make_prefill(tiny, 100, BF16, "cpu"), product_search("chunked", workspace_bytes=16 << 20))
    assert (row.query_chunk, row.key_tile, row.workspace_bytes) == (None, None, 16 << 20)
