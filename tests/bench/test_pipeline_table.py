"""The table of the whole pipeline, run as its command is, at sizes for a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import attention, csa_pipeline, harness, pipeline
from benchmarks.attention import AttentionModel
from benchmarks.harness import Model
from streamindex_service.ops import KeyFormat, KvFormat
from streamindex_service.ops.topk import reference

INDEX = Model("Tiny", heads=4, head_dim=64, ratio=4, top_k=24)
ATTENTION = AttentionModel("Tiny", 4, 64, 64, ratio=4, top_k=24, window=16, packed=KvFormat.FP8_D512)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(harness.MODELS, INDEX.name, INDEX)
    monkeypatch.setitem(attention.MODELS, ATTENTION.name, ATTENTION)


def _run(out: Path, *options: str) -> int:
    return csa_pipeline.main(["--device", "cpu", "--models", "Tiny", "--quick", *options, "--out", str(out)])


def _rows(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


def test_every_way_in_every_format(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    assert _run(out, "--sizes", "90", "--chunk", "50", "--streams", "1") == 0
    found = {(row["implementation"], row["dtype"]): row for row in _rows(out)}
    assert list(found) == [
        ("materialised", "bf16"), ("chunked", "bf16"), ("triton", "bf16"), ("triton", "fp8_e4m3"),
    ]  # fmt: skip
    for row in found.values():
        assert (row["wrong_rows"], row["checked_rows"], row["recall"]) == (0, 64, 1.0)
        assert row["checked_entries"] > 24
        assert 0 < row["largest_error"] <= 1
        stages = [row[f"{name.replace(' ', '_')}_s"] for name in pipeline.STAGES]
        assert min(stages) > 0
    assert found["triton", "fp8_e4m3"]["ratio_to"] == "materialised bf16"
    assert found["triton", "bf16"]["chunk"] == 50
    # every pair that is seen, and every entry that names a row
    seen = [(token + 1) // 4 for token in range(90)]
    entries = sum(min(token + 1, 16) for token in range(90)) + sum(min(each, 24) for each in seen)
    row = found["triton", "bf16"]
    assert row["useful_tflops"] * row["seconds"] * 1e12 == pytest.approx(512 * sum(seen) + 1024 * entries)


def test_what_has_no_memory_is_a_row_without_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.MAX_PRODUCT_BYTES, "cpu", 1)
    out = tmp_path / "table.json"
    ways = ["--implementations", "materialised", "chunked"]
    assert _run(out, "--sizes", "40", "80", "--formats", "bf16", "--chunked-most", "40", *ways) == 0
    rows = _rows(out)
    assert [(row["tokens"], row["implementation"], row["seconds"] is None) for row in rows] == [
        (40, "materialised", True), (40, "chunked", False), (80, "materialised", True),
    ]  # fmt: skip
    assert "bound" in rows[0]["note"]
    assert rows[1]["ratio"] is None


@pytest.mark.parametrize("part", ["search", "attention", "rows", "keys"])
def test_what_is_wrong_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    right = pipeline.run_layer

    def wrong(layer: Any, way: Any, out: Tensor, **options: Any) -> None:
        right(layer, way, out, **options)
        if part == "attention":
            out[-1, 0, 0] += 1.0
        elif part == "rows":
            layer.rows[-1] += 1.0
        elif part == "keys":
            layer.keys[-1] += 1.0

    monkeypatch.setattr(csa_pipeline, "run_layer", wrong)
    if part == "search":
        monkeypatch.setattr(pipeline, "run_topk", lambda prefill, name, out, **options: out.fill_(0))
    out = tmp_path / "table.json"
    assert _run(out, "--sizes", "60", "--implementations", "chunked", "--formats", "bf16") == 1
    assert not out.exists()


def test_chunks_change_nothing() -> None:
    layer = pipeline.make_layer(INDEX, ATTENTION, 66, KeyFormat.BF16, "cpu")
    outs = []
    for chunk in (66, 25):
        outs.append(torch.full((66, 4, 64), torch.nan, dtype=torch.bfloat16))
        pipeline.run_layer(layer, pipeline.product_way(66, overlapped=False, chunk=chunk), outs[-1])
    assert torch.equal(*outs)


def test_what_overlaps_is_several_chunks_within_bounds() -> None:
    assert [pipeline.product_way(tokens, overlapped=True).chunk for tokens in (1000, 8192, 32_768, 262_144)] == [
        1000, 2048, 8192, 16_384,
    ]  # fmt: skip
