"""The figure compute_optimal: its numbers are those of the law, on a page as in Python, and it can be operated."""

from __future__ import annotations

import base64
import html
import json
import math
import sys

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Page
from scipy.optimize import brentq, minimize_scalar

from lab_source import definitions
from test_figures import COLORS, ROOT, normal, tap_at
from tinylm import figures
from tinylm.figures import compute_optimal, interactive

OURS = {
    "our runs on Shakespeare": {
        "E": 1.35, "A": 6.56, "B": 1902.0, "alpha": 0.306, "beta": 0.652, "token": "character",
        "params": [1768, 1.2e6], "tokens": [1.1e5, 2e7], "flops": [1.4e10, 4.2e12],
    },
    "our runs on the synthetic language": {
        "E": 0.3, "A": 1.8, "B": 11.6, "alpha": 0.03, "beta": 0.29, "token": "symbol",
        "params": [1768, 1.2e6], "tokens": [1.1e5, 2e7], "flops": [1.4e10, 4.2e12],
    },
}  # fmt: skip
SHAKESPEARE, SYNTHETIC = OURS


def state_of(**changes: object) -> dict:
    return compute_optimal.initial(**{"own": OURS, **changes})


def of_best(times: float, **changes: object) -> dict:
    """A state whose model has so many times the best size."""
    best = compute_optimal.numbers(state_of(**changes | {"params": None}))["best_params"]
    return state_of(**changes, params=times * best)


# The numbers

exponents, sizes = st.floats(0.05, 1.2), st.floats(1, 1e5)
laws = st.builds(
    lambda e, a, b, alpha, beta: SHAKESPEARES_RUNS | {"E": e, "A": a, "B": b, "alpha": alpha, "beta": beta},
    st.floats(0, 3), sizes, sizes, exponents, exponents,
)  # fmt: skip
SHAKESPEARES_RUNS = OURS[SHAKESPEARE]
budgets = st.floats(10, 27).map(lambda power: min(1e27, 10**power))
ratios = st.floats(-1, 1).map(lambda x: 29.9**x)


def loss(law: dict, n: float, d: float) -> float:
    return law["E"] + law["A"] / n ** law["alpha"] + law["B"] / d ** law["beta"]


def numbers_of(law: dict, c: float, times: float | None = None) -> dict:
    q = compute_optimal.numbers(compute_optimal.initial(own={"it": law}, law="it", flops=c, params=None))
    if times is None:
        return q
    n = times * q["best_params"]
    return compute_optimal.numbers(compute_optimal.initial(own={"it": law}, law="it", flops=c, params=n))


@settings(deadline=None, max_examples=60)
@given(laws, budgets)
def test_the_best_share_is_the_one_that_a_search_finds(law, c):
    q = numbers_of(law, c)
    assert 6 * q["best_params"] * q["best_tokens"] == pytest.approx(c, rel=1e-9)
    assert q["best_loss"] == pytest.approx(loss(law, q["best_params"], q["best_tokens"]), rel=1e-12)
    at = math.log(q["best_params"])

    def above_floor(x: float) -> float:
        return loss(law | {"E": 0}, math.exp(x), c / 6 / math.exp(x))

    found = minimize_scalar(above_floor, bounds=(at - 7, at + 8), method="bounded", options={"xatol": 1e-6})
    assert found.x == pytest.approx(at, abs=1e-3)
    assert q["best_loss"] - law["E"] <= found.fun * (1 + 1e-9) + 1e-12
    assert q["ratio"] == q["best_ratio"] and (q["excess"], q["waste"]) == (0, 1)


