"""The figure compute_optimal: how a fitted law shares a budget of operations, and what another share costs."""

from __future__ import annotations

import math
from collections.abc import Mapping

BUDGETS = (1e10, 1e27)  # operations, the ends of the slider
SPAN = 30  # a model at most so many times larger or smaller than the best
CONSTANTS = ("E", "A", "B", "alpha", "beta")
RUNS = ("params", "tokens", "flops")  # what the fitted runs covered, from the least to the largest

# Hoffmann et al. 2022: eq. 10; the runs of its abstract, the budgets of its approach 2. Besiroglu et al. 2024 fit the same
# runs, read off the figure.
_CHINCHILLAS_RUNS = {"params": [70e6, 16e9], "tokens": [5e9, 500e9], "flops": [6e18, 3e21], "token": "token"}
HOFFMANN, BESIROGLU = "Hoffmann et al. 2022", "Besiroglu et al. 2024"
PUBLISHED = {
    HOFFMANN: {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, **_CHINCHILLAS_RUNS},
    BESIROGLU: {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658, **_CHINCHILLAS_RUNS},
}
# Peak operations a second in 16 bits, dense, by NVIDIA's data sheets (V100 and H100: the SXM cards).
GPUS = {"V100": 125e12, "A100": 312e12, "H100": 989e12}

START = {
    "law": HOFFMANN,
    "flops": 3.15e23,
    "params": 175e9,
    "gpu": "A100",
    "price": 2.0,
    "utilisation": 0.4,
    "own": {},
}
# Brown et al. 2020, Rae et al. 2021, Hoffmann et al. 2022, Touvron et al. 2023: parameters, and 6 N D operations.
PRESETS = {
    "GPT-3": {"law": HOFFMANN, "flops": 3.15e23, "params": 175e9},
    "Gopher": {"law": HOFFMANN, "flops": 5.04e23, "params": 280e9},
    "Chinchilla": {"law": HOFFMANN, "flops": 5.88e23, "params": 70e9},
    "LLaMA 7B": {"law": HOFFMANN, "flops": 4.02e22, "params": 6.7e9},
}


def data() -> dict:
    return {
        "laws": PUBLISHED,
        "gpus": GPUS,
        "budgets": list(BUDGETS),
        "span": SPAN,
        "presets": [{"name": name, "state": state} for name, state in PRESETS.items()],
    }


def initial(own: Mapping[str, Mapping] | None = None, **changes: object) -> dict:
    """`law`: whose fit, a name of PUBLISHED or of `own`; `flops`: the budget in operations, 6 N D; `params`: the size of the
    model, at most SPAN times larger or smaller than the best, or None for the best; `gpu`: one of GPUS; `price`: dollars for
    an hour of it; `utilisation`: the share of its peak that training reaches.

    `own`: laws of your own by name, each a mapping of E, A, B, alpha and beta (L = E + A / N^alpha + B / D^beta), of
    `params`, `tokens` and `flops` (6 N D), the pairs between which the fitted runs lie, and of `token`, what a token is
    ("character"). Raises ValueError for a state that cannot be.
    """
    if unknown := set(changes) - set(START):
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; the state has {', '.join(START)}")
    state = START | changes | {"own": {str(name): _law(str(name), law) for name, law in (own or {}).items()}}
    _refuse(state)
    return state


def _law(name: str, law: Mapping) -> dict:
    """A law as plain floats, which JSON can hold."""
    if name in PUBLISHED:
        raise ValueError(f"{name} is a published law: give your own another name")
    if missing := [key for key in (*CONSTANTS, *RUNS, "token") if key not in law]:
        raise ValueError(f"the law {name!r} lacks {', '.join(missing)}")
    constants = {key: float(law[key]) for key in CONSTANTS}
    if not all(math.isfinite(x) and (x > 0 or key == "E" and x == 0) for key, x in constants.items()):
        raise ValueError(f"constants must be finite and above 0 (E may be 0), got {constants} for {name!r}")
    runs = {key: [float(end) for end in law[key]] for key in RUNS}
    for key, ends in runs.items():
        if len(ends) != 2 or not 0 < ends[0] <= ends[1] < math.inf:
            raise ValueError(f"{key} of the law {name!r} must be the least and the largest of its runs, got {ends}")
    return constants | runs | {"token": str(law["token"])}


def _refuse(state: dict) -> None:
    known = PUBLISHED | state["own"]
    if state["law"] not in known:
        raise ValueError(f"law must be one of {', '.join(known)}, got {state['law']!r}")
    if state["gpu"] not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {state['gpu']!r}")
    for name, low, high in (("flops", *BUDGETS), ("price", 0.01, 100), ("utilisation", 0.01, 1)):
        if type(state[name]) not in (int, float) or not low <= state[name] <= high:
            raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {state[name]!r}")
    n = state["params"]
    if n is not None:
        best = _share(known[state["law"]], state["flops"])[0]
        if type(n) not in (int, float) or not best / SPAN <= n * (1 + 1e-9) or not n <= best * SPAN * (1 + 1e-9):
            raise ValueError(
                f"params must be None or from {best / SPAN:.3g} to {best * SPAN:.3g} ({SPAN} times either way from the best), "
                f"got {n!r}"
            )


