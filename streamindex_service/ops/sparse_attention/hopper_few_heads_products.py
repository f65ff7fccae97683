"""Both products of the kernel for few heads: operands widened on their way from shared memory to mma.sync.

Which elements of a row come first does not matter to a product, so they are taken as their words have them: four
operands, one for each pair of elements of two words (keys, and queries the same) or for each element of a word
(values).

Values are many and weights few, so it is weights that are multiplied by the scales of values. Scales differ from group
to group: in the second product each warp has elements of one group at a time, and weights of its own for them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

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
# A word each of two rows to pairs of both rows, one for each element of the word.
_WIDEN_VALUES = gl.constexpr("""{
    .reg .b16 a, b, c, d;
    .reg .b32 x, y;
    prmt.b32 x, $4, $5, 0x5140;
    prmt.b32 y, $4, $5, 0x7362;
    mov.b32 {a, b}, x;
    mov.b32 {c, d}, y;
    cvt.rn.f16x2.e4m3x2 $0, a;
    cvt.rn.f16x2.e4m3x2 $1, b;
    cvt.rn.f16x2.e4m3x2 $2, c;
    cvt.rn.f16x2.e4m3x2 $3, d;
}""")
_FOUR_F16 = gl.constexpr((gl.float16, gl.float16, gl.float16, gl.float16))
_FOUR_BF16 = gl.constexpr((gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16))


@gluon.constexpr_function
def value_layout(warps):
    """Of the second product, [warps, 16, words of a group]: each warp multiplies weights and values of its own."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


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
def _widen_values(words):
    """The four elements of each word, in f16."""
    return gl.inline_asm_elementwise(
        _WIDEN_VALUES, "=r,=r,=r,=r,r,r", [words], dtype=_FOUR_F16, is_pure=True, pack=2
    )  # fmt: skip


@gluon.jit
def _by_warp(value_smem, BLOCK: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr):
    """Words [BLOCK, WORDS] as [WARPS, BLOCK, words of a warp]: of WARPS groups that follow each other a warp has one.

    Within 16 words: a thread reads two that lie side by side, and of outputs threads beside each other store pairs of
    words that do, so that both go in few pieces.
    """
    SETS: gl.constexpr = GROUPS // WARPS
    words = value_smem.reshape((BLOCK, SETS, WARPS, WORDS // GROUPS // 16, 2, 4, 2)).permute((2, 0, 1, 3, 6, 5, 4))
    return words.reshape((WARPS, BLOCK, WORDS // WARPS))


@gluon.jit
def in_order(sums, group: gl.constexpr, down, rest, GROUPS: gl.constexpr, WARPS: gl.constexpr):
    """Sums of WARPS groups, the way back from `_by_warp`: times `down` and `rest` [1, 16, 1], elements as they follow
    each other in a row [16, elements]."""
    even = gl.join(sums[4 * group] * down * rest, sums[4 * group + 2] * down * rest)
    odd = gl.join(sums[4 * group + 1] * down * rest, sums[4 * group + 3] * down * rest)
    elements = gl.reshape(gl.join(even, odd), (WARPS, 16, WORDS // GROUPS // 16, 2, 4, 2, 4))
    return gl.reshape(gl.permute(elements, (1, 0, 2, 5, 4, 3, 6)), (16, 4 * WARPS * WORDS // GROUPS))


@gluon.jit
def zeros(GROUPS: gl.constexpr, WARPS: gl.constexpr, mma: gl.constexpr):
    """Sums of nothing: of each WARPS groups four [WARPS, 16, words of a group], one for each element of a word."""
    sums = ()
    for _ in gl.static_range(4 * (GROUPS // WARPS)):
        sums += (gl.zeros((WARPS, 16, WORDS // GROUPS), gl.float32, layout=mma),)
    return sums


@gluon.jit
def for_each_head(smem, mma: gl.constexpr):
    """Numbers of heads [16], to be multiplied with sums: [1, 16, 1]."""
    return gl.expand_dims(gl.expand_dims(smem.load(gl.SliceLayout(0, gl.SliceLayout(2, mma))), 0), 2)


@gluon.jit
def _times(values, shares):
    """Values times shares, in bf16."""
    a, b, c, d = values
    a, b = (a.to(gl.float32) * shares).to(gl.bfloat16), (b.to(gl.float32) * shares).to(gl.bfloat16)
    return a, b, (c.to(gl.float32) * shares).to(gl.bfloat16), (d.to(gl.float32) * shares).to(gl.bfloat16)


@gluon.jit
def add_values(
    weight_smem, value_smem, share_smem, fade_smem, sums,
    IN_F16: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr,
    flat: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """`sums` times `fade_smem` [16], and weights [16, BLOCK] times shares [GROUPS, BLOCK] times values added, ROWS at a
    time.

    IN_F16: weights and shares are f16 and weights are multiplied. Otherwise weights are bf16 and shares float32, and
    values are multiplied, which rounds less where both are bf16. flat: the layout of a product without a warp's own
    weights.
    """
    EACH: gl.constexpr = WORDS // GROUPS
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    fade = for_each_head(fade_smem, mma)
    words = _by_warp(value_smem, BLOCK, GROUPS, WARPS)
    result = ()
    for group in gl.static_range(GROUPS // WARPS):
        a, b = sums[4 * group] * fade, sums[4 * group + 1] * fade
        c, d = sums[4 * group + 2] * fade, sums[4 * group + 3] * fade
        for first in gl.static_range(0, BLOCK, ROWS):
            p = weight_smem.slice(first, ROWS, dim=1).load(gl.DotOperandLayout(0, flat, 2))
            p = gl.expand_dims(gl.convert_layout(p, gl.SliceLayout(0, left)), 0)
            shares = share_smem.slice(WARPS * group, WARPS, dim=0).slice(first, ROWS, dim=1)
            few = words.slice(first, ROWS, dim=1).slice(EACH * group, EACH, dim=2).load(right)
            values = _widen_values(few)
            if IN_F16:
                p *= gl.expand_dims(shares.load(gl.SliceLayout(1, left)), 1)
            else:
                p = gl.broadcast(p, gl.zeros((WARPS, 1, ROWS), gl.bfloat16, layout=left))[0]
                shares = gl.expand_dims(shares.load(gl.SliceLayout(2, right)) * SHARE_HEAD, 2)
                values = _times(values, shares)
            a, b = mma_v2(p, values[0], a), mma_v2(p, values[1], b)
            c, d = mma_v2(p, values[2], c), mma_v2(p, values[3], d)
        result += (a, b, c, d)
    return result