@settings(deadline=None, max_examples=60)
@given(laws, budgets, ratios)
def test_the_waste_is_what_a_search_for_the_same_loss_finds(law, c, times):
    q = numbers_of(law, c, times)
    assert q["tokens"] == pytest.approx(c / 6 / q["params"]) and q["ratio"] == pytest.approx(q["tokens"] / q["params"])
    assert q["loss"] == pytest.approx(loss(law, q["params"], q["tokens"]), rel=1e-12)
    a, b = law["alpha"], law["beta"]
    scale = (a * law["A"] / (b * law["B"])) ** (1 / (a + b))

    def log_of_best(log_c: float) -> float:
        """ln of the least loss above the floor, from the logarithm of the budget."""
        n = scale * math.exp((log_c - math.log(6)) * b / (a + b))
        d = math.exp((log_c - math.log(6)) * a / (a + b)) / scale
        return math.log(law["A"] * n**-a + law["B"] * d**-b)

    here = math.log(law["A"] * q["params"] ** -a + law["B"] * q["tokens"] ** -b)
    equal = brentq(lambda log_c: log_of_best(log_c) - here, math.log(c) - 150, math.log(c) + 1, xtol=1e-9)
    assert math.log(q["waste"]) == pytest.approx(math.log(c) - equal, abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(laws, budgets, ratios)
def test_more_operations_buy_more_of_both_and_a_farther_size_wastes_more(law, c, times):
    less, more = numbers_of(law, c / 2 if c >= 2e10 else c), numbers_of(law, c if c >= 2e10 else 2 * c)
    assert less["best_params"] < more["best_params"] and less["best_tokens"] < more["best_tokens"]
    assert less["best_loss"] > more["best_loss"] > law["E"] or more["best_loss"] == pytest.approx(law["E"], abs=1e-9)
    near, far = numbers_of(law, c, times**0.5), numbers_of(law, c, times)
    assert 0 <= near["excess"] + 1e-12 and near["excess"] <= far["excess"] + 1e-12
    assert 1 - 1e-9 <= near["waste"] <= far["waste"] * (1 + 1e-9)
    elsewhere = numbers_of(law, 1e19, times)
    assert elsewhere["waste"] == pytest.approx(far["waste"], rel=1e-6), "the waste depends on N / N_opt alone"


def test_the_published_laws_say_what_is_known_of_them():
    q = {name: compute_optimal.numbers(state_of(**preset)) for name, preset in compute_optimal.PRESETS.items()}
    for name, (n, d) in {
        "GPT-3": (175e9, 3e11),
        "Gopher": (280e9, 3e11),
        "Chinchilla": (70e9, 1.4e12),
        "LLaMA 7B": (6.7e9, 1e12),
    }.items():
        assert q[name]["params"] == n and q[name]["tokens"] == pytest.approx(d)
    # Hoffmann et al. 2022, section 4.2: at equal operations the smaller one, trained longer, is better
    assert q["Chinchilla"]["loss"] < q["Gopher"]["loss"] and q["Chinchilla"]["loss"] < q["GPT-3"]["loss"]
    # Besiroglu et al. 2024: refitted, the law's advice at Chinchilla's budget is the 20 tokens a parameter it was given
    refitted = compute_optimal.numbers(state_of(law=compute_optimal.BESIROGLU, flops=5.88e23, params=70e9))
    assert refitted["best_ratio"] == pytest.approx(20, rel=0.15) and refitted["waste"] < 1.01
    assert q["GPT-3"]["cost"] == pytest.approx(3.15e23 / (312e12 * 0.4) / 3600 * 2)
    assert q["GPT-3"]["exaflop_cost"] * 3.15e5 == pytest.approx(q["GPT-3"]["cost"])


def test_what_lies_beyond_the_runs_is_said():
    law = OURS[SHAKESPEARE]
    inside = compute_optimal.numbers(state_of(law=SHAKESPEARE, flops=1e12, params=None))
    assert inside["beyond"] == 1 and all(
        low <= inside[key] <= high for key, (low, high) in ((key, law[key]) for key in ("params", "tokens"))
    )
    far = compute_optimal.numbers(state_of(law=SHAKESPEARE, flops=4.2e20, params=None))
    assert far["beyond"] == pytest.approx(1e8)
    assert compute_optimal.numbers(state_of(law=SHAKESPEARE, flops=4.2e12, params=None))["beyond"] == 1, "the last run"
    low = compute_optimal.numbers(state_of(flops=1e10, params=None))
    assert low["beyond"] == pytest.approx(6e18 / 1e10)
    for key, n in (("params", law["params"][1] * 1.05), ("tokens", 1e12 / 6 / (law["tokens"][1] * 1.5))):
        q = compute_optimal.numbers(state_of(law=SHAKESPEARE, flops=1e12, params=n))
        assert q["beyond"] == pytest.approx(q[key] / law[key][1]) and q["beyond"] > 1.04
    best = compute_optimal.curve(law, 1e12, inside["best_params"])
    assert best == (pytest.approx(inside["best_loss"]), True)
    assert compute_optimal.optima(law, inside["best_params"])[0] == pytest.approx(inside["best_loss"])
    assert compute_optimal.curve(law, 1e12, 1e7)[1] is compute_optimal.optima(law, 1e7)[1] is False


def test_the_numbers_are_those_of_the_lab():
    lab = definitions("01_scaling_laws", BUDGETS=(), SPAN=0)
    laws = compute_optimal.PUBLISHED | OURS
    for name in laws:
        law = lab.ScalingLaw(**{key: laws[name][key] for key in compute_optimal.CONSTANTS})
        for c, times in ((1e12, 1), (1e12, 4), (1e21, 0.2), (1e25, 20)):
            q = compute_optimal.numbers(of_best(times, law=name, flops=c))
            assert (q["best_params"], q["best_tokens"]) == pytest.approx(law.optimal(c))
            assert (q["best_loss"], q["loss"]) == pytest.approx(
                (law.loss(q["best_params"], q["best_tokens"]), law.loss(q["params"], q["tokens"]))
            )
            assert q["waste"] == pytest.approx(lab.waste(law, q["params"], q["tokens"]), rel=1e-6)
    runs = [{"n_params": n, "tokens": d} for n, d in ((1000, 4000), (3000, 2000))]
    covered = lab.covered(lab.ScalingLaw(1.0, 2.0, 3.0, 0.4, 0.5), runs, "symbol")
    assert compute_optimal.initial(own={"ours": covered}, law="ours", flops=4e10, params=None)["own"]["ours"] == {
        "E": 1.0, "A": 2.0, "B": 3.0, "alpha": 0.4, "beta": 0.5, "token": "symbol",
        "params": [1000, 3000], "tokens": [2000, 4000], "flops": [24e6, 36e6],
    }  # fmt: skip


def test_states_that_cannot_be_are_named():
    for changes, message in [
        ({"law": "Kaplan"}, "law must be one of Hoffmann et al. 2022, .*our runs on Shakespeare.*got 'Kaplan'"),
        ({"flops": 1e28}, r"flops must be a number from 1e\+10 to 1e\+27, got 1e\+28"),
        ({"flops": math.nan}, "flops must be a number"),
        ({"flops": "1e20"}, "flops must be a number"),
        ({"params": 1e18}, r"params must be None or from 8.17e\+08 to 7.35e\+11 \(30 times either way.*got 1e\+18"),
        ({"params": math.nan}, "params must be None or from"),
        ({"params": "7B"}, "params must be None or from"),
        ({"gpu": "TPU"}, "gpu must be one of V100, A100, H100, got 'TPU'"),
        ({"price": 0}, "price must be a number from 0.01 to 100, got 0"),
        ({"utilisation": 40}, "utilisation must be a number from 0.01 to 1, got 40"),
        ({"size": 1e9}, "unknown size; the state has law, flops, params, gpu, price, utilisation, own"),
    ]:
        with pytest.raises(ValueError, match=message):
            interactive("compute_optimal", **changes, own=OURS)
    law = OURS[SHAKESPEARE]
    for own, message in [
        ({"Hoffmann et al. 2022": law}, "is a published law: give your own another name"),
        ({"mine": {key: law[key] for key in law if key not in ("E", "token")}}, "the law 'mine' lacks E, token"),
        ({"mine": law | {"alpha": 0.0}}, "constants must be finite and above 0 .* for 'mine'"),
        ({"mine": law | {"B": math.inf}}, "constants must be finite and above 0 .* for 'mine'"),
        ({"mine": law | {"params": [10, 1]}}, r"params of the law 'mine' must be the least and the largest"),
        ({"mine": law | {"flops": [10]}}, r"flops of the law 'mine' must be the least and the largest"),
    ]:
        with pytest.raises(ValueError, match=message):
            compute_optimal.initial(own=own)
    assert compute_optimal.initial(own={"mine": law | {"E": 0}})["own"]["mine"]["E"] == 0


# The module computes the same


@pytest.fixture(scope="module")
def evaluate(browser):
    """Calls an exported function of the module, as a notebook imports it, on each of a list of states."""
    page = browser.new_page()
    code = base64.b64encode(figures.source("compute_optimal").encode()).decode()

    def call(function: str, states: list[dict]) -> list:
        return page.evaluate(
            """async ([code, name, states, data]) => {
                const module = await import("data:text/javascript;charset=utf-8;base64," + code);
                return states.map(state => module[name](state, data));
            }""",
            [code, function, states, compute_optimal.data()],
        )

    yield call
    page.close()


def many_states() -> list[dict]:
    prices = [{}, {"gpu": "V100", "price": 0.25, "utilisation": 0.05}, {"gpu": "H100", "price": 10, "utilisation": 0.9}]
    names = [*compute_optimal.PUBLISHED, *OURS]
    grid = [(law, 10 ** (10 + i), times) for law in names for i in range(18) for times in (1 / 30, 0.3, None, 1.7, 30)]
    states = []
    for i, (law, c, times) in enumerate(grid):
        changes = {"law": law, "flops": float(c), **prices[i % 3]}
        states.append(state_of(**changes, params=None) if times is None else of_best(times, **changes))
    return states + [state_of(**preset) for preset in compute_optimal.PRESETS.values()]


def test_the_page_computes_what_python_does(evaluate):
    states = many_states()
    assert len(states) == 364
    for state, found in zip(states, evaluate("numbers", states), strict=True):
        expected = compute_optimal.numbers(state)
        assert found.pop("excess") == pytest.approx(expected.pop("excess"), rel=1e-9, abs=1e-12)
        assert found == pytest.approx(expected, rel=1e-9)
    assert evaluate("problem", states) == [None] * len(states)


def test_both_sides_refuse_what_cannot_be(evaluate):
    wrong = [{"law": "Kaplan"}, {"law": None}, {"gpu": "TPU"}, {"flops": 0}, {"flops": 9e9}, {"flops": 1.1e27}]
    wrong += [{"flops": None}, {"flops": "1e20"}, {"price": 0}, {"price": 101}, {"utilisation": 0}, {"utilisation": 2}]
    wrong += [
        {"price": None},
        {"utilisation": "1"},
        {"params": 0},
        {"params": 8.1e8},
        {"params": 7.4e11},
        {"params": "1e9"},
    ]
    states = [state_of() | changes for changes in wrong]
    for state, problem in zip(states, evaluate("problem", states), strict=True):
        assert problem and problem.endswith("."), state
        with pytest.raises(Exception, match="RangeError"):
            evaluate("numbers", [state])
        with pytest.raises(ValueError):
            compute_optimal.numbers(state)


# In a notebook


def test_it_is_a_widget_with_a_still():
    figure = interactive("compute_optimal", own=OURS, law=SHAKESPEARE, flops=1e12, params=None)
    assert figure.widget.get_state()["_esm"] == figures.source("compute_optimal")
    assert figure.widget.get_state()["data"] == json.loads(json.dumps(figure.data))
    figure.widget.set_state({"state": figure.state | {"flops": 10**13}})  # as the browser's message does
    assert figure.numbers == compute_optimal.numbers(figure.state) and figure.state["flops"] == 1e13
    with pytest.raises(ValueError, match="price must be"):
        figure.set(price=-1)
    figure.set(law=SYNTHETIC)
    for state in [figure.state, *(state_of(**preset) for preset in compute_optimal.PRESETS.values())]:
        figure.set(**state)
        data, metadata = figure._repr_mimebundle_()
        assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
        assert metadata["interactive"] == {"state": state, "data": figure.data}
        alt, q = metadata["alt"], figure.numbers
        assert f"by the law of {state['law']}" in alt and f"with loss {q['best_loss']:.3f}" in alt and "%" not in alt
        assert ("A marked model of" in alt) is (state["params"] is not None)
        assert ("beyond the fitted runs by a factor of" in alt) is (q["beyond"] > 1)


def test_every_law_and_budget_can_be_drawn():
    import matplotlib.pyplot as plt

    for law in (*compute_optimal.PUBLISHED, *OURS):
        for c, times in ((1e10, 1 / 30), (1e27, 30)):
            figure, alt = compute_optimal.draw(of_best(times, law=law, flops=c))
            axis = figure.axes[0]
            (low, high), (bottom, top) = axis.get_xlim(), axis.get_ylim()
            for marked in [line for line in axis.lines if line.get_marker() == "o"]:
                (x, *_), (y, *_) = marked.get_xdata(), marked.get_ydata()
                assert low < x < high and bottom < y < top, (law, c, times)
            assert len([t for t in axis.texts if "this size" in t.get_text()]) == 1 and "nan" not in alt
            plt.close(figure)


KEEPS = """async ([code, values, other]) => {
    const { default: figure } = await import("data:text/javascript;charset=utf-8;base64," + code);
    const el = document.body.appendChild(document.createElement("div")), log = [], heard = new Map();
    const model = {
        get: key => values[key],
        set: (key, value) => { values[key] = value; log.push(["set", key, value]); heard.get("change:" + key)?.(); },
        save_changes: () => log.push(["save"]),
        on: (event, f) => heard.set(event, f),
        off: (event, f) => heard.get(event) === f && heard.delete(event),
    };
    const cleanup = await figure.render({ model, el, experimental: {} });
    const budget = el.querySelector("input[type=range]");
    budget.value = 0, budget.dispatchEvent(new Event("input"));
    values.state = other, heard.get("change:state")();  // the kernel moves the figure
    const moved = el.querySelector("output[data-quantity=best_loss]").dataset.value;
    const words = () => el.querySelector("p.words").textContent, before = words();
    cleanup();
    await new Promise(done => setTimeout(done, 700));
    return { log, moved, left: heard.size, silent: words() === before };
}"""


def test_it_and_anywidget_keep_their_contract(browser):
    page = browser.new_page()
    code = base64.b64encode(figures.source("compute_optimal").encode()).decode()
    start, other = state_of(params=None), state_of(law=SYNTHETIC, flops=1e14, params=None)
    found = page.evaluate(KEEPS, [code, {"state": start, "data": compute_optimal.data()}, other])
    page.close()
    assert found["log"] == [["set", "state", start | {"flops": 1e10}], ["save"]] and found["left"] == 0
    assert found["silent"], "a figure that is gone says nothing more"
    assert float(found["moved"]) == pytest.approx(compute_optimal.numbers(other)["best_loss"], rel=1e-9)


# On a page of its own, placed as the book's directive places it, in the colours of the book's theme


@pytest.fixture
def placed(browser, tmp_path):
    """Opens the figure; whatever goes wrong in it fails the test."""
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    from interactive_figure import PAGE

    contexts, faults = [], []

    def open_page(width: int = 1280, theme: str = "light", init: str = "", **changes: object) -> Page:
        values = {"state": state_of(**changes), "data": compute_optimal.data()}
        live = PAGE.format(
            name="compute_optimal", values=html.escape(json.dumps(values)), script=figures.script("compute_optimal"),
            style=json.dumps(figures.style()),
        )  # fmt: skip
        assert len(live) < 50_000
        file = tmp_path / "law.html"
        head = '<meta charset="utf-8"><title>A law</title><meta name="viewport" content="width=device-width">'
        body = f'<main><h1>A law</h1><figure style="margin: 0">{live}<figcaption>After it.</figcaption></figure></main>'
        text = f'<!doctype html><html lang="en" data-theme="{theme}">{head}<style>{COLORS}</style>{body}</html>'
        file.write_text(text, encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, has_touch=width < 500))
        contexts[-1].set_default_timeout(30_000)
        contexts[-1].on("weberror", lambda error: faults.append(error.error))
        page = contexts[-1].new_page()
        page.add_init_script(init)
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def shows(page: Page, state: dict) -> None:
    """Hold the page's numbers to Python's."""
    pairs = "all => Object.fromEntries(all.map(o => [o.dataset.quantity, Number(o.dataset.value)]))"
    found = page.locator("output").evaluate_all(pairs)
    expected = compute_optimal.numbers(state)
    assert found.pop("excess") == pytest.approx(expected.pop("excess"), rel=1e-9, abs=1e-12)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("by", ["mouse", "touch", "keyboard"])
