"""No worker is ready whose device answers wrongly, be it a search or attention."""

from __future__ import annotations

import pytest
import torch

from streamindex_service.ops.sparse_attention import IMPLEMENTATIONS, AttentionResult
from streamindex_service.ops.topk import TopkResult
from streamindex_service.worker import canary
from streamindex_service.worker.device import probe

CPU = probe("cpu")


def test_a_device_that_is_right_passes():
    canary.run(CPU, "chunked", "chunked")


@pytest.mark.parametrize("wrong", ["out", "lse", "one element", "another sequence's rows"])
def test_attention_that_is_wrong_is_found(monkeypatch, wrong):
    real = canary.attend_cached

    def attend(q, indices, positions, sequences, **others):
        if wrong == "another sequence's rows":
            sequences = [sequences[0], canary.CachedSequence(2, sequences[0].compressed, sequences[0].window_rows, 1)]
        out, lse = real(q, indices, positions, sequences, **others)
        if wrong == "out":
            out = out * 1.1
        elif wrong == "lse":
            lse = lse + 0.01
        elif wrong == "one element":
            out[2, 7, 63] += 1.0
        return AttentionResult(out, lse)

    monkeypatch.setattr(canary, "attend_cached", attend)
    with pytest.raises(RuntimeError, match="canary attention of chunked on cpu"):
        canary.run(CPU, "chunked", "chunked")


def test_a_search_that_is_wrong_is_found(monkeypatch):
    real = canary.topk_sequences

    def topk(*arguments, **others):
        result = real(*arguments, **others)
        if others["implementation"] == "chunked":
            result.indices[1, 0] = 4
        return TopkResult(result.indices, result.scores)

    monkeypatch.setattr(canary, "topk_sequences", topk)
    with pytest.raises(RuntimeError, match="canary search"):
        canary.run(CPU, "chunked", "chunked")


def test_attention_is_not_asked_where_the_device_does_not_have_it(monkeypatch):
    monkeypatch.setattr(canary, "attend_cached", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr(type(IMPLEMENTATIONS["chunked"]), "supports", lambda *_: False)
    canary.run(CPU, "chunked", "chunked")


def test_what_the_device_raises_is_passed_on(monkeypatch):
    def attend(*_, **__):
        raise torch.OutOfMemoryError("none")

    monkeypatch.setattr(canary, "attend_cached", attend)
    with pytest.raises(torch.OutOfMemoryError):
        canary.run(CPU, "chunked", "chunked")
