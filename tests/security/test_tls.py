"""TLS, client certificates and tokens over real sockets, through the client library; files are replaced on the way."""

from __future__ import annotations

import asyncio
import datetime
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streamindex_client
from streamindex_client import (
    AuthenticationError,
    ClientOptions,
    InputError,
    NotFoundError,
    PermissionDeniedError,
    RetryPolicy,
    Tls,
    UnavailableError,
)

from streamindex_service.config import Settings
from streamindex_service.frontend.server import CredentialsError, Server
from streamindex_service.frontend.tokens import new_token
from streamindex_service.testing.service import RunningService, ServiceStartError
from tests.support.certificates import Authority, Pair
from tests.support.services import ROOMY, wait_for

ONCE = ClientOptions(retry=RetryPolicy(max_attempts=1), default_timeout_s=10.0)
SPEC: dict[str, Any] = {"heads": 2, "head_dim": 32, "ratio": 1, "key_format": "bf16", "layers": 1}


class Place:
    """Authorities, certificates, tokens, in files."""

    def __init__(self, directory: Path) -> None:
        self.ours, self.theirs = Authority(directory, "ours"), Authority(directory, "theirs")
        self.server = self.ours.issue("server", file="server", host=True)
        self.tokens = {name: new_token(name) for name in ("one", "two", "late")}
        self.token_file = directory / "tokens"
        self.token_file.write_text("\n".join(self.tokens[name][1] for name in ("one", "two")))

    def tls(self, **others: str) -> dict[str, str]:
        return {"certificate_file": str(self.server.certificate), "key_file": str(self.server.key), **others}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def with_tokens(place) -> Iterator[RunningService]:
    settings = {**ROOMY, "tls": place.tls(), "auth": {"token_file": str(place.token_file)}}
    with RunningService(settings, tcp=True) as service:
        yield service


@pytest.fixture(scope="module")
def with_certificates(place) -> Iterator[RunningService]:
    with RunningService({**ROOMY, "tls": place.tls(client_ca_file=str(place.ours.file))}, tcp=True) as service:
        yield service


def client(service: RunningService, place: Place, token: str | None = None, pair: Pair | None = None, **others: Any):
    own = {} if pair is None else {"certificate_file": pair.certificate, "key_file": pair.key}
    tls = Tls(ca_file=place.ours.file, **own)
    return streamindex_client.connect(service.tcp_address, tls=tls, token=token, options=ONCE, **others)


def test_a_token_over_tls(with_tokens, place):
    with (
        client(with_tokens, place, place.tokens["one"][0]) as one,
        client(with_tokens, place, place.tokens["two"][0]) as two,
    ):
        cache = one.create_key_cache(**SPEC)
        assert [each.id for each in one.list_key_caches()] == [cache.id]
        assert list(two.list_key_caches()) == []
        with pytest.raises(NotFoundError):
            two.open_key_cache(cache.id)
        cache.delete()


def test_the_asyncio_client_too(with_tokens, place):
    async def load() -> bool:
        tls = Tls(ca_file=place.ours.file)
        token = place.tokens["one"][0]
        async with streamindex_client.connect_async(with_tokens.tcp_address, tls=tls, token=token) as one:
            return (await one.load()).ready

    assert asyncio.run(load())


def test_no_token_and_a_wrong_one(with_tokens, place):
    with client(with_tokens, place) as nobody, pytest.raises(AuthenticationError):
        nobody.load()
    with client(with_tokens, place, place.tokens["late"][0]) as wrong, pytest.raises(PermissionDeniedError):
        wrong.load()


def test_the_unix_socket_asks_for_a_token_as_well(with_tokens, place):
    with streamindex_client.connect(with_tokens.address, options=ONCE) as nobody, pytest.raises(AuthenticationError):
        nobody.load()
    with streamindex_client.connect(with_tokens.address, token=place.tokens["one"][0], options=ONCE) as one:
        assert one.load().ready


def test_a_server_of_another_authority_is_not_believed(with_tokens, place):
    tls = Tls(ca_file=place.theirs.file)
    there = streamindex_client.connect(with_tokens.tcp_address, tls=tls, options=ONCE)
    with there, pytest.raises(UnavailableError):
        there.load()


def test_nothing_is_served_in_the_clear(with_tokens, place):
    with streamindex_client.connect(with_tokens.tcp_address, options=ONCE) as plain, pytest.raises(UnavailableError):
        plain.load()


