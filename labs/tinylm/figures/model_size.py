"""The figure model_size: what a model's shape costs, beside GPT-3, LLaMA and the course's own checkpoints."""

from __future__ import annotations

import math
from fractions import Fraction

from tinylm.model import Config

BITS = (32, 16, 8, 4.5)  # 4.5: four bits, and one 16-bit scale for 32 weights
LAPTOP = 64 * 10**9  # bytes, the notebook of claim 8

# Published shapes. LLaMA: Touvron et al. 2023, table 2, and the released models' MLP. GPT-3: Brown et al. 2020, table 2.1.
PUBLISHED = {
    "LLaMA 7B": {
        "block": "llama", "vocab_size": 32_000, "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
        "hidden_dim": 11_008, "tie_embeddings": False, "context": 2048, "tokens": 10**12,
    },
    "LLaMA 13B": {
        "block": "llama", "vocab_size": 32_000, "dim": 5120, "n_layers": 40, "n_heads": 40, "n_kv_heads": 40,
        "hidden_dim": 13_824, "tie_embeddings": False, "context": 2048, "tokens": 10**12,
    },
    "GPT-3 175B": {
        "block": "gpt3", "vocab_size": 50_257, "dim": 12_288, "n_layers": 96, "n_heads": 96, "n_kv_heads": 96,
        "hidden_dim": 4 * 12_288, "tie_embeddings": True, "context": 2048, "tokens": 3 * 10**11,
    },
}  # fmt: skip


def shapes() -> dict[str, dict]:
    """The course's checkpoints, from their cards, and the published models, smallest first."""
    from tinylm.checkpoint import read_card

    ours = {}
    for name in ("shakespeare-30k", "shakespeare-800k"):
        card = read_card(name)
        state = {key: card["config"][key] for key in PUBLISHED["LLaMA 7B"] if key in card["config"]}
        ours[name] = {"block": "llama", **state, "context": card["config"]["max_len"], "tokens": card["tokens"]}
    return ours | PUBLISHED


def data() -> dict:
    return {"bits": list(BITS), "laptop": LAPTOP, "shapes": [{"name": k, "state": v} for k, v in shapes().items()]}


def initial(like: str = "shakespeare-800k", **changes: object) -> dict:
    """The state of the shape named `like`, with changes.

    The fields are those of `Config`, and `context` (tokens), `tokens` (trained on) and `block`: "llama", or "gpt3" for
    GELU between two matrices, biases, LayerNorm and learned positions. `hidden_dim=None` follows the width.
    """
    known = shapes()
    if like not in known:
        raise ValueError(f"no shape is called {like!r}; there are {', '.join(known)}")
    if unknown := set(changes) - set(known[like]):
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; the state has {', '.join(known[like])}")
    state = known[like] | changes
    numbers(state)
    return state


def numbers(state: dict) -> dict[str, int]:
    """Counts of parameters, operations (FLOPs) and bytes. Raises ValueError for a shape that cannot be.

    Operations are those of the matrix products, with attention's whole square, as in `Config.forward_flops`.
    """
    if state["block"] not in ("llama", "gpt3"):
        raise ValueError(f"block must be 'llama' or 'gpt3', got {state['block']!r}")
    for name in set(state) - {"block", "tie_embeddings"}:
        if not (isinstance(state[name], int) and state[name] > 0 or name == "hidden_dim" and state[name] is None):
            raise ValueError(f"{name} must be a positive integer, got {state[name]!r}")
    out = (_llama if state["block"] == "llama" else _gpt3)(state)
    out["parameters_without_tables"] = out["parameters"] - out["tables"]
    out["train_flops"] = state["tokens"] * out["train_flops_per_token"]
    return out | {f"weight_bytes_{bits}": math.ceil(out["parameters"] * Fraction(bits) / 8) for bits in BITS}


def _llama(state: dict) -> dict[str, int]:
    fields = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "tie_embeddings")
    config, t = Config(**{name: state[name] for name in fields}), state["context"]
    mlp = 3 * config.n_layers * config.dim * config.hidden_dim
    tables = config.n_params() - config.n_params(embeddings=False)
    gains = (2 * config.n_layers + 1) * config.dim
    return {
        "parameters": config.n_params(),
        "tables": tables,
        "attention": config.n_params() - tables - mlp - gains,
        "mlp": mlp,
        "train_flops_per_token": config.train_flops(t) // t,
        "decode_flops": config.decode_flops(t),
        "kv_cache_bytes": config.kv_cache_bytes(t, bytes_per_value=2),
    }


