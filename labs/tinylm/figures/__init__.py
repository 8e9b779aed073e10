"""Interactive figures: live in a notebook, a still in its stored output, live again on a page without a kernel.

A figure is two files of one name in this folder.

    NAME.mjs    draws it: an ES module in anywidget's form, `export default { render }`. What it needs beside itself it
                imports from "./kit.mjs" and nowhere else. It reads `state` and `data` from its model and writes `state`.
    NAME.py     knows it in Python:
                initial(**changes) -> dict        the state it starts in; raises ValueError for one that cannot be
                data() -> dict                    what it shows that never changes
                numbers(state) -> dict            what the module computes, computed by tinylm (a test compares them)
                draw(state) -> (Figure, str)      the still, and its text alternative

A lab's cell ends in `interactive("NAME")` and is tagged `widget`; a chapter places what the lab stored, with the directive
`interactive-figure`.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
_KIT = re.compile(r'^import \{[^}]*\} from "\./kit\.mjs";$', re.M)
_EXPORT = re.compile(r"^export (default )?", re.M)


def source(name: str) -> str:
    """The module of a figure as one ES module that imports nothing: kit.mjs stands where it was imported."""
    kit = _EXPORT.sub("", (HERE / "kit.mjs").read_text(encoding="utf-8"))
    return _KIT.sub(lambda _: kit, (HERE / f"{name}.mjs").read_text(encoding="utf-8"), count=1)


def script(name: str) -> str:
    """The same text as the body of a classic script, which may stand in a page opened from a file.

    Exported names become plain ones; the default export becomes a block without effect. `render` and kit's `mount` remain.
    """
    return _EXPORT.sub("", source(name))


def style() -> str:
    return (HERE / "kit.css").read_text(encoding="utf-8")


class interactive:
    """A figure to be the last expression of a notebook's cell: `interactive("model_size", dim=256)`.

    Its output holds the live figure and a still. A notebook with a kernel shows the first, a page the second. Without
    anywidget only the still is there.

    `state` is what the reader has chosen, `numbers` what follows from it, and `set(dim=512)` moves the figure. `widget` is
    the ipywidgets widget, or None.
    """

    def __init__(self, name: str, **changes: object):
        self.name, self._module = name, import_module(f"{__name__}.{name}")
        self.data, state = self._module.data(), self._module.initial(**changes)
        self.widget = _widget(name, state, self.data)
        self._held = self.widget or SimpleNamespace(state=state)

    @property
    def state(self) -> dict:
        return dict(self._held.state)

    @property
    def numbers(self) -> dict:
        return self._module.numbers(self.state)

    def set(self, **changes: object) -> None:
        self._held.state = self._module.initial(**{**self.state, **changes})

    def _repr_mimebundle_(self, **_: object) -> tuple[dict, dict]:
        from tinylm import plot

        figure, alt = self._module.draw(self.state)
        data, metadata = plot.bundle(figure, self.name, alt)
        metadata["interactive"] = {"state": self.state, "data": self.data}
        if self.widget is not None:
            live, more = self.widget._repr_mimebundle_()
            data, metadata = {**live, **data}, {**more, **metadata}
        return data, metadata


def _widget(name: str, state: dict, data: dict) -> object | None:
    try:
        import anywidget
        import traitlets
    except ImportError:
        print("This figure is a still here: in a Python that has anywidget (pip install anywidget) it can be operated.")
        return None

    class Widget(anywidget.AnyWidget):
        _esm, _css = source(name), style()
        state = traitlets.Dict().tag(sync=True)
        data = traitlets.Dict().tag(sync=True)

    return Widget(state=state, data=data)