def test_every_control_is_operable(placed, by):
    page = placed(320 if by == "touch" else 1280, params=None)
    shows(page, state_of(params=None))
    page.get_by_text("The price of an operation").press("Enter") if by == "keyboard" else page.get_by_text(
        "The price of an operation"
    ).click()
    changes, drawn = {"params": None}, set()
    for label, field, key, share, value, said in [
        ("Budget", "flops", "Home", 0.0, 1e10, "10¹⁰ operations"),
        ("Budget", "flops", "End", 1.0, 1e27, "10²⁷ operations"),
        ("Model size", "times", "End", 1.0, 30, "best × 30"),
        ("Model size", "times", "Home", 0.0, 1 / 30, "best / 30"),
        ("Price of a GPU hour", "price", "End", 1.0, 10, "$10"),
        ("Utilisation of its peak", "utilisation", "Home", 0.0, 0.05, "5 %"),
    ]:
        slider = page.get_by_role("slider", name=label, exact=True)
        if by == "keyboard":
            slider.focus()
            page.keyboard.press(key)
        else:
            tap_at(page, slider, share, by)
        if field == "times":
            changes["params"] = value * compute_optimal.numbers(state_of(**changes | {"params": None}))["best_params"]
        else:
            changes[field] = value
        assert normal(slider.get_attribute("aria-valuetext")) == said
        assert (
            slider.get_attribute("aria-valuetext")
            == page.locator(f".field:has(#{slider.get_attribute('id')}) .value").inner_text()
        )
        shows(page, state_of(**changes))
        drawn.add(page.locator(".picture svg").first.inner_html())
    assert len(drawn) == 4, "the picture follows, and prices are not in it"
    slider = page.get_by_role("slider", name="Model size", exact=True)
    slider.fill("15")
    changes["params"] = None
    assert slider.get_attribute("aria-valuetext") == "the best"
    law, gpu = page.get_by_label("Law"), page.get_by_label("GPU", exact=True)
    if by == "keyboard":
        law.focus()
        page.keyboard.press("End")
    else:
        law.select_option(label="Our runs on the synthetic language")
    shows(page, state_of(**changes, law=SYNTHETIC))
    gpu.select_option(label="H100, 989 TFLOP/s")
    shows(page, state_of(**changes, law=SYNTHETIC, gpu="H100"))
    for name, preset in compute_optimal.PRESETS.items():
        button = page.get_by_role("button", name=name)
        button.press("Enter") if by == "keyboard" else button.tap() if by == "touch" else button.click()
        shows(page, state_of(**changes | preset, gpu="H100"))
        assert [b.inner_text() for b in page.locator("button[aria-pressed=true]").all()] == [name]
    page.get_by_role("button", name="Our runs on Shakespeare").click()
    shows(page, state_of(**changes | {"law": SHAKESPEARE, "flops": 4.2e12}, gpu="H100"))
    controls = page.locator("[data-figure] :is(button, input, select, summary)").count()
    assert page.locator("[data-figure] [data-lm-suppress-shortcuts]").count() == controls == 13


