"""The book's own Sphinx extension: keeps the built pages from naming or asking other hosts."""

from __future__ import annotations

THEBE = ("thebe", "codemirror")


def is_thebe(asset) -> bool:
    text = " ".join(str(part) for part in (getattr(asset, "filename", asset), getattr(asset, "attributes", "")) if part)
    return any(word in text.lower() for word in THEBE)


def drop_thebe(app, pagename, templatename, context, doctree):
    """Take thebe's scripts and styles, which load code from another host, out of every page."""
    for kind in ("script_files", "css_files"):
        context[kind] = [asset for asset in context.get(kind, []) if not is_thebe(asset)]


def setup(app):
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
