"""The training loop: AdamW, warm-up and cosine, clipping, exact resumption."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from tinylm.data import fixed_windows, random_windows
from tinylm.files import replacing
from tinylm.model import Config, TinyLlama


class Stream(Protocol):
    """Anything that deals out windows, such as a SyntheticLanguage."""

    def batch(self, batch_size: int, seq_len: int, seed: int) -> Tensor: ...


def budget_fraction() -> float:
    """The share of every training budget that is really spent: the environment variable TINYLM_BUDGET, 1 by default.

    Quick runs of a lab set it below 1; claims about trained numbers are only asserted at 1.
    """
    text = os.environ.get("TINYLM_BUDGET", "1")
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction <= 1:
        raise ValueError(f"TINYLM_BUDGET must be a number in (0, 1], got {text!r}")
    return fraction


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Give exactly one budget: `steps`, `tokens`, or `flops` (counted as Config.train_flops does)."""

    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    batch_size: int = 16
    seq_len: int = 128
    lr: float = 4e-3
    warmup: float = 0.05  # share of the steps
    final_lr: float = 0.05  # share of lr that the cosine ends at
    weight_decay: float = 0.1  # on matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest gradient norm
    eval_every: int = 0  # steps; 0 evaluates only at the end
    seed: int = 0

    def __post_init__(self):
        budgets = {k: v for k in ("steps", "tokens", "flops") if (v := getattr(self, k)) is not None}
        if len(budgets) != 1:
            raise ValueError(f"give exactly one budget of steps, tokens or flops, got {budgets or 'none'}")
        positive = {**budgets, "batch_size": self.batch_size, "seq_len": self.seq_len, "lr": self.lr, "clip": self.clip}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("warmup", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")

    def total_steps(self, model: Config) -> int:
        """The budget in optimizer steps of a model of this shape, at least one."""
        per_step = self.batch_size * self.seq_len
        if self.flops is not None:
            steps = self.flops / (self.batch_size * model.train_flops(self.seq_len))
        else:
            steps = self.steps if self.steps is not None else self.tokens / per_step
        return max(1, round(steps * budget_fraction()))


@dataclass
class History:
    """What a run did. Losses are in nats per token; `val` holds (step, loss) pairs."""

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    loss: list[float] = field(default_factory=list)
    val: list[tuple[int, float]] = field(default_factory=list)

    @property
    def val_loss(self) -> float:
        return self.val[-1][1] if self.val else math.nan


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine down to `final_lr * lr`."""
    warm = max(1, round(config.warmup * total))
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(1, total - warm)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices and none on gains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


@torch.no_grad()
def window_losses(model: TinyLlama, windows: Tensor, batch_size: int = 32) -> Tensor:
    """Mean loss of each window, (n,) float32 nats per token. windows: (n, t + 1), see `fixed_windows`.

    One number a window, so that two models can be compared in pairs.
    """
    losses = []
    for w in windows.split(batch_size):
        w = w.to(model.embed.weight.device)
        logits = model(w[:, :-1])
        losses.append(
            torch.nn.functional.cross_entropy(logits.transpose(1, 2), w[:, 1:], reduction="none").mean(-1).cpu()
        )
    return torch.cat(losses)


def evaluate(model: TinyLlama, tokens: Tensor, seq_len: int | None = None, limit: int | None = None) -> float:
    """Mean loss, nats per token, over consecutive windows whose targets do not overlap (the first `limit` of them)."""
    seq_len = seq_len or model.config.max_len
    windows = fixed_windows(tokens, seq_len, limit)
    if not len(windows):
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {seq_len} + 1")
    return window_losses(model, windows).mean().item()


def train(
    model: TinyLlama,
    data: Tensor | Stream,
    config: TrainConfig,
    val: Tensor | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
    compile: bool = False,
    eval_windows: int | None = 64,
    on_step: Callable[[int], None] | None = None,
) -> History:
    """Train `model` in place and return its history.

    data: token ids (n,) int64, or an object with `batch(batch_size, seq_len, seed)`. val: token ids (n,) or None.
    The batch of step i depends on (seed, i) alone, so a run is deterministic on one machine. With `checkpoint` (a file
    path) the state is written there every `checkpoint_seconds` and at the end, atomically; after an interruption a later
    call with the same arguments goes on from it and ends with the same weights as an uninterrupted run. The history's
    validation losses are over the first `eval_windows` windows of `val` (None: all), so put there what should count.

    Raises ValueError before any work for a corpus too short or out of vocabulary, a `seq_len` beyond `max_len` or a
    checkpoint of another run, and FloatingPointError when the loss or its gradient is not finite.
    """
    _refuse_bad_input(model, data, config, val)
    total = config.total_steps(model.config)
    device = model.embed.weight.device
    optimizer = make_optimizer(model, config)
    history = History()
    run = _fingerprint(model, data, config, total)
    if checkpoint is not None and Path(checkpoint).exists():
        history = _load_state(Path(checkpoint), model, optimizer, run)
    if history.steps >= total:
        return history
    loss_of = torch.compile(model.loss) if compile else model.loss
    model.train()
    started, saved = time.monotonic() - history.seconds, time.monotonic()
    bar = tqdm(total=total, initial=history.steps, disable=not progress, unit="step", mininterval=1.0)
    try:
        while history.steps < total:
            step = history.steps
            window = _batch(data, config, step).to(device)
            value = _step(loss_of, window, optimizer, config, learning_rate(config, step, total), step)
            history.loss.append(value)
            history.steps = step + 1
            history.tokens += window.shape[0] * config.seq_len
            history.flops += window.shape[0] * model.config.train_flops(config.seq_len)
            last = history.steps == total
            if val is not None and (last or config.eval_every and history.steps % config.eval_every == 0):
                history.val.append((history.steps, evaluate(model, val, config.seq_len, eval_windows)))
            history.seconds = time.monotonic() - started
            bar.update()
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            if on_step is not None:
                on_step(history.steps)
            if checkpoint is not None and (last or time.monotonic() - saved > checkpoint_seconds):
                _save_state(Path(checkpoint), model, optimizer, run, history)
                saved = time.monotonic()
    finally:
        bar.close()
        model.eval()
    return history


def _step(loss_of: Callable, window: Tensor, optimizer, config: TrainConfig, lr: float, step: int) -> float:
    """One update; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(window)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    value, norm = loss.item(), torch.nn.utils.clip_grad_norm_(parameters, config.clip).item()
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise FloatingPointError(
            f"the loss is {value} and the gradient's norm {norm} at step {step}: "
            f"lower lr (now {config.lr}) or look for NaN in data and weights"
        )
    optimizer.step()
    return value


def _batch(data: Tensor | Stream, config: TrainConfig, step: int) -> Tensor:
    seed = config.seed * 1_000_003 + step
    if isinstance(data, Tensor):
        return random_windows(data, config.batch_size, config.seq_len, seed)
    return data.batch(config.batch_size, config.seq_len, seed)


def _refuse_bad_input(model: TinyLlama, data: Tensor | Stream, config: TrainConfig, val: Tensor | None) -> None:
    if config.seq_len > model.config.max_len:
        raise ValueError(f"seq_len={config.seq_len} is longer than the model's max_len={model.config.max_len}")
    if not isinstance(data, Tensor):
        data = _batch(data, config, 0).flatten()  # of an endless stream, what the first step will see
    for name, tokens in (("training", data), ("validation", val)):
        if tokens is None:
            continue
        if tokens.ndim != 1 or tokens.dtype != torch.int64:
            raise ValueError(f"{name} tokens must be (n,) int64, got {tuple(tokens.shape)} {tokens.dtype}")
        if len(tokens) <= config.seq_len:
            raise ValueError(f"the {name} corpus has {len(tokens)} tokens; one window needs {config.seq_len + 1}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= model.config.vocab_size:
            raise ValueError(
                f"{name} tokens run from {low} to {high}, outside the vocabulary of {model.config.vocab_size}"
            )


# The state of an unfinished run is one safetensors file: weights, both moments, and the rest as JSON in its header.


def _fingerprint(model: TinyLlama, data: Tensor | Stream, config: TrainConfig, total: int) -> str:
    """What a run is made of: model, trained weights, settings, and the data by its first batch."""
    first = hashlib.sha256(_batch(data, config, 0).cpu().numpy().tobytes()).hexdigest()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    run = {"model": model.config.to_dict(), "trained": trained, "train": asdict(config), "total": total, "data": first}
    return json.dumps(run, sort_keys=True)


def _save_state(path: Path, model, optimizer, run: str, history: History) -> None:
    names = {p: n for n, p in model.named_parameters()}
    tensors = {f"weight:{n}": p.detach().contiguous() for p, n in names.items()}
    for p, state in optimizer.state.items():
        tensors |= {f"{key}:{names[p]}": value.contiguous() for key, value in state.items()}
    metadata = {"run": run, "history": json.dumps(asdict(history))}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def _load_state(path: Path, model, optimizer, run: str) -> History:
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable training checkpoint ({error}); delete it to start again") from error
    if metadata.get("run") != run:
        raise ValueError(f"{path} belongs to a run with other settings or data; delete it or name another file")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"weight:{name}"])
            state = {key: tensors[k] for key in ("step", "exp_avg", "exp_avg_sq") if (k := f"{key}:{name}") in tensors}
            if state:
                optimizer.state[p] = {k: v.to(p.device) for k, v in state.items()}
    saved = json.loads(metadata["history"])
    saved["val"] = [tuple(pair) for pair in saved["val"]]
    return History(**saved)
