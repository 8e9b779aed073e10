"""Numbers and verdicts that the book quotes. Jupyter Book's `glue` reads them from a lab's stored outputs.

The records are written by hand in glue's format, because Colab has no myst_nb.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from IPython.display import display

STATUSES = ("holds here", "holds in part", "fails here", "cannot be told at this scale")
_GLUE = "application/papermill.record/"


def _glue(name: str, text: str, **more: object) -> None:
    """A record that is not shown but stands in the notebook's outputs."""
    data = {f"{_GLUE}text/plain": text} | {f"{_GLUE}{mime}": value for mime, value in more.items()}
    display(data, raw=True, metadata={"scrapbook": {"name": name, "mime_prefix": _GLUE}})


def report(name: str, value: float | str, unit: str = "") -> None:
    """Print a result and put it where a chapter can quote it by `name`.

    A float is kept to six significant digits. Raises ValueError when it is not finite.
    """
    if isinstance(value, str):
        shown, stored = value, repr(value)
    else:
        value = float(value) if not isinstance(value, int) else value
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}: a result must be finite before it is reported")
        stored = str(value) if isinstance(value, int) else repr(float(f"{value:.6g}"))
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e6 else f"{value:.3e}"
    print(f"{name.replace('_', ' ')}: {shown}{' ' if unit else ''}{unit}")
    _glue(name, stored)


def report_table(name: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Display a table of texts and put it where a chapter can place it by `name` (directive `lab-table`).

    The first column is text, the others are numbers as they are to be read. Raises ValueError for a row of another length.
    """
    rows = [list(row) for row in rows]
    for row in rows:
        if len(row) != len(headings):
            raise ValueError(f"{name} has {len(headings)} headings and a row with {len(row)} entries: {row}")

    def line(cells: Sequence[str], tag: str) -> str:
        sides = ["left", *["right"] * (len(cells) - 1)]
        texts = (html.escape(cell) for cell in cells)
        return "".join(f'<{tag} style="text-align: {s}">{t}</{tag}>' for s, t in zip(sides, texts, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    page = f"<table><thead><tr>{line(headings, 'th')}</tr></thead><tbody>{body}</tbody></table>"
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    plain = "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [headings, *rows])
    data = {"text/html": page, "text/plain": plain}
    metadata = {"scrapbook": {"name": name, "mime_prefix": ""}, "table": {"headings": list(headings), "rows": rows}}
    display(data, raw=True, metadata=metadata)


def verdict(claim: int, status: str, measured: str, interval: str, why: str) -> None:
    """State what became of a claim (its number), for the lab and for the claims page.

    status: one of STATUSES. measured: what was measured, with its unit. interval: its spread and over what. why: what
    decides, and what this scale cannot tell.
    """
    if status not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}; got {status!r}")
    text = f"**Claim {claim}: {status}.** Measured: {measured} ({interval}). {why}"
    display({"text/markdown": text, "text/plain": text.replace("**", "")}, raw=True)
    record = {"claim": claim, "status": status, "measured": measured, "interval": interval, "why": why}
    _glue(f"verdict_{claim}", repr(text), **{"verdict+json": record})
