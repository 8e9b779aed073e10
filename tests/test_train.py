"""tinylm.train: the same seed gives the same weights, stopped or not; budgets agree; bad input is refused before work."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tinylm.data import SyntheticLanguage, random_windows
from tinylm.model import Config, TinyLlama
from tinylm.train import TrainConfig, evaluate, learning_rate, make_optimizer, train, window_losses

SHAPE = Config(11, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_len=16)
TEXT = torch.arange(400) * 7 % 11
RECIPE = TrainConfig(steps=12, batch_size=4, seq_len=8, lr=1e-2, eval_every=5)


def fresh(config: Config = SHAPE, seed: int = 0) -> TinyLlama:
    torch.manual_seed(seed)
    return TinyLlama(config)


def go(model, recipe=RECIPE, data=TEXT, **more):
    return train(model, data, recipe, **{"progress": False, "val": TEXT, **more})


def same_weights(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class Stop(KeyboardInterrupt):
    pass


def stop_at(step):
    def on_step(done):
        if done == step:
            raise Stop

    return on_step


# Determinism and resumption


def test_the_seed_decides_everything():
    a, b, other = fresh(), fresh(), fresh()
    assert go(a).loss == go(b).loss and same_weights(a, b)
    go(other, dataclasses.replace(RECIPE, seed=1))
    assert not same_weights(a, other)


def test_history_tells_what_was_done():
    model = fresh()
    history = go(model)
    assert history.steps == 12 == len(history.loss) and history.tokens == 12 * 4 * 8
    assert history.flops == 12 * 4 * SHAPE.train_flops(8) and history.seconds > 0
    assert [step for step, _ in history.val] == [5, 10, 12]
    assert history.val_loss == evaluate(model, TEXT, 8, 64) and not model.training
    assert math.isnan(go(fresh(), val=None).val_loss)


def test_compiling_changes_nothing_but_the_last_digits():
    shape = dataclasses.replace(SHAPE, n_layers=1)
    eager, compiled = (go(fresh(shape), compile=c, val=None) for c in (False, True))
    assert compiled.loss == pytest.approx(eager.loss, abs=1e-4)


@pytest.mark.parametrize("step", [1, 6, 11])
@pytest.mark.parametrize("tie", [True, False])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, step, tie):
    shape = dataclasses.replace(SHAPE, tie_embeddings=tie)
    whole, first, second = fresh(shape), fresh(shape), fresh(shape, seed=9)
    expected = go(whole)
    file = tmp_path / "state.safetensors"
    with pytest.raises(Stop):
        go(first, checkpoint=file, checkpoint_seconds=0, on_step=stop_at(step + 1))
    steps = []
    history = go(second, checkpoint=file, checkpoint_seconds=0, on_step=steps.append)
    assert steps == list(range(step + 1, 13))  # it went on, it did not start again
    assert same_weights(second, whole) and not first.training
    for name in ("steps", "tokens", "flops", "loss", "val"):
        assert getattr(history, name) == getattr(expected, name)


def test_a_finished_run_is_not_done_again(tmp_path):
    model, again, steps = fresh(), fresh(seed=9), []
    history = go(model, checkpoint=tmp_path / "s")
    assert go(again, checkpoint=tmp_path / "s", on_step=steps.append) == history
    assert steps == [] and same_weights(again, model)


KILLED = """
import sys, torch
from tinylm.model import Config, TinyLlama
from tinylm.train import TrainConfig, train
torch.manual_seed(0)
torch.set_num_threads(1)
model = TinyLlama(Config(11, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_len=16))
recipe = TrainConfig(steps=int(sys.argv[3]), batch_size=4, seq_len=8, lr=1e-2)
train(model, torch.arange(400) * 7 % 11, recipe, checkpoint=sys.argv[1] or None, checkpoint_seconds=0, progress=False)
torch.save(list(model.parameters()), sys.argv[2])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    file, steps = tmp_path / "state.safetensors", "150"

    def command(state, out):
        return [sys.executable, "-c", KILLED, str(state), str(tmp_path / out), steps]

    subprocess.run(command("", "whole"), env=environment, check=True)
    process = subprocess.Popen(command(file, "killed"), env=environment)
    deadline = time.monotonic() + 60
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "killed").exists()
    subprocess.run(command(file, "again"), env=environment, check=True)
    whole, again = torch.load(tmp_path / "whole"), torch.load(tmp_path / "again")
    assert all(torch.equal(p, q) for p, q in zip(whole, again, strict=True))