def law_of(state: dict) -> dict:
    """The chosen law: its constants, and what its runs covered."""
    return (PUBLISHED | state["own"])[state["law"]]


def _share(law: dict, flops: float) -> tuple[float, float]:
    """Parameters and tokens of least loss under 6 N D = flops: where alpha A / N^alpha = beta B / D^beta."""
    a, b = law["alpha"], law["beta"]
    n = (a * law["A"] / (b * law["B"])) ** (1 / (a + b)) * (flops / 6) ** (b / (a + b))
    return n, flops / 6 / n


def _above_floor(law: dict, n: float, d: float) -> float:
    """The loss less E."""
    return law["A"] * n ** -law["alpha"] + law["B"] * d ** -law["beta"]


def _beyond(law: dict, n: float, d: float) -> float:
    """The largest factor by which parameters, tokens or operations lie outside what the fitted runs covered, or 1."""
    values = {"params": n, "tokens": d, "flops": 6 * n * d}
    factor = max(x for key, v in values.items() for x in (law[key][0] / v, v / law[key][1]))
    return factor if factor > 1 + 1e-9 else 1.0


def numbers(state: dict) -> dict[str, float]:
    """The best share of the budget and the chosen one (nats per token, dollars), and by what factor the chosen one lies
    `beyond` the runs that were fitted (1: within). Raises ValueError for a state that cannot be.

    `waste` is how many times the operations are those that the best share needs for the loss of the chosen one. With the
    best share, the loss above E falls as C^-g, g = alpha beta / (alpha + beta); so it is the ratio of both losses above E
    to the power 1 / g, and depends on nothing but how far N is from the best.
    """
    _refuse(state)
    law, c = law_of(state), float(state["flops"])
    best_n, best_d = _share(law, c)
    n = best_n if state["params"] is None else float(state["params"])
    d = c / 6 / n
    least, here = _above_floor(law, best_n, best_d), _above_floor(law, n, d)
    dollars = state["price"] / 3600 / (GPUS[state["gpu"]] * state["utilisation"])  # for an operation
    return {
        "best_params": best_n,
        "best_tokens": best_d,
        "best_ratio": best_d / best_n,
        "best_loss": law["E"] + least,
        "params": n,
        "tokens": d,
        "ratio": d / n,
        "loss": law["E"] + here,
        "excess": here - least,
        "waste": (here / least) ** (1 / law["alpha"] + 1 / law["beta"]),
        "cost": dollars * c,
        "exaflop_cost": dollars * 1e18,
        "beyond": _beyond(law, n, d),
    }


def curve(law: dict, flops: float, n: float) -> tuple[float, bool]:
    """The loss of n parameters that spend so many operations, and whether the fitted runs cover them."""
    d = flops / 6 / n
    return law["E"] + _above_floor(law, n, d), _beyond(law, n, d) <= 1


def optima(law: dict, n: float) -> tuple[float, bool]:
    """The loss of n parameters on as many tokens as are best for them, and whether the fitted runs cover them."""
    a, b = law["alpha"], law["beta"]
    d = (b * law["B"] / (a * law["A"]) * n**a) ** (1 / b)
    return law["E"] + _above_floor(law, n, d), _beyond(law, n, d) <= 1


