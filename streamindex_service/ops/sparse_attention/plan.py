"""Tiles and workspace of a run of sparse attention: pure arithmetic, so that a scheduler can ask before it reserves.

Bytes here are the workspace alone: inputs (q, rows, indices) and outputs are the caller's.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

MIN_WORKSPACE_BYTES = 16 << 20
_SLACK_BYTES = 1 << 20
MAX_TOKEN_CHUNK = 1024
MAX_SPLITS = 64
_ALIGNED_TOKENS = 4  # whatever a tensor's rows are, every fourth is aligned to 16 bytes as the first is
# What the Hopper kernels take; everything else keeps the portable kernel.
HOPPER_FORMATS = frozenset({"bf16", "fp8_d512", "fp8_d576"})
HOPPER_HEADS = frozenset({64, 128})
FEW_HEADS_FORMATS = frozenset({"fp8_d512", "fp8_d576"})
MAX_FEW_HEADS = 32
HOPPER_VALUE_DIM = 512
HOPPER_CAPABILITY = (9, 0)


class AttentionKernel(StrEnum):
    """Which kernel a plan takes."""

    PORTABLE = "portable"
    HOPPER = "hopper"
    HOPPER_FEW_HEADS = "hopper few heads"
    WITHOUT_GLUON = "portable, for this Triton lacks what the hopper kernel needs"


@dataclass(frozen=True)
class Tiles:
    """Compile-time shape of the attention kernel; depends on format, heads and dimensions, never on a length.

    block_heads: heads of a program, or of an item that a program takes; block_entries: entries of an index row that are
    gathered at a time; stages: blocks of them that are under way; warps: of a program, or of its first partition.
    messages: of the Hopper kernel, blocks of weights that may wait for their values.
    held_queries: of the kernel for few heads, whether queries stay in registers or in shared memory.
    """

    block_heads: int
    block_entries: int
    warps: int
    stages: int
    kernel: AttentionKernel = AttentionKernel.PORTABLE
    messages: int = 1
    held_queries: bool = False


@dataclass(frozen=True)
class Shape:
    """What a plan depends on."""

    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    width: int
    format_name: str


@dataclass(frozen=True)
class Plan:
    """token_chunk: query tokens at a time; kernels that do not split take all. splits: parts of each index row that
    different programs take, whose results are combined. find_ends: a kernel first finds where the last valid entry of
    each index row stands, so that nothing is done beyond. workspace_bytes: the peak beside inputs and outputs."""

    workspace_bytes: int
    token_chunk: int = MAX_TOKEN_CHUNK
    splits: int = 1
    tiles: Tiles | None = None
    find_ends: bool = True

    @property
    def name(self) -> str:
        """Which kernel runs: for logs and results."""
        return "torch" if self.tiles is None else f"triton, {self.tiles.kernel.value} kernel"


class WorkspaceTooSmallError(ValueError):
    """The workspace offered is below what the problem needs at least; attributes give both in bytes."""

    def __init__(self, offered_bytes: int, floor_bytes: int) -> None:
        super().__init__(f"workspace_bytes: {offered_bytes} offered, {floor_bytes} is the least")
        self.offered_bytes = offered_bytes
        self.floor_bytes = floor_bytes


def plan_chunked(shape: Shape, workspace_bytes: int) -> Plan:
    """The most tokens at a time that fit. Raises WorkspaceTooSmallError if not even one does."""
    token = chunked_token_bytes(shape)
    chunk = min(MAX_TOKEN_CHUNK, max(shape.tokens, 1), (workspace_bytes - _SLACK_BYTES) // token)
    if workspace_bytes < MIN_WORKSPACE_BYTES or chunk < 1:
        raise WorkspaceTooSmallError(workspace_bytes, max(MIN_WORKSPACE_BYTES, token + _SLACK_BYTES))
    return Plan(chunk * token + _SLACK_BYTES, token_chunk=chunk)


def chunked_token_bytes(shape: Shape) -> int:
    """Peak bytes of one token: rows as they are, gathered and widened, logits twice, indices, queries and output."""
    entry = 10 * shape.key_dim + 4 * shape.value_dim + 8 * shape.heads + 32
    return shape.width * entry + 4 * shape.heads * (shape.key_dim + shape.value_dim + 8)


def plan_triton(
    shape: Shape, workspace_bytes: int, processors: int, kernel: AttentionKernel, parts: int | None = None
) -> Plan:
    """Tiles of the kernel, and how many parts each index row is split into: as many as give all multiprocessors work,
    or just `parts`, whatever the number of tokens.

    Raises WorkspaceTooSmallError below 16 MiB, or if not even a run without a split fits, or one token's `parts`.
    """
    if workspace_bytes < MIN_WORKSPACE_BYTES:
        raise WorkspaceTooSmallError(workspace_bytes, MIN_WORKSPACE_BYTES)
    tiles = attention_tiles(shape.format_name, shape.heads, shape.key_dim, shape.value_dim, kernel)
    if parts is not None:
        return _plan_parts(shape, workspace_bytes, processors, tiles, parts)
    programs = shape.tokens * -(-shape.heads // tiles.block_heads)
    blocks = -(-shape.width // tiles.block_entries)
    splits = max(1, min(processors // max(programs, 1), blocks, MAX_SPLITS))
    while splits > 1 and partial_bytes(shape, splits) + ends_bytes(shape) > workspace_bytes:
        splits -= 1
    needed = partial_bytes(shape, splits) + ends_bytes(shape)
    if needed > workspace_bytes:
        raise WorkspaceTooSmallError(workspace_bytes, needed)
    # where every multiprocessor has but one program, a kernel more costs more than rows that end early would save
    return Plan(needed, splits=splits, tiles=tiles, find_ends=programs > processors)


def _plan_parts(shape: Shape, workspace_bytes: int, processors: int, tiles: Tiles, parts: int) -> Plan:
    """As many tokens at a time as there is room for the parts of. Where a row ends is not looked for if it has several:
    that would decide where they begin."""
    if parts == 1:
        programs = shape.tokens * -(-shape.heads // tiles.block_heads)
        return Plan(ends_bytes(shape), token_chunk=max(shape.tokens, 1), tiles=tiles, find_ends=programs > processors)
    token_bytes = 4 * parts * shape.heads * (shape.value_dim + 1)
    chunk = min(max(shape.tokens, 1), (workspace_bytes - 2 * 512) // token_bytes)
    if chunk < 1:
        raise WorkspaceTooSmallError(workspace_bytes, token_bytes + 2 * 512)
    if _ALIGNED_TOKENS < chunk < shape.tokens:
        chunk = chunk // _ALIGNED_TOKENS * _ALIGNED_TOKENS
    return Plan(chunk * token_bytes + 2 * 512, token_chunk=chunk, splits=parts, tiles=tiles, find_ends=False)


def ends_bytes(shape: Shape) -> int:
    """Bytes of what is kept for each token: where its last valid entry stands."""
    return _round_up(4 * shape.tokens, 512)


def partial_bytes(shape: Shape, splits: int) -> int:
    """Bytes of partial outputs and their lse, none without a split."""
    if splits == 1:
        return 0
    parts = splits * shape.tokens * shape.heads
    return _round_up(4 * parts * shape.value_dim, 512) + _round_up(4 * parts, 512)


def choose_attention_kernel(
    format_name: str,
    heads: int,
    value_dim: int,
    capability: tuple[int, int] | None,
    *,
    gluon: Collection[AttentionKernel],
) -> AttentionKernel:
    """The static choice: by device, format and dimensions, never by a length. capability: of a CUDA device, or None.
    gluon: the kernels for which this Triton has what they are written in."""
    if capability != HOPPER_CAPABILITY or value_dim != HOPPER_VALUE_DIM:
        return AttentionKernel.PORTABLE
    if format_name in HOPPER_FORMATS and heads in HOPPER_HEADS:
        wanted = AttentionKernel.HOPPER
    elif format_name in FEW_HEADS_FORMATS and heads <= MAX_FEW_HEADS:
        wanted = AttentionKernel.HOPPER_FEW_HEADS
    else:
        return AttentionKernel.PORTABLE
    return wanted if wanted in gluon else AttentionKernel.WITHOUT_GLUON


def attention_tiles(
    format_name: str, heads: int, key_dim: int, value_dim: int, kernel: AttentionKernel = AttentionKernel.PORTABLE
) -> Tiles:
    """The static table of kernel shapes, of the Hopper kernels as measured (docs/decisions/0020 and 0035)."""
    if kernel is AttentionKernel.HOPPER:
        # a longer key leaves shared memory for one message; with one block of heads a token, one is no slower
        messages = 2 if heads == 128 and key_dim == value_dim else 1
        return Tiles(64, 64, 4, 2, kernel, messages=messages)
    if kernel is AttentionKernel.HOPPER_FEW_HEADS:
        # the longer key's queries leave too few registers for all else
        return Tiles(16, 64, 4, 4, kernel, held_queries=format_name == "fp8_d512")
    block_heads = 16 if heads <= 16 else 32 if heads <= 32 else 64
    if format_name != "bf16":
        return Tiles(block_heads, 32, 4 if block_heads < 64 else 8, 2, kernel)
    return Tiles(block_heads, 64 if value_dim >= 256 else 32, 4 if block_heads < 64 else 8, 2, kernel)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
