"""The compressor against float64, in every chunking, back and forth, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from streamindex_service.ops.compressor import (
    CompressorInputError,
    CompressorState,
    CompressorWeights,
    StateError,
    UnsupportedImplementationError,
    check_compressed,
    compress,
    rotary_frequencies,
)
from tests.ops.cases import kernel_device
from tests.ops.compressor_cases import Sequence, make_sequence

EVERY = ["reference", "torch", "triton"]
# tokens, ratio, dim, dtype, amplitude of the gates
SHAPES = [
    (41, 4, 64, torch.float32, 1.0),
    (30, 4, 512, torch.bfloat16, 1.0),
    (8, 4, 128, torch.float32, 60.0),
    (3, 4, 64, torch.float32, 1.0),
    (35, 8, 64, torch.float32, 1.0),
    (300, 128, 64, torch.bfloat16, 5.0),
    (128, 128, 512, torch.float32, 1.0),
]


def _right(sequence: Sequence, out: torch.Tensor) -> None:
    report = check_compressed(out, sequence.kv, sequence.gate, sequence.weights)
    assert report.wrong_rows == 0, f"{report.wrong_rows} wrong, worst error {report.largest_error} of its bound"


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"T{s[0]}-R{s[1]}-D{s[2]}-{str(s[3])[6:]}-A{s[4]:g}")
def test_within_the_error_bound(shape, implementation: str) -> None:
    tokens, ratio, dim, dtype, amplitude = shape
    sequence = make_sequence(tokens, ratio=ratio, dim=dim, dtype=dtype, amplitude=amplitude, device=kernel_device())
    out = sequence.whole(implementation)
    assert out.shape == (tokens // ratio, dim)
    _right(sequence, out)


CHUNKINGS = {
    "one by one": [1] * 200,
    "threes": [3] * 70,
    "a window less one": [7] * 30,
    "window and one": [9] * 25,
    "nothing between": [0, 5, 0, 0, 11, 0],
    "long, then drafts": [37, 1, 2, 3, 4, 1],
    "last token alone": [60],
}


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("sizes", CHUNKINGS.values(), ids=CHUNKINGS.keys())
@pytest.mark.parametrize("ratio", [4, 8, 16])
def test_no_chunking_changes_a_bit(ratio: int, sizes: list[int], implementation: str) -> None:
    sequence = make_sequence(61, ratio=ratio, device=kernel_device(), dtype=torch.bfloat16)
    for rollback in (0, 5):
        found = sequence.in_chunks(sizes, implementation, rollback)
        assert torch.equal(found, sequence.whole(implementation))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_random_chunkings_of_heavy_compression(implementation: str) -> None:
    sequence = make_sequence(500, ratio=128, device=kernel_device())
    whole = sequence.whole(implementation)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        sizes = torch.randint(1, 200, (6,), generator=generator).tolist()
        assert torch.equal(sequence.in_chunks(sizes, implementation), whole)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("ratio", [4, 16])
def test_rejected_drafts_leave_no_trace(ratio: int, implementation: str) -> None:
    sequence = make_sequence(70, ratio=ratio, device=kernel_device(), seed=1)
    drafts = make_sequence(70, ratio=ratio, device=kernel_device(), seed=2)
    whole = sequence.whole(implementation)
    state = CompressorState.empty(sequence.weights, rollback=6)
    position, entries = 0, []
    for accepted, rejected in ((3, 6), (1, 6), (2, 6), (5, 1), (4, 6), (9, 5), (1, 6), (1, 6), (8, 6), (30, 6)):
        stop = min(position + accepted, 70)
        entries.append(sequence.part(position, stop, state, implementation))
        position = stop
        drafted = replace(drafts, weights=sequence.weights)
        drafted.part(position, min(position + rejected, 70), state, implementation)
    entries.append(sequence.part(position, 70, state, implementation))
    assert torch.equal(torch.cat(entries), whole)


@pytest.mark.parametrize("implementation", EVERY)
def test_a_fork_goes_its_own_way(implementation: str) -> None:
    sequence = make_sequence(50, ratio=4, device=kernel_device())
    other = replace(make_sequence(50, ratio=4, device=kernel_device(), seed=9), weights=sequence.weights)
    joined = Sequence(
        torch.cat([sequence.kv[:22], other.kv[22:]]), torch.cat([sequence.gate[:22], other.gate[22:]]), other.weights
    )
    state = CompressorState.empty(sequence.weights)
    sequence.part(0, 22, state, implementation)
    branch = state.fork()
    found = other.part(22, 50, branch, implementation)
    assert torch.equal(found, joined.whole(implementation)[5:])
    assert torch.equal(sequence.part(22, 50, state, implementation), sequence.whole(implementation)[5:])


def test_a_state_refuses_what_it_does_not_hold() -> None:
    sequence = make_sequence(60, ratio=4)
    state = CompressorState.empty(sequence.weights, rollback=3)
    with pytest.raises(StateError, match="missing"):
        sequence.part(4, 8, state, "torch")
    sequence.part(0, 30, state, "torch")
    held = state.kv.clone()
    with pytest.raises(StateError, match="19 is the oldest"):
        sequence.part(22, 24, state, "torch")  # pools from 16 on
    with pytest.raises(StateError):
        sequence.part(-1, 3, state, "torch")
    assert torch.equal(state.kv, held)
    assert (state.end, state.oldest) == (30, 19)
    assert torch.equal(sequence.part(27, 40, state, "torch"), sequence.whole("torch")[6:10])
    # from the beginning: nothing before is needed
    assert torch.equal(sequence.part(0, 6, state, "torch"), sequence.whole("torch")[:1])
    assert torch.equal(sequence.part(6, 60, state, "torch"), sequence.whole("torch")[1:])


def test_the_first_window_pools_nothing_before_it() -> None:
    sequence = make_sequence(4, ratio=4, dim=64)
    no_norm = replace(sequence.weights, norm=torch.ones(64), eps=0.0)
    own = (sequence.gate[:, 64:] + no_norm.ape[:, 64:]).double().softmax(dim=0) * sequence.kv[:, 64:].double()
    expected = own.sum(dim=0) / own.sum(dim=0).square().mean().sqrt()
    found = replace(sequence, weights=no_norm).whole("torch")[0].double()
    assert torch.allclose(found, expected, rtol=2**-8, atol=1e-6)


def test_rotation_is_by_the_windows_first_position() -> None:
    sequence = make_sequence(16, ratio=8, dim=64)
    still = replace(sequence.weights, frequencies=torch.zeros(32, dtype=torch.float64))
    turned = replace(sequence.weights, frequencies=torch.full((32,), math.pi / 16, dtype=torch.float64))
    at_rest = replace(sequence, weights=still).whole("reference").double()
    found = replace(sequence, weights=turned).whole("reference").double()
    assert torch.equal(found[0], at_rest[0])
    # position 8: a quarter of a turn
    assert torch.allclose(found[1, ::2], -at_rest[1, 1::2], atol=1e-7)
    assert torch.allclose(found[1, 1::2], at_rest[1, ::2], atol=1e-7)


def test_frequencies_follow_yarn() -> None:
    plain, corrected = rotary_frequencies(original_length=0), rotary_frequencies()
    assert plain[0] == 1.0
    assert plain[16].item() == pytest.approx(160_000**-0.5)
    share = corrected / plain
    assert (share[:15] == 1.0).all()  # 15.8: the pair that turns 32 times in 65,536 positions
    assert torch.allclose(share[26:], torch.tensor(1 / 16, dtype=torch.float64))  # 24.7: the one that turns once
    assert (share.diff() <= 0).all()
    with pytest.raises(ValueError, match="dim"):
        rotary_frequencies(7)


@pytest.mark.parametrize("implementation", EVERY)
def test_long_positions_keep_their_angle(implementation: str) -> None:
    sequence = make_sequence(16, ratio=8, device=kernel_device())
    found = []
    for name in ("reference", implementation):
        state = CompressorState.empty(sequence.weights)
        state.end = state.oldest = 2**20  # as if the sequence had come so far
        found.append(compress(sequence.kv, sequence.gate, sequence.weights, 2**20, state, implementation=name).double())
    assert torch.allclose(*found, rtol=2**-7, atol=1e-5)


GOOD = make_sequence(8, ratio=4)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("kv", {"kv": GOOD.kv[:, :64].contiguous()}),
        ("kv", {"kv": GOOD.kv.half()}),
        ("kv", {"kv": GOOD.kv.T.contiguous().T}),
        ("gate", {"gate": GOOD.gate[:4]}),
        ("gate", {"gate": GOOD.gate.bfloat16()}),
        ("state", {"state": CompressorState.empty(make_sequence(8, ratio=8).weights)}),
        ("out", {"out": torch.empty(3, 64, dtype=torch.bfloat16)}),
        ("out", {"out": torch.empty(2, 64)}),
    ],
)
def test_refusals_name_the_argument(field: str, changes) -> None:
    arguments = {"kv": GOOD.kv, "gate": GOOD.gate, "state": CompressorState.empty(GOOD.weights)} | changes
    with pytest.raises(CompressorInputError) as refusal:
        compress(weights=GOOD.weights, position=0, implementation="torch", **arguments)
    assert refusal.value.field == field


def test_weights_and_names_are_checked() -> None:
    for changes in ({"ratio": 5}, {"ratio": 12}, {"norm": torch.ones(48)}, {"ape": torch.zeros(4, 64)}):
        with pytest.raises(ValueError, match="|".join(changes)):
            CompressorWeights(**({"ratio": 4, "ape": torch.zeros(4, 128), "norm": torch.ones(64)} | changes))
    with pytest.raises(ValueError, match="rollback"):
        CompressorState.empty(GOOD.weights, rollback=-1)
    with pytest.raises(UnsupportedImplementationError, match="reference, torch"):
        GOOD.whole("fastest")


def test_the_judge_sees_a_wrong_entry() -> None:
    sequence = make_sequence(41, ratio=4)
    out = sequence.whole("torch")
    out[3, 7] += 0.05
    out[5, 63] = torch.nan
    report = check_compressed(out, sequence.kv, sequence.gate, sequence.weights)
    assert report.wrong.nonzero().flatten().tolist() == [3, 5]
    part = check_compressed(out[3:9], sequence.kv[8:36], sequence.gate[8:36], sequence.weights, start=8)
    assert part.wrong.nonzero().flatten().tolist() == [0, 2]
    with pytest.raises(ValueError, match="out"):
        check_compressed(out[:3], sequence.kv, sequence.gate, sequence.weights)
