"""tinylm.runs: no finished run is lost, none is repeated, and a bad sweep is refused before it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinylm import runs
from tinylm.runs import read_records, run_all, run_key

CONFIGS = [{"width": w, "seed": s} for w in (8, 16) for s in (0, 1)]


class Counting:
    """A run that costs nothing and remembers what it was asked to do."""

    def __init__(self, **result):
        self.calls, self.result = [], {"tokens": 10, "flops": 1e6, "loss": 2.5, **result}

    def __call__(self, config):
        self.calls.append(dict(config))
        config["width"] = "changed"  # must not reach the record
        return self.result


def go(configs, function, folder):
    return run_all(configs, function, folder, progress=False)


def test_a_record_says_everything_about_its_run(tmp_path):
    (record,) = go([{"seed": 3, "width": 8}], Counting(note="extra"), tmp_path)
    assert record["config"] == {"seed": 3, "width": 8} and record["seed"] == 3
    assert (record["tokens"], record["flops"], record["loss"], record["note"]) == (10, 1e6, 2.5, "extra")
    assert 0 <= record["seconds"] < 10 and "torch" in record["versions"]
    assert json.loads((tmp_path / "records" / f"{record['key']}.json").read_text()) == record


def test_finished_runs_are_skipped_and_results_come_in_the_order_of_the_configs(tmp_path):
    first, second = Counting(loss=1.0), Counting(loss=2.0)
    go(CONFIGS[2:3], first, tmp_path)
    records = go(CONFIGS, second, tmp_path)
    assert second.calls == [c for c in CONFIGS if c != CONFIGS[2]]
    assert [r["config"] for r in records] == CONFIGS
    assert [r["loss"] for r in records] == [2.0, 2.0, 1.0, 2.0]
    assert go(reversed(CONFIGS), Counting(loss=9.0), tmp_path) == records[::-1]


def test_read_records_is_sorted_and_ignores_temporary_files(tmp_path):
    assert read_records(tmp_path) == []
    go(CONFIGS, Counting(), tmp_path)
    (tmp_path / "records" / ".0123.json.x1y2.tmp").write_text('{"half')
    keys = [r["key"] for r in read_records(tmp_path)]
    assert keys == sorted(run_key(c) for c in CONFIGS)


def test_key_depends_on_content_not_on_order():
    assert run_key({"a": 1, "seed": 0}) == run_key({"seed": 0, "a": 1})
    assert len({run_key(c) for c in [*CONFIGS, {"a": 1, "seed": 0}, {"a": 2, "seed": 0}]}) == 6


@pytest.mark.parametrize(
    ("configs", "sentence"),
    [
        ([{"seed": 0, "w": 1}, {"w": 1, "seed": 0}], "stands twice"),
        ([{"w": 1}], "integer 'seed'"),
        ([{"seed": "0"}], "integer 'seed'"),
        ([{"seed": True}], "integer 'seed'"),
        ([{"seed": 0, "lr": float("nan")}], "not JSON"),
        ([{"seed": 0, "path": Path("x")}], "not JSON"),
        ([{"seed": 0, "shape": (1, 2)}], "lists instead of tuples"),
        ([{"seed": 0, "d": {1: 2}}], "strings as keys"),
    ],
)
def test_bad_configs_are_refused_before_any_run(tmp_path, configs, sentence):
    function = Counting()
    with pytest.raises(ValueError, match=sentence):
        go([{"good": 1, "seed": 0}, *configs], function, tmp_path)
    assert function.calls == [] and read_records(tmp_path) == []


@pytest.mark.parametrize("damage", ["half", "empty", "renamed", "edited", "not a dict"])
def test_a_damaged_record_is_refused_before_any_run(tmp_path, damage):
    (record, *_) = go(CONFIGS[:2], Counting(), tmp_path)
    path = tmp_path / "records" / f"{record['key']}.json"
    text = path.read_text()
    if damage == "renamed":
        path.rename(path.with_stem("0" * 16))
    else:
        edited = text.replace('"width": 8', '"width": 9')
        path.write_text({"half": text[: len(text) // 2], "empty": "", "edited": edited, "not a dict": "[1]"}[damage])
    function = Counting()
    with pytest.raises(ValueError, match=r"(?s)\.json is damaged.*delete it and its run will be done again"):
        go(CONFIGS, function, tmp_path)
    assert function.calls == []


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ({"tokens": 1, "loss": 1.0}, "must return"),
        ({"tokens": 1, "flops": 1, "loss": float("nan")}, "loss is nan"),
        ({"tokens": 1, "flops": 1, "loss": 1.0, "seconds": 5}, "without"),
        ({"tokens": 1, "flops": 1, "loss": 1.0, "curve": {1, 2}}, r"\.item\(\)"),
        (None, "must return"),
    ],
)
def test_a_bad_result_leaves_no_record_but_keeps_those_before(tmp_path, result, sentence):
    go(CONFIGS[:1], Counting(), tmp_path)
    with pytest.raises(ValueError, match=sentence):
        go(CONFIGS, lambda config: result, tmp_path)
    assert [r["config"] for r in read_records(tmp_path)] == CONFIGS[:1]


def test_commit_and_dirty_flag(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    def commit():
        runs._commit.cache_clear()
        return runs._commit()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    git("init", "-q")
    Path("code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert commit() == head
    Path("new_record.json").write_text("1")  # an experiment's own output is not a change of its code
    assert commit() == head
    Path("code.py").write_text("2")
    assert commit() == head + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
    runs._commit.cache_clear()


SWEEP = """
import sys, time
from tinylm.runs import run_all

def function(config):
    with open(sys.argv[2], "a") as log:
        log.write(f"begin {config['seed']}\\n")
    time.sleep(0.1)
    with open(sys.argv[2], "a") as log:
        log.write(f"end {config['seed']}\\n")
    return {"tokens": 1, "flops": 1, "loss": 1.0}

run_all([{"seed": s} for s in range(8)], function, sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_and_started_again_loses_nothing_and_repeats_nothing(tmp_path):
    command = [sys.executable, "-c", SWEEP, str(tmp_path), str(log := tmp_path / "log")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (
        process.poll() is None and time.monotonic() < deadline and not (log.exists() and "begin 3" in log.read_text())
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the sweep ended before it could be killed"
    finished = {r["seed"] for r in read_records(tmp_path)}
    assert {0, 1, 2} <= finished < set(range(8))
    before = log.read_text().splitlines()

    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    after = log.read_text().splitlines()[len(before) :]
    assert {int(line.split()[1]) for line in after} == set(range(8)) - finished
    assert sum(line.startswith("end") for line in after) == 8 - len(finished)
    assert {r["seed"] for r in read_records(tmp_path)} == set(range(8))
