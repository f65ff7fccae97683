"""Writes docs/api.md from the contract's descriptors and comments; with --check, only says whether it is up to date."""

from __future__ import annotations

import importlib.resources
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "api.md"
_PACKAGE = "streamindex.v1"
_INTRODUCTION = """\
# API reference

<!-- written by tools/api_reference.py; change proto/streamindex/v1 instead -->

The contract `streamindex.v1`, from [proto/streamindex/v1](../proto/streamindex/v1). How a call ends badly is in
[operations.md](operations.md#refusals), what a caller can rely on in [failure-modes.md](failure-modes.md). Python has a
[client library](client.md); other languages make stubs from the proto files, or from the server's reflection.

Tensors are little-endian, row-major bytes without gaps. Proto3's defaults hold: a field that is not set is 0, "" or
empty; fields marked `optional` know whether they were set.
"""


class _Commented(NamedTuple):
    """A file and its comments by path (see SourceCodeInfo.Location)."""

    file: FileDescriptorProto
    comments: dict[tuple[int, ...], str]

    def at(self, *path: int) -> str:
        return self.comments.get(path, "")


def read() -> list[_Commented]:
    """The contract's files, by name. Raises SystemExit when protoc does not take them."""
    names = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").glob("streamindex/v1/*.proto"))
    include = str(importlib.resources.files("grpc_tools") / "_proto")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "descriptors"
        flags = ["--include_source_info", f"--descriptor_set_out={out}"]
        if protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{include}", *flags, *names]) != 0:
            raise SystemExit("protoc failed")
        files = FileDescriptorSet.FromString(out.read_bytes()).file
    return [
        _Commented(
            file,
            {
                tuple(location.path): _text(location.leading_comments or location.trailing_comments)
                for location in file.source_code_info.location
            },
        )
        for file in files
    ]


def document() -> str:
    """The whole text."""
    files = read()
    parts = [_INTRODUCTION, *_contents(files)]
    for each in files:
        for number, service in enumerate(each.file.service):
            parts += _service(each, number, service)
    for each in files:
        for number, message in enumerate(each.file.message_type):
            parts += _message(each, (4, number), "", message)
        for number, enum in enumerate(each.file.enum_type):
            parts += _enum(each, (5, number), "", enum)
    return "\n".join(parts) + "\n"


def _contents(files: list[_Commented]) -> Iterator[str]:
    yield "| file | services | messages and enums |\n|---|---|---|"
    for each in files:
        services = " · ".join(_link(service.name) for service in each.file.service)
        types = " · ".join(_link(type_.name) for type_ in (*each.file.message_type, *each.file.enum_type))
        name = each.file.name.rpartition("/")[2]
        yield f"| [{name}](../proto/{each.file.name}) | {services} | {types} |"


def _service(each: _Commented, number: int, service: ServiceDescriptorProto) -> Iterator[str]:
    yield f"\n## {service.name}\n\n`{_PACKAGE}.{service.name}`\n\n{each.at(6, number)}"
    for index, method in enumerate(service.method):
        asked = _side(method.input_type, method.client_streaming)
        answer = _side(method.output_type, method.server_streaming)
        comment = each.at(6, number, 2, index)
        yield f"\n### {service.name}.{method.name}\n\n{_kind(method)}: {asked} → {answer}\n\n{comment}"


def _kind(method: MethodDescriptorProto) -> str:
    streams = (method.client_streaming, method.server_streaming)
    return {
        (False, False): "Unary",
        (False, True): "Server stream",
        (True, False): "Client stream",
        (True, True): "Bidirectional stream",
    }[streams]


def _side(type_name: str, streams: bool) -> str:
    return ("stream of " if streams else "") + _reference(type_name)


def _message(each: _Commented, path: tuple[int, ...], outer: str, message: DescriptorProto) -> Iterator[str]:
    name = outer + message.name
    yield f"\n## {name}\n\n{each.at(*path)}"
    entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    if message.field:
        yield "\n| number | field | type | meaning |\n|---|---|---|---|"
    for index, field in enumerate(message.field):
        cell = _cell(each.at(*path, 2, index))
        yield f"| {field.number} | `{field.name}` | {_type(message, field, entries)} | {cell} |"
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message(each, (*path, 3, index), f"{name}.", nested)
    for index, enum in enumerate(message.enum_type):
        yield from _enum(each, (*path, 4, index), f"{name}.", enum)


def _enum(each: _Commented, path: tuple[int, ...], outer: str, enum: EnumDescriptorProto) -> Iterator[str]:
    yield f"\n## {outer}{enum.name}\n\n{each.at(*path)}\n\n| number | value | meaning |\n|---|---|---|"
    for index, value in enumerate(enum.value):
        yield f"| {value.number} | `{value.name}` | {_cell(each.at(*path, 2, index))} |"


def _type(message: DescriptorProto, field: FieldDescriptorProto, entries: dict[str, DescriptorProto]) -> str:
    entry = entries.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        return f"map of {_scalar(entry.field[0])} to {_scalar(entry.field[1])}"
    text = _scalar(field)
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {text}"
    if field.proto3_optional:
        return f"optional {text}"
    if field.HasField("oneof_index"):
        return f"{text}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return text


def _scalar(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return _reference(field.type_name)
    return str(FieldDescriptorProto.Type.Name(field.type)).removeprefix("TYPE_").lower()


def _reference(type_name: str) -> str:
    ours = f".{_PACKAGE}."
    return _link(type_name.removeprefix(ours)) if type_name.startswith(ours) else f"`{type_name.lstrip('.')}`"


def _link(name: str) -> str:
    return f"[{name}](#{name.lower().replace('.', '')})"


def _text(comment: str) -> str:
    """Markdown; what is indented is a formula."""
    lines = (line.removeprefix(" ").rstrip() for line in comment.rstrip("\n").split("\n"))
    return "\n".join(f"    {line.strip()}" if line.startswith("  ") else line for line in lines)


def _cell(comment: str) -> str:
    return re.sub(r"\s+", " ", comment).replace("|", "\\|")


def main() -> None:
    """Write, or check."""
    text = document()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
    elif not TARGET.is_file() or TARGET.read_text() != text:
        sys.exit(f"{TARGET.name} is not what proto/ says: run tools/api_reference.py")


if __name__ == "__main__":
    main()