@pytest.mark.parametrize(
    "change",
    [{"lr": 2e-2}, {"seed": 1}, {"steps": 13}, {"batch_size": 5}, {"shape": True}, {"data": True}, {"frozen": True}],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, change):
    file, steps = tmp_path / "state", []
    with pytest.raises(Stop):
        go(fresh(), checkpoint=file, checkpoint_seconds=0, on_step=stop_at(3))
    before = file.read_bytes()
    settings = {k: v for k, v in change.items() if v is not True}
    model = fresh(dataclasses.replace(SHAPE, hidden_dim=25) if "shape" in change else SHAPE)
    model.embed.requires_grad_("frozen" not in change)
    data = TEXT.roll(1) if "data" in change else TEXT
    with pytest.raises(
        ValueError, match="belongs to a run with other settings or data; delete it or name another file"
    ):
        go(model, dataclasses.replace(RECIPE, **settings), data, checkpoint=file, on_step=steps.append)
    assert steps == [] and file.read_bytes() == before


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, share):
    go(fresh(), checkpoint=(file := tmp_path / "state"))
    os.truncate(file, int(share * file.stat().st_size))
    with pytest.raises(ValueError, match="not a readable training checkpoint .*; delete it to start again"):
        go(fresh(), checkpoint=file)


# Budgets


def test_budgets_in_steps_tokens_and_flops_agree():
    model, same = fresh(), {"batch_size": 4, "seq_len": 8}
    flops = 12 * 4 * SHAPE.train_flops(8)
    for budget in ({"steps": 12}, {"tokens": 12 * 32}, {"flops": flops}, {"tokens": 12 * 32 + 15}):
        assert TrainConfig(**budget, **same).total_steps(model.config) == 12
    assert TrainConfig(tokens=1, **same).total_steps(model.config) == 1


def test_tinylm_budget_cuts_every_budget(monkeypatch):
    monkeypatch.setenv("TINYLM_BUDGET", "0.25")
    assert RECIPE.total_steps(fresh().config) == 3 and go(fresh()).steps == 3
    monkeypatch.setenv("TINYLM_BUDGET", "0.0001")
    assert RECIPE.total_steps(fresh().config) == 1
    for bad in ("0", "-1", "2", "all", "nan", ""):
        monkeypatch.setenv("TINYLM_BUDGET", bad)
        with pytest.raises(ValueError, match=r"TINYLM_BUDGET must be a number in \(0, 1\]"):
            RECIPE.total_steps(fresh().config)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "exactly one budget of steps, tokens or flops, got none"),
        ({"steps": 1, "tokens": 1}, "exactly one budget"),
        ({"steps": 0}, "steps must be positive and finite, got 0"),
        ({"flops": -1.0}, "flops must be positive"),
        ({"flops": math.nan}, "flops must be positive"),
        ({"flops": math.inf}, "flops must be positive"),
        ({"steps": 1, "lr": 0}, "lr must be positive"),
        ({"steps": 1, "batch_size": 0}, "batch_size must be positive"),
        ({"steps": 1, "seq_len": -8}, "seq_len must be positive"),
        ({"steps": 1, "warmup": 1.5}, "warmup is a share between 0 and 1, got 1.5"),
    ],
)
def test_impossible_settings_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**arguments)


@pytest.mark.parametrize(
    ("data", "change", "sentence"),
    [
        (TEXT[:0], {}, "training corpus has 0 tokens; one window needs 9"),
        (TEXT[:8], {}, "training corpus has 8 tokens; one window needs 9"),
        (TEXT + 1, {}, "training tokens run from 1 to 11, outside the vocabulary of 11"),
        (TEXT - 1, {}, "training tokens run from -1 to 9, outside the vocabulary of 11"),
        (TEXT.float(), {}, r"must be \(n,\) int64"),
        (TEXT[None], {}, r"must be \(n,\) int64"),
        (TEXT, {"val": TEXT[:5]}, "validation corpus has 5 tokens"),
        (TEXT, {"val": TEXT + 5}, "validation tokens run from 5 to 15"),
        (TEXT, {"recipe": dataclasses.replace(RECIPE, seq_len=17)}, "seq_len=17 is longer than the model's max_len=16"),
        (SyntheticLanguage(0, 12, (1.0,)), {}, "outside the vocabulary of 11"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, data, change, sentence):
    model, steps = fresh(), []
    with pytest.raises(ValueError, match=sentence):
        go(model, data=data, checkpoint=tmp_path / "s", on_step=steps.append, **change)
    assert steps == [] and same_weights(model, fresh()) and not (tmp_path / "s").exists()


def test_nan_stops_the_run_and_spares_the_weights(tmp_path):
    model = fresh()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"loss is nan and the gradient's norm nan at step 0: lower lr \(now 0.01\)"):
        go(model, checkpoint=tmp_path / "s", checkpoint_seconds=0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True) if not q.isnan().any())
    assert not (tmp_path / "s").exists()


def test_an_infinite_gradient_under_a_finite_loss_is_never_saved(tmp_path):
    model = fresh()
    model.norm.weight.register_hook(lambda gradient: gradient + math.inf)
    with pytest.raises(FloatingPointError, match="loss is 2.* gradient's norm inf at step 0"):
        go(model, checkpoint=tmp_path / "s", checkpoint_seconds=0)
    assert same_weights(model, fresh()) and not (tmp_path / "s").exists()


