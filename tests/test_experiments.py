"""The recorded experiments: whole, explained, and the same when run again."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest

from tinylm import data
from tinylm.runs import read_records, run_key
from tinylm.sweep import one_run, planned_flops, read_config

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


# The sweep of lab 01

SWEEP = EXPERIMENTS / "01_scaling_laws"


@pytest.mark.parametrize("corpus", ["shakespeare", "synthetic"])
def test_a_cheap_run_of_the_sweep_comes_out_the_same(corpus):
    """The widest model of the smallest budget takes the fewest steps."""
    runs = read_config(SWEEP / "config.yaml")
    run = max((r for r in runs if r["corpus"] == corpus and r.get("flops") == 4.5e10), key=lambda r: r["dim"])
    (record,) = (r for r in read_records(SWEEP) if r["key"] == run_key(run))
    again = one_run(run)
    assert (again["tokens"], again["flops"]) == (record["tokens"], record["flops"])
    assert again["flops"] == planned_flops(run) == pytest.approx(4.5e10, rel=0.01)
    # Another processor rounds otherwise, and some 300 steps carry that along: first weights moved by 1e-7 of themselves
    # end 1e-4 apart, moved by 1e-5 they end 0.008 apart; runs of two seeds end up to 0.09 apart.
    assert again["loss"] == pytest.approx(record["loss"], abs=0.01)


def test_every_record_of_the_sweep_is_of_a_run_in_its_file():
    runs = {run_key(run) for run in read_config(SWEEP / "config.yaml")}
    records = {record["key"] for record in read_records(SWEEP)}
    assert not records - runs, f"{len(records - runs)} records of no run in config.yaml: {sorted(records - runs)[:3]}"


def test_no_text_is_seen_more_than_four_times_unless_it_is_cut_for_that():
    there = len(data.shakespeare().train_tokens)
    records = [r for r in read_records(SWEEP) if r["config"]["corpus"] == "shakespeare"]
    epochs = {r["key"]: r["tokens"] / there for r in records if "characters" not in r["config"]}
    assert len(epochs) > 60 and {key: n for key, n in epochs.items() if n > 4} == {}


# The learning rates by width of lab 01


@pytest.mark.parametrize("parametrisation", ["standard", "muP"])
def test_a_short_run_of_the_learning_rates_comes_out_the_same(parametrisation):
    run = script("01_mup")
    (config,) = (c for c in run.CHEAP if c["parametrisation"] == parametrisation)
    (record,) = (r for r in read_records(run.HERE) if r["key"] == run_key(config))
    again = run.one_run(config)
    assert (again["tokens"], again["flops"]) == (record["tokens"], record["flops"])
    assert again["loss"] == pytest.approx(record["loss"], abs=0.01)  # eight steps; another processor rounds otherwise


def test_every_learning_rate_by_width_is_recorded_and_no_other():
    run = script("01_mup")
    assert {r["key"] for r in read_records(run.HERE)} == {run_key(config) for config in run.CONFIGS}
