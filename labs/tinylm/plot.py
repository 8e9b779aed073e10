"""One style for the figures, and the few helpers that several labs need."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# One colour for one thing throughout the book (Okabe-Ito).
INK, MUTED = "#2b2f36", "#6b7078"
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"


def use_style() -> None:
    """Give every figure from here on the book's look."""
    plt.style.use(Path(__file__).parent / "tinylm.mplstyle")


def label(ax: Axes, x: float, y: float, text: str, color: str = INK, **kwargs) -> None:
    """Write a label beside a line or point, in its colour, instead of in a legend."""
    kwargs = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9, **kwargs}
    ax.annotate(text, (x, y), color=color, **kwargs)


def reference_line(ax: Axes, y: float, text: str, color: str = MUTED) -> None:
    """A thin horizontal line at `y`, labelled above its right end."""
    ax.axhline(y, color=color, lw=1, ls=(0, (4, 3)), zorder=1)
    ax.annotate(
        text, (1, y), xycoords=ax.get_yaxis_transform(), xytext=(0, 3), textcoords="offset points", ha="right",
        va="bottom", fontsize=8.5, color=color,
    )  # fmt: skip


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Running mean over the last `window` values (fewer at the start)."""
    total, out = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def show(figure: Figure, name: str, alt: str) -> None:
    """Display a figure with a text alternative, and under a name by which the book can place it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    width, height = (round(inches * 100) for inches in figure.get_size_inches())
    plt.close(figure)
    display(
        {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": alt},
        raw=True,
        metadata={
            "image/png": {"width": width, "height": height},
            "scrapbook": {"name": name, "mime_prefix": ""},
            "alt": alt,
        },
    )
