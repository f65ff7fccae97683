"""Sparse attention over gathered rows of one shared KV head: one meaning (`reference`), several implementations."""

from streamindex_service.ops.implementations import UnsupportedImplementationError
from streamindex_service.ops.sparse_attention.api import (
    DEFAULT_WORKSPACE_BYTES,
    IMPLEMENTATIONS,
    AttentionResult,
    Implementation,
    find_implementation,
    plan_for,
    sparse_attention,
)
from streamindex_service.ops.sparse_attention.check import CheckReport, check_sparse_attention
from streamindex_service.ops.sparse_attention.plan import (
    MIN_WORKSPACE_BYTES,
    AttentionKernel,
    Plan,
    Tiles,
    WorkspaceTooSmallError,
)
from streamindex_service.ops.sparse_attention.problem import LIMITS, AttentionInputError, Limits
from streamindex_service.ops.sparse_attention.reference import ReferenceTooLargeError, exact_attention

__all__ = [
    "DEFAULT_WORKSPACE_BYTES",
    "IMPLEMENTATIONS",
    "LIMITS",
    "MIN_WORKSPACE_BYTES",
    "AttentionInputError",
    "AttentionKernel",
    "AttentionResult",
    "CheckReport",
    "Implementation",
    "Limits",
    "Plan",
    "ReferenceTooLargeError",
    "Tiles",
    "UnsupportedImplementationError",
    "WorkspaceTooSmallError",
    "check_sparse_attention",
    "exact_attention",
    "find_implementation",
    "plan_for",
    "sparse_attention",
]
