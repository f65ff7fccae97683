"""The compressor's table, run as its command is, at sizes for a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import compressor


def _run(out: Path, *options: str) -> int:
    common = ["--device", "cpu", "--implementations", "torch", "--layers", "CSA-indexer", "HCA", "--formats", "fp32"]
    return compressor.main([*common, "--sizes", "300", *options, "--out", str(out)])


def test_rows_are_judged_and_count_bytes(tmp_path: Path) -> None:
    assert _run(tmp_path / "table.json", "--implementations", "reference", "torch") == 0
    rows: list[dict[str, Any]] = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert all(row["wrong_rows"] == 0 for row in rows)
    found = {row["case"]: row for row in rows}
    assert len(found) == len(rows) == 8
    prompt = found["CSA-indexer T=300 torch"]
    # two inputs of 256 channels in float32, 75 entries of 128 in bf16
    assert prompt["bytes_s"] * prompt["seconds"] == pytest.approx(2 * 300 * 256 * 4 + 75 * 128 * 2)
    assert prompt["checked_rows"] >= 16
    assert prompt["ratio_to"] == "reference"
    assert found["HCA decode torch"]["tokens"] == 1


def test_a_wrong_entry_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = compressor.compress

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        out = right(*arguments, **options)
        out[-1:, 0] += 1.0
        return out

    monkeypatch.setattr(compressor, "compress", wrong)
    assert _run(tmp_path / "table.json") == 1
    assert not (tmp_path / "table.json").exists()


def test_parts_cover_both_ends() -> None:
    layer = compressor.LAYERS["CSA-indexer"]
    tokens = compressor.make_tokens(layer, 40, torch.float32, "cpu")
    out = torch.zeros((10, 128), dtype=torch.bfloat16)
    tokens.run("torch", out, compressor.CompressorState.empty(tokens.weights))
    assert compressor.judge(tokens, out)[1] == 0
    for entry in (0, 9):
        worse = out.clone()
        worse[entry] += 1.0
        assert compressor.judge(tokens, worse)[1] > 0