def test_a_size_can_be_dragged_in_the_picture(placed):
    page = placed(params=None)
    mark = page.locator(".best circle").bounding_box()
    x, y = mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2
    decade = page.locator("svg.draggable").bounding_box()["width"] / 5
    page.mouse.move(x, y)
    page.mouse.down()
    for k, times in ((1, 10), (-1, 0.1), (3, 30)):
        page.mouse.move(x + k * decade, y, steps=4)
        shows(page, of_best(times))
    page.mouse.up()
    page.mouse.move(x, y)
    shows(page, of_best(30))
    page.mouse.click(x + 2, y)
    shows(page, state_of(params=None))


def test_a_finger_that_scrolls_leaves_the_size_alone(placed):
    page = placed(360)
    page.locator("svg.draggable").dispatch_event("pointerdown", {"clientX": 50, "pointerId": 1, "pointerType": "touch"})
    shows(page, state_of())
    page.locator("svg.draggable").tap(position={"x": 100, "y": 100})
    q = page.locator("output[data-quantity=params]")
    assert float(q.get_attribute("data-value")) < compute_optimal.numbers(state_of())["best_params"]


def test_a_size_stays_what_it_is_until_the_picture_can_no_longer_show_it(placed):
    page = placed()
    page.get_by_label("Law").select_option(label="Besiroglu et al. 2024")
    shows(page, state_of(law=compute_optimal.BESIROGLU))
    budget = page.get_by_role("slider", name="Budget")
    budget.fill("42")
    shows(page, state_of(law=compute_optimal.BESIROGLU, flops=1e24))
    budget.fill("0")
    shows(page, of_best(30, law=compute_optimal.BESIROGLU, flops=1e10))


