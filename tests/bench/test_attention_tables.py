"""Every table of sparse attention, run as its command is, at sizes for a CPU."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import attention, attention_backward, attention_decode, attention_pages, attention_prefill
from benchmarks.attention import MODELS, AttentionModel, make_attention
from streamindex_service.ops import KvFormat
from streamindex_service.ops.cached_attention.places import Places

TINY = AttentionModel("Tiny", 4, 64, 64, ratio=4, top_k=24, window=16, packed=KvFormat.FP8_D512)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, TINY.name, TINY)


def _run(main: Callable[[list[str] | None], int], out: Path, *options: str) -> list[dict[str, Any]]:
    common = ["--device", "cpu", "--implementations", "chunked", "reference", "--quick"]
    assert main([*common, *options, "--out", str(out / "table.json")]) == 0
    rows: list[dict[str, Any]] = json.loads((out / "table.json").read_text())["rows"]
    assert rows
    assert all(row["wrong_rows"] == 0 for row in rows)
    return rows


def test_prefill(tmp_path: Path) -> None:
    rows = _run(
        attention_prefill.main, tmp_path, "--models", "Tiny", "--sizes", "20", "300", "--formats", "bf16"
    )  # fmt: skip
    found = {(row["tokens"], row["implementation"]): row for row in rows}
    assert set(found) == {(tokens, name) for tokens in (20, 300) for name in ("chunked", "reference")}
    assert found[300, "reference"]["ratio_to"] == "chunked bf16"
    assert found[300, "chunked"]["checked_rows"] == 64
    # a token's window, and the compressed rows it sees
    flop = found[20, "chunked"]["useful_tflops"] * found[20, "chunked"]["seconds"] * 1e12
    assert flop == pytest.approx(2 * 4 * 128 * 20 * 40)


def test_index_rows_name_what_a_token_sees() -> None:
    made = make_attention(TINY, 40, 40, KvFormat.BF16, "cpu")
    window, chosen = made.indices[:, :16], made.indices[:, 16:]
    assert window[0].tolist() == [*range(-15, 1)]
    assert window[39].tolist() == [*range(24, 40)]
    for token in range(3, 40):
        assert 40 <= int(chosen[token].min()) <= int(chosen[token].max()) < 40 + (token + 1) // 4


def test_a_wrong_output_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.sparse_attention

    def wrong(*arguments: Any, out: Tensor, **options: Any) -> Any:
        result = right(*arguments, out=out, **options)
        out[0, 0, 0] += 1.0
        return result

    monkeypatch.setattr(attention, "sparse_attention", wrong)
    options = ["--device", "cpu", "--models", "Tiny", "--sizes", "20", "--formats", "bf16", "--implementations"]
    out = tmp_path / "table.json"
    assert attention_prefill.main([*options, "chunked", "--quick", "--out", str(out)]) == 1
    assert not out.exists()


def test_a_time_without_a_judgement_is_no_row() -> None:
    made = make_attention(TINY, 4, 40, KvFormat.BF16, "cpu")
    checked, wrong, error = attention.judge_attention(made, torch.full((4, 4, 64), torch.nan).bfloat16())
    assert (checked, wrong, error) == (4, 4, torch.inf)
    row = attention.AttentionRow("t", "c", "bf16", None, None, None, None, None, None, None)
    with pytest.raises(ValueError, match="no judgement"):
        replace(row, seconds=1.0)


def _backward(out: Path) -> int:
    options = ["--device", "cpu", "--models", "Tiny", "--sizes", "6", "--implementations", "reference", "triton"]
    return attention_backward.main([*options, "--quick", "--out", str(out)])


def test_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backward, "CPU_CONTEXT", 40)
    out = tmp_path / "table.json"
    assert _backward(out) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["reference", "triton"]
    assert rows[1]["ratio_to"] == "reference"
    for row in rows:
        assert row["wrong_rows"] == 0
        assert 0 < max(row["dq_error"], row["dkv_error"], row["dsink_error"]) <= 1
        # five products of 64 columns for each entry of 6 tokens
        assert row["useful_tflops"] * row["seconds"] * 1e12 == pytest.approx(2 * 4 * 5 * 64 * 6 * 40)


def test_wrong_gradients_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_backward.sparse_attention_backward

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = right(*arguments, **options)
        found.dkv[3] += 1.0
        return found

    monkeypatch.setattr(attention_backward, "CPU_CONTEXT", 40)
    monkeypatch.setattr(attention_backward, "sparse_attention_backward", wrong)
    assert _backward(tmp_path / "table.json") == 1
    assert not (tmp_path / "table.json").exists()


def test_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_decode, "CPU_CONTEXT", 200)
    rows = _run(
        attention_decode.main, tmp_path, "--models", "Tiny", "--sizes", "1", "3", "--formats", "bf16",
        "--tokens-per-sequence", "1", "2",
    )  # fmt: skip
    found = {(row["sequences"], row["tokens"], row["implementation"]): row for row in rows}
    assert set(found) == {
        (count, count * each, name) for count in (1, 3) for each in (1, 2) for name in ("chunked", "reference")
    }
    row = found[3, 6, "reference"]
    assert row["ratio_to"] == "chunked bf16"
    assert row["checked_rows"] == 12  # both steps
    assert row["call_s"] > 0
    # six tokens of 40 entries, of 128 bytes and 4 · 2 · 128 FLOP each
    assert row["gathered_bytes_s"] * row["seconds"] == pytest.approx(6 * 40 * 128)
    assert row["useful_tflops"] * row["seconds"] * 1e12 == pytest.approx(6 * 40 * 1024)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_rows_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention_decode, attention_pages):
        monkeypatch.setattr(module, "CPU_CONTEXT", 300)  # ragged pages
    monkeypatch.setattr(attention_pages, "HEADS", (2, None))
    out = tmp_path / "table.json"
    options = ["--device", "cpu", "--models", "Tiny", "--formats", "bf16", "--quick", "--out", str(out)]
    assert attention_pages.main(options) == 0
    rows = json.loads(out.read_text())["rows"]
    assert all(row["wrong_rows"] == 0 for row in rows)
    assert {(row["shape"], row["heads"], row["implementation"]) for row in rows} == {
        (shape, 4, way) for shape in ("decode", "prefill") for way in attention_pages.WAYS
    }
    assert all(row["ratio"] == 1.0 for row in rows if row["implementation"] == "copied")
    assert all(row["call_s"] > 0 for row in rows if row["implementation"] == "pages")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_rows_read_elsewhere_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Places.entries
    monkeypatch.setattr(attention_pages, "CPU_CONTEXT", 300)
    monkeypatch.setattr(attention_decode, "CPU_CONTEXT", 300)
    monkeypatch.setattr(attention_pages, "HEADS", (None,))
    monkeypatch.setattr(Places, "entries", lambda self, indices, width: right(self, indices.flip(0), width))
    out = tmp_path / "table.json"
    options = ["--device", "cpu", "--models", "Tiny", "--formats", "bf16", "--quick", "--out", str(out)]
    assert attention_pages.main(options) == 1
    assert not out.exists()


def test_decode_with_a_part_of_the_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_decode, "CPU_CONTEXT", 200)
    rows = _run(
        attention_decode.main, tmp_path, "--models", "Tiny", "--sizes", "2", "--formats", "bf16",
        "--tokens-per-sequence", "1", "--implementations", "chunked", "--heads", "1", str(TINY.heads),
    )  # fmt: skip
    few, all_of_them = rows
    assert (few["heads"], all_of_them["heads"]) == (1, TINY.heads)
    assert few["case"].startswith("Tiny 1 heads 2 × 1 ")
    assert all_of_them["case"].startswith("Tiny 2 × 1 ")
    # as many operations as the heads it has
    assert few["useful_tflops"] * few["seconds"] * TINY.heads == pytest.approx(
        all_of_them["useful_tflops"] * all_of_them["seconds"], rel=1e-6
    )


def test_sequences_attend_rows_of_their_own() -> None:
    decode = attention_decode.make_decode(TINY, 3, 2, 200, KvFormat.BF16, "cpu")
    assert decode.whole.kv.rows == 3 * 250
    for token, row in enumerate(decode.whole.indices.view(2, 3, 2, 40).reshape(-1, 40)):
        sequence = token // 2 % 3
        window, chosen = row[:16] - 250 * sequence, row[16:] - 250 * sequence
        last = int(window[-1])
        assert window.tolist() == [*range(last - 15, last + 1)]
        assert 100 <= last < 200
        assert 200 <= int(chosen.min()) <= int(chosen.max()) < 200 + (last + 1) // 4
    tokens = decode.whole.indices.view(2, 3, 2, 40)[..., 15]
    assert (tokens[..., 1] - tokens[..., 0] == 1).all()


def test_where_all_rows_are_visible_each_step_has_sequences_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_decode, "CONTEXT", 50)  # of 400 tokens only so many are there for windows
    model = replace(TINY, ratio=8, top_k=50, all_visible=True)
    decode = attention_decode.make_decode(model, 3, 2, 400, KvFormat.BF16, "cpu")
    assert decode.whole.kv.rows == 2 * 3 * (50 + 50)
    for token, row in enumerate(decode.whole.indices.view(2, 3, 2, 66).reshape(-1, 66)):
        cache = token // 2
        window, visible = row[:16] - 100 * cache, row[16:]
        assert window.tolist() == [*range(int(window[0]), int(window[0]) + 16)]
        assert 0 <= int(window[0]) <= 34
        count = int((visible >= 0).sum())
        assert 394 // 8 <= count <= 50
        assert visible[:count].tolist() == [*range(100 * cache + 50, 100 * cache + 50 + count)]
        assert (visible[count:] == -1).all()


def test_decode_of_all_visible_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_decode, "V4_HCA", replace(TINY, name="V4-HCA", all_visible=True))
    monkeypatch.setattr(attention_decode, "CPU_CONTEXT", 64)
    rows = _run(
        attention_decode.main, tmp_path, "--models", "V4-HCA", "--sizes", "2", "--formats", "bf16", "--heads", "2",
    )  # fmt: skip
    assert {row["model"] for row in rows} == {"V4-HCA"}
    # two tokens, the 64th of their sequences: 16 rows of ratio 4, and a window of 16, of 128 bytes each
    assert rows[0]["gathered_bytes_s"] * rows[0]["seconds"] == pytest.approx(2 * 32 * 128)


def test_a_wrong_step_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_decode.Decode.run_step

    def wrong(decode: attention_decode.Decode, number: int, implementation: str, out: Tensor) -> None:
        right(decode, 0, implementation, out)  # the last step is left out

    monkeypatch.setattr(attention_decode, "CPU_CONTEXT", 200)
    monkeypatch.setattr(attention_decode.Decode, "run_step", wrong)
    options = ["--device", "cpu", "--models", "Tiny", "--sizes", "2", "--formats", "bf16", "--implementations"]
    out = tmp_path / "table.json"
    assert attention_decode.main([*options, "chunked", "--quick", "--out", str(out)]) == 1
    assert not out.exists()
