"""The recorded experiments: whole, explained, and the same when run again."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest

from tinylm.runs import read_records

EXPERIMENTS = Path(__file__).resolve().parent.parent / "labs" / "tinylm" / "assets" / "experiments"


def test_every_experiment_has_a_card_that_says_how_to_rerun_it():
    folders = [p for p in EXPERIMENTS.iterdir() if p.is_dir()]
    assert folders
    for folder in folders:
        assert "Rerun: `python " in (folder / "card.md").read_text(encoding="utf-8"), folder.name


def script(folder: str):
    path = EXPERIMENTS / folder / "run.py"
    spec = importlib.util.spec_from_file_location(f"run_{folder}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def synthetic():
    run = script("00_synthetic_language")
    return run, {record["n_params"]: record for record in read_records(run.HERE)}


def test_larger_models_keep_doing_better_on_the_synthetic_language():
    run, records = synthetic()
    assert len(records) == len(run.CONFIGS) and max(records) / min(records) > 100
    for small, large in itertools.pairwise(sorted(records)):
        a, b = records[small], records[large]
        error = (a["standard_error"] ** 2 + b["standard_error"] ** 2) ** 0.5
        assert a["loss"] - b["loss"] > 5 * error, f"{large} parameters do no better than {small}"
        assert b["loss"] > b["floor"], "no model can be better than the floor"


def test_a_recorded_run_comes_out_the_same():
    run, records = synthetic()
    record = records[min(records)]
    again = run.one_run(record["config"])
    assert again["floor"] == pytest.approx(record["floor"], abs=1e-9)
    assert again["tokens"] == record["tokens"] and again["flops"] == record["flops"]
    # Another processor rounds otherwise, and 600 steps carry that along.
    assert again["loss"] == pytest.approx(record["loss"], abs=0.01)


@pytest.mark.parametrize("rounding", ["two bits", "ternary"])
def test_a_short_run_against_the_rounding_comes_out_the_same(rounding):
    run = script("02_qat")
    (record,) = (r for r in read_records(run.HERE) if r["config"]["steps"] == 6 and r["config"]["rounding"] == rounding)
    again = run.one_run(record["config"])
    assert again["tokens"] == record["tokens"] and again["flops"] == record["flops"]
    assert again["untrained"] == pytest.approx(record["untrained"], abs=1e-3)
    # Another processor rounds otherwise, and a latent weight near a border may cross it or not; training gains far more.
    assert again["loss"] == pytest.approx(record["loss"], abs=0.01)
    assert record["untrained"] - record["difference"] > 0.05
