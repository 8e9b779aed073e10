"""The explorer of lab 02: what it says of a rounded model is what the lab's functions say, and its controls work."""

from __future__ import annotations

import base64
import html
import re
import sys

import matplotlib.pyplot as plt
import pytest
import torch

from lab_source import definitions
from tinylm import checkpoint, data

HESSIANS: dict[str, torch.Tensor] = {}


@pytest.fixture(scope="module")
def lab():
    return definitions("02_quantization", hessians=HESSIANS)


@pytest.fixture(scope="module")
def model(lab):
    """The small checkpoint, so that GPTQ takes no time, and its Hessians."""
    torch.manual_seed(0)
    model = checkpoint.load("shakespeare-30k")
    windows = data.random_windows(data.shakespeare().train_tokens, 8, 64, seed=0)
    for name, x in lab.layer_inputs(model, windows).items():
        HESSIANS[name] = x.T @ x / len(x)
    return model


@pytest.fixture(scope="module")
def judge(lab, model):
    return lab.Judge(model, data.fixed_windows(data.shakespeare().val_tokens, 64, limit=16))


def test_a_try_is_what_the_labs_functions_make(lab, model, judge):
    for bits, size in ((3, None), (4, 16), (8, 8)):
        tried = lab.explore(model, judge, "round to nearest", bits, size)
        rounded, stored = lab.quantized(model, lab.nearest(bits, size))
        expected = judge(rounded)
        for key in ("kl", "difference", "agreement"):
            assert tried[key] == pytest.approx(expected[key])
        assert tried["bits"] == lab.true_bits(model, stored)[0] and tried["text"] == lab.writes(rounded)
    nf4 = lab.explore(model, judge, "NF4", 4, 16)
    assert nf4["bits"] == 4 + 32 / 16
    gptq, nearest = (lab.explore(model, judge, name, 3, 16) for name in ("GPTQ", "round to nearest"))
    assert gptq["bits"] == nearest["bits"] == 3 + 16 / 16 and gptq["kl"] < nearest["kl"]


def test_more_bits_and_smaller_groups_move_the_model_less(lab, model, judge):
    by_bits = [lab.explore(model, judge, "round to nearest", bits, None)["kl"] for bits in (2, 4, 6, 8)]
    assert by_bits == sorted(by_bits, reverse=True) and by_bits[-1] < 1e-3 < by_bits[0]
    assert (
        lab.explore(model, judge, "round to nearest", 3, 8)["kl"]
        < lab.explore(model, judge, "round to nearest", 3, None)["kl"]
    )


@pytest.mark.parametrize(
    "wrong", [("AWQ", 4, 16), ("NF4", 3, 16), ("GPTQ", 9, 16), ("round to nearest", 4, 5), ("NF4", 4, 0.5)]
)
def test_what_cannot_be_is_refused(lab, model, judge, wrong):
    with pytest.raises(ValueError):
        lab.explore(model, judge, *wrong)


def test_a_try_is_put_in_words(lab):
    tried = {"bits": 4.5, "difference": 0.0123, "error": 0.001, "kl": 0.02, "agreement": 0.9, "text": "To see"}
    words = lab.in_words(tried, "To be!")
    assert (
        words.startswith("4.50 true bits a weight. Loss +0.0123 +- 0.0010 nats, KL 0.0200") and "same at 90.0%" in words
    )
    assert "the first 3 characters" in words and words.endswith("\n\nTo see")
    assert "the first 6 characters" in lab.in_words(tried, "To see")


@pytest.fixture
def attempts(lab, model, judge):
    """What the lab's cell does, on the small model; its tries, in order."""
    table = {"a rung": {"bits": 4.5, "kl": 0.01, "control": False}, "noise": {"bits": 4.5, "kl": 0.1, "control": True}}
    tries, unrounded = {}, lab.writes(model)

    def attempt(name, bits, group_size):
        tried = lab.explore(model, judge, name, bits, group_size)
        tries[f"{name}, {bits}, {group_size}"] = tried
        return *lab.tries_figure(table, tries), lab.in_words(tried, unrounded)

    attempt.tries = tries
    return attempt


def test_the_controls_round_the_model_and_change_what_is_shown(lab, attempts):
    method, bits, group, button, shown = lab.explorer(attempts).children
    assert shown.value == "" and not bits.disabled
    seen = []
    for name, n, size in (("round to nearest", 2, None), ("round to nearest", 6, 16), ("GPTQ", 3, 16)):
        method.value, bits.value, group.value = name, n, size
        assert len(attempts.tries) == len(seen), "moving a control rounds nothing yet"
        button.click()
        last = list(attempts.tries.values())[-1]
        assert list(attempts.tries)[-1] == f"{name}, {n}, {size}"
        alt, image = re.search(r'alt="([^"]*)" src="data:image/png;base64,([^"]*)"', shown.value).groups()
        assert base64.b64decode(image).startswith(b"\x89PNG") and f"KL {last['kl']:.2g} nats" in html.unescape(alt)
        assert html.escape(last["text"]) in shown.value and f"{last['bits']:.2f} true bits" in shown.value
        assert not button.disabled and button.description == "Round the model"
        seen.append((image, alt))
    assert len({image for image, _ in seen}) == len({alt for _, alt in seen}) == 3, "the figure and its text follow"
    method.value = "NF4"
    assert bits.disabled and bits.value == 4
    button.click()
    assert list(attempts.tries)[-1] == "NF4, 4, 16"
    method.value = "GPTQ"
    assert not bits.disabled
    assert not plt.get_fignums(), "no figure is left open"


def test_a_failure_is_shown_and_gives_the_button_back(lab):
    def attempt(*choice):
        raise ValueError("3 < 4: no memory")

    *_, button, shown = lab.explorer(attempt).children
    button.click()
    assert "ValueError: 3 &lt; 4: no memory" in shown.value
    assert not button.disabled and button.description == "Round the model"


def test_without_ipywidgets_there_is_the_still(lab, attempts, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert lab.explorer(attempts) is None and "pip install ipywidgets" in capsys.readouterr().out
