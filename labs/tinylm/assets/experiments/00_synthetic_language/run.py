"""Does the synthetic language keep rewarding larger models? Five sizes over two and a half decades, the same tokens each.

    python labs/tinylm/assets/experiments/00_synthetic_language/run.py

Interrupted, it goes on where it was. Prints the excess of each model's loss over the exact floor. About six minutes on
two cores.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tinylm.data import SyntheticLanguage
from tinylm.model import Config, TinyLlama
from tinylm.runs import run_all
from tinylm.train import TrainConfig, train, window_losses

HERE = Path(__file__).parent
SEQ_LEN, BATCH, STEPS = 128, 32, 600
SHAPES = [  # (dim, layers, heads, hidden, learning rate)
    (8, 1, 1, 24, 3e-2),
    (16, 2, 1, 48, 2e-2),
    (32, 2, 2, 96, 1e-2),
    (64, 3, 4, 192, 6e-3),
    (128, 4, 4, 384, 4e-3),
]
CONFIGS = [
    {"dim": d, "n_layers": n, "n_heads": h, "hidden_dim": f, "lr": lr, "language": 0, "steps": STEPS, "seed": 0}
    for d, n, h, f, lr in SHAPES
]


def one_run(config: dict) -> dict:
    language = SyntheticLanguage(config["language"])
    shape = {k: config[k] for k in ("dim", "n_layers", "n_heads", "hidden_dim")}
    torch.manual_seed(config["seed"])
    model = TinyLlama(Config(language.vocab_size, max_len=SEQ_LEN, **shape))
    recipe = TrainConfig(
        steps=config["steps"], batch_size=BATCH, seq_len=SEQ_LEN, lr=config["lr"], seed=config["seed"]
    )
    history = train(model, language, recipe)
    # Windows of a seed that no training step has: the same 262,144 predictions for every model.
    losses = window_losses(model, language.batch(2048, SEQ_LEN, seed=2**40))
    return {
        "n_params": model.config.n_params(),
        "tokens": history.tokens,
        "flops": history.flops,
        "loss": losses.mean().item(),
        "standard_error": (losses.std() / len(losses) ** 0.5).item(),
        "floor": language.floor(SEQ_LEN),
    }


if __name__ == "__main__":
    for record in run_all(CONFIGS, one_run, HERE):
        excess, error = record["loss"] - record["floor"], record["standard_error"]
        print(f"{record['n_params']:>8,} parameters: {excess:.4f} +- {error:.4f} nats above the floor {record['floor']:.4f}")
