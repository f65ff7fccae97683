"""Result rows as lines of markdown; needs nothing but Python, so that a table can be made anywhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOTHING = "—"
JsonRow = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """title: of the column; shown: its text for a row, NOTHING where the row has none."""

    title: str
    shown: Callable[[JsonRow], str]


def number(key: str, form: str, unit: float = 1.0) -> Callable[[JsonRow], str]:
    """Shows `row[key] / unit` in a format, or NOTHING where it is absent."""

    def shown(row: JsonRow) -> str:
        value = row.get(key)
        return NOTHING if value is None else format(value / unit if unit != 1.0 else value, form)

    return shown


def _text(key: str) -> Callable[[JsonRow], str]:
    return lambda row: str(row.get(key) or NOTHING)


def _ratio(row: JsonRow) -> str:
    return NOTHING if row["ratio"] is None else f"{row['ratio']:.2f} × {row['ratio_to']}"


def _wrong_rows(row: JsonRow) -> str:
    if row["wrong_rows"] is None:
        return NOTHING
    checked = f" of {row['checked_rows']}" if row.get("checked_rows") else ""
    # the result of leaving a part out, not a mistake: said beside the figure itself
    return f"{row['wrong_rows']}{checked}" + ("" if row.get("exact", True) else f" (no {row['left_out']})")


COLUMNS = (
    Column("case", _text("case")),
    Column("dtype", _text("dtype")),
    Column("seconds", number("seconds", ".4g")),
    Column("useful TFLOP/s", number("useful_tflops", ".4g")),
    Column("of the roof", number("roof_fraction", ".3f")),
    Column("ratio", _ratio),
    Column("peak MiB", number("peak_bytes", ".0f", 2**20)),
    Column("wrong rows", _wrong_rows),
    Column("recall", number("recall", ".4f")),
    Column("note", _text("note")),
)
# a line is printed before the next row is known, so every column has its place; the note joins the case
CONSOLE_COLUMNS = (Column("case", lambda row: f"{row['case']} {row['note']}".strip()), *COLUMNS[1:-1])


def head(columns: Sequence[Column]) -> str:
    """The two lines that open a table."""
    return "| " + " | ".join(column.title for column in columns) + " |\n|" + "---|" * len(columns)


def line(row: JsonRow, columns: Sequence[Column]) -> str:
    """One row."""
    return "| " + " | ".join(column.shown(row).replace("|", "\\|") for column in columns) + " |"


def document(name: str, result: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """A result file as markdown: its header, its table without empty columns, links to its pictures."""
    header, rows = result["header"], result["rows"]
    columns = [column for column in COLUMNS if any(column.shown(row) != NOTHING for row in rows)]
    facts = [f"- {key}: {value}" for key, value in header.items()]
    table = [head(columns), *(line(row, columns) for row in rows)]
    links = [f"![{picture.rsplit('.', 1)[0]}]({picture})" for picture in pictures]
    parts = [f"# {name}", "\n".join(facts), *links, "\n".join(table)]
    return "\n\n".join(parts) + "\n"
