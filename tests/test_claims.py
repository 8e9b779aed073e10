"""The claims page: what the labs stored is what it says, and a disagreement stops the build."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from sphinx.cmd.build import build_main

from tinylm.report import STATUSES

ROOT = Path(__file__).resolve().parents[1]
GLUE = "application/papermill.record/"
CONF = f"""
import sys
sys.path.insert(0, {str(ROOT / "book" / "_ext")!r})
extensions = ["myst_nb", "sphinxcontrib.bibtex", "claims"]
nb_execution_mode = "off"
myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 3
bibtex_bibfiles = ["book/references.bib"]
"""
BOOK = {
    "sources": {"E": "a weekly", "M": "a memo"},
    "labs": {"00_first": "First", "01_second": "Second"},
    "claims": [
        {
            "claim": 1,
            "title": "One",
            "source": ["E"],
            "introduced": ["00_first"],
            "tested": ["01_second"],
            "says": "A.",
        },
        {"claim": 2, "title": "Two", "source": ["E", "M"], "tested": ["00_first"], "says": "B.", "paper": "C."},
        {"claim": 3, "title": "Three", "source": ["M"], "tested": "every lab", "says": "D."},
    ],
}


def verdict(claim: int, **changes) -> dict:
    record = {
        "claim": claim,
        "status": "fails here",
        "measured": f"{claim}.5 nats",
        "interval": "3 seeds",
        "why": "Because.",
    }
    return record | changes


def notebook(records: list) -> dict:
    """A lab with a section for its verdict and the outputs that tinylm.report.verdict leaves."""
    outputs = []
    for i, record in enumerate(records):
        data = {GLUE + "text/plain": "''", GLUE + "verdict+json": record}
        metadata = {"scrapbook": {"name": f"verdict_{i}", "mime_prefix": GLUE}}
        outputs.append(nbformat.v4.new_output("display_data", data, metadata=metadata))
    text = nbformat.v4.new_markdown_cell("# A lab\n\n## The verdict")
    return nbformat.v4.new_notebook(cells=[text, nbformat.v4.new_code_cell(outputs=outputs)])


@pytest.fixture
def build(tmp_path, capsys):
    """Builds a project from a list of claims and the labs' records; returns its claims page, or the error it stopped with."""

    def run(book: dict, labs: dict[str, list]) -> tuple[BeautifulSoup | None, str]:
        (tmp_path / "book").mkdir()
        (tmp_path / "labs").mkdir()
        (tmp_path / "book" / "claims.md").write_text("# Claims\n\n```{claims-table}\n```\n", encoding="utf-8")
        (tmp_path / "book" / "claims.yml").write_text(yaml.safe_dump(book, sort_keys=False), encoding="utf-8")
        (tmp_path / "book" / "references.bib").write_text("", encoding="utf-8")
        for lab, records in labs.items():
            (tmp_path / "labs" / f"{lab}.ipynb").write_text(json.dumps(notebook(records)), encoding="utf-8")
        return make(tmp_path, capsys)

    return run


def make(folder: Path, capsys) -> tuple[BeautifulSoup | None, str]:
    pages = ["book/claims", *(f"labs/{path.stem}" for path in sorted((folder / "labs").iterdir()))]
    (folder / "index.md").write_text("\n".join(["# Book", "```{toctree}", *pages, "```", ""]), encoding="utf-8")
    (folder / "conf.py").write_text(CONF, encoding="utf-8")
    failed = build_main(["-q", "-n", "-W", "--keep-going", "-b", "html", str(folder), str(folder / "out")])
    said = capsys.readouterr().err
    if failed:
        return None, said
    return BeautifulSoup((folder / "out" / "book" / "claims.html").read_text(encoding="utf-8"), "html.parser"), said


def words(element) -> str:
    return " ".join(element.get_text().split())


def test_each_claim_stands_with_its_source_and_its_verdicts(build):
    page, said = build(BOOK, {"00_first": [verdict(1), verdict(2, status="holds here")]})
    assert page is not None, said
    one, two, three = (page.find(id=f"claim-{n}") for n in (1, 2, 3))
    assert "Claim 1: One" in words(one) and "(A weekly.)" in words(one)
    assert "fails here in Lab 00 (First). It introduces the claim. Measured: 1.5 nats (3 seeds). Because." in words(one)
    assert "not yet tested: Lab 01 (Second) is to come." in words(one)
    assert "holds here in Lab 00 (First). Measured: 2.5 nats (3 seeds)." in words(two) and "C." in words(two)
    assert "(A weekly; a memo.)" in words(two) and "introduces" not in words(two)
    assert words(three).endswith("not yet tested")
    assert one.find("a", href="../labs/00_first.html#the-verdict") is not None
    rows = [[words(cell) for cell in row.find_all("td")] for row in page.find("table").find_all("tr")[1:]]
    assert rows == [
        ["1", "One", "fails here (lab 00), not yet tested (lab 01)"],
        ["2", "Two", "holds here (lab 00)"],
        ["3", "Three", "not yet tested"],
    ]


