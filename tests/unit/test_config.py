"""The settings tree: who wins, what is refused, and that the documents tell the truth about it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel, ValidationError

from streamindex_service import errors
from streamindex_service.config import Settings, load

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("STREAMINDEX_")]:
        monkeypatch.delenv(name)


def settings_file(directory: Path, text: str) -> Path:
    path = directory / "streamindex.toml"
    path.write_text(text)
    return path


def every_setting() -> set[str]:
    names = set()
    for section, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        names |= {f"{section}.{name}" for name in field.annotation.model_fields}
    return names


def configuration_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("configuration_table", ROOT / "tools" / "configuration_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = settings_file(tmp_path, "[limits]\nmax_layers = 2\nmax_top_k = 20\nmax_batch_items = 200\n")
    monkeypatch.setenv("STREAMINDEX_LIMITS__MAX_TOP_K", "30")
    monkeypatch.setenv("STREAMINDEX_LIMITS__MAX_BATCH_ITEMS", "300")
    limits = load(file, limits={"max_batch_items": 400}).limits
    assert limits.max_layers == 2
    assert limits.max_top_k == 30
    assert limits.max_batch_items == 400
    assert limits.max_batch_rows == Settings().limits.max_batch_rows


def test_a_flag_leaves_the_rest_of_its_section_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMINDEX_SERVER__UNIX_SOCKET", "/run/x.sock")
    server = load(None, server={"tcp_address": "127.0.0.1:9"}).server
    assert (server.tcp_address, server.unix_socket) == ("127.0.0.1:9", "/run/x.sock")


def test_sizes_may_be_written_with_units() -> None:
    assert load(None, memory={"device_budget_bytes": "8GiB"}).memory.device_budget_bytes == 8 << 30


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:50051", "[::1]:50051", ""])
def test_loopback_addresses_are_taken(address: str) -> None:
    assert load(None, server={"tcp_address": address}).server.tcp_address == address


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:99999", ":50051", "host:port"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValidationError, match="tcp_address"):
        load(None, server={"tcp_address": address})


TLS = {"certificate_file": "/c.pem", "key_file": "/k.pem"}
REMOTE = ["0.0.0.0:50051", "[::]:50051", "192.0.2.1:50051", "example.org:50051"]


@pytest.mark.parametrize("address", REMOTE)
@pytest.mark.parametrize(
    "others",
    [{}, {"tls": TLS}, {"auth": {"token_file": "/t"}}],
    ids=["nothing", "TLS alone", "tokens in the clear"],
)
def test_other_hosts_need_tls_and_authentication(address: str, others: dict[str, dict[str, str]]) -> None:
    with pytest.raises(ValidationError, match="tcp_address is not a loopback address"):
        load(None, server={"tcp_address": address}, **others)


@pytest.mark.parametrize("address", REMOTE)
@pytest.mark.parametrize(
    "others",
    [{"tls": TLS, "auth": {"token_file": "/t"}}, {"tls": {**TLS, "client_ca_file": "/ca.pem"}}],
    ids=["tokens", "certificates"],
)
def test_with_both_they_are_served(address: str, others: dict[str, dict[str, str]]) -> None:
    assert load(None, server={"tcp_address": address}, **others).server.is_remote


def test_users_of_a_unix_socket_need_one() -> None:
    with pytest.raises(ValidationError, match="unix_uids"):
        load(None, auth={"unix_uids": [0]})
    assert load(None, auth={"unix_uids": [0, 7]}, server={"unix_socket": "/x"}).auth.unix_uids == (0, 7)


@pytest.mark.parametrize("tls", [{"certificate_file": "/c"}, {"key_file": "/k"}, {"client_ca_file": "/ca"}])
def test_half_of_tls_is_refused(tls: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="tls"):
        load(None, tls=tls)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_figures_leave_this_host_only_when_that_is_said(host: str) -> None:
    with pytest.raises(ValidationError, match="allow_remote"):
        load(None, metrics={"host": host})
    assert load(None, metrics={"host": host, "allow_remote": True}).metrics.host == host


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="no_such"):
        load(settings_file(tmp_path, "[server]\nno_such = 1\n"))


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.toml")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load().server.drain_s = 1.0  # type: ignore[misc]


def test_every_setting_says_what_it_is() -> None:
    for field in Settings.model_fields.values():
        assert isinstance(field.annotation, type)
        for name, setting in field.annotation.model_fields.items():
            assert setting.description, name


def test_configuration_document_is_up_to_date() -> None:
    table = configuration_table()
    assert table.TARGET.read_text() == table.document(), "run tools/configuration_table.py"


def test_operations_document_names_only_settings_that_exist() -> None:
    sections = "|".join(Settings.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.\w+)`", OPERATIONS))
    assert named <= every_setting()


def test_every_bound_is_in_the_operations_document() -> None:
    choices = {
        "server.tcp_address",
        "server.unix_socket",
        "worker.device",
        "worker.implementation",
        "log.level",
        "metrics.host",
        "metrics.port",
        "metrics.allow_remote",
        "traces.otlp_endpoint",
        "traces.sample_share",
        "server.reflection",
        "tls.certificate_file",
        "tls.key_file",
        "tls.client_ca_file",
        "auth.token_file",
        "auth.unix_uids",
    }
    bounds = OPERATIONS.split("## Bounds")[1]
    missing = {name for name in every_setting() - choices if f"`{name}`" not in bounds}
    assert not missing


@pytest.mark.parametrize(
    ("endpoint", "is_good"),
    [
        ("http://127.0.0.1:4317", True),
        ("https://collector.example:4317", True),
        ("", True),
        ("127.0.0.1:4317", False),
        ("http://127.0.0.1", False),
        ("http://name:secret@127.0.0.1:4317", False),  # it would be shown
    ],
)
def test_where_traces_go(endpoint: str, is_good: bool) -> None:
    if is_good:
        assert load(traces={"otlp_endpoint": endpoint}).traces.otlp_endpoint == endpoint
    else:
        with pytest.raises(ValidationError):
            load(traces={"otlp_endpoint": endpoint})


def test_refusals_in_the_operations_document_are_the_error_tree() -> None:
    def tree(kind: type[errors.ServiceError]) -> list[type[errors.ServiceError]]:
        return [kind, *(each for below in kind.__subclasses__() for each in tree(below))]

    expected = {
        (kind.reason, kind.code.name, "no" if kind.default_retry_after_ms is None else "yes")
        for kind in tree(errors.ServiceError)[1:]
    }
    assert set(re.findall(r"^\| `(\w+)` \| (\w+) \| (yes|no) \|", OPERATIONS, re.MULTILINE)) == expected


@pytest.mark.parametrize(
    "sections",
    [
        {"limits": {"max_chunk_bytes": "8MiB"}, "memory": {"ingress_budget_bytes": "4MiB"}},
        {"memory": {"ingress_budget_bytes": "4MiB", "search_block_bytes": "5MiB"}},
        {"limits": {"max_chunk_bytes": "4MiB", "max_message_bytes": "4MiB"}},
        {"memory": {"workspace_bytes": "16MiB", "workspace_floor_bytes": "32MiB"}},
        {"memory": {"host_high_watermark": "0.9", "host_critical_watermark": "0.8"}},
    ],
    ids=["chunk over ingress", "block over ingress", "chunk over message", "floor over workspace", "watermarks"],
)
def test_settings_that_contradict_each_other_are_refused(sections: dict[str, dict[str, str]]) -> None:
    with pytest.raises(ValidationError, match="must"):
        load(**sections)
