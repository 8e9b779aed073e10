"""Grids of training runs from one file: python -m tinylm.sweep FOLDER/config.yaml [--jobs 2 | --dask tcp://host:port]

Each finished run is a record in FOLDER/records. Interrupted, the sweep goes on where it was. The file:

    defaults: {corpus: shakespeare, seq_len: 128, lr: 0.01}    # for all grids
    shapes:                                                     # names for models, optional
      small: {dim: 16, n_layers: 2, n_heads: 1, hidden_dim: 48}
    grids:                                                      # a list of values is an axis of the grid
      - {shape: small, flops: [4.5e10, 1.4e11], batch_size: 4, seed: [0, 1, 2]}
      - {dim: [32, 64], n_layers: 2, n_heads: 2, tokens: 1_000_000, seed: 0}

A run has the keys of a model (`tinylm.model.Config`, without vocab_size and max_len), of its training
(`tinylm.train.TrainConfig`), and

    corpus             shakespeare or synthetic
    language           of synthetic: {seed, vocab_size, scales}, see `tinylm.data.SyntheticLanguage`
    characters         of shakespeare: only so many training characters, in pieces of 1,000 from all plays
    epochs             a budget: so many times all of these
    lr_rule            instead of lr: the learning rate is lr_rule * sqrt(batch_size) / dim
    target_steps       instead of batch_size: the power of two that comes nearest to so many steps,
    batch_tokens       and has between batch_tokens[0] and batch_tokens[1] tokens
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import threading
from pathlib import Path

import torch
import yaml
from torch import Tensor

from tinylm import data
from tinylm.model import Config, TinyLlama
from tinylm.runs import run_all, run_key
from tinylm.train import Stream, TrainConfig, train, window_losses

MODEL_KEYS = {f.name for f in dataclasses.fields(Config)} - {"vocab_size", "max_len"}
TRAIN_KEYS = {f.name for f in dataclasses.fields(TrainConfig)}
BUDGETS = ("steps", "tokens", "flops", "epochs")
RUN_KEYS = MODEL_KEYS | TRAIN_KEYS | {"corpus", "language", "characters", "epochs"}
RULES = {"shape", "lr_rule", "target_steps", "batch_tokens"}  # what `expand` turns into keys of a run
WHOLE = {"batch_tokens", "betas"}  # lists that are one value and no axis
SCORED = 512  # windows that every model is judged on
_seeding = threading.Lock()  # threads of one process share PyTorch's generator


def read_config(path: str | Path) -> list[dict]:
    """The runs of a sweep's file, each a config for `one_run`.

    Raises ValueError, naming the run, for an unknown key, an impossible model, no budget or two, or a run that stands
    twice.
    """
    try:
        file = _numbers(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(file, dict) or not isinstance(file.get("grids"), list) or not file["grids"]:
        raise ValueError(f"{path} needs a list `grids` with at least one grid; see `python -m tinylm.sweep --help`")
    if unknown := file.keys() - {"defaults", "shapes", "grids"}:
        raise ValueError(f"{path} has unknown keys {sorted(unknown)}; it may have defaults, shapes and grids")
    shapes, runs = file.get("shapes") or {}, []
    for grid in file["grids"]:
        grid = {**(file.get("defaults") or {}), **grid}
        axes = [v if isinstance(v, list) and k not in WHOLE else [v] for k, v in grid.items()]
        runs += [expand(dict(zip(grid, values, strict=True)), shapes) for values in itertools.product(*axes)]
    keys = [run_key(run) for run in runs]
    if twice := [run for run, key in zip(runs, keys, strict=True) if keys.count(key) > 1]:
        raise ValueError(f"this run stands twice in {path}: {twice[0]}")
    return runs


def _numbers(value):
    """YAML 1.1 reads 4.5e10 as a text, because its exponent has no sign: make such texts numbers."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def expand(run: dict, shapes: dict[str, dict] | None = None) -> dict:
    """One run's config, its rules replaced by what they give. Raises ValueError for one that cannot be run."""
    if unknown := run.keys() - RUN_KEYS - RULES:
        raise ValueError(f"unknown keys {sorted(unknown)} in {run}; a run may have {sorted(RUN_KEYS | RULES)}")
    run = {k: v for k, v in run.items() if v is not None}
    if (shape := run.pop("shape", None)) is not None:
        if shape not in (shapes or {}):
            raise ValueError(f"there is no shape {shape!r}, only {sorted(shapes or {})}")
        run = {**run, **shapes[shape]}
        if unknown := shapes[shape].keys() - MODEL_KEYS:
            raise ValueError(f"shape {shape!r} has unknown keys {sorted(unknown)}; it may have {sorted(MODEL_KEYS)}")
    if missing := {"corpus", "seed", "seq_len"} - run.keys():
        raise ValueError(f"{sorted(missing)} missing in {run}")
    _budget(run)
    model = _model_config(run)
    target, (low, high) = run.pop("target_steps", None), run.pop("batch_tokens", (1, math.inf))
    if target is not None:
        if "batch_size" in run or "steps" in run:
            raise ValueError(f"target_steps chooses the batch size; leave out batch_size and steps in {run}")
        tokens = _tokens(run, model)
        wanted = min(max(tokens / target, low), high) / run["seq_len"]
        run["batch_size"] = 2 ** round(math.log2(max(1, wanted)))
    if (rule := run.pop("lr_rule", None)) is not None:
        if "lr" in run or "batch_size" not in run:
            raise ValueError(f"lr_rule gives lr from the batch size; leave out lr and say batch_size in {run}")
        run["lr"] = float(f"{rule * run['batch_size'] ** 0.5 / run['dim']:.4g}")
    _train_config(run)
    return run


