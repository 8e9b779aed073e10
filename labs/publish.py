"""Where this course is published, and the notebooks that Colab opens from there.

    python labs/publish.py FOLDER                                      the repository and commit of this checkout
    python labs/publish.py FOLDER --repository https://... --commit SHA

FOLDER, new or empty, gets NN_topic.ipynb with solutions and student/NN_topic.ipynb with the exercises; their setup cells
install tinylm from that repository at that commit.

The repository is what GitHub's CI says it is, else the git remote `origin`, else there is none: no file of the course
names one. The links in the book (book/_ext/links.py) come from here too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

LABS = Path(__file__).resolve().parent
ROOT = LABS.parent

# The branch that the publish workflow writes these notebooks to.
BRANCH = "colab"
# What build.py's setup cell has in this place.
UNFILLED = 'REPOSITORY, COMMIT = "", ""'

# The address goes into a Python string of a cell that readers run: nothing passes that could end the string.
LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
SEGMENT = r"[A-Za-z0-9_~][A-Za-z0-9._~-]*"
ADDRESS = re.compile(rf"https://(?P<host>({LABEL}\.)+(?P<top>[a-z][a-z0-9-]*))(:[0-9]{{1,5}})?(?P<path>(/{SEGMENT}){{2,}})")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Names that mean something on one network only.
PRIVATE = {"arpa", "corp", "home", "internal", "intranet", "lan", "local", "localdomain", "localhost", "private"}
# Hosts for ssh behind a firewall, and a second name.
SAME_HOST = {
    "ssh.github.com": "github.com",
    "www.github.com": "github.com",
    "altssh.gitlab.com": "gitlab.com",
    "altssh.bitbucket.org": "bitbucket.org",
}


def is_address(text: str) -> bool:
    """Whether this is the plain https address of a repository on a public host, and nothing more."""
    match = ADDRESS.fullmatch(text)
    if not match or match["top"] in PRIVATE or text.endswith(".git"):
        return False
    return match["host"] != "github.com" or match["path"].count("/") == 2


def public_address(remote: str) -> str | None:
    """The https address of a git remote, without credentials; None for a path, a private host or another protocol."""
    remote = remote.strip()
    if re.search(r"[\s\\\x00-\x1f\x7f]", remote):
        return None  # urlsplit would drop some of these in silence
    if "://" in remote:
        try:
            parts = urlsplit(remote)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            return None
        if parts.scheme.lower() not in ("https", "ssh", "git+ssh") or parts.query or parts.fragment:
            return None
        path = parts.path
        # The port of ssh says nothing about https.
        port = port if parts.scheme.lower() == "https" and port != 443 else None
    elif scp := re.fullmatch(r"(?:[^@/]+@)?([^:/@]+):(.+)", remote):  # git@host:owner/name.git
        host, port, path = scp[1], None, scp[2]
    else:
        return None
    host = SAME_HOST.get(host.lower(), host.lower())
    path = path.strip("/").removesuffix(".git").rstrip("/")
    address = f"https://{host}{f':{port}' if port else ''}/{path}"
    return address if is_address(address) else None


def git(root: Path, *arguments: str) -> str | None:
    """What git prints in this folder, or None where it fails or is not installed."""
    try:
        result = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, encoding="utf-8")
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def repository(root: Path, environment: Mapping[str, str] = os.environ) -> str | None:
    """The public address of the repository that `root` is a checkout of, or None."""
    server, name = environment.get("GITHUB_SERVER_URL"), environment.get("GITHUB_REPOSITORY")
    if server and name:
        return public_address(f"{server}/{name}")
    if git(root, "rev-parse", "--show-prefix") != "":
        return None  # no checkout, or a folder in somebody's other repository
    return public_address(git(root, "remote", "get-url", "origin") or "")


def colab_address(address: str, notebook: str) -> str | None:
    """Where Colab opens a published notebook; None for a host that it does not open from."""
    owner_and_name = address.removeprefix("https://github.com/")
    if owner_and_name == address:
        return None
    return f"https://colab.research.google.com/github/{owner_and_name}/blob/{BRANCH}/{notebook}"


def filled(notebook: dict, address: str, commit: str) -> dict:
    """The notebook with address and commit in its setup cell, and without build.py's stamp, which no longer fits."""
    found = 0
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and UNFILLED in source:
            found += source.count(UNFILLED)
            source = source.replace(UNFILLED, f'REPOSITORY, COMMIT = "{address}", "{commit}"')
            cell["source"] = source.splitlines(keepends=True)
    if found != 1:
        raise ValueError(f"{found} lines read {UNFILLED}, one is expected: build the notebook again")
    notebook["metadata"].pop("tinylm", None)
    return notebook


def publish(folder: Path, address: str, commit: str, labs: Path = LABS) -> list[str]:
    """Write the publishable copies of all built notebooks into a new or empty folder; returns their names there."""
    if not is_address(address):
        shown = "an address with credentials" if "@" in address else repr(address)
        raise ValueError(f"the repository is {shown}: https://host/owner/name is needed, without user, token, .git or query")
    if not COMMIT.fullmatch(commit):
        raise ValueError(f"the commit is {commit!r}: all 40 lower-case hexadecimal digits are needed")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: name a new one")
    texts = {}
    for path in sorted([*labs.glob("[0-9][0-9]_*.ipynb"), *labs.glob("student/[0-9][0-9]_*.ipynb")]):
        try:
            notebook = filled(json.loads(path.read_text(encoding="utf-8")), address, commit)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        texts[path.relative_to(labs).as_posix()] = json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    if not texts:
        raise ValueError(f"there are no notebooks in {labs}")
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return list(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the copies go: new or empty")
    parser.add_argument("--repository", help="https://host/owner/name; without it, this checkout's")
    parser.add_argument("--commit", help="40 hexadecimal digits; without it, the one that is checked out")
    arguments = parser.parse_args()
    address = arguments.repository or repository(ROOT)
    if address is None:
        sys.exit("neither GitHub's CI nor a remote `origin` names a public repository: name it with --repository")
    commit = arguments.commit or git(ROOT, "rev-parse", "HEAD")
    if commit is None:
        sys.exit("this is no git checkout: name the commit with --commit")
    if not arguments.commit and git(ROOT, "status", "--porcelain", "--", "labs", "pyproject.toml"):
        sys.exit(f"labs/ has changes that commit {commit} lacks: commit them first, so that Colab installs what you see")
    try:
        names = publish(arguments.folder, address, commit)
    except ValueError as error:
        sys.exit(str(error))
    print(f"{len(names)} notebooks of {address} at {commit}: {', '.join(names)}")


if __name__ == "__main__":
    main()
