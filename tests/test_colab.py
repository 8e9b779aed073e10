"""The labs on the versions that Colab has: published notebooks, complete and student, in an environment of their own.

PyTorch is this project's (2.13 stands in for Colab's), and so is the Python; .github/workflows/colab.yml uses the image.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "labs"))
import publish  # noqa: E402

ADDRESS = "https://example.org/owner/name"  # git reads a copy on disk instead
CONSTRAINTS = ROOT / "tests" / "colab-constraints.txt"


def wanted() -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment with Colab's versions."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    torch = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)[0]
    pins = [str(r) for r in wanted() if r.name != "torch"]
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input"]
    subprocess.run([*pip, "install", torch, "nbclient", "setuptools", *pins], check=True)
    return python


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of all notebooks as they are published, and a repository with this checkout's files."""
    repository = tmp_path_factory.mktemp("repository")
    ignored = shutil.ignore_patterns("__pycache__", ".*", "*.ipynb")
    shutil.copytree(ROOT / "labs", repository / "labs", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, repository / name)
    git = ["git", "-C", repository, "-c", "user.name=a test", "-c", "user.email=", "-c", "core.autocrlf=false"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "a copy"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    folder = tmp_path_factory.mktemp("published")
    publish.publish(folder, ADDRESS, head)
    return folder, repository


def test_every_lab_runs_on_colabs_versions_and_leaves_them_alone(python, published, tmp_path):
    notebooks, repository = published
    environment = {**os.environ, "TINYLM_BUDGET": "0.02", "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": ADDRESS}
    environment["GIT_CONFIG_KEY_0"] = f"url.{repository.as_uri()}.insteadOf"
    environment.pop("PYTHONPATH", None)
    command = [python, ROOT / ".ci" / "colab.py", notebooks]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    passed = set(re.findall(r"^(\S+): passed$", result.stdout.replace("\\", "/"), re.M))
    assert passed == {p.relative_to(notebooks).as_posix() for p in notebooks.rglob("*.ipynb")} and len(passed) >= 2
    drifted = [line for line in result.stdout.splitlines() if line.startswith("::warning::")]
    assert [line for line in drifted if "torch" not in line] == [], "the environment has not the versions it should"
    assert not list(tmp_path.iterdir()), "a lab leaves no files behind"
