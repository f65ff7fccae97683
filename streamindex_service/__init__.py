"""StreamIndex Service: exact top-k key search for sparse attention, in a fixed device memory budget."""

__version__ = "0.1.0"
