"""Key and value rows of one shared head, as sparse attention gathers them, in bf16 or packed in 8 bits."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

ROTARY_DIM = 64  # of packed rows: the last 64 elements of a key stay bf16
_AMAX_FLOOR = 1e-4
_E4M3_MAX = 448.0
_UE8M0_BIAS = 127


class KvFormat(StrEnum):
    """Element format of KV rows.

    BF16: [rows, key_dim] bf16.
    FP8_D512: 448 e4m3 values and 64 bf16 rotary values (576 B), and beside them one ue8m0 scale for each 64 of the 448
    and a byte of padding: 584 B a row.
    FP8_D576: 512 e4m3 values, a float32 scale for each 128 of them, 64 bf16 rotary values: 656 B a row. Where a scale
    is no power of two, most kernels round the elements to bf16 as they widen them; torch and the kernel for few heads
    do not.
    """

    BF16 = "bf16"
    FP8_D512 = "fp8_d512"
    FP8_D576 = "fp8_d576"

    @property
    def packed(self) -> "Packing | None":
        """How a row's bytes lie, None where they are elements of one type."""
        return _PACKINGS.get(self)


@dataclass(frozen=True)
class Packing:
    """A packed row: `narrow` e4m3 values, `group` of which share a scale, then (with scales inside) float32 scales,
    then 64 bf16 values. row_bytes: without the scales beside it, of which there are `scale_bytes`."""

    narrow: int
    group: int
    row_bytes: int
    scale_bytes: int

    @property
    def key_dim(self) -> int:
        """Elements of a key."""
        return self.narrow + ROTARY_DIM

    @property
    def rotary_offset(self) -> int:
        """Byte at which the rotary values of a row begin."""
        return self.row_bytes - 2 * ROTARY_DIM


_PACKINGS = {
    KvFormat.FP8_D512: Packing(narrow=448, group=64, row_bytes=576, scale_bytes=8),
    KvFormat.FP8_D576: Packing(narrow=512, group=128, row_bytes=656, scale_bytes=0),
}


@dataclass(frozen=True)
class KvRows:
    """Rows that every query head shares.

    data: [rows, key_dim] bf16, or [rows, row_bytes] uint8 of a packed format; contiguous, aligned to 16 bytes.
    scales: [rows, 8] uint8 for FP8_D512 (7 ue8m0 exponents and padding), else None.

    Raises ValueError if the parts disagree.
    Source of the packed formats: the KV caches of DeepSeek-V4 (584 B) and DeepSeek-V3.2 (656 B) in FlashMLA.
    """

    format: KvFormat
    data: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        packing = self.format.packed
        dtype = torch.bfloat16 if packing is None else torch.uint8
        if self.data.dim() != 2 or self.data.dtype != dtype or not self.data.is_contiguous():
            raise ValueError(
                f"data: expected contiguous [rows, n] {dtype}, got {list(self.data.shape)} {self.data.dtype}"
            )
        if packing is not None and self.data.shape[1] != packing.row_bytes:
            raise ValueError(
                f"data: rows of {self.format.value} have {packing.row_bytes} bytes, got {self.data.shape[1]}"
            )
        if self.data.data_ptr() % 16:
            raise ValueError("data: its address is not a multiple of 16 bytes")
        scale_bytes = 0 if packing is None else packing.scale_bytes
        if (self.scales is not None) != bool(scale_bytes):
            raise ValueError(f"scales: format {self.format.value} takes {'them' if scale_bytes else 'none'}")
        if self.scales is not None:
            _check_scales(self.scales, self.data, scale_bytes)

    @property
    def rows(self) -> int:
        """Rows that indices may name."""
        return self.data.shape[0]

    @property
    def key_dim(self) -> int:
        """Elements of a key."""
        packing = self.format.packed
        return self.data.shape[1] if packing is None else packing.key_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, scales included."""
        beside = 0 if self.scales is None else self.scales.shape[1]
        return self.data.shape[1] * self.data.element_size() + beside

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.data.device

    def gather(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The keys of `rows` (any shape, int64, all valid) as values of `dtype`: [*rows.shape, key_dim]."""
        data, packing = self.data[rows], self.format.packed
        if packing is None:
            return data.to(dtype)
        narrow = data[..., : packing.narrow].view(torch.float8_e4m3fn).to(dtype)
        rotary = data[..., packing.rotary_offset :].view(torch.bfloat16).to(dtype)
        if self.scales is None:
            scales = data[..., packing.narrow : packing.rotary_offset].contiguous().view(torch.float32).to(dtype)
        else:
            exponents = self.scales[rows][..., : packing.narrow // packing.group].to(torch.int32) - _UE8M0_BIAS
            scales = torch.exp2(exponents.to(dtype))
        return torch.cat([narrow * scales.repeat_interleave(packing.group, dim=-1), rotary], dim=-1)


def _check_scales(scales: Tensor, data: Tensor, scale_bytes: int) -> None:
    if tuple(scales.shape) != (data.shape[0], scale_bytes) or scales.dtype != torch.uint8:
        raise ValueError(f"scales: expected [{data.shape[0]}, {scale_bytes}] uint8, got {list(scales.shape)}")
    if not scales.is_contiguous() or scales.device != data.device:
        raise ValueError("scales: not contiguous, or not on the device of the rows")
    if scales.data_ptr() % 8:
        raise ValueError("scales: their address is not a multiple of 8 bytes")


def pack_rows(keys: Tensor, kv_format: KvFormat) -> KvRows:
    """Rows of that format from `keys` [rows, key_dim] of any float type.

    The reference quantiser: amax of a group clamped to 1e-4 at least, scale 2^ceil(log2(amax / 448)), round to nearest
    even. Raises ValueError for another key_dim than the format's.
    """
    packing = kv_format.packed
    if packing is None:
        return KvRows(kv_format, keys.to(torch.bfloat16).contiguous())
    if keys.dim() != 2 or keys.shape[1] != packing.key_dim:
        raise ValueError(f"keys: expected [rows, {packing.key_dim}], got {list(keys.shape)}")
    groups = keys[:, : packing.narrow].float().reshape(keys.shape[0], packing.narrow // packing.group, packing.group)
    exponent = (groups.abs().amax(dim=2).clamp(min=_AMAX_FLOOR) / _E4M3_MAX).log2().ceil()
    narrow = (groups * torch.exp2(-exponent)[:, :, None]).clamp(-_E4M3_MAX, _E4M3_MAX)
    parts = [narrow.flatten(1).to(torch.float8_e4m3fn).view(torch.uint8)]
    scales = None
    if packing.scale_bytes:
        scales = torch.zeros((keys.shape[0], packing.scale_bytes), dtype=torch.uint8, device=keys.device)
        scales[:, : exponent.shape[1]] = (exponent + _UE8M0_BIAS).to(torch.uint8)
    else:
        parts.append(torch.exp2(exponent).contiguous().view(torch.uint8))
    parts.append(keys[:, packing.narrow :].to(torch.bfloat16).contiguous().view(torch.uint8))
    return KvRows(kv_format, torch.cat(parts, dim=1), scales)
