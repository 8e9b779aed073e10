"""The figure rounding_grid: real weights, the grid that a format lays over them, and what one outlier does to it."""

from __future__ import annotations

from functools import cache

import numpy as np

MATRIX, ROWS = "blocks.0.mlp.down_proj", 4  # the first rows of this matrix of shakespeare-800k, 384 weights each
UNIT = 2.0**-13  # weights are shown as multiples of it, and so exact in float32
MARKED = 534  # the weight that the slider moves
FARTHEST = 16  # standard deviations
GROUP_SIZES = (1536, 384, 128, 64, 32, 16, 8)  # all, a row, parts of rows
WINDOW = 24  # of more groups than this, so many neighbours are drawn

# NF4: Dettmers et al. 2023, appendix E, as bitsandbytes has it. FP4: E2M1, the elements of MXFP4 and NVFP4.
CODEBOOKS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
}  # fmt: skip
FORMATS = {
    "absmax": "Symmetric integers",
    "affine": "Integers with a zero point",
    "nf4": "NF4 (normal floats)",
    "fp4": "FP4 (E2M1 floats)",
}
START = {"format": "absmax", "bits": 4, "group_size": 128, "outlier": 12}
PRESETS = {
    "As trained": START | {"group_size": 1536, "outlier": 0},
    "One outlier": START | {"group_size": 1536},
    "In groups of 128": START,
    "NF4, as QLoRA has it": START | {"format": "nf4", "group_size": 64, "outlier": 0},
}


@cache
def _trained() -> np.ndarray:
    """The weights as trained, in units (1536,)."""
    from tinylm import checkpoint

    weight = checkpoint.load("shakespeare-800k").get_submodule(MATRIX).weight
    return np.rint(weight[:ROWS].detach().double().numpy().ravel() / UNIT)


def _sigma() -> float:
    """Their standard deviation, rounded to a unit."""
    return round(_trained().std()) * UNIT


def data() -> dict:
    return {
        "unit": UNIT,
        "sigma": _sigma(),
        "marked": MARKED,
        "farthest": FARTHEST,
        "group_sizes": list(GROUP_SIZES),
        "formats": [list(item) for item in FORMATS.items()],
        "codebooks": {name: list(values) for name, values in CODEBOOKS.items()},
        "presets": [{"name": name, "state": state} for name, state in PRESETS.items()],
        "weights": " ".join(f"{w:.0f}" for w in _trained()),
    }


def initial(**changes: object) -> dict:
    """`format`: "absmax", "affine", "nf4" or "fp4"; `bits`: 2 to 8, and 4 for the last two; `group_size`: how many weights
    share a scale, one of GROUP_SIZES; `outlier`: at how many standard deviations the marked weight stands, 0 as trained."""
    if unknown := set(changes) - set(START):
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; the state has {', '.join(START)}")
    state = START | changes
    _refuse(state)
    return state


def _refuse(state: dict) -> None:
    kind, bits, size, outlier = (state[name] for name in START)
    if kind not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}")
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
    if kind in CODEBOOKS and bits != 4:
        raise ValueError(f"{kind} has codes of 4 bits, got bits={bits}")
    if type(size) is not int or size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {size!r}")
    if type(outlier) not in (int, float) or not 0 <= outlier <= FARTHEST:
        raise ValueError(f"outlier must be from 0 to {FARTHEST} standard deviations, got {outlier!r}")


def weights(state: dict) -> np.ndarray:
    """float32 (1536,), the marked one where the state puts it."""
    w = (_trained() * UNIT).astype(np.float32)
    if state["outlier"]:
        w[MARKED] = state["outlier"] * _sigma()
    return w


