"""What the package promises as a package: its imports, its names, its addresses."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import streamindex_client
from streamindex_client import AsyncClient, AsyncKeyCache, Client, ClientOptions, InputError, KeyCache
from streamindex_client.target import channel_options, grpc_target

MODULES = [name for _, name, _ in pkgutil.iter_modules(streamindex_client.__path__, "streamindex_client.")]


def test_nothing_but_grpc_protobuf_numpy_is_imported():
    code = (
        "import sys, grpc, google.protobuf, numpy\n"  # gRPC itself brings in its tools where they are installed
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import streamindex_client\n"
        "roots = {name.partition('.')[0] for name in sys.modules} - before\n"
        "print(*sorted(roots - sys.stdlib_module_names))"
    )
    env = os.environ | {"PYTHONPATH": str(Path(streamindex_client.__path__[0]).parent)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert set(run.stdout.split()) <= {"streamindex", "streamindex_client", "crc32c", "_crc32c"}


@pytest.mark.parametrize("module", ["streamindex_client", *MODULES, "streamindex.checksum", "streamindex.joining"])
def test_all_names_exist_and_are_documented(module):
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    assert len(loaded.__all__) == len(set(loaded.__all__))
    for name in loaded.__all__:
        value = getattr(loaded, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name


@pytest.mark.parametrize(("blocking", "asynchronous"), [(Client, AsyncClient), (KeyCache, AsyncKeyCache)])
def test_both_clients_have_the_same_methods(blocking, asynchronous):
    def surface(kind):
        members = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: [(each.name, each.default, each.annotation) for each in inspect.signature(member).parameters.values()]
            for name, member in members
            if not name.startswith("_")
        }

    assert surface(blocking) == surface(asynchronous)


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("unix:///run/s.sock", "unix:///run/s.sock"),
        ("unix:s.sock", "unix:s.sock"),
        ("localhost:50051", "localhost:50051"),
        ("tcp://10.0.0.1:50051", "10.0.0.1:50051"),
        ("[::1]:50051", "[::1]:50051"),
        ("dns:///host:1", "dns:///host:1"),
    ],
)
def test_addresses(address, target):
    assert grpc_target(address) == target


@pytest.mark.parametrize(
    "address", ["", "localhost", "unix:", "unix://", "http://h:1", "h:0", "h:70000", "h:x", "a b:1"]
)
def test_addresses_that_are_none(address):
    with pytest.raises(InputError, match="target"):
        streamindex_client.connect(address)


def test_channel_options():
    plain = dict(channel_options(ClientOptions()))
    assert plain["grpc.max_receive_message_length"] >= 32 * ClientOptions().chunk_bytes
    assert "grpc.keepalive_time_ms" not in plain
    assert dict(channel_options(ClientOptions(keepalive_s=2.5)))["grpc.keepalive_time_ms"] == 2500
