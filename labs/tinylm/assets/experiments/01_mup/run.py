"""Where is the best learning rate at widths 32 to 256, in the standard parametrisation and in muP?

    python labs/tinylm/assets/experiments/01_mup/run.py [--jobs 2]

Interrupted, it goes on where it was. Prints each basin, loss against learning rate. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from tinylm import data
from tinylm.model import Config, TinyLlama
from tinylm.runs import run_all
from tinylm.sweep import corpus_of, curve
from tinylm.train import TrainConfig, learning_rate, make_optimizer, window_losses

HERE = Path(__file__).parent
BASE_DIM, SEQ_LEN, BATCH_SIZE, STEPS, SEEDS = 32, 128, 8, 128, 2
TUNED, OWN = 0.16, 0.02  # deviation of the table at the start: the best found at width 32, and the model's own
GRIDS = {  # learning rates 2^k: both walls of each basin. At the base width muP is standard, so these runs stand for both
    ("standard", TUNED, 32): range(-9, -2),
    ("standard", TUNED, 64): range(-10, -3),
    ("standard", TUNED, 128): range(-10, -3),
    ("standard", TUNED, 256): range(-11, -4),
    ("muP", TUNED, 64): range(-9, -2),
    ("muP", TUNED, 128): range(-9, -2),
    ("muP", TUNED, 256): range(-8, -2),
    ("standard", OWN, 32): range(-8, -3),
    ("standard", OWN, 64): range(-9, -4),
    ("standard", OWN, 128): range(-10, -5),
    ("muP", OWN, 64): range(-8, -3),
    ("muP", OWN, 128): range(-8, -3),
}
CHEAP = [  # to be run again by a test
    {"parametrisation": name, "table_std": TUNED, "dim": 64, "lr": 2.0**-6, "steps": 8, "seed": 0}
    for name in ("standard", "muP")
]
CONFIGS = CHEAP + [
    {"parametrisation": name, "table_std": std, "dim": dim, "lr": 2.0**k, "steps": STEPS, "seed": seed}
    for (name, std, dim), exponents in GRIDS.items()
    for k in exponents
    for seed in range(SEEDS)
]


class MuLlama(TinyLlama):
    """TinyLlama with its logits multiplied by base_dim / dim, for tied tables (Yang et al. 2022, table 8)."""

    def __init__(self, config: Config, base_dim: int):
        super().__init__(config)
        self.head_scale = base_dim / config.dim

    def forward(self, tokens: Tensor, cache: list | None = None) -> Tensor:
        return self.head_scale * super().forward(tokens, cache)


def mup_groups(model: TinyLlama, base_dim: int, lr: float, weight_decay: float = 0.1) -> list[dict]:
    """Parameter groups for AdamW under muP (Yang et al. 2022, table 8).

    base_dim: the width at which lr was tuned. Decay is kept the same in lr * weight_decay, the share that a step takes off.
    """
    m = model.config.dim / base_dim
    named = list(model.named_parameters())
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    tables = [p for n, p in named if p.ndim == 2 and not n.startswith("blocks.")]
    gains = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": tables, "lr": lr, "weight_decay": weight_decay},
        {"params": matrices, "lr": lr / m, "weight_decay": weight_decay * m},
        {"params": gains, "lr": lr, "weight_decay": 0.0},
    ]


def mup_init_(model: TinyLlama, table_std: float) -> None:
    """Give the table's entries a deviation, the same at every width.

    The matrices have 1 / sqrt(fan in) already, as muP wants them.
    """
    with torch.no_grad():
        model.embed.weight.mul_(table_std / 0.02)


def shape_of(config: dict) -> Config:
    dim = config["dim"]
    return Config(data.VOCAB_SIZE, dim, n_layers=2, n_heads=dim // 16, hidden_dim=3 * dim, max_len=SEQ_LEN)


def prepare(config: dict, recipe: TrainConfig) -> tuple[TinyLlama, torch.optim.Optimizer]:
    torch.manual_seed(recipe.seed)
    if config["parametrisation"] == "standard":
        model = TinyLlama(shape_of(config))
        optimizer = make_optimizer(model, recipe)
    else:
        model = MuLlama(shape_of(config), BASE_DIM)
        groups = mup_groups(model, BASE_DIM, recipe.lr, recipe.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=recipe.betas, fused=True)
    mup_init_(model, config["table_std"])
    return model, optimizer


def fit(model: TinyLlama, optimizer: torch.optim.Optimizer, tokens: Tensor, recipe: TrainConfig) -> list[float]:
    """The steps of `tinylm.train.train`, but each group of parameters keeps its own share of the learning rate.

    Returns the loss of each step. Raises FloatingPointError when one is not finite, or its gradient.
    """
    total, losses = recipe.total_steps(model.config), []
    shares = [group["lr"] / recipe.lr for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(total):
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = share * learning_rate(recipe, step, total)
        window = data.random_windows(tokens, recipe.batch_size, recipe.seq_len, recipe.seed * 1_000_003 + step)
        optimizer.zero_grad(set_to_none=True)
        loss = model.loss(window)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip).item()
        losses.append(loss.item())
        if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            raise FloatingPointError(f"the loss is {losses[-1]} and its gradient's norm {norm} at step {step}")
        optimizer.step()
    return losses


def one_run(config: dict) -> dict:
    """Train on one thread and judge. A run that diverges has the loss of a uniform guess, and says so."""
    recipe = TrainConfig(
        steps=config["steps"], batch_size=BATCH_SIZE, seq_len=SEQ_LEN, lr=config["lr"], seed=config["seed"]
    )
    tokens, windows = corpus_of({"corpus": "shakespeare", "seq_len": SEQ_LEN})
    model, optimizer = prepare(config, recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = fit(model, optimizer, tokens, recipe)
        losses = window_losses(model, windows)
    except FloatingPointError:
        steps, losses = [], torch.full((len(windows),), math.inf)
    finally:
        torch.set_num_threads(threads)
    diverged = not losses.isfinite().all().item()
    if diverged:
        losses.fill_(math.log(data.VOCAB_SIZE))
    trained = recipe.total_steps(model.config) * BATCH_SIZE
    return {
        "n_params": model.config.n_params(),
        "tokens": trained * SEQ_LEN,
        "flops": trained * model.config.train_flops(SEQ_LEN),
        "loss": losses.mean().item(),
        "standard_error": (losses.std() / len(losses) ** 0.5).item(),
        "diverged": diverged,
        "curve": curve(steps, BATCH_SIZE * SEQ_LEN, points=12) if steps else [],
    }


def cost(config: dict) -> float:
    """Counted operations of a run."""
    return config["steps"] * BATCH_SIZE * shape_of(config).train_flops(SEQ_LEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    records = run_all(sorted(CONFIGS, key=cost), one_run, HERE, jobs=parser.parse_args().jobs, cost=cost)
    for (name, std, dim), exponents in GRIDS.items():
        print(f"{name}, table {std}, width {dim}")
        for k in exponents:
            wanted = {"parametrisation": name, "table_std": std, "dim": dim, "lr": 2.0**k, "steps": STEPS}
            runs = [r for r in records if wanted.items() <= r["config"].items()]
            print(f"  2^{k:3}: " + "  ".join(f"{r['loss']:.4f}" + " diverged" * r["diverged"] for r in runs))


if __name__ == "__main__":
    main()
