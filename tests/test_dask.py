"""tinylm.runs and tinylm.sweep on a real Dask cluster of this machine, with workers killed under them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import until
from tinylm import runs
from tinylm.runs import read_records, run_all

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


class Cluster:
    """A scheduler and workers with one thread each, on ports that are free. Without nannies: who is killed stays dead."""

    def __init__(self, folder: Path):
        self.folder, self.processes, self.log = folder, [], open(folder / "log", "wb")
        self.start("scheduler", "--port", "0", "--scheduler-file", file := folder / "scheduler.json")
        self.address = until(lambda: self.read(file))["address"]

    def start(self, *arguments) -> int:
        command = [sys.executable, "-m", "dask", *map(str, arguments), "--host", "127.0.0.1", "--no-dashboard"]
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=self.folder, stdout=self.log, stderr=self.log)
        self.processes.append(process)
        return process.pid

    def worker(self) -> int:
        return self.start("worker", self.address, "--no-nanny", "--nthreads", 1, "--local-directory", self.folder)

    def workers(self) -> int:
        return sum(process.poll() is None for process in self.processes[1:])

    def kill(self, pid: int) -> None:
        (process,) = (p for p in self.processes if p.pid == pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.processes.remove(process)

    def close(self) -> None:
        for process in self.processes[::-1]:
            process.kill()
            process.wait()
        self.log.close()

    @staticmethod
    def read(file: Path) -> dict | None:
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError):  # not there, or half of it
            return None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("dask"))
    yield cluster
    cluster.close()


def started(folder: Path) -> dict[int, list[int]]:
    """Which processes began each run, by its seed."""
    found: dict[int, list[int]] = {}
    for line in (folder / "begun").read_text().splitlines():
        seed, pid = map(int, line.split())
        found.setdefault(seed, []).append(pid)
    return found


def waiting(folder: Path):
    """A run that says who does it, and waits until all may go on."""
    (folder / "begun").touch()

    def function(config):
        with open(folder / "begun", "a") as file:
            file.write(f"{config['seed']} {os.getpid()}\n")
        while not (folder / "go").exists():
            time.sleep(0.02)
        return {"tokens": 1, "flops": 1, "loss": 1.0}

    return function


def test_the_run_of_a_killed_worker_is_done_by_another_and_recorded_once(cluster, tmp_path):
    workers = {cluster.worker(), cluster.worker()}
    function, configs = waiting(tmp_path), [{"seed": s} for s in range(6)]
    with ThreadPoolExecutor() as pool:
        sweep = pool.submit(run_all, configs, function, tmp_path, progress=False, dask=cluster.address)
        until(lambda: sweep.done() or {pid for pids in started(tmp_path).values() for pid in pids} == workers)
        assert not sweep.done(), sweep.result()
        (lost, (killed,)), *_ = started(tmp_path).items()
        cluster.kill(killed)
        (tmp_path / "go").touch()
        records = sweep.result(timeout=120)
    assert [record["seed"] for record in records] == list(range(6))
    assert read_records(tmp_path) == sorted(records, key=lambda record: record["key"])
    begun = started(tmp_path)
    assert {seed: len(pids) for seed, pids in begun.items()} == {s: 1 + (s == lost) for s in range(6)}
    assert begun[lost] == [killed, *(workers - {killed})]


def test_a_run_that_kills_all_its_workers_is_named_and_the_others_are_done(cluster, tmp_path, monkeypatch):
    from distributed import Client

    with Client(cluster.address) as client:  # so that one worker is enough, not four: they take long to start
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 0))
    monkeypatch.setattr(runs, "TRIES", 2)
    for _ in range(2 - cluster.workers()):
        cluster.worker()

    def function(config):
        if config["seed"] == 2:
            os._exit(1)
        return {"tokens": 1, "flops": 1, "loss": 1.0}

    with pytest.raises(RuntimeError, match=r"each of the 2 times it did the run of \{'seed': 2\}: is there memory"):
        run_all([{"seed": s} for s in range(3)], function, tmp_path, progress=False, dask=cluster.address)
    assert {record["seed"] for record in read_records(tmp_path)} == {0, 1}
    until(lambda: cluster.workers() == 0)


def sweep(folder: Path, address: str, **environment: str) -> subprocess.CompletedProcess:
    (folder / "config.yaml").write_text(
        "grids: [{corpus: synthetic, language: {vocab_size: 4, scales: [1.0]}, seq_len: 16, dim: [4, 8], n_layers: 1, "
        "n_heads: 1, steps: 3, batch_size: 2, seed: 0}]"
    )
    command = [sys.executable, "-m", "tinylm.sweep", folder / "config.yaml", "--dask", address]
    environment = ENVIRONMENT | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")


def test_the_command_on_one_worker_that_comes_late(cluster, tmp_path):
    for process in cluster.processes[1:]:
        cluster.kill(process.pid)
    with ThreadPoolExecutor() as pool:
        done = pool.submit(sweep, tmp_path, cluster.address)
        until(lambda: done.done() or (tmp_path / "records").exists())
        cluster.worker()
        result = done.result(timeout=120)
    assert result.returncode == 0, result.stderr
    assert "2 of 2 runs" in result.stderr and "no worker there yet" in result.stderr
    assert {record["config"]["dim"] for record in read_records(tmp_path)} == {4, 8}


def test_a_scheduler_that_is_not_there_and_one_that_goes_away(cluster, tmp_path):
    with ThreadPoolExecutor() as pool:
        function = waiting(tmp_path)
        (other := tmp_path / "other").mkdir()
        cluster.worker()
        going = pool.submit(run_all, [{"seed": 0}], function, tmp_path, progress=False, dask=cluster.address)
        until(lambda: going.done() or started(tmp_path))
        cluster.kill(cluster.processes[0].pid)
        result = sweep(other, cluster.address, DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT="1s")
        assert result.returncode == 1
        assert (
            f"no Dask scheduler answers at '{cluster.address}'" in result.stderr and "dask scheduler" in result.stderr
        )
        with pytest.raises(RuntimeError, match=r"the Dask scheduler at tcp://.* is gone; start again to go on"):
            going.result(timeout=120)
