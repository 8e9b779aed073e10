"""Predict before reveal: a question whose answer is held back until the reader commits to a guess."""

from __future__ import annotations

import html
from collections.abc import Sequence

from IPython.display import display

_asked: dict[str, dict] = {}  # by question, in the order of asking


def predict(question: str, options: Sequence[str], answer: int, why: str) -> None:
    """Ask, and show the answer (an index into `options`) and the reason once a guess is committed.

    In a page, where nothing runs, the answer stands in a fold; without ipywidgets it does so in the notebook too. The
    guess is kept for `predictions`. Raises ValueError for an answer that is none of the options.
    """
    if not 0 <= answer < len(options):
        raise ValueError(f"answer must be an index into the {len(options)} options, got {answer}")
    letters = [f"({chr(97 + i)}) {option}" for i, option in enumerate(options)]
    earlier = _asked.get(question, {}).get("guess")  # of a cell that is run again
    _asked[question] = asked = {"answer": letters[answer], "guess": earlier}
    choices = "".join(f"<li>{html.escape(option)}</li>" for option in options)
    reveal = f"<p>{html.escape(letters[answer])}. {html.escape(why)}</p>"
    fold = (
        f'<div class="predict"><p><strong>Predict.</strong> {html.escape(question)}</p><ol type="a">{choices}</ol>'
        f"<details><summary>Show the answer</summary>{reveal}</details></div>"
    )
    bundle = {"text/html": fold, "text/plain": f"Predict. {question} {'  '.join(letters)}"}
    try:
        bundle["application/vnd.jupyter.widget-view+json"] = _widget(question, letters, reveal, asked)
    except ImportError:
        pass
    display(bundle, raw=True)


def _widget(question: str, letters: list[str], reveal: str, asked: dict) -> dict:
    """The live form: options, a button that commits, and then the answer. Returns its view for a display."""
    import ipywidgets

    choice = ipywidgets.RadioButtons(options=letters, value=None, layout={"width": "max-content"})
    commit = ipywidgets.Button(description="Commit", disabled=True, tooltip="Commit to this guess and see the answer")
    shown = ipywidgets.HTML()

    def chosen(change) -> None:
        commit.disabled = change["new"] is None

    def committed(_) -> None:
        asked["guess"] = choice.value
        choice.disabled = commit.disabled = True
        shown.value = f"<p>You guessed {html.escape(choice.value)}.</p>{reveal}"

    choice.observe(chosen, "value")
    commit.on_click(committed)
    box = ipywidgets.VBox([ipywidgets.HTML(f"<b>Predict.</b> {html.escape(question)}"), choice, commit, shown])
    asked["widgets"] = box  # kept alive, and found by the tests
    return {"version_major": 2, "version_minor": 0, "model_id": box.model_id}


def predictions() -> None:
    """Print what was guessed beside what came out; "no guess" where none was committed."""
    for question, asked in _asked.items():
        guess, answer = asked["guess"], asked["answer"]
        outcome = "no guess" if guess is None else "as you guessed" if guess == answer else f"you guessed {guess}"
        print(f"{question}\n  {answer}: {outcome}")
