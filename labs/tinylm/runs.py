"""Experiments too long for a lab: one JSON record a run, and a runner that goes on where it was stopped.

An experiment is a folder. The run of a config is written to records/<key>.json when it is finished, and the key comes
from the config (its seed included), so a config is run once, whatever happens in between.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from tinylm.device import describe
from tinylm.files import write_json

MEASURED = ("tokens", "flops", "loss")  # what the function of a run returns at least
ADDED = ("key", "config", "seed", "seconds", "versions", "commit")  # what the runner adds
TRIES = 3  # of a run whose worker dies


def run_key(config: dict) -> str:
    """Sixteen hexadecimal digits that name a config. Raises ValueError for one that JSON would not give back unchanged."""
    try:
        text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config is not JSON ({error}); use dicts, lists, strings, booleans and finite numbers: {config}"
        ) from error
    if json.loads(text) != config:
        raise ValueError(
            f"config changes when written as JSON; use lists instead of tuples and strings as keys: {config}"
        )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_records(folder: str | Path) -> list[dict]:
    """The finished runs of an experiment, sorted by key. Raises ValueError naming a record that is damaged or misnamed."""
    return [_read(path) for path in sorted(Path(folder).glob("records/*.json"))]


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        complete = record.keys() >= {*MEASURED, *ADDED} and run_key(record["config"]) == record["key"] == path.stem
    except (ValueError, AttributeError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{path} is damaged or does not match its name; delete it and its run will be done again")
    return record


def run_all(
    configs: Iterable[dict],
    function: Callable[[dict], dict],
    folder: str | Path,
    progress: bool = True,
    jobs: int = 1,
    dask: str | None = None,
    cost: Callable[[dict], float] | None = None,
) -> list[dict]:
    """Run `function(config)` for every config without a record in `folder`; all records, in the order of the configs.

    The function returns at least tokens, flops and loss (nats per token). The runs are done here, or by `jobs`
    processes, or by the workers of the Dask cluster at the address `dask`, which need the same tinylm; all records are
    written here, so workers need no common disk. A run whose worker dies is done again, three times at most. Killed and
    started again, no finished run is lost or repeated. `cost` weighs the runs in the progress bar and its time left.

    Raises ValueError before any run for a config that is not JSON, has no integer seed or stands twice, for a damaged
    record and for a cluster that does not answer, and RuntimeError while another call works on the folder. When a run
    fails, the others are still done; then its error is raised, a RuntimeError for one that keeps killing its worker.
    """
    _commit()  # of the code as it is now
    configs, folder = list(configs), Path(folder)
    keys = [run_key(config) for config in configs]
    for config, key in zip(configs, keys, strict=True):
        if not isinstance(config, dict) or type(config.get("seed")) is not int:
            raise ValueError(f"every config needs an integer 'seed', so that its run can be repeated: {config}")
        if keys.count(key) > 1:
            raise ValueError(f"the config stands twice; give repetitions different seeds: {config}")
    weights = {key: cost(config) if cost else 1 for key, config in zip(keys, configs, strict=True)}
    with _alone(folder), _executor(jobs, dask) as execute:
        done = {record["key"]: record for record in read_records(folder)}
        todo = {key: config for key, config in zip(keys, configs, strict=True) if key not in done}
        total, ready = sum(weights.values()), sum(weights[key] for key in keys if key in done)
        units = {"unit": "", "unit_scale": True} if cost else {"unit": "run"}
        with tqdm(total=total, initial=ready, disable=not progress, smoothing=0.1, **units) as bar:
            for record in _finish(todo, function, folder, execute, None if dask else jobs):
                done[record["key"]] = record
                bar.set_postfix_str(f"{len(keys) - len(todo)} of {len(keys)} runs", refresh=False)
                bar.update(weights[record["key"]])
    return [done[key] for key in keys]


def run_one(config: dict, function: Callable[[dict], dict], folder: str | Path) -> dict:
    """Do one run, write its record and return it. Raises ValueError when the function's result cannot be a record."""
    return _write(_measure(config, function), Path(folder))


