"""Solutions right, wrong and sly of lab 01's exercises."""

import math

import numpy as np
from proof import right, sly, wrong
from scipy.optimize import lsq_linear, minimize_scalar, nnls

from lab_source import definitions

lab = definitions("01_scaling_laws")


@right("training_flops")
def forward_and_twice_backward(n_params, batch_size, seq_len, steps):
    forward = sum(2 * n_params * seq_len for _ in range(batch_size))
    return (forward + 2 * forward) * steps


@wrong("training_flops", "a run's operations are counted")
def one_step_only(n_params, batch_size, seq_len, steps):
    return 6 * n_params * batch_size * seq_len


@wrong("training_flops", "a sequence has seq_len of them")
def sequences_for_tokens(n_params, batch_size, seq_len, steps):
    return 6 * n_params * batch_size * steps


@wrong("training_flops", "a batch of four sequences")
def one_sequence_a_step(n_params, batch_size, seq_len, steps):
    return 6 * n_params * seq_len * steps


@wrong("training_flops", "the forward pass alone")
def no_backward_pass(n_params, batch_size, seq_len, steps):
    return 2 * n_params * batch_size * seq_len * steps


@wrong("training_flops", "should cost 6000 operations")
def a_multiply_add_is_one(n_params, batch_size, seq_len, steps):
    return 3 * n_params * batch_size * seq_len * steps


@sly("training_flops", "3.15e23 operations")
def a_product_of_64_bits(n_params, batch_size, seq_len, steps):
    return int(np.prod([6, n_params, batch_size, seq_len, steps], dtype=np.int64))


@right("isoflop_optimum")
def in_logarithms_to_base_ten(n, loss):
    x = np.log10(n)
    table = np.stack([np.ones_like(x), x, x * x], axis=1)
    (u, v, w), *_ = np.linalg.lstsq(table, loss)
    if not w > 0:
        raise ValueError("no lowest point")
    return float(10 ** (-v / w / 2)), float(u - v * v / w / 4)


def bowl_of(x, loss):
    """The parabola's lowest point in x, its value there, and its curvature."""
    w, v, u = np.polyfit(x, loss, 2)
    return -v / (2 * w), u - v * v / (4 * w), w


def refuse(w):
    if w <= 0:
        raise ValueError("no lowest point")


@wrong("isoflop_optimum", "the best of the sizes that were run")
def the_best_run(n, loss):
    refuse(bowl_of(np.log(n), loss)[2])
    return float(n[np.argmin(loss)]), float(np.min(loss))


@wrong("isoflop_optimum", "turn it back into parameters")
def the_logarithm_of_the_size(n, loss):
    x, least, w = bowl_of(np.log(n), loss)
    refuse(w)
    return float(x), float(least)


@wrong("isoflop_optimum", "were turned back with exp")
def base_ten_undone_with_exp(n, loss):
    x, least, w = bowl_of(np.log10(n), loss)
    refuse(w)
    return float(np.exp(x)), float(least)


@wrong("isoflop_optimum", "came out elsewhere")
def a_parabola_in_the_size_itself(n, loss):
    x, least, w = bowl_of(n, loss)
    refuse(w)
    return float(x), float(least)


@wrong("isoflop_optimum", "came out elsewhere")
def the_half_forgotten(n, loss):
    x, least, w = bowl_of(np.log(n), loss)
    refuse(w)
    return float(np.exp(2 * x)), float(least)


@wrong("isoflop_optimum", "the loss at the lowest point is 2")
def the_least_loss_of_a_run(n, loss):
    x, _, w = bowl_of(np.log(n), loss)
    refuse(w)
    return float(np.exp(x)), float(np.min(loss))


@wrong("isoflop_optimum", "must be refused")
def a_highest_point_for_a_lowest(n, loss):
    x, least, _ = bowl_of(np.log(n), loss)
    return float(np.exp(x)), float(least)


@sly("isoflop_optimum", "models of 1e9 to 1e12 parameters")
def searched_below_half_a_billion(n, loss):
    fit = np.polyfit(np.log(n), loss, 2)
    refuse(fit[0])
    found = minimize_scalar(
        lambda x: np.polyval(fit, x),
        bounds=(0, 20),
        method="bounded",
        options={"xatol": 1e-12},
    )
    return float(np.exp(found.x)), float(found.fun)


