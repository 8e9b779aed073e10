"""Grids of training runs from one file: python -m tinylm.sweep FOLDER/config.yaml [--jobs 2 | --dask tcp://host:port]

Each finished run is a record in FOLDER/records. Interrupted, the sweep goes on where it was. The file:

    defaults: {corpus: shakespeare, seq_len: 128, lr: 0.01}    # for all grids
    shapes:                                                     # names for models, optional
      small: {dim: 16, n_layers: 2, n_heads: 1, hidden_dim: 48}
    grids:                                                      # a list of values is an axis of the grid
      - {shape: small, flops: [4.5e10, 1.4e11], batch_size: 4, seed: [0, 1, 2]}
      - {dim: [32, 64], n_layers: 2, n_heads: 2, tokens: 1_000_000, seed: 0}

A run needs corpus, seq_len, seed, a model, and exactly one budget of steps, tokens, flops and epochs. It may have the
keys of a model (`tinylm.model.Config`, without vocab_size and max_len), of its training (`tinylm.train.TrainConfig`), and

    shape              instead of a model: its name among the shapes
    corpus             shakespeare or synthetic
    language           of synthetic: {seed, vocab_size, scales, spectrum}, see `tinylm.data.SyntheticLanguage`
    characters         of shakespeare: only so many training characters, in pieces of 1,000 from all plays
    epochs             a budget: so many times all of these
    table_std          the embedding starts with this standard deviation instead of the model's own
    lr_rule            instead of lr: the learning rate is lr_rule * sqrt(batch_size) / dim
    target_steps       instead of batch_size: the power of two that comes nearest to so many steps,
    batch_tokens       and has between batch_tokens[0] and batch_tokens[1] tokens

In a grid, null takes a default away.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import re
import threading
from pathlib import Path

import torch
import yaml
from torch import Tensor

from tinylm import data
from tinylm.model import Config, TinyLlama
from tinylm.runs import run_all, run_key
from tinylm.train import Stream, TrainConfig, budget_fraction, train, window_losses

MODEL_KEYS = {f.name for f in dataclasses.fields(Config)} - {"vocab_size", "max_len"}
TRAIN_KEYS = {f.name for f in dataclasses.fields(TrainConfig)} - {"eval_every"}  # judged at the end only
BUDGETS = ("steps", "tokens", "flops", "epochs")
RUN_KEYS = MODEL_KEYS | TRAIN_KEYS | {"corpus", "language", "characters", "epochs", "table_std"}
RULES = {"shape", "lr_rule", "target_steps", "batch_tokens"}  # what `expand` turns into keys of a run
WHOLE = {"batch_tokens", "betas"}  # lists that are one value and no axis
WHOLE_NUMBERS = MODEL_KEYS - {"rope_theta", "norm_eps"} | {"seq_len", "batch_size", "seed", "steps", "characters"}
OR_ZERO = {"seed", "warmup", "final_lr", "weight_decay"}
SCORED = 512  # windows that every model is judged on
_seeding = threading.Lock()  # threads of one process share PyTorch's generator


def read_config(path: str | Path) -> list[dict]:
    """The runs of a sweep's file, each a config for `one_run`.

    Raises ValueError, naming the run, for an unknown key, a value that cannot be, an impossible model, no budget or two,
    or a run that stands twice.
    """
    try:
        file = _numbers(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(file, dict) or not isinstance(file.get("grids"), list) or not file["grids"]:
        raise ValueError(f"{path} needs a list `grids` with at least one grid; see `python -m tinylm.sweep --help`")
    if unknown := file.keys() - {"defaults", "shapes", "grids"}:
        raise ValueError(f"{path} has unknown keys {_listed(unknown)}; it may have defaults, shapes and grids")
    defaults, shapes, runs = file.get("defaults") or {}, file.get("shapes") or {}, []
    for name, value in [("defaults", defaults), ("shapes", shapes), *(("a grid", grid) for grid in file["grids"])]:
        if not isinstance(value, dict):
            raise ValueError(f"{name} in {path} must be of the form {{key: value, ...}}, got {value!r}")
    for grid in file["grids"]:
        grid = {**defaults, **grid}
        axes = [v if isinstance(v, list) and k not in WHOLE else [v] for k, v in grid.items()]
        if not all(axes):
            raise ValueError(f"an empty list leaves no runs in the grid {grid}")
        runs += [expand(dict(zip(grid, values, strict=True)), shapes) for values in itertools.product(*axes)]
    keys = [run_key(run) for run in runs]
    if twice := [run for run, key in zip(runs, keys, strict=True) if keys.count(key) > 1]:
        raise ValueError(f"this run stands twice in {path}: {twice[0]}")
    return runs


def _listed(names) -> str:
    return ", ".join(sorted(map(str, names)))


def _numbers(value):
    """YAML 1.1 reads 4.5e10 as a text, because its exponent has no sign: make such texts numbers."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value)
    return float(value) if is_number else value


