"""The built labs: fresh, clean, small, and runnable alone from the wheel. (nbval compares their outputs: `make test`.)"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "labs"))
import build  # noqa: E402

SOURCES = build.sources([])
# Of the code cells, at most this share may have outputs that are not compared (plots included).
IGNORED_SHARE = 0.4
# Characters that a code cell shows on a page without scrolling sideways.
CODE_WIDTH = 90

each_lab = pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)


def built(source: Path):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def test_there_are_labs():
    assert SOURCES


@each_lab
def test_is_fresh(source):
    assert build.why_stale(source) is None, f"{source.stem} is stale ({build.why_stale(source)}): run `make notebooks`"


@pytest.mark.parametrize("change", ["source", "output", "missing", "student"])
def test_a_stale_lab_is_named(change, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "LABS", tmp_path / "labs")
    monkeypatch.setattr(build, "__file__", str(tmp_path / "labs" / "build.py"))
    lab = ["labs/00_tiny_model.py", "labs/00_tiny_model.ipynb", "labs/student/00_tiny_model.ipynb"]
    for path in ["requirements.txt", "labs/build.py", *lab]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    source = tmp_path / "labs" / "00_tiny_model.py"
    notebook = built(source)
    notebook.metadata["tinylm"]["inputs"] = build.inputs_hash(source)
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    assert build.why_stale(source) is None
    if change == "source":
        source.write_text(source.read_text(encoding="utf-8") + "\n# a change\n", encoding="utf-8")
    elif change == "output":
        output = next(o for c in code_cells(notebook) for o in c.outputs if o.output_type == "stream")
        output["text"] = output["text"] + "0"
        nbformat.write(notebook, source.with_suffix(".ipynb"))
    elif change == "student":
        with build.student_path(source).open("a", encoding="utf-8") as file:
            file.write(" ")
    else:
        source.with_suffix(".ipynb").unlink()
    sentences = {"source": "changed", "output": "were edited", "missing": "not built", "student": "student notebook"}
    expected = sentences[change]
    assert expected in build.why_stale(source)


def test_a_student_notebook_that_somebody_worked_in_is_kept(tmp_path, monkeypatch):
    source = tmp_path / "99_topic.py"
    source.write_text("# %% [markdown]\n# # A lab\n\n# %%\n1 + 1\n", encoding="utf-8")
    monkeypatch.setattr(build, "execute", lambda notebook: (1.0, 1))
    monkeypatch.setattr(build, "inputs_hash", lambda path: "")
    build.build(source)
    build.build(source)
    path = build.student_path(source)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "untouched, it is replaced"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = "my work"
    nbformat.write(notebook, path)
    build.build(source)
    assert nbformat.read(path, as_version=4).cells[1].source == "1 + 1"
    assert nbformat.read(path.with_name(f"edited-{path.name}"), as_version=4).cells[1].source == "my work"


@each_lab
def test_is_built_from_its_source(source):
    fresh, stored = build.complete(build.read_source(source)), built(source)
    assert [c.id for c in fresh.cells] == [c.id for c in stored.cells]
    assert [c.source for c in code_cells(fresh)] == [c.source for c in code_cells(stored)]
    assert len({c.id for c in stored.cells}) == len(stored.cells)
    assert build.SETUP == code_cells(stored)[0].source


def test_cell_ids_survive_a_change_elsewhere(tmp_path):
    text = SOURCES[0].read_text(encoding="utf-8")
    changed = tmp_path / SOURCES[0].name
    changed.write_text(text + "\n# %% [markdown]\n# One more cell.\n", encoding="utf-8")
    before, after = ([c.id for c in build.read_source(p).cells] for p in (SOURCES[0], changed))
    assert after[:-1] == before


@each_lab
def test_holds_nothing_of_the_machine(source):
    notebook = built(source)
    assert "widgets" not in notebook.metadata
    for cell in code_cells(notebook):
        assert "execution" not in cell.metadata
        for output in cell.outputs:
            assert output.output_type != "error"
            assert not build._is_noise(output)
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    for sign in ("/home/", "/root/", "/tmp/", "site-packages", " at 0x"):
        assert sign not in text, sign


@each_lab
def test_every_figure_has_a_text_alternative(source):
    for cell in code_cells(built(source)):
        if any("image/png" in o.get("data", {}) for o in cell.outputs):
            assert len(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")) > 40, cell.source[:60]


@each_lab
def test_every_widget_leaves_a_still_and_nothing_live(source):
    notebook = built(source)
    assert "widgets" not in notebook.metadata and build.WIDGET not in nbformat.writes(notebook)
    for cell in code_cells(notebook):
        live = "interactive(" in cell.source or "ipywidgets" in cell.source
        assert live == ("widget" in cell.metadata.get("tags", [])), f"tag it `widget`, or do not:\n{cell.source}"
        if live:
            stills = [o for o in cell.outputs if "image/png" in o.get("data", {})]
            assert stills and all(len(o.metadata["alt"]) > 40 for o in stills), cell.source


def test_of_a_widget_the_build_keeps_the_still(tmp_path):
    """A live figure that brings its still, a live one that does not, and the state that both leave in the notebook."""
    source = tmp_path / "99_widgets.py"
    cells = [
        "import ipywidgets\nfrom tinylm.figures import interactive\ninteractive('model_size')",
        "ipywidgets.IntSlider()",
    ]
    source.write_text("".join(f'# %% tags=["widget"]\n{cell}\n' for cell in cells), encoding="utf-8")
    notebook = build.read_source(source)
    build.execute(notebook)
    assert nbformat.writes(notebook).count(build.WIDGET) >= 2 and notebook.metadata["widgets"]
    build.normalise(notebook, 1)
    assert build.WIDGET not in nbformat.writes(notebook) and "widgets" not in notebook.metadata
    (still,) = notebook.cells[0].outputs
    assert set(still.data) == {"image/png", "text/plain"} and notebook.cells[1].outputs == []
    assert notebook.cells[0].metadata["mystnb"]["image"]["alt"] == still.metadata["alt"]


@each_lab
def test_few_outputs_go_uncompared_and_asserts_hold_those(source):
    cells = code_cells(built(source))
    ignored = [c for c in cells if "nbval-ignore-output" in c.metadata.get("tags", [])]
    assert len(ignored) <= IGNORED_SHARE * len(cells), f"{len(ignored)} of {len(cells)} cells are not compared"
    for cell in ignored:
        if {"timing", "trained"} & set(cell.metadata.tags):
            asserts = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Assert)]
            assert asserts, f"this cell's output is not compared, and no assert holds its claim:\n{cell.source}"


@each_lab
def test_code_fits_the_page(source):
    for cell in code_cells(built(source)):
        long = [line for line in cell.source.splitlines() if len(line) > CODE_WIDTH and cell.source != build.SETUP]
        assert not long, long


@each_lab
def test_runs_within_two_minutes_and_1500_mb(source):
    stamp = built(source).metadata["tinylm"]
    assert stamp["seconds"] <= 120 and (stamp["peak_mb"] or 0) <= 1500, stamp


@pytest.fixture(scope="session")
def installed_wheel(tmp_path_factory) -> Path:
    """tinylm alone, installed from its wheel into an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    tree = folder / "tree"
    shutil.copytree(ROOT / "labs" / "tinylm", tree / "labs" / "tinylm", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, tree], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@each_lab
def test_runs_alone_from_the_wheel(source, installed_wheel, tmp_path):
    """Complete, in an empty folder, with a tenth of every training budget."""
    notebook = build.read_source(source)
    probe = f"import tinylm; assert tinylm.__file__.startswith({str(installed_wheel)!r}), tinylm.__file__"
    notebook.cells.append(nbformat.v4.new_code_cell(probe))
    environment = {**os.environ, "PYTHONPATH": str(installed_wheel), "TINYLM_BUDGET": "0.1"}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    assert not list(tmp_path.iterdir()), "a lab leaves no files behind"