def test_evaluation_of_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match=r"has 16 tokens, fewer than one window of 16 \+ 1"):
        evaluate(fresh(), TEXT[:16])


# The step


def test_schedule_climbs_to_its_peak_and_ends_low():
    recipe, total = TrainConfig(steps=200, lr=0.5, warmup=0.1, final_lr=0.02), 200
    rates = [learning_rate(recipe, step, total) for step in range(total)]
    assert rates[0] == pytest.approx(0.5 / 20) and rates[19] == rates[20] == max(rates) == 0.5
    assert all(a < b for a, b in itertools.pairwise(rates[:20])) and all(
        a > b for a, b in itertools.pairwise(rates[20:])
    )
    assert learning_rate(recipe, total, total) == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.01, rel=0.01)
    assert learning_rate(recipe, 110, total) == pytest.approx((0.5 + 0.01) / 2)  # half-way down the cosine
    assert 0 < learning_rate(RECIPE, 0, 1) <= RECIPE.lr


def test_decay_falls_on_matrices_only():
    model = fresh()
    decay = {id(p): g["weight_decay"] for g in make_optimizer(model, RECIPE).param_groups for p in g["params"]}
    assert decay == {id(p): 0.1 if p.ndim == 2 else 0.0 for p in model.parameters()}


def test_steps_agree_with_adamw_written_out_in_float64():
    recipe = dataclasses.replace(RECIPE, steps=5, clip=0.5, lr=0.02, weight_decay=0.3)
    ours, reference = fresh().double(), fresh().double()
    go(ours, recipe)

    parameters = list(reference.parameters())
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    clipped = 0
    for step in range(5):
        window = random_windows(TEXT, 4, 8, recipe.seed * 1_000_003 + step)
        reference.zero_grad()
        reference.loss(window).backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in parameters))
        clipped += norm > recipe.clip
        lr = learning_rate(recipe, step, 5)
        with torch.no_grad():
            for i, p in enumerate(parameters):
                g = p.grad * min(1.0, recipe.clip / norm)
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.95 * v[i] + 0.05 * g * g
                update = (m[i] / (1 - 0.9 ** (step + 1))) / ((v[i] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
                p -= lr * (update + (0.3 if p.ndim == 2 else 0) * p)
    assert clipped > 0
    assert not same_weights(ours, fresh())
    for p, q in zip(ours.parameters(), parameters, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_frozen_weights_stay_as_they_are(tmp_path):
    model, whole = fresh(), fresh()
    for m in (model, whole):
        m.embed.requires_grad_(False)
    go(whole)
    with pytest.raises(Stop):
        go(model, checkpoint=tmp_path / "s", checkpoint_seconds=0, on_step=stop_at(4))
    go(model, checkpoint=tmp_path / "s")
    assert torch.equal(model.embed.weight, fresh().embed.weight) and same_weights(model, whole)
    assert not torch.equal(model.norm.weight, fresh().norm.weight)


# Evaluation and learning


def test_evaluate_agrees_with_one_prediction_at_a_time():
    model, t, text = fresh(), 6, TEXT[:45]
    with torch.no_grad():
        model.embed.weight.normal_()
        surprise = []
        for start in range(0, len(text) - t, t):
            for i in range(1, t + 1):
                logits = model(text[None, start : start + i])[0, -1].double()
                surprise.append(-logits.log_softmax(-1)[text[start + i]].item())
    assert len(surprise) == 42
    assert evaluate(model, text, t) == pytest.approx(sum(surprise) / 42, abs=1e-5)
    assert evaluate(model, text, t, limit=2) == pytest.approx(sum(surprise[:12]) / 12, abs=1e-5)


def test_window_losses_are_paired_with_windows():
    model, windows = fresh(), random_windows(TEXT, 70, 8, seed=0)
    losses = window_losses(model, windows)
    assert losses.shape == (70,)
    for i in (0, 31, 32, 69):
        assert losses[i].item() == pytest.approx(model.loss(windows[i : i + 1]).item(), abs=1e-5)


def test_a_repeated_text_is_learned_by_heart():
    model = fresh()
    history = go(model, TrainConfig(steps=80, batch_size=8, seq_len=16, lr=2e-2))
    assert history.loss[0] > 2.2
    assert history.loss[-1] < 0.1 and evaluate(model, TEXT, 16) < 0.1


def test_a_synthetic_language_is_learned_towards_its_floor_and_not_below():
    language = SyntheticLanguage(seed=1, vocab_size=8, scales=(2.0, 1.0))
    model = fresh(Config(8, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_len=16))
    go(model, TrainConfig(steps=150, batch_size=32, seq_len=16, lr=1e-2), data=language, val=None)
    losses = window_losses(model, language.batch(1000, 16, seed=10**9))
    unigram, floor, error = language.block_entropies[0], language.floor(16), losses.std().item() / 1000**0.5
    assert floor - 4 * error < losses.mean().item() < floor + 0.4 * (unigram - floor)
