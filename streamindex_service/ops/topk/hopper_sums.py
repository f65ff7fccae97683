"""The sum over heads of the Hopper score kernel, and where it keeps gates and scores.

The sum is written out as one chain of fused multiply-adds per (query, key). Left to a reduction, the first two terms
are products both, and the compiler may fuse either into the sum: it was seen to choose differently for different
queries of one product, so that a score depended on where in the product its query stood.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def gate_layout(columns):
    """Registers for `columns` gates such that a thread's stand next to each other in shared memory, four by four.

    Gate columns are kept in groups of 16, and in a group first by the lane that needs them: see `_feed`.
    """
    registers = [[1], [2]] + [[1 << bit] for bit in range(4, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[4], [8], [0], [0], [0]], [[0], [0]], [], [columns])


@gluon.constexpr_function
def score_layout(keys, queries):
    """Registers for scores [keys, queries] of a product whose sum over heads left each in four lanes: of the four, each
    keeps another one."""
    lanes = {1: [[8, 0], [0, 0]], 2: [[8, 0], [0, 1]], 4: [[0, 1], [0, 2]]}[queries]
    registers = [[8, 0]] if queries == 4 else []
    rows = [[1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes + rows, [[16, 0], [32, 0]], [], [keys, queries])


@gluon.jit
def _halves(x):
    """The last axis split in two: by its highest bit, and at the last, by its lowest (the other two are lanes)."""
    KEYS: gl.constexpr = x.shape[0]
    QUERIES: gl.constexpr = x.shape[1]
    HEADS: gl.constexpr = x.shape[2]
    if HEADS == 8:
        paired = gl.reshape(x, (KEYS, QUERIES, 4, 2))
    else:
        paired = gl.permute(gl.reshape(x, (KEYS, QUERIES, 2, HEADS // 2)), (0, 1, 3, 2))
    return gl.split(paired)


@gluon.jit
def _chain(x, gate, total, FIRST: gl.constexpr):
    """total + Σ x · gate over the heads that one thread holds, one after the other: [KEYS, QUERIES, 4]."""
    one, other = _halves(x)
    gate_of_one, gate_of_other = _halves(gate)
    if x.shape[2] == 8:
        total = one * gate_of_one if FIRST else gl.fma(one, gate_of_one, total)
        total = gl.fma(other, gate_of_other, total)
    else:
        total = _chain(one, gate_of_one, total, FIRST)
        total = _chain(other, gate_of_other, total, False)
    return total


@gluon.jit
def scores_of(products, w_smem, HEADS: gl.constexpr, NARROW: gl.constexpr):
    """Σ ReLU(product) · gate over the heads of each query: [keys, queries], the same in four lanes."""
    KEYS: gl.constexpr = products.shape[0]
    COLUMNS: gl.constexpr = products.shape[1]
    gate = gl.reshape(w_smem.load(gate_layout(COLUMNS)), (COLUMNS // 16, 4, 2, 2))
    gate = gl.reshape(gl.permute(gate, (0, 2, 1, 3)), (COLUMNS,))
    gate = gl.convert_layout(gate, gl.SliceLayout(0, products.type.layout), assert_trivial=True)
    gate, _ = gl.broadcast(gl.expand_dims(gate, 0), products)
    if NARROW:  # noqa: SIM108
        # ReLU(x) as (x + |x|) / 2, the half being in the gate: bit for bit the same for gates from 2^-125 on, since
        # products of 8-bit floats are far from overflow; and additions have twice the rate of maxima
        positive = products + gl.abs(products)
    else:
        positive = gl.maximum(products, 0.0)
    positive = gl.reshape(positive, (KEYS, COLUMNS // HEADS, HEADS))
    gate = gl.reshape(gate, (KEYS, COLUMNS // HEADS, HEADS))
    return gl.sum(_chain(positive, gate, positive, True), axis=2)
