"""docs/api.md says what the contract says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from streamindex.v1 import attention_pb2, key_cache_pb2, search_pb2, server_pb2, status_pb2, types_pb2

ROOT = Path(__file__).resolve().parents[2]
FILES = [module.DESCRIPTOR for module in (attention_pb2, key_cache_pb2, search_pb2, server_pb2, status_pb2, types_pb2)]
TEXT = (ROOT / "docs" / "api.md").read_text()


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_reference", ROOT / "tools" / "api_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections() -> dict[str, str]:
    """By heading."""
    parts = re.split(r"^#{2,3} (.+)$", TEXT, flags=re.MULTILINE)
    names, bodies = parts[1::2], parts[2::2]
    assert len(names) == len(set(names)), "a heading comes twice"
    return dict(zip(names, bodies, strict=True))


def rows(body: str) -> list[list[str]]:
    """Number, name without its quotes, and the other cells of a table's rows."""
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in body.splitlines()]
    return [[cells[0], cells[1].strip("`"), *cells[2:]] for cells in lines if cells[0].isdigit()]


def test_it_is_up_to_date():
    written = tool()
    assert written.TARGET.read_text() == written.document(), "run tools/api_reference.py"


def test_every_method_message_field_and_value_is_there_with_a_meaning():
    found = sections()
    seen = 0

    def check(message, outer=""):
        nonlocal seen
        name = outer + message.name
        fields = rows(found[name])
        assert [(int(number), field) for number, field, *_ in fields] == [(f.number, f.name) for f in message.fields]
        assert all(meaning for *_, meaning in fields), name
        seen += len(fields)
        for nested in message.nested_types:
            if not nested.GetOptions().map_entry:
                check(nested, f"{name}.")

    for file in FILES:
        for service in file.services_by_name.values():
            assert found[service.name].strip()
            for method in service.methods:
                body = found[f"{service.name}.{method.name}"]
                first, _, comment = body.strip().partition("\n")
                assert comment.strip()
                assert first.startswith("Bidirectional") == (method.client_streaming and method.server_streaming)
                assert first.index(method.input_type.name) < first.index("→") < first.index(method.output_type.name)
        for message in file.message_types_by_name.values():
            check(message)
        for enum in file.enum_types_by_name.values():
            values = rows(found[enum.name])
            assert [(int(number), name) for number, name, _ in values] == [(v.number, v.name) for v in enum.values]
            assert all(meaning for *_, meaning in values), enum.name
    assert seen > 200


def test_every_link_leads_somewhere():
    anchors = {name.lower().replace(".", "") for name in sections()}
    links = set(re.findall(r"\]\(#([^)]+)\)", TEXT))
    assert len(links) > 50
    assert links <= anchors
    for path in set(re.findall(r"\]\((?!#)([^)#]+)", TEXT)):
        assert (ROOT / "docs" / path).exists(), path


def test_the_table_tells_optional_repeated_and_mapped_fields_apart():
    error = {name: kind for _, name, kind, _ in rows(sections()["Error"])}
    assert error["retry_after_ms"] == "optional uint32"
    assert error["metadata"] == "map of string to string"
    assert error["code"] == "int32"
    request = {name: kind for _, name, kind, _ in rows(sections()["SearchRequest"])}
    assert request["header"] == "[SearchHeader](#searchheader), one of `message`"
    batch = {name: kind for _, name, kind, _ in rows(sections()["SearchBatchRequest"])}
    assert batch["items"] == "repeated [SearchBatchItem](#searchbatchitem)"
