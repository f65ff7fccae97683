"""What a plan says it takes, against what the allocator says it took."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import streamindex_client
import torch

from streamindex_service.core.meter import LARGE_BYTES
from streamindex_service.ops import KeyFormat, PagedKeys
from streamindex_service.ops.topk import KeySequence, Order, plan_for, topk, topk_sequences
from streamindex_service.testing.service import RunningService
from streamindex_service.worker.device import probe
from streamindex_service.worker.memory import MemoryWatch
from tests.support.estimates import LEAST_RATIO, Work, load_of, ratios

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20
DEVICE = "cuda:0"
TRIES = 30  # steps until the service has seen how fast they are, and takes them whole

# format, heads, top_k, order, rows, keys, workspace in MiB
PLANS = [
    *itertools.product(("bf16", "fp8_e4m3"), (64,), (512, 2048), tuple(Order), (112,), (262_144,), (64, 256)),
    ("fp16", 32, 1, Order.SCORE, 300, 131_072, 128),
    ("fp32", 4, 512, Order.INDEX, 64, 70_001, 64),
    ("bf16", 64, 4096, Order.SCORE, 16, 1_000_000, 256),
    ("bf16", 128, 1024, Order.SCORE, 1000, 30_000, 1024),
    ("bf16", 64, 512, Order.SCORE, 4096, 1_800, 64),  # too few keys for a filter
    ("bf16", 64, 512, Order.SCORE, 1, 262_144, 16),
    ("bf16", 64, 512, Order.INDEX, 1, 300, 16),
]


def _inputs(name: str, heads: int, rows: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, PagedKeys]:
    key_format, generator = KeyFormat(name), torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator)

    scales = random(keys).abs() if key_format.has_scales else None
    k = PagedKeys.from_contiguous(random(keys, 128).to(key_format.torch_dtype), scales)
    return random(rows, heads, 128).to(key_format.torch_dtype), random(rows, heads), k


@pytest.mark.parametrize("implementation", ["triton", "chunked"])
@pytest.mark.parametrize(("name", "heads", "top_k", "order", "rows", "keys", "workspace_mib"), PLANS)
def test_a_plan_takes_what_it_says(implementation, name, heads, top_k, order, rows, keys, workspace_mib):
    q, w, k = _inputs(name, heads, rows, keys)
    out = torch.empty((rows, top_k), dtype=torch.int32, device=DEVICE)
    plan = plan_for(
        implementation, DEVICE, k.format, rows=rows, heads=heads, head_dim=128, keys=keys, top_k=top_k,
        workspace_bytes=workspace_mib * MIB,
    )  # fmt: skip
    assert plan is not None
    watch, work = MemoryWatch(probe(DEVICE)), Work()
    for _ in range(2):  # the first compiles, and makes the page table
        with watch.peak_of(work):
            topk(
                q, w, k, keys - 1, ratio=1, top_k=top_k, order=order, implementation=implementation,
                workspace_bytes=workspace_mib * MIB, out_indices=out,
            )  # fmt: skip
        torch.cuda.synchronize()
    ratio = work.peak_bytes / plan.workspace_bytes
    assert ratio <= 1.0, f"{work.peak_bytes} bytes, planned were {plan.workspace_bytes}"
    if plan.workspace_bytes >= LARGE_BYTES and implementation == "triton":
        assert ratio >= LEAST_RATIO, f"{work.peak_bytes} bytes, planned were {plan.workspace_bytes}"


@pytest.mark.parametrize("name", ["bf16", "fp8_e4m3"])
@pytest.mark.parametrize(("lengths", "rows", "workspace_mib"), [
    ([262_144] + [4096] * 100, 1, 256),  # a plan is for rows that see as many keys as the one that sees most
    ([65_536, 70_001, 300, 9000] * 16, 3, 256),
    ([262_144] * 4, 40, 64),  # in several chunks
])  # fmt: skip
def test_a_run_over_several_sequences_takes_what_its_plan_says(name, lengths, rows, workspace_mib):
    layers = {length: _inputs(name, 64, 1, length)[2] for length in set(lengths)}
    sequences = [KeySequence(rows, layers[length]) for length in lengths]
    count, generator = rows * len(lengths), torch.Generator(DEVICE).manual_seed(1)
    q = torch.randn((count, 64, 128), device=DEVICE, generator=generator).to(KeyFormat(name).torch_dtype)
    w = torch.randn((count, 64), device=DEVICE, generator=generator)
    positions = torch.cat([torch.arange(length - rows, length) for length in lengths])
    out = torch.empty((count, 512), dtype=torch.int32, device=DEVICE)
    plan = plan_for(
        "triton", DEVICE, KeyFormat(name), rows=count, heads=64, head_dim=128, keys=max(lengths), top_k=512,
        workspace_bytes=workspace_mib * MIB,
    )  # fmt: skip
    assert plan is not None
    watch, work = MemoryWatch(probe(DEVICE)), Work()
    for _ in range(2):  # the first compiles, and makes the page tables
        with watch.peak_of(work):
            topk_sequences(
                q, w, sequences, positions, ratio=1, top_k=512, implementation="triton",
                workspace_bytes=workspace_mib * MIB, out_indices=out,
            )  # fmt: skip
        torch.cuda.synchronize()
    ratio = work.peak_bytes / plan.workspace_bytes
    assert LEAST_RATIO * (plan.workspace_bytes >= LARGE_BYTES) <= ratio <= 1.0, f"{work.peak_bytes} of {plan}"


@pytest.mark.parametrize("workspace_mib", [64, 256])
@pytest.mark.parametrize("budget_mib", [256, 4096])  # in the smaller the layer passes in windows
def test_tiles_take_what_the_governor_reserves(workspace_mib, budget_mib):
    """The ratio that the service itself tells, over searches with and without scores, prefill and decode."""
    random = np.random.default_rng(0)
    keys, rows, heads = 1_000_000, 600, 64

    def bf16(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)

    settings = {
        "worker": {"device": DEVICE},
        "memory": {
            "device_budget_bytes": budget_mib * MIB,
            "host_budget_bytes": 1024 * MIB,
            "workspace_bytes": workspace_mib * MIB,
        },
    }
    q, w = bf16(rows, heads, 128), random.standard_normal((rows, heads)).astype(np.float32)
    with RunningService(settings) as service, streamindex_client.connect(service.address) as client:
        cache = client.create_key_cache(heads=heads, head_dim=128, ratio=1, key_format="bf16", layers=1)
        cache.append(layer=0, keys=bf16(keys, 128))
        for start, top_k, order, want_scores in (
            (0, 512, "score", False),
            (keys - rows, 512, "score", True),
            (keys - rows, 2048, "index", False),
        ):
            for _ in cache.search(
                layer=0, q=q, w=w, top_k=top_k, start_position=start, order=order, want_scores=want_scores
            ):
                pass
        item = streamindex_client.BatchItem(cache, 0, q[:1], w[:1], start_position=keys - 1)
        assert client.search_batch([item], top_k=512)[0].error is None
        load = load_of(service)
    memory = load.device.memory
    assert 0.0 < memory.most_ratio_of_any <= 1.0, memory
    # In 256 MiB a tile is large now and then: when no window but its own is there.
    assert memory.large_tiles > 0 or budget_mib == 256
    if memory.large_tiles:
        assert memory.least_ratio >= LEAST_RATIO, memory
    assert memory.failures == 0
    assert load.worker_restarts == 0


@pytest.mark.parametrize("key_format", ["bf16", "fp8_e4m3"])
def test_tiles_over_several_caches_take_what_the_governor_reserves(key_format):
    """A decode step: one long sequence, by which the workspace goes, and many short ones, as many together as a group
    has members; with scores and without."""
    random = np.random.default_rng(0)
    heads, lengths = 64, [262_144] + [300 + 65 * number for number in range(63)]
    dtype = KeyFormat(key_format).torch_dtype
    settings = {
        "worker": {"device": DEVICE},
        "memory": {"device_budget_bytes": 2048 * MIB, "host_budget_bytes": 1024 * MIB},
    }

    def rows_of(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape, dtype=np.float32)).to(dtype)

    with RunningService(settings) as service, streamindex_client.connect(service.address) as client:
        items = []
        for length in lengths:
            cache = client.create_key_cache(heads=heads, head_dim=128, ratio=1, key_format=key_format, layers=1)
            scales = {"scales": torch.rand(length)} if KeyFormat(key_format).has_scales else {}
            cache.append(layer=0, keys=rows_of(length, 128), **scales)
            w = random.standard_normal((1, heads)).astype(np.float32)
            q = rows_of(1, heads, 128)
            items.append(streamindex_client.BatchItem(cache, 0, q, w, start_position=length - 1))
        for attempt in range(TRIES):
            before = load_of(service).device
            for result in client.search_batch(items, top_k=512, want_scores=attempt % 2 == 1):
                assert result.error is None
            after = load_of(service).device
            together = after.tiles_done - before.tiles_done == 1
            if together and after.memory.large_tiles > 1:
                break
        memory = ratios(service)
    assert together, "the step never was one tile"
    assert 0.0 < memory.most_ratio_of_any <= 1.0, memory
    assert memory.large_tiles > 0
    assert memory.least_ratio >= LEAST_RATIO, memory
    assert memory.failures == 0
