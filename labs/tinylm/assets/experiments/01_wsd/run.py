"""What is a run's loss at each of its lengths? Constant-rate trunks, and from each a branch that cools down for every length.

    python labs/tinylm/assets/experiments/01_wsd/run.py [--jobs 2]

Interrupted, it goes on where it was. Prints what the cooldown gave. About five minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import torch
from torch import Tensor

from tinylm import sweep
from tinylm.data import VOCAB_SIZE, random_windows
from tinylm.model import Config, TinyLlama
from tinylm.runs import run_all
from tinylm.train import TrainConfig, make_optimizer, window_losses

HERE = Path(__file__).parent
SEQ_LEN, BATCH_SIZE = 128, 8  # 1,024 tokens a step, whatever the length
WARMUP, COOLDOWN = 50, 0.2  # steps of the trunk; share of a branch's length
SHORTEST = 100  # steps of the shortest branch; the others double it
LR = 0.36  # learning rate times width; the card has the trials
TABLE_STD = 0.1  # the embedding's deviation at the start, as in the sweep
SHAPES = {  # as in the sweep: dim, n_layers, n_heads, hidden_dim
    "w8": (8, 2, 1, 24),
    "w12": (12, 2, 1, 36),
    "w16": (16, 2, 1, 48),
    "w24": (24, 2, 1, 72),
    "w32": (32, 2, 2, 96),
    "w40": (40, 2, 2, 120),
    "w48x3": (48, 3, 3, 144),
    "w64": (64, 3, 4, 192),
}


def trunk(shape: str, steps: int, seed: int) -> dict:
    """A config for `one_run`: a trunk of so many steps, branches at all halves of it."""
    dim, n_layers, n_heads, hidden_dim = SHAPES[shape]
    model = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "hidden_dim": hidden_dim}
    training = {"seq_len": SEQ_LEN, "batch_size": BATCH_SIZE, "lr": float(f"{LR / dim:.4g}"), "table_std": TABLE_STD}
    schedule = {"steps": steps, "shortest": SHORTEST, "warmup": WARMUP, "cooldown": COOLDOWN}
    return {"corpus": "shakespeare", **model, **training, **schedule, "seed": seed}


CONFIGS = [  # the long ones first, so that two processes end together
    trunk("w48x3", 3200, 0),
    trunk("w64", 1600, 0),
    *(trunk(shape, 3200, seed) for shape in ("w40", "w32", "w24", "w16", "w12", "w8") for seed in range(2)),
    *({**trunk(shape, 40, 0), "shortest": 10, "warmup": 10} for shape in ("w12", "w24")),  # cheap to run again
]


def rate(config: dict, step: int) -> float:
    """The trunk's learning rate: up in `warmup` steps, then constant."""
    return config["lr"] * min(1.0, (step + 1) / config["warmup"])


def cooled_rate(config: dict, step: int, start: int, end: int) -> float:
    """A branch's: from the trunk's at `start` to nothing after `end`, as 1 - sqrt of the way (Hägele et al. 2024)."""
    return rate(config, step) * (1 - math.sqrt((step + 1 - start) / (end + 1 - start)))


def update(
    model: TinyLlama, optimizer: torch.optim.Optimizer, tokens: Tensor, config: dict, step: int, lr: float
) -> None:
    """One step on the windows that a run of the sweep with this seed and batch size would see at it."""
    windows = random_windows(tokens, config["batch_size"], config["seq_len"], config["seed"] * 1_000_003 + step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    model.loss(windows).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def branch(
    model: TinyLlama, optimizer: torch.optim.Optimizer, tokens: Tensor, config: dict, start: int, end: int
) -> TinyLlama:
    """The model of a run that leaves the trunk at step `start` and is cold at `end`; model and optimizer stay as they are."""
    cooled = copy.deepcopy(model)
    its_optimizer = make_optimizer(cooled, TrainConfig(steps=1))
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(start, end):
        update(cooled, its_optimizer, tokens, config, step, cooled_rate(config, step, start, end))
    return cooled


def one_run(config: dict) -> dict:
    """Train a trunk with all its branches on one thread, and judge trunk and branch at each branch's end."""
    shape = Config(
        VOCAB_SIZE,
        config["dim"],
        config["n_layers"],
        config["n_heads"],
        hidden_dim=config["hidden_dim"],
        max_len=SEQ_LEN,
    )
    tokens, windows = sweep.corpus_of(config)
    ends = {config["steps"]}
    while min(ends) // 2 >= config["shortest"]:
        ends.add(min(ends) // 2)
    starts = {round((1 - config["cooldown"]) * end): end for end in ends}
    per_step = config["batch_size"] * config["seq_len"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(config["seed"])
        model = TinyLlama(shape)
        torch.nn.init.normal_(model.embed.weight, std=config["table_std"])
        optimizer = make_optimizer(model, TrainConfig(steps=1))
        branches = {}
        for step in range(config["steps"] + 1):
            if step in starts:
                end = starts[step]
                losses = window_losses(branch(model, optimizer, tokens, config, step, end), windows)
                branches[end] = {
                    "tokens": end * per_step,
                    "flops": end * config["batch_size"] * shape.train_flops(SEQ_LEN),
                    "loss": losses.mean().item(),
                    "standard_error": (losses.std() / len(losses) ** 0.5).item(),
                }
            if step in ends:
                branches[step]["trunk_loss"] = window_losses(model, windows).mean().item()
            if step < config["steps"]:
                update(model, optimizer, tokens, config, step, rate(config, step))
    finally:
        torch.set_num_threads(threads)
    steps = config["steps"] + sum(end - start for start, end in starts.items())
    return {
        "n_params": shape.n_params(),
        "n_params_without_embeddings": shape.n_params(embeddings=False),
        "steps": steps,
        "tokens": steps * per_step,  # of trunk and branches together
        "flops": steps * config["batch_size"] * shape.train_flops(SEQ_LEN),
        "loss": branches[config["steps"]]["loss"],  # of the longest
        "branches": [branches[end] for end in sorted(ends)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes on this machine")
    for record in run_all(CONFIGS, one_run, HERE, jobs=parser.parse_args().jobs):
        print(f"{record['n_params']:>7,} parameters, seed {record['seed']}")
        for b in record["branches"]:
            print(f"  {b['tokens']:>9,} tokens: {b['trunk_loss']:.4f} on the trunk, {b['loss']:.4f} cooled down")


if __name__ == "__main__":
    main()
