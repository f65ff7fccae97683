"""The compressor of key-value entries (CSA and HCA): one meaning, several implementations, any chunking."""

from streamindex_service.ops.compressor.api import (
    IMPLEMENTATIONS,
    Implementation,
    compress,
    find_implementation,
)
from streamindex_service.ops.compressor.check import CheckReport, check_compressed
from streamindex_service.ops.compressor.problem import CompressorInputError
from streamindex_service.ops.compressor.rotary import rotary_frequencies
from streamindex_service.ops.compressor.state import CompressorState, StateError
from streamindex_service.ops.compressor.weights import CSA_RATIO, HCA_RATIO, CompressorWeights
from streamindex_service.ops.implementations import UnsupportedImplementationError

__all__ = [
    "CSA_RATIO",
    "HCA_RATIO",
    "IMPLEMENTATIONS",
    "CheckReport",
    "CompressorInputError",
    "CompressorState",
    "CompressorWeights",
    "Implementation",
    "StateError",
    "UnsupportedImplementationError",
    "check_compressed",
    "compress",
    "find_implementation",
    "rotary_frequencies",
]
