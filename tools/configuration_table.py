"""Writes docs/configuration.md from the settings tree; with --check, only tells whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from streamindex_service.config import Settings

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_INTRODUCTION = """\
# Configuration

<!-- written by tools/configuration_table.py; change streamindex_service/config.py instead -->

Every setting has a default. Flags of `streamindex serve` win over environment variables, those over the file given with
`--config`, that over the defaults. `streamindex config show` prints what is in force, secrets masked.

- Environment: `STREAMINDEX_`, section, two underscores, name: `STREAMINDEX_MEMORY__HOST_BUDGET_BYTES=64GiB`.
- File: TOML, one table a section. A name that does not exist is refused.
- Sizes (`_bytes`) are numbers or texts such as `512MiB`; times (`_s`) are seconds.

```toml
[server]
tcp_address = "127.0.0.1:50051"
unix_socket = "/run/streamindex.sock"

[memory]
device_budget_bytes = "8GiB"
```
"""


def document() -> str:
    """The whole text."""
    parts = [_INTRODUCTION]
    for section, field in Settings.model_fields.items():
        model = field.annotation
        assert isinstance(model, type), section
        assert issubclass(model, BaseModel), section
        parts += [f"\n## {section}\n", f"{(model.__doc__ or '').strip()}\n", _table(section, model)]
    return "\n".join(parts)


def _table(section: str, model: type[BaseModel]) -> str:
    lines = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (f"`{section}.{name}`", _default(name, field.default), _allowed(name, field), field.description or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(name: str, value: Any) -> str:
    return f"`{_size(value)}`" if name.endswith("_bytes") else f"`{value!r}`".replace("'", '"')


def _allowed(name: str, field: FieldInfo) -> str:
    words = []
    for constraint in field.metadata:
        for attribute, word in (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "to")):
            limit = getattr(constraint, attribute, None)
            if limit is not None:
                words.append(f"{word} {_size(limit) if name.endswith('_bytes') else limit}")
        if getattr(constraint, "pattern", None):
            words.append(f"`{constraint.pattern}`")
    return " ".join(words)


def _size(value: int) -> str:
    for unit, name in _UNITS:
        if value and value % unit == 0:
            return f"{value // unit} {name}"
    return str(value)


def main() -> None:
    """Write, or check."""
    text = document()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
    elif not TARGET.is_file() or TARGET.read_text() != text:
        sys.exit(f"{TARGET.name} is not what the settings say: run tools/configuration_table.py")


if __name__ == "__main__":
    main()