def expand(run: dict, shapes: dict[str, dict] | None = None) -> dict:
    """One run's config, its rules replaced by what they give. Raises ValueError for one that cannot be run."""
    run = {k: v for k, v in run.items() if v is not None}
    if (shape := run.pop("shape", None)) is not None:
        run = {**run, **_shape(run, shape, shapes or {})}
    _refuse_bad_values(run)
    model = _model_config(run)
    _refuse_bad_budget(run)
    target, bounds = run.pop("target_steps", None), run.pop("batch_tokens", None)
    if target is not None:
        if "batch_size" in run or "steps" in run:
            raise ValueError(f"target_steps chooses the batch size; leave out batch_size and steps in {run}")
        run["batch_size"] = _batch_size(run, _tokens(run, model) / target, bounds or [1, 2**40])
    elif bounds is not None:
        raise ValueError(f"batch_tokens bounds what target_steps chooses, and that is missing in {run}")
    if (rule := run.pop("lr_rule", None)) is not None:
        if "lr" in run or "batch_size" not in run:
            raise ValueError(f"lr_rule gives lr from the batch size; leave out lr and say batch_size in {run}")
        run["lr"] = float(f"{rule * run['batch_size'] ** 0.5 / run['dim']:.4g}")
    _train_config(run)
    return run


def _shape(run: dict, name: str, shapes: dict[str, dict]) -> dict:
    if not isinstance(name, str) or name not in shapes:
        raise ValueError(f"there is no shape {name!r}, only {_listed(shapes)}; wanted in {run}")
    shape = shapes[name]
    if not isinstance(shape, dict) or shape.keys() - MODEL_KEYS:
        raise ValueError(
            f"the shape {name} must be of the form {{key: value, ...}} with {_listed(MODEL_KEYS)}, got {shape}"
        )
    if both := shape.keys() & run.keys():
        raise ValueError(f"{_listed(both)} must not stand both in the shape {name} and beside it, as in {run}")
    return shape


def _refuse_bad_values(run: dict) -> None:
    """A value of the wrong kind would be noticed when its run has begun, or never."""
    if unknown := run.keys() - RUN_KEYS - RULES:
        raise ValueError(f"unknown keys {_listed(unknown)} in {run}; a run may have {_listed(RUN_KEYS | RULES)}")
    if missing := {"corpus", "seed", "seq_len"} - run.keys():
        raise ValueError(f"{_listed(missing)} missing in {run}")
    for name, value in run.items():
        least = "zero or more" if name in OR_ZERO else "positive"
        if name in ("corpus", "language"):
            continue
        if name == "tie_embeddings":
            good, wanted = type(value) is bool, "true or false"
        elif name in WHOLE:
            good = isinstance(value, list) and len(value) == 2 and all(map(_is_positive, value))
            good, wanted = good and (name != "betas" or max(value) < 1), "a list of two positive numbers, betas below 1"
        elif name in WHOLE_NUMBERS:
            good, wanted = type(value) is int and _is_positive(value + (name in OR_ZERO)), f"an integer, {least}"
        else:
            good = _is_positive(value) or name in OR_ZERO and value == 0 and type(value) is not bool
            wanted = f"a number, {least}"
        if not good:
            raise ValueError(f"{name} must be {wanted}, got {value!r} in {run}")
    if run["seed"] >= 2**26:  # see `corpus_of`
        raise ValueError(f"seed must be below {2**26}, got {run['seed']} in {run}")


def _is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _batch_size(run: dict, tokens: float, bounds: list) -> int:
    """The power of two nearest to `tokens` a step, in windows, among those with bounds[0] to bounds[1] tokens."""
    low, high = (math.log2(bound / run["seq_len"]) for bound in bounds)
    low, high = max(0, math.ceil(low)), math.floor(high)
    if low > high:
        raise ValueError(f"no power of two times seq_len lies between the batch_tokens {bounds} of {run}")
    return 2 ** min(max(round(math.log2(tokens / run["seq_len"])), low), high)


