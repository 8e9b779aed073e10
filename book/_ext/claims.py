"""The directive `claims-table`: the claims of book/claims.yml beside the verdicts that the labs have stored.

Each claim gets the anchor `claim-N`, so that a page links to it by [](#claim-7). The build fails when list and labs
disagree: a verdict on a claim that the lab was not given, a lab without the verdict that it owes, a broken record.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from tinylm.report import STATUSES

RECORD = "application/papermill.record/verdict+json"
FIELDS = {"claim": int, "status": str, "measured": str, "interval": str, "why": str}
ANY = "every lab"  # `tested` of a claim that each lab bears on and none owes a verdict
OPEN = "not yet tested"


class ClaimsTable(SphinxDirective):
    """All claims: a table with their state, then each with its source and its verdicts, under the lab that tests it."""

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir)
        notebooks = sorted((root / "labs").glob("[0-9][0-9]_*.ipynb"))
        for path in [root / "book" / "claims.yml", *notebooks]:
            self.env.note_dependency(str(path))
        book = yaml.safe_load((root / "book" / "claims.yml").read_text(encoding="utf-8"))
        verdicts, problems = read_verdicts(notebooks)
        problems += disagreements(book, verdicts)
        if problems:
            raise ExtensionError(
                "the claims and the labs' verdicts disagree:\n" + "\n".join(f"- {p}" for p in problems)
            )
        table = self.markdown(overview(book, verdicts))
        for node in table:
            node["classes"].append("claims")
        return [*table, *(self.group(lab, book, verdicts) for lab in [*book["labs"], ANY] if in_group(book, lab))]

    def group(self, lab: str, book: dict, verdicts: dict) -> nodes.section:
        """The section of the claims that a lab tests."""
        title = "Every lab" if lab == ANY else f"{number(lab)} · {book['labs'][lab]}"
        section = nodes.section("", nodes.title(title, title), ids=[nodes.make_id(f"claims-of-{lab}")])
        for claim in in_group(book, lab):
            title = f"Claim {claim['claim']}: {claim['title']}"
            entry = nodes.section("", nodes.title(title, title), names=[f"claim-{claim['claim']}"])
            self.state.document.note_explicit_target(entry, entry)
            entry += self.markdown(details(claim, book, verdicts))
            section += entry
        return section

    def markdown(self, text: str) -> list[nodes.Node]:
        parent = nodes.Element()
        self.state.nested_parse(StringList(text.splitlines(), self.get_source_info()[0]), self.content_offset, parent)
        return parent.children


def read_verdicts(notebooks: list[Path]) -> tuple[dict[str, dict[int, dict]], list[str]]:
    """{lab: {claim: record}} from the outputs of executed labs, and what is wrong with them."""
    verdicts: dict[str, dict[int, dict]] = {}
    problems = []
    for path in notebooks:
        found = verdicts.setdefault(path.stem, {})
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        for record in (output["data"][RECORD] for output in outputs if RECORD in output.get("data", {})):
            if why := what_is_wrong(record):
                problems.append(f"labs/{path.name} has a broken verdict, {why}: {json.dumps(record)[:200]}")
            elif record["claim"] in found:
                problems.append(f"labs/{path.name} has two verdicts on claim {record['claim']}")
            else:
                found[record["claim"]] = record
    return verdicts, problems


def what_is_wrong(record: object) -> str | None:
    if not isinstance(record, dict):
        return "not a mapping"
    for name, kind in FIELDS.items():
        if type(record.get(name)) is not kind or record[name] == "":
            return f"{name} is missing or not {kind.__name__}"
    return None if record["status"] in STATUSES else f"status {record['status']!r} is none of {', '.join(STATUSES)}"


def disagreements(book: dict, verdicts: dict[str, dict[int, dict]]) -> list[str]:
    """What the list of claims and the stored verdicts have against each other."""
    claims, problems = {}, []
    for claim in book["claims"]:
        n = claim["claim"]
        if n in claims:
            problems.append(f"claims.yml has claim {n} twice")
        claims[n] = claim
        problems += [f"claim {n} names the unknown source {s!r}" for s in claim["source"] if s not in book["sources"]]
        for lab in given_to(claim):
            if lab not in book["labs"]:
                problems.append(f"claim {n} names the unknown lab {lab!r}")
            elif lab in tested_in(claim) and lab in verdicts and n not in verdicts[lab]:
                problems.append(f"claim {n} is to be tested in {lab}, which is built and has no verdict on it")
    for lab, found in verdicts.items():
        if lab not in book["labs"]:
            problems.append(f"labs/{lab}.ipynb is not among the labs of claims.yml")
        for n in found:
            if n not in claims:
                problems.append(f"{lab} has a verdict on claim {n}, which claims.yml does not have")
            elif claims[n]["tested"] != ANY and lab not in given_to(claims[n]):
                problems.append(
                    f"{lab} has a verdict on claim {n}, which claims.yml gives to {', '.join(given_to(claims[n]))}"
                )
    return problems


def tested_in(claim: dict) -> list[str]:
    return [] if claim["tested"] == ANY else claim["tested"]


def given_to(claim: dict) -> list[str]:
    return [*claim.get("introduced", []), *tested_in(claim)]


def in_group(book: dict, lab: str) -> list[dict]:
    return [c for c in book["claims"] if (ANY if c["tested"] == ANY else c["tested"][0]) == lab]


def number(lab: str) -> str:
    return f"Lab {lab[:2]}"


def state(status: str) -> str:
    """The status in words, with the class that draws its mark."""
    return f"[{status}]{{.state .{status.replace(' ', '-')}}}"


def findings(claim: dict, book: dict, verdicts: dict) -> list[tuple[str, dict | None]]:
    """(lab, its verdict or None) for each lab that gave one or owes one, in the book's order."""
    n, out = claim["claim"], []
    for lab in book["labs"]:
        record = verdicts.get(lab, {}).get(n)
        if record or lab in tested_in(claim):
            out.append((lab, record))
    return out


def overview(book: dict, verdicts: dict) -> str:
    lines = ["| No. | Claim | What became of it |", "|---:|---|---|"]
    for claim in sorted(book["claims"], key=lambda c: c["claim"]):
        states = [
            f"{state(r['status'] if r else OPEN)} ({number(lab).lower()})" for lab, r in findings(claim, book, verdicts)
        ]
        n = claim["claim"]
        lines.append(f"| {n} | [{claim['title']}](#claim-{n}) | {', '.join(states) or state(OPEN)} |")
    return "\n".join(lines)


def details(claim: dict, book: dict, verdicts: dict) -> str:
    """A claim, who made it, what the paper says, and every verdict on it."""
    sources = "; ".join(book["sources"][s] for s in claim["source"])
    parts = [f"{claim['says']} *({sources[0].upper()}{sources[1:]}.)*", claim.get("paper", "")]
    lines = []
    for lab, record in findings(claim, book, verdicts):
        name = f"{number(lab)} ({book['labs'][lab]})"
        if record is None:
            lines.append(f"- {state(OPEN)}: {name} is to come.")
            continue
        first = " It introduces the claim." if lab in claim.get("introduced", []) else ""
        measured, interval, why = (" ".join(record[key].split()) for key in ("measured", "interval", "why"))
        lines.append(
            f"- {state(record['status'])} in [{name}](/labs/{lab}.ipynb#the-verdict).{first} "
            f"Measured: {measured} ({interval}). {why}"
        )
    return "\n\n".join([*filter(None, parts), "\n".join(lines or [f"- {state(OPEN)}"])])


def setup(app):
    app.add_directive("claims-table", ClaimsTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
