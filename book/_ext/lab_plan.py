"""Directives for instructors, drawn from the labs themselves.

`lab-plan STEM`: a table of a lab's sections with their minutes, points and path, from the built notebook.
`lab-misconceptions STEM`: for each exercise the mistakes that its check knows and the sentence that it answers with,
from the functions in tests/exercises/STEM.py that prove the check.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive


def cells(srcdir: str, stem: str, kind: str) -> list[str]:
    path = Path(srcdir) / "labs" / f"{stem}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def sections(text: str) -> list[dict]:
    """Of a lab's Markdown: number and title, minutes, points and path of each numbered section."""
    parts = re.split(r"^## (\d+ · .+)$", text, flags=re.M)[1:]
    found = []
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        said = re.search(r"^\*(Live|Recorded|Live and recorded), (\d+) minutes", body, re.M)
        if not said:
            raise ValueError(f'section "{title}" does not say how long it takes, as in *Live, 5 minutes.*')
        points = sum(int(p) for p in re.findall(r"^### Exercise \d+ · `\w+` \((\d+) points?\)$", body, re.M))
        further = "Going further" in title
        found.append({"title": title, "minutes": int(said[2]), "points": points, "further": further, "kind": said[1]})
    return found


def misconceptions(proofs: str, checks: str) -> list[tuple[str, str, str]]:
    """(exercise, mistake, sentence) of every @wrong function; the sentence is the check's own."""
    sentences = [n.msg for n in ast.walk(ast.parse(checks)) if isinstance(n, ast.Assert)]
    sentences = [m.value for m in sentences if isinstance(m, ast.Constant)]
    found = []
    for node in ast.parse(proofs).body:
        for mark in getattr(node, "decorator_list", []):
            if mark.func.id == "wrong":
                exercise, says = (a.value for a in mark.args)
                (sentence,) = {s for s in sentences if says in s}
                found.append((exercise, node.name.replace("_", " "), sentence))
    return found


class Table(Directive):
    required_arguments = 1
    headings: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def rows(self, srcdir: str, stem: str) -> list[tuple[str, ...]]:
        raise NotImplementedError

    def run(self):
        env = self.state.document.settings.env
        stem = self.arguments[0]
        env.note_dependency(str(Path(env.srcdir) / "labs" / f"{stem}.ipynb"))
        env.note_dependency(str(Path(env.srcdir) / "tests" / "exercises" / f"{stem}.py"))
        try:
            rows = self.rows(env.srcdir, stem)
        except (OSError, ValueError) as error:
            raise self.error(f"{self.name} {stem}: {error}") from error
        table = nodes.table(classes=list(self.classes))
        group = nodes.tgroup(cols=len(self.headings))
        group += [nodes.colspec(colwidth=1) for _ in self.headings]
        group += nodes.thead("", row(self.headings))
        group += nodes.tbody("", *[row(r) for r in rows])
        table += group
        return [table]


def row(texts) -> nodes.row:
    """Words between backquotes are code."""
    entries = []
    for text in texts:
        pieces = re.split(r"`([^`]+)`", text)
        words = [nodes.literal(p, p) if i % 2 else nodes.Text(p) for i, p in enumerate(pieces) if p]
        entries.append(nodes.entry("", nodes.paragraph("", "", *words)))
    return nodes.row("", *entries)


class LabPlan(Table):
    headings = ("section", "minutes", "points", "path", "runs")

    def rows(self, srcdir, stem):
        found = sections("\n\n".join(cells(srcdir, stem, "markdown")))
        path = ("core", "going further")
        rows = [
            (s["title"], str(s["minutes"]), str(s["points"] or "–"), path[s["further"]], s["kind"].lower()) for s in found
        ]
        core = [s for s in found if not s["further"]]
        total = (str(sum(s["minutes"] for s in core)), str(sum(s["points"] for s in core)))
        return [*rows, ("the core path together", *total, "core", "")]


class LabMisconceptions(Table):
    headings = ("exercise", "mistake", "the check says")

    def rows(self, srcdir, stem):
        proofs = (Path(srcdir) / "tests" / "exercises" / f"{stem}.py").read_text(encoding="utf-8")
        checks = "\n".join(c for c in cells(srcdir, stem, "code") if "assert" in c)
        rows, last = [], None
        for exercise, mistake, sentence in misconceptions(proofs, checks):
            rows.append((f"`{exercise}`" if exercise != last else "", mistake, sentence))
            last = exercise
        return rows


def setup(app):
    app.add_directive("lab-plan", LabPlan)
    app.add_directive("lab-misconceptions", LabMisconceptions)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
