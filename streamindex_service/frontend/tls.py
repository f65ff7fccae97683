"""TLS of the TCP address: files that may be replaced while the service runs.

gRPC asks for the configuration at every handshake, on threads of its own; files that have not changed are not read
again. A pair that does not fit, as between the replacements of its two files, leaves the last good one in force.
"""

from __future__ import annotations

import ssl
import threading
from pathlib import Path
from typing import Any

import grpc

_Version = tuple[tuple[int, int, int], ...]


class TlsError(Exception):
    """The files are no certificate with its key. The message names files and never holds what is in them."""


class TlsFiles:
    """A certificate chain, its key, and the authorities of clients ("" for none), all PEM."""

    def __init__(self, certificate_file: str, key_file: str, client_ca_file: str, log: Any) -> None:
        self._certificate, self._key = Path(certificate_file), Path(key_file)
        self._client_ca = Path(client_ca_file) if client_ca_file else None
        self._log = log
        self._lock = threading.Lock()
        self._seen: _Version = ()

    def credentials(self) -> grpc.ServerCredentials:
        """For a port. Raises TlsError."""
        self._seen = self._version()
        return grpc.dynamic_ssl_server_credentials(self._read(), self._fetch, self._client_ca is not None)

    def _fetch(self) -> Any:
        """What the next handshake uses; None for what the last one did. Raises nothing."""
        with self._lock:
            try:
                version = self._version()
                if version == self._seen:
                    return None
                configuration = self._read()
            except TlsError as error:
                self._log.error("tls_files_not_read", detail=str(error))
                return None
            self._seen = version
        self._log.info("tls_files_read")
        return configuration

    def _read(self) -> Any:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # gRPC would take anything, and fail at the first handshake.
            context.load_cert_chain(self._certificate, self._key, password=_no_passphrase)
            if self._client_ca is not None:
                context.load_verify_locations(self._client_ca)
            authorities = None if self._client_ca is None else self._client_ca.read_bytes()
            pair = self._key.read_bytes(), self._certificate.read_bytes()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            raise TlsError(f"{self._names()}: {reason}") from error
        return grpc.ssl_server_certificate_configuration([pair], authorities)

    def _version(self) -> _Version:
        found = []
        for path in filter(None, (self._certificate, self._key, self._client_ca)):
            try:
                status = path.stat()
            except OSError as error:
                raise TlsError(f"{path}: {error.strerror}") from error
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return tuple(found)

    def _names(self) -> str:
        return ", ".join(str(path) for path in (self._certificate, self._key, self._client_ca) if path)


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase")
