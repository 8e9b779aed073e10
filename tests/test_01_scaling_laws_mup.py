"""muP: the rules, the experiment, and what the lab reads from it."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_source import LABS, definitions
from tinylm import checkpoint, data
from tinylm.model import Config, TinyLlama
from tinylm.runs import read_records
from tinylm.sweep import corpus_of
from tinylm.train import TrainConfig, make_optimizer, train


def the_lab(**names):
    return definitions(
        "01_scaling_laws", **{"BUDGETS": (), "SPAN": 0, **names}
    )  # defaults of functions that no test calls


lab = the_lab()
EXPERIMENT = checkpoint.SHIPPED.parent / "experiments" / "01_mup"
WIDTHS = (32, 64, 128, 256)


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("mup_run", EXPERIMENT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sized(dim: int, kind=TinyLlama, seed: int = 0, **change):
    torch.manual_seed(seed)
    shape = {"vocab_size": 96, "n_layers": 2, "n_heads": max(1, dim // 16), "hidden_dim": 3 * dim, "max_len": 64}
    return kind(Config(dim=dim, **{**shape, **change}), *([32] if kind is not TinyLlama else []))


def some_windows(n: int = 8, t: int = 64) -> torch.Tensor:
    return data.fixed_windows(data.shakespeare().train_tokens, t, n)


# The rules


def body(source: str, name: str) -> str:
    """A function or class without docstrings, as the parser sees it."""
    (node,) = (n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
            part.body = part.body[1:]
    return ast.dump(node)


@pytest.mark.parametrize("name", ["MuLlama", "mup_groups", "mup_init_"])
def test_the_experiment_and_the_lab_have_the_same_code(name):
    sources = [p.read_text(encoding="utf-8") for p in (EXPERIMENT / "run.py", LABS / "01_scaling_laws.py")]
    assert body(sources[0], name) == body(sources[1], name)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([8, 16, 32, 48, 96]),
    st.sampled_from([8, 16, 32, 64]),
    st.floats(1e-5, 1.0),
    st.floats(0.0, 1.0),
    st.booleans(),
)
def test_every_parameter_has_the_rate_of_its_kind(dim, base_dim, lr, weight_decay, tied):
    wide, base = (sized(d, n_heads=1, tie_embeddings=tied) for d in (dim, base_dim))
    groups = lab.mup_groups(wide, base_dim, lr, weight_decay)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == set(wide.parameters())
    group_of = {p: group for group in groups for p in group["params"]}
    for (name, p), q in zip(wide.named_parameters(), base.parameters(), strict=True):
        grown = [a != b for a, b in zip(p.shape, q.shape, strict=True)]
        slower = p.shape[1] / q.shape[1] if all(grown) and p.ndim == 2 else 1.0  # sums over the width, and so many
        if "embed" in name or "lm_head" in name:
            slower = 1.0  # of the head's sum the forward pass takes care
        assert group_of[p]["lr"] == pytest.approx(lr / slower), name
        decay = weight_decay if p.ndim == 2 else 0.0
        assert group_of[p]["lr"] * group_of[p]["weight_decay"] == pytest.approx(lr * decay), name


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([16, 32, 64, 128]), st.integers(0, 99))
def test_logits_are_divided_by_the_growth_of_the_width(dim, seed):
    tokens = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        plain, scaled = (sized(dim, kind, seed)(tokens) for kind in (TinyLlama, lab.MuLlama))
    torch.testing.assert_close(scaled * (dim / 32), plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("table_std", [0.02, 0.16])
def test_starts_are_those_of_the_table_of_rules(table_std):
    for dim in WIDTHS[1:]:
        model = sized(dim, lab.MuLlama)
        lab.mup_init_(model, table_std)
        assert model.embed.weight.std().item() == pytest.approx(table_std, rel=0.03)
        assert model.lm_head.weight is model.embed.weight, "tied as before"
        for name, p in model.blocks.named_parameters():
            if p.ndim == 2:
                to_the_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                expected = (p.shape[1] * (4 if to_the_stream else 1)) ** -0.5  # 2 layers add to the stream twice each
                assert p.std().item() == pytest.approx(expected, rel=0.05), name


def test_the_own_table_is_left_as_it_is():
    one, other = sized(32), sized(32)
    lab.mup_init_(one, 0.02)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# The sizes of updates


def linear_inputs(model: TinyLlama, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    found, hooks = {}, []
    for name, layer in model.blocks.named_modules():
        if isinstance(layer, torch.nn.Linear):
            hooks.append(layer.register_forward_hook(lambda _, x, y, n=name: found.__setitem__(n, (x[0], y))))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def first_update_sizes(dim: int, mup: bool) -> dict[str, float]:
    """RMS of what one step adds to each matrix's output, its input held still; and to the logits by the table's step."""
    model, windows = sized(dim, lab.MuLlama if mup else TinyLlama), some_windows()
    lab.mup_init_(model, 0.16)
    seen, last = linear_inputs(model, windows[:, :-1]), []
    hook = model.norm.register_forward_hook(lambda _, __, y: last.append(y))
    before = {n: layer.weight.detach().clone() for n, layer in model.blocks.named_modules() if n in seen}
    table = model.embed.weight.detach().clone()
    groups = lab.mup_groups(model, 32, 0.01, 0.0) if mup else model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
    model.loss(windows).backward()
    hook.remove()
    optimizer.step()
    with torch.no_grad():
        sizes = {}
        for name, layer in model.blocks.named_modules():
            if name in seen:
                sizes[name] = lab.rms(seen[name][0] @ (layer.weight - before[name]).T)
        head = last[0] @ (model.embed.weight - table).T
        return {**sizes, "head": lab.rms(head) * (32 / dim if mup else 1)}


def test_one_step_adds_in_proportion_to_the_width_and_under_mup_the_same_at_every_width():
    for mup in (False, True):
        sizes = [first_update_sizes(dim, mup) for dim in WIDTHS]
        assert len(sizes[0]) == 15
        for name in sizes[0]:
            growth = np.polyfit(np.log(WIDTHS), np.log([s[name] for s in sizes]), 1)[0]
            assert abs(growth - (0 if mup else 1)) < 0.4, (name, mup, growth)


@settings(deadline=None, max_examples=20)
@given(st.integers(8, 300), st.floats(1e-4, 0.1))
def test_the_first_step_of_adam_is_coherent(n, lr):
    g = torch.Generator().manual_seed(0)
    torch.randn(n, n, generator=g)
    x, _ = torch.randn(2, n, generator=g)
    old, new = lab.first_step(n, lr)
    assert new == pytest.approx(lr * x.abs().sum().item(), rel=1e-2), "every term has the same sign"
    assert 0.3 < old < 2


def test_the_coordinate_check_sees_no_difference_at_the_base_width():
    windows = some_windows(4)
    assert lab.moved(32, True, 0.004, windows) == lab.moved(32, False, 0.004, windows)


def test_the_coordinate_check_finds_a_head_that_is_not_scaled():
    def unscaled(config, base_dim):
        return TinyLlama(config)

    broken = the_lab()
    broken.moved.__globals__["MuLlama"] = unscaled
    windows = some_windows(4)
    growth = [
        f.moved(128, True, 0.004, windows)["logits"] / f.moved(32, True, 0.004, windows)["logits"]
        for f in (lab, broken)
    ]
    assert growth[0] < 1.2 and growth[1] > 1.5


def test_activations_are_the_streams_end_and_the_logits():
    model, tokens = sized(32), some_windows(2)[:, :-1]
    found = lab.activations(model, tokens)
    with torch.no_grad():
        assert torch.equal(found["logits"], model(tokens))
        assert torch.equal(model.lm_head(model.norm(found["stream"])), found["logits"])
    assert not model.norm._forward_hooks, "the hook is gone"


# The experiment


def trained(run, name: str, dim: int, table_std: float, steps: int = 5) -> tuple[TinyLlama, list[float]]:
    recipe = TrainConfig(steps=steps, batch_size=4, seq_len=run.SEQ_LEN, lr=0.02, seed=3)
    config = {"parametrisation": name, "dim": dim, "table_std": table_std}
    model, optimizer = run.prepare(config, recipe)
    return model, run.fit(model, optimizer, data.shakespeare().train_tokens, recipe)


@pytest.mark.parametrize("dim, table_std", [*itertools.product([16, 32], [0.02, 0.16])])
def test_at_the_base_width_mup_is_the_standard_parametrisation_bit_for_bit(run, monkeypatch, dim, table_std):
    monkeypatch.setattr(run, "BASE_DIM", dim)
    (plain, a), (scaled, b) = (trained(run, name, dim, table_std) for name in ("standard", "muP"))
    assert a == b and a[-1] < a[0]
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), scaled.parameters(), strict=True))


def test_away_from_the_base_width_it_is_not(run):
    (plain, a), (scaled, b) = (trained(run, name, 64, 0.16) for name in ("standard", "muP"))
    assert a[0] != b[0] and not torch.equal(plain.embed.weight, scaled.embed.weight)


def test_the_experiment_takes_the_steps_of_the_training_loop(run):
    recipe = TrainConfig(steps=6, batch_size=4, seq_len=run.SEQ_LEN, lr=0.02, seed=5)
    tokens, models = data.shakespeare().train_tokens, [sized(32, max_len=run.SEQ_LEN) for _ in range(2)]
    history = train(models[0], tokens, recipe, progress=False)
    losses = run.fit(models[1], make_optimizer(models[1], recipe), tokens, recipe)
    assert losses == history.loss
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_run_that_diverges_has_the_loss_of_a_guess_and_says_so(run):
    record = run.one_run({**run.CHEAP[0], "dim": 32, "lr": 2.0**40})
    assert record["diverged"] is True and record["loss"] == pytest.approx(math.log(96))
    assert record["tokens"] == 8 * run.BATCH_SIZE * run.SEQ_LEN and record["curve"] == []


def test_the_records_cost_what_the_script_says(run):
    records = read_records(EXPERIMENT)
    for r in records:
        assert (
            r["flops"] == run.cost(r["config"]) and r["tokens"] == r["config"]["steps"] * run.BATCH_SIZE * run.SEQ_LEN
        )
    assert sum(r["flops"] for r in records) < 8e13


def test_all_are_judged_on_the_same_windows_as_the_sweep(run):
    windows = corpus_of({"corpus": "shakespeare", "seq_len": run.SEQ_LEN})[1]
    assert windows.shape == (512, run.SEQ_LEN + 1)


# What the lab reads from the records


def reading(records: list[dict]):
    return the_lab(mup_records=records, mup_steps=100)


def record(name: str, dim: int, lr: float, seed: int, loss: float, steps: int = 100) -> dict:
    config = {"parametrisation": name, "dim": dim, "table_std": 0.16, "lr": lr, "steps": steps, "seed": seed}
    return {"config": config, "seed": seed, "loss": loss}


def bowl(name: str, dim: int, best: float, floor: float) -> list[dict]:
    """Two seeds, 0.02 apart, whose mean has its lowest point `floor` at the rate `best`."""
    return [
        record(name, dim, 2.0**k, seed, floor + 0.04 * (math.log(2.0**k / best)) ** 2 + 0.02 * seed - 0.01)
        for k in range(-9, -2)
        for seed in range(2)
    ]


def test_basins_are_read_sorted_and_at_the_base_width_shared():
    records = bowl("standard", 32, 2**-6, 2.3) + bowl("muP", 64, 2**-5, 2.2)
    view = reading([*records[::-1], record("muP", 64, 2**-4, 0, 9.0, steps=8)])
    rates, losses = view.basin("muP", 32)
    assert rates.tolist() == [2.0**k for k in range(-9, -2)] and losses.shape == (7, 2)
    assert losses[3].tolist() == pytest.approx([2.29, 2.31])
    assert np.array_equal(view.basin("standard", 32)[1], losses)
    assert view.basin("muP", 64)[1].max() < 9, "the short runs are no part of a basin"


def test_the_lowest_point_lies_between_rates():
    records = bowl("standard", 64, 0.8 * 2**-6, 2.2)
    for r in records:
        if not 2**-8 < r["config"]["lr"] < 2**-4:
            r["loss"] += 0.3  # walls are steeper than the parabola at the bottom
    view = reading(records)
    assert view.lowest("standard", 64) == pytest.approx((0.8 * 2**-6, 2.2))


def test_transfer_is_what_the_small_models_rate_loses_seed_by_seed():
    records = bowl("standard", 32, 2**-5, 2.3) + bowl("standard", 256, 2**-8, 2.0) + bowl("muP", 256, 2**-5, 2.0)
    for r in records:
        if r["config"]["dim"] == 256 and r["config"]["lr"] == 2**-5 and r["seed"] == 1:
            r["loss"] += 0.1
    view = reading(records)
    away = 0.04 * math.log(8) ** 2
    assert view.transfer("standard", 256).tolist() == pytest.approx([away, away + 0.1])


def test_being_ahead_is_the_difference_of_the_best_runs_seed_by_seed():
    records = bowl("standard", 256, 2**-8, 2.1) + bowl("muP", 256, 2**-5, 2.0)
    for r in records:
        if r["config"]["parametrisation"] == "muP" and r["seed"] == 0:
            r["loss"] -= 0.03
    assert reading(records).ahead(256, 0.16).tolist() == pytest.approx([0.13, 0.1])


# What the records say


@pytest.fixture(scope="module")
def found(run):
    return the_lab(mup_records=read_records(EXPERIMENT), mup_steps=run.STEPS)


def test_both_walls_of_every_basin_are_seen(run, found):
    for name, std, dim in run.GRIDS:
        rates, losses = found.basin(name, dim, std)
        mean = losses.mean(1)
        assert 0 < mean.argmin() < len(rates) - 1, (name, std, dim)
        if std == run.TUNED:
            assert min(mean[0], mean[-1]) > mean.min() + 0.05, (name, std, dim)
