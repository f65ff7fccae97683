"""Tables and pictures of committed result files, on any machine: python -m benchmarks.render DIR [--no-pictures].

Beside each DIR/NAME.json it writes NAME.md, and pictures NAME*.svg. Pictures need matplotlib (the extra `bench`);
tables need nothing.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.tables import document


def render(path: Path, with_pictures: bool) -> list[Path]:
    """Write what belongs to one result file; the files written, the table first."""
    result = json.loads(path.read_text(encoding="utf-8"))
    drawn = draw(path, result) if with_pictures else []
    table = path.with_suffix(".md")
    table.write_text(document(path.stem, result, [picture.name for picture in drawn]), encoding="utf-8")
    return [table, *drawn]


def draw(path: Path, result: dict[str, Any]) -> list[Path]:
    """Write the pictures of one result file. Raises ImportError without matplotlib."""
    from benchmarks.figures import SVG_METADATA, pictures

    table = result["rows"][0]["table"] if result["rows"] else path.stem
    written = []
    for name, figure in pictures(table, result).items():
        # a file that holds one table of several runs keeps its own name
        target = path.with_name(path.stem + name.removeprefix(table) + ".svg")
        figure.savefig(target, metadata=SVG_METADATA)
        written.append(target)
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.render", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--no-pictures", action="store_true", help="only tables")
    arguments = parser.parse_args(argv)
    files = sorted(arguments.directory.glob("*.json"))
    if not files:
        print(f"no result file in {arguments.directory}", file=sys.stderr)
        return 1
    try:
        for path in files:
            for written in render(path, not arguments.no_pictures):
                print(written)
    except ImportError as error:
        print(f"{error}: pip install matplotlib, or --no-pictures", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
