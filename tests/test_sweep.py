"""tinylm.sweep: a file becomes runs, bad files are refused before anything starts, a run does what its config says."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import data, sweep
from tinylm.model import Config
from tinylm.runs import read_records, run_key
from tinylm.sweep import curve, expand, one_run, planned_flops, read_config, spread

LANGUAGE = {"seed": 1, "vocab_size": 4, "scales": [1.0, 0.5]}
RUN = {
    "corpus": "synthetic",
    "language": LANGUAGE,
    "seq_len": 16,
    "seed": 0,
    "dim": 8,
    "n_layers": 1,
    "n_heads": 1,
    "batch_size": 4,
    "steps": 3,
}


def without(*names, **more):
    return {k: v for k, v in RUN.items() if k not in names} | more


def write(folder: Path, file: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(file if isinstance(file, str) else yaml.safe_dump(file), encoding="utf-8")
    return path


# A file becomes runs


def test_the_example_of_the_help_is_a_sweep(tmp_path):
    example = re.search(r"The file:\n\n(.*?)\n\n", sweep.__doc__, re.S)[1]
    runs = read_config(write(tmp_path, example))
    small = {"dim": 16, "n_layers": 2, "n_heads": 1, "hidden_dim": 48}
    defaults = {"corpus": "shakespeare", "seq_len": 128, "lr": 0.01}
    assert runs == [
        *(
            {**defaults, **small, "flops": flops, "batch_size": 4, "seed": seed}
            for flops in (4.5e10, 1.4e11)
            for seed in (0, 1, 2)
        ),
        *({**defaults, "dim": dim, "n_layers": 2, "n_heads": 2, "tokens": 1_000_000, "seed": 0} for dim in (32, 64)),
    ]
    assert type(runs[0]["flops"]) is float, "YAML reads 4.5e10 as a text"


def test_a_grid_can_take_a_default_away_and_keep_lists_that_are_values(tmp_path):
    grids = [{"batch_size": None, "target_steps": 10, "batch_tokens": [16, 64], "betas": [0.8, 0.9]}]
    (run,) = read_config(write(tmp_path, {"defaults": without("steps", tokens=320), "grids": grids}))
    assert run == without("steps", tokens=320, batch_size=2, betas=[0.8, 0.9])


def test_only_numbers_become_numbers():
    texts = {"4.5e10": 4.5e10, "-1e-3": -1e-3, ".5E+2": 50.0, "nan": "nan", "inf": "inf", "1e": "1e", "12": "12"}
    assert sweep._numbers([{"a": list(texts)}]) == [{"a": list(texts.values())}]


def test_the_learning_rate_follows_its_rule():
    run = expand(without(lr_rule=0.125, batch_size=9, dim=24))
    assert run == without(batch_size=9, dim=24, lr=0.01562)  # 0.125 * 3 / 24 in four digits


@settings(deadline=None, max_examples=100)
@given(
    tokens=st.integers(1, 10**7),
    steps=st.integers(1, 10**5),
    seq_len=st.integers(1, 300),
    low=st.integers(1, 5000),
    high=st.integers(1, 10**5),
)
def test_the_batch_size_is_the_power_of_two_nearest_to_the_wanted_steps(tokens, steps, seq_len, low, high):
    run = without("batch_size", "steps", seq_len=seq_len, tokens=tokens, target_steps=steps, batch_tokens=[low, high])
    allowed = [size for k in range(20) if low <= (size := 2**k) * seq_len <= high]
    if not allowed:
        with pytest.raises(ValueError, match="no power of two"):
            expand(run)
        return
    distance = {size: abs(math.log(tokens / steps / (size * seq_len))) for size in allowed}
    assert distance[expand(run)["batch_size"]] <= min(distance.values()) + 1e-9


def test_a_run_that_is_expanded_stays_as_it_is():
    assert expand(RUN) == RUN and expand(expand(without("batch_size", "steps", tokens=999, target_steps=3, lr_rule=1)))


# Bad files are refused

PLAYS = without("language", corpus="shakespeare")
REFUSED = [
    (without(learning_rate=0.1), "unknown keys learning_rate .*; a run may have .*lr_rule"),
    (without(eval_every=5), "unknown keys eval_every"),
    ({**RUN, 3: 4}, "unknown keys 3"),
    (without("seed"), "seed missing"),
    (without("seq_len", "corpus"), "corpus, seq_len missing"),
    (without("dim"), "no model.*'dim'"),
    (without("steps"), "exactly one budget of steps, tokens, flops, epochs, got none"),
    (without(flops=1e9), "exactly one budget.*'steps', 'flops'"),
    (without(corpus="the web"), "corpus must be shakespeare or synthetic, got 'the web'"),
    (without(n_heads=3), "no model.*dim=8 is not a multiple of n_heads=3"),
    (without(dim=9, n_heads=3), "no model.*odd"),
    (without(n_kv_heads=2), "no model.*n_kv_heads=2"),
    *((without(dim=bad), r"dim must be an integer, positive, got") for bad in (0, -8, 8.0, "8", True, {"a": 1})),
    *((without(seed=bad), r"seed must be an integer, zero or more, got") for bad in (-1, 1.0, "0", True)),
    (without(seed=2**26), "seed must be below"),
    (without(steps=0), "steps must be an integer, positive, got 0"),
    (without(steps=1e3), "steps must be an integer"),
    (without(batch_size=-4), "batch_size must be an integer, positive, got -4"),
    (without(seq_len=0), "seq_len must be an integer, positive, got 0"),
    *(
        (without("steps", flops=bad), "flops must be a number, positive")
        for bad in (0, -1e9, "many", math.inf, math.nan)
    ),
    (without("steps", tokens=False), "tokens must be a number, positive"),
    (without(lr=0), "lr must be a number, positive, got 0"),
    (without(warmup=1.5), "no training.*warmup is a share"),
    (without(weight_decay=-0.1), "weight_decay must be a number, zero or more"),
    (without(betas=[0.9, 1.5]), "betas must be a list of two positive numbers, betas below 1"),
    (without(betas=0.9), "betas must be a list of two"),
    (without(tie_embeddings="yes"), "tie_embeddings must be true or false, got 'yes'"),
    (without(rope_theta=-1), "rope_theta must be a number, positive"),
    # rules
    (without(lr_rule=0.1, lr=0.1), "lr_rule gives lr.*leave out lr"),
    (without("batch_size", lr_rule=0.1), "say batch_size"),
    *((without(lr_rule=bad), "lr_rule must be a number, positive") for bad in (0, -1, "fast")),
    (without(target_steps=10), "leave out batch_size and steps"),
    (without("batch_size", target_steps=10), "leave out batch_size and steps"),
    *(
        (without("batch_size", "steps", tokens=100, target_steps=bad), "target_steps must be a number, positive")
        for bad in (0, -5, "ten")
    ),
    *(
        (
            without("batch_size", "steps", tokens=100, target_steps=1, batch_tokens=bad),
            "batch_tokens must be a list of two",
        )
        for bad in (512, [512], [1, 2, 3], [0, 512], ["a", "b"], {"low": 1})
    ),
    (without("batch_size", "steps", tokens=9, target_steps=1, batch_tokens=[64, 16]), "no power of two"),
    (without(batch_tokens=[16, 64]), "target_steps chooses, and that is missing"),
    (without(shape="huge"), "no shape 'huge', only empty, small, strange"),
    (without(shape=3), "no shape 3"),
    (without(shape="small"), "dim, n_layers must not stand both in the shape small and beside it"),
    (without(shape="strange"), "shape strange must be of the form .* got {'depth': 3}"),
    (without(shape="empty"), "shape empty must be of the form"),
    # the language, the text
    (without(language={"order": 3}), "no language .* can be made in .*unexpected keyword argument 'order'"),
    (without(language={"vocab_size": 1}), "no language .*at least 2 symbols"),
    (without(language={"vocab_size": 100, "scales": [1.0] * 8}), "no language .*too many"),
    *((without(language={**LANGUAGE, "scales": bad}), "no language") for bad in ([], 0.5, ["a"], [[1.0]], "ab")),
    *((without(language={**LANGUAGE, "seed": bad}), "no language") for bad in (-1, 0.5, "a")),
    *((without(language=bad), "no language") for bad in (3, "english")),
    *((without(language={**LANGUAGE, "spectrum": bad}), "no language") for bad in ("steep", [1.0])),
    ({**PLAYS, "language": LANGUAGE}, "language goes with corpus synthetic"),
    (without(characters=1000), "characters with shakespeare"),
    ({**PLAYS, "characters": 16}, "characters must be above seq_len"),
    ({**PLAYS, "characters": 10**8}, "at most the 4717707 that there are"),
    ({**PLAYS, "characters": 1e3}, "characters must be an integer"),
    ({k: v for k, v in PLAYS.items() if k != "steps"} | {"epochs": 2}, "epochs need characters"),
    *(
        (
            {k: v for k, v in PLAYS.items() if k != "steps"} | {"epochs": bad, "characters": 1000},
            "epochs must be a number, positive",
        )
        for bad in (0, -1, "two")
    ),
]
SHAPES = {"small": {"dim": 8, "n_layers": 1}, "strange": {"depth": 3}, "empty": None}


@pytest.mark.parametrize(("run", "sentence"), REFUSED)
def test_a_run_that_cannot_be_is_refused_by_name(run, sentence):
    with pytest.raises(ValueError, match=f"(?s){sentence}") as caught:
        expand(run, SHAPES)
    if "shape" not in run or run["shape"] in ("huge", "small"):
        assert "'n_layers': 1" in str(caught.value), "which run?"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("grids: [{", "cannot be read as YAML"),
        ("", "needs a list `grids`"),
        ("grids: []", "needs a list `grids`"),
        ("grids: {dim: 3}", "needs a list `grids`"),
        ("- 1", "needs a list `grids`"),
        ("grids: [{}]\ngrid: 3\n4: 5", "unknown keys 4, grid; it may have defaults, shapes and grids"),
        ("grids: [dim]", "a grid in .* must be of the form {key: value, ...}, got 'dim'"),
        ("grids: [[{dim: 3}]]", "a grid in"),
        ("grids: [{}]\ndefaults: [1]", "defaults in"),
        ("grids: [{}]\nshapes: small", "shapes in"),
        ("grids: [{dim: [], seed: 0}]", "an empty list leaves no runs in the grid {'dim': \\[\\]"),
        (yaml.safe_dump({"grids": [RUN, without(seed=[1, 0])]}), "this run stands twice in .*'seed': 0"),
        (yaml.safe_dump({"grids": [without("language", corpus="synthetic", lr=math.nan)]}), "lr must be a number"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path, text, sentence):
    with pytest.raises(ValueError, match=f"(?s){sentence}"):
        read_config(write(tmp_path, text))


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        read_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        read_config(tmp_path / "config.yaml")


# A run does what its config says


@pytest.mark.parametrize(
    "run",
    [
        RUN,
        without("steps", tokens=200),
        without("steps", flops=3e6),
        {**PLAYS, "characters": 2000, "seed": 3},
        {k: v for k, v in PLAYS.items() if k != "steps"} | {"characters": 1500, "epochs": 0.1},
    ],
)
def test_a_run_spends_what_was_planned_and_comes_out_the_same_again(run):
    threads = torch.get_num_threads()
    run = expand(run)
    result = one_run(run)
    assert torch.get_num_threads() == threads
    vocab = 4 if run["corpus"] == "synthetic" else 96
    model = Config(vocab, dim=8, n_layers=1, n_heads=1, max_len=16)
    per_step = run["batch_size"] * run["seq_len"]
    assert result["flops"] == planned_flops(run) == result["steps"] * run["batch_size"] * model.train_flops(16)
    assert result["tokens"] == result["steps"] * per_step
    wanted = {
        "steps": 3,
        "tokens": 200 / per_step,
        "flops": 3e6 / (4 * model.train_flops(16)),
        "epochs": 150 / per_step,
    }
    (budget,) = wanted.keys() & run.keys()
    assert result["steps"] == max(1, round(wanted[budget]))
    assert (result["n_params"], result["n_params_without_embeddings"]) == (model.n_params(), model.n_params(False))
    assert 0 < result["loss"] < 1.2 * math.log(vocab) and 0 < result["standard_error"] < 0.1
    assert one_run(run) == result
    assert one_run({**run, "seed": 7})["curve"] != result["curve"]


def test_all_runs_on_a_corpus_are_judged_alike():
    for run, more in [(RUN, {"seed": 5, "dim": 16}), (PLAYS, {"characters": 5000, "seed": 5})]:
        windows = sweep.corpus_of(run)[1]
        assert windows.shape == (512, 17) and torch.equal(windows, sweep.corpus_of({**run, **more})[1])
    held_out = data.fixed_windows(data.shakespeare().val_tokens, 16)
    assert torch.equal(windows, held_out[:: len(held_out) // 512][:512]), "from all over the plays that are held out"
    few = sweep.corpus_of({**PLAYS, "seq_len": 4096})[1]
    assert 100 < len(few) < 512, "with long windows there are fewer"


def test_two_runs_in_threads_of_one_process_do_not_share_their_chance(monkeypatch):
    """As on a Dask worker with two threads: PyTorch's generator, which draws the first weights, is one for all."""
    runs = [RUN, without(seed=1)]
    alone = [one_run(run) for run in runs]
    both, model = threading.Barrier(2), sweep.TinyLlama

    def build(config):
        with contextlib.suppress(threading.BrokenBarrierError):  # each has to wait for the other in vain
            both.wait(timeout=0.3)
        return model(config)

    monkeypatch.setattr(sweep, "TinyLlama", build)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one_run, runs)) == alone


