"""What does training against the rounding win back? Two bits and three levels, beside the float model trained as long.

    python labs/tinylm/assets/experiments/02_qat/run.py

Interrupted, it goes on where it was. Prints each run's loss above the shipped model's, paired on the same windows. About
a quarter of an hour on one core.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinylm import checkpoint, data
from tinylm.model import TinyLlama
from tinylm.runs import run_all
from tinylm.train import TrainConfig, train

HERE = Path(__file__).parent
SEQ_LEN, EVERY = 256, 12  # every twelfth window of the held-out plays, as in the lab
LR = {"none": 3e-4, "two bits": 1e-3, "ternary": 2e-3}  # each arm's best of the trials that the card names
CONFIGS = [
    *({"rounding": name, "steps": 250, "lr": lr, "seed": seed} for seed in range(3) for name, lr in LR.items()),
    *({"rounding": name, "steps": 6, "lr": lr, "seed": 0} for name, lr in LR.items()),  # cheap to run again
]


def round_levels(w: Tensor, step: Tensor, n: int) -> Tensor:
    """The nearest of n levels, `step` apart and symmetric about zero."""
    middle = (n - 1) / 2
    return ((w / step + middle).round().clamp(0, n - 1) - middle) * step


def two_bits(w: Tensor) -> Tensor:
    """Four levels, as far apart as a group of 32 is large (root mean square, 16 bits). w: (o, i)."""
    groups = w.unflatten(1, (-1, 32))
    step = groups.square().mean(-1, keepdim=True).sqrt().clamp(min=2**-14).half().float()
    return round_levels(groups, step, 4).flatten(1)


def ternary(w: Tensor) -> Tensor:
    """Three levels, as far apart as the matrix's mean magnitude (BitNet b1.58, Ma et al. 2024). w: (o, i)."""
    return round_levels(w, w.abs().mean().clamp(min=2**-14).half().float(), 3)


ROUNDINGS = {"two bits": two_bits, "ternary": ternary}


class StraightThrough(nn.Module):
    """The rounded weights on the way forward, the gradient as if they had not been (Bengio et al. 2013)."""

    def __init__(self, rounding):
        super().__init__()
        self.rounding = rounding

    def forward(self, w: Tensor) -> Tensor:
        return self.rounding(w.detach()) + (w - w.detach())  # plus an exact zero, whose gradient is 1


@torch.no_grad()
def log_probabilities(model: TinyLlama, windows: Tensor) -> Tensor:
    """(n, t, v) of windows (n, t + 1)."""
    return torch.cat([model(part[:, :-1]).log_softmax(-1) for part in windows.split(32)])


def compare(log_q: Tensor, log_p: Tensor, windows: Tensor) -> dict:
    """How far q is from p: loss difference in nats, paired by windows, KL(p || q), share of equal likeliest tokens."""
    losses, float_losses = (-x.gather(-1, windows[:, 1:, None]).mean((1, 2)) for x in (log_q, log_p))
    difference = losses - float_losses
    return {
        "loss": losses.mean().item(),
        "difference": difference.mean().item(),
        "standard_error": (difference.std() / len(windows) ** 0.5).item(),
        "kl": ((log_p - log_q) * log_p.exp()).sum(-1).mean().item(),
        "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item(),
        "window_losses": [round(x, 5) for x in losses.tolist()],
    }


def one_run(config: dict) -> dict:
    corpus, model = data.shakespeare(), checkpoint.load("shakespeare-800k")
    windows = data.fixed_windows(corpus.val_tokens, SEQ_LEN)[::EVERY]
    log_p = log_probabilities(model, windows)
    if config["rounding"] != "none":
        for layer in model.blocks.modules():
            if isinstance(layer, nn.Linear):
                parametrize.register_parametrization(layer, "weight", StraightThrough(ROUNDINGS[config["rounding"]]))
    untrained = compare(log_probabilities(model, windows), log_p, windows)
    recipe = TrainConfig(
        steps=config["steps"], batch_size=16, seq_len=SEQ_LEN, lr=config["lr"], weight_decay=0.0, seed=config["seed"]
    )
    history = train(model, corpus.train_tokens, recipe, progress=False)
    return {
        "tokens": history.tokens,
        "flops": history.flops,
        **compare(log_probabilities(model, windows), log_p, windows),
        "untrained": untrained["difference"],
        "curve": [round(x.mean().item(), 4) for x in torch.tensor(history.loss).split(10)],
    }


if __name__ == "__main__":
    for record in run_all(CONFIGS, one_run, HERE):
        print(
            f"{record['config']['rounding']:10}{record['config']['steps']:5} steps, seed {record['seed']}: "
            f"{record['untrained']:+.4f} before training, {record['difference']:+.4f} +- {record['standard_error']:.4f} after"
        )
