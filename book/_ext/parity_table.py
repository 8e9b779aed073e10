"""The directive `parity-table STEM`: the differences from other libraries that the tests of a lab measured.

The rows are those of book/parity/STEM.json, which `pytest --write-parity` writes and every test run checks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

HEADINGS = ("what", "against", "dtype", "cases", "tolerance", "largest difference")


class ParityTable(Directive):
    """A table with one row a comparison; its caption is the directive's content."""

    required_arguments, has_content = 1, True

    def run(self):
        env = self.state.document.settings.env
        path = Path(env.srcdir) / "book" / "parity" / f"{self.arguments[0]}.json"
        env.note_dependency(str(path))
        if not path.is_file():
            raise self.error(f"there is no {path.name}: the tests of that lab write it (pytest --write-parity)")
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [table_of(self, HEADINGS, [shown(row) for row in rows])]


def table_of(directive: Directive, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> nodes.table:
    """A table of texts with inline markup; its caption is the directive's content."""

    def row(texts):
        inline = (directive.state.inline_text(text, directive.lineno)[0] for text in texts)
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *found)) for found in inline))

    table = nodes.table(classes=["parity"])
    if directive.content:
        caption, _ = directive.state.inline_text(" ".join(directive.content), directive.lineno)
        table += nodes.title("", "", *caption)
    group = nodes.tgroup(cols=len(headings))
    group += [nodes.colspec(colwidth=1) for _ in headings]
    group += nodes.thead("", row(headings))
    group += nodes.tbody("", *[row(texts) for texts in rows])
    table += group
    return table


def shown(row: dict) -> tuple[str, ...]:
    def number(x: float) -> str:
        return "exact" if x == 0 else f"{x:.0e}".replace("e-0", "e-").replace("e+00", "")

    sizes = number(row["tolerance"]), number(row["worst"])
    return row["what"], row["against"], row["dtype"], f"{row['cases']:,}", *sizes


def setup(app):
    app.add_directive("parity-table", ParityTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
