"""Index rows of sparse attention from a window and the results of a search: one meaning, several implementations."""

from streamindex_service.ops.implementations import UnsupportedImplementationError
from streamindex_service.ops.index_rows.api import IMPLEMENTATIONS, Implementation, assemble_index_rows
from streamindex_service.ops.index_rows.problem import IndexRowsInputError

__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "IndexRowsInputError",
    "UnsupportedImplementationError",
    "assemble_index_rows",
]
