"""What the doctor looks at where the settings name files, directories and other services: TLS, tokens, users of the
socket, the spill directory, the metrics port, the collector of traces."""

from __future__ import annotations

import http.client
import importlib.util
import os
import pwd
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from streamindex_service.config import AuthSettings, MemorySettings, MetricsSettings, TlsSettings, TraceSettings
from streamindex_service.findings import Finding, Level
from streamindex_service.frontend import tokens
from streamindex_service.frontend.spill_files import SpillFiles

_SOON_S = 14 * 86_400.0
_TIMEOUT_S = 2.0
_OTEL_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc")


def check_tls(settings: TlsSettings) -> Iterator[Finding]:
    """Certificate, key and authorities, as a handshake takes them; nothing without `tls.certificate_file`."""
    if not settings.certificate_file:
        return
    yield check_key_file(settings.key_file)
    yield check_certificate(settings.certificate_file, settings.key_file)
    if settings.client_ca_file:
        yield check_client_ca(settings.client_ca_file)


def check_key_file(path: str) -> Finding:
    """The private key can be read, by its owner alone."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        return _unreadable("tls key", path, error)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        remedy = f"chmod 600 {path}, and make the service's user its owner."
        return Finding("tls key", Level.WARN, f"{path}: others than its owner may read or write it", remedy)
    return Finding("tls key", Level.OK, f"{path} is its owner's")


def check_certificate(path: str, key_file: str) -> Finding:
    """The certificate is the key's, good for a server, and good now: two ends in memory make a handshake with it."""
    name = "tls certificate"
    try:
        not_after = _handshake(path, key_file)
    except ssl.SSLCertVerificationError as error:
        remedy = "Issue a new one for a server; it is taken at the next handshake, without a restart."
        return Finding(name, Level.FAIL, f"{path}: {error.verify_message}", remedy)
    except ssl.SSLError as error:
        remedy = "tls.certificate_file is a PEM chain, the service's own first; tls.key_file its key, unencrypted."
        return Finding(name, Level.FAIL, f"{path} with {key_file}: {error.reason or error}", remedy)
    except (OSError, ValueError) as error:
        return _unreadable(name, f"{path} with {key_file}", error)
    return _valid_until(name, path, not_after)


def check_client_ca(path: str) -> Finding:
    """There are authorities of clients, and they are good now."""
    name = "tls client authorities"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        return Finding(name, Level.FAIL, f"{path}: {error.reason or error}", "It must hold PEM certificates.")
    except OSError as error:
        return _unreadable(name, path, error)
    ends = [ssl.cert_time_to_seconds(str(each["notAfter"])) for each in context.get_ca_certs()]
    if not ends:
        remedy = "Name the certificate of the authority that issues clients' certificates."
        return Finding(name, Level.FAIL, f"{path}: no certificate in it is an authority's", remedy)
    if max(ends) <= time.time():
        return Finding(name, Level.FAIL, f"{path}: expired; no client gets a connection", "Name an authority in force.")
    return _valid_until(name, path, min(ends))


def check_callers(settings: AuthSettings) -> Iterator[Finding]:
    """Tokens can be read and users of the socket exist; nothing where the settings name none."""
    if settings.token_file:
        yield check_token_file(settings.token_file)
    unknown = [uid for uid in settings.unix_uids if not _is_user(uid)]
    if unknown:
        text = f"auth.unix_uids: no user of this host is {', '.join(map(str, unknown))}"
        yield Finding("unix users", Level.WARN, text, "Correct the number, unless the user is made by a container.")
    elif settings.unix_uids:
        yield Finding("unix users", Level.OK, f"{len(settings.unix_uids)} may call on the unix socket")


def check_token_file(path: str) -> Finding:
    """Tokens can be read, and nobody else may write them."""
    remedy = "`streamindex token new NAME` prints a token, and the line for this file."
    try:
        found = tokens.read(Path(path))
    except tokens.TokenFileError as error:
        return Finding("token file", Level.FAIL, str(error), remedy)
    except OSError as error:
        return _unreadable("token file", path, error)
    if not found:
        return Finding("token file", Level.WARN, f"{path} has no token: no one can call with one", remedy)
    return Finding("token file", Level.OK, f"{path}: {len(found)} tokens")


