"""Every table of the topk operation, run as its command is, at sizes for a CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import benchmarks.__main__ as runner
from benchmarks import topk_ablations, topk_decode, topk_design, topk_parity, topk_real_data, topk_scaling
from benchmarks.harness import Model
from streamindex_service.ops.topk import reference

pytestmark = pytest.mark.usefixtures("tiny")
Main = Callable[[list[str] | None], int]
CPU = ["--device", "cpu", "--implementations", "chunked", "reference"]


def _run(main: Main, out: Path, *options: str) -> list[dict[str, Any]]:
    assert main([*CPU, *options, "--quick", "--out", str(out / "table.json")]) == 0
    rows: list[dict[str, Any]] = json.loads((out / "table.json").read_text())["rows"]
    assert rows
    assert all(row["wrong_rows"] == 0 for row in rows if row["exact"] and row["seconds"] is not None)
    return rows


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.MAX_PRODUCT_BYTES, "cpu", 4 * 900 * 450 * 4)
    rows = _run(
        topk_scaling.main, tmp_path, "--models", "Tiny", "--sizes", "300", "900", "1300", "--chunked-most", "900"
    )
    found = {(row["tokens"], row["implementation"]): row for row in rows}
    assert set(found) == {(300, "chunked"), (900, "chunked"), *((size, "reference") for size in (300, 900, 1300))}
    assert found[900, "reference"]["ratio_to"] == "chunked bf16"
    assert found[1300, "reference"]["seconds"] is None
    assert "bound" in found[1300, "reference"]["note"]
    assert all(row["recall"] == 1.0 for row in rows if row["seconds"] is not None)


def test_decode(tmp_path: Path) -> None:
    rows = _run(topk_decode.main, tmp_path, "--models", "Tiny", "--sizes", "1", "3", "--keys", "300")
    assert len(rows) == 2 * 2 * 2 * 2 * 2
    assert all(row["recall"] == 1.0 and row["checked_rows"] == row["tokens"] for row in rows)
    together = [row for row in rows if row["case"].endswith("together")]
    assert {row["ratio_to"] for row in together} == {"chunked apart", "reference apart"}
    row = next(row for row in together if row["dtype"] == "fp8_e4m3" and row["tokens"] == row["sequences"] == 3)
    # of sequences of 300, 250 and 200 keys, each of 32 bytes and a scale
    assert row["key_bytes_s"] * row["seconds"] == pytest.approx(750 * 36)


def test_scaling_tries_each_tiling_once(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.inputs import make_prefill
    from benchmarks.searches import Bench
    from streamindex_service.ops import KeyFormat

    tried: list[tuple[int, int]] = []
    search = topk_scaling.chunked_search

    def spy(chunk: int, tile: int) -> Any:
        tried.append((chunk, tile))
        return search(chunk, tile)

    monkeypatch.setattr(topk_scaling, "chunked_search", spy)
    bench = Bench("t", "cpu", None)  # type: ignore[arg-type]
    chunked = topk_scaling.Chunked(bench, 1000, [(16, 256), (64, 256), (64, 8192)], tune_once=True)
    assert chunked.fastest(make_prefill(tiny, 300, KeyFormat.BF16, "cpu")) in [(16, 256), (64, 256)]
    assert tried == [(16, 256), (64, 256)]


def test_design_is_exact_everywhere(tmp_path: Path) -> None:
    tiles = ("--query-chunks", "7", "300", "--key-tiles", "256", "512", "--top-ks", "5", "64")
    rows = _run(
        topk_design.main, tmp_path, "--models", "Tiny", "--sizes", "1300", *tiles, "--implementations", "chunked"
    )
    cells = {(row["query_chunk"], row["key_tile"], row["top_k"]) for row in rows}
    assert cells == {(chunk, tile, top_k) for chunk in (7, 300) for tile in (256, 512) for top_k in (5, 64)}
    assert {row["recall"] for row in rows} == {1.0}


def test_ablations_say_what_they_cost(tmp_path: Path) -> None:
    rows = _run(topk_ablations.main, tmp_path, "--models", "Tiny", "--sizes", "2100", "--query-chunk", "500")
    for dtype in ("bf16", "fp8_e4m3"):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        by_part = {
            part: [row for row in of_dtype if row["left_out"] == part] for part in ("", "merge", "tile skipping")
        }
        halves = [row for row in of_dtype if row["left_out"] == "float32 accumulation"]
        assert [row["recall"] for row in (*by_part[""], *by_part["tile skipping"])] == [1.0, 1.0]
        assert len(by_part["merge"]) == len(halves) == 2
        for row in by_part["merge"]:
            assert not row["exact"]
            assert row["wrong_rows"] > 20
            assert 0.5 < row["recall"] < 0.95
        for row in halves:
            assert not row["exact"]
            assert 0.9 < row["recall"] <= 1.0
        assert halves[0]["wrong_rows"] > 0  # bfloat16
        assert all(row["ratio_to"] == f"chunked {dtype}" for row in of_dtype if row["left_out"])


def test_parity(tmp_path: Path) -> None:
    rows = _run(
        topk_parity.main, tmp_path, "--models", "Tiny", "--sizes", "33", "301", "--formats", "bf16", "fp32", "fp8_e4m3"
    )
    assert {(row["dtype"], row["tokens"]) for row in rows} == {
        (dtype, size) for dtype in ("bf16", "fp32", "fp8_e4m3") for size in (33, 301)
    }
    assert all(row["checked_rows"] == row["tokens"] for row in rows)


def test_parity_notices_one_swapped_tie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = topk_parity.run_topk

    def swapped(prefill: Any, implementation: str, out: torch.Tensor, **named: Any) -> None:
        run(prefill, implementation, out, **named)
        if implementation == "chunked":
            out[-1, :2] = out[-1, :2].flip(0)

    monkeypatch.setattr(topk_parity, "run_topk", swapped)
    out = tmp_path / "table.json"
    options = ["--device", "cpu", "--models", "Tiny", "--sizes", "301", "--formats", "bf16", "--out", str(out)]
    assert topk_parity.main([*options, "--implementations", "chunked"]) == 1
    assert not out.exists()


def test_parity_sizes_are_on_both_sides_of_top_k() -> None:
    for model in (Model("a", 1, 16, 4, 512), Model("b", 1, 16, 1, 2048)):
        few, more, filtered = (model.keys(size) for size in topk_parity.sizes_of(model))
        assert few < model.top_k < 2 * model.top_k <= more < 4 * model.top_k < filtered


def _data_set(folder: Path, *, raw: bool) -> Path:
    """2304 keys and 5 rows of 4 heads × 32, with queries or what makes them."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"k": draw(2304, 32).bfloat16(), "position": torch.tensor([0, 31, 700, 2000, 2303], dtype=torch.int32)}
    if raw:
        tensors |= {"x": draw(5, 24).bfloat16(), "w_q": draw(24, 128).bfloat16()}
        tensors |= {"w_w": draw(24, 4).bfloat16(), "b_w": draw(4)}
    else:
        tensors |= {"q": draw(5, 4, 32).bfloat16(), "w": draw(5, 4)}
    save_file(tensors, folder / "docs.safetensors")
    return folder / "docs.safetensors"


