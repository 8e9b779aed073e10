"""The book's front and back matter: what it tells readers to type works, what it promises is there."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "book").glob("*.md"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_has_one_title_and_no_heading_skips_a_level(page):
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.M)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def self_test() -> list[tuple[str, str]]:
    """(question, answer) of the prerequisites."""
    parts = re.split(r"^### (\d+)\. .*$", read("book/prerequisites.md"), flags=re.M)[1:]
    assert parts[::2] == [str(i + 1) for i in range(len(parts) // 2)]
    return [
        re.fullmatch(r"(.*)^:::\{dropdown\} Answer to question \d+\n(.*?)^:::\n.*", part, re.M | re.S).groups()
        for part in parts[1::2]
    ]


def test_every_question_of_the_self_test_has_an_answer_and_a_way_on():
    questions = self_test()
    assert len(questions) == 12 and "twelve questions" in read("book/intro.md")
    for question, answer in questions:
        assert "?" in question and answer.startswith("**") and "*If you missed it:*" in answer, question


def test_the_answers_of_the_self_test_are_right():
    code = "\n".join(block for _, answer in self_test() for block in re.findall(r"```pycon\n(.*?)```", answer, re.S))
    test = doctest.DocTestParser().get_doctest(code, {}, "self-test", "book/prerequisites.md", 0)
    said: list[str] = []
    result = doctest.DocTestRunner().run(test, out=said.append)
    assert result.attempted > 20 and not result.failed, "".join(said)


def test_the_command_of_an_error_report_prints_the_versions():
    (code,) = re.findall(r'python -c "(.*)"$', read("book/report_an_error.md"), re.M)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch" in out and "python" in out


def test_the_glossary_defines_each_term_once():
    glossary = re.search(r"^```\{glossary\}\n(.*?)^```", read("book/notation.md"), re.M | re.S)[1]
    terms = [line.lower() for line in glossary.splitlines() if line and not line.startswith((" ", ":"))]
    assert len(terms) > 50 and sorted(terms) == sorted(set(terms))


def test_the_steps_by_hand_are_the_readmes():
    commands = [
        line for line in read("book/how_to_run.md").splitlines() if line.startswith(("python ", "py ", "python3 "))
    ]
    readme = [line.split("  ")[0].rstrip() for line in read("README.md").splitlines()]
    assert len(commands) == 8 and [c for c in commands if c not in readme] == []


def citation() -> dict:
    return yaml.safe_load(read("CITATION.cff"))


def test_the_citation_file_is_valid():
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.citation-file-format"]
    result = subprocess.run([*checker, str(ROOT / "CITATION.cff")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_citation_is_of_this_book():
    config, version = (
        yaml.safe_load(read("_config.yml")),
        re.search(r'__version__ = "(.*)"', read("labs/tinylm/__init__.py")),
    )
    assert set(citation()) >= {"cff-version", "message", "title", "authors", "type", "version", "license"}
    assert citation()["title"] == config["title"] and citation()["version"] == version[1]
    assert citation()["authors"] == [{"name": config["author"]}]
    assert config["copyright"] in read("book/licences.md").split("## What you may do")[0]
    assert not {"url", "doi", "repository-code", "repository", "identifiers"} & set(citation()), (
        "no address is ours to give"
    )


def test_one_licence_for_the_checkpoints_everywhere():
    cards = (ROOT / "labs" / "tinylm" / "assets" / "checkpoints").glob("*/card.json")
    (licence,) = {json.loads(card.read_text(encoding="utf-8"))["license"].replace("CC0-", "CC0 ") for card in cards}
    for name in ("LICENSE", "README.md", "book/licences.md"):
        stated = re.findall(r"checkpoints\b[^.|:\n]*[|:]? [^.|:\n]*?(CC0 1\.0|MIT)", read(name), re.I)
        assert stated == [licence], name
