"""Layers that take turns on a CUDA device, copied beside the tiles of others: the same bits as without any copy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import streamindex_client
import torch

from tests.support.inprocess import InProcessServer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20
KEYS, ROWS, HEADS, HEAD_DIM, TOP_K = 400_000, 600, 64, 128, 512  # a layer of 98 MiB
CACHES, TURNS = 4, 6


def _bf16(random: np.random.Generator, *shape: int) -> np.ndarray:
    return (random.standard_normal(shape, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)


def test_layers_that_do_not_fit_together_take_turns():
    """Four callers, four layers, room for two: every search finds its keys gone, and they come while others run."""
    random = np.random.default_rng(1)
    layers = [_bf16(random, KEYS, HEAD_DIM) for _ in range(CACHES)]
    q, w = _bf16(random, ROWS, HEADS, HEAD_DIM), random.standard_normal((ROWS, HEADS)).astype(np.float32)
    found: dict[int, list[bytes]] = {}
    evicted = {}
    for budget in (4096 * MIB, 288 * MIB):
        settings = {
            "worker": {"device": "cuda:0"},
            "memory": {"device_budget_bytes": budget, "host_budget_bytes": 2048 * MIB, "workspace_bytes": 64 * MIB},
        }
        with InProcessServer(settings) as server, streamindex_client.connect(server.target) as client:
            caches = [
                client.create_key_cache(heads=HEADS, head_dim=HEAD_DIM, ratio=1, key_format="bf16", layers=1)
                for _ in layers
            ]
            for cache, keys in zip(caches, layers, strict=True):
                cache.append(layer=0, keys=keys)

            def search(number: int, caches=caches) -> list[bytes]:
                parts = list(caches[number].search(layer=0, q=q, w=w, top_k=TOP_K, start_position=KEYS - ROWS))
                return [part.indices.tobytes() for part in parts]

            with ThreadPoolExecutor(CACHES) as pool:
                rounds = [list(pool.map(search, range(CACHES))) for _ in range(TURNS)]
            found[budget] = [b"".join(answer) for answers in rounds for answer in answers]
            residency = server.server.service.governor.residency
            evicted[budget] = residency.evicted_pages
            assert client.load().device_peak_bytes <= budget
    assert found[288 * MIB] == found[4096 * MIB]
    assert (evicted[4096 * MIB], evicted[288 * MIB] > 0) == (0, True)