def test_what_the_runs_do_not_cover_is_dashed(placed):
    page = placed(law=SHAKESPEARE, flops=1e12, params=None)
    drawn = [page.locator(f"path.main.{kind}") for kind in ("solid", "dashed")]
    assert (
        all(path.get_attribute("d") for path in drawn)
        and "This point is within them." in page.locator(".note").inner_text()
    )
    assert drawn[1].evaluate("path => getComputedStyle(path).strokeDasharray") != "none"
    page.get_by_role("slider", name="Budget").fill("30")  # 1e20
    assert not drawn[0].get_attribute("d") and drawn[1].get_attribute("d")
    factor = compute_optimal.numbers(state_of(law=SHAKESPEARE, flops=1e20, params=None))["beyond"]
    said = f"beyond by a factor of {factor / 1e7:.3g} × 10⁷."
    assert said in normal(page.locator(".note").inner_text())


def test_the_picture_shows_the_numbers(placed):
    """The marks stand where the scale says, its labels read back, and the curves go through them."""
    for changes in ({}, {"law": SHAKESPEARE, "flops": 1e12, "params": 2e4}, {"flops": 1e10, "params": 9e4}):
        page = placed(**changes)
        box = page.locator("svg.draggable").bounding_box()
        units = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
        ticks, losses = [], []
        read_all = """all => all.map(e => {
            const { x, width } = e.getBoundingClientRect(), at = name => e.getAttribute(name);
            return [e.textContent, x + width / 2, at("text-anchor"), at("x"), Number(at("y"))];
        })"""
        for text, middle, anchor, x, y in page.locator("svg.draggable text").evaluate_all(read_all):
            size, _, unit = normal(text).partition(" ")
            if anchor == "middle" and unit in units and size.isdigit():
                ticks.append((middle, math.log10(float(size) * units[unit])))
            elif size.replace(".", "").isdigit() and x == "0":
                losses.append((y + 4, float(size)))
        assert len(ticks) >= 4 and len(losses) >= 2
        q = compute_optimal.numbers(state_of(**changes))

        def read(at: float, scale: list[tuple[float, float]]) -> float:
            (x0, v0), *_, (x1, v1) = sorted(scale)
            return v0 + (at - x0) * (v1 - v0) / (x1 - x0)

        span = abs(losses[0][1] - losses[-1][1])
        floor = compute_optimal.law_of(state_of(**changes))["E"]
        assert read(float(page.locator("line.limit").get_attribute("y1")), losses) == pytest.approx(
            floor, abs=0.02 * span
        )
        for mark, line, n, nats in (
            (".best circle", "main", "best_params", "best_loss"),
            (".best circle", "optima", "best_params", "best_loss"),
            (".chosen circle:last-of-type", "main", "params", "loss"),
            (".chosen .hollow", "optima", None, "loss"),
        ):
            place = page.locator(mark).bounding_box()
            x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2 - box["y"]
            if n is not None:
                assert read(x, ticks) == pytest.approx(math.log10(q[n]), abs=0.02)
            assert read(y, losses) == pytest.approx(q[nats], abs=0.02 * span)
            drawn = "".join(path.get_attribute("d") for path in page.locator(f"path.{line}").all())
            points = sorted({tuple(map(float, p.split())) for p in drawn.replace("M", "L").split("L") if p})
            share = 160 * (x - box["x"]) / box["width"]
            right = next(i for i, (at, _) in enumerate(points) if at >= share)
            assert read(share, points[right - 1 : right + 1]) == pytest.approx(y, abs=1.5)


