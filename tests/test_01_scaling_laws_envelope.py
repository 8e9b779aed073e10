"""Lab 01's envelope: it finds what is known, refuses what it cannot know, and its runs come out the same again."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_source import definitions
from tinylm import checkpoint, sweep
from tinylm.model import Config, TinyLlama
from tinylm.runs import read_records
from tinylm.train import TrainConfig, learning_rate, make_optimizer, train

lab = definitions("01_scaling_laws", BUDGETS=())
EXPERIMENT = checkpoint.SHIPPED.parent / "experiments" / "01_wsd"
many = settings(deadline=None, max_examples=40)


def experiment():
    spec = importlib.util.spec_from_file_location("wsd_run", EXPERIMENT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wsd = experiment()
CHEAP = [config for config in wsd.CONFIGS if config["steps"] < 100]


def curves_of(law, sizes, points: int = 12, tokens: float = 1e4, ratio: float = 3.0) -> dict:
    lengths = tokens * ratio ** np.arange(points)
    return {n: (lab.six_nd(n, lengths), law.loss(n, lengths)) for n in sizes}


# Schedules


@many
@given(st.integers(50, 5000), st.integers(2, 20))
def test_branches_share_the_trunk_until_the_cooldown(length, times):
    shares = [lab.cooled_share(step, length) for step in range(length + 1)]
    start = math.floor(0.8 * length)
    assert all(share == 1 for share in shares[: start + 1]) and shares[-1] == pytest.approx(0, abs=1e-6)
    assert all(a >= b for a, b in zip(shares, shares[1:], strict=False))
    assert lab.cooled_share(start, times * length) == 1


@pytest.mark.parametrize("length", [100, 1000, 16000])
def test_the_cosine_is_that_of_the_sweep(length):
    recipe = TrainConfig(steps=length, lr=1.0)
    for step in range(math.ceil(0.06 * length), length, length // 50):
        assert lab.cosine_share(step, length) == pytest.approx(learning_rate(recipe, step, length), abs=2 / length)


def test_the_experiments_schedule_is_the_labs():
    config = wsd.trunk("w16", 3200, 0)
    for start, end in ((80, 100), (1280, 1600)):
        rates = [wsd.cooled_rate(config, step, start, end) / config["lr"] for step in range(start, end)]
        assert 1 > rates[0] and all(a > b for a, b in zip(rates, rates[1:], strict=False)) and rates[-1] > 0
        for step, share in enumerate(rates, start):  # its step is the one that is made, one later
            assert lab.cooled_share(step, end) >= share >= lab.cooled_share(min(step + 2, end), end) - 1e-9
    assert wsd.rate(config, 0) == config["lr"] / config["warmup"] and wsd.rate(config, 3000) == config["lr"]


# The envelope


@many
@given(st.floats(0.25, 0.7), st.floats(0.25, 0.7), st.floats(0, 3))
def test_a_known_laws_exponent_is_found(alpha, beta, floor):
    balanced = lab.ScalingLaw(
        floor, 1e4**alpha, 1e6**beta, alpha, beta
    )  # the best of 1e4 parameters has about 1e6 tokens
    curves = curves_of(balanced, np.geomspace(1e2, 1e7, 41), points=60, ratio=1.5)
    size, loss = lab.envelope(curves, np.geomspace(1e9, 1e13, 200))
    assert np.isfinite(size).all()
    np.testing.assert_allclose(np.log(size / balanced.optimal(np.geomspace(1e9, 1e13, 200))[0]), 0, atol=0.35)
    exponent = lab.approach_1(curves, np.geomspace(1e9, 1e13, 200))
    assert exponent == pytest.approx(beta / (alpha + beta), abs=0.02)
    assert np.all(np.diff(loss) < 0), "more operations, less loss"


@many
@given(st.integers(0, 2**31), st.integers(3, 7))
def test_nothing_that_was_seen_lies_below_the_envelope(seed, n):
    rng = np.random.default_rng(seed)
    sizes = np.sort(rng.choice(np.arange(1000, 100_000), n, replace=False))
    curves = {int(s): (np.sort(rng.uniform(1e10, 1e12, 6)), np.sort(rng.uniform(1, 4, 6))[::-1]) for s in sizes}
    budgets = np.geomspace(5e9, 2e12, 60)
    best, lowest = lab.envelope(curves, budgets)
    assert np.array_equal(np.isnan(best), np.isnan(lowest))
    for i, c in enumerate(budgets):
        seen = {s: np.interp(np.log(c), np.log(x), y) for s, (x, y) in curves.items() if x[0] <= c <= x[-1]}
        if not np.isnan(best[i]):
            assert min(seen, key=seen.get) == best[i] and min(seen.values()) == pytest.approx(lowest[i])
            at = list(curves).index(int(best[i]))
            assert 0 < at < n - 1 and list(curves)[at + 1] in seen


def test_a_size_without_neighbours_is_no_optimum():
    law = lab.ScalingLaw(1.3, 40.0, 300.0, 0.4, 0.4)
    sizes = np.geomspace(1e3, 1e6, 13)
    budgets = np.geomspace(1e7, 1e16, 300)
    best, _ = lab.envelope(curves_of(law, sizes, points=14), budgets)
    found = np.unique(best[np.isfinite(best)])
    assert len(found) == 11 and not {sizes[0], sizes[-1]} & set(found), "the first and the last may only be the ends"
    # Where the winner's larger neighbour ends early, the winner is not known to be the best.
    cut = curves_of(law, sizes, points=14)
    at = int(np.flatnonzero(np.isfinite(best))[100])
    winner = list(sizes).index(best[at])
    cut[sizes[winner + 1]] = tuple(x[cut[sizes[winner + 1]][0] < budgets[at] / 2] for x in cut[sizes[winner + 1]])
    assert np.isnan(lab.envelope(cut, budgets)[0][at])
    # A smaller neighbour that was beaten before it ended stays beaten; one that never was seen to lose does not.
    for part, known in ((0.7, True), (-0.3, False)):  # ends within the winner's stretch, or before it
        cut = curves_of(law, sizes, points=140, ratio=1.2)
        stretch = np.log(budgets[lab.envelope(cut, budgets)[0] == sizes[winner]])
        end = stretch[0] + part * (stretch[-1] - stretch[0])
        cut[sizes[winner - 1]] = tuple(x[np.log(cut[sizes[winner - 1]][0]) < end] for x in cut[sizes[winner - 1]])
        kept = lab.envelope(cut, budgets)[0] == sizes[winner]
        assert kept.sum() == (len(stretch) if known else 0)


@many
@given(st.floats(-0.5, 0.5), st.floats(0.1, 10))
def test_the_envelope_does_not_mind_an_offset_of_all_losses(offset, scale):
    law = lab.ScalingLaw(1.3, 40.0, 300.0, 0.4, 0.4)
    curves = curves_of(law, np.geomspace(1e3, 1e6, 13))
    moved = {n: (c, scale * loss + offset) for n, (c, loss) in curves.items()}
    budgets = np.geomspace(1e9, 1e13, 97)
    np.testing.assert_array_equal(lab.envelope(curves, budgets)[0], lab.envelope(moved, budgets)[0])


def test_what_is_no_set_of_curves_is_refused():
    law = lab.ScalingLaw(1.3, 40.0, 300.0, 0.4, 0.4)
    with pytest.raises(ValueError, match="three sizes"):
        lab.envelope(curves_of(law, [1e3, 1e4]), np.array([1e10]))
    curves = curves_of(law, [1e3, 1e4, 1e5])
    curves[1e4] = tuple(x[::-1] for x in curves[1e4])
    with pytest.raises(ValueError, match="rise"):
        lab.envelope(curves, np.array([1e10]))


# Curves of runs


def made_up(n: int, steps: int, loss, seed: int = 0) -> dict:
    """A run of n parameters whose training loss at each step is known."""
    losses = [loss(step * 100) for step in range(1, steps + 1)]
    run = {"n_params": n, "tokens": 100 * steps, "flops": 600.0 * n * steps, "seed": seed}
    return {**run, "curve": sweep.curve(losses, 100)}


def test_along_a_run_each_mean_stands_where_it_belongs():
    tokens, loss = lab.along(made_up(1000, 2000, lambda t: 5 - 0.2 * math.log(t)))
    assert np.all(np.diff(tokens) > 0) and tokens[-1] < 200_000
    np.testing.assert_allclose(loss[6:], 5 - 0.2 * np.log(tokens[6:]), atol=0.02)


def test_the_gap_midway_is_measured():
    def planned(t):
        return 5 - 0.2 * math.log(t)

    runs = [made_up(n, steps, planned) for n in (1000, 3000) for steps in (200, 1000)]
    runs += [made_up(n, 4000, lambda t: planned(t) + 0.1 * (t < 3e5)) for n in (1000, 3000)]
    gaps = lab.midway_gaps(runs[::-1])
    assert sorted((n, ratio) for n, ratio, _ in gaps) == [(n, r) for n in (1000, 3000) for r in (4.0, 20.0)]
    for _, _, gap in gaps:
        assert gap == pytest.approx(0.1, abs=0.02)


def test_curves_are_means_over_seeds():
    branches = [{"flops": c, "loss": y, "trunk_loss": y + 1} for c, y in ((1e10, 3.0), (2e10, 2.5))]
    higher = [{**b, "loss": b["loss"] + 0.2} for b in branches]
    runs = [{"n_params": 7, "branches": b} for b in (branches, higher)]
    flops, loss = lab.wsd_curves(runs)[7]
    assert flops.tolist() == [1e10, 2e10] and loss == pytest.approx([3.1, 2.6])
    assert lab.wsd_curves(runs, "trunk_loss")[7][1] == pytest.approx([4.0, 3.5])
    long = [made_up(7, 900, lambda t, up=up: 3.0 + up, seed) for seed, up in enumerate((0.0, 0.4))]
    others = [made_up(7, steps, lambda t: 9.0) for steps in (100, 8000)]
    (curve,) = lab.midway_curves([*others, *long], 1.2e5).values()
    assert curve[1] == pytest.approx(3.2) and curve[0].max() < long[0]["flops"]


# The experiment


def shape_of(config: dict) -> Config:
    keys = {k: config[k] for k in ("dim", "n_layers", "n_heads", "hidden_dim")}
    return Config(96, max_len=config["seq_len"], **keys)


@pytest.fixture
def one_thread():
    """As runs have it. With two, sums are rounded in an order that varies, which so high a rate makes visible."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_trunk_is_a_run_of_the_training_loop_at_a_constant_rate(one_thread):
    config = CHEAP[0]
    tokens, _ = sweep.corpus_of(config)
    torch.manual_seed(config["seed"])
    model, ours = (TinyLlama(shape_of(config)) for _ in range(2))
    ours.load_state_dict(model.state_dict())
    recipe = {k: config[k] for k in ("steps", "batch_size", "seq_len", "lr", "seed")}
    train(model, tokens, TrainConfig(**recipe, warmup=config["warmup"] / config["steps"], final_lr=1.0), progress=False)
    optimizer = make_optimizer(ours, TrainConfig(steps=1))
    for step in range(config["steps"]):
        wsd.update(ours, optimizer, tokens, config, step, wsd.rate(config, step))
    for a, b in zip(model.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_branch_leaves_the_trunk_as_it_is():
    config = CHEAP[0]
    tokens, _ = sweep.corpus_of(config)
    torch.manual_seed(1)
    model = TinyLlama(shape_of(config))
    optimizer = make_optimizer(model, TrainConfig(steps=1))
    for step in range(3):
        wsd.update(model, optimizer, tokens, config, step, 0.01)
    state = [*model.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values())]
    before = [x.clone() for x in state]
    cooled = wsd.branch(model, optimizer, tokens, config, 3, 8)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(cooled.parameters(), model.parameters(), strict=True))
    again = wsd.branch(model, optimizer, tokens, config, 3, 8)
    for a, b in zip(cooled.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CHEAP, ids=lambda c: f"width {c['dim']}")