@right("power_law")
def by_covariance(x, y):
    log_x, log_y = np.log10(x), np.log10(y)
    p = np.cov(log_x, log_y, bias=True)[0, 1] / np.var(log_x)
    return float(10 ** (log_y.mean() - p * log_x.mean())), float(p)


def line(x, y):
    slope, level = np.polyfit(x, y, 1)
    return float(slope), float(level)


@wrong("power_law", "changed places")
def exponent_first(x, y):
    p, level = line(np.log(x), np.log(y))
    return p, math.exp(level)


@wrong("power_law", "are both axes logarithms")
def one_axis_in_logarithms(x, y):
    p, level = line(np.log(x), y)
    return math.exp(min(level, 700)), p


@wrong("power_law", "are both axes logarithms")
def x_against_y(x, y):
    p, level = line(np.log(y), np.log(x))
    return math.exp(level), p


@wrong("power_law", "undone with exp, which is for natural ones")
def base_ten_and_exp(x, y):
    p, level = line(np.log10(x), np.log10(y))
    return math.exp(level), p


@wrong("power_law", "the intercept is ln k")
def the_intercept_itself(x, y):
    p, level = line(np.log(x), np.log(y))
    return level, p


@wrong("power_law", "not a line through two of them")
def from_the_first_to_the_last(x, y):
    p = math.log(y[-1] / y[0]) / math.log(x[-1] / x[0])
    return float(y[0] / x[0] ** p), p


@sly("power_law", "a falling law has a negative exponent")
def laws_only_grow(x, y):
    p = max(0.0, line(np.log(x), np.log(y))[0])
    return float(np.exp(np.mean(np.log(y) - p * np.log(x)))), p


@right("predicted_log_loss")
def shifted_by_the_largest_term(theta, log_n, log_d):
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * log_n, b - beta * log_d, e + 0 * log_n])
    largest = terms.max(axis=0)
    return largest + np.log(np.exp(terms - largest).sum(axis=0))


@wrong("predicted_log_loss", "this is the loss itself")
def without_the_logarithm(theta, log_n, log_d):
    a, b, e, alpha, beta = theta
    return np.exp(e) + np.exp(a - alpha * log_n) + np.exp(b - beta * log_d)


@wrong("predicted_log_loss", "a, b and e are natural logarithms")
def logarithm_to_base_ten(theta, log_n, log_d):
    return np.log10(without_the_logarithm(theta, log_n, log_d))


@wrong("predicted_log_loss", "a, b and e are natural logarithms")
def powers_of_ten(theta, log_n, log_d):
    a, b, e, alpha, beta = theta
    return np.log10(10.0**e + 10.0 ** (a - alpha * log_n) + 10.0 ** (b - beta * log_d))


@wrong("predicted_log_loss", "a, b and e are natural logarithms")
def powers_of_ten_in_natural_logarithms(theta, log_n, log_d):
    a, b, e, alpha, beta = theta
    return np.log(10.0**e + 10.0 ** (a - alpha * log_n) + 10.0 ** (b - beta * log_d))


@wrong("predicted_log_loss", "was E forgotten")
def no_floor(theta, log_n, log_d):
    a, b, _, alpha, beta = theta
    return np.logaddexp(a - alpha * log_n, b - beta * log_d)


@wrong("predicted_log_loss", "was E forgotten")
def floor_added_after_the_logarithm(theta, log_n, log_d):
    return no_floor(theta, log_n, log_d) + np.exp(theta[2])


@wrong("predicted_log_loss", "was E forgotten")
def e_taken_for_the_floor(theta, log_n, log_d):
    return np.log(theta[2] + np.exp(no_floor(theta, log_n, log_d)))


@wrong("predicted_log_loss", "minus alpha ln N")
def loss_that_grows(theta, log_n, log_d):
    a, b, e, alpha, beta = theta
    return np.logaddexp(np.logaddexp(a + alpha * log_n, b + beta * log_d), e)