def test_tokens_come_and_go_while_the_service_runs(with_tokens, place):
    before = place.token_file.read_text()
    with client(with_tokens, place, place.tokens["late"][0]) as late:

        def served() -> bool:
            try:
                return late.load().ready
            except PermissionDeniedError:
                return False

        assert not served()
        place.token_file.write_text(f"{before}\n{place.tokens['late'][1]}\n")
        wait_for(served)
        place.token_file.write_text("this is no file of tokens")
        with client(with_tokens, place, place.tokens["one"][0]) as one:
            wait_for(lambda: "token_file_not_read" in with_tokens.log_tail() or one.load() is None)
            assert one.load().ready, "the last good file holds"
        place.token_file.write_text(before)
        wait_for(lambda: not served())
    assert place.tokens["one"][0] not in with_tokens.log_tail()


@pytest.mark.parametrize("caller", ["no certificate", "another authority", "expired"])
def test_whose_certificate_is_not_good_gets_no_connection(with_certificates, place, caller):
    pair = {
        "no certificate": lambda: None,
        "another authority": lambda: place.theirs.issue("model-server"),
        "expired": lambda: place.ours.issue("late", lasts=-datetime.timedelta(hours=1)),
    }[caller]()
    with client(with_certificates, place, pair=pair) as there, pytest.raises(UnavailableError):
        there.load()


def test_a_certificate_is_an_identity(with_certificates, place):
    pairs = [place.ours.issue("first"), place.ours.issue("second")]
    with (
        client(with_certificates, place, pair=pairs[0]) as first,
        client(with_certificates, place, pair=pairs[1]) as second,
    ):
        cache = first.create_key_cache(**SPEC)
        with pytest.raises(NotFoundError):
            second.open_key_cache(cache.id)
        cache.delete()


def test_the_servers_certificate_is_replaced_while_it_runs(with_certificates, place):
    host, _, port = with_certificates.tcp_address.rpartition(":")
    pair = place.ours.issue("looker")
    context = ssl.create_default_context(cafile=str(place.ours.file))
    context.load_cert_chain(pair.certificate, pair.key)
    context.set_alpn_protocols(["h2"])

    def subject() -> Any:
        with (
            socket.create_connection((host, int(port)), 10) as connection,
            context.wrap_socket(connection, server_hostname="localhost") as secured,
        ):
            certificate = secured.getpeercert()
            assert certificate is not None
            return certificate["subject"]

    assert subject() == ((("commonName", "server"),),)
    key = place.server.key.read_bytes()
    os.truncate(place.server.key, 0)  # as between the two files' replacements
    assert subject() == ((("commonName", "server"),),)
    place.server.key.write_bytes(key)
    place.ours.issue("renewed", file="server", host=True)
    assert subject() == ((("commonName", "renewed"),),)
    assert "BEGIN" not in with_certificates.log_tail()


@pytest.mark.parametrize("wrong", ["absent", "of another key", "no PEM"])
async def test_files_that_are_not_good_stop_the_start(place, tmp_path, wrong):
    key = {"absent": tmp_path / "absent", "of another key": place.theirs.issue("x").key, "no PEM": tmp_path / "text"}[
        wrong
    ]
    (tmp_path / "text").write_text("text")
    settings = Settings(
        **{**ROOMY, "server": {"tcp_address": "127.0.0.1:0"}, "metrics": {"port": 0}},
        tls={"certificate_file": str(place.server.certificate), "key_file": str(key)},
    )
    server = Server(settings)
    with pytest.raises(CredentialsError, match=key.name):
        await server.start()
    await server.stop(0)


def test_a_token_file_that_is_not_there_stops_the_start(tmp_path):
    with pytest.raises(ServiceStartError, match=r"auth\.token_file"):
        RunningService({**ROOMY, "auth": {"token_file": str(tmp_path / "absent")}}).start()


def test_the_client_keeps_a_token_off_the_network():
    for target in ("example.org:1", "10.0.0.1:1", "dns:///example.org:1"):
        with pytest.raises(InputError, match="TLS"):
            streamindex_client.connect(target, token="sidx_x")
    for target in ("localhost:1", "127.0.0.1:1", "[::1]:1", "unix:///x"):
        streamindex_client.connect(target, token="sidx_x").close()
    with pytest.raises(InputError, match="spaces"):
        streamindex_client.connect("localhost:1", token="a b")


def test_tls_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(InputError, match="together"):
        Tls(certificate_file="x")
    with pytest.raises(InputError, match="unix"):
        streamindex_client.connect("unix:///x", tls=Tls())
    with pytest.raises(InputError, match="absent"):
        streamindex_client.connect("localhost:1", tls=Tls(ca_file=tmp_path / "absent"))
