"""Experiments too long for a lab: one JSON record a run, and a runner that goes on where it was stopped.

An experiment is a folder. The run of a config is written to records/<key>.json when it is finished, and the key comes
from the config (its seed included), so a config is run once, whatever happens in between.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm.auto import tqdm

from tinylm.device import describe
from tinylm.files import write_json

MEASURED = ("tokens", "flops", "loss")  # what the function of a run returns at least
ADDED = ("key", "config", "seed", "seconds", "versions", "commit")  # what the runner adds


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
    configs: Iterable[dict], function: Callable[[dict], dict], folder: str | Path, progress: bool = True
) -> list[dict]:
    """Run `function(config)` for every config without a record in `folder`; all records, in the order of the configs.

    The function returns at least tokens, flops and loss (nats per token). Killed and started again, no finished run is
    lost or repeated. Raises ValueError before any run for a config that is not JSON, has no integer seed or stands
    twice, and for a damaged record.
    """
    configs = list(configs)
    keys = [run_key(config) for config in configs]
    for config, key in zip(configs, keys, strict=True):
        if not isinstance(config, dict) or type(config.get("seed")) is not int:
            raise ValueError(f"every config needs an integer 'seed', so that its run can be repeated: {config}")
        if keys.count(key) > 1:
            raise ValueError(f"the config stands twice; give repetitions different seeds: {config}")
    done = {record["key"]: record for record in read_records(folder)}
    todo = [config for config, key in zip(configs, keys, strict=True) if key not in done]
    with tqdm(total=len(keys), initial=len(keys) - len(todo), disable=not progress, unit="run") as bar:
        for config in todo:
            record = run_one(config, function, folder)
            done[record["key"]] = record
            bar.update()
    return [done[key] for key in keys]


def run_one(config: dict, function: Callable[[dict], dict], folder: str | Path) -> dict:
    """Do one run, write its record and return it. Raises ValueError when the function's result cannot be a record."""
    key = run_key(config)
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
        "key": key,
        "config": config,
        "seed": config["seed"],
        "seconds": seconds,
        "versions": describe(),
        "commit": _commit(),
    }
    try:
        record = json.loads(json.dumps({**result, **added}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the result for {config} is not JSON ({error}); turn tensors into numbers with .item()"
        ) from error
    write_json(Path(folder) / "records" / f"{key}.json", record)
    return record


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
