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
from streamindex_service.ops.sparse_attention.autograd import differentiable_sparse_attention
from streamindex_service.ops.sparse_attention.backward import (
    BACKWARD_IMPLEMENTATIONS,
    DEFAULT_BACKWARD_WORKSPACE_BYTES,
    AttentionGradients,
    BackwardPlan,
    plan_backward,
    sparse_attention_backward,
)
from streamindex_service.ops.sparse_attention.backward_check import GradientReport, check_gradients
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
    "BACKWARD_IMPLEMENTATIONS",
    "DEFAULT_BACKWARD_WORKSPACE_BYTES",
    "DEFAULT_WORKSPACE_BYTES",
    "IMPLEMENTATIONS",
    "LIMITS",
    "MIN_WORKSPACE_BYTES",
    "AttentionGradients",
    "AttentionInputError",
    "AttentionKernel",
    "AttentionResult",
    "BackwardPlan",
    "CheckReport",
    "GradientReport",
    "Implementation",
    "Limits",
    "Plan",
    "ReferenceTooLargeError",
    "Tiles",
    "UnsupportedImplementationError",
    "WorkspaceTooSmallError",
    "check_gradients",
    "check_sparse_attention",
    "differentiable_sparse_attention",
    "exact_attention",
    "find_implementation",
    "plan_backward",
    "plan_for",
    "sparse_attention",
    "sparse_attention_backward",
]
