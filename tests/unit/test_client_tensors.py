from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streamindex_client import InputError, KeyFormat
from streamindex_client.model import KeyCacheSpec
from streamindex_client.requests import key_rows, query_block
from streamindex_client.tensors import float_rows, is_tensor, maker_like, position_rows, unsigned

DTYPES = {
    KeyFormat.BF16: torch.bfloat16,
    KeyFormat.FP16: torch.float16,
    KeyFormat.FP32: torch.float32,
    KeyFormat.FP8_E4M3: torch.float8_e4m3fn,
}


def spec(key_format: KeyFormat) -> KeyCacheSpec:
    return KeyCacheSpec(2, 16, 1, key_format, 1)


@pytest.mark.parametrize("key_format", KeyFormat)
def test_torch_rows_are_views(key_format):
    keys = torch.randn(30, 16).to(DTYPES[key_format])
    rows = float_rows("keys", keys, (None, 16), key_format.dtype_names)
    assert (rows.count, rows.row_bytes) == (30, 16 * key_format.element_bytes)
    view = rows.view(5, 9)
    assert bytes(view) == bytes(keys[5:9].contiguous().view(torch.uint8).numpy().tobytes())
    assert np.frombuffer(view, np.uint8).ctypes.data == keys.data_ptr() + 5 * rows.row_bytes
    assert (view.format, view.ndim) == ("B", 1)


@pytest.mark.parametrize("dtype", [np.uint16, np.float16, np.float32, np.uint8])
def test_numpy_rows_are_views(dtype):
    keys = np.arange(480).reshape(30, 16).astype(dtype)
    rows = float_rows("keys", keys, (None, 16), (np.dtype(dtype).name,))
    view = rows.view(5, 9)
    assert bytes(view) == keys[5:9].tobytes()
    assert np.shares_memory(np.frombuffer(view, np.uint8), keys)


def test_layouts_that_are_not_contiguous_are_copied_by_the_chunk():
    array = np.arange(960, dtype=np.float32).reshape(30, 32)[:, ::2]
    for keys in (array, torch.from_numpy(array.copy().repeat(2, 1))[:, ::2], array.astype(">f4")):
        rows = float_rows("keys", keys, (None, 16), ("float32",))
        assert bytes(rows.view(3, 7)) == array[3:7].tobytes()
    read_only = array.copy()
    read_only.flags.writeable = False
    assert bytes(float_rows("keys", read_only, (None, 16), ("float32",)).view(0, 30)) == array.tobytes()


def test_tensors_that_require_gradients():
    keys = torch.ones(3, 16, requires_grad=True)
    assert len(float_rows("keys", keys, (None, 16), ("float32",)).view(0, 3)) == 192


def test_bits_that_stand_for_a_format():
    assert key_rows(spec(KeyFormat.BF16), np.zeros((4, 16), np.uint16), None).row_bytes == 32
    scales = np.ones(4, np.float32)
    assert key_rows(spec(KeyFormat.FP8_E4M3), np.zeros((4, 16), np.uint8), scales).row_bytes == 20


@pytest.mark.parametrize(
    ("key_format", "keys", "scales", "text"),
    [
        (KeyFormat.BF16, np.zeros((4, 15), np.uint16), None, r"keys: has shape \[4, 15\], expected \[keys, head_dim\]"),
        (KeyFormat.BF16, np.zeros(16, np.uint16), None, "keys: has shape"),
        (KeyFormat.BF16, torch.zeros(4, 16), None, "keys: has dtype float32, expected bfloat16 or uint16"),
        (KeyFormat.FP16, np.zeros((4, 16), np.uint16), None, "keys: has dtype uint16, expected float16"),
        (KeyFormat.BF16, [[0.0] * 16], None, "keys: got list"),
        (KeyFormat.FP16, np.zeros((4, 16), np.float16), np.ones(4, np.float32), "scales: are not used with fp16"),
        (KeyFormat.FP8_E4M3, np.zeros((4, 16), np.uint8), None, "scales: are required with fp8_e4m3"),
        (KeyFormat.FP8_E4M3, np.zeros((4, 16), np.uint8), np.ones(3, np.float32), "scales: has shape"),
        (KeyFormat.FP8_E4M3, np.zeros((4, 16), np.uint8), np.ones(4), "scales: has dtype float64, expected float32"),
    ],
)
def test_mistakes_name_the_argument_and_the_expectation(key_format, keys, scales, text):
    with pytest.raises(InputError, match=text):
        key_rows(spec(key_format), keys, scales)


def test_answers_are_of_the_queries_kind():
    answer = np.frombuffer(b"\x01\0\0\0\x02\0\0\0", "<i4").reshape(1, 2)
    assert maker_like(np.zeros(1))(answer) is answer
    made = maker_like(torch.zeros(1))(answer)
    assert isinstance(made, torch.Tensor)
    assert made.dtype == torch.int32
    assert made.tolist() == [[1, 2]]
    made[0, 0] = 5  # a copy of the read-only bytes


def test_a_mixed_block():
    q = torch.zeros(3, 2, 16, dtype=torch.bfloat16)
    block = query_block(spec(KeyFormat.BF16), q, np.zeros((3, 2), np.float32), torch.tensor([3, 1, 2]))
    assert block.positions is not None
    assert block.row_bytes == 64 + 8 + 8
    assert np.frombuffer(block.positions.view(1, 3), "<i8").tolist() == [1, 2]


@given(st.lists(st.integers(0, 2**63 - 1), max_size=20), st.sampled_from([np.int64, np.uint64]))
def test_positions_of_any_integer_type(values, dtype):
    rows = position_rows("positions", np.array(values, dtype), None)
    assert np.frombuffer(rows.view(0, len(values)), "<i8").tolist() == values


@pytest.mark.parametrize("value", [[2**63], np.array([[1]]), [-1], [1.5], 7])
def test_positions_that_are_none(value):
    with pytest.raises(InputError, match="positions"):
        position_rows("positions", value, None)


def test_numbers():
    assert unsigned("n", np.int32(5), 32) == 5
    for bad in (-1, 2**32, 1.0, "1", None, True):
        with pytest.raises(InputError, match="n: got"):
            unsigned("n", bad, 32)


def test_what_is_a_tensor():
    assert is_tensor(np.zeros(1))
    assert is_tensor(torch.zeros(1))
    assert not is_tensor(iter([]))
    assert not is_tensor([1])
