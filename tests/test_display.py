"""What report, verdict and show leave in a notebook is what the book reads."""

from __future__ import annotations

import ast
import base64
import math
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb

from tinylm import plot, predict, report

GLUE = "application/papermill.record/"


@pytest.fixture
def displayed(monkeypatch):
    """What was displayed, as (data, metadata) pairs."""
    out: list[tuple[dict, dict]] = []

    def record(data, raw, metadata=None):
        out.append((data, metadata or {}))

    monkeypatch.setattr(report, "display", record)
    monkeypatch.setattr(plot, "display", record)
    monkeypatch.setattr(predict, "display", record)
    monkeypatch.setattr(predict, "_asked", {})
    return out


@pytest.mark.parametrize(
    ("value", "stored"), [(1.23456789, 1.23457), (42, 42), (3.15e23, 3.15e23), (0.1, 0.1), (-2e-9, -2e-9), ("text", "text")]
)
def test_a_reported_value_comes_back(value, stored, displayed, capsys):
    report.report("val_loss", value, "nats")
    ((data, metadata),) = displayed
    assert ast.literal_eval(data[GLUE + "text/plain"]) == stored
    assert metadata["scrapbook"] == {"name": "val_loss", "mime_prefix": GLUE}
    shown = capsys.readouterr().out
    assert shown.startswith("val loss: ") and shown.endswith(" nats\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(value, displayed):
    with pytest.raises(ValueError, match="val_loss is .* must be finite"):
        report.report("val_loss", value)
    assert not displayed


def test_a_table_is_shown_and_kept(displayed):
    report.report_table("ladder", ["rung", "bits"], [["4 bits & more", "4.50"], ["8", "8.11"]])
    ((data, metadata),) = displayed
    assert "4 bits &amp; more</td>" in data["text/html"] and data["text/html"].count("<tr>") == 3
    assert data["text/plain"].splitlines()[1:] == ["4 bits & more  4.50", "            8  8.11"]
    assert metadata["scrapbook"]["name"] == "ladder"
    assert metadata["table"] == {"headings": ["rung", "bits"], "rows": [["4 bits & more", "4.50"], ["8", "8.11"]]}
    with pytest.raises(ValueError, match="2 headings and a row with 1"):
        report.report_table("ladder", ["rung", "bits"], [["8"]])


def test_a_verdict_is_shown_and_stored(displayed):
    report.verdict(7, "holds in part", "0.03 nats", "three seeds", "Because.")
    (shown, _), (stored, metadata) = displayed
    assert shown["text/markdown"].startswith("**Claim 7: holds in part.**")
    assert stored[GLUE + "verdict+json"] == {
        "claim": 7, "status": "holds in part", "measured": "0.03 nats", "interval": "three seeds", "why": "Because.",
    }  # fmt: skip
    assert metadata["scrapbook"]["name"] == "verdict_7"


def test_a_verdict_has_one_of_four_statuses(displayed):
    with pytest.raises(ValueError, match="holds here, holds in part, fails here, cannot be told"):
        report.verdict(7, "true", "0.03 nats", "three seeds", "Because.")
    assert not displayed


def test_a_figure_carries_its_alternative_and_is_closed(displayed):
    plot.use_style()
    figure, axis = plt.subplots()
    axis.plot([1, 2])
    plot.show(figure, "fig_test", "A rising line.")
    ((data, metadata),) = displayed
    png = base64.b64decode(data["image/png"])
    assert png.startswith(b"\x89PNG") and metadata["alt"] == data["text/plain"] == "A rising line."
    assert metadata["scrapbook"]["name"] == "fig_test"
    assert not plt.fignum_exists(figure.number)


def test_smooth_is_a_running_mean():
    assert plot.smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert plot.smooth([5.0], 10) == [5.0]


def test_figures_are_opaque_and_their_text_is_legible():
    """The ground is the figure's own, so contrast is the same on a light and on a dark page (WCAG: 4.5 to 1)."""
    with plt.style.context("default"):
        plot.use_style()
        ground = plot.luminance(to_rgb(plt.rcParams["figure.facecolor"]))
        assert plt.rcParams["savefig.facecolor"] == plt.rcParams["axes.facecolor"] == plt.rcParams["figure.facecolor"]
        colors = [plt.rcParams[k] for k in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")]
        lines = [plot.BLUE, plot.VERMILION, plot.GREEN, plot.PURPLE, plot.SKY, plot.ORANGE]
        for color in [*colors, plot.INK, plot.MUTED, *map(plot.legible, lines)]:
            assert (ground + 0.05) / (plot.luminance(to_rgb(color)) + 0.05) >= 4.5, color
        assert plot.legible(plot.INK) == plot.INK
        assert plot.luminance(to_rgb("#ffffff")) == pytest.approx(1) and plot.luminance((0, 0, 0)) == 0


def test_colab_needs_no_book():
    code = "import sys, tinylm.report, tinylm.plot; sys.exit('myst_nb' in sys.modules or 'sphinx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


WIDGET = "application/vnd.jupyter.widget-view+json"


def ask(answer=1):
    predict.predict("1 < 2?", ["no", "yes"], answer, "Because.")
    return predict._asked["1 < 2?"]


def test_a_prediction_holds_its_answer_back_until_a_guess(displayed, capsys):
    asked = ask()
    ((data, _),) = displayed
    assert data[WIDGET]["model_id"] == asked["widgets"].model_id
    question, choice, commit, shown = asked["widgets"].children
    assert "1 &lt; 2?" in question.value and choice.value is None and commit.disabled and not shown.value
    choice.value = "(a) no"
    assert not commit.disabled and not shown.value
    predict.predictions()
    assert "no guess" in capsys.readouterr().out, "a guess that is not committed is none"
    commit.click()
    assert "You guessed (a) no." in shown.value and "(b) yes. Because." in shown.value
    assert choice.disabled and commit.disabled
    predict.predictions()
    assert capsys.readouterr().out == "1 < 2?\n  (b) yes: you guessed (a) no\n"


def test_a_right_guess_is_called_so(displayed, capsys):
    _, choice, commit, _ = ask()["widgets"].children
    choice.value = "(b) yes"
    commit.click()
    predict.predictions()
    assert "(b) yes: as you guessed" in capsys.readouterr().out


def test_in_a_page_a_prediction_is_a_fold(displayed, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # a reader may have none
    ask()
    ((data, _),) = displayed
    assert WIDGET not in data
    before, fold = data["text/html"].split("<details>")
    assert "1 &lt; 2?" in before and "Because" not in before and "(b) yes. Because." in fold
    assert "Because" not in data["text/plain"]


def test_an_answer_that_is_no_option_is_refused(displayed):
    with pytest.raises(ValueError, match="index into the 2 options, got 2"):
        ask(answer=2)
