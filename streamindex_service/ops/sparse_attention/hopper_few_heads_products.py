"""Both products of the kernel for few heads: operands widened on their way from shared memory to mma.sync.

Which elements of a row come first does not matter to a product, so they are taken as their words have them: four
operands, one for each pair of elements of two words (keys, and queries the same) or for each element of a word
(values).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from streamindex_service.ops.gluon_names import view
from streamindex_service.ops.sparse_attention.hopper_few_heads_gather import SHARE_HEAD, WORDS, exponent_of, power

# Of a head's queries in f16 the largest element has this exponent; exponents as float32 has them may be between these.
_QUERY_HEAD, _LEAST_QUERY, _LARGEST_QUERY = gl.constexpr(14), gl.constexpr(20), gl.constexpr(254)
# Two words of a key to four pairs of f16, as they stand: tensor j holds, at words w and w + 1 (w even), elements
# 4w + 2j and 4w + 2j + 1. _UNZIP does queries so.
_WIDEN_KEYS = gl.constexpr("""{
    .reg .b16 a, b, c, d;
    mov.b32 {a, b}, $4;
    mov.b32 {c, d}, $5;
    cvt.rn.f16x2.e4m3x2 $0, a;
    cvt.rn.f16x2.e4m3x2 $1, b;
    cvt.rn.f16x2.e4m3x2 $2, c;
    cvt.rn.f16x2.e4m3x2 $3, d;
}""")
_UNZIP = gl.constexpr("""{
    mov.b64 {$0, $1}, $4;
    mov.b64 {$2, $3}, $5;
}""")
# A word each of two rows to pairs of both rows, one for each element of the word, times the shares of both rows.
_WIDEN_VALUES = gl.constexpr("""{
    .reg .b16 a, b, c, d;
    .reg .b32 x, y;
    prmt.b32 x, $4, $5, 0x5140;
    prmt.b32 y, $4, $5, 0x7362;
    mov.b32 {a, b}, x;
    mov.b32 {c, d}, y;
    cvt.rn.f16x2.e4m3x2 x, a;
    mul.rn.f16x2 $0, x, $6;
    cvt.rn.f16x2.e4m3x2 y, b;
    mul.rn.f16x2 $1, y, $6;
    cvt.rn.f16x2.e4m3x2 x, c;
    mul.rn.f16x2 $2, x, $6;
    cvt.rn.f16x2.e4m3x2 y, d;
    mul.rn.f16x2 $3, y, $6;
}""")
_FOUR_F16 = gl.constexpr((gl.float16, gl.float16, gl.float16, gl.float16))
_FOUR_BF16 = gl.constexpr((gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16))


@gluon.constexpr_function
def _group_layout(block, groups, warps):
    """[BLOCK, groups, words a group] laid out as the second product's operand [BLOCK, words]."""
    each = 128 // groups

    def at(word):
        return [0, word // each, word % each]

    registers = [[1, 0, 0], [8, 0, 0]] + [[16 << bit, 0, 0] for bit in range((block // 16).bit_length() - 1)]
    registers += [at(8 * warps << bit) for bit in range((128 // (8 * warps)).bit_length() - 1)]
    lanes = [[2, 0, 0], [4, 0, 0], at(1), at(2), at(4)]
    return gl.DistributedLinearLayout(
        registers, lanes, [at(8 << bit) for bit in range(warps.bit_length() - 1)], [], [block, groups, each]
    )


@gluon.jit
def load_queries(
    q, smem, token, first_head, HEADS: gl.constexpr, DIM: gl.constexpr, NARROW: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Queries that meet 8-bit elements, as _WIDEN_KEYS lays keys out, in f16: into `smem` [4, 16, WORDS]. Returns the
    power of two [16] by which each head's were divided."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    head = first_head + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    word = gl.expand_dims(gl.arange(0, WORDS, layout=gl.SliceLayout(0, layout)), 0)
    fours = (q + gl.expand_dims((token * HEADS + head) * DIM, 1)).to(gl.pointer_type(gl.int64)) + word
    fours = gl.load(fours, mask=gl.expand_dims(head < HEADS, 1) & (word < NARROW // 4), other=0)
    a, b, c, d = gl.inline_asm_elementwise(_UNZIP, "=r,=r,=r,=r,l,l", [fours], dtype=_FOUR_BF16, is_pure=True, pack=2)
    a, b, c, d = a.to(gl.float32), b.to(gl.float32), c.to(gl.float32), d.to(gl.float32)
    most = gl.max(gl.maximum(gl.maximum(gl.abs(a), gl.abs(b)), gl.maximum(gl.abs(c), gl.abs(d))), axis=1)
    exponent = gl.minimum(gl.maximum(exponent_of(most), _LEAST_QUERY), _LARGEST_QUERY)
    up = gl.expand_dims(power(254 + _QUERY_HEAD - exponent), 1)
    smem.index(0).store((a * up).to(gl.float16))
    smem.index(1).store((b * up).to(gl.float16))
    smem.index(2).store((c * up).to(gl.float16))
    smem.index(3).store((d * up).to(gl.float16))
    return power(exponent - _QUERY_HEAD)


@gluon.jit
def hold_queries(smem, GROUPS: gl.constexpr, USED: gl.constexpr, left: gl.constexpr):
    """The operands that load_queries left in shared memory, of each of the USED groups four, in registers."""
    queries = ()
    for group in gl.static_range(USED):
        for pair in gl.static_range(4):
            queries += (smem.index(pair).slice(group * (WORDS // GROUPS), WORDS // GROUPS, dim=1).load(left),)
    return queries


@gluon.jit
def multiply(
    queries, query_smem, value_smem, share_smem, BLOCK: gl.constexpr, GROUPS: gl.constexpr, USED: gl.constexpr,
    HELD_QUERIES: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Products of the queries with the 8-bit elements of a block of keys, times shares of scales: [16, BLOCK]."""
    EACH: gl.constexpr = WORDS // GROUPS
    products = gl.zeros((16, BLOCK), gl.float32, layout=mma)
    for group in gl.static_range(USED):
        words = value_smem.permute((1, 0)).slice(group * EACH, EACH, dim=0).load(gl.DotOperandLayout(1, mma, 2))
        keys = gl.inline_asm_elementwise(
            _WIDEN_KEYS, "=r,=r,=r,=r,r,r", [words], dtype=_FOUR_F16, is_pure=True, pack=2
        )  # fmt: skip
        sums = gl.zeros((16, BLOCK), gl.float32, layout=mma)
        for pair in gl.static_range(4):
            if HELD_QUERIES:
                sums = mma_v2(queries[4 * group + pair], keys[pair], sums)
            else:
                query = query_smem.index(pair).slice(group * EACH, EACH, dim=1).load(gl.DotOperandLayout(0, mma, 2))
                sums = mma_v2(query, keys[pair], sums)
        products += sums * share_smem.slice(group, 1, dim=0).load(mma)
    return products


@gluon.jit
def _by_word(smem, BITS: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr):
    """Shares [GROUPS, ROWS] as those of every word, as integers of type BITS: [ROWS, WORDS]."""
    layout: gl.constexpr = _group_layout(ROWS, GROUPS, WARPS)
    few = gl.expand_dims(smem.permute((1, 0)).load(gl.SliceLayout(2, layout)), 2).to(BITS, bitcast=True)
    many = gl.zeros((ROWS, GROUPS, WORDS // GROUPS), BITS, layout=layout)
    return gl.reshape(few | many, (ROWS, WORDS))


@gluon.jit
def _widen_values(words, shares):
    """The four elements of each word, times shares, in f16."""
    return gl.inline_asm_elementwise(
        _WIDEN_VALUES, "=r,=r,=r,=r,r,r,r", [words, shares], dtype=_FOUR_F16, is_pure=True, pack=2
    )


@gluon.jit
def load_shares(narrow_smem, BLOCK: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr, right: gl.constexpr):
    """Shares in f16 of every word: [BLOCK, WORDS]."""
    shares = gl.convert_layout(_by_word(narrow_smem, gl.int16, BLOCK, GROUPS, WARPS), right)
    return shares.to(gl.float16, bitcast=True)


@gluon.jit
def add_in_f16(weight_smem, words, shares, acc_a, acc_b, acc_c, acc_d, mma: gl.constexpr):
    """Add weights times values, of the four elements of a word each to a sum of its own."""
    p = weight_smem.load(gl.DotOperandLayout(0, mma, 2))
    a, b, c, d = _widen_values(words, shares)
    return mma_v2(p, a, acc_a), mma_v2(p, b, acc_b), mma_v2(p, c, acc_c), mma_v2(p, d, acc_d)


@gluon.jit
def add_in_bf16(
    weight_smem, value_smem, share_smem, acc_a, acc_b, acc_c, acc_d,
    BLOCK: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """The same where f16 does not hold the shares: few rows at a time, for registers that the other way has no use
    for would be lost to it."""
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    ROWS: gl.constexpr = 16
    weight_smem = view(weight_smem, gl.bfloat16, [16, BLOCK], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    for first in gl.static_range(0, BLOCK, ROWS):
        p = weight_smem.slice(first, ROWS, dim=1).load(gl.DotOperandLayout(0, mma, 2))
        few = share_smem.slice(first, ROWS, dim=1)
        shares = gl.convert_layout(_by_word(few, gl.int32, ROWS, GROUPS, WARPS), right)
        shares = shares.to(gl.float32, bitcast=True) * SHARE_HEAD
        words = value_smem.slice(first, ROWS, dim=0).load(right)
        a, b, c, d = _widen_values(words, gl.full((ROWS, WORDS), 1.0, gl.float16, layout=right))
        acc_a = mma_v2(p, (a.to(gl.float32) * shares).to(gl.bfloat16), acc_a)
        acc_b = mma_v2(p, (b.to(gl.float32) * shares).to(gl.bfloat16), acc_b)
        acc_c = mma_v2(p, (c.to(gl.float32) * shares).to(gl.bfloat16), acc_c)
        acc_d = mma_v2(p, (d.to(gl.float32) * shares).to(gl.bfloat16), acc_d)
    return acc_a, acc_b, acc_c, acc_d
