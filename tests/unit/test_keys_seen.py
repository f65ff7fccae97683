"""How many index keys rows of a stream see: by where they stand, whoever says so."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from streamindex_service.frontend.attend_stream import AttendStream
from streamindex_service.frontend.query_block import POSITIONS, BlockLayout
from streamindex_service.frontend.search_stream import SearchStream


@pytest.mark.parametrize("kind", [SearchStream, AttendStream])
def test_rows_in_any_order_see_what_the_last_of_them_sees(kind):
    layout = BlockLayout.packed((16, 4, 8, 8, 0), 4096)
    block = SimpleNamespace(data=np.zeros(4096, np.uint8))
    written = layout.part(block, POSITIONS, 0, 5).view(np.int64)
    written[:] = [900, 3, 2**62, 70, 8]
    stream = object.__new__(kind)
    seen = SimpleNamespace(keys_seen=lambda position: min((position + 1) // 4, 1000))
    stream._layout, stream._tiles, stream._admitted = layout, seen, seen
    assert stream._keys_at(block, 0, 2) == 225
    assert stream._keys_at(block, 3, 2) == 17
    assert stream._keys_at(block, 0, 5) == 1000