@pytest.mark.parametrize("raw", [True, False], ids=["weights", "queries"])
def test_real_data(tmp_path: Path, raw: bool) -> None:
    data = _data_set(tmp_path, raw=raw)
    rows = _run(
        topk_real_data.main,
        tmp_path,
        "--data",
        str(data),
        "--checked-rows",
        "5",
        "--formats",
        "bf16",
        "fp8_e4m3",
        "--top-ks",
        "32",
    )
    assert [row["dtype"] for row in rows] == ["bf16", "fp8_e4m3"]
    for row in rows:
        assert (row["model"], row["tokens"], row["checked_rows"], row["recall"]) == ("docs", 5, 5, 1.0)
        assert row["fallback_rows"] is None  # nothing is sampled by this implementation


def test_real_data_makes_queries_of_states(tmp_path: Path) -> None:
    tensors = topk_real_data.load(_data_set(tmp_path, raw=True))
    x, w_q, w_w, b_w = (tensors[name].double() for name in ("x", "w_q", "w_w", "b_w"))
    assert torch.allclose(tensors["q"].double(), (x @ w_q).view(5, 4, 32), rtol=2**-7)
    assert torch.allclose(tensors["w"].double(), (x @ w_w + b_w) / (128**0.5), rtol=1e-4, atol=1e-6)


def test_every_table_is_run_by_the_runner() -> None:
    files = {path.stem for path in Path(topk_scaling.__file__).parent.glob("topk_*.py")}
    assert files == {name for name in runner.BENCHMARKS if name.startswith("topk_")}


def test_the_runner_hands_on_the_data_set_to_one_table() -> None:
    import argparse

    arguments = argparse.Namespace(quick=True, data=Path("a.safetensors"))
    assert runner.options_of("topk_real_data", arguments) == ["--quick", "--data", "a.safetensors"]
    assert runner.options_of("topk_scaling", arguments) == ["--quick"]
