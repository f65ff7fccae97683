"""The benchmark of attention's calls, at sizes that a CPU does in seconds."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import attend_calls, attend_cases, attend_steps
from benchmarks.attend_calls import StepRow, Times
from benchmarks.attend_cases import Case, Held, Judged, Queries, bits, joined, judge
from benchmarks.attention import V4_FLASH
from benchmarks.attention_decode import make_rows
from benchmarks.harness import Model
from streamindex_service.demo.workload import quantise_keys
from streamindex_service.ops import KvRows, PagedKeys
from streamindex_service.ops.sparse_attention import sparse_attention
from streamindex_service.ops.topk import topk

INDEX = Model("tiny", heads=4, head_dim=32, ratio=4, top_k=24)
CASE = Case(replace(V4_FLASH, heads=4, top_k=24, window=16), INDEX, 1024, steps=(1,), rows=40)
TIMES = Times(steps_ms=20, rounds=1)


def test_every_case_is_measured(tmp_path: Path):
    out = tmp_path / "attend_calls.json"
    assert attend_calls.main(["--device", "cpu", "--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["header"]["device"] == "cpu"
    rows = result["rows"]
    for row in rows:
        assert row["wrong_rows"] == 0
        assert row["checked_rows"] > 0
        assert 0 < row["largest_error"] <= 1
        assert row["implementation"] == "chunked"
        assert row["request_bytes"] > 0
        assert row["peak_bytes"] > 0
    steps = [row for row in rows if "sequences" in row]
    assert [(row["model"], row["sequences"], row["indices"], row["appends"]) for row in steps] == [
        ("V4-Flash", 1, "found", False), ("V4-Flash", 1, "given", False),
        ("V4-Flash", 4, "found", False), ("V4-Flash", 4, "found", True), ("V4-Flash", 4, "given", False),
        ("V3.2", 4, "found", False), ("V3.2", 4, "found", True), ("V3.2", 4, "given", False),
        ("V4-HCA", 4, "all_visible", False), ("V4-HCA", 4, "all_visible", True), ("V4-HCA", 4, "given", False),
    ]  # fmt: skip
    for row in steps:
        assert row["checked_rows"] == attend_steps.CALLERS * row["sequences"]
        assert row["answer_bytes"] == row["sequences"] * 4 * 512 * 2
        for which in ("alone", "beside"):
            assert row[f"{which}_steps"] > 0
            assert 0 < row[f"{which}_ms_p50"] <= row[f"{which}_ms_p99"]
            assert row[f"{which}_device_us"] > 0
    without, bringing, listed = steps[-3:]
    # what is sent differs by a KV row and a window row of each, and by the list: int32 of all rows of the context
    assert listed["request_bytes"] - without["request_bytes"] == 4 * (1024 // 128) * 4
    assert bringing["request_bytes"] - without["request_bytes"] == 4 * 2 * (576 + 8)
    prefills = [row for row in rows if "overlap" in row]
    assert [(row["model"], row["rows"]) for row in prefills] == [("V4-Flash", 96), ("V3.2", 64)]
    for row in prefills:
        assert row["answer_bytes"] == row["rows"] * 4 * 512 * 2
        assert row["overlap"] == pytest.approx((row["search_s"] + row["attention_s"]) / row["seconds"])
        assert min(row["device_us"], row["search_device_us"], row["attention_device_us"]) > 0


ALL_ROWS = replace(CASE, index=None)


@pytest.mark.parametrize(
    ("case", "judgements", "wrong"),
    [
        pytest.param(CASE, {0}, 1, id="steps"),
        pytest.param(replace(CASE, steps=()), {0}, 1, id="prefill"),
        # each caller's first answer is judged without a list, then with it
        pytest.param(ALL_ROWS, {0, 2}, 2, id="without a list"),
        pytest.param(ALL_ROWS, {1, 3, 5}, 3, id="with a list"),
    ],
)
def test_nothing_is_written_of_wrong_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: Case,
    judgements: set[int],
    wrong: int,
):
    right, numbers = attend_cases.check_sparse_attention, itertools.count()

    def one_wrong(out: torch.Tensor, *others: Any, **named: Any) -> Any:
        if next(numbers) in judgements:
            out = out.clone()
            out[0, 0] *= 1.5
        return right(out, *others, **named)

    monkeypatch.setattr(attend_cases, "check_sparse_attention", one_wrong)
    monkeypatch.setattr(attend_calls, "cases_of", lambda *_, **__: [case])
    monkeypatch.setattr(attend_calls, "times_of", lambda *_, **__: TIMES)
    assert attend_calls.main(["--device", "cpu", "--out", str(tmp_path / "attend_calls.json")]) == 1
    assert list(tmp_path.iterdir()) == []
    assert f"nothing is written: {wrong} wrong" in capsys.readouterr().err


def held_and_answers(rows: int = 6) -> tuple[Held, Queries, torch.Tensor, np.ndarray, np.ndarray]:
    """A sequence that no service has, and right answers of its last rows."""
    generator = torch.Generator().manual_seed(1)
    model, seen = CASE.attention, CASE.context // INDEX.ratio
    keys = PagedKeys.from_contiguous(*quantise_keys(torch.randn((seen, INDEX.head_dim), generator=generator)))
    kv, window = (make_rows(model, count, model.packed, generator) for count in (seen, CASE.context))
    held = Held(SimpleNamespace(id="none"), CASE.context - 1, kv, window, keys)
    queries, positions = Queries.drawn(CASE, rows, "cpu", 2), torch.arange(CASE.context - rows, CASE.context)
    indices = topk(
        queries.index_q,
        queries.index_w,
        keys,
        positions,
        ratio=INDEX.ratio,
        top_k=INDEX.top_k,
        implementation="chunked",
    ).indices
    recent = kv.rows + positions[:, None] - model.window + 1 + torch.arange(model.window)
    out = sparse_attention(
        queries.q, joined(kv, window), torch.cat([recent.int(), indices], dim=1), scale=CASE.scale,
        sink=queries.sink, value_dim=model.value_dim, implementation="chunked",
    ).out  # fmt: skip
    return held, queries, positions, indices.numpy(), bits(out)


def test_answers_are_judged():
    held, queries, positions, indices, out = held_and_answers()
    judged = judge(CASE, held, queries, positions, indices, out)
    assert (judged.rows, judged.wrong) == (6, 0)
    assert 0 < judged.largest <= 1
    # each token has the answer of another; a window that is one token off; the indices of another
    assert judge(CASE, held, queries, positions, indices, np.roll(out, 1, 0)).wrong == 6
    assert judge(CASE, held, queries, positions - 1, indices, out).wrong == 6
    assert judge(CASE, held, queries, positions, np.roll(indices, 1, 0), out).wrong == 6
    both = judged + Judged(2, 1, 9.0)
    assert (both.rows, both.wrong, both.largest) == (8, 1, 9.0)


def test_a_step_s_arrays():
    held, queries, _, indices, _ = held_and_answers(2)
    short = replace(held, position=1019, kv=KvRows(held.kv.format, held.kv.data[:255], held.kv.scales[:255]))
    step = attend_steps.step_of(CASE, [short, held], queries)
    assert list(step["positions"]) == [1019, 1023]
    assert {"q", "index_q", "index_w", "sink"} < step.keys()
    assert (attend_steps.selection_of(step), step["top_k"]) == ("found", INDEX.top_k)
    with_given = attend_steps.given(step, indices)
    assert attend_steps.selection_of(with_given) == "given"
    items = attend_steps.items_of(with_given, ["one", "other"])
    assert [item.start_position for item in items] == [1019, 1023]
    assert items[1].index_q is None
    assert np.array_equal(items[1].indices, indices[1:])


def test_a_step_of_all_rows():
    held, *_ = held_and_answers(2)
    short = replace(held, position=1019, kv=KvRows(held.kv.format, held.kv.data[:255], held.kv.scales[:255]))
    step = attend_steps.step_of(ALL_ROWS, [short, held], Queries.drawn(ALL_ROWS, 2, "cpu", 3))
    assert attend_steps.selection_of(step) == "all_visible"
    (item, _) = attend_steps.items_of(step, ["one", "other"])
    assert (item.index_q, item.index_w, item.indices) == (None, None, None)
    visible = attend_steps.visible_rows(ALL_ROWS, [short, held])
    assert attend_steps.selection_of(attend_steps.given(step, visible)) == "given"
    assert np.array_equal(visible[0], [*range(255), -1])
    assert np.array_equal(visible[1], range(256))


def test_what_a_step_appends_is_the_last_of_its_rows():
    held, queries, _, indices, _ = held_and_answers(2)
    short = replace(held, position=1019, kv=KvRows(held.kv.format, held.kv.data[:255], held.kv.scales[:255]))
    step = attend_steps.step_of(CASE, [held, short], queries) | attend_cases.appended(CASE, [held, short])
    last, before = attend_steps.items_of(step, ["one", "other"])
    assert (last.first_key, last.first_kv_row, last.first_window_row) == (255, 255, 1023)
    assert (before.first_kv_row, before.first_window_row) == (254, 1019)
    assert np.array_equal(before.kv_rows, held.kv.data[254:255].numpy())
    assert np.array_equal(before.kv_scales, held.kv.scales[254:255].numpy())
    assert np.array_equal(before.window_rows, held.window.data[1019:1020].numpy())
    assert np.array_equal(last.window_scales, held.window.scales[1023:].numpy())
    assert np.array_equal(last.keys, bits(held.keys.pages[0][255:]))
    assert np.array_equal(last.key_scales, held.keys.scale_pages[0][255:].numpy())
    (listed, _) = attend_steps.items_of(attend_steps.given(step, indices), ["one", "other"])
    assert (listed.keys, listed.kv_rows, listed.first_key, listed.first_window_row) == (None, None, None, None)
    without_index = attend_cases.appended(ALL_ROWS, [held])
    assert {"kv_rows", "kv_scales", "window_rows", "window_scales"} < without_index.keys()
    assert "keys" not in without_index


def test_an_answer_that_changes_is_counted(monkeypatch: pytest.MonkeyPatch):
    out = np.arange(8, dtype=np.uint16).reshape(2, 1, 4)
    answers = iter([out, out + np.array([0, 1], np.uint16)[:, None, None], out])
    monkeypatch.setattr(
        attend_steps, "ask", lambda *_: [SimpleNamespace(out=each[None]) for each in next(answers, out)]
    )
    clock = iter([0.0, 0.0, 0.0, 1.0, 1.0, 1.5, 4.0, 6.0, 9.0, 10.0, 10.0])  # the first, then two a step, and the last
    monkeypatch.setattr(attend_steps.time, "perf_counter", lambda: next(clock))
    found = attend_steps.repeat(None, [], {"out": out}, 8.0)  # type: ignore[arg-type]
    assert found["changed"] == 1


def test_a_time_without_a_judgement_is_no_row():
    with pytest.raises(ValueError, match="no judgement"):
        StepRow("t", "a case", "fp8_d512", 1.0, None, None, 1.0, "one caller", peak_bytes=1, wrong_rows=0)


def test_every_promise_is_looked_at():
    load = SimpleNamespace(memory_failures=0, worker_restarts=0)
    broken = attend_calls.broken_promises
    assert broken("cuda:0", load, ["triton", "triton"]) == []
    assert broken("cpu", load, ["chunked", "chunked"]) == []
    assert broken("cuda:0", load, ["triton", "chunked"]) == ["the service runs triton and chunked"]
    lost = SimpleNamespace(memory_failures=2, worker_restarts=1)
    assert broken("cpu", lost, ["chunked"]) == ["2 tiles without memory", "1 lost workers"]


@pytest.mark.parametrize("quick", [False, True])
def test_cases_of_a_gpu(quick: bool):
    cases = attend_cases.cases_of("cuda:0", quick=quick)
    for case in cases:
        if case.index is not None:
            assert (case.index.ratio, case.index.top_k) == (case.attention.ratio, case.attention.top_k)
        else:
            assert case.attention.all_visible
            assert case.attention.top_k == case.context // case.attention.ratio
        assert attend_cases.STRIDE * case.sequences < case.context
    if quick:
        assert [case.attention.heads for case in cases if case.index is None] == [16]
    else:
        assert [(case.name, case.sequences) for case in cases] == [
            ("V4-Flash H=64 S=65536", 32), ("V3.2 H=16 S=65536", 32), ("V4-HCA H=16 S=262144", 32),
            ("V3.2 H=128 S=65536", 32), ("V4-HCA H=64 S=262144", 32), ("V3.2 H=8 S=262144", 1),
        ]  # fmt: skip