def _refuse_bad_budget(run: dict) -> None:
    given = [name for name in BUDGETS if name in run]
    if len(given) != 1:
        raise ValueError(f"a run needs exactly one budget of {', '.join(BUDGETS)}, got {given or 'none'} in {run}")
    if "epochs" in run and "characters" not in run:
        raise ValueError(f"epochs need characters, the text that is repeated, in {run}")
    if run["corpus"] == "shakespeare":
        there = len(data.shakespeare().train_tokens)
        if not run["seq_len"] < run.get("characters", there) <= there:
            raise ValueError(f"characters must be above seq_len and at most the {there} that there are, in {run}")


def _model_config(run: dict) -> Config:
    if run["corpus"] not in ("shakespeare", "synthetic"):
        raise ValueError(f"corpus must be shakespeare or synthetic, got {run['corpus']!r} in {run}")
    if run["corpus"] == "shakespeare" and "language" in run or run["corpus"] == "synthetic" and "characters" in run:
        raise ValueError(f"language goes with corpus synthetic, characters with shakespeare: {run}")
    vocab = data.VOCAB_SIZE if run["corpus"] == "shakespeare" else language_of(run).vocab_size
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


_language = functools.cache(data.SyntheticLanguage)


def language_of(run: dict) -> data.SyntheticLanguage:
    """The language of a run on the corpus synthetic. Raises ValueError where there can be none."""
    try:
        settings = dict(run.get("language", {}))
        if "scales" in settings:
            settings["scales"] = tuple(settings["scales"])
        return _language(**settings)
    except (TypeError, ValueError, MemoryError) as error:
        raise ValueError(
            f"no language of seed, vocab_size, scales and spectrum can be made in {run}: {error}"
        ) from error


def spread(tokens: Tensor, characters: int | None, piece: int = 1000) -> Tensor:
    """So many tokens, in pieces spread evenly over all of them. Raises ValueError when there are not so many.

    All pieces are equally long, so a few tokens are left out where `characters` is not a multiple of `piece`.
    """
    if characters is None:
        return tokens
    pieces = max(1, round(characters / piece))
    size = characters // pieces
    if characters > len(tokens):
        raise ValueError(f"characters={characters} is more than the {len(tokens)} there are")
    starts = torch.arange(pieces) * (len(tokens) - size) // max(1, pieces - 1)
    return tokens[(starts[:, None] + torch.arange(size)).flatten()]


def corpus_of(run: dict) -> tuple[Tensor | Stream, Tensor]:
    """What a run trains on, and the windows (n, t + 1) that it is judged on: the same for every run on a corpus."""
    seq_len = run["seq_len"]
    if run["corpus"] == "synthetic":
        language = language_of(run)
        return _InBulk(language), language.batch(SCORED, seq_len, seed=2**40)  # a seed that no training step has
    corpus = data.shakespeare()
    windows = data.fixed_windows(corpus.val_tokens, seq_len)
    return spread(corpus.train_tokens, run.get("characters")), windows[:: max(1, len(windows) // SCORED)][:SCORED]


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
            if "table_std" in run:
                torch.nn.init.normal_(model.embed.weight, std=run["table_std"])
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
    from joblib import cpu_count  # of those that this process may use

    from tinylm.sweep import one_run  # workers import it by this name; as __main__'s it would be sent to them whole

    parser = argparse.ArgumentParser(
        prog="python -m tinylm.sweep",
        description=__doc__,
        epilog=f"keys of a model: {_listed(MODEL_KEYS)}\nkeys of its training: {_listed(TRAIN_KEYS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="the sweep's file; records go to the folder records beside it")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, help=f"processes on this machine; all {cpu_count()} processors by default")
    where.add_argument("--dask", metavar="ADDRESS", help="a Dask scheduler, such as tcp://host:8786, instead")
    parser.add_argument("--dry-run", action="store_true", help="only check the file and count")
    arguments = parser.parse_args()
    jobs = cpu_count() if arguments.jobs is None else arguments.jobs
    try:
        runs = read_config(arguments.config)
        total = sum(map(planned_flops, runs))
        print(f"{len(runs)} runs, {total:.3g} floating-point operations", flush=True)
        if budget_fraction() < 1:
            raise ValueError("records are of whole budgets: unset the environment variable TINYLM_BUDGET")
        if not arguments.dry_run:
            runs.sort(key=planned_flops)  # the small ones first: something to look at soon
            run_all(runs, one_run, arguments.config.parent, True, jobs, arguments.dask, planned_flops)
    except (ValueError, RuntimeError, ArithmeticError, ImportError) as error:
        parser.exit(1, "\n".join([f"{parser.prog}: {error}", *getattr(error, "__notes__", []), ""]))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped; the same command goes on from the records\n")


if __name__ == "__main__":
    main()