def _budget(run: dict) -> None:
    given = [name for name in BUDGETS if name in run]
    if len(given) != 1:
        raise ValueError(f"a run needs exactly one budget of {', '.join(BUDGETS)}, got {given or 'none'} in {run}")
    if "epochs" in run and "characters" not in run:
        raise ValueError(f"epochs need characters, the text that is repeated, in {run}")
    if "characters" in run and (type(run["characters"]) is not int or run["characters"] <= run["seq_len"]):
        raise ValueError(f"characters must be an integer above seq_len in {run}")


def _model_config(run: dict) -> Config:
    if run["corpus"] not in ("shakespeare", "synthetic"):
        raise ValueError(f"corpus must be shakespeare or synthetic, got {run['corpus']!r}")
    if run["corpus"] == "shakespeare" and "language" in run or run["corpus"] == "synthetic" and "characters" in run:
        raise ValueError(f"language goes with corpus synthetic, characters with shakespeare: {run}")
    vocab = data.VOCAB_SIZE if run["corpus"] == "shakespeare" else run.get("language", {}).get("vocab_size", 16)
    try:
        return Config(vocab, max_len=run["seq_len"], **{k: v for k, v in run.items() if k in MODEL_KEYS})
    except (TypeError, ValueError) as error:
        raise ValueError(f"no model can be made of {run}: {error}") from error


def _tokens(run: dict, model: Config) -> float:
    """The tokens that a budget of flops, tokens or epochs pays for."""
    if "flops" in run:
        return run["flops"] / model.train_flops(run["seq_len"]) * run["seq_len"]
    return run["tokens"] if "tokens" in run else run["epochs"] * run["characters"]


def _train_config(run: dict) -> TrainConfig:
    settings = {k: v for k, v in run.items() if k in TRAIN_KEYS}
    if "epochs" in run:
        settings["tokens"] = run["epochs"] * run["characters"]
    try:
        return TrainConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"no training can be made of {run}: {error}") from error


def planned_flops(run: dict) -> float:
    """The floating-point operations of a run, counted as `Config.train_flops` does."""
    model, recipe = _model_config(run), _train_config(run)
    steps = recipe.total_steps(model)
    return steps * recipe.batch_size * model.train_flops(recipe.seq_len)


class _InBulk:
    """A language that deals out its windows 64 steps at a time: a chain is drawn symbol by symbol, so many at once."""

    STEPS = 64

    def __init__(self, language: data.SyntheticLanguage):
        self.language, self.drawn = language, None

    def batch(self, batch_size: int, seq_len: int, seed: int) -> Tensor:
        chunk, i = divmod(seed, self.STEPS)
        if self.drawn is None or self.drawn[0] != (batch_size, seq_len, chunk):
            windows = self.language.batch(self.STEPS * batch_size, seq_len, chunk)
            self.drawn = (batch_size, seq_len, chunk), windows.split(batch_size)
        return self.drawn[1][i]


