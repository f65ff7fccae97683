"""Services that many tests share; a test that kills or wears out a service starts its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls
from tests.support.inprocess import InProcessServer, caller_in_metadata
from tests.support.services import ROOMY, TIGHT, is_idle, wait_for

# How fast this machine is says nothing about what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def roomy_service() -> Iterator[RunningService]:
    with RunningService(ROOMY, tcp=True) as service:
        yield service


@pytest.fixture(scope="session")
def tight_service() -> Iterator[RunningService]:
    with RunningService(TIGHT) as service:
        yield service


@pytest.fixture(scope="session")
def inside() -> Iterator[InProcessServer]:
    """A server in this process whose callers say who they are."""
    with InProcessServer(ROOMY, caller_in_metadata) as server:
        yield server


@pytest.fixture
def calls(roomy_service: RunningService) -> Iterator[Calls]:
    with Calls(roomy_service.address) as connection:
        yield connection


@pytest.fixture
def tight(tight_service: RunningService) -> Iterator[Calls]:
    """Calls on the service with little of everything; empty at the start and at the end of a test."""
    with Calls(tight_service.address) as connection:
        yield connection
        wait_for(lambda: is_idle(connection.load()))