def check_spill(settings: MemorySettings) -> Iterator[Finding]:
    """Keys can be spilled where the settings say, and there is room for them; nothing without `memory.spill_dir`."""
    directory, name = settings.spill_dir, "spill directory"
    if not directory:
        return
    files = SpillFiles(directory, lambda close: close())
    try:
        files.check()
        free = shutil.disk_usage(directory).free
    except OSError as error:
        remedy = f"Make it, on a local disk, for the service's user alone: install -d -m 700 {directory}"
        yield Finding(name, Level.FAIL, f"{directory}: {error.strerror or error}", remedy)
        return
    finally:
        files.close()
    text = f"{directory}: {_gib(free)} free, memory.spill_bytes {_gib(int(settings.spill_bytes))}"
    if free >= settings.spill_bytes:
        yield Finding(name, Level.OK, text)
    else:
        remedy = "Lower memory.spill_bytes or free the disk; a full disk spills nothing, and HOST_MEMORY comes sooner."
        yield Finding(name, Level.WARN, text, remedy)


def check_metrics_port(settings: MetricsSettings) -> Iterator[Finding]:
    """The metrics port is free, or a StreamIndex service answers there; nothing when it is switched off."""
    host, port, name = settings.host, settings.port, "metrics port"
    if not port:
        return
    try:
        try_to_bind(host, port)
    except OSError as error:
        if _has_our_metrics(host, port):
            yield Finding(name, Level.OK, f"{host}:{port}: a StreamIndex service answers there")
            return
        remedy = "Stop what listens there, or choose another metrics.port (0 switches it off)."
        yield Finding(name, Level.FAIL, f"{host}:{port}: {error.strerror or error}", remedy)
        return
    yield Finding(name, Level.OK, f"{host}:{port} is free")


def check_traces(settings: TraceSettings) -> Iterator[Finding]:
    """OpenTelemetry is there and somebody listens; nothing without `traces.otlp_endpoint`."""
    if not settings.otlp_endpoint:
        return
    if not all(map(_is_importable, _OTEL_PACKAGES)):
        remedy = "pip install 'streamindex-service[otel]'"
        yield Finding("traces", Level.FAIL, "traces.otlp_endpoint is set, and OpenTelemetry is not installed", remedy)
        return
    url = urlsplit(settings.otlp_endpoint)
    try:
        socket.create_connection((url.hostname or "", url.port or 0), _TIMEOUT_S).close()
    except OSError as error:
        text = f"{settings.otlp_endpoint}: {error.strerror or error}"
        yield Finding("traces", Level.WARN, text, "Start the collector; until then spans are dropped.")
    else:
        yield Finding("traces", Level.OK, f"{settings.otlp_endpoint} listens")


def try_to_bind(host: str, port: int) -> None:
    """Raises OSError."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(target)


def _handshake(certificate_file: str, key_file: str) -> str:
    """When the certificate ends. Raises ssl.SSLError, OSError, ValueError."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate_file, key_file, password=_no_passphrase)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # whoever issued it: the certificate is its own proof
    client_side.load_verify_locations(certificate_file)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    client = client_side.wrap_bio(to_client, to_server)
    left = [client, server]
    while left:
        side = left.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            left.append(side)
    certificate = client.getpeercert()
    assert certificate, "a certificate that was verified is there"
    return str(certificate["notAfter"])


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase")


def _valid_until(name: str, path: str, not_after: str | float) -> Finding:
    end = not_after if isinstance(not_after, float | int) else ssl.cert_time_to_seconds(not_after)
    day = time.strftime("%Y-%m-%d", time.gmtime(end))
    if end - time.time() < _SOON_S:
        return Finding(name, Level.WARN, f"{path}: good until {day}", "Issue a new one; it is taken without a restart.")
    return Finding(name, Level.OK, f"{path}: good until {day}")


def _unreadable(name: str, path: str, error: Exception) -> Finding:
    why = getattr(error, "strerror", None) or str(error)
    return Finding(name, Level.FAIL, f"{path}: {why}", "The service's user must be able to read it.")


def _is_user(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _has_our_metrics(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection("localhost" if host in ("0.0.0.0", "::") else host, port, _TIMEOUT_S)  # noqa: S104
    try:
        connection.request("GET", "/metrics")
        return b"streamindex_build_info" in connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _is_importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f} GiB"
