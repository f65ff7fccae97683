"""The number formats that keys and queries may have."""

from enum import StrEnum

import torch


class KeyFormat(StrEnum):
    """Element format of indexer keys and of the queries that search them."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    FP8_E4M3 = "fp8_e4m3"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch element type of keys and queries in this format."""
        return _DTYPES[self]

    @property
    def has_scales(self) -> bool:
        """Whether each key row carries one float32 scale beside its elements."""
        return self is KeyFormat.FP8_E4M3

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return self.torch_dtype.itemsize

    @classmethod
    def from_torch_dtype(cls, dtype: torch.dtype) -> "KeyFormat":
        """The format whose elements are `dtype`.

        Raises ValueError if no format has that element type.
        """
        for key_format, candidate in _DTYPES.items():
            if candidate == dtype:
                return key_format
        raise ValueError(f"no key format has elements of {dtype}; formats are {', '.join(f.value for f in cls)}")


_DTYPES = {
    KeyFormat.BF16: torch.bfloat16,
    KeyFormat.FP16: torch.float16,
    KeyFormat.FP32: torch.float32,
    KeyFormat.FP8_E4M3: torch.float8_e4m3fn,
}