@wrong("predicted_log_loss", "minus alpha ln N")
def the_largest_term_alone(theta, log_n, log_d):
    a, b, e, alpha, beta = theta
    return np.maximum(np.maximum(a - alpha * log_n, b - beta * log_d), e)


@sly("predicted_log_loss", "e^900 overflows")
def exponentials_added(theta, log_n, log_d):
    with np.errstate(over="ignore"):
        return np.log(without_the_logarithm(theta, log_n, log_d))


def log_residuals(theta, log_n, log_d, loss):
    return shifted_by_the_largest_term(theta, log_n, log_d) - np.log(loss)


def huber_of(r, delta):
    size = np.abs(r)
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


@right("objective")
def clipped_residual_times_the_rest(theta, log_n, log_d, loss, delta=1e-3):
    r = log_residuals(theta, log_n, log_d, loss)
    inside = np.clip(r, -delta, delta)
    return float(inside @ (r - inside / 2))


@wrong("objective", "the residual is of ln L, not of L")
def residual_of_the_loss(theta, log_n, log_d, loss, delta=1e-3):
    r = without_the_logarithm(theta, log_n, log_d) - loss
    return float(huber_of(r, delta).sum())


@wrong("objective", "the residual is of ln L, not of L")
def residual_relative_to_the_prediction(theta, log_n, log_d, loss, delta=1e-3):
    r = 1 - loss / without_the_logarithm(theta, log_n, log_d)
    return float(huber_of(r, delta).sum())


@wrong("objective", "should cost nothing")
def logarithm_against_loss(theta, log_n, log_d, loss, delta=1e-3):
    r = shifted_by_the_largest_term(theta, log_n, log_d) - loss
    return float(huber_of(r, delta).sum())


@wrong("objective", "Huber's loss is no square")
def squares(theta, log_n, log_d, loss, delta=1e-3):
    return float(np.square(log_residuals(theta, log_n, log_d, loss)).sum() / 2)


@wrong("objective", "Huber's loss is no square")
def without_the_absolute_value(theta, log_n, log_d, loss, delta=1e-3):
    r = log_residuals(theta, log_n, log_d, loss)
    return float(np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).sum())


@wrong("objective", "the sum over runs, and no mean")
def mean_over_runs(theta, log_n, log_d, loss, delta=1e-3):
    return float(huber_of(log_residuals(theta, log_n, log_d, loss), delta).mean())


@wrong("objective", "below delta it is half the square")
def no_half(theta, log_n, log_d, loss, delta=1e-3):
    size = np.abs(log_residuals(theta, log_n, log_d, loss))
    return float(np.where(size <= delta, size**2, delta * (size - delta / 2)).sum())


@sly("objective", "a delta beyond all residuals")
def delta_is_always_a_thousandth(theta, log_n, log_d, loss, delta=1e-3):
    return float(huber_of(log_residuals(theta, log_n, log_d, loss), 1e-3).sum())


@right("optimal_allocation")
def tokens_first(A, B, alpha, beta, C):
    share = alpha / (alpha + beta)
    d = (beta * B / (alpha * A)) ** (1 / (alpha + beta)) * (C / 6) ** share
    return C / (6 * d), d


def with_balance(G, alpha, beta, C):
    n = G * (C / 6) ** (beta / (alpha + beta))
    return n, C / 6 / n


@wrong("optimal_allocation", "the six operations a parameter and token are missing")
def six_forgotten(A, B, alpha, beta, C):
    n = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * C ** (beta / (alpha + beta))
    return n, C / n


@wrong("optimal_allocation", "only when the tokens take the rest")
def size_chosen_without_the_budget(A, B, alpha, beta, C):
    n, _ = tokens_first(A, B, alpha, beta, C)
    return n, C / 6


@wrong("optimal_allocation", "only when the tokens take the rest")
def size_and_tokens_each_without_the_other(A, B, alpha, beta, C):
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    return G * (C / 6) ** (beta / (alpha + beta)), G * (C / 6) ** (alpha / (alpha + beta))


@wrong("optimal_allocation", "the exponents are exchanged")
def exponents_exchanged(A, B, alpha, beta, C):
    n = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C / 6) ** (alpha / (alpha + beta))
    return n, C / 6 / n


