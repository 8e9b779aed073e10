"""The book's own Sphinx extension: what the theme brings is mended and made light, and no page asks another host.

While a page is written it loses the scripts that nothing on it needs. When the book stands, its style sheets become one,
which holds only rules that some page can use; the pages' markup is mended; and what no page asks for is deleted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
from pathlib import Path

import tinycss2
from bs4 import BeautifulSoup, NavigableString

# Scripts, by a word in their name or text, and what a page must hold to keep them. Thebe loads code from another host.
NEEDED_BY = {
    "thebe": None,
    "codemirror": None,
    "mathjax": r'class="[^"]*\bmath\b',
    "toggle": r'class="[^"]*\btoggle\b',
    "design-tabs": r'class="[^"]*\bsd-tab',
    "clipboard": r'class="highlight',
    "copybutton": r'class="highlight',
}
# MathJax in parts: its combined files add a menu and a speech engine, half a megabyte. assistive-mml writes MathML for
# screen readers; the extensions are loaded when a formula asks for one.
MATHJAX = ["startup.js", "core.js", "input/tex.js", "input/tex/extensions/*.js", "a11y/assistive-mml.js"]
MATHJAX += ["output/chtml.js", "output/chtml/fonts/tex.js", "output/chtml/fonts/woff-v2/*.woff"]
# Sphinx copies these in every build; no page asks for them.
UNUSED = ["**/*.css", "**/*.map", "*-macros.html", "*thebe*", "readme.png", "locales", "vendor", "scripts/fontawesome*"]
# Nine tenths of highlighted code's markup are around names, punctuation, operators and numbers, which read as well in the
# text's colour, and around the pieces of a string, which share one. It was half of a long lab's page.
PLAIN = re.compile(r'<span class="(?:mf|mi|n|nn|o|p|w)">([^<]*)</span>')
STRING = re.compile(r'(?:<span class="(?:s1|s2|sa|se|si)">[^<]*</span>)+')
# Rules of the theme's icon font, 1.5 MB with its script: custom.css draws the few icons that pages show.
ICON_FONT = re.compile(r"\b(font|font-family|content):\W?(Font Awesome|var\(--(fa|pst-icon)-)")


def keep_needed_scripts(app, pagename, templatename, context, doctree):
    """Take from a page the scripts that nothing on it needs."""

    def needed(script) -> bool:
        text = " ".join(str(part) for part in (script.filename, script.attributes) if part).lower()
        marks = [mark for word, mark in NEEDED_BY.items() if word in text]
        return all(mark and re.search(mark, context.get("body", "")) for mark in marks)

    context["script_files"] = [script for script in context.get("script_files", []) if needed(script)]


def finish(app, exception):
    """Mend the built book. Runs again over pages that it mended before without changing them."""
    if exception is not None or app.builder.name != "html":
        return
    static = Path(app.outdir, "_static")
    files = [path for path in Path(app.outdir).rglob("*.html") if static not in path.parents]
    pages = {path: BeautifulSoup(lighter(path.read_text(encoding="utf-8")), "html.parser") for path in files}
    for page in pages.values():
        mend(page)
    link_one_sheet(static / "book.css", pages)
    for path, page in pages.items():
        path.write_text(str(page), encoding="utf-8")
    for path in {path for pattern in UNUSED for path in static.glob(pattern)} - {static / "book.css"}:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def lighter(html: str) -> str:
    """A page with less markup in its code: keywords, strings, comments and defined names keep their colours."""
    html = PLAIN.sub(r"\1", html)
    return STRING.sub(lambda run: f'<span class="s2">{re.sub("<[^>]*>", "", run[0])}</span>', html)


def copy_mathjax(app):
    """The parts of MathJax that pages load, from the PyPI package sphinx-mathjax-offline."""
    if app.builder.name != "html":
        return
    target = Path(app.outdir, "_static", "mathjax")
    source = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    for path in (path for pattern in MATHJAX for path in source.glob(pattern)):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


# Styles


def link_one_sheet(target: Path, pages: dict[Path, BeautifulSoup]):
    """Write to `target` the rules of the pages' style sheets that some page can use, and link it in their place."""
    links = {path: page.select('link[rel~="stylesheet"]') for path, page in pages.items()}
    asked = [(path.parent / link["href"].split("?")[0]).resolve() for path in pages for link in links[path]]
    sheets = [sheet for sheet in dict.fromkeys(asked) if sheet != target.resolve()]
    words = {word for page in pages.values() for word in re.findall(r"[\w-]+", str(page))}
    for script in target.parent.rglob("*.js"):
        if "mathjax" not in script.parts:
            words.update(re.findall(r"[\w-]+", script.read_text(encoding="utf-8")))
    css = ""
    for sheet in sheets:
        own = sheet.name == "custom.css"
        css += sheet.read_text(encoding="utf-8") if own else "\n".join(used(rules_of(sheet), words)) + "\n"
    target.write_text(css, encoding="utf-8")
    digest = hashlib.sha256(css.encode()).hexdigest()[:8]
    for path, page in pages.items():
        if links[path]:
            root = "../" * (len(path.relative_to(target.parents[1]).parts) - 1)
            links[path][-1].replace_with(
                page.new_tag("link", rel="stylesheet", href=f"{root}_static/{target.name}?v={digest}")
            )
            for link in links[path][:-1]:
                link.decompose()


