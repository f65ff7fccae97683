"""What a client proves who it is with, and how it knows the server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from streamindex_client.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tls", "call_metadata", "channel_credentials", "tls_options"]

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS to the server; PEM files, read when a client is made.

    `ca_file`: authorities that the server's certificate must come from; None takes those of this host.
    `certificate_file` and `key_file`: this client's own, for a server that asks for one. `server_name`: what the
    server's certificate says, where that is not the host in the address.
    """

    ca_file: str | Path | None = None
    certificate_file: str | Path | None = None
    key_file: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate_file is None) != (self.key_file is None):
            raise InputError("tls", "certificate_file and key_file go together")


def channel_credentials(
    target: str, tls: Tls | None, credentials: grpc.ChannelCredentials | None
) -> grpc.ChannelCredentials | None:
    """The channel's; None for a connection in the clear. Raises InputError."""
    if tls is None:
        return credentials
    if credentials is not None:
        raise InputError("tls", "give tls or credentials, not both")
    if target.startswith("unix:"):
        raise InputError("tls", "a unix socket has no TLS")
    try:
        parts = [None if path is None else Path(path).read_bytes() for path in _files(tls)]
    except OSError as error:
        raise InputError("tls", f"{error.filename}: {error.strerror}") from error
    return grpc.ssl_channel_credentials(*parts)


def tls_options(tls: Tls | None) -> list[tuple[str, str]]:
    """Arguments of the channel."""
    return [] if tls is None or tls.server_name is None else [("grpc.ssl_target_name_override", tls.server_name)]


def call_metadata(target: str, token: str | None, metadata: Sequence[tuple[str, str]], *, secure: bool) -> Metadata:
    """What goes with every call. Raises InputError for a token that would cross a network in the clear."""
    if token is None:
        return tuple(metadata)
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError("token", "expected printable ASCII without spaces")
    if not (secure or target.startswith("unix:") or _is_loopback(target)):
        raise InputError("token", "a token goes over TLS, a unix socket or loopback alone; give tls")
    return (*metadata, ("authorization", f"Bearer {token}"))


def _files(tls: Tls) -> tuple[str | Path | None, ...]:
    return tls.ca_file, tls.key_file, tls.certificate_file


def _is_loopback(target: str) -> bool:
    host = target.rpartition("/")[2].rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