@wrong("optimal_allocation", "a size two percent away")
def terms_made_equal(A, B, alpha, beta, C):
    return with_balance((A / B) ** (1 / (alpha + beta)), alpha, beta, C)


@wrong("optimal_allocation", "a size two percent away")
def balance_upside_down(A, B, alpha, beta, C):
    return with_balance((beta * B / (alpha * A)) ** (1 / (alpha + beta)), alpha, beta, C)


@wrong("optimal_allocation", "a size two percent away")
def twenty_tokens_a_parameter(A, B, alpha, beta, C):
    n = (C / 120) ** 0.5
    return n, C / 6 / n


@sly("optimal_allocation", "the budget is shared evenly")
def the_best_of_a_grid(A, B, alpha, beta, C):
    grid = np.geomspace(0.7, 3e20, 100_001)
    best = [float(grid[np.argmin(A / grid**alpha + B / (c / 6 / grid) ** beta)]) for c in np.atleast_1d(C)]
    n = best[0] if np.ndim(C) == 0 else np.array(best)
    return n, C / 6 / n


def columns_of(N, D, alpha, beta):
    return np.stack([np.ones_like(N), N**-alpha, D**-beta], axis=1)


@right("linear_part")
def by_bounded_least_squares(N, D, loss, alpha, beta, weights=1.0):
    X = columns_of(N, D, alpha, beta) * (np.sqrt(weights) / loss)[:, None]
    largest = np.abs(X).max(axis=0)
    answer = lsq_linear(X / largest, np.sqrt(weights) * np.ones(len(N)), bounds=(0, np.inf), method="bvls", tol=1e-14)
    return answer.x / largest


def relative(X, loss, weights=1.0):
    """The least squares of the solution, on other columns and targets."""
    scale = np.sqrt(weights) / loss
    length = np.linalg.norm(X, axis=0)
    return nnls(X / length * scale[:, None], scale * loss)[0] / length


@wrong("linear_part", "the first of the three columns is all ones")
def without_a_floor(N, D, loss, alpha, beta, weights=1.0):
    return np.array([0.0, *relative(columns_of(N, D, alpha, beta)[:, 1:], loss, weights)])


@wrong("linear_part", "as N^-alpha and D^-beta")
def exponents_of_the_wrong_sign(N, D, loss, alpha, beta, weights=1.0):
    return relative(columns_of(N, D, -alpha, -beta), loss, weights)


@wrong("linear_part", "it is the loss that is linear in E, A, B")
def logarithms_fitted_linearly(N, D, loss, alpha, beta, weights=1.0):
    X = columns_of(N, D, alpha, beta)
    w = np.sqrt(weights) * np.ones(len(N))
    length = np.linalg.norm(X, axis=0)
    return nnls(X / length * w[:, None], w * np.log(loss))[0] / length


@wrong("linear_part", "other constants came out")
def rates_exchanged(N, D, loss, alpha, beta, weights=1.0):
    return relative(columns_of(N, D, beta, alpha), loss, weights)


@wrong("linear_part", "divide each run's row, and its target, by its loss")
def absolute_errors(N, D, loss, alpha, beta, weights=1.0):
    X = columns_of(N, D, alpha, beta)
    w = np.sqrt(weights) * np.ones(len(N))
    length = np.linalg.norm(X, axis=0)
    return nnls(X / length * w[:, None], w * loss)[0] / length


@wrong("linear_part", "where did the weights go")
def weights_forgotten(N, D, loss, alpha, beta, weights=1.0):
    return relative(columns_of(N, D, alpha, beta), loss)


@wrong("linear_part", "on the row stands its root")
def weights_on_the_rows(N, D, loss, alpha, beta, weights=1.0):
    return relative(columns_of(N, D, alpha, beta), loss, np.square(weights))


@wrong("linear_part", "nnls keeps all three from it")
def negative_constants(N, D, loss, alpha, beta, weights=1.0):
    scale = np.sqrt(weights) / loss
    X = columns_of(N, D, alpha, beta)
    length = np.linalg.norm(X, axis=0)
    return np.linalg.lstsq(X / length * scale[:, None], scale * loss, rcond=None)[0] / length


