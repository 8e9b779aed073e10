"""One style for the figures, and the few helpers that several labs need."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

# One colour for one thing throughout the book (Okabe-Ito).
INK, MUTED = "#2b2f36", "#6b7078"
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"


def use_style() -> None:
    """Give every figure from here on the book's look."""
    plt.style.use(Path(__file__).parent / "tinylm.mplstyle")


def legible(color: str) -> str:
    """The colour, darkened until text in it has a contrast of 4.5 to 1 on the figures' ground (WCAG 2, AA)."""
    rgb = to_rgb(color)
    while (luminance(to_rgb(plt.rcParams["figure.facecolor"])) + 0.05) / (luminance(rgb) + 0.05) < 4.5:
        rgb = tuple(0.95 * channel for channel in rgb)
    return to_hex(rgb)


def luminance(rgb: tuple[float, ...]) -> float:
    """Relative luminance of an sRGB colour, 0 to 1 (WCAG 2)."""
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def label(ax: Axes, x: float, y: float, text: str, color: str = INK, **kwargs) -> None:
    """Write a label beside a line or point, in its colour, instead of in a legend."""
    kwargs = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9, **kwargs}
    ax.annotate(text, (x, y), color=legible(color), **kwargs)


def reference_line(ax: Axes, y: float, text: str, color: str = MUTED) -> None:
    """A thin horizontal line at `y`, labelled above its right end."""
    ax.axhline(y, color=color, lw=1, ls=(0, (4, 3)), zorder=1)
    ax.annotate(
        text, (1, y), xycoords=ax.get_yaxis_transform(), xytext=(0, 3), textcoords="offset points", ha="right",
        va="bottom", fontsize=8.5, color=legible(color),
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
    data, metadata = bundle(figure, name, alt)
    display(data, raw=True, metadata=metadata)


def bundle(figure: Figure, name: str, alt: str) -> tuple[dict, dict]:
    """A figure as a notebook's output, data and metadata; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    width, height = (round(inches * 100) for inches in figure.get_size_inches())
    plt.close(figure)
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": alt}
    metadata = {
        "image/png": {"width": width, "height": height},
        "scrapbook": {"name": name, "mime_prefix": ""},
        "alt": alt,
    }
    return data, metadata
