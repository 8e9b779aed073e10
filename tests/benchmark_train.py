"""Training speed beside transformers.LlamaForCausalLM: python tests/benchmark_train.py [30k 200k 800k 2m] [--quick]

Both models have the same weights at the start, see the same batches, return the same loss (asserted) and are trained by
the same step: fused AdamW with decay on matrices only, clipping, the loss read back. The contenders take turns step by
step, so that a change of the machine's speed falls on all of them; medians and interquartile ranges over the steps. The
ratio (above 1: ours is faster) is the median over the turns of their seconds by ours, taken in the same turn.
The peak is that of a float32 matrix product large enough to be compute-bound, timed in between the steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaForCausalLM

from tinylm.checkpoint import to_hf
from tinylm.data import VOCAB_SIZE, random_windows, shakespeare
from tinylm.device import describe
from tinylm.files import replacing
from tinylm.model import Config, TinyLlama
from tinylm.train import TrainConfig, make_optimizer

SIZES = {  # model, batch size, window, timed steps
    "30k": (Config(VOCAB_SIZE, 32, 2, 2, hidden_dim=96), 16, 128, 200),
    "200k": (Config(VOCAB_SIZE, 64, 4, 4, hidden_dim=192), 16, 128, 80),
    "800k": (Config(VOCAB_SIZE, 128, 4, 4, hidden_dim=384), 16, 256, 24),
    "2m": (Config(VOCAB_SIZE, 192, 5, 6, hidden_dim=512), 16, 256, 16),
}
WARM_UP = 5
PEAK_SIZE = 2048


def stepper(model, loss_of):
    """One optimizer step as `tinylm.train.train` does it, without its bookkeeping."""
    recipe = TrainConfig(steps=1)
    optimizer, parameters = make_optimizer(model, recipe), list(model.parameters())

    def step(window) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        value = loss.item()
        optimizer.step()
        return value

    return step


def contenders(config: Config) -> dict:
    """Name to step function; all start from the same weights."""
    torch.manual_seed(0)
    first = TinyLlama(config)
    steps = {}
    with tempfile.TemporaryDirectory() as folder:
        to_hf(first, folder)
        for name, wrap in (("eager", lambda f: f), ("compiled", torch.compile)):
            ours = TinyLlama(config)
            ours.load_state_dict(first.state_dict())
            theirs = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").train()

            def loss_of(window, model=theirs):
                logits = model(window[:, :-1], use_cache=False).logits
                return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())

            steps["ours", name] = stepper(ours, wrap(ours.loss))
            steps["theirs", name] = stepper(theirs, wrap(loss_of))
    return steps


def measure(config: Config, batch_size: int, seq_len: int, n: int, bar: tqdm) -> tuple[dict, list[float]]:
    """Seconds of every step of every contender, and of one matrix product between them."""
    torch._dynamo.reset()  # else a second size is compiled with dynamic shapes, unlike a user's first
    tokens, steps = shakespeare().train_tokens, contenders(config)
    windows = [random_windows(tokens, batch_size, seq_len, seed) for seed in range(WARM_UP + n)]
    for i, window in enumerate(windows[:WARM_UP]):
        losses = [step(window) for step in steps.values()]
        assert max(losses) - min(losses) < 1e-3, f"step {i}: the losses differ, {losses}"
        bar.update()
    a, b = torch.randn(2, PEAK_SIZE, PEAK_SIZE)
    torch.mm(a, b)
    times, products = {key: [] for key in steps}, []
    for i, window in enumerate(windows[WARM_UP:]):
        for key, step in steps.items():
            started = time.perf_counter()
            step(window)
            times[key].append(time.perf_counter() - started)
        if i % max(1, n // 16) == 0:
            started = time.perf_counter()
            torch.mm(a, b)
            products.append(time.perf_counter() - started)
        bar.update()
    return times, products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="a quarter of the steps")
    parser.add_argument("--out", type=Path, help="a file to write the table to as well")
    arguments = parser.parse_args()
    if unknown := set(arguments.sizes) - set(SIZES):
        parser.error(f"unknown sizes {sorted(unknown)}; choose from {', '.join(SIZES)}")
    plan = {size: SIZES[size] for size in arguments.sizes}
    if arguments.quick:
        plan = {size: (*rest, max(8, n // 4)) for size, (*rest, n) in plan.items()}
    lines = [
        "thousand tokens per second, medians; ratios with quartiles; share of peak",
        f"{'':15}{'ours':>7}{'library':>9}   {'ratio':18}{'of peak':>7}   to library eager",
    ]
    with tqdm(total=sum(WARM_UP + n for *_, n in plan.values()), unit="step") as bar:
        for size, (config, batch_size, seq_len, n) in plan.items():
            times, products = measure(config, batch_size, seq_len, n, bar)
            peak = 2 * PEAK_SIZE**3 / statistics.median(products)
            for mode in ("eager", "compiled"):
                ours, theirs = (statistics.median(times[who, mode]) for who in ("ours", "theirs"))
                speeds = [batch_size * seq_len / seconds / 1e3 for seconds in (ours, theirs)]
                share = batch_size * config.train_flops(seq_len) / ours / peak
                ratio = ratios(times["theirs", mode], times["ours", mode])
                plain = ratios(times["theirs", "eager"], times["ours", mode]) if mode == "compiled" else ""
                row = f"{speeds[0]:7.1f}{speeds[1]:9.1f}   {ratio:18}{share:7.0%}   {plain}"
                lines.append(f"{size:5} {mode:9}{row}".rstrip())
            lines.append(f"{size:5} {config.n_params():,} parameters; peak {peak / 1e9:.0f} GFLOP/s")
    lines.append("operations counted with attention's whole square, as PyTorch's counter does")
    lines.append(", ".join(f"{k} {v}" for k, v in describe().items()))
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if arguments.out:
        with replacing(arguments.out) as temporary:
            temporary.write_text(text, encoding="utf-8")


def ratios(theirs: list[float], ours: list[float]) -> str:
    """The median and quartiles of theirs / ours, turn by turn."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(theirs, ours, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    main()