@settings(deadline=None, max_examples=60)
@given(there=st.integers(1, 20_000), share=st.floats(0, 1), piece=st.sampled_from([1, 7, 100, 1000]))
def test_spread_takes_pieces_from_all_over_and_none_twice(there, share, piece):
    characters = max(1, round(share * there))
    taken = spread(torch.arange(there), characters, piece)
    pieces = max(1, round(characters / piece))
    size = characters // pieces
    assert len(taken) == pieces * size and characters - pieces < len(taken) <= characters
    assert (taken.diff() > 0).all(), "in order, none twice"
    starts = taken[::size]
    assert (taken.reshape(pieces, size) - starts[:, None] == torch.arange(size)).all()
    assert starts[0] == 0 and (pieces == 1 or taken[-1] == there - 1)
    assert pieces == 1 or starts.diff().max() - starts.diff().min() <= 1, "evenly"


def test_spread_knows_its_limits():
    tokens = torch.arange(5000)
    assert torch.equal(spread(tokens, None), tokens) and torch.equal(spread(tokens, 5000), tokens)
    with pytest.raises(ValueError, match="characters=5001 is more than the 5000 there are"):
        spread(tokens, 5001)


def test_in_bulk_the_language_is_the_same_language():
    language = data.SyntheticLanguage(**LANGUAGE)
    stream = sweep._InBulk(language)
    steps = [stream.batch(16, 32, step) for step in range(200)]
    assert all(step.shape == (16, 33) and step.dtype == torch.int64 for step in steps)
    windows = torch.cat(steps)
    assert len(windows.unique(dim=0)) > 0.99 * len(windows), "no window comes twice"
    again = sweep._InBulk(language)
    for step in (130, 3, 131, 63, 64):  # whatever came before
        assert torch.equal(again.batch(16, 32, step), steps[step])
    assert again.batch(8, 16, 3).shape == (8, 17)
    v, k = language.vocab_size, language.order
    code = sum(windows[:, i : i + windows.shape[1] - k] * v ** (k - i) for i in range(k + 1))
    frequency = torch.bincount(code.flatten(), minlength=v ** (k + 1)) / code.numel()
    exact = torch.from_numpy(language.stationary[..., None] * language.transition).flatten()
    assert (frequency - exact).abs().max() < 0.01, "about five standard deviations"