def draw(state: dict):
    """The still: the loss of all sizes that a budget can train, the best of them and the chosen one."""
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.patheffects import withStroke

    from tinylm.plot import BLUE, MUTED, VERMILION, legible

    q, law, c = numbers(state), law_of(state), state["flops"]
    sizes, above = q["best_params"] * np.geomspace(1 / 100, 100, 401), q["best_loss"] - law["E"]
    bottom, top = law["E"] - 0.12 * above, law["E"] + max(2.6 * above, 1.25 * (q["loss"] - law["E"]))
    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    halo = [withStroke(linewidth=3, foreground=figure.get_facecolor())]

    def line(points: list[tuple[float, bool]], color: str, width: float) -> None:
        loss, covered = np.array(points).T
        axis.plot(sizes, np.where(covered, loss, np.nan), color=color, lw=width)
        axis.plot(sizes, loss, color=color, lw=width, ls=(0, (3, 2.5)), alpha=0.8)

    def write(x: float, y: float, text: str, color: str, **where: object) -> None:
        where |= {"textcoords": "offset points", "fontsize": 9, "path_effects": halo, "zorder": 5}
        axis.annotate(text, (x, y), color=legible(color), **where)

    for exponent in range(10, 28, 2):
        axis.plot(sizes, [curve(law, 10.0**exponent, n)[0] for n in sizes], color=MUTED, lw=0.7, alpha=0.45)
        n = _share(law, 10.0**exponent)[0]
        loss, distance = optima(law, n)[0], abs(math.log10(n / q["best_params"]))
        if 0.5 < distance < 1.8 and loss < top:
            write(n, loss, _power(10.0**exponent), MUTED, xytext=(4, 4))
    line([optima(law, n) for n in sizes], MUTED, 1.2)
    line([curve(law, c, n) for n in sizes], BLUE, 2)
    axis.axhline(law["E"], color=MUTED, lw=1, ls=(0, (4, 3)))
    write(sizes[0], law["E"], f"floor E = {law['E']:.2f}", MUTED, xytext=(4, 4))
    axis.plot(q["best_params"], q["best_loss"], "o", color=BLUE, ms=7, zorder=4)
    best = f"best: {_short(q['best_params'])}"
    write(q["best_params"], q["best_loss"], best, BLUE, xytext=(10, -16), ha="right")
    if state["params"] is not None:
        n = q["params"]
        equal = (law["A"] * (1 + law["alpha"] / law["beta"]) / (q["loss"] - law["E"])) ** (1 / law["alpha"])
        if equal > sizes[0]:
            axis.plot(equal, q["loss"], "o", mfc=figure.get_facecolor(), mec=VERMILION, ms=6, zorder=4)
        equal = max(equal, sizes[0])
        axis.plot([n, equal], [q["loss"]] * 2, color=VERMILION, lw=1, ls=(0, (3, 3)))
        axis.plot(n, q["loss"], "o", color=VERMILION, ms=7, zorder=4)
        text = f"this size: {_short(n)}\n× {q['waste']:.3g} operations"
        write(math.sqrt(n * equal), q["loss"], text, VERMILION, xytext=(0, 5), ha="center", va="bottom")
    axis.set(xscale="log", xlim=(sizes[0], sizes[-1]), ylim=(bottom, top))
    axis.set(xlabel="parameters N", ylabel=f"loss (nats per {law['token']})")
    decades = [10.0**k for k in range(math.ceil(math.log10(sizes[0])), math.floor(math.log10(sizes[-1])) + 1)]
    axis.set_xticks(decades, [_short(n) for n in decades])
    axis.minorticks_off()
    axis.set_title(f"What {_power(c)} operations can train (dashed: beyond the fitted runs)")
    return figure, _alternative(state, q, law)


def _alternative(state: dict, q: dict, law: dict) -> str:
    unit, chosen, where = law["token"] + "s", "", "within what the fitted runs covered"
    if q["beyond"] > 1:
        where = f"beyond the fitted runs by a factor of {_words(q['beyond'])}, where the law is drawn dashed"
    if state["params"] is not None:
        chosen = (
            f" A marked model of {_words(q['params'])} parameters on {_words(q['tokens'])} {unit} has loss {q['loss']:.3f}; "
            f"the best share reaches that with the operations divided by {_words(q['waste'])}."
        )
    price = f"{state['price']:g} dollars an hour for a GPU ({state['gpu']}) that does {100 * state['utilisation']:.0f} percent"
    return (
        f"Loss in nats per {law['token']} against parameters, of models that all take {_power(state['flops'])} operations, by "
        f"the law of {state['law']}: a bowl above a floor of {law['E']:.2f}, among fainter bowls of other budgets and a line "
        f"that falls through all their lowest points. This one's is at {_words(q['best_params'])} parameters and "
        f"{_words(q['best_tokens'])} {unit}, {_words(q['best_ratio'])} a parameter, with loss {q['best_loss']:.3f}.{chosen} "
        f"This is {where}. The budget costs {_words(q['cost'])} dollars, at an assumed {price} of its "
        f"{GPUS[state['gpu']] / 1e12:.0f} TFLOP/s."
    )


def _power(x: float) -> str:
    """3.15 × 10²³: three digits, and no factor of 1."""
    digits, exponent = f"{x:.2e}".split("e")
    raised = f"10{int(exponent)}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))[2:]
    return f"10{raised}" if float(digits) == 1 else f"{float(digits):g} × 10{raised}"


def _short(x: float) -> str:
    """Three digits and a letter: 24.5 B."""
    return _scaled(x, ("", " k", " M", " B", " T"))


def _words(x: float) -> str:
    return _scaled(x, ("", " thousand", " million", " billion", " trillion"))


def _scaled(x: float, units: tuple[str, ...]) -> str:
    x = float(f"{x:.3g}")
    if not 1e-3 <= x < 1e15:
        return _power(x)
    thousands = max(0, int(f"{x:e}".split("e")[1]) // 3)
    return f"{x / 1000**thousands:.3g}{units[thousands]}"