@sly("linear_part", "lose digits")
def columns_as_they_are(N, D, loss, alpha, beta, weights=1.0):
    scale = np.sqrt(weights) / loss
    X = columns_of(N, D, alpha, beta) * scale[:, None]
    answer = np.linalg.lstsq(X, scale * loss, rcond=None)[0]
    return answer if answer.min() >= 0 else nnls(X, scale * loss)[0]


@right("effective_data")
def by_the_limit(unique, epochs, r_star):
    return unique * (1 + r_star) - unique * r_star * np.exp((1 - epochs) / r_star)


@right("effective_data")
def by_expm1(unique, epochs, r_star):
    return unique - unique * r_star * np.expm1(-(epochs - 1) / r_star)


@wrong("effective_data", "repeats were counted as new text")
def repeats_are_fresh(unique, epochs, r_star):
    return unique * epochs * np.ones_like(r_star)


@wrong("effective_data", "R counts repeats, one less than epochs")
def epochs_for_repeats(unique, epochs, r_star):
    return unique + unique * r_star * (1 - np.exp(-epochs / r_star))


@wrong("effective_data", "the unique text itself is missing")
def unique_text_forgotten(unique, epochs, r_star):
    return unique * r_star * (1 - np.exp(-(epochs - 1) / r_star))


@wrong("effective_data", "the value must level off")
def logarithm_that_never_ends(unique, epochs, r_star):
    return unique + unique * r_star * np.log1p((epochs - 1) / r_star)


@wrong("effective_data", "the law falls by e, not by 2")
def half_life(unique, epochs, r_star):
    return unique + unique * r_star * (1 - np.exp2(-(epochs - 1) / r_star))


@wrong("effective_data", "compare with the formula")
def r_star_left_out_of_the_exponent(unique, epochs, r_star):
    return unique + unique * r_star * (1 - np.exp(-(epochs - 1)))


@sly("effective_data", "are not whole ones")
def whole_passes_only(unique, epochs, r_star):
    return unique + unique * r_star * (1 - np.exp(-(np.floor(epochs) - 1) / r_star))


@right("training_cost")
def by_gpu_seconds(flops, peak_flops, utilisation, price_per_hour):
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must be in (0, 1], got {utilisation}")
    price_per_second = price_per_hour / 60 / 60
    return flops / peak_flops * price_per_second / utilisation


@wrong("training_cost", "there are 3,600 in an hour")
def price_paid_for_seconds(flops, peak_flops, utilisation, price_per_hour):
    return flops / (utilisation * peak_flops) * price_per_hour


@wrong("training_cost", "a GPU that idles takes longer")
def utilisation_multiplied(flops, peak_flops, utilisation, price_per_hour):
    return flops / peak_flops * utilisation / 3600 * price_per_hour


@wrong("training_cost", "no GPU trains at its peak")
def utilisation_left_out(flops, peak_flops, utilisation, price_per_hour):
    return flops / peak_flops / 3600 * price_per_hour


@wrong("training_cost", "which costs 2 dollars here")
def hours_and_no_dollars(flops, peak_flops, utilisation, price_per_hour):
    return flops / (utilisation * peak_flops) / 3600


@sly("training_cost", "half of an hour's price")
def hours_begun(flops, peak_flops, utilisation, price_per_hour):
    hours = flops / (utilisation * peak_flops) / 3600
    return math.ceil(round(hours, 6)) * price_per_hour


@right("year_reached")
def by_yearly_growth(year, cost, target, doubling_months):
    growth = 2 ** (12 / doubling_months)
    return year + (math.log(target) - math.log(cost)) / math.log(growth)


@wrong("year_reached", "those are months")
def months_taken_for_years(year, cost, target, doubling_months):
    return year + math.log2(target / cost) * doubling_months


@wrong("year_reached", "a doubling is a factor of 2")
def to_base_e(year, cost, target, doubling_months):
    return year + math.log(target / cost) * doubling_months / 12


@wrong("year_reached", "growth is exponential")
def as_often_as_it_fits(year, cost, target, doubling_months):
    return year + target / cost * doubling_months / 12