@functools.cache
def _language(seed: int = 0, vocab_size: int = 16, scales: tuple[float, ...] = (1.0, 0.8, 0.65, 0.5)):
    return data.SyntheticLanguage(seed, vocab_size, scales)


def language_of(run: dict) -> data.SyntheticLanguage:
    """The language of a run on the corpus synthetic."""
    settings = dict(run.get("language", {}))
    if "scales" in settings:
        settings["scales"] = tuple(settings["scales"])
    return _language(**settings)


def spread(tokens: Tensor, characters: int | None, piece: int = 1000) -> Tensor:
    """So many tokens, in pieces spread evenly over all of them. Raises ValueError when there are not so many."""
    if characters is None:
        return tokens
    pieces = max(1, round(characters / piece))
    size = characters // pieces
    if pieces * size > len(tokens):
        raise ValueError(f"characters={characters} is more than the {len(tokens)} there are")
    starts = torch.linspace(0, len(tokens) - size, pieces, dtype=torch.float64).long()
    return tokens[(starts[:, None] + torch.arange(size)).flatten()]


def corpus_of(run: dict) -> tuple[Tensor | Stream, Tensor]:
    """What a run trains on, and the windows (n, t + 1) that it is judged on: the same for every run on a corpus."""
    seq_len = run["seq_len"]
    if run["corpus"] == "synthetic":
        language = language_of(run)
        return _InBulk(language), language.batch(SCORED, seq_len, seed=2**40)  # a seed that no training step has
    corpus = data.shakespeare()
    windows = data.fixed_windows(corpus.val_tokens, seq_len)
    return spread(corpus.train_tokens, run.get("characters")), windows[:: len(windows) // SCORED][:SCORED]


def curve(losses: list[float], tokens_per_step: int, points: int = 24) -> list[list[float]]:
    """[tokens seen, mean training loss since the point before], at `points` numbers of steps spaced by a constant ratio."""
    ends = sorted({round(len(losses) ** (i / points)) for i in range(1, points + 1)})
    parts = zip([0, *ends], ends, strict=False)
    return [[b * tokens_per_step, round(sum(losses[a:b]) / (b - a), 5)] for a, b in parts]


def one_run(run: dict) -> dict:
    """Train one model on one thread and judge it; what `tinylm.runs` records."""
    model_config, recipe = _model_config(run), _train_config(run)
    tokens, windows = corpus_of(run)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two small models beside each other are done before two after each other
    try:
        with _seeding:
            torch.manual_seed(recipe.seed)
            model = TinyLlama(model_config)
        history = train(model, tokens, recipe, progress=False)
        losses = window_losses(model, windows)
    finally:
        torch.set_num_threads(threads)
    return {
        "n_params": model_config.n_params(),
        "n_params_without_embeddings": model_config.n_params(embeddings=False),
        "steps": history.steps,
        "tokens": history.tokens,
        "flops": history.flops,
        "loss": losses.mean().item(),
        "standard_error": (losses.std() / len(losses) ** 0.5).item(),
        "curve": curve(history.loss, recipe.batch_size * recipe.seq_len),
    }


def main() -> None:
    from tinylm.sweep import one_run  # workers import it by this name; as __main__'s it would be sent to them whole

    parser = argparse.ArgumentParser(
        prog="python -m tinylm.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="the sweep's file; records go to the folder records beside it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes on this machine")
    parser.add_argument("--dask", metavar="ADDRESS", help="a Dask scheduler, such as tcp://host:8786, instead")
    parser.add_argument("--dry-run", action="store_true", help="only check the file and count")
    arguments = parser.parse_args()
    try:
        runs = read_config(arguments.config)
        total = sum(map(planned_flops, runs))
        print(f"{len(runs)} runs, {total:.3g} floating-point operations")
        if not arguments.dry_run:
            runs.sort(key=planned_flops)  # the small ones first: something to look at soon
            run_all(runs, one_run, arguments.config.parent, True, arguments.jobs, arguments.dask, planned_flops)
    except (ValueError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
