"""The other half of the histories: see support/histories.py."""

from __future__ import annotations

import pytest

from streamindex_service.testing.simulation import HISTORIES
from tests.support.histories import CHUNK, play


@pytest.mark.parametrize("first", range(HISTORIES // 2, HISTORIES, CHUNK))
def test_any_history(first: int) -> None:
    play(first)