def test_the_words_follow_once_the_reader_rests(placed):
    page = placed()
    words = page.locator("p.words[aria-live=polite]")
    first = normal(words.inner_text())
    q = compute_optimal.numbers(state_of())
    assert first.startswith(
        "By the law of Hoffmann et al. 2022, 3.15 × 10²³ operations are best spent on 24.5 billion parameters"
    )
    assert (
        f"the operations divided by {q['waste']:.3g}" in first and "beyond the fitted runs by a factor of 105" in first
    )
    assert "costs $1.4 million, at an assumed $2 an hour for a GPU (A100) that does 40 % of its 312 TFLOP/s" in first
    page.evaluate(
        """() => { window.spoken = 0; new MutationObserver(() => window.spoken++).observe(
            document.querySelector("p.words"), { childList: true, characterData: true, subtree: true }); }"""
    )
    now = page.get_by_role("slider", name="Budget").evaluate(
        """slider => {  // five steps, faster than a busy machine could press keys
            for (let i = 0; i < 5; i++) slider.stepDown(), slider.dispatchEvent(new Event("input"));
            return document.querySelector("p.words").textContent;
        }"""
    )
    assert normal(now) == first
    page.wait_for_function("window.spoken > 0")
    assert page.evaluate("window.spoken") == 1 and "5 × 10²¹ operations" in normal(words.inner_text())
    page.get_by_role("button", name="Our runs on Shakespeare").click()
    page.wait_for_function("window.spoken > 1")
    said = normal(words.inner_text())
    assert said.startswith("By the law of our runs on Shakespeare, 4.2 × 10¹² operations") and "characters" in said
    assert "A model of" not in said, "it is the best one"
    assert page.locator("output:not([aria-live=off])").count() == 0
    assert page.locator(".picture").get_attribute("aria-hidden") == "true"


