"""For how long rows gather, on a clock of the test's own."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from streamindex_service.frontend.gathering import Gathering


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be set."""
    made = SimpleNamespace(now=0.0)
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: SimpleNamespace(time=lambda: made.now))
    return made


def gathering(others=0, left_s=None, **more):
    turns = SimpleNamespace(waiting=others)
    return Gathering(turns, lambda: left_s, **{"with_others": True, **more})


def ends_at(rows, *, for_copy_s=0.0, full=False):
    return rows.ends_at(for_copy_s=for_copy_s, full=full)


def test_alone_the_first_rows_go_at_once_and_those_after_them_2_ms_later(clock):
    rows = gathering()
    rows.rows_came(unasked=False)
    assert ends_at(rows) == 0.0
    rows.tile_went()
    clock.now = 0.001
    rows.rows_came(unasked=True)
    assert ends_at(rows) == pytest.approx(0.002)


@pytest.mark.parametrize(("others", "seconds"), [(5, 0.012), (1000, 0.1)])
def test_each_stream_that_waits_for_the_loop_is_worth_2_ms(clock, others, seconds):
    rows = gathering(others)
    assert ends_at(rows) == pytest.approx(min(0.002 * others, 0.1))
    rows.tile_went()
    assert ends_at(rows) == pytest.approx(seconds)


def test_a_decode_step_waits_for_no_others(clock):
    rows = gathering(50, with_others=False)
    rows.tile_went()
    rows.rows_came(unasked=True)
    assert ends_at(rows) == pytest.approx(0.002)


def test_while_rows_keep_coming_they_gather_for_several_turns_of_the_others(clock):
    rows = gathering(9)
    rows.tile_went()
    for clock.now in (0.02, 0.04, 0.06):
        rows.rows_came(unasked=True)
        assert ends_at(rows) == pytest.approx(clock.now + 2 * 0.02)
    for clock.now in (0.08, 0.1, 0.12, 0.14, 0.155):
        rows.rows_came(unasked=True)
    assert ends_at(rows) == pytest.approx(8 * 10 * 0.002)  # since the last tile went, whatever comes


def test_who_waits_for_its_answers_is_not_kept_waiting_for_more(clock):
    rows = gathering(9)
    rows.tile_went()
    clock.now = 0.03
    rows.rows_came(unasked=False)
    assert ends_at(rows) <= clock.now


def test_a_full_tile_gathers_for_a_copy_alone(clock):
    rows = gathering(9)
    rows.tile_went()
    rows.rows_came(unasked=True)
    assert ends_at(rows, full=True) == 0.0
    assert ends_at(rows, for_copy_s=0.7, full=True) == pytest.approx(0.7)


@pytest.mark.parametrize("for_copy_s", [0.0, 5.0])
def test_no_more_than_half_of_what_is_left_to_the_deadline(clock, for_copy_s):
    rows = gathering(40, left_s=0.03)
    rows.tile_went()
    clock.now = 0.001
    rows.rows_came(unasked=True)
    assert ends_at(rows, for_copy_s=for_copy_s) == pytest.approx(0.001 + 0.015)
