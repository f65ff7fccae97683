"""Tables and pictures are made of result files alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render, topk_ablations, topk_design
from benchmarks.tables import CONSOLE_COLUMNS, document, head, line

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h200"
HEADER = {"device": "a device", "commit": "abc", "roof_tflops_bf16": "700.0"}


def _row(**changes: Any) -> dict[str, Any]:
    row = {
        "table": "topk_scaling", "case": "V4-Flash S=1024 triton", "dtype": "bf16", "seconds": 0.5,
        "useful_tflops": 350.0, "roof_fraction": 0.5, "ratio": 2.0, "ratio_to": "chunked bf16",
        "peak_bytes": 3 << 20, "wrong_rows": 0, "repeats": 3, "note": "a note", "model": "V4-Flash", "tokens": 1024,
        "implementation": "triton", "top_k": 512, "query_chunk": None, "key_tile": None,
        "workspace_bytes": 256 << 20, "checked_rows": 64, "recall": 1.0, "left_out": "", "exact": True,
    }  # fmt: skip
    return row | changes


def _scaling() -> dict[str, Any]:
    rows = [_row(tokens=tokens, seconds=tokens / 1e4) for tokens in (1024, 2048, 4096)]
    lost = dict.fromkeys(("seconds", "useful_tflops", "roof_fraction", "ratio", "peak_bytes", "wrong_rows", "recall"))
    reference = _row(implementation="reference", workspace_bytes=None)
    return {"header": HEADER, "rows": [*rows, reference, reference | lost | {"tokens": 2048, "note": "out of memory"}]}


class TestTables:
    def test_a_row_has_every_figure(self) -> None:
        text = line(_row(), CONSOLE_COLUMNS)
        assert text.count("|") == head(CONSOLE_COLUMNS).splitlines()[0].count("|")
        for figure in ("V4-Flash S=1024 triton a note", "0.5", "350", "0.500", "2.00 × chunked bf16", "3", "0 of 64"):
            assert f"| {figure} |" in text

    def test_wrong_rows_of_an_ablation_say_that_they_are_its_result(self) -> None:
        assert "| 9 of 64 (no merge) |" in line(_row(wrong_rows=9, exact=False, left_out="merge"), CONSOLE_COLUMNS)
        assert "| 9 of 64 |" in line(_row(wrong_rows=9), CONSOLE_COLUMNS)

    def test_out_of_memory_has_dashes(self) -> None:
        text = document("a", _scaling())
        assert text.splitlines()[-1].count("—") == 7
        assert "out of memory" in text.splitlines()[-1]

    def test_empty_columns_are_left_out(self) -> None:
        text = document("a", {"header": HEADER, "rows": [_row(ratio=None, ratio_to=None)]}, ["a.svg"])
        assert "| ratio |" not in text
        assert "- commit: abc" in text
        assert "![a](a.svg)" in text

    def test_a_bar_in_a_note_breaks_no_table(self) -> None:
        assert r"a \| b" in line(_row(note="a | b"), CONSOLE_COLUMNS)


class TestRender:
    def test_every_committed_result_has_a_table(self, tmp_path: Path) -> None:
        files = [Path(shutil.copy(path, tmp_path)) for path in RESULTS.glob("*.json")]
        assert render.main([str(tmp_path), "--no-pictures"]) == 0
        for path in files:
            rows = json.loads(path.read_text())["rows"]
            table = path.with_suffix(".md").read_text()
            assert all(row["case"] in table for row in rows)

    def test_nothing_to_render_is_an_error(self, tmp_path: Path) -> None:
        assert render.main([str(tmp_path)]) == 1

    def test_tables_need_neither_torch_nor_matplotlib(self, tmp_path: Path) -> None:
        (tmp_path / "topk_scaling.json").write_text(json.dumps(_scaling()))
        script = (
            "import sys; from benchmarks import render; code = render.main([sys.argv[1], '--no-pictures']);"
            "sys.exit(code or bool({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=RESULTS.parents[2])
        assert (tmp_path / "topk_scaling.md").is_file()

    def test_runs_do_without_matplotlib(self) -> None:
        names = "benchmarks.topk_scaling, benchmarks.topk_ablations, benchmarks.topk_profile, benchmarks.__main__"
        script = f"import sys, {names}; sys.exit('matplotlib' in sys.modules)"
        subprocess.run([sys.executable, "-c", script], check=True, cwd=RESULTS.parents[2])


class TestPictures:
    def test_scaling_is_drawn_log_log(self, tmp_path: Path) -> None:
        from benchmarks.figures import pictures

        (figure,) = pictures("topk_scaling", _scaling()).values()
        time, memory = figure.axes
        assert [axes.get_xscale() for axes in (time, memory)] == ["log", "log"]
        assert [axes.get_yscale() for axes in (time, memory)] == ["log", "log"]
        labels = [text.get_text() for text in time.get_legend().get_texts()]
        assert labels == ["triton bf16", "reference bf16", "roof bf16, 700 TFLOP/s"]
        assert list(time.lines[0].get_xdata()) == [1024, 2048, 4096]
        assert [text.get_text() for text in time.texts] == ["out of memory"]

    def test_the_same_rows_give_the_same_file(self, tmp_path: Path) -> None:
        (tmp_path / "topk_scaling.json").write_text(json.dumps(_scaling()))
        written = []
        for _ in range(2):
            assert render.main([str(tmp_path)]) == 0
            written.append((tmp_path / "topk_scaling-V4-Flash.svg").read_bytes())
        assert written[0] == written[1]
        assert "topk_scaling-V4-Flash.svg" in (tmp_path / "topk_scaling.md").read_text()

    @pytest.mark.usefixtures("tiny")
    def test_other_tables_have_their_own_pictures(self, tmp_path: Path) -> None:
        shared = ["--device", "cpu", "--implementations", "chunked", "--models", "Tiny", "--sizes", "600", "--quick"]
        tiles = ["--query-chunks", "64", "--key-tiles", "256", "--top-ks", "4", "8"]
        assert topk_design.main([*shared, *tiles, "--out", str(tmp_path / "topk_design.json")]) == 0
        assert topk_ablations.main([*shared, "--out", str(tmp_path / "topk_ablations.json")]) == 0
        assert render.main([str(tmp_path)]) == 0
        names = {path.name for path in tmp_path.glob("*.svg")}
        assert names == {
            "topk_design-chunked-bf16.svg", "topk_ablations-bf16-600.svg", "topk_ablations-fp8_e4m3-600.svg"
        }  # fmt: skip

    def test_files_of_an_older_form_are_drawn_as_bars(self) -> None:
        from benchmarks.figures import pictures

        old = {"header": HEADER, "rows": [{key: value for key, value in _row().items() if key != "model"}]}
        (figure,) = pictures("topk_scaling", old).values()
        assert len(figure.axes[0].patches) == 1
