"""The exercises: what is right passes, each misconception fails with its own sentence, and nothing is given away."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from lab_source import definitions

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "labs"), str(ROOT / "tests" / "exercises"), str(ROOT / "book" / "_ext")]
import build  # noqa: E402
import lab_plan  # noqa: E402

SOURCES = build.sources([])
LABS = {p.stem: build.read_source(p) for p in SOURCES}
EXERCISES = {stem: build.exercises_of(lab) for stem, lab in LABS.items()}


def proofs() -> list:
    found = []
    for stem in LABS:
        path = ROOT / "tests" / "exercises" / f"{stem}.py"
        spec = importlib.util.spec_from_file_location(f"exercises_{stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += [(stem, f) for _, f in inspect.getmembers(module) if hasattr(f, "proof")]
    return found


PROOFS = proofs()
each_exercise = pytest.mark.parametrize(
    ("stem", "name"), [(stem, name) for stem, found in EXERCISES.items() for name in found]
)


def visible(check) -> str:
    notebook = nbformat.v4.new_notebook(cells=[check])
    return build.student(notebook).cells[0].source


def shape(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    return [shape(v) for v in value] if isinstance(value, tuple | list) else type(value)


def run_check(stem: str, name: str, function, hidden: bool) -> str | None:
    """The sentence with which the check fails, or None. Raises when anything else goes wrong than an assertion."""
    check = EXERCISES[stem][name][1]
    lab = definitions(stem)
    reference, seen = getattr(lab, name), []

    def recorder(*args, **kwargs):
        copies = [a.clone().detach() if isinstance(a, torch.Tensor) else a for a in args]
        out = function(*args, **kwargs)
        seen.append((shape(out), shape(reference(*copies, **kwargs))))
        return out

    torch.manual_seed(0)
    sentence = None
    try:
        exec(compile(check.source if hidden else visible(check), f"check of {name}", "exec"), {**vars(lab), name: recorder})
    except AssertionError as error:
        sentence = str(error)
        assert sentence, f"the check of {name} fails without a sentence"
    assert seen and all(mine == theirs for mine, theirs in seen), f"another shape or dtype: {seen}"
    return sentence


def of_kind(kind: str):
    chosen = [(stem, f) for stem, f in PROOFS if f.proof[0] == kind]
    ids = [f"{stem}-{f.proof[1]}-{f.__name__}" for stem, f in chosen]
    return pytest.mark.parametrize(("stem", "function"), chosen, ids=ids)


@each_exercise
def test_the_labs_solution_passes(stem, name):
    assert run_check(stem, name, getattr(definitions(stem), name), hidden=True) is None


@of_kind("right")
def test_another_right_solution_passes(stem, function):
    assert run_check(stem, function.proof[1], function, hidden=True) is None


@of_kind("wrong")
def test_a_misconception_fails_with_its_sentence(stem, function):
    _, name, says = function.proof
    sentence = run_check(stem, name, function, hidden=False)
    assert sentence is not None and says in sentence, sentence


@of_kind("sly")
def test_a_hidden_test_sees_what_the_check_does_not(stem, function):
    _, name, says = function.proof
    assert run_check(stem, name, function, hidden=False) is None
    sentence = run_check(stem, name, function, hidden=True)
    assert sentence is not None and says in sentence, sentence


@each_exercise
def test_each_exercise_is_proven(stem, name):
    kinds = [f.proof for at, f in PROOFS if at == stem and f.proof[1] == name]
    assert [k for k, *_ in kinds].count("right") >= 1 and [k for k, *_ in kinds].count("sly") >= 1
    assert len({says for kind, _, says in kinds if kind == "wrong"}) >= 3, "three misconceptions, each with its sentence"


def test_every_proof_is_of_an_exercise():
    assert {(stem, f.proof[1]) for stem, f in PROOFS} == {(s, n) for s, found in EXERCISES.items() for n in found}


@each_exercise
def test_an_exercise_says_what_goes_in_and_out(stem, name):
    solution, check = EXERCISES[stem][name]
    (definition,) = [n for n in ast.parse(solution.source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert definition.name == name and len(ast.get_docstring(definition) or "") > 40
    assert solution.source.index('"""') < solution.source.index("### BEGIN SOLUTION")
    assert check.metadata.nbgrader.points >= 1


# What students get


def secrets(stem: str) -> set[str]:
    """Lines of solutions and hidden tests that stand nowhere else in the lab."""
    inside, outside, region = set(), set(), None
    for cell in LABS[stem].cells:
        for line in (raw.strip() for raw in cell.source.splitlines()):
            if line.startswith("### BEGIN"):
                region = line
            elif line.startswith("### END"):
                region = None
            else:
                (outside if region is None else inside).add(line)
    return {line for line in inside - outside if len(line) > 8}


