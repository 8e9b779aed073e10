"""Links to the repository that this book was built from; where there is none (labs/publish.py says), no link.

Below the title of a lab stands where to run it on Colab and where its source is. A page may write

    :::{with-repository}
    Report a mistake in {repository}`the list of issues <issues>`.
    :::
    :::{without-repository}
    Report a mistake to whoever gave you this copy.
    :::

The role links to a path below the repository's address, or to the address itself; without a repository it is plain text.
"""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import ReferenceRole, SphinxDirective

sys.path.append(str(Path(__file__).resolve().parents[2] / "labs"))
from publish import colab_address, repository  # noqa: E402


def derive(app, config):
    # As a configuration value, so that pages are read again when the repository changes.
    config.course_repository = repository(Path(app.srcdir)) or ""


class WithRepository(SphinxDirective):
    has_content = True
    wanted = True

    def run(self):
        return self.parse_content_to_nodes() if bool(self.config.course_repository) is self.wanted else []


class WithoutRepository(WithRepository):
    wanted = False


class RepositoryRole(ReferenceRole):
    def run(self):
        if not self.config.course_repository:
            return [nodes.Text(self.title)], []
        path = self.target.strip("/") if self.has_explicit_title else ""
        return [link(self.title, f"{self.config.course_repository}/{path}".rstrip("/"))], []


def link(words: str, address: str) -> nodes.reference:
    return nodes.reference("", words, refuri=address)


def lab_line(address: str, stem: str, has_exercises: bool) -> nodes.paragraph:
    """Run on Colab: with solutions, exercises. Source."""
    complete, student = (colab_address(address, name) for name in (f"{stem}.ipynb", f"student/{stem}.ipynb"))
    line = nodes.paragraph(classes=["lab-links"])
    if complete and has_exercises:
        line += [nodes.Text("Run this lab on Colab: "), link("with solutions", complete), nodes.Text(" or ")]
        line += [link("as exercises", student), nodes.Text(". ")]
    elif complete:
        line += [link("Run this lab on Colab", complete), nodes.Text(". ")]
    # GitHub's HEAD is the default branch; other hosts write this path in other ways.
    source = f"{address}/blob/HEAD/labs/{stem}.py" if complete else address
    line += [link("Its source" if complete else "Its repository", source), nodes.Text(".")]
    return line


def add_lab_line(app, doctree):
    folder, _, stem = app.env.docname.rpartition("/")
    labs = Path(app.srcdir) / "labs"
    if folder != "labs" or not (labs / f"{stem}.ipynb").is_file() or not app.config.course_repository:
        return
    line = lab_line(app.config.course_repository, stem, (labs / "student" / f"{stem}.ipynb").is_file())
    if title := next(doctree.findall(nodes.title), None):
        title.parent.insert(title.parent.index(title) + 1, line)


def setup(app):
    app.add_config_value("course_repository", "", "env", [str])
    app.connect("config-inited", derive)
    app.connect("doctree-read", add_lab_line)
    app.add_directive("with-repository", WithRepository)
    app.add_directive("without-repository", WithoutRepository)
    app.add_role("repository", RepositoryRole())
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