def rules_of(sheet: Path) -> list:
    rules = []
    for rule in tinycss2.parse_stylesheet(sheet.read_text(encoding="utf-8"), skip_whitespace=True):
        if rule.type == "at-rule" and rule.lower_at_keyword == "import":
            rules += rules_of((sheet.parent / rule.prelude[-1].value).resolve())
        else:
            rules.append(rule)
    return rules


def used(rules: list, words: set[str]) -> list[str]:
    """The rules, as text, without selectors that name a class or id that occurs nowhere in the pages and scripts."""
    kept = []
    for rule in rules:
        if rule.type == "comment":
            kept += [rule.serialize()] if rule.value.startswith("!") else []  # licences
        elif rule.type == "at-rule" and rule.lower_at_keyword in ("media", "supports"):
            inner = used(tinycss2.parse_rule_list(rule.content, skip_comments=True, skip_whitespace=True), words)
            kept += [f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}{{{''.join(inner)}}}"] if inner else []
        elif rule.type == "at-rule":
            kept += (
                [] if rule.lower_at_keyword == "charset" or ICON_FONT.search(rule.serialize()) else [rule.serialize()]
            )
        elif rule.type == "qualified-rule" and not ICON_FONT.search(body := tinycss2.serialize(rule.content)):
            selectors = [s for s in split_at_commas(rule.prelude) if names(s) <= words]
            kept += [f"{','.join(map(tinycss2.serialize, selectors)).strip()}{{{body}}}"] if selectors else []
    return kept


def split_at_commas(tokens: list) -> list[list]:
    parts = [[]]
    for token in tokens:
        if token == ",":
            parts.append([])
        elif token.type != "comment":
            parts[-1].append(token)
    return parts


def names(selector: list) -> set[str]:
    """The classes and ids that an element must have; what stands in parentheses, as in :not(), is left out."""
    classes = {b.value for a, b in zip(selector, selector[1:], strict=False) if a == "." and b.type == "ident"}
    return classes | {token.value for token in selector if token.type == "hash"}


# Markup

# The theme's own lines leave the theme unset until its script runs, which shows on a dark page. Paper is light.
THEME = """
  {
    const page = document.documentElement.dataset, dark = matchMedia("(prefers-color-scheme: dark)");
    page.mode = localStorage.getItem("mode") || "auto";
    page.theme = page.mode == "dark" || (page.mode == "auto" && dark.matches) ? "dark" : "light";
    let shown;
    addEventListener("beforeprint", () => { shown = page.theme; page.theme = "light"; });
    addEventListener("afterprint", () => { page.theme = shown; });
  }
"""
SCROLLS = "pst-scrollable-table-container"
BOX = re.compile(r"(?:the )?(claim|predict|check|verdict)", re.I)
NUMBER = re.compile(r"[^\w\s]?\d[\d,]*")  # the sign and the whole part


