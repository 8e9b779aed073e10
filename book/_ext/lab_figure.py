"""The directives `lab-figure` and `lab-table`: place what a lab has stored, a figure with its own text alternative or a table.

    ```{lab-figure} 00_tiny_model fig_training
    The caption.
    ```

    ```{lab-table} 02_quantization ladder
    The caption.
    ```
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from docutils.parsers.rst import Directive
from docutils.parsers.rst.directives.images import Figure
from parity_table import table_of


class LabFigure(Figure):
    """A docutils figure whose image and alt text come from a notebook's stored output."""

    required_arguments, optional_arguments = 2, 0
    final_argument_whitespace = False

    def run(self):
        env = self.state.document.settings.env
        stem, name = self.arguments
        notebook = Path(env.srcdir) / "labs" / f"{stem}.ipynb"
        env.note_dependency(str(notebook))
        output = find_output(notebook, name, "image/png")
        if output is None:
            raise self.error(f"{notebook.name} has no stored figure {name!r}: run `make notebooks`, or correct the name")
        self.notebook_output = output
        png = base64.b64decode(output["data"]["image/png"])
        path = Path(env.srcdir) / "_build" / "lab_figures" / f"{stem}-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != png:
            path.write_bytes(png)
        self.arguments = [f"/{path.relative_to(env.srcdir).as_posix()}"]
        self.options["alt"] = output["metadata"]["alt"]
        return super().run()


class LabTable(Directive):
    """A table that a lab displayed with `tinylm.report.report_table`."""

    required_arguments, has_content = 2, True

    def run(self):
        env = self.state.document.settings.env
        stem, name = self.arguments
        notebook = Path(env.srcdir) / "labs" / f"{stem}.ipynb"
        env.note_dependency(str(notebook))
        output = find_output(notebook, name, "text/html")
        if output is None:
            raise self.error(f"{notebook.name} has no stored table {name!r}: run `make notebooks`, or correct the name")
        stored = output["metadata"]["table"]
        return [table_of(self, stored["headings"], stored["rows"])]


def find_output(notebook: Path, name: str, mime: str) -> dict | None:
    """The stored output with that glue name and a part of that type, or None."""
    if not notebook.is_file():
        return None
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            if output.get("metadata", {}).get("scrapbook", {}).get("name") == name and mime in output["data"]:
                return {"data": {k: "".join(v) for k, v in output["data"].items()}, "metadata": output["metadata"]}
    return None


def setup(app):
    app.add_directive("lab-figure", LabFigure)
    app.add_directive("lab-table", LabTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
