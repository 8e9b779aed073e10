"""The interactive figures: their numbers are tinylm's, and they can be operated in a notebook and on a page alike."""

from __future__ import annotations

import base64
import html
import importlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import Browser, Page

from lab_source import definitions
from tinylm import checkpoint, figures
from tinylm.figures import interactive, model_size, rounding_grid
from tinylm.model import Config

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(p.stem for p in figures.HERE.glob("*.mjs") if p.stem != "kit")
VIEW = "application/vnd.jupyter.widget-view+json"
START = "shakespeare-800k"


# Every figure


def test_every_figure_has_its_two_halves_a_lab_and_a_chapter():
    labs = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "labs").glob("[0-9]*.py"))
    chapters = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "book").glob("[0-9]*.md"))
    for name in NAMES:
        module = importlib.import_module(f"tinylm.figures.{name}")
        assert all(callable(getattr(module, part)) for part in ("initial", "data", "numbers", "draw"))
        assert f'interactive("{name}"' in labs and re.search(
            rf"^```\{{interactive-figure\}} \w+ {name}$", chapters, re.M
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_module_stands_alone(name):
    """What a notebook and a page get imports nothing, and a page's script exports nothing."""
    assert 'from "./kit.mjs"' in (figures.HERE / f"{name}.mjs").read_text(encoding="utf-8")
    assert not re.search(r"^\s*import\b|\bimport\(|\brequire\(", figures.source(name), re.M)
    assert figures.source(name).count("export default { render };") == 1
    assert not re.search(r"^(import|export)\b", figures.script(name), re.M)


def test_the_book_needs_no_torch_to_place_a_figure():
    code = "import sys, tinylm.figures; tinylm.figures.source('model_size'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# model_size: the numbers


def random_state(draw: random.Random) -> dict:
    """A shape that can be: any head dim that is even, grouped or not, tied or not, with its own MLP width or without."""
    n_kv_heads = draw.choice([1, 2, 3, 4, 8, 40])
    n_heads = n_kv_heads * draw.choice([1, 1, 2, 3, 8])
    dim = n_heads * 2 * draw.randint(1, 96)
    return {
        "block": "llama",
        "vocab_size": draw.randint(1, 300_000),
        "dim": dim,
        "n_layers": draw.randint(1, 200),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "hidden_dim": draw.choice([None, draw.randint(1, 5 * dim)]),
        "tie_embeddings": draw.random() < 0.5,
        "context": draw.randint(1, 200_000),
        "tokens": draw.randint(1, 20 * 10**12),
    }


def config_of(state: dict) -> Config:
    return Config(**{key: value for key, value in state.items() if key not in ("block", "context", "tokens")})


def expected(state: dict) -> dict[str, int]:
    """From Config's own counts."""
    config, t = config_of(state), state["context"]
    n, per_token = config.n_params(), config.train_flops(t) // t
    assert per_token * t == config.train_flops(t)
    return {
        "parameters": n,
        "parameters_without_tables": config.n_params(embeddings=False),
        "train_flops_per_token": per_token,
        "train_flops": per_token * state["tokens"],
        "decode_flops": config.decode_flops(t),
        "kv_cache_bytes": config.kv_cache_bytes(t, bytes_per_value=2),
        **{f"weight_bytes_{bits}": -(-n * round(2 * bits) // 16) for bits in (32, 16, 8, 4.5)},
    }


@pytest.fixture(scope="module")
def evaluate(browser: Browser):
    """Calls an exported function of a module, as a notebook imports it, on each of a list; integers stay exact."""
    page = browser.new_page()

    def integers(values: dict) -> dict:
        return {k: int(v.removeprefix("BigInt ")) if isinstance(v, str) else v for k, v in values.items()}

    def call(function: str, states: list, figure: str = "model_size", data: dict | None = None) -> list:
        code = base64.b64encode(figures.source(figure).encode()).decode()
        answer = page.evaluate(
            """async ([code, name, states, data]) => {
                const module = await import("data:text/javascript;charset=utf-8;base64," + code);
                const exact = (_, value) => (typeof value === "bigint" ? `BigInt ${value}` : value);
                return JSON.stringify(states.map((state) => module[name](state, data)), exact);
            }""",
            [code, function, states, data],
        )
        return json.loads(answer, object_hook=integers)

    yield call
    page.close()


def test_the_figures_numbers_are_tinylms(evaluate):
    draw = random.Random(0)
    states = [random_state(draw) for _ in range(300)] + list(model_size.shapes().values())
    kinds = {(s["tie_embeddings"], s["n_heads"] == s["n_kv_heads"], s["hidden_dim"] is None) for s in states}
    assert len(kinds) == 8
    found = evaluate("counts", states)
    assert max(q["train_flops"] for q in found) > 2**53
    for state, q in zip(states, found, strict=True):
        assert q == model_size.numbers(state)
        if state["block"] == "llama":
            assert {key: q[key] for key in expected(state)} == expected(state)


def test_shapes_that_cannot_be_are_refused_on_both_sides(evaluate):
    draw = random.Random(1)
    states = []
    for _ in range(300):
        field = draw.choice(["dim", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size", "n_layers"])
        states.append(random_state(draw) | {field: draw.choice([0, draw.randint(1, 64), draw.randint(1, 64), 1.5])})
    refused = 0
    for state, problem in zip(states, evaluate("problem", states), strict=True):
        if problem is None:
            model_size.numbers(state)
            continue
        refused += 1
        assert problem.endswith(".") and problem[0].isupper() or problem[0].isdigit()
        with pytest.raises(ValueError):
            model_size.numbers(state)
    assert 60 < refused < 290


PARAMETERS = {"LLaMA 7B": 6.7e9, "LLaMA 13B": 13.0e9, "GPT-3 175B": 175.0e9}  # the papers' tables


def test_published_shapes_have_their_published_sizes():
    assert set(PARAMETERS) == set(model_size.PUBLISHED)
    for name, n in PARAMETERS.items():
        assert model_size.numbers(model_size.PUBLISHED[name])["parameters"] == pytest.approx(n, rel=0.01)
    # Brown et al. 2020, table D.1: 3.14e23 operations, counted as 6 N D
    assert model_size.numbers(model_size.PUBLISHED["GPT-3 175B"])["train_flops"] == pytest.approx(3.14e23, rel=0.04)


@pytest.mark.parametrize("name", model_size.PUBLISHED)
def test_published_shapes_have_the_parameters_of_the_library_that_people_use(name):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    s = model_size.PUBLISHED[name]
    if s["block"] == "gpt3":
        shape = {"n_embd": s["dim"], "n_layer": s["n_layers"], "n_head": s["n_heads"], "n_positions": s["context"]}
        config, model = GPT2Config(vocab_size=s["vocab_size"], n_inner=s["hidden_dim"], **shape), GPT2LMHeadModel
    else:
        shape = {"hidden_size": s["dim"], "num_hidden_layers": s["n_layers"], "num_attention_heads": s["n_heads"]}
        shape |= {"intermediate_size": s["hidden_dim"], "tie_word_embeddings": s["tie_embeddings"]}
        config, model = LlamaConfig(vocab_size=s["vocab_size"], **shape), LlamaForCausalLM
    with torch.device("meta"):
        theirs = model(config)
    assert theirs.num_parameters() == model_size.numbers(s)["parameters"]


@pytest.mark.parametrize("name", ["shakespeare-30k", "shakespeare-800k"])
def test_our_checkpoints_took_the_operations_on_their_cards(name):
    card = checkpoint.read_card(name)
    assert model_size.numbers(model_size.shapes()[name])["train_flops"] == card["flops"]
    assert model_size.numbers(model_size.shapes()[name])["parameters"] == Config(**card["config"]).n_params()


def test_what_the_chapter_says_of_the_laptop():
    sizes = {name: model_size.numbers(shape) for name, shape in model_size.shapes().items()}
    assert all(sizes["LLaMA 13B"][f"weight_bytes_{bits}"] < model_size.LAPTOP for bits in model_size.BITS)
    assert all(sizes["GPT-3 175B"][f"weight_bytes_{bits}"] > model_size.LAPTOP for bits in model_size.BITS)
    assert round(sizes["GPT-3 175B"]["parameters"] / 1e9, 1) == 174.6


# In a notebook


def test_a_widget_takes_states_from_both_sides():
    size = interactive("model_size", like="LLaMA 7B")
    assert size.numbers == model_size.numbers(model_size.PUBLISHED["LLaMA 7B"])
    size.set(n_kv_heads=8)
    assert size.widget.state["n_kv_heads"] == size.state["n_kv_heads"] == 8
    assert size.numbers["kv_cache_bytes"] * 4 == model_size.numbers(model_size.PUBLISHED["LLaMA 7B"])["kv_cache_bytes"]
    size.widget.set_state({"state": size.state | {"dim": 1024, "hidden_dim": None}})  # as the browser's message does
    assert size.numbers["parameters"] == config_of(size.state).n_params() and size.state["dim"] == 1024
    with pytest.raises(ValueError, match="not a multiple of n_heads"):
        size.set(n_heads=3)
    assert size.state["n_heads"] == 32


def test_wrong_starts_are_named():
    with pytest.raises(ValueError, match="no shape is called 'LLaMA 8B'; there are .*LLaMA 7B"):
        interactive("model_size", like="LLaMA 8B")
    with pytest.raises(ValueError, match="unknown width; the state has .*dim"):
        interactive("model_size", width=128)
    with pytest.raises(ValueError, match="context must be a positive integer, got 0"):
        interactive("model_size", context=0)


def test_a_widget_is_what_anywidget_wants():
    size = interactive("model_size")
    state = size.widget.get_state()
    assert state["_esm"] == figures.source("model_size") and state["_css"] == figures.style()
    assert state["state"] == size.state and state["data"] == json.loads(json.dumps(size.data))
    assert (state["_model_module"], state["_view_name"]) == ("anywidget", "AnyView")


def test_an_output_holds_the_live_figure_and_its_still():
    size = interactive("model_size", dim=256)
    data, metadata = size._repr_mimebundle_()
    assert data[VIEW]["model_id"] == size.widget.model_id
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["text/plain"] == metadata["alt"] and f"{size.numbers['parameters']:,} parameters" in metadata["alt"]
    assert metadata["scrapbook"]["name"] == "model_size"
    assert metadata["interactive"] == {"state": size.state, "data": size.data}


def test_without_anywidget_there_is_the_still(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    size = interactive("model_size")
    assert size.widget is None and "pip install anywidget" in capsys.readouterr().out
    size.set(dim=256)
    data, metadata = size._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain"} and f"{size.numbers['parameters']:,}" in metadata["alt"]


# What anywidget promises a module, and a module anywidget: https://anywidget.dev/en/afm/
CONTRACT = """async ([code, values, other]) => {
    const { default: figure } = await import("data:text/javascript;charset=utf-8;base64," + code);
    const el = document.body.appendChild(document.createElement("div")), log = [], heard = new Map();
    const model = {
        get: key => values[key],
        set: (key, value) => { values[key] = value; log.push(["set", key, value]); heard.get("change:" + key)?.(); },
        save_changes: () => log.push(["save"]),
        on: (event, f) => heard.set(event, f),
        off: (event, f) => heard.get(event) === f && heard.delete(event),
    };
    const number = () => el.querySelector("output[data-quantity=parameters]").dataset.value;
    const cleanup = await figure.render({ model, el, experimental: {} });
    const heads = el.querySelectorAll("input[type=range]")[2];
    heads.value = 2, heads.dispatchEvent(new Event("input"));  // 3 heads: cannot be
    const impossible = log.length;
    heads.value = 1, heads.dispatchEvent(new Event("input"));  // 2 heads
    values.state = other, heard.get("change:state")();  // the kernel moves the figure
    const moved = number();
    cleanup();
    return { keys: Object.keys(figure), impossible, log, moved, left: heard.size };
}"""


def test_a_module_and_anywidget_keep_their_contract(browser):
    page = browser.new_page()
    code = base64.b64encode(figures.source("model_size").encode()).decode()
    start, other = model_size.initial(START), model_size.initial("LLaMA 7B")
    found = page.evaluate(CONTRACT, [code, {"state": start, "data": model_size.data()}, other])
    page.close()
    two = model_size.initial(START, n_heads=2, n_kv_heads=2)
    assert found["log"] == [["set", "state", two], ["save"]], (
        "a change that can be is saved once; one that cannot, never"
    )
    assert found == {**found, "keys": ["render"], "impossible": 0, "left": 0}
    assert int(found["moved"]) == model_size.numbers(other)["parameters"]


# On a page


SIZES = {"wide": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


@pytest.fixture
def opened(browser, sites, request):
    """Opens the chapter; whatever goes wrong in it fails the test."""
    contexts, faults = [], []

    def open_page(site: str = "disk", size: str = "wide", init: str = "", **settings) -> Page:
        contexts.append(browser.new_context(viewport=SIZES[size], has_touch=size == "phone", **settings))
        contexts[-1].set_default_timeout(10_000)
        contexts[-1].on("weberror", lambda error: faults.append(error.error))
        page = contexts[-1].new_page()
        page.add_init_script(init)
        page.goto(f"{sites[site]}book/00_tiny_model.html")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def shown(page: Page) -> dict[str, int]:
    outputs = page.locator("[data-figure=model_size] output").all()
    return {o.get_attribute("data-quantity"): int(o.get_attribute("data-value")) for o in outputs}


def of(state: dict) -> dict[str, int]:
    return {k: v for k, v in model_size.numbers(state).items() if k not in ("tables", "attention", "mlp")}


@pytest.mark.parametrize("site", ["http", "disk"])
def test_the_page_starts_where_the_lab_did(opened, site):
    page = opened(site)
    assert shown(page) == of(model_size.initial(START))
    controls = page.locator("[data-figure] :is(button, input, select, summary)")
    kept = page.locator("[data-figure] [data-lm-suppress-shortcuts]")
    assert controls.count() == kept.count() > 10, "JupyterLab would take the arrow keys from a control"


def test_the_shapes_to_start_from(opened):
    page = opened()
    for name, state in model_size.shapes().items():
        page.get_by_role("button", name=name).click()
        assert shown(page) == of(state)
        assert [b.inner_text() for b in page.locator("button[aria-pressed=true]").all()] == [name]


def tap_at(page: Page, slider, share: float, by: str) -> None:
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    x, y = box["x"] + 8 + share * (box["width"] - 16), box["y"] + box["height"] / 2
    page.mouse.click(x, y) if by == "mouse" else page.touchscreen.tap(x, y)


@pytest.mark.parametrize("site", ["http", "disk"])
@pytest.mark.parametrize("by", ["mouse", "touch", "keyboard"])
def test_every_control_is_operable(opened, site, by):
    """Each control is used once by that means; the numbers are tinylm's all along. (A list's menu is the system's own.)"""
    page = opened(site, "phone" if by == "touch" else "wide")
    state = model_size.initial(START)
    press = (lambda target: target.tap()) if by == "touch" else (lambda target: target.click())
    for label, field, keys, share in [
        ("Width", "dim", ["ArrowRight"] * 2, 1.0),
        ("Depth", "n_layers", ["End"], 0.5),
        ("Context", "context", ["PageUp"], 0.75),
        ("Training tokens", "tokens", ["Home"], 0.25),
        ("Query heads", "n_heads", ["ArrowUp"] * 2, 0.3),
    ]:
        slider = page.get_by_role("slider", name=label, exact=True)
        before = slider.get_attribute("aria-valuetext")
        if by == "keyboard":
            slider.focus()
            for key in keys:
                page.keyboard.press(key)
        else:
            tap_at(page, slider, share, by)
        said = slider.get_attribute("aria-valuetext")
        assert said != before and said == page.locator(f".field:has(#{slider.get_attribute('id')}) .value").inner_text()
        state = last_state(page, field, state)
        assert shown(page) == of(state), label
    if by == "keyboard":
        page.get_by_label("Key-value heads").focus()
        page.keyboard.press("End")
    else:
        page.get_by_label("Key-value heads").select_option(index=-1 + len(divisors(state["n_heads"])))
    state["n_kv_heads"] = 1
    assert shown(page) == of(state)
    details = page.get_by_text("More of the shape")
    if by == "keyboard":
        details.focus()
        page.keyboard.press("Enter")
    else:
        press(details)
    for label, field in [("Vocabulary", "vocab_size"), ("MLP width", "hidden_dim")]:
        number = page.get_by_label(label)
        number.focus()
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.type("1000")
        state[field] = 1000
        assert shown(page) == of(state)
    page.get_by_label("Output matrix").select_option("one of its own")
    assert shown(page) == of(state | {"tie_embeddings": False})
    page.get_by_label("Block").select_option(index=1)
    gpt = state | {"block": "gpt3", "n_kv_heads": state["n_heads"], "hidden_dim": None, "tie_embeddings": True}
    assert shown(page) == of(gpt)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def last_state(page: Page, field: str, state: dict) -> dict:
    """The state after a slider moved, read from what it says to a screen reader."""
    label = {
        "dim": "Width",
        "n_layers": "Depth",
        "context": "Context",
        "tokens": "Training tokens",
        "n_heads": "Query heads",
    }
    said = page.get_by_role("slider", name=label[field], exact=True).get_attribute("aria-valuetext")
    digits, scale = re.match(r"([\d,.]+)(?:\s(thousand|million|billion|trillion))?\b", said).groups()
    value = round(
        float(digits.replace(",", "")) * {None: 1, "million": 10**6, "trillion": 10**12, "billion": 10**9}[scale]
    )
    state = state | {field: value}
    return state | {"dim": {"hidden_dim": None}, "n_heads": {"n_kv_heads": value}}.get(field, {})


def test_the_words_follow_the_state_once_the_reader_rests(opened):
    page = opened()
    words = page.locator("[data-figure=model_size] p.words")
    assert words.get_attribute("aria-live") == "polite" and "865 thousand parameters" in normal(words.inner_text())
    page.evaluate(
        """() => { window.spoken = 0; new MutationObserver(() => window.spoken++).observe(
            document.querySelector("p.words"), { childList: true, characterData: true, subtree: true }); }"""
    )
    slider = page.get_by_role("slider", name="Depth")
    slider.focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    assert "865 thousand" in normal(words.inner_text()) and shown(page)["parameters"] > 865_408
    page.wait_for_function("window.spoken > 0")
    layers = slider.get_attribute("aria-valuetext").split()[0]
    assert page.evaluate("window.spoken") == 1 and words.inner_text().startswith(f"{layers} layers of 128 channels: ")
    assert "aria-hidden" in page.locator(".picture").evaluate("e => e.outerHTML.slice(0, 60)")
    others = page.locator("[data-figure=model_size] output:not([aria-live=off])")
    assert others.count() == 0, "an output speaks at every step unless it is told not to"
    page.get_by_role("button", name="GPT-3 175B").click()
    page.wait_for_function("window.spoken > 1")
    said = normal(words.inner_text())
    assert "175 billion parameters, as many as GPT-3 175B" in said and "at none of the four precisions" in said


def normal(text: str) -> str:
    return text.replace("\u00a0", " ")


def test_a_shape_that_cannot_be_gives_a_message_and_no_number(opened):
    page = opened()
    heads = page.get_by_role("slider", name="Query heads")
    heads.focus()
    page.keyboard.press("ArrowLeft")  # 4 -> 3
    message = "A width of 128 does not divide evenly among 3 heads."
    assert page.locator(".message").inner_text().startswith(message)
    page.wait_for_function("text => document.querySelector('p.words').textContent.startsWith(text)", arg=message)
    outputs = page.locator("[data-figure=model_size] output")
    assert set(outputs.all_inner_texts()) == {"–"}
    assert outputs.evaluate_all("all => all.filter(o => o.dataset.value !== undefined).length") == 0
    assert page.locator("svg .chosen").count() == 0 and not page.locator(".bar").is_visible()
    page.keyboard.press("ArrowLeft")
    assert shown(page) == of(model_size.initial(START, n_heads=2, n_kv_heads=2)) and page.locator(".bar").is_visible()


# Notes the figure's height as soon as the page holds what follows it.
EARLY = """new MutationObserver((_, observer) => {
    if (!document.querySelector("[data-figure] ~ figcaption")) return;
    window.early = document.querySelector("[data-figure]").getBoundingClientRect().height;
    observer.disconnect();
}).observe(document, { childList: true, subtree: true });"""


@pytest.mark.parametrize("size", SIZES)
def test_nothing_moves(opened, size):
    """Neither the page when the figure draws itself, nor what stands below when its numbers change."""
    page = opened("http", size, init=EARLY)
    heights = {page.evaluate("window.early")}
    figure = page.locator("[data-figure=model_size]")
    for name in model_size.shapes():
        page.get_by_role("button", name=name).click()
        page.wait_for_function("n => document.querySelector('p.words').textContent.includes(n)", arg=name)
        heights.add(figure.bounding_box()["height"])
    assert page.locator("figure.interactive-figure img").count() == 0, "the still is for pages without scripts"
    page.get_by_role("slider", name="Query heads").fill("6")  # 10 heads, at GPT-3's width
    page.wait_for_function("document.querySelector('p.words').textContent.startsWith('A width')")
    heights.add(figure.bounding_box()["height"])
    assert len({round(height) for height in heights}) == 1, heights
    out = "[...document.querySelectorAll('[data-figure] *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
    assert page.evaluate(f"{out}.map(e => e.outerHTML)") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_in_any_state(opened, theme):
    page = opened(color_scheme=theme)
    page.evaluate(AXE_SCRIPT)
    page.get_by_text("More of the shape").click()
    faults = []
    for steps in (0, 1):  # at the start, and at a shape that cannot be
        page.get_by_role("slider", name="Query heads").focus()
        for _ in range(steps):
            page.keyboard.press("ArrowLeft")
        found = page.evaluate(
            "async () => (await axe.run('[data-figure]', { resultTypes: ['violations'] })).violations"
        )
        faults += [f"{rule['id']}: {node['html'][:100]}" for rule in found for node in rule["nodes"]]
    assert page.locator(".impossible").count() == 1 and faults == []


def test_without_scripts_there_is_the_still(opened):
    page = opened(java_script_enabled=False)
    figure = page.locator("figure.interactive-figure")
    assert "did not run" in figure.inner_text()
    image = figure.locator("img")
    assert image.is_visible() and "865,408 parameters" in image.get_attribute("alt")


# rounding_grid: the numbers


GRIDS = [(kind, bits) for kind in ("absmax", "affine") for bits in range(2, 9)] + [("nf4", 4), ("fp4", 4)]


def grid_states(seed: int) -> list[dict]:
    """Every format, width and group size, each with a random outlier; a third as trained."""
    draw = random.Random(seed)
    outliers = [lambda: 0, lambda: draw.randint(1, 16), lambda: draw.uniform(0, 16)]
    return [
        {"format": kind, "bits": bits, "group_size": size, "outlier": outliers[i % 3]()}
        for i, ((kind, bits), size) in enumerate((grid, n) for grid in GRIDS for n in rounding_grid.GROUP_SIZES)
    ]


def close(found: dict, expected: dict) -> None:
    assert {k: v is None for k, v in found.items()} == {k: v is None for k, v in expected.items()}
    assert {k: v for k, v in found.items() if v is not None} == pytest.approx(
        {k: v for k, v in expected.items() if v is not None}, rel=1e-9
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_grids_numbers_are_the_same_on_both_sides(evaluate, seed):
    states = grid_states(seed)
    assert len(states) == 112
    for state, found in zip(states, evaluate("numbers", states, "rounding_grid", rounding_grid.data()), strict=True):
        close(found, rounding_grid.numbers(state))


@pytest.mark.parametrize("largest", [14, 15, 24, 62, 510, 5898, 7183])
def test_weights_halfway_between_levels_go_the_same_way_on_both_sides(evaluate, monkeypatch, largest):
    """Multiples of half a step; and twice a weight beside a midpoint of NF4, where w / a and w (1 / a) differ."""
    w = np.random.default_rng(largest).integers(-largest, largest + 1, 1536).astype(float)
    w[::8], w[1::8] = largest, {5898: 5081, 7183: 6188}.get(largest, -largest)
    monkeypatch.setattr(rounding_grid, "_trained", lambda: w)
    states = [state | {"outlier": 0} for state in grid_states(0)]
    for state, found in zip(states, evaluate("numbers", states, "rounding_grid", rounding_grid.data()), strict=True):
        with np.errstate(divide="ignore"):  # 8 bits hold some of these numbers exactly
            expected = rounding_grid.numbers(state)
        if expected["rms_error"]:
            close(found, expected)
        else:
            assert found["rms_error"] == 0


def test_a_page_rounds_scales_to_float16_as_numpy_does(evaluate):
    draw = np.random.default_rng(0)
    ties = (1 + (2 * np.arange(1024) + 1) / 2048) * 2.0 ** draw.integers(
        -14, 15, 1024
    )  # halfway between two, and beside
    tiny = 2.0**-25 * np.arange(2100)
    x = np.concatenate(
        [10 ** draw.uniform(-9, 4.9, 3000), ties, ties * (1 + 2**-50), ties * (1 - 2**-50), tiny, [0, 65519.9, 65520]]
    )
    found = [np.inf if y is None else y for y in evaluate("half", x.tolist(), "rounding_grid")]  # JSON has no infinity
    with np.errstate(over="ignore"):
        assert found == x.astype(np.float16).tolist()


def test_grids_that_cannot_be_are_refused_on_both_sides(evaluate):
    wrong = [
        {"format": "int4"},
        {"format": None},
        {"bits": 1},
        {"bits": 9},
        {"bits": 3.5},
        {"bits": None},
        {"bits": "4"},
    ]
    wrong += [{"group_size": 100}, {"group_size": 0}, {"group_size": None}, {"outlier": -1}, {"outlier": 17}]
    wrong += [{"outlier": None}, {"outlier": "4"}, {"format": "nf4", "bits": 3}, {"format": "fp4", "bits": 8}]
    states = [rounding_grid.START | changes for changes in wrong]
    data = rounding_grid.data()
    for state, problem in zip(states, evaluate("problem", states, "rounding_grid", data), strict=True):
        assert problem and problem.endswith("."), state
        with pytest.raises(Exception, match="RangeError"):
            evaluate("numbers", [state], "rounding_grid", data)
        with pytest.raises(ValueError):
            rounding_grid.initial(**state)
    possible = grid_states(3)
    assert evaluate("problem", possible, "rounding_grid", data) == [None] * len(possible)
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 9"):
        interactive("rounding_grid", bits=9)
    with pytest.raises(ValueError, match="unknown width; the state has format, bits, group_size, outlier"):
        interactive("rounding_grid", width=4)


def test_each_weight_goes_to_its_nearest_level_and_the_bits_are_those_stored():
    for state in grid_states(4):
        levels, index = rounding_grid.rounding(state)
        w = rounding_grid.weights(state).reshape(-1, state["group_size"]).astype(float)
        distance = np.abs(w - np.take_along_axis(levels, index, 1))
        nearest = np.abs(w[..., None] - levels[:, None].astype(float)).min(-1)
        scale = np.abs(levels[:, -1:] - levels[:, :1])
        assert (distance <= nearest + 1e-6 * scale).all() or state["format"] == "affine"  # a zero point is rounded, too
        assert (distance <= nearest + 0.51 * scale / (levels.shape[1] - 1)).all(), state
        codes, n = state["bits"] * w.size, len(w)
        stored = {"absmax": 16 * n, "affine": (16 + 8) * n, "nf4": 32 * n, "fp4": 16 * n}[state["format"]]
        assert rounding_grid.numbers(state)["bits_per_weight"] == pytest.approx((codes + stored) / w.size)


def test_the_grids_are_those_of_the_lab():
    lab = definitions("02_quantization")
    assert torch.equal(lab.nf4_levels(), torch.tensor(rounding_grid.CODEBOOKS["nf4"]))
    for state in grid_states(5):
        kind, size = state["format"], state["group_size"]
        w = torch.tensor(rounding_grid.weights(state)).reshape(-1, size)
        levels, index = rounding_grid.rounding(state)
        w_hat = torch.tensor(np.take_along_axis(levels, index, 1))
        if kind == "absmax":
            assert torch.equal(w_hat, lab.dequantize_groups(*lab.quantize_groups(w, state["bits"], size)))
        elif kind == "nf4":
            codes, absmax = lab.nf4_quantize(w, size)
            assert torch.equal(torch.tensor(index).flatten(), codes.long())
            assert torch.equal(w_hat, lab.nf4_dequantize(codes, absmax, w.shape, size))
        elif kind == "affine":  # whose scale the lab leaves in float32
            q, scale, zero = lab.affine_quantize(w, state["bits"], axis=1)
            assert ((lab.affine_dequantize(q, scale, zero) - w_hat).abs() <= 1.2 * scale).all()
            assert ((scale - torch.tensor(levels[:, 1:] - levels[:, :-1])).abs() <= 2**-10 * scale).all()


def test_the_weights_are_the_checkpoints():
    w = checkpoint.load("shakespeare-800k").blocks[0].mlp.down_proj.weight[:4].detach().flatten()
    shown = torch.tensor(rounding_grid.weights(rounding_grid.initial(outlier=0)))
    assert (w - shown).abs().max() <= rounding_grid.UNIT / 2 and rounding_grid._sigma() == pytest.approx(
        w.std().item(), rel=1e-3
    )
    assert (shown.abs() / w.std() < 5).all(), "none is an outlier as trained"
    moved = torch.tensor(rounding_grid.weights(rounding_grid.initial(outlier=9)))
    assert (moved != shown).nonzero().flatten().tolist() == [rounding_grid.MARKED]
    assert len(json.dumps(rounding_grid.data())) < 10_000


def test_what_the_figure_is_there_to_show():
    """An outlier stretches the grid of all that share its scale; groups contain that, and cost scales."""

    def at(**changes) -> dict:
        return rounding_grid.numbers(rounding_grid.initial(**changes))

    trained, one, row, groups = (
        at(group_size=1536, outlier=0),
        at(group_size=1536),
        at(group_size=384),
        at(group_size=32),
    )
    assert one["rms_error"] > 2 * trained["rms_error"] and one["zeros"] > 2 * trained["zeros"]
    assert one["levels_used"] < trained["levels_used"]
    assert row["rms_error_elsewhere"] < trained["rms_error"] < row["rms_error_marked"]
    assert one["rms_error"] > row["rms_error"] > groups["rms_error"] and groups["rms_error"] < trained["rms_error"]
    assert one["bits_per_weight"] < row["bits_per_weight"] < groups["bits_per_weight"] == 4.5


# rounding_grid in a notebook


def test_the_grid_is_a_widget_with_a_still():
    grid = interactive("rounding_grid", group_size=64)
    assert grid.widget.get_state()["_esm"] == figures.source("rounding_grid")
    assert grid.widget.get_state()["data"] == json.loads(json.dumps(grid.data))
    grid.widget.set_state({"state": grid.state | {"bits": 3}})  # as the browser's message does
    assert grid.state["bits"] == 3 and grid.numbers == rounding_grid.numbers(grid.state)
    with pytest.raises(ValueError, match="nf4 has codes of 4 bits, got bits=3"):
        grid.set(format="nf4")
    for state in [grid.state, *rounding_grid.PRESETS.values(), rounding_grid.initial(bits=8, group_size=8, outlier=16)]:
        grid.set(**state)
        data, metadata = grid._repr_mimebundle_()
        assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
        assert metadata["interactive"] == {"state": state, "data": grid.data}
        assert f"{grid.numbers['snr_db']:.1f} dB" in metadata["alt"] and "%" not in metadata["alt"]


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
    const bits = el.querySelector("input[type=range]");
    bits.value = 0, bits.dispatchEvent(new Event("input"));
    values.state = other, heard.get("change:state")();  // the kernel moves the figure
    const moved = el.querySelector("output[data-quantity=snr_db]").dataset.value;
    cleanup();
    return { log, moved, left: heard.size };
}"""


def test_the_grid_and_anywidget_keep_their_contract(browser):
    page = browser.new_page()
    code = base64.b64encode(figures.source("rounding_grid").encode()).decode()
    start, other = rounding_grid.initial(), rounding_grid.initial(format="nf4", outlier=5)
    found = page.evaluate(KEEPS, [code, {"state": start, "data": rounding_grid.data()}, other])
    page.close()
    assert found["log"] == [["set", "state", start | {"bits": 2}], ["save"]] and found["left"] == 0
    assert float(found["moved"]) == pytest.approx(rounding_grid.numbers(other)["snr_db"], rel=1e-9)


# rounding_grid on a page of its own, placed as the book's directive places it, in the colours of the book's theme


COLORS = """html { font: 16px/1.65 sans-serif; background: var(--pst-color-background) } body { margin: 0 16px }
:root { --pst-color-text-base: #222832; --pst-color-text-muted: #48566b; --pst-color-border: #d1d5da;
--pst-color-background: #fff }
html[data-theme="dark"] { --pst-color-text-base: #ced6dd; --pst-color-text-muted: #9ca4af; --pst-color-border: #48566b;
--pst-color-background: #14181e }"""


@pytest.fixture
def grid_page(browser, tmp_path):
    """Opens the figure; whatever goes wrong in it fails the test."""
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    from interactive_figure import PAGE

    contexts, faults = [], []

    def open_page(width: int = 1280, theme: str = "light", **changes) -> Page:
        values = {"state": rounding_grid.initial(**changes), "data": rounding_grid.data()}
        live = PAGE.format(
            name="rounding_grid", values=html.escape(json.dumps(values)), script=figures.script("rounding_grid"),
            style=json.dumps(figures.style()),
        )  # fmt: skip
        assert len(live) < 50_000
        file = tmp_path / "grid.html"
        head = '<meta charset="utf-8"><title>A grid</title><meta name="viewport" content="width=device-width">'
        body = (
            f'<main><h1>A grid</h1><figure style="margin: 0">{live}<figcaption>After it.</figcaption></figure></main>'
        )
        text = f'<!doctype html><html lang="en" data-theme="{theme}">{head}<style>{COLORS}</style>{body}</html>'
        file.write_text(text, encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, has_touch=width < 500))
        contexts[-1].set_default_timeout(10_000)
        contexts[-1].on("weberror", lambda error: faults.append(error.error))
        page = contexts[-1].new_page()
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def grid_shows(page: Page, **changes) -> None:
    """Hold the page's numbers to Python's for the first state with these changes."""
    expected = rounding_grid.numbers(rounding_grid.initial(**changes))
    outputs = page.locator("output").all()
    found = {o.get_attribute("data-quantity"): o.get_attribute("data-value") for o in outputs}
    del expected["levels"]  # shown beside the levels used
    close({key: None if value is None else float(value) for key, value in found.items()}, expected)
    dashes = [o.get_attribute("data-quantity") for o in outputs if o.inner_text() == "–"]
    assert dashes == [key for key, value in expected.items() if value is None]


@pytest.mark.parametrize("by", ["mouse", "touch", "keyboard"])
def test_every_control_of_the_grid_is_operable(grid_page, by):
    page = grid_page(320 if by == "touch" else 1280)
    grid_shows(page)
    changes, drawn = {}, set()
    for label, field, key, share, value, said in [
        ("Bits of a code", "bits", "Home", 0.0, 2, "2"),
        ("Group size", "group_size", "End", 1.0, 8, "8"),
        ("Marked weight", "outlier", "End", 1.0, 16, "16 σ"),
        ("Group size", "group_size", "Home", 0.0, 1536, "all 1,536"),
        ("Marked weight", "outlier", "Home", 0.0, 0, "as trained"),
        ("Group size", "group_size", "ArrowRight", 1 / 6, 384, "384, a row"),
    ]:
        slider = page.get_by_role("slider", name=label, exact=True)
        if by == "keyboard":
            slider.focus()
            page.keyboard.press(key)
        else:
            tap_at(page, slider, share, by)
        changes[field] = value
        assert normal(slider.get_attribute("aria-valuetext")) == said
        grid_shows(page, **changes)
        drawn.add(page.locator(".picture svg").first.inner_html())
    assert len(drawn) == 6, "the picture follows"
    formats = page.get_by_label("Format")
    if by == "keyboard":
        formats.focus()
        page.keyboard.press("ArrowDown")
    else:
        formats.select_option(label="Integers with a zero point")
    grid_shows(page, **changes, format="affine")
    formats.select_option(label="NF4 (normal floats)")
    assert page.get_by_role("slider", name="Bits of a code").is_disabled(), "NF4 has 4 bits"
    grid_shows(page, **changes | {"format": "nf4", "bits": 4})
    for name, state in rounding_grid.PRESETS.items():
        button = page.get_by_role("button", name=name)
        button.press("Enter") if by == "keyboard" else button.tap() if by == "touch" else button.click()
        grid_shows(page, **state)
        assert [b.inner_text() for b in page.locator("button[aria-pressed=true]").all()] == [name]
    controls = page.locator("[data-figure] :is(button, input, select)").count()
    assert page.locator("[data-figure] [data-lm-suppress-shortcuts]").count() == controls == 8


def test_the_words_follow_the_grid_once_the_reader_rests(grid_page):
    page = grid_page()
    words = page.locator("p.words[aria-live=polite]")
    q = rounding_grid.numbers(rounding_grid.initial())
    first = normal(words.inner_text())
    assert first.startswith(
        "Symmetric integers of 4 bits, a scale for each 128 of 1,536 weights: 4.125 bits a weight in all. "
    )
    assert "put at 12 σ; the 15 levels of its group run from −12 σ to 12 σ, and 6 are used" in first
    assert f"signal to error {q['snr_db']:.1f} dB" in first and "in the 11 others" in first
    page.evaluate(
        """() => { window.spoken = 0; new MutationObserver(() => window.spoken++).observe(
            document.querySelector("p.words"), { childList: true, characterData: true, subtree: true }); }"""
    )
    page.get_by_role("slider", name="Group size").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert normal(words.inner_text()) == first
    page.wait_for_function("window.spoken > 0")
    said = normal(words.inner_text())
    assert page.evaluate("window.spoken") == 1 and "one scale for all 1,536 weights: 4.01 bits a weight" in said
    assert (
        "others" not in said
        and f"{100 * rounding_grid.numbers(rounding_grid.initial(group_size=1536))['zeros']:.1f} %" in said
    )
    page.get_by_role("button", name="NF4, as QLoRA has it").click()
    page.wait_for_function("window.spoken > 1")
    assert "is at −1.01 σ, as trained" in normal(words.inner_text())
    assert page.locator("output:not([aria-live=off])").count() == 0
    assert page.locator(".picture").get_attribute("aria-hidden") == "true"


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_moves_or_sticks_out_of_the_grid(grid_page, width):
    page = grid_page(width)
    heights, figure = set(), page.locator("[data-figure]")
    for name in rounding_grid.PRESETS:
        page.get_by_role("button", name=name).click()
        page.wait_for_timeout(700)
        heights.add(round(figure.bounding_box()["height"]))
    page.get_by_label("Format").select_option(label="Integers with a zero point")
    for label in ("Bits of a code", "Group size", "Marked weight"):
        page.get_by_role("slider", name=label).press("End")
    page.wait_for_timeout(700)
    heights.add(round(figure.bounding_box()["height"]))
    assert len(heights) == 1, heights
    assert page.evaluate("document.scrollingElement.scrollWidth") == width
    out = "[...document.querySelectorAll('[data-figure] :not(svg svg, svg svg *)')]"
    out += ".map(e => [e.getBoundingClientRect(), e]).filter(([box]) => box.left < 0 || box.right > innerWidth)"
    assert page.evaluate(f"{out}.map(([, e]) => e.outerHTML)") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_in_the_grid(grid_page, theme):
    page = grid_page(theme=theme)
    page.evaluate(AXE_SCRIPT)
    for name in rounding_grid.PRESETS:
        page.get_by_role("button", name=name).click()
        found = page.evaluate(
            "async () => (await axe.run('[data-figure]', { resultTypes: ['violations'] })).violations"
        )
        assert [f"{rule['id']}: {node['html'][:100]}" for rule in found for node in rule["nodes"]] == []