@settings(deadline=None)
@given(st.lists(st.floats(0, 9), min_size=1, max_size=400), st.integers(1, 50))
def test_a_curve_holds_the_mean_of_all_losses(losses, per_step):
    points = curve(losses, per_step)
    ends = [0, *(tokens // per_step for tokens, _ in points)]
    assert ends[-1] == len(losses) and len(points) <= 24 and all(a < b for a, b in itertools.pairwise(ends))
    for (a, b), (tokens, mean) in zip(itertools.pairwise(ends), points, strict=True):
        assert tokens == b * per_step and mean == pytest.approx(sum(losses[a:b]) / (b - a), abs=1e-5)


# The command


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit status and output of python -m tinylm.sweep, in this process."""
    monkeypatch.setattr(sys, "argv", ["sweep", *map(str, arguments)])
    try:
        sweep.main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    return status, *capsys.readouterr()


def test_the_command_does_a_sweep_with_two_processes_and_nothing_twice(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, {"grids": [without(seed=[0, 1], dim=[4, 8]), without("steps", flops=4e6)]})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-m", "tinylm.sweep", path, "--jobs", "2"]
    result = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    runs = read_config(path)
    total = sum(map(planned_flops, runs))
    assert result.stdout == f"5 runs, {total:.3g} floating-point operations\n"
    assert "5 of 5 runs" in result.stderr and "100%" in result.stderr
    records = read_records(tmp_path)
    assert {record["key"] for record in records} == {run_key(run) for run in runs}
    assert sum(record["flops"] for record in records) == total
    for record in records:
        result = one_run(record["config"])
        assert {k: record[k] for k in result} == result
        assert record["versions"]["torch"] == torch.__version__ and record["seconds"] > 0

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "records").glob("*.json")}
    assert command(monkeypatch, capsys, path, "--jobs", 2)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "records").glob("*.json")} == before


@pytest.mark.parametrize("arguments", [("--dry-run",), ()])
def test_nothing_starts_for_a_bad_file_or_on_trial(tmp_path, monkeypatch, capsys, arguments):
    path = write(tmp_path, {"grids": [RUN, without(n_heads=3)]})
    status, _, told = command(monkeypatch, capsys, path, *arguments)
    assert status == 1 and told.startswith("python -m tinylm.sweep: no model can be made of {'") and "n_heads=3" in told
    if arguments:
        write(tmp_path, {"grids": [RUN]})
        counted = f"1 runs, {planned_flops(RUN):.3g} floating-point operations\n"
        assert command(monkeypatch, capsys, path, *arguments)[:2] == (0, counted)
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_run_that_fails_is_named_and_the_others_are_recorded(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, {"grids": [without(steps=20, lr=[1e30, 0.01])]})
    status, _, told = command(monkeypatch, capsys, path, "--jobs", 1)
    assert status == 1 and "lower lr" in told and "in the run of {" in told and "1 runs failed" in told
    assert [record["config"]["lr"] for record in read_records(tmp_path)] == [0.01]


def test_runs_cut_short_are_not_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TINYLM_BUDGET", "0.5")
    status, _, told = command(monkeypatch, capsys, write(tmp_path, {"grids": [RUN]}))
    assert status == 1 and "unset the environment variable TINYLM_BUDGET" in told and read_records(tmp_path) == []


def test_stopped_by_hand_it_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_all", interrupted)
    status, _, told = command(monkeypatch, capsys, write(tmp_path, {"grids": [RUN]}))
    assert status == 130 and "the same command goes on" in told


def test_the_help_names_every_key(monkeypatch, capsys):
    status, told, _ = command(monkeypatch, capsys, "--help")
    assert status == 0 and not [key for key in sweep.RUN_KEYS | sweep.RULES if not re.search(rf"\b{key}\b", told)]
    status, _, told = command(monkeypatch, capsys, "config.yaml", "--jobs", 2, "--dask", "tcp://host:1")
    assert status == 2 and "not allowed with argument --jobs" in told
