"""How the commands reach a service: address, TLS, token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from streamindex_client import Client, Tls

EXIT_FAILED = 1
EXIT_USAGE = 2
_CALL_TIMEOUT_S = 5.0

CaOption = Annotated[
    Path | None,
    typer.Option("--ca-file", metavar="FILE", envvar="STREAMINDEX_CA_FILE", help="Authorities of the server: TLS."),
]
CertificateOption = Annotated[
    Path | None,
    typer.Option("--certificate-file", metavar="FILE", envvar="STREAMINDEX_CERTIFICATE_FILE", help="This client's."),
]
KeyOption = Annotated[
    Path | None,
    typer.Option("--key-file", metavar="FILE", envvar="STREAMINDEX_KEY_FILE", help="Key of that certificate."),
]
TokenOption = Annotated[
    Path | None,
    typer.Option("--token-file", metavar="FILE", envvar="STREAMINDEX_TOKEN_FILE", help="File that holds a token."),
]


class CommandError(Exception):
    """A failure to be told in one line; `exit_code` is the process's."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Connection:
    """To a service at `target`. A token is read from a file: an argument would be in the list of processes."""

    target: str
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    token_file: Path | None = None

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """A client. Whatever fails within is a CommandError."""
        import streamindex_client

        # a person waits: one attempt, and the reason why it failed
        options = streamindex_client.ClientOptions(
            retry=streamindex_client.RetryPolicy(max_attempts=1), default_timeout_s=_CALL_TIMEOUT_S
        )
        with (
            reported_errors(),
            streamindex_client.connect(self.target, options=options, tls=self._tls(), token=self._token()) as client,
        ):
            yield client

    def watched(self, interval_s: float) -> Iterator[Any]:
        """The service's load, again and again. Raises CommandError."""
        import grpc
        from streamindex.v1 import server_pb2, server_pb2_grpc
        from streamindex_client.credentials import call_metadata

        request = server_pb2.WatchLoadRequest(interval_ms=int(1000 * interval_s))
        try:
            with reported_errors(), self._channel() as channel:
                metadata = call_metadata(self.target, self._token(), (), secure=self._tls() is not None)
                stub: Any = server_pb2_grpc.ServerServiceStub(channel)  # type: ignore[no-untyped-call]
                for answer in stub.WatchLoad(request, metadata=metadata):
                    yield answer.load
        except grpc.RpcError as error:
            raise CommandError(f"{self.target}: {error.code().name}: {error.details()}") from error

    def health(self) -> str:
        """The service's word in grpc.health.v1, or why there is none. It needs no token."""
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        try:
            with reported_errors(), self._channel() as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    def _channel(self) -> Any:
        import grpc
        from streamindex_client.credentials import channel_credentials
        from streamindex_client.target import grpc_target

        credentials = channel_credentials(self.target, self._tls(), None)
        if credentials is None:
            return grpc.insecure_channel(grpc_target(self.target))
        return grpc.secure_channel(grpc_target(self.target), credentials)

    def _tls(self) -> Tls | None:
        import streamindex_client

        if not (self.ca_file or self.certificate_file or self.key_file):
            return None
        return streamindex_client.Tls(self.ca_file, self.certificate_file, self.key_file)

    def _token(self) -> str | None:
        try:
            return None if self.token_file is None else self.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"the token cannot be read: {error}", EXIT_USAGE) from error


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Errors of the client library become one line; what the caller gave wrongly is a matter of usage."""
    from streamindex_client.errors import InputError, StreamIndexError

    try:
        yield
    except InputError as error:
        raise CommandError(str(error), EXIT_USAGE) from error
    except StreamIndexError as error:
        raise CommandError(str(error)) from error