def _measure(config: dict, function: Callable[[dict], dict]) -> dict:
    """Do one run: its record, without the commit. It may be done far from where the record is written."""
    started = time.perf_counter()
    result = function(json.loads(json.dumps(config)))  # a copy: the function may change it
    seconds = time.perf_counter() - started
    if not isinstance(result, dict) or not result.keys() >= set(MEASURED) or result.keys() & set(ADDED):
        raise ValueError(
            f"the function must return a dict with {MEASURED} and without {ADDED}, got {result} for {config}"
        )
    if not math.isfinite(result["loss"]):
        raise ValueError(f"the loss is {result['loss']} for {config}; change the config or leave it out")
    added = {
        "key": run_key(config),
        "config": config,
        "seed": config["seed"],
        "seconds": seconds,
        "versions": describe(),
    }
    try:
        return json.loads(json.dumps({**result, **added}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the result for {config} is not JSON ({error}); turn tensors into numbers with .item()"
        ) from error


def _attempt(config: dict, function: Callable[[dict], dict]) -> dict | Exception:
    try:
        return _measure(config, function)
    except Exception as error:
        error.add_note(f"in the run of {config}")
        try:
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:  # one that cannot travel would look like a dead worker
            return RuntimeError(f"{type(error).__name__}: {error}, in the run of {config}")


def _write(record: dict, folder: Path) -> dict:
    record = {**record, "commit": _commit()}
    write_json(folder / "records" / f"{record['key']}.json", record)
    return record


def _finish(
    todo: dict[str, dict], function: Callable, folder: Path, execute: Callable, at_once: int | None
) -> Iterator[dict]:
    """The records of the runs in `todo` (key: config) as they are finished and written; what is done leaves `todo`.

    Runs that were at work when a worker died are done again one by one: that shows which of them kills it, or needs all
    the memory for itself.
    """
    errors, deaths, given_up = [], Counter(), 0  # deaths of workers in each run; runs given up since one was finished
    while todo and given_up < 3:
        batch = [key for key in todo if deaths[key]][:1] or list(todo)
        try:
            for key, result in execute([(key, _attempt, todo[key], function) for key in batch]):
                del todo[key]
                given_up = 0
                if isinstance(result, Exception):
                    errors.append(result)
                else:
                    yield _write(result, folder)
        except BrokenExecutor:
            at_work = [key for key in batch if key in todo][:at_once]
            deaths.update(at_work)
            for key in at_work:
                if deaths[key] == TRIES:
                    sentence = f"a worker died each of the {TRIES} times it did the run of {todo.pop(key)}"
                    errors.append(RuntimeError(f"{sentence}: is there memory for it?"))
                    given_up += 1
    if errors:
        undone = f", {len(todo)} were not begun" if todo else ""
        errors[0].add_note(f"{len(errors)} runs failed{undone}; the records of the others are in {folder}")
        raise errors[0]


def _call(key: str, function: Callable, *arguments) -> tuple[str, object]:
    return key, function(*arguments)


def _call_from(parent: int, *task) -> tuple[str, object]:
    _end_with(parent)
    return _call(*task)


@functools.cache
def _end_with(parent: int) -> None:
    """End this process when its parent is gone: what it does would be for nobody, beside a sweep started again."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getppid() == parent:
        threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _executor(jobs: int, dask: str | None) -> Iterator[Callable]:
    """A function from tasks (key, function, *arguments) to pairs (key, result) in the order of their ends.

    It raises BrokenExecutor when workers died; the tasks without a result are then to be given to it again.
    """
    if type(jobs) is not int or jobs < 1:
        raise ValueError(f"jobs must be a positive integer, got {jobs!r}")
    if dask is not None:
        with _dask(dask) as execute:
            yield execute
    elif jobs == 1:
        yield lambda tasks: itertools.starmap(_call, tasks)
    else:
        from joblib import Parallel, delayed, parallel_config

        def execute(tasks):
            # Each task by itself: in a batch, a finished run would wait for others. None in a queue: see `_end_with`.
            pool = Parallel(jobs, return_as="generator_unordered", batch_size=1, pre_dispatch=jobs)
            return pool(delayed(_call_from)(os.getpid(), *task) for task in tasks)

        with parallel_config(backend="loky", inner_max_num_threads=1):
            yield execute


@contextlib.contextmanager
def _dask(address: str) -> Iterator[Callable]:
    # Not joblib's Dask backend: it waits for ever for a run whose workers keep dying, and does the runs in this process
    # when the cluster has one thread.
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError:
        raise ValueError("a Dask cluster needs the package distributed: python -m pip install distributed") from None
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no Dask scheduler answers at {address!r}: {error}; start one with `dask scheduler`"
        ) from error

    def execute(tasks):
        killed = None
        for future in as_completed([client.submit(_call, *task, pure=False) for task in tasks]):
            try:
                yield future.result()
            except KilledWorker as error:  # Dask has tried it on four workers
                killed = error
            except CancelledError as error:
                raise RuntimeError(f"the Dask scheduler at {address} is gone; start again to go on") from error
            except Exception as error:  # not the run's own, which is a result
                raise RuntimeError(
                    f"a worker cannot do runs: {error!r}; it needs the packages that are here"
                ) from error
        if killed:
            raise BrokenExecutor(str(killed)) from killed

    with client:
        if not client.ncores():
            print(f"no worker there yet; start one with `dask worker {address}`", file=sys.stderr)
        yield execute


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from doing the same runs. The lock ends with the process, however that ends."""
    (folder / "records").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "records" / ".lock", timeout=0):
            yield
    except Timeout:
        raise RuntimeError(
            f"another process is doing runs in {folder}: wait for its end, or name another folder"
        ) from None


@functools.cache  # the code in memory is that of the start, even if a commit is made during a long experiment
def _commit() -> str | None:
    """The commit of the current folder's repository, "-dirty" added when tracked files differ from it; None without one."""
    try:
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        changed = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "-dirty" * bool(changed)