def rounding(state: dict) -> tuple[np.ndarray, np.ndarray]:
    """Each group's levels, float32 (groups, levels), and the nearest one's index, int (groups, group_size).

    All arithmetic is that of float32, division and product rounded to nearest, and a scale is rounded to float16 before it
    is used (NF4's is float32, as in bitsandbytes). Integer codes are round(w / scale), half to even, then a zero point is
    added and the sum clamped. A codebook's are the entry nearest to w / scale (NF4: to w times 1 / scale, as bitsandbytes
    has it); halfway, NF4 takes the lower one, FP4 the even one.
    """
    _refuse(state)
    w, kind, bits = weights(state).reshape(-1, state["group_size"]), state["format"], state["bits"]
    low, high = w.min(1, keepdims=True).clip(max=0), w.max(1, keepdims=True).clip(min=0)
    largest = np.maximum(-low, high)
    if kind in CODEBOOKS:
        book = np.array(CODEBOOKS[kind], np.float32)
        middles = (book[1:] + book[:-1]) / 2
        if kind == "nf4":
            return book * largest, np.searchsorted(middles, w * (1 / largest))
        scale = (largest / np.float32(6)).astype(np.float16).astype(np.float32)
        index = np.searchsorted(middles, w / scale)
        index += (w / scale == np.append(middles, np.inf)[index]) & (index % 2 == 0)
        return book * scale, index
    steps = 2**bits - (2 if kind == "absmax" else 1)
    width = largest / np.float32(steps // 2) if kind == "absmax" else (high - low) / np.float32(steps)
    scale = width.astype(np.float16).astype(np.float32)
    zero = np.full_like(scale, steps // 2) if kind == "absmax" else np.rint(-low / scale)
    index = (np.rint(w / scale) + zero).clip(0, steps).astype(int)
    return (np.arange(steps + 1, dtype=np.float32) - zero) * scale, index


def numbers(state: dict) -> dict[str, float | None]:
    """Bits a weight with all that is stored, signal to error in decibels, and errors (root mean square) in standard
    deviations. `marked` is the group of the marked weight. Raises ValueError for a state that cannot be."""
    levels, index = rounding(state)
    size, group = state["group_size"], MARKED // state["group_size"]
    w, w_hat = weights(state).reshape(-1, size).astype(float), np.take_along_axis(levels, index, 1).astype(float)
    error, others = (w - w_hat) ** 2, w.size - size
    overhead = {"absmax": 16, "affine": 16 + 8, "nf4": 32, "fp4": 16}[state["format"]]

    def rms(total: float, n: int) -> float:
        return float(np.sqrt(total / n) / _sigma())

    return {
        "bits_per_weight": state["bits"] + overhead / size,
        "rms_error": rms(error.sum(), w.size),
        "snr_db": float(10 * np.log10((w**2).sum() / error.sum())),
        "rms_error_marked": rms(error[group].sum(), size),
        "rms_error_elsewhere": rms(error.sum() - error[group].sum(), others) if others else None,
        "levels": levels.shape[1],
        "levels_used": len(np.unique(index[group])),
        "zeros": float((w_hat == 0).mean()),
    }


def draw(state: dict):
    """The still: the weights under the grid of the marked weight's group, and below it the grids of the groups."""
    import matplotlib.pyplot as plt

    from tinylm.plot import BLUE, MUTED, VERMILION, legible

    q, sigma, size = numbers(state), _sigma(), state["group_size"]
    levels, index = rounding(state)
    levels, group, n = levels / sigma, MARKED // size, len(levels)
    first = max(0, min(group - WINDOW // 3, n - WINDOW))
    shown = range(first, min(n, first + WINDOW))
    x = weights(state) / sigma
    figure, (top, rails) = plt.subplots(2, 1, sharex=True, figsize=(7.2, 4.4), height_ratios=(1.25, 1))
    top.hist(x, np.arange(-6, 16.51, 0.25), color=MUTED, alpha=0.55)
    used = np.isin(np.arange(levels.shape[1]), index[group])
    for chosen, alpha in ((used, 1.0), (~used, 0.35)):
        top.vlines(levels[group, chosen], 0, 150, color=VERMILION, lw=1.2 if q["levels"] < 40 else 0.4, alpha=alpha)
    top.plot(x[MARKED], 168, "o", color=VERMILION, ms=5, clip_on=False)
    top.vlines(x[MARKED], 0, 168, color=VERMILION, lw=1.2, ls=(0, (2, 2)))
    where = f"the marked weight, {x[MARKED]:.1f} σ" if state["outlier"] else "the marked weight, as trained"
    top.annotate(
        where, (x[MARKED], 168), xytext=(-8 if x[MARKED] > 5 else 8, 0), textcoords="offset points", va="center",
        ha="right" if x[MARKED] > 5 else "left", fontsize=9, color=legible(VERMILION),
    )  # fmt: skip
    top.set(ylabel="weights", ylim=(0, 180), title=f"{x.size:,} weights, and the levels of the marked one's group")
    top.tick_params(labelbottom=False)
    for row, i in enumerate(shown):
        color = VERMILION if i == group else BLUE
        rails.vlines(levels[i], row - 0.36, row + 0.36, color=color, lw=1.2 if q["levels"] < 40 else 0.4)
    rails.set(xlim=(-6, 16.5), ylim=(len(shown) - 0.4, -0.6), yticks=[], xlabel="standard deviations σ of the weights")
    rails.set_xticks(range(-5, 16, 5))
    rails.grid(False)
    rails.set_title(_groups(n, size, len(shown)) + (", the marked one in orange" if n > 1 else ""))
    rails.spines["left"].set_visible(False)
    elsewhere = "" if q["rms_error_elsewhere"] is None else f" and {q['rms_error_elsewhere']:.2g} σ elsewhere"
    alt = (
        f"A histogram of {x.size:,} weights of {MATRIX}, bell-shaped within 5 standard deviations σ of zero, under the levels "
        f"of a grid: {FORMATS[state['format']]}, {state['bits']} bits. {where.capitalize()}; its group's {q['levels']} levels "
        f"run from {levels[group, 0]:.1f} to {levels[group, -1]:.1f} σ, and its weights use {q['levels_used']} of them. Below, "
        f"{_groups(n, size, len(shown)).lower()}. The error is {q['rms_error']:.2g} σ, {q['rms_error_marked']:.2g} σ in the "
        f"marked group{elsewhere}; {q['snr_db']:.1f} dB at {q['bits_per_weight']:.3g} bits a weight."
    )
    return figure, alt


def _groups(n: int, size: int, shown: int) -> str:
    if n == 1:
        return f"One grid for all {size:,} weights"
    return f"A grid for each {size} weights: {n} groups" + (f", {shown} of them shown" if shown < n else "")
