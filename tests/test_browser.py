"""The built book in a browser: every page, wide and on a phone, light and dark, over http and from the disk.

A page is loaded once a size and once from the disk; its audit notes all that is wrong with it, and a test asks for each kind.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from bs4 import BeautifulSoup
from playwright.sync_api import Browser

from conftest import chromium
from tinylm.figures import rounding_grid
from tinylm.model import Config

SIZES = {
    "wide": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}
KINDS = ["console", "foreign", "theme", "scroll", "alt", "headings", "axe", "maths", "links", "weight"]
MAX_BYTES = 1.5 * 2**20  # of a page and all that it loads but pictures, uncompressed
WORD, RESULTS = "shakespeare", "#search-results ul.search > li"


# The auditor

READY = """async () => {
    await window.MathJax?.startup?.promise;
    await document.fonts.ready;
    for (const details of document.querySelectorAll("details")) details.open = true;  // folded text is text too
    await new Promise(done => requestIdleCallback(done, { timeout: 2000 }));
    await Promise.all(document.getAnimations().map(animation => animation.finished));
}"""

SURVEY = r"""width => {
    const all = selector => [...document.querySelectorAll(selector)];
    const shown = element => element.checkVisibility({ visibilityProperty: true });
    const brief = element => element.outerHTML.slice(0, 100);

    const whole = document.scrollingElement.scrollWidth;
    const inside = e => e !== document.body && (getComputedStyle(e).overflowX !== "visible" || inside(e.parentElement));
    const wide = all("body *").filter(e => shown(e) && e.getBoundingClientRect().right > width + 1 && !inside(e.parentElement));
    const scroll = whole > width ? [`${whole} px, by ${brief(wide.at(-1) ?? document.body)}`] : [];

    const alt = all("img").filter(e => !e.alt.trim() && !e.closest("[role=presentation], [aria-hidden=true]")).map(brief);

    const headings = [];
    let level = 0;
    for (const e of all("h1, h2, h3, h4, h5, h6, [role=heading]").filter(shown)) {
        const next = Number(e.getAttribute("aria-level") ?? e.tagName[1]);
        if (next > level + 1 || (next === 1 && level)) headings.push(`h${next} after h${level}: ${e.innerText}`);
        level = next;
    }
    if (!level) headings.push("none");

    // Without MathJax, with an error, with an unknown command (which MathJax writes in red), without an extent; or TeX as text.
    const maths = all(".math").filter(e => !e.querySelector("mjx-container")).map(brief);
    for (const e of all("mjx-container")) {
        const { width, height } = e.getBoundingClientRect();
        const wrong = e.querySelector("mjx-merror, merror, mtext[mathcolor=red]") || (shown(e) && !(width && height));
        if (wrong) maths.push(e.textContent);
    }
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const { data, parentElement } = texts.currentNode;
        const raw = /\\[([]|\$\$|\\[a-z]+\{/.test(data);
        if (raw && !parentElement.closest("pre, code, script, style, .math, mjx-container")) maths.push(data.trim());
    }

    return {
        faults: { scroll, alt, headings, maths },
        theme: document.documentElement.dataset.theme,
        formulas: all("mjx-container").length,
        links: all("a[href], area[href]").map(e => [e.href, e.getAttribute("href")]),
        ids: all("[id]").map(e => e.id),
    };
}"""

# A token of code has the colours of the others of its class in its block: one of them is enough (4 times as fast).
AXE = """async () => {
    for (const block of document.querySelectorAll("pre")) {
        const seen = new Set();
        for (const token of block.querySelectorAll("span[class]")) {
            const kind = token.parentElement.className + ">" + token.className;
            if (seen.has(kind)) token.style.visibility = "hidden";
            seen.add(kind);
        }
    }
    const { violations } = await axe.run({ resultTypes: ["violations"], preload: false });
    const grave = violations.filter(({ impact }) => impact === "serious" || impact === "critical");
    return grave.flatMap(({ id, nodes }) => nodes.map(({ target }) => `${id}: ${target.join(" ")}`));
}"""


@cache
def ids_of(file: Path) -> set[str]:
    return {e["id"] for e in BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser").find_all(id=True)}


def dead(url: str, base: str, folder: Path) -> bool:
    """Whether a link leads nowhere: into the book where there is no such file or id, or by an unknown scheme."""
    parts = urlsplit(url)
    if not url.startswith(base):
        return parts.scheme not in ("http", "https", "mailto")
    file = folder / unquote(re.split("[?#]", url.removeprefix(base))[0])
    file = file / "index.html" if file.is_dir() else file
    return not file.is_file() or bool(parts.fragment) and unquote(parts.fragment) not in ids_of(file)


class Look(NamedTuple):
    """What an audit found: faults by kind (KINDS), and how many formulas MathJax has set."""

    faults: dict[str, list[str]]
    formulas: int


class Load:
    """A page in a fresh browser context, whose events it listens to."""

    def __init__(self, browser: Browser, address: str, base: str, size: str = "wide", theme: str = "light"):
        self.base, self.address, self.size = base, address, SIZES[size]
        self.heard, self.bytes = defaultdict(list), 0
        self.context = browser.new_context(**self.size, color_scheme=theme, reduced_motion="reduce")
        self.context.set_default_timeout(30_000)
        self.context.on("console", self._console)
        self.context.on("weberror", lambda error: self.heard["console"].append(str(error.error)))
        self.context.on("request", self._request)
        self.context.on("response", self._response)
        self.page = self.context.new_page()
        self.page.on("websocket", lambda socket: self.heard["foreign"].append(socket.url))

    def __enter__(self) -> Load:
        self.page.goto(self.base + self.address)
        if "?q=" in self.address:
            self.page.locator(RESULTS).first.wait_for()
        self.page.evaluate(READY)
        return self

    def __exit__(self, *error):
        self.context.close()

    def _console(self, message):
        if message.type == "error":
            self.heard["console"].append(f"{message.text} ({message.location['url'].removeprefix(self.base)})")

    def _request(self, request):
        if not request.url.startswith((self.base, "data:", "blob:")):
            self.heard["foreign"].append(request.url)

    def _response(self, response):
        if response.url.startswith("http") and response.request.resource_type != "image":
            self.bytes += int(response.headers.get("content-length", 0))

    def audit(self, folder: Path, theme: str, axe: bool = True) -> Look:
        """Every fault of the page, a file of that folder, in one theme; with what the page has done since it was opened."""
        self.page.emulate_media(color_scheme=theme)
        self.page.evaluate(READY)
        seen = self.page.evaluate(SURVEY, self.size["viewport"]["width"])
        faults = seen["faults"]
        faults["theme"] = [f"{seen['theme']}, not {theme}"] if seen["theme"] != theme else []
        for url, href in seen["links"]:
            own, fragment = urldefrag(url)
            here = fragment and own == urldefrag(self.page.url)[0]
            if unquote(fragment) not in seen["ids"] if here else dead(url, self.base, folder):
                faults.setdefault("links", []).append(href)
        if axe:
            if not self.page.evaluate("'axe' in window"):
                self.page.evaluate(AXE_SCRIPT)
            faults["axe"] = self.page.evaluate(AXE)
        faults["weight"] = [f"{self.bytes / 2**20:.2f} MiB"] if self.bytes > MAX_BYTES else []
        return Look({kind: list(dict.fromkeys(f)) for kind, f in {**faults, **self.heard}.items() if f}, seen["formulas"])


# Every page


def names(book: Path) -> list[str]:
    """The pages' addresses, a page of search results among them; not index.html, which sends the reader on."""
    pages = [p for p in sorted(book.rglob("*.html")) if "_static" not in p.relative_to(book).parts]
    return [p.relative_to(book).as_posix() for p in pages if p != book / "index.html"] + [f"search.html?q={WORD}"]


@pytest.fixture(scope="module")
def looks(browser, sites, book) -> dict[tuple[str, str], Look]:
    """(page, view) -> its audit. The reader turns the theme over after the first look: it must work both ways."""
    found = {}
    for name in names(book):
        for size, themes in {"wide": ("light", "dark"), "phone": ("dark", "light")}.items():
            with Load(browser, name, sites["http"], size, themes[0]) as load:
                for theme in themes:
                    found[name, f"{size}, {theme}"] = load.audit(book, theme)
        with Load(browser, name, sites["disk"]) as load:
            found[name, "from the disk"] = load.audit(book, "light", axe=False)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_page_has_faults_of_kind(looks, kind):
    views = defaultdict(list)
    for (name, view), look in looks.items():
        for fault in look.faults.get(kind, []):
            views[f"{name}: {fault}"].append(view)
    assert not views, "\n".join(f"{fault}  [{'; '.join(where)}]" for fault, where in views.items())


def test_the_audits_had_something_to_look_at(looks, book):
    assert {kind for look in looks.values() for kind in look.faults} <= set(KINDS)
    assert len(looks) == 5 * len(names(book))
    assert [view for (name, view), look in looks.items() if name == "book/00_tiny_model.html" and look.formulas < 10] == []


# What a reader does


@pytest.mark.parametrize("site", ["http", "disk"])
def test_the_folder_leads_to_the_first_page(browser, sites, site):
    page = browser.new_page()
    page.goto(f"{sites[site]}index.html")
    page.wait_for_url(f"{sites[site]}book/intro.html")
    page.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("site", ["http", "disk"])
def test_search_finds_a_word_and_only_where_it_stands(browser, sites, book, site, size):
    def search(word: str) -> set[str]:
        page.get_by_role("button", name="Search").filter(visible=True).first.click()
        field = page.locator("input[type=search]").filter(visible=True).first
        field.fill(word)
        field.press("Enter")
        page.wait_for_url(f"**/search.html?q={word}*")
        page.locator("#search-results .search-summary", has_text=re.compile("found|match")).wait_for()
        return {a.get_attribute("href") for a in page.locator(f"{RESULTS} > a").all()}

    with Load(browser, "book/intro.html", sites[site], size) as load:
        page = load.page
        found = {urlsplit(url).path for url in search(WORD)}
        assert "book/00_tiny_model.html" in found
        assert [url for url in found if WORD not in (book / url).read_text(encoding="utf-8").lower()] == []
        assert search("xyzzyqwx") == set()
        assert load.heard == {}


def test_every_interactive_figure_has_a_test_of_its_own_here(book):
    placed = [re.findall(r'data-figure="(\w+)"', path.read_text(encoding="utf-8")) for path in book.rglob("*.html")]
    assert {name for names in placed for name in names} == {"model_size", "rounding_grid"}


def counts(state: dict) -> dict[str, int]:
    """What the figure model_size must show of a Llama of that shape."""
    config = Config(**{field.name: state[field.name] for field in fields(Config) if field.name in state})
    a_token = config.train_flops(state["context"]) // state["context"]
    return {
        "parameters": config.n_params(),
        "parameters_without_tables": config.n_params(embeddings=False),
        "train_flops_per_token": a_token,
        "train_flops": a_token * state["tokens"],
        "decode_flops": config.decode_flops(state["context"]),
        "kv_cache_bytes": config.kv_cache_bytes(state["context"], bytes_per_value=2),
        "weight_bytes_32": 4 * config.n_params(),
    }


@pytest.mark.parametrize(("site", "size"), [("http", "wide"), ("http", "phone"), ("disk", "wide")])
def test_the_figure_model_size_answers_to_mouse_finger_and_keyboard(browser, sites, site, size):
    def shows(state: dict) -> dict[str, str]:
        """Wait until the text alternative has this shape, hold the numbers to it, return the numbers in words."""
        words = f"{state['n_layers']:,} layers of {state['dim']:,} channels"
        figure.locator("[aria-live=polite]", has_text=words).wait_for()
        outputs = {o.get_attribute("data-quantity"): o for o in figure.locator("output").all()}
        expected = counts(state)
        assert {name: int(outputs[name].get_attribute("data-value")) for name in expected} == expected
        return {name: outputs[name].inner_text() for name in expected}

    def chosen() -> int:
        return int(re.sub(r"\D", "", width.get_attribute("aria-valuetext")))

    with Load(browser, "book/00_tiny_model.html", sites[site], size) as load:
        page = load.page
        figure = page.locator("[data-figure=model_size]")
        width = figure.get_by_label("Width", exact=True)
        values = json.loads(figure.get_attribute("data-values"))
        state = values["state"]
        seen = [shows(state)]

        for _ in range(300):
            page.keyboard.press("Tab")
            if width.evaluate("slider => slider === document.activeElement"):
                break
        else:
            pytest.fail("the Tab key does not reach the slider")
        page.keyboard.press("ArrowRight")
        assert chosen() > state["dim"]
        state |= {"dim": chosen(), "hidden_dim": None}  # the MLP's width follows
        seen.append(shows(state))

        width.scroll_into_view_if_needed()
        box = width.bounding_box()
        middle, right = box["y"] + box["height"] / 2, box["x"] + 0.97 * box["width"]
        if size == "phone":
            page.touchscreen.tap(right, middle)
        else:
            steps = width.evaluate("slider => slider.value / slider.max")
            page.mouse.move(box["x"] + 8 + steps * (box["width"] - 16), middle)  # the knob
            page.mouse.down()
            page.mouse.move(right, middle, steps=5)
            page.mouse.up()
        assert chosen() > 4 * state["dim"]
        state |= {"dim": chosen()}
        seen.append(shows(state))

        name, llama = next((s["name"], s["state"]) for s in values["data"]["shapes"] if s["name"].startswith("LLaMA"))
        figure.get_by_role("button", name=name, exact=True).press("Enter")
        seen.append(shows(llama))
        assert all(len(set(texts)) == len(seen) for texts in zip(*(s.values() for s in seen), strict=True)), seen
        assert load.heard == {}


# The auditor itself

SOUND = r"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A page</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width">
<style>:root { color-scheme: light dark } body { background: light-dark(white, black) }</style>
<script>
  const dark = matchMedia("(prefers-color-scheme: dark)"), html = document.documentElement;
  (dark.onchange = () => html.dataset.theme = dark.matches ? "dark" : "light")();
</script></head><body><main id="top">
<h1>One</h1><h2>Two</h2><h3>Three</h3><h2>Two again</h2>
<p><img alt="a dot" src="data:,"><img alt="" aria-hidden="true" src="data:,"> <code>\(x\) $$</code> costs $5 or $6</p>
<p><span class="math"><mjx-container>x</mjx-container></span> <a href="#top">up</a> <a href="other.html?q=1#here">on</a></p>
<pre><span class="k">for</span> <span class="n">x</span> <span class="k">in</span></pre>
"""
BROKEN = r"""<p><img id="bare" src="data:,"> <img alt="far away" src="http://elsewhere.invalid/x.png"></p>
<h4>Four</h4><h1>One again</h1>
<p><span class="math">\(y\)</span> $$z$$ <mjx-container></mjx-container>
<mjx-container>a <mjx-merror>missing brace</mjx-merror></mjx-container>
<mjx-container>unknown <mtext mathcolor="red">\name</mtext></mjx-container></p>
<p><a href="gone.html">a</a> <a href="#gone">b</a> <a href="other.html#gone">c</a> <a href="nowhere:x">d</a></p>
<details><summary>Folded</summary>
<pre><span class="k" id="dim" style="color: light-dark(black, #222)">Dim in the dark</span> <span class="k">and</span></pre>
</details><button></button><div style="width: 800px">A wide line</div><script src="heavy.js"></script>
<script>
  dark.onchange = () => html.dataset.theme = "light";
  new WebSocket("ws://elsewhere.invalid/");
  console.warn("a remark"); console.error("a complaint"); throw Error("a fall");
</script>
"""


def test_the_auditor_reports_every_fault_and_no_other(browser, serve, tmp_path):
    (tmp_path / "sound.html").write_text(SOUND, encoding="utf-8")
    (tmp_path / "broken.html").write_text(SOUND + BROKEN, encoding="utf-8")
    (tmp_path / "other.html").write_text('<!doctype html><p id="here">Here', encoding="utf-8")
    (tmp_path / "heavy.js").write_text("//" + int(MAX_BYTES) * ".", encoding="utf-8")
    base = serve(tmp_path)

    for size in SIZES:
        with Load(browser, "sound.html", base, size) as load:
            assert [load.audit(tmp_path, theme) for theme in ("light", "dark")] == [Look({}, 1)] * 2

    always = {
        "foreign": ["http://elsewhere.invalid/x.png", "ws://elsewhere.invalid/"],
        "alt": ['<img id="bare" src="data:,">'],
        "headings": ["h4 after h2: Four", "h1 after h4: One again"],
        "axe": ["button-name: button", "image-alt: #bare"],
        "maths": [r'<span class="math">\(y\)</span>', "", "a missing brace", r"unknown \name", "$$z$$"],
        "links": ["gone.html", "#gone", "other.html#gone", "nowhere:x"],
        "weight": ["1.50 MiB"],
    }
    for size in SIZES:
        with Load(browser, "broken.html", base, size) as load:
            light, dark = (load.audit(tmp_path, theme).faults for theme in ("light", "dark"))
        console = sorted(light.pop("console"))
        assert console == sorted(dark.pop("console")) and len(console) == 4
        assert all(word in line for word, line in zip(["net::", "ws:", "complaint", "fall"], console, strict=True)), console
        scroll = light.pop("scroll", [])
        assert scroll == dark.pop("scroll", []) and len(scroll) == (size == "phone")
        assert all(fault.endswith('px, by <div style="width: 800px">A wide line</div>') for fault in scroll)
        assert light == always
        contrast = ["button-name: button", "color-contrast: #dim", "image-alt: #bare"]
        assert dark == always | {"axe": contrast, "theme": ["light, not dark"]}
        assert set(KINDS) == {*dark, "scroll", "console"}


def test_without_a_browser_the_tests_say_so(monkeypatch, tmp_path):
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for ci, outcome in {"": pytest.skip.Exception, "true": pytest.fail.Exception}.items():
        monkeypatch.setenv("CI", ci)
        with pytest.raises(outcome, match="apt-get install chromium.*playwright install chromium"):
            chromium(str(tmp_path / "chrome"))
    (tmp_path / "chrome").touch()
    assert chromium(str(tmp_path / "chrome")) == str(tmp_path / "chrome")


@pytest.mark.parametrize(("site", "size"), [("http", "wide"), ("http", "phone"), ("disk", "wide")])
def test_the_figure_rounding_grid_answers_to_mouse_finger_and_keyboard(browser, sites, site, size):
    def shows(state: dict, words: str) -> dict[str, str]:
        """Wait until the text alternative says this, hold the numbers to Python's, return the numbers in words."""
        figure.locator("[aria-live=polite]", has_text=words).wait_for()
        expected = {k: v for k, v in rounding_grid.numbers(state).items() if v is not None and k != "levels"}
        outputs = {o.get_attribute("data-quantity"): o for o in figure.locator("output").all()}
        found = {name: float(outputs[name].get_attribute("data-value")) for name in expected}
        assert found == pytest.approx(expected, rel=1e-9)
        return {name: outputs[name].inner_text() for name in expected}

    with Load(browser, "book/02_quantization.html", sites[site], size) as load:
        page = load.page
        figure = page.locator("[data-figure=rounding_grid]")
        state = json.loads(figure.get_attribute("data-values"))["state"]
        assert state == rounding_grid.initial()
        seen = [shows(state, "a scale for each 128 of 1,536 weights")]

        marked = figure.get_by_label("Marked weight", exact=True)
        for _ in range(300):
            page.keyboard.press("Tab")
            if marked.evaluate("slider => slider === document.activeElement"):
                break
        else:
            pytest.fail("the Tab key does not reach the slider")
        page.keyboard.press("ArrowRight")
        state |= {"outlier": state["outlier"] + 1}
        seen.append(shows(state, f"was put at {state['outlier']}\u00a0σ"))

        group = figure.get_by_label("Group size", exact=True)
        group.scroll_into_view_if_needed()
        box = group.bounding_box()
        middle, right = box["y"] + box["height"] / 2, box["x"] + 0.98 * box["width"]
        if size == "phone":
            page.touchscreen.tap(right, middle)
        else:
            steps = group.evaluate("slider => slider.value / slider.max")
            page.mouse.move(box["x"] + 8 + steps * (box["width"] - 16), middle)  # the knob
            page.mouse.down()
            page.mouse.move(right, middle, steps=5)
            page.mouse.up()
        state |= {"group_size": 8}
        seen.append(shows(state, "a scale for each 8 of 1,536 weights"))

        figure.get_by_role("button", name="As trained", exact=True).press("Enter")
        seen.append(shows(rounding_grid.PRESETS["As trained"], "one scale for all 1,536 weights"))
        assert len({s["snr_db"] for s in seen}) == len({s["rms_error"] for s in seen}) == len(seen), seen
        assert load.heard == {}