def test_without_any_lab_nothing_is_tested(build):
    page, said = build(BOOK, {})
    assert page is not None, said
    assert {words(state) for state in page.find_all(class_="state")} == {"not yet tested"}


def test_a_verdict_is_markdown_as_in_the_lab(build):
    page, said = build(BOOK, {"00_first": [verdict(2, measured="$x^2$ and *two*\n  lines", why="# 1 is no heading")]})
    assert page is not None, said
    assert "two lines (3 seeds). # 1 is no heading" in words(page.find(id="claim-2"))


TWO = [verdict(2)]
PROBLEMS = {
    "owed": ({"00_first": []}, "claim 2 is to be tested in 00_first, which is built and has no verdict on it"),
    "owed by the second lab": (
        {"00_first": [verdict(1), *TWO], "01_second": [verdict(3)]},
        "claim 1 is to be tested in 01_second, which is built and has no verdict on it",
    ),
    "unknown claim": (
        {"00_first": [*TWO, verdict(9)]},
        "00_first has a verdict on claim 9, which claims.yml does not have",
    ),
    "another lab's claim": (
        {"00_first": TWO, "01_second": [verdict(1), verdict(2)]},
        "01_second has a verdict on claim 2, which claims.yml gives to 00_first",
    ),
    "unknown lab": ({"00_first": TWO, "07_new": []}, "labs/07_new.ipynb is not among the labs of claims.yml"),
    "twice": ({"00_first": [*TWO, *TWO]}, "labs/00_first.ipynb has two verdicts on claim 2"),
    "status": ({"00_first": [verdict(2, status="true")]}, "status 'true' is none of holds here, holds in part"),
    "no status": ({"00_first": [{"claim": 2}]}, "broken verdict, status is missing"),
    "claim in words": ({"00_first": [verdict("two")]}, "broken verdict, claim is missing or not int"),
    "claim is true": ({"00_first": [verdict(True)]}, "broken verdict, claim is missing or not int"),
    "empty": ({"00_first": [verdict(2, interval="")]}, "broken verdict, interval is missing or not str"),
    "a list": ({"00_first": [[2]]}, "broken verdict, not a mapping"),
}


@pytest.mark.parametrize(("labs", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_disagreement_stops_the_build(labs, message, build):
    page, said = build(BOOK, labs)
    assert page is None and message in said, said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claim": 2}, "claims.yml has claim 2 twice"),
        ({"source": ["X"]}, "claim 1 names the unknown source 'X'"),
        ({"tested": ["02_third"]}, "claim 1 names the unknown lab '02_third'"),
    ],
)
def test_a_slip_in_the_list_stops_the_build(change, message, build):
    book = copy.deepcopy(BOOK)
    book["claims"][0] |= change
    page, said = build(book, {"00_first": TWO})
    assert page is None and message in said, said


# The real list and the real labs


def real_claims() -> dict:
    return yaml.safe_load((ROOT / "book" / "claims.yml").read_text(encoding="utf-8"))


def stored_verdicts() -> list[tuple[str, dict]]:
    found = []
    for path in sorted((ROOT / "labs").glob("[0-9][0-9]_*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            records = [o.get("data", {}).get(GLUE + "verdict+json") for o in cell.get("outputs", [])]
            found += [(path.stem, record) for record in records if record]
    return found


def test_every_stored_verdict_is_on_the_page(tmp_path, capsys):
    (tmp_path / "labs").mkdir()
    for path in (ROOT / "labs").glob("[0-9][0-9]_*.ipynb"):
        shutil.copy(path, tmp_path / "labs")
    (tmp_path / "book").mkdir()
    for name in ("claims.md", "claims.yml", "references.bib"):
        shutil.copy(ROOT / "book" / name, tmp_path / "book")
    page, said = make(tmp_path, capsys)
    assert page is not None, said
    assert stored_verdicts()
    for lab, record in stored_verdicts():
        entry = page.find(id=f"claim-{record['claim']}")
        (line,) = (li for li in entry.find_all("li") if li.find("a", href=f"../labs/{lab}.html#the-verdict"))
        assert words(line.find(class_="state")) == record["status"]
        assert record["measured"] in words(line) and record["interval"] in words(line) and record["why"] in words(line)
    assert len(page.find_all("section", id=re.compile(r"^claim-\d+$"))) == 23


def test_there_are_23_claims_and_each_rests_on_known_sources_and_labs():
    book = real_claims()
    assert [c["claim"] for c in book["claims"]] == list(range(1, 24))
    assert set(book["sources"]) == set("EMRO")
    for claim in book["claims"]:
        assert claim["tested"] == "every lab" or claim["tested"], claim["claim"]
        assert "$" not in claim["says"], f"claim {claim['claim']}: a dollar sign starts a formula"


def test_the_look_knows_every_status():
    style = (ROOT / "book" / "_static" / "custom.css").read_text(encoding="utf-8")
    for status in [*STATUSES, "not yet tested"]:
        assert f".state.{status.replace(' ', '-')}::before" in style, status