def mend(page: BeautifulSoup):
    """Correct what the theme and its companions get wrong, and take out what no reader needs."""
    unused = ['script[src*="fontawesome"]', 'script[type="text/x-thebe-config"]', "#jb-print-docs-body"]
    if not page.select("#search-results"):  # only the page that shows results searches
        unused += [f'script[src*="{name}"]' for name in ("searchtools", "language_data", "searchindex")]
    if not page.select('[data-bs-toggle="dropdown"]'):  # tooltips, its other use here, are the buttons' titles anyway
        unused += ['[src*="bootstrap.js"]', '[href*="bootstrap.js"]']
    for element in page.select(", ".join(unused)) + page.select('meta[name="viewport"]')[1:]:
        element.decompose()
    for script in page.select("script[data-cfasync]"):
        script.string = THEME

    # Names: what a control shows has to be in its name, and every control needs one.
    for element in page.select(".search-button-field, details.hide > summary"):
        element.attrs.pop("aria-label", None)
    for summary in page.select("nav summary"):
        summary["aria-label"] = f"Pages under {summary.find_previous('a').get_text(strip=True)}"
    for sidebar in page.select("#pst-primary-sidebar"):
        sidebar.attrs |= {"role": "complementary", "aria-label": "The book"}
    for caption in page.select("nav .caption[role=heading]"):  # names a part of the list; the page's first heading is its title
        del caption["role"], caption["aria-level"]
    for citation in page.select(".citation-list > .citation"):
        citation["role"] = "listitem"

    # The theme's script lets the keyboard reach what has this class, when it scrolls.
    for formula in page.select(f".bd-article div.math:not(.{SCROLLS})"):
        formula["class"].append(SCROLLS)
    for image in page.select(f".bd-article :is(figure, .cell_output) img:not(.{SCROLLS} > img)"):
        image.wrap(page.new_tag("div", attrs={"class": SCROLLS}))
    for formula in page.select(".bd-article span.math:not(.nobr > .math)"):  # keeps the comma that follows
        after = formula.next_sibling
        if isinstance(after, NavigableString) and (marks := re.match(r"[.,;:!?)\]’”]+", after)):
            after.replace_with(after[marks.end() :])
            formula.wrap(page.new_tag("span", attrs={"class": "nobr"})).append(marks[0])
    for box in page.select(".admonition.dropdown"):  # folds without a script
        box.name, box.find(class_="admonition-title").name = "details", "summary"
        box["class"] = ["hide", *(name for name in box["class"] if name not in ("dropdown", "toggle"))]
    # A lab is plain Markdown: its quotations and verdicts get the boxes that chapters have.
    for quote in page.select("blockquote, .cell_output > p"):
        bold = quote.find("strong")
        if bold and BOX.match(bold.get_text()) and quote.get_text(strip=True).startswith(bold.get_text(strip=True)):
            kind = "verdict" if quote.name == "p" else BOX.match(bold.get_text())[1].lower()
            quote["class"] = list(dict.fromkeys([*quote.get("class", []), "box", kind]))
    for question in page.select(".cell_output div.predict"):
        question["class"] = ["box", "predict"]
    for table in page.select("table"):
        line_up_decimals(table, page)


def line_up_decimals(table, page: BeautifulSoup):
    """Pad the numbers of a column on the left until their decimal points stand under each other.

    The padding is a style sheet's: a cell's text stays what it was.
    """
    rows = [row.find_all(["td", "th"], recursive=False) for row in table.select("tr")]
    if table.select(".pad, [colspan], [rowspan]") or len({len(row) for row in rows}) != 1:
        return
    for column in zip(*rows, strict=True):
        body = [cell for cell in column if cell.name == "td" and cell.get_text(strip=True)]
        wholes = {id(cell): NUMBER.match(cell.get_text(strip=True)) for cell in body}
        if sum(map(bool, wholes.values())) < 2 or any(
            len(cell.get_text()) > 3 for cell in body if not wholes[id(cell)]
        ):
            continue
        longest = max((match[0] for match in wholes.values() if match), key=len)
        for cell in column:
            if "class" in cell.attrs:
                cell["class"] = [name for name in cell["class"] if name not in ("text-right", "text-center")]
        for cell in body:
            missing = len(longest) - len(wholes[id(cell)][0]) if wholes[id(cell)] else 0
            if missing:
                pad = page.new_tag("span", attrs={"class": "pad", "data-pad": longest[:missing]})
                (cell.find("p") or cell).insert(0, pad)


def setup(app):
    app.connect("builder-inited", copy_mathjax)
    app.connect("html-page-context", keep_needed_scripts, priority=900)
    app.connect("build-finished", finish, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