@wrong("year_reached", "a year and a half later")
def the_years_it_takes(year, cost, target, doubling_months):
    return math.log2(target / cost) * doubling_months / 12


@sly("year_reached", "was reached in the past")
def never_before_today(year, cost, target, doubling_months):
    return year + max(0.0, math.log2(target / cost)) * doubling_months / 12


def grouped(lr, decay, model):
    """One group a parameter: lr and decay are functions of its name and itself."""
    return [{"params": [p], "lr": lr(n, p), "weight_decay": decay(n, p)} for n, p in model.named_parameters()]


def is_matrix(name, p):
    return p.ndim == 2 and name.startswith("blocks.")


@right("mup_groups")
def a_group_for_each_parameter(model, base_dim, lr, weight_decay=0.1):
    m = model.config.dim / base_dim
    return grouped(
        lambda n, p: lr / m if is_matrix(n, p) else lr,
        lambda n, p: 0.0 if p.ndim < 2 else weight_decay * (m if is_matrix(n, p) else 1),
        model,
    )


@wrong("mup_groups", "a lookup sums over nothing")
def table_scaled_too(model, base_dim, lr, weight_decay=0.1):
    m = model.config.dim / base_dim
    return grouped(
        lambda n, p: lr / m if p.ndim == 2 else lr,
        lambda n, p: weight_decay * m if p.ndim == 2 else 0.0,
        model,
    )


@wrong("mup_groups", "fell with the square root of m")
def root_of_the_width(model, base_dim, lr, weight_decay=0.1):
    m = (model.config.dim / base_dim) ** 0.5
    return lab.mup_groups(model, model.config.dim / m, lr, weight_decay)


@wrong("mup_groups", "m is upside down")
def upside_down(model, base_dim, lr, weight_decay=0.1):
    return lab.mup_groups(model, model.config.dim**2 / base_dim, lr, weight_decay)


@wrong("mup_groups", "should have a quarter of the rate")
def one_rate_for_all(model, base_dim, lr, weight_decay=0.1):
    return lab.mup_groups(model, model.config.dim, lr, weight_decay)


@wrong("mup_groups", "not its fan in with base_dim")
def fan_in_over_base_dim(model, base_dim, lr, weight_decay=0.1):
    return grouped(
        lambda n, p: lr * base_dim / p.shape[1] if is_matrix(n, p) else lr,
        lambda n, p: 0.0 if p.ndim < 2 else weight_decay * (p.shape[1] / base_dim if is_matrix(n, p) else 1),
        model,
    )


@wrong("mup_groups", "a gain multiplies its own channel")
def gains_scaled_too(model, base_dim, lr, weight_decay=0.1):
    tables, matrices, gains = lab.mup_groups(model, base_dim, lr, weight_decay)
    return [tables, matrices, {**gains, "lr": matrices["lr"]}]


@wrong("mup_groups", "a lower rate needs more decay")
def decay_left_alone(model, base_dim, lr, weight_decay=0.1):
    tables, matrices, gains = lab.mup_groups(model, base_dim, lr, weight_decay)
    return [tables, {**matrices, "weight_decay": weight_decay}, gains]


@wrong("mup_groups", "belongs in exactly one group")
def gains_forgotten(model, base_dim, lr, weight_decay=0.1):
    tables, matrices, gains = lab.mup_groups(model, base_dim, lr, weight_decay)
    return [tables, matrices, {**gains, "params": gains["params"][:1]}]


@sly("mup_groups", "base_dim is ignored")
def base_of_32(model, base_dim, lr, weight_decay=0.1):
    return lab.mup_groups(model, 32, lr, weight_decay)


@sly("mup_groups", "the decay that was asked for is ignored")
def decay_of_a_tenth(model, base_dim, lr, weight_decay=0.1):
    return lab.mup_groups(model, base_dim, lr)


@wrong("mup_groups", "gains do not decay")
def gains_that_decay(model, base_dim, lr, weight_decay=0.1):
    tables, matrices, gains = lab.mup_groups(model, base_dim, lr, weight_decay)
    return [tables, matrices, {**gains, "weight_decay": weight_decay}]