def test_a_short_trunk_comes_out_the_same(config):
    (record,) = (r for r in read_records(EXPERIMENT) if r["config"] == config)
    again = wsd.one_run(config)
    assert [again[k] for k in ("n_params", "steps", "tokens", "flops")] == [
        record[k] for k in ("n_params", "steps", "tokens", "flops")
    ]
    for ours, theirs in zip(again["branches"], record["branches"], strict=True):
        assert ours["tokens"] == theirs["tokens"] and ours["flops"] == theirs["flops"]
        # Another processor rounds otherwise; a rate changed by 1 in 10,000 moves these losses by up to 0.005.
        for loss in ("loss", "trunk_loss"):
            assert ours[loss] == pytest.approx(theirs[loss], abs=0.015)


def test_the_records_are_whole():
    records = read_records(EXPERIMENT)
    assert len(records) == len(wsd.CONFIGS) and all(r["config"] in wsd.CONFIGS for r in records)
    for record in records:
        config, lengths = record["config"], [b["tokens"] // 1024 for b in record["branches"]]
        assert lengths[-1] == config["steps"] and config["shortest"] <= lengths[0] < 2 * config["shortest"]
        assert all(b == 2 * a for a, b in zip(lengths, lengths[1:], strict=False))
        assert record["loss"] == record["branches"][-1]["loss"]
        for b in record["branches"]:
            assert b["flops"] == b["tokens"] / 128 * shape_of(config).train_flops(128)
        if config["steps"] > 1000:
            assert record["branches"][-1]["trunk_loss"] > record["branches"][-1]["loss"]
