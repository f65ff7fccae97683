"""Lightning indexer scores and exact top-k: one meaning (`reference`), several implementations chosen by name."""

from streamindex_service.ops.implementations import UnsupportedImplementationError
from streamindex_service.ops.topk.api import (
    DEFAULT_WORKSPACE_BYTES,
    IMPLEMENTATIONS,
    Implementation,
    TopkResult,
    find_implementation,
    plan_for,
    topk,
)
from streamindex_service.ops.topk.check import CheckReport, check_topk
from streamindex_service.ops.topk.order import Order
from streamindex_service.ops.topk.plan import MIN_WORKSPACE_BYTES, KernelTiles, Plan, WorkspaceTooSmallError
from streamindex_service.ops.topk.problem import LIMITS, Limits, TopkInputError
from streamindex_service.ops.topk.reference import ReferenceTooLargeError, indexer_scores
from streamindex_service.ops.topk.sequences import KeySequence, topk_sequences

__all__ = [
    "DEFAULT_WORKSPACE_BYTES",
    "IMPLEMENTATIONS",
    "LIMITS",
    "MIN_WORKSPACE_BYTES",
    "CheckReport",
    "Implementation",
    "KernelTiles",
    "KeySequence",
    "Limits",
    "Order",
    "Plan",
    "ReferenceTooLargeError",
    "TopkInputError",
    "TopkResult",
    "UnsupportedImplementationError",
    "WorkspaceTooSmallError",
    "check_topk",
    "find_implementation",
    "indexer_scores",
    "plan_for",
    "topk",
    "topk_sequences",
]
