"""Index rows at real sizes on a CUDA device: as the reference has them, beyond 32-bit offsets too."""

import pytest
import torch

from streamindex_service.ops.index_rows import assemble_index_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize(("window", "top_k"), [(128, 512), (128, 1024), (0, 2048), (128, 0), (3, 5)])
@pytest.mark.parametrize("explicit", [True, False], ids=["positions", "first"])
def test_equal_to_the_reference(window: int, top_k: int, explicit: bool) -> None:
    tokens, generator = 1001, torch.Generator("cuda").manual_seed(0)
    found = torch.randint(-300, 5000, (tokens, top_k), generator=generator, device="cuda", dtype=torch.int32).clamp(-1)
    positions = torch.randint(0, 10_000, (tokens,), generator=generator, device="cuda") if explicit else 37
    rows = [
        assemble_index_rows(
            found, positions, window=window, window_row=-50, compressed_row=20_000, implementation=implementation
        )
        for implementation in ("reference", "triton")
    ]
    assert torch.equal(*rows)


def test_a_row_0_for_each_token() -> None:
    tokens, generator = 501, torch.Generator("cuda").manual_seed(1)
    found = torch.randint(-300, 5000, (tokens, 512), generator=generator, device="cuda", dtype=torch.int32).clamp(-1)
    positions = torch.randint(0, 10_000, (tokens,), generator=generator, device="cuda")
    window_rows = torch.randint(-500, 10_000, (3, tokens), generator=generator, device="cuda")[1]  # not aligned
    rows = [
        assemble_index_rows(
            found, positions, window=128, window_row=window_rows, compressed_row=20_000, implementation=implementation
        )
        for implementation in ("reference", "triton")
    ]
    assert torch.equal(*rows)


def test_offsets_beyond_32_bits() -> None:
    tokens, top_k = 2**31 // 512 + 100, 512
    found = torch.full((tokens, top_k), 5, dtype=torch.int32, device="cuda")
    rows = assemble_index_rows(found, 0, window=16, compressed_row=7, implementation="triton")
    assert rows[-1].tolist() == [*range(tokens - 16, tokens), *[12] * top_k]
