"""What the doctor finds of certificates, tokens, users, the spill directory, the metrics port and the collector."""

from __future__ import annotations

import datetime
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from streamindex_service import doctor, doctor_files
from streamindex_service.config import (
    AuthSettings,
    MemorySettings,
    MetricsSettings,
    Settings,
    TlsSettings,
    TraceSettings,
)
from streamindex_service.findings import Finding, Level
from streamindex_service.frontend.tokens import new_token
from tests.support.certificates import DAY, Authority

LONG = 90 * DAY


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path, "authority")


def levels(findings):
    found = list(findings)
    assert all(bool(finding.remedy) == (finding.level is not Level.OK) for finding in found)
    return {finding.name: finding.level for finding in found}


def text(finding: Finding) -> str:
    return f"{finding.text} {finding.remedy}"


def private(pair):
    pair.key.chmod(0o600)
    return pair


def tls(pair, client_ca=""):
    return TlsSettings(certificate_file=str(pair.certificate), key_file=str(pair.key), client_ca_file=str(client_ca))


def test_without_any_of_it_nothing_is_looked_at():
    settings = Settings(metrics={"port": 0})
    assert not list(doctor_files.check_tls(settings.tls))
    assert not list(doctor_files.check_callers(settings.auth))
    assert not list(doctor_files.check_spill(settings.memory))
    assert not list(doctor_files.check_metrics_port(settings.metrics))
    assert not list(doctor_files.check_traces(settings.traces))


def test_certificates_that_are_good(authority):
    pair = private(authority.issue("server", lasts=LONG, host=True))
    found = levels(doctor_files.check_tls(tls(pair)))
    assert found == {"tls key": Level.OK, "tls certificate": Level.OK}


def test_a_certificate_that_has_expired_or_soon_will(authority):
    expired = private(authority.issue("old", lasts=-DAY))
    finding = doctor_files.check_certificate(str(expired.certificate), str(expired.key))
    assert (finding.level, "expired" in finding.text) == (Level.FAIL, True)
    soon = private(authority.issue("soon", lasts=datetime.timedelta(days=3)))
    finding = doctor_files.check_certificate(str(soon.certificate), str(soon.key))
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3)
    assert (finding.level, end.strftime("%Y-%m-%d") in finding.text) == (Level.WARN, True)


def test_a_key_of_another_certificate(authority):
    one, other = authority.issue("one", lasts=LONG), authority.issue("other", lasts=LONG)
    finding = doctor_files.check_certificate(str(one.certificate), str(other.key))
    assert finding.level is Level.FAIL
    assert "MISMATCH" in finding.text


def test_files_that_are_no_certificate_no_key_or_not_there(authority, tmp_path):
    pair = authority.issue("server", lasts=LONG)
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN NOTHING-----")
    absent = tmp_path / "absent.pem"
    for certificate, key in ((garbage, pair.key), (pair.certificate, garbage), (absent, pair.key)):
        finding = doctor_files.check_certificate(str(certificate), str(key))
        assert finding.level is Level.FAIL
        assert finding.remedy
    assert doctor_files.check_key_file(str(absent)).level is Level.FAIL


def test_a_key_with_a_passphrase(authority, tmp_path):
    from cryptography.hazmat.primitives import serialization

    pair = authority.issue("server", lasts=LONG)
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    finding = doctor_files.check_certificate(str(pair.certificate), str(locked))
    assert finding.level is Level.FAIL
    assert "passphrase" in finding.text
    assert "secret" not in text(finding)


def test_a_key_that_others_may_read(authority):
    pair = authority.issue("server", lasts=LONG)
    for mode, level in ((0o640, Level.WARN), (0o604, Level.WARN), (0o600, Level.OK), (0o400, Level.OK)):
        pair.key.chmod(mode)
        assert doctor_files.check_key_file(str(pair.key)).level is level


def test_authorities_of_clients(authority, tmp_path):
    pair = private(authority.issue("server", lasts=LONG))
    found = levels(doctor_files.check_tls(tls(pair, authority.file)))
    assert found["tls client authorities"] is Level.WARN, "the test's authority ends tomorrow"
    no_authority = authority.issue("client", lasts=LONG).certificate
    finding = doctor_files.check_client_ca(str(no_authority))
    assert (finding.level, "authority" in finding.text) == (Level.FAIL, True)
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("nothing")
    assert doctor_files.check_client_ca(str(garbage)).level is Level.FAIL
    assert doctor_files.check_client_ca(str(tmp_path / "absent")).level is Level.FAIL


def test_authorities_that_have_expired(authority, monkeypatch):
    now = doctor_files.time.time()
    monkeypatch.setattr(doctor_files.time, "time", lambda: now + 2 * 86_400)
    finding = doctor_files.check_client_ca(str(authority.file))
    assert (finding.level, "expired" in finding.text) == (Level.FAIL, True)
    monkeypatch.setattr(doctor_files.time, "time", lambda: now - 60 * 86_400)
    assert doctor_files.check_client_ca(str(authority.file)).level is Level.OK


