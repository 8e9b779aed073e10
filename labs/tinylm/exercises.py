"""While an exercise is unsolved, a cell that needs it says so in a sentence, and the notebook runs on.

An unsolved exercise is a function as nbgrader leaves it: "# YOUR CODE HERE", and below it NotImplementedError is raised.
"""

from __future__ import annotations

import ast
import linecache
import os
from types import TracebackType

from IPython import get_ipython

SENTENCE = (
    "Not run: this cell needs `{}`, an exercise that is not solved yet. Solve it, then run the cells from there to here."
)


def listen() -> None:
    """Start in the running notebook. Under nbgrader (and outside of a notebook) do nothing: there a blank is an error."""
    shell = get_ipython()
    if shell is not None and "NBGRADER_EXECUTION" not in os.environ and not hasattr(shell, "_tinylm_exercises"):
        shell._tinylm_exercises = _Listener(shell)


class _Listener:
    """Knows which names a cell would have defined had it not stopped at an unsolved exercise."""

    def __init__(self, shell):
        self.shell = shell
        self.blocked: dict[str, str] = {}  # name -> the exercise that it waits for
        self.stopped: str | None = None  # the exercise that the running cell needs
        shell.set_custom_exc((NotImplementedError, NameError), self.explain)
        shell.events.register("post_run_cell", self.settle)

    def explain(self, shell, kind: type, error: BaseException, trace: TracebackType, tb_offset=None) -> None:
        self.stopped = self.cause(error, trace)
        if self.stopped is None:
            shell.showtraceback((kind, error, trace), tb_offset=tb_offset)
        else:
            print(SENTENCE.format(self.stopped))

    def cause(self, error: BaseException, trace: TracebackType) -> str | None:
        """The unsolved exercise behind an error, or None when it is an error like any other."""
        functions = [trace.tb_frame.f_code.co_qualname]
        while trace.tb_next is not None:
            trace = trace.tb_next
            functions.append(trace.tb_frame.f_code.co_qualname)
        if isinstance(error, NameError):  # within the exercise itself it is the reader's own
            exercise = self.blocked.get(error.name)
            return exercise if exercise not in functions else None
        before = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno - 1)
        return functions[-1] if "YOUR CODE HERE" in before else None

    def settle(self, result) -> None:
        """After each cell: one that stopped counts as run, and what it would have computed must not linger from before."""
        source = result.info.raw_cell or ""
        source = source.partition("\n")[2] if source.startswith("%%") else source
        assigned, defined = bound_names(self.shell.transform_cell(source))
        if self.stopped is None:
            for name in (assigned | defined) & self.blocked.keys() & self.shell.user_ns.keys():
                del self.blocked[name]
            return
        for name in assigned:
            self.shell.user_ns.pop(name, None)
        waiting = assigned | {name for name in defined if name not in self.shell.user_ns}
        self.blocked.update(dict.fromkeys(waiting, self.stopped))
        result.error_in_exec, self.stopped = None, None


def bound_names(source: str) -> tuple[set[str], set[str]]:
    """Top-level names of a cell that are bound by assignment (not read before), and by def, class and import."""
    assigned, defined, read = set(), set(), set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            pass  # their variables are their own
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store) and node.id not in read:
                assigned.add(node.id)
            read.add(node.id)
        elif isinstance(node, ast.AugAssign):
            read.update(n.id for n in ast.walk(node.target) if isinstance(n, ast.Name))
        elif isinstance(node, ast.Assign):  # the right side is evaluated first
            for child in (node.value, *node.targets):
                visit(child)
        else:
            for child in ast.iter_child_nodes(node):
                visit(child)

    try:
        visit(ast.parse(source))
    except SyntaxError:  # magics and shell commands
        pass
    return assigned, defined