def _gpt3(state: dict) -> dict[str, int]:
    """As Brown et al. (2020) build it: every matrix has a bias, one table serves both ends, positions are a second table."""
    v, c, n, t = (state[name] for name in ("vocab_size", "dim", "n_layers", "context"))
    f = 4 * c if state["hidden_dim"] is None else state["hidden_dim"]
    if c % state["n_heads"] or state["n_kv_heads"] != state["n_heads"] or not state["tie_embeddings"]:
        raise ValueError("GPT-3's shape has dim a multiple of n_heads, n_kv_heads equal to n_heads, and a tied table")
    attention, mlp, tables = 4 * n * c * c, 2 * n * c * f, (v + t) * c
    biases_and_norms = n * (4 * c + f + c + 4 * c) + 2 * c
    forward = 2 * (attention + mlp + v * c) + 4 * n * t * c
    return {
        "parameters": attention + mlp + tables + biases_and_norms,
        "tables": tables,
        "attention": attention,
        "mlp": mlp,
        "train_flops_per_token": 3 * forward,
        "decode_flops": forward,
        "kv_cache_bytes": 2 * n * c * t * 2,
    }


def in_bytes(n: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} bytes"


def draw(state: dict):
    """The still: where the parameters are, and the memory of the weights beside models that the reader knows."""
    import matplotlib.pyplot as plt

    from tinylm.plot import BLUE, GREEN, INK, MUTED, ORANGE, VERMILION, legible

    chosen = numbers(state)
    figure, (bar, ruler) = plt.subplots(2, 1, figsize=(7.2, 3.9), height_ratios=(0.5, 3))
    parts = {"tables": ORANGE, "attention": BLUE, "mlp": GREEN}
    names = {"tables": "tables", "attention": "attention", "mlp": "MLP"}
    shares = {part: chosen[part] / chosen["parameters"] for part in parts}
    left = 0.0
    for i, (part, color) in enumerate(parts.items()):
        bar.barh(0, shares[part], left=left, color=color, height=1)
        left += shares[part]
        text = f"{names[part]} {shares[part]:.1%}".replace("%", " %")
        bar.text((0, 0.5, 1)[i], -1.15, text, color=legible(color), fontsize=9, ha=("left", "center", "right")[i], va="center")
    bar.set(xlim=(0, 1), ylim=(-1.6, 0.5), title=f"Where the {chosen['parameters']:,} parameters are")
    bar.axis("off")

    rows = {"this shape": chosen} | {name: numbers(shape) for name, shape in shapes().items()}
    for y, (name, row) in enumerate(rows.items()):
        color = VERMILION if y == 0 else INK
        weights, cache = [row[f"weight_bytes_{bits}"] for bits in BITS], row["kv_cache_bytes"]
        ruler.plot([weights[-1], weights[0]], [y, y], color=color, lw=1)
        ruler.plot(weights, [y] * len(BITS), "o", color=color, ms=5)
        ruler.plot(cache, y, "D", mfc=figure.get_facecolor(), mec=color, ms=5)
        right = weights[0] < 1e8
        edge = max(*weights, cache) if right else min(*weights, cache)
        ruler.annotate(
            name, (edge, y), xytext=(8 if right else -8, 0), textcoords="offset points", ha="left" if right else "right",
            va="center", fontsize=9, color=legible(color),
        )  # fmt: skip
    ruler.axvline(LAPTOP, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=0)
    ruler.annotate(
        "64 GB laptop", (LAPTOP, -0.75), xytext=(-4, 0), textcoords="offset points", ha="right", va="center", fontsize=8.5,
        color=legible(MUTED),
    )  # fmt: skip
    ruler.set(xscale="log", xlim=(1e3, 1e13), ylim=(len(rows) - 0.4, -1.2), yticks=[])
    ruler.set_xticks([1e3, 1e6, 1e9, 1e12], ["1 kB", "1 MB", "1 GB", "1 TB"])
    ruler.spines["left"].set_visible(False)
    ruler.set_title("Weights at 4.5, 8, 16 and 32 bits (dots) and KV cache at 16 bits (diamonds)")
    fits = ", ".join(
        f"{name} {in_bytes(row['weight_bytes_4.5'])} to {in_bytes(row['weight_bytes_32'])}" for name, row in rows.items()
    )
    alt = (
        f"A bar: of {chosen['parameters']:,} parameters, {shares['tables']:.1%} are in the tables, "
        f"{shares['attention']:.1%} in attention and {shares['mlp']:.1%} in the MLP. Below it, a logarithmic ruler of "
        f"memory, with a line at 64 GB. Weights from 4.5 to 32 bits: {fits}."
    )
    return figure, alt.replace("%", " %")