def test_tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("# none yet\n")
    assert doctor_files.check_token_file(str(path)).level is Level.WARN
    token, line = new_token("somebody")
    path.write_text(line + "\n")
    finding = doctor_files.check_token_file(str(path))
    assert (finding.level, "1 token" in finding.text) == (Level.OK, True)
    path.chmod(0o666)
    assert doctor_files.check_token_file(str(path)).level is Level.FAIL
    path.chmod(0o600)
    path.write_text(f"somebody {token}\n")  # the token itself in the place of its hash
    finding = doctor_files.check_token_file(str(path))
    assert finding.level is Level.FAIL
    assert token not in text(finding)
    assert doctor_files.check_token_file(str(tmp_path / "absent")).level is Level.FAIL


def test_users_of_the_socket():
    assert levels(doctor_files.check_callers(AuthSettings(unix_uids=(os.getuid(),)))) == {"unix users": Level.OK}
    finding, *rest = doctor_files.check_callers(AuthSettings(unix_uids=(os.getuid(), 3_999_999_999)))
    assert not rest
    assert (finding.level, "3999999999" in finding.text) == (Level.WARN, True)


def test_the_spill_directory(tmp_path):
    def level(directory: Path, size: int) -> Level:
        (finding,) = doctor_files.check_spill(MemorySettings(spill_dir=str(directory), spill_bytes=size))
        assert bool(finding.remedy) == (finding.level is not Level.OK)
        return finding.level

    assert level(tmp_path, 1 << 20) is Level.OK
    assert level(tmp_path, 1 << 60) is Level.WARN
    assert level(tmp_path / "absent", 1 << 20) is Level.FAIL
    file = tmp_path / "file"
    file.touch()
    assert level(file, 1 << 20) is Level.FAIL
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "the doctor left something"


def test_a_spill_directory_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_files.SpillFiles, "_open", refuse)  # root may write anywhere
    (finding,) = doctor_files.check_spill(MemorySettings(spill_dir=str(tmp_path)))
    assert (finding.level, "Permission denied" in finding.text) == (Level.FAIL, True)


class _Answers(BaseHTTPRequestHandler):
    body = b""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("body", "level"), [(b'streamindex_build_info{version="0.1.0"} 1.0\n', Level.OK), (b"something else", Level.FAIL)]
)
def test_a_metrics_port_that_is_taken(body, level):
    handler = type("Answers", (_Answers,), {"body": body})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        server.timeout = 20.0
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        (finding,) = doctor_files.check_metrics_port(MetricsSettings(port=server.server_port))
        thread.join()
    assert finding.level is level
    assert bool(finding.remedy) == (level is not Level.OK)
    (finding,) = doctor_files.check_metrics_port(MetricsSettings(port=server.server_port))
    assert finding.level is Level.OK


def test_a_metrics_port_behind_which_nobody_speaks_http(monkeypatch):
    monkeypatch.setattr(doctor_files, "_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (finding,) = doctor_files.check_metrics_port(MetricsSettings(port=silent.getsockname()[1]))
    assert finding.level is Level.FAIL


def test_the_collector_of_traces(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as collector:
        settings = TraceSettings(otlp_endpoint=f"http://127.0.0.1:{collector.getsockname()[1]}")
        assert levels(doctor_files.check_traces(settings)) == {"traces": Level.OK}
    assert levels(doctor_files.check_traces(settings)) == {"traces": Level.WARN}
    monkeypatch.setattr(doctor_files, "_OTEL_PACKAGES", ("opentelemetry_that_is_not_there.sdk",))
    assert levels(doctor_files.check_traces(settings)) == {"traces": Level.FAIL}


def test_an_examination_looks_at_all_of_it(authority, tmp_path, monkeypatch):
    pair = private(authority.issue("server", lasts=LONG))
    monkeypatch.setattr(doctor, "probe_torch", dict)
    settings = Settings(
        server={"tcp_address": "", "unix_socket": str(tmp_path / "s.sock")},
        tls={
            "certificate_file": str(pair.certificate),
            "key_file": str(pair.key),
            "client_ca_file": str(authority.file),
        },
        auth={"token_file": str(tmp_path / "absent"), "unix_uids": (os.getuid(),)},
        memory={"spill_dir": str(tmp_path)},
        traces={"otlp_endpoint": "http://127.0.0.1:1"},
    )
    names = {finding.name for finding in doctor.examine(settings, lambda target: False)}
    assert names >= {
        "tls key", "tls certificate", "tls client authorities", "token file", "unix users", "spill directory",
        "metrics port", "traces",
    }  # fmt: skip
