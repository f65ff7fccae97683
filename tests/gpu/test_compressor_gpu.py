"""The compressor at real sizes on a CUDA device: answers, chunkings, compilation, long sequences."""

import pytest
import torch

from streamindex_service.ops.compressor import CompressorState, check_compressed, compress
from tests.ops.compressor_cases import make_sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("ratio", "dim"), [(4, 128), (4, 512), (128, 512)])
def test_any_chunking_is_right_and_the_same(ratio: int, dim: int, dtype: torch.dtype, implementation: str) -> None:
    sequence = make_sequence(2100, ratio=ratio, dim=dim, dtype=dtype, amplitude=3.0, device="cuda")
    whole = sequence.whole(implementation)
    report = check_compressed(whole, sequence.kv, sequence.gate, sequence.weights)
    assert report.wrong_rows == 0, f"{report.wrong_rows} wrong, worst error {report.largest_error} of its bound"
    for sizes in ([1] * 140, [127, 1, 130, 1000], [5, 7, 11, 13] * 8):
        assert torch.equal(sequence.in_chunks(sizes, implementation), whole)


def test_no_length_and_no_position_compiles_anything_new() -> None:
    from streamindex_service.ops.compressor.triton import compiled_variants

    sequence = make_sequence(2100, ratio=4, dim=512, device="cuda")
    sequence.in_chunks([3, 64], "triton")
    warm = compiled_variants()
    assert warm > 0
    sequence.in_chunks([1, 16, 128, 77, 1024], "triton")
    assert compiled_variants() == warm


def test_more_than_two_to_the_31_elements() -> None:
    tokens = 2**31 // 1024 + 4000
    sequence = make_sequence(8, ratio=4, dim=512, device="cuda")
    kv = torch.empty((tokens, 1024), dtype=torch.bfloat16, device="cuda").normal_()
    gate = torch.empty((tokens, 1024), dtype=torch.bfloat16, device="cuda").normal_()
    state = CompressorState.empty(sequence.weights)
    out = compress(kv, gate, sequence.weights, 0, state, implementation="triton")
    # the last tokens once more, from where a state would stand
    start = tokens - 400
    state.oldest, state.end = start - 8, start
    rows = torch.arange(start - 8, start, device="cuda") % state.capacity
    state.kv[rows] = kv[start - 8 : start].float()
    state.gate[rows] = gate[start - 8 : start].float() + sequence.weights.ape.repeat(2, 1)
    again = compress(
        kv[start:].contiguous(), gate[start:].contiguous(), sequence.weights, start, state, implementation="torch"
    )
    assert torch.allclose(out[-100:].double(), again.double(), rtol=2**-7, atol=1e-4)