AT_ONCE = "const later = setTimeout; window.setTimeout = (f, _, ...values) => later(f, 0, ...values);"


@pytest.mark.parametrize("width", [1280, 360, 320])
def test_nothing_moves_or_sticks_out(placed, width):
    page = placed(width, init=AT_ONCE)
    heights, figure = set(), page.locator("[data-figure]")
    out = "[...document.querySelectorAll('[data-figure] :not(svg svg, svg svg *)')]"
    out += ".map(e => [e.getBoundingClientRect(), e]).filter(([box]) => box.left < 0 || box.right > innerWidth)"

    def look() -> None:
        page.evaluate("new Promise(done => setTimeout(done))")  # the words come at once
        heights.add(figure.bounding_box()["height"])
        assert page.evaluate("document.scrollingElement.scrollWidth") == width
        assert page.evaluate(f"{out}.map(([, e]) => e.outerHTML)") == []
        ground = page.locator("svg.draggable").bounding_box()
        for mark in [circle.bounding_box() for circle in page.locator("svg.draggable circle").all()]:
            assert ground["x"] <= mark["x"] + mark["width"] / 2 <= ground["x"] + ground["width"]
            assert ground["y"] <= mark["y"] + mark["height"] / 2 <= ground["y"] + ground["height"]

    for button in page.locator(".presets button").all():
        button.click()
        look()
    for law in ("Besiroglu et al. 2024", "Our runs on Shakespeare", "Our runs on the synthetic language"):
        page.get_by_label("Law").select_option(label=law)
        for budget in ("Home", "End"):
            page.get_by_role("slider", name="Budget").press(budget)
            for size in ("Home", "End"):
                page.get_by_role("slider", name="Model size").press(size)
                look()
    assert max(heights) - min(heights) < 1, heights


def test_where_the_same_loss_is_out_of_the_picture_there_is_no_mark_for_it(placed):
    steep = {"it": OURS[SHAKESPEARE] | {"alpha": 0.3, "beta": 1.0}}
    best = compute_optimal.numbers(compute_optimal.initial(own=steep, law="it", flops=1e12, params=None))["best_params"]
    page = placed(own=steep, law="it", flops=1e12, params=30 * best)
    assert page.locator(".chosen circle").count() == 1 and page.locator(".chosen .stem").get_attribute("x1") == "0%"
    nearer = placed(own=steep, law="it", flops=1e12, params=2 * best)
    assert nearer.locator(".chosen circle").count() == 2


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(placed, theme):
    page = placed(theme=theme)
    page.evaluate(AXE_SCRIPT)
    page.get_by_text("The price of an operation").click()
    for button in page.locator(".presets button").all():
        button.click()
        found = page.evaluate(
            "async () => (await axe.run('[data-figure]', { resultTypes: ['violations'] })).violations"
        )
        assert [f"{rule['id']}: {node['html'][:100]}" for rule in found for node in rule["nodes"]] == []
