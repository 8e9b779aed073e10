"""Options and fixtures that several tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PARITY = Path(__file__).resolve().parent.parent / "book" / "parity"


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
