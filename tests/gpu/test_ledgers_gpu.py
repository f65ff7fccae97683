"""The device ledger against the allocator of a CUDA device: extent by extent, beside nothing but tables of pages."""

from __future__ import annotations

import pytest
import streamindex_client
import torch

from streamindex_service.ops.kv_rows import KvFormat
from tests.support.attend_batch import Sequence
from tests.support.attention import Shape
from tests.support.calls import Calls
from tests.support.inprocess import InProcessServer
from tests.support.ledgers import OnDevice, churn
from tests.support.services import wait_for
from tests.support.tensors import FP8, FP16, Kind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20
SIZES = [1, 255, 257, 9001, 70_001, 200_000]
BF16_KEYS, FP16_KEYS = Kind(heads=64, head_dim=128), Kind(heads=32, head_dim=64, key_format=FP16, ratio=4)
FP8_KEYS = Kind(heads=64, head_dim=128, key_format=FP8, ratio=4)
# The allocator leaves up to so much of a block with whoever has it, kept for the next or in use; extents of 32 MiB are
# blocks as they are.
UNSPLIT_BYTES = MIB


@pytest.mark.parametrize(
    ("budget_mib", "extent_mib", "kinds", "unsplit_bytes"),
    [
        (4096, 32, [BF16_KEYS, FP16_KEYS], 0),
        (176, 8, [BF16_KEYS, FP8_KEYS], UNSPLIT_BYTES),  # some are evicted, and extents are as long as there is room
    ],
    ids=["all fit", "evicted"],
)
def test_the_ledger_is_what_the_allocator_says(budget_mib, extent_mib, kinds, unsplit_bytes):
    settings = {
        "worker": {"device": "cuda:0"},
        "server": {"sweep_s": 0.1},
        "memory": {
            "device_budget_bytes": budget_mib * MIB,
            "host_budget_bytes": 4096 * MIB,
            "extent_bytes": extent_mib * MIB,
            "workspace_bytes": 64 * MIB,
        },
    }
    told = []

    with InProcessServer(settings) as server, Calls(server.target) as calls:
        service = server.server.service
        base_bytes = calls.load().device_allocated_bytes

        def left_bytes() -> int:
            return unsplit_bytes * max(len(found.extents) for found, _, _ in told)

        def agrees() -> bool:
            found = server.run(lambda: OnDevice.of(service, kinds))
            load = calls.load()
            beside = load.device_allocated_bytes - base_bytes - found.reserved_bytes - found.table_bytes
            told.append((found, load.device_allocated_bytes, beside))
            assert found.reserved_bytes == sum(found.extents.values())
            return 0 <= beside <= left_bytes()

        def check() -> None:
            """The worker may not have got to the last messages."""
            try:
                wait_for(agrees)
            except AssertionError as error:
                found, allocated, beside = told[-1]
                raise AssertionError(
                    f"the allocator holds {allocated} bytes, {base_bytes} before any cache was there; the ledger has "
                    f"{found.reserved_bytes} in {len(found.extents)} extents, tables {found.table_bytes}: {beside} more"
                ) from error

        churn(calls, kinds, SIZES, check)
        assert any(found.pages for found, _, _ in told)
        assert (service.governor.residency.evicted_pages > 0) is (unsplit_bytes > 0)
        assert (told[-1][0].reserved_bytes, told[-1][0].extents) == (0, {})
        assert base_bytes <= told[-1][1] <= base_bytes + left_bytes()

        shape = Shape(KvFormat.BF16, 512, 512, heads=64, index_heads=64, index_dim=128)
        asked = {"top_k": 512, "window": 128, "scale": shape.scale}
        with streamindex_client.connect(server.target) as client:
            made = [Sequence(client, shape, 3000 + 700 * number, 2, number, **asked) for number in range(5)]
            for result in client.sparse_attend_batch([each.item() for each in made], **asked):
                assert result.error is None
            made[0].alone()
            check()
            assert told[-1][0].pages
            for each in made:
                each.cache.delete()
        check()
        assert base_bytes <= told[-1][1] <= base_bytes + left_bytes()
        assert service.hbm.peak_bytes <= service.hbm.limit_bytes
