"""The directive `interactive-figure`: a figure that a lab has stored, live on the page without a kernel.

    ```{interactive-figure} 00_tiny_model model_size
    The caption.
    ```

It starts in the state which the lab's cell stored. The module of tinylm.figures stands in the page itself, since a browser
does not load one beside a page that was opened from a file, and runs where it stands, so that nothing moves when it has
drawn. Where scripts do not run there is the lab's still.
"""

from __future__ import annotations

import html
import json

from docutils import nodes
from lab_figure import LabFigure

from tinylm import figures

PAGE = """\
<div class="tinylm-figure" data-figure="{name}" data-values="{values}">
<p>The script that draws this figure did not run.</p>
</div>
<script>
(() => {{
"use strict";
{script}
const el = document.currentScript.previousElementSibling;
mount(render, el, JSON.parse(el.dataset.values), {style});
}})();
</script>
"""


class InteractiveFigure(LabFigure):
    """A lab's figure, with its live half in front of it."""

    def run(self):
        env = self.state.document.settings.env
        stem, name = self.arguments
        for path in figures.HERE.glob("*.*"):
            env.note_dependency(str(path))
        placed = env.temp_data.setdefault("interactive_figures", set())
        if name in placed:
            raise self.error(f"{name} stands on this page already")
        placed.add(name)
        result = super().run()
        stored = self.notebook_output["metadata"].get("interactive")
        if stored is None:
            raise self.error(f"{name} of {stem} is no interactive figure: display it with tinylm.figures.interactive")
        script, style = figures.script(name), json.dumps(figures.style())
        if "</script" in (script + style).lower() or "<!--" in script + style:
            raise self.error(f"{name}.mjs, kit.mjs or kit.css would end the page's script element")
        live = PAGE.format(name=name, values=html.escape(json.dumps(stored)), script=script, style=style)
        figure = result[0]
        figure["classes"].append("interactive-figure")
        image = next(figure.findall(nodes.image))
        image.parent.insert(image.parent.index(image), nodes.raw("", live + "<noscript>", format="html"))
        image.parent.insert(image.parent.index(image) + 1, nodes.raw("", "</noscript>", format="html"))
        return result


def setup(app):
    app.add_directive("interactive-figure", InteractiveFigure)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
