"""The whole service on a CUDA device: the demo's answers, a killed worker, and the memory it says it takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import streamindex_client
import torch

from streamindex_service.testing.service import RunningService

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20
KEYS, ROWS, HEADS, HEAD_DIM, TOP_K = 20_000, 3_000, 64, 128, 512


@pytest.mark.parametrize("key_format", ["bf16", "fp8_e4m3"])
def test_the_demo_is_answered_by_the_kernels(key_format):
    arguments = ["--synthetic", "--keys", "20000", "--queries", "1500", "--key-format", key_format, "--json"]
    command = [sys.executable, "-m", "streamindex_service", "demo", "--device", "cuda:0", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["implementation"] == "triton"
    assert (result["wrong_rows"], result["checked_rows"]) == (0, 1500)
    assert 0 < result["peak_device_bytes"] <= result["budget_bytes"]


def _bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def test_a_worker_killed_in_mid_search_costs_no_key_and_no_answer():
    random = np.random.default_rng(3)
    k, q = (_bf16(random.integers(-2, 3, shape)) for shape in ((KEYS, HEAD_DIM), (ROWS, HEADS, HEAD_DIM)))
    w = random.integers(-2, 3, (ROWS, HEADS)).astype(np.float32)
    settings = {"worker": {"device": "cuda:0"}, "memory": {"device_budget_bytes": 1024 * MIB}}
    with RunningService(settings) as service, streamindex_client.connect(service.address) as client:
        cache = client.create_key_cache(heads=HEADS, head_dim=HEAD_DIM, ratio=1, key_format="bf16", layers=1)
        cache.append(layer=0, keys=k)

        def search() -> np.ndarray:
            parts = cache.search(layer=0, q=q, w=w, top_k=TOP_K, start_position=KEYS - ROWS)
            return np.concatenate([part.indices for part in parts])

        undisturbed = search()
        (worker,) = service.worker_pids()
        killed = threading.Event()

        def queries():
            for start in range(0, ROWS, 100):
                if start == 1500:
                    os.kill(worker, signal.SIGKILL)
                    killed.set()
                yield q[start : start + 100], w[start : start + 100]

        parts = list(cache.search(layer=0, q=queries(), w=None, top_k=TOP_K, start_position=KEYS - ROWS))
        assert killed.is_set()
        assert np.array_equal(np.concatenate([part.indices for part in parts]), undisturbed)
        load = client.load()
        assert load.worker_restarts == 1
        assert service.worker_pids() != [worker]
        assert 0 < load.device_peak_bytes <= 1024 * MIB
        assert np.array_equal(search(), undisturbed)
