"""Numbers in the book come from what labs and tests stored: one that is missing fails the build."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]

PAGE = """# A page

A number: {glue:text}`../labs/00_tiny_model.ipynb::params_30k:,.0f`.

```{lab-figure} 00_tiny_model fig_training
A caption.
```

```{parity-table} 00_tiny_model
Differences.
```

```{lab-table} 02_quantization ladder
Rungs.
```
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A book of one page and the labs that it quotes."""
    folder = tmp_path_factory.mktemp("book")
    shutil.copytree(ROOT / "book", folder / "book", ignore=shutil.ignore_patterns("__pycache__", "*.md", "*.png"))
    (folder / "labs").mkdir()
    labs = ("00_tiny_model", "02_quantization")
    for lab in labs:
        shutil.copy(ROOT / "labs" / f"{lab}.ipynb", folder / "labs")
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    (folder / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    toc = {"format": "jb-book", "root": "book/page", "chapters": [{"file": f"labs/{lab}"} for lab in labs]}
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc), encoding="utf-8")
    return folder


def build(project: Path, page: str) -> subprocess.CompletedProcess:
    (project / "book" / "page.md").write_text(page, encoding="utf-8")
    program = Path(sys.executable).with_name("jupyter-book")
    command = [program, "build", ".", "--all", "-n", "-W", "--keep-going"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, encoding="utf-8")


def test_stored_numbers_figures_and_tables_reach_the_page(project):
    result = build(project, PAGE)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    html = (project / "_build" / "html" / "book" / "page.html").read_text(encoding="utf-8")
    assert "A number: <span" in html and "29,856" in html
    assert "LlamaForCausalLM" in html and "fig_training.png" in html
    assert "<p>loss, nats</p>" in html and "<p>4 bits, one a row</p>" in html


@pytest.mark.parametrize(
    ("there", "missing", "complaint"),
    [
        ("params_30k", "params_31k", "params_31k"),
        ("fig_training", "fig_trainings", "has no stored figure 'fig_trainings'"),
        ("parity-table} 00", "parity-table} 09", "there is no 09_tiny_model.json"),
        ("quantization ladder", "quantization laddder", "has no stored table 'laddder'"),
    ],
    ids=["number", "figure", "parity", "table"],
)
def test_what_is_missing_fails_the_build(project, there, missing, complaint):
    assert there in PAGE
    result = build(project, PAGE.replace(there, missing))
    assert result.returncode != 0 and complaint in result.stdout + result.stderr
