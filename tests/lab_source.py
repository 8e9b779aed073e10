"""A lab's functions and classes, taken from its source without running the lab."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

LABS = Path(__file__).resolve().parent.parent / "labs"


def definitions(stem: str, **names: object) -> SimpleNamespace:
    """Imports, functions and classes of labs/<stem>.py, defined in the lab's order; `names` stands in for its globals."""
    tree = ast.parse((LABS / f"{stem}.py").read_text(encoding="utf-8"))
    kept = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)]
    scope: dict[str, object] = dict(names)
    exec(compile(ast.Module(kept, []), f"labs/{stem}.py", "exec"), scope)
    return SimpleNamespace(**{k: v for k, v in scope.items() if not k.startswith("__")})
