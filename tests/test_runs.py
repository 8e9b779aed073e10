"""tinylm.runs: no finished run is lost, none is repeated, and a bad sweep is refused before it starts."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from conftest import until
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


# Workers


def at_work(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def seeds(folder) -> set[int]:
    return {record["seed"] for record in read_records(folder)}


def test_the_run_of_a_worker_that_dies_is_done_again(tmp_path):
    (log := tmp_path / "log").touch()

    def function(config):
        again = f"begin {config['seed']}" in log.read_text()
        with open(log, "a") as file:
            file.write(f"begin {config['seed']}\n")
        if config["seed"] == 2 and not again:
            os._exit(1)
        return {"tokens": 1, "flops": 1, "loss": 1.0}

    records = run_all([{"seed": s} for s in range(5)], function, tmp_path, progress=False, jobs=2)
    assert [record["seed"] for record in records] == list(range(5)) and seeds(tmp_path) == set(range(5))
    assert log.read_text().count("begin 2") == 2


def test_a_run_that_always_kills_its_worker_is_named_and_the_others_are_done(tmp_path):
    def function(config):
        if config["seed"] == 0:
            os._exit(1)
        return {"tokens": 1, "flops": 1, "loss": 1.0}

    with pytest.raises(
        RuntimeError, match=r"(?s)each of the 3 times it did the run of \{'seed': 0\}.*memory"
    ) as caught:
        run_all([{"seed": s} for s in range(4)], function, tmp_path, progress=False, jobs=2)
    assert caught.value.__notes__ == [f"1 runs failed; the records of the others are in {tmp_path}"]
    assert seeds(tmp_path) == {1, 2, 3}


def test_where_no_worker_lives_it_is_not_tried_with_all_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "TRIES", 1)
    with pytest.raises(RuntimeError, match="memory") as caught:
        run_all([{"seed": s} for s in range(9)], lambda config: os._exit(1), tmp_path, progress=False, jobs=2)
    assert "5 were not begun" in caught.value.__notes__[0] and seeds(tmp_path) == set()


@pytest.mark.parametrize("jobs", [1, 2])
def test_when_runs_fail_the_others_are_done(tmp_path, jobs):
    class Odd(Exception):
        def __init__(self, a, b):  # pickle cannot make one of its message
            super().__init__(f"odd {a} {b}")

    def function(config):
        if config["seed"] == 1:
            raise Odd(1, 2)
        if config["seed"] == 2:
            raise ArithmeticError("even")
        return {"tokens": 1, "flops": 1, "loss": 1.0}

    with pytest.raises((RuntimeError, ArithmeticError)) as caught:
        run_all([{"seed": s} for s in range(5)], function, tmp_path, progress=False, jobs=jobs)
    told = "\n".join([str(caught.value), *caught.value.__notes__])
    assert ("Odd: odd 1 2, in the run of {'seed': 1}" in told) or ("even\nin the run of {'seed': 2}" in told), told
    assert "2 runs failed; the records of the others" in told
    assert seeds(tmp_path) == {0, 3, 4}


def test_a_record_is_of_the_code_at_the_start(tmp_path, monkeypatch):
    commits = iter(["at the start", "of a commit made meanwhile"])
    monkeypatch.setattr(runs, "_commit", functools.cache(lambda: next(commits)))

    def function(config):
        assert runs._commit.cache_info().currsize == 1, "asked for the commit when the first run was done"
        return {"tokens": 1, "flops": 1, "loss": 1.0}

    assert go([{"seed": 0}], function, tmp_path)[0]["commit"] == "at the start"


@pytest.mark.parametrize(("jobs", "said"), [(0, "jobs"), (-1, "jobs"), (2.0, "jobs"), (True, "jobs")])
def test_a_number_of_jobs_that_cannot_be_is_refused(tmp_path, jobs, said):
    with pytest.raises(ValueError, match=said):
        run_all(CONFIGS, Counting(), tmp_path, progress=False, jobs=jobs)


def test_the_bar_weighs_runs_by_their_cost(tmp_path, capsys):
    configs = [{"seed": s} for s in range(3)]
    run_all(configs[:1], Counting(), tmp_path, progress=False)
    run_all(configs, Counting(), tmp_path, cost=lambda config: 10.0 ** config["seed"])
    (*_, last) = capsys.readouterr().err.strip().split("\r")
    assert "111/111" in last and "3 of 3 runs" in last and "<" in last


SWEEP = """
import sys, time
from pathlib import Path
from tinylm.runs import run_all

folder, jobs = Path(sys.argv[1]), int(sys.argv[2])

def function(config):
    with open(folder / "log", "a") as log:
        log.write(f"begin {config['seed']}\\n")
    while config["seed"] >= 4 and not (folder / "go").exists():
        time.sleep(0.02)
    return {"tokens": 1, "flops": 1, "loss": 1.0}

run_all([{"seed": s} for s in range(8)], function, folder, jobs=jobs)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_and_started_again_it_loses_nothing_and_repeats_nothing(tmp_path, jobs):
    """And meanwhile a second sweep is refused; both end with the process, however it ends."""
    command = [sys.executable, "-c", SWEEP, str(tmp_path), str(jobs)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    log = tmp_path / "log"

    def files():
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "records").glob("*.json")}

    with open(tmp_path / "told", "wb") as told:
        process = subprocess.Popen(command, env=environment, stderr=told)
    try:
        # Four runs are finished, and as many as there are workers are at work.
        until(lambda: process.poll() is not None or len(files()) == 4 and log.read_text().count("begin") == 4 + jobs)
        assert process.poll() is None, (tmp_path / "told").read_text()
        before = files()
        with pytest.raises(RuntimeError, match=r"another process is doing runs in .*: wait for its end"):
            run_all([{"seed": s} for s in range(8)], Counting(), tmp_path, progress=False)
        assert files() == before and process.poll() is None
        workers = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    until(lambda: not any(map(at_work, workers)))  # else its workers go on without it
    assert files() == before and seeds(tmp_path) == {0, 1, 2, 3}

    log.unlink()
    (tmp_path / "go").touch()
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert sorted(log.read_text().splitlines()) == [f"begin {s}" for s in range(4, 8)]
    assert seeds(tmp_path) == set(range(8)) and before.items() <= files().items()
