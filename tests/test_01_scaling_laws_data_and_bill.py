"""Lab 01, text that runs out and the bill: limits, units, and slow obvious references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lab_source import definitions

lab = definitions("01_scaling_laws")
CHINCHILLA = lab.ScalingLaw(1.69, 406.4, 410.7, 0.34, 0.28)
BESIROGLU = lab.ScalingLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


def floats(low: float, high: float):
    """Numbers spread evenly in their logarithm."""
    return st.floats(math.log(low), math.log(high)).map(math.exp)


# Repeated text

passes = st.floats(1, 300)
readings = (floats(1e2, 1e13), passes, floats(0.01, 1e4))


@settings(deadline=None)
@given(*readings)
def test_repeats_are_worth_something_and_never_more_than_new_text(unique, epochs, r_star):
    d = lab.effective_data(unique, epochs, r_star)
    assert unique * (1 - 1e-12) <= d <= unique * epochs * (1 + 1e-9)
    assert d <= unique * (1 + r_star) * (1 + 1e-12)
    assert lab.effective_data(unique, 1.0, r_star) == pytest.approx(unique, rel=1e-12)


@settings(deadline=None)
@given(*readings, st.floats(1.01, 3))
def test_more_passes_and_a_larger_r_star_are_worth_more(unique, epochs, r_star, more):
    d = lab.effective_data(unique, epochs, r_star)
    assert lab.effective_data(unique, epochs * more, r_star) >= d
    assert lab.effective_data(unique, epochs, r_star * more) >= d * (1 - 1e-12)
    assert lab.effective_data(unique * more, epochs, r_star) == pytest.approx(more * d, rel=1e-12)


@settings(deadline=None)
@given(floats(1e2, 1e13), st.floats(1, 64))
def test_the_limits_of_r_star(unique, epochs):
    assert lab.effective_data(unique, epochs, 1e-6) == pytest.approx(unique, rel=1e-5)
    assert lab.effective_data(unique, epochs, 1e9) == pytest.approx(unique * epochs, rel=1e-6)
    assert lab.effective_data(unique, 1e9, 15.4) == pytest.approx(16.4 * unique, rel=1e-9)


CURVE = (1.4, 0.45, 0.5)


def read(sizes, epochs, r_star: float, noise: float = 0.0, seed: int = 0) -> list[dict]:
    """Records as the sweep writes them, made by the laws; without epochs they are controls."""
    rng, runs = np.random.default_rng(seed), []
    for size in sizes:
        for e in epochs or [None]:
            config = {"corpus": "shakespeare"} | ({"characters": size, "epochs": e} if e else {})
            d = lab.effective_data(float(size), e or 1, r_star)
            loss = lab.fresh_loss(CURVE, d) * math.exp(noise * rng.standard_normal())
            runs.append({"config": config, "tokens": size * (e or 1), "loss": float(loss)})
    return runs


SIZES, EPOCHS = (50_000, 200_000, 1_000_000), (1, 2, 4, 8, 16, 32, 64)
CONTROLS = (50_000, 100_000, 200_000, 400_000, 800_000, 1_600_000, 3_200_000)


def test_the_curve_of_new_text_is_recovered():
    assert lab.fresh_curve(read(CONTROLS, (), 1.0)) == pytest.approx(CURVE, rel=1e-6)


@pytest.mark.parametrize("r_star", [2.0, 15.4, 60.0])
def test_r_star_is_recovered(r_star):
    controls = read(CONTROLS, (), 1.0)
    exact = lab.r_star_of(controls + read(SIZES, EPOCHS, r_star))
    assert exact == pytest.approx(r_star, rel=0.02)  # the grid's step is 1.2 %
    noisy = [
        lab.r_star_of(read(CONTROLS * 3, (), 1.0, 0.003, seed) + read(SIZES * 2, EPOCHS, r_star, 0.003, 100 + seed))
        for seed in range(5)
    ]
    assert np.median(noisy) == pytest.approx(r_star, rel=0.25)


def test_what_rises_is_left_out_of_the_fit():
    runs = read((50_000,), EPOCHS, 15.4)
    assert lab.before_it_turns(runs) == runs
    runs[-1]["loss"] += 0.3
    assert lab.before_it_turns(runs) == runs[:-1]


@settings(deadline=None)
@given(floats(1e10, 1e13), floats(1.05, 4), floats(1.5, 1e3), st.floats(1.0, 1.04))
def test_demand_meets_supply_where_the_two_are_equal(demand, growth, ratio, stock_growth):
    year = lab.meeting(2022.8, demand, growth, demand * ratio, stock_growth)
    years = year - 2022.8
    assert demand * growth**years == pytest.approx(demand * ratio * stock_growth**years, rel=1e-6)
    with pytest.raises(ValueError, match="never"):
        lab.meeting(2022.8, demand, stock_growth, demand * ratio, growth)


# The bill

money = st.tuples(floats(1e10, 1e27), floats(1e9, 1e16), st.floats(0.01, 1), floats(0.1, 20))


@settings(deadline=None)
@given(money)
def test_dollars_times_rate_are_operations(inputs):
    flops, peak, used, price = inputs
    dollars = lab.training_cost(flops, peak, used, price)
    seconds = dollars / price * 3600  # of one GPU
    assert seconds * peak * used == pytest.approx(flops, rel=1e-9)
    assert lab.training_cost(3 * flops, peak, used, price) == pytest.approx(3 * dollars, rel=1e-9)
    assert lab.training_cost(flops, peak, used / 2, price) == pytest.approx(2 * dollars, rel=1e-9)


@pytest.mark.parametrize("used", [0, -0.1, 1.01, math.nan])
def test_an_impossible_utilisation_is_refused(used):
    with pytest.raises(ValueError, match="utilisation"):
        lab.training_cost(1e20, 1e14, used, 2.0)


def test_the_published_estimate_of_gpt3():
    assert lab.training_cost(3.14e23, 28e12, 1.0, 1.5) == pytest.approx(4.6e6, rel=0.02)
    assert 3.14e23 / 28e12 / 3600 / 24 / 365 == pytest.approx(355, rel=0.005)


@settings(deadline=None)
@given(st.floats(2000, 2040), floats(1e3, 1e9), floats(0.1, 1e5), st.floats(1, 60))
def test_a_cost_that_doubles_reaches_its_target(year, cost, ratio, months):
    years = lab.year_reached(year, cost, cost * ratio, months) - year
    assert cost * 2 ** (years * 12 / months) == pytest.approx(cost * ratio, rel=1e-6)


@settings(deadline=None)
@given(st.floats(3, 12), st.floats(13, 60), st.floats(0.1, 20))
def test_cheaper_operations_divide_the_growth(months, dollar_months, years):
    operations, per_dollar = (2 ** (12 * years / m) for m in (months, dollar_months))
    cost = 2 ** (12 * years / lab.cheaper(months, dollar_months))
    assert cost == pytest.approx(operations / per_dollar, rel=1e-9)


def simulated(interval: float, save: float, restart: float, mtbf: float, segments: int, seed: int = 0):
    """Hours lost per hour of work, its standard error: failures strike at random, also while saving and restarting."""
    rng, spent = np.random.default_rng(seed), np.empty(segments)
    for i in range(segments):
        clock, needed = 0.0, interval + save
        while (failure := rng.exponential(mtbf)) < needed:
            clock, needed = clock + failure, restart + interval + save
        spent[i] = clock + needed
    lost = spent / interval - 1
    return lost.mean(), lost.std() / segments**0.5


@pytest.mark.parametrize(
    ("interval", "save", "restart", "mtbf"),
    [(1.0, 0.05, 0.3, 20.0), (3.0, 0.01, 0.5, 5.0), (0.2, 0.1, 0.0, 2.0), (0.6, 0.011, 0.5, 14.0)],
)
def test_time_lost_agrees_with_a_simulation(interval, save, restart, mtbf):
    mean, error = simulated(interval, save, restart, mtbf, 20_000)
    assert lab.lost_exactly(interval, save, restart, mtbf) == pytest.approx(mean, abs=4 * error)


@settings(deadline=None)
@given(floats(1e-4, 0.1), st.floats(0, 1), floats(50, 1e4))
def test_young_s_interval_is_the_best_where_failures_are_rare(save, restart, mtbf):
    every = lab.checkpoint_interval(save, mtbf)
    assert every**2 == pytest.approx(2 * save * mtbf, rel=1e-12)
    least = lab.lost_share(every, save, restart, mtbf)
    for other in (0.5, 0.9, 1.1, 2.0):
        assert lab.lost_share(other * every, save, restart, mtbf) > least
    assert least == pytest.approx(math.sqrt(2 * save / mtbf) + restart / mtbf, rel=1e-9)
    best = minimize_scalar(
        lambda t: lab.lost_exactly(t, save, restart, mtbf), bounds=(every / 4, every * 4), method="bounded"
    )
    exact = lab.lost_exactly(every, save, restart, mtbf)
    assert exact <= best.fun * 1.02 and least == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("arguments", [(0.0, 10.0), (0.1, 0.0), (-1.0, 5.0), (math.nan, 5.0)])
def test_an_interval_needs_positive_hours(arguments):
    with pytest.raises(ValueError, match="positive"):
        lab.checkpoint_interval(*arguments)


@settings(deadline=None)
@given(floats(1e6, 1e12), st.integers(1, 4000), floats(0.1, 10), st.integers(1, 64))
def test_a_token_costs_what_its_gpus_take(n, batch, price, gpus):
    """The same with a number of GPUs that share weights and work."""
    peak, bandwidth = 312e12, 2.039e12
    seconds = max(2 * n * batch / (gpus * peak), 2 * n / (gpus * bandwidth))  # for `batch` tokens
    dollars = gpus * price / 3600 * seconds / batch
    assert lab.token_cost(n, batch, price, peak, bandwidth) == pytest.approx(dollars, rel=1e-9)
    with pytest.raises(ValueError, match="at least one"):
        lab.token_cost(n, 0.5, price, peak, bandwidth)


laws = st.builds(
    lab.ScalingLaw, st.floats(0.01, 3), floats(5, 5000), floats(5, 5000), st.floats(0.15, 0.8), st.floats(0.15, 0.8)
)


@settings(deadline=None)
@given(laws, floats(1e12, 1e26))
def test_without_serving_it_is_hoffmann_s_optimum(law, budget):
    n, d = law.optimal(budget)
    found = lab.inference_optimal(law, law.loss(n, d), 0.0)
    assert found == pytest.approx((n, d), rel=1e-4)
    assert lab.life_bill(*found, 0.0) == pytest.approx(budget, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(laws, floats(1e14, 1e25), floats(0.01, 1e4))
def test_no_size_of_a_fine_grid_is_cheaper(law, budget, served):
    n_train, d_train = law.optimal(budget)
    loss, served = law.loss(n_train, d_train), served * d_train
    n, d = lab.inference_optimal(law, loss, served)
    assert law.loss(n, d) == pytest.approx(loss, rel=1e-9)
    smallest = (law.A / (loss - law.E)) ** (1 / law.alpha)
    grid = smallest * np.geomspace(1 + 1e-6, 20 * n_train / smallest, 4000)
    tokens = (law.B / (loss - law.E - law.A / grid**law.alpha)) ** (1 / law.beta)
    bills = 6 * grid * tokens + 2 * grid * served
    least = lab.life_bill(n, d, served)
    assert least <= bills.min() * (1 + 1e-9)
    assert least >= bills.min() * (1 - 0.02)
    more, longer = lab.inference_optimal(law, loss, 3 * served)
    assert more < n < n_train * (1 + 1e-9) and longer > d > d_train * (1 - 1e-9)


def test_what_cannot_be_served_is_refused():
    for loss, served in ((1.69, 0.0), (1.0, 1e9), (2.0, -1.0)):
        with pytest.raises(ValueError, match="must exceed E"):
            lab.inference_optimal(CHINCHILLA, loss, served)
    with pytest.raises(ValueError, match="do not reach"):
        lab.tokens_for(CHINCHILLA, 2.0, 1e6)


def parity_rows() -> list[dict]:
    """What the chapter shows of our agreement with other libraries."""
    differences = []
    for law in (CHINCHILLA, BESIROGLU):
        for budget in (1e18, 1e21, 1e24):
            for times in (0.1, 3.0, 100.0, 3000.0):
                n_train, d_train = law.optimal(budget)
                loss, served = law.loss(n_train, d_train), times * d_train
                smallest = math.log(law.A / (loss - law.E)) / law.alpha
                found = minimize_scalar(
                    lambda x, law=law, loss=loss, served=served: math.log(
                        lab.life_bill(math.exp(x), lab.tokens_for(law, loss, math.exp(x)), served)
                    ),
                    bounds=(smallest + 1e-6, math.log(2 * n_train)),
                    method="bounded",
                    options={"xatol": 1e-10},
                )
                n, d = lab.inference_optimal(law, loss, served)
                differences.append(abs(math.log(lab.life_bill(n, d, served)) - found.fun))
    return [
        {
            "what": "least operations of training and serving, relative",
            "against": f"SciPy {scipy.__version__}, minimize_scalar",
            "dtype": "float64",
            "cases": len(differences),
            "tolerance": 1e-9,
            "worst": max(differences),
        }
    ]


def test_parity():
    for row in parity_rows():
        assert row["worst"] <= row["tolerance"], row
