"""What several test files share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT / "book" / "parity"


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Path:
    """The book, built anew with warnings as errors."""
    out = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(ROOT)]
    command += ["--path-output", str(out), "-n", "-W", "--keep-going"]
    result = subprocess.run(command, cwd=out, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "WARNING" not in result.stderr, result.stderr[-4000:]
    return out / "_build" / "html"


def chromium(own: str) -> str:
    """The Chromium to drive; `own` is where Playwright would have put one. Without any: skipped, in CI a failure."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found or Path(own).exists():
        return found or own
    stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
    stop(
        "no browser to test with: `apt-get install chromium` (Debian), or `python -m playwright install "
        "chromium`, or name one in the variable CHROMIUM"
    )


@pytest.fixture(scope="module")  # not session: while Playwright lives, no other test can start an event loop
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # No name resolves, so nothing that a page asks for leaves this machine.
        browser = playwright.chromium.launch(
            executable_path=chromium(playwright.chromium.executable_path),
            args=["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--disable-gpu"],
        )
        yield browser
        browser.close()


def until(condition, seconds=120):
    """The first true value of `condition()`, asked again and again."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.02)
    return value


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def serve() -> Iterator:
    """A function that serves a folder and returns its address."""
    servers = []

    def start(folder: Path) -> str:
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def sites(serve, book) -> dict[str, str]:
    """The book's address over http and from the disk."""
    return {"http": serve(book), "disk": f"{book.resolve().as_uri()}/"}


def pytest_addoption(parser):
    parser.addoption("--write-parity", action="store_true", help="write the measured parity tables into book/parity")


@pytest.fixture
def parity(request):
    """Holds rows of measured differences to their tolerances and to the table that the book shows of them.

    A row: what, against (with its version), dtype, cases, tolerance and worst, the largest absolute difference.
    """

    def hold(stem: str, rows: list[dict]) -> None:
        for row in rows:
            assert row["worst"] <= row["tolerance"], row
        rounded = [{**row, "worst": float(f"{row['worst']:.1e}")} for row in rows]
        path = PARITY / f"{stem}.json"
        if request.config.getoption("--write-parity"):
            from tinylm.files import write_json

            write_json(path, rounded)
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        stale = f"{path.name} is not what the tests measure: run pytest --write-parity {request.path.name}"
        without = [[{k: v for k, v in row.items() if k != "worst"} for row in table] for table in (stored, rounded)]
        assert without[0] == without[1], stale
        for old, new in zip(stored, rounded, strict=True):
            # Rounding differs from processor to processor; far below the tolerance that is no news.
            before, now = (max(row["worst"], row["tolerance"] / 100) for row in (old, new))
            assert before / 10 <= now <= 10 * before, f"{stale}: {old['worst']} then, {new['worst']} now"

    return hold