def hidden_lines(stem: str) -> set[str]:
    lines, region = set(), False
    for _, check in EXERCISES[stem].values():
        for line in check.source.splitlines():
            region = line.startswith("### BEGIN HIDDEN") or (region and not line.startswith("### END HIDDEN"))
            if region and len(line.strip()) > 8:
                lines.add(line.strip())
    return lines - {line.strip() for _, c in EXERCISES[stem].values() for line in visible(c).splitlines()}


def without_space(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("stem", LABS)
def test_student_notebooks_and_their_pages_give_nothing_away(stem):
    path = build.student_path(ROOT / "labs" / f"{stem}.py")
    notebook = nbformat.read(path, as_version=4)
    assert all(not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code")
    assert "widgets" not in notebook.metadata
    page, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    from bs4 import BeautifulSoup

    for text in (" ".join(c.source for c in notebook.cells), BeautifulSoup(page, "html.parser").get_text()):
        text = without_space(text)
        assert len(text) > 1000 and secrets(stem)
        found = [line for line in secrets(stem) if without_space(line) in text]
        assert not found, found


@pytest.mark.parametrize("stem", LABS)
def test_the_complete_notebook_has_no_hidden_test(stem):
    text = without_space((ROOT / "labs" / f"{stem}.ipynb").read_text(encoding="utf-8"))
    assert len(hidden_lines(stem)) >= 3 * len(EXERCISES[stem]) or not EXERCISES[stem]
    found = [line for line in hidden_lines(stem) if without_space(json.dumps(line)[1:-1]) in text]
    assert not found, found


def execute(notebook, folder: Path, **environment) -> None:
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    paths = os.pathsep.join(p for p in (str(ROOT / "labs"), os.environ.get("PYTHONPATH")) if p)
    client.execute(env={**os.environ, "TINYLM_BUDGET": "0.02", "PYTHONPATH": paths, **environment})


def printed(cell) -> str:
    return "".join(o.get("text", "") for o in cell.get("outputs", []) if o.output_type == "stream")


@pytest.mark.parametrize("stem", LABS)
def test_a_blank_student_notebook_runs_to_its_end(stem, tmp_path):
    """Without a traceback; each check names its exercise, and nothing is said of cells that need none."""
    notebook = nbformat.read(build.student_path(ROOT / "labs" / f"{stem}.py"), as_version=4)
    execute(notebook, tmp_path)
    said = {}
    for cell in notebook.cells:
        assert not [o for o in cell.get("outputs", []) if o.output_type == "error" or o.get("name") == "stderr"]
        if printed(cell).startswith("Not run: this cell needs"):
            said[cell.id] = printed(cell).split("`")[1]
    for name, (solution, check) in EXERCISES[stem].items():
        assert said[check.id] == name and solution.id not in said
    assert set(said.values()) == set(EXERCISES[stem])
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert len(said) < len(code)


def test_an_error_that_is_no_blank_is_an_error(tmp_path):
    start = "from tinylm import exercises; exercises.listen()"
    blank = "def f():\n    # YOUR CODE HERE\n    raise NotImplementedError()"
    cells = [blank, "y = f()", "y + 1", "def g():\n    return f()\nz = g()", "z"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in [start, *cells]])
    execute(notebook, tmp_path)
    assert [printed(c).count("needs `f`") for c in notebook.cells] == [0, 0, 1, 1, 1, 1]
    more = ["n = 1", "n += f()", "assert n == 1", "w = 3", "%%time\nw = f()", "w"]
    notebook.cells = [nbformat.v4.new_code_cell(c) for c in [start, blank, *more]]
    execute(notebook, tmp_path)
    assert [printed(c).count("needs `f`") for c in notebook.cells] == [0, 0, 0, 1, 0, 0, 1, 1]
    solved = ["def f():\n    return 1", "y = f()", "assert y + 1 == 2", "del y"]
    with pytest.raises(Exception, match="NameError"):  # the reader's own slip, in the exercise itself
        notebook.cells = [nbformat.v4.new_code_cell(c) for c in [start, *cells, "def f():\n    return y", "f()"]]
        execute(notebook, tmp_path)
    with pytest.raises(Exception, match="NotImplementedError"):  # no exercise
        notebook.cells = [nbformat.v4.new_code_cell(c) for c in [start, "def f():\n    raise NotImplementedError", "f()"]]
        execute(notebook, tmp_path)
    for tail, error in (("nothing", "NameError"), ("raise NotImplementedError()", "NotImplemented"), ("y", "NameError")):
        notebook.cells = [nbformat.v4.new_code_cell(c) for c in [start, *cells, *solved, tail]]
        with pytest.raises(Exception, match=error):
            execute(notebook, tmp_path)


# What instructors read


@pytest.mark.parametrize("stem", LABS)
def test_the_plan_counts_every_point_and_minute(stem):
    sections = lab_plan.sections("\n\n".join(lab_plan.cells(ROOT, stem, "markdown")))
    assert sum(s["points"] for s in sections) == sum(c.metadata.nbgrader.points for _, c in EXERCISES[stem].values())
    assert 45 <= sum(s["minutes"] for s in sections if not s["further"]) <= 90


def test_a_section_without_its_minutes_is_refused():
    assert lab_plan.sections("## 1 · A\n*Live, 3 minutes.*\n### Exercise 1 · `f` (2 points)\n") == [
        {"title": "1 · A", "minutes": 3, "points": 2, "further": False, "kind": "Live"}
    ]
    with pytest.raises(ValueError, match='"2 · B" does not say how long'):
        lab_plan.sections("## 1 · A\n*Live, 3 minutes.*\n## 2 · B\ntext\n## 3 · C\n*Recorded, 5 minutes.*\n")


def test_the_page_shows_the_sentence_that_a_mistake_meets():
    rows = lab_plan.LabMisconceptions.rows(None, ROOT, SOURCES[0].stem)
    shown = {mistake: sentence for _, mistake, sentence in rows}
    for stem, function in PROOFS:
        if stem == SOURCES[0].stem and function.proof[0] == "wrong":
            assert run_check(stem, function.proof[1], function, hidden=False) == shown[function.__name__.replace("_", " ")]


# nbgrader


def strip_markers(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if line.strip() not in build.MARKERS)


def nbgrader(course: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "nbgrader", *arguments]
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # it calls alembic
    paths = os.pathsep.join(p for p in (str(ROOT / "labs"), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "TINYLM_BUDGET": "0.02", "PYTHONPATH": paths, "PATH": programs}
    return subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True, encoding="utf-8")


def scores(course: Path, stem: str) -> dict[str, float]:
    """Points by student, from nbgrader's own database."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        return {s.student.id: s.score for s in book.assignment_submissions(stem)}


def released(source: Path, course: Path) -> None:
    """An nbgrader course with the assignment of a lab, which is our student notebook."""
    stem = source.stem
    subprocess.run([sys.executable, ROOT / "labs" / "build.py", stem, "--nbgrader", course], check=True)
    result = nbgrader(course, "generate_assignment", stem)
    assert result.returncode == 0, result.stderr
    theirs = nbformat.read(course / "release" / stem / f"{stem}.ipynb", as_version=4)
    ours = nbformat.read(build.student_path(source), as_version=4)
    assert [c.source for c in theirs.cells] == [c.source for c in ours.cells]


def submit(course: Path, stem: str, student: str, solved=(), change=lambda cell: None) -> None:
    """Hand in the released notebook with the named exercises solved and each cell changed."""
    notebook = nbformat.read(course / "release" / stem / f"{stem}.ipynb", as_version=4)
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        if name in solved:
            cell.source = strip_markers(EXERCISES[stem][name][0].source)
        change(cell)
    path = course / "submitted" / student / stem / f"{stem}.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(notebook, path)


@pytest.mark.parametrize("source", SOURCES[1:], ids=lambda p: p.stem)
def test_nbgrader_grades_each_lab(source, tmp_path):
    stem, course = source.stem, tmp_path / "course"
    released(source, course)
    submit(course, stem, "all", EXERCISES[stem])
    submit(course, stem, "blank")
    result = nbgrader(course, "autograde", stem, "--Execute.timeout=120")
    most = sum(check.metadata.nbgrader.points for _, check in EXERCISES[stem].values())
    assert scores(course, stem) == {"all": most, "blank": 0}, result.stderr[-4000:]


def test_nbgrader_releases_and_grades(tmp_path):
    """The reference gets full marks, a blank copy none, a half-solved one its half; damaged copies harm only themselves."""
    stem, course = SOURCES[0].stem, tmp_path / "course"
    released(SOURCES[0], course)
    found = EXERCISES[stem]
    names = list(found)

    def tamper(cell):
        if cell.metadata.get("nbgrader", {}).get("grade"):
            cell.source = "pass"

    def loop(cell):
        if cell.metadata.get("nbgrader", {}).get("grade_id") == names[2]:
            head = found[names[2]][0].source.split('"""')[0]
            cell.source = f'{head}"""Never ends."""\n    while True:\n        pass'

    submit(course, stem, "all", names)
    submit(course, stem, "blank")
    submit(course, stem, "half", names[::2])
    submit(course, stem, "tampered", names[:1], tamper)
    submit(course, stem, "endless", [names[1]], loop)
    broken = course / "submitted" / "broken" / stem / f"{stem}.ipynb"
    broken.parent.mkdir(parents=True)
    broken.write_text("this is no notebook", encoding="utf-8")

    result = nbgrader(course, "autograde", stem, "--Execute.timeout=30")
    points = {name: check.metadata.nbgrader.points for name, (_, check) in found.items()}
    expected = {
        "all": sum(points.values()),
        "blank": 0,
        "half": sum(points[n] for n in names[::2]),
        "tampered": points[names[0]],
        "endless": points[names[1]],
    }
    got = scores(course, stem)
    assert {student: got.get(student) for student in expected} == expected, result.stderr[-4000:]
    assert "broken" in result.stderr and not got.get("broken")
