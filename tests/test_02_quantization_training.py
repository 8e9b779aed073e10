"""Training against rounding, the rounded KV cache, and the same functions on a real model."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from lab_source import definitions
from tinylm import checkpoint, data
from tinylm.model import Config, KVCache, TinyLlama
from tinylm.runs import read_records, run_key

lab = definitions("02_quantization")
EXPERIMENT = checkpoint.SHIPPED.parent / "experiments" / "02_qat"


def experiment():
    spec = importlib.util.spec_from_file_location("qat_run", EXPERIMENT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(**change) -> TinyLlama:
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "max_len": 80}
    return TinyLlama(Config(**{**shape, **change})).eval()


seeds, scales = st.integers(0, 2**31), st.sampled_from([1e-4, 0.02, 1.0, 300.0])


# The two grids


def nearest_level(x: float, step: float, n: int) -> float:
    """The obvious way: all levels, the nearest of them."""
    return min(((k - (n - 1) / 2) * step for k in range(n)), key=lambda level: abs(level - x))


def away_from_borders(x: torch.Tensor, step: torch.Tensor, n: int) -> torch.Tensor:
    """Where rounding errors cannot decide between two levels."""
    u = x / step + n / 2
    return (u - u.round()).abs() > 1e-4


@settings(deadline=None, max_examples=30)
@given(seeds, scales, st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 8, 32]))
def test_two_bits_takes_the_nearest_of_four_levels_a_group(seed, scale, o, n, size):
    w = normal(o, n * size, seed=seed, scale=scale)
    w_hat, codes, step = lab.two_bits(w, size)
    assert codes.dtype == torch.uint8 and codes.max() <= 3
    assert step.dtype == torch.float16 and step.shape == (o, n)
    for row, group in itertools.product(range(o), range(n)):
        x = w[row, group * size : (group + 1) * size]
        s = max(math.sqrt(sum(value**2 for value in x.tolist()) / size), 2**-14)
        assert step[row, group].item() == pytest.approx(s, rel=1e-3), "the step is the root mean square"
        s = step[row, group].item()
        expected = torch.tensor([nearest_level(value, s, 4) for value in x.tolist()])
        got = w_hat[row, group * size : (group + 1) * size]
        sure = away_from_borders(x, torch.tensor(s), 4)
        torch.testing.assert_close(got[sure], expected[sure], rtol=1e-6, atol=0)
    stored = (codes.float() - 1.5).unflatten(1, (n, size)) * step.float()[..., None]
    assert torch.equal(stored.flatten(1), w_hat), "codes and steps restore the matrix"


@settings(deadline=None, max_examples=30)
@given(seeds, scales, st.integers(1, 4), st.integers(1, 40))
def test_ternary_takes_the_nearest_of_three_levels_of_the_matrix(seed, scale, o, i):
    w = normal(o, i, seed=seed, scale=scale)
    w_hat, codes, step = lab.ternary(w)
    s = max(sum(abs(value) for value in w.flatten().tolist()) / w.numel(), 2**-14)
    assert step.shape == () and step.item() == pytest.approx(s, rel=1e-3), "the step is the mean magnitude"
    expected = torch.tensor([[nearest_level(x, step.item(), 3) for x in row] for row in w.tolist()])
    sure = away_from_borders(w, step.float(), 3)
    torch.testing.assert_close(w_hat[sure], expected[sure], rtol=1e-6, atol=0)
    assert torch.equal((codes.float() - 1) * step.float(), w_hat)


@pytest.mark.parametrize("rounding", ["two_bits", "ternary"])
def test_zeros_and_tiny_weights_stay_finite_and_restorable(rounding):
    for w in (torch.zeros(2, 32), torch.full((2, 32), 1e-9)):
        w_hat, _, step = getattr(lab, rounding)(w)
        assert w_hat.isfinite().all() and (step > 0).all() and w_hat.abs().max() <= 2**-14


@pytest.mark.parametrize("rounding", ["two_bits", "ternary"])
@pytest.mark.parametrize(
    "w", [torch.full((2, 32), math.nan), torch.full((2, 32), math.inf), torch.zeros(0, 32)], ids=["nan", "inf", "empty"]
)
def test_no_rounding_of_what_is_no_number(rounding, w):
    with pytest.raises(ValueError):
        getattr(lab, rounding)(w)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="33"):
        lab.two_bits(torch.ones(2, 33))


# Bytes


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), seeds)
def test_ternary_packing_round_trips(shape, seed):
    codes = torch.randint(3, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = lab.pack_ternary(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (math.ceil(codes.numel() / 5),)
    assert torch.equal(lab.unpack_ternary(packed, tuple(shape)), codes)


def test_every_five_ternary_codes_have_a_byte_of_their_own():
    codes = torch.tensor(list(itertools.product(range(3), repeat=5)), dtype=torch.uint8)
    packed = lab.pack_ternary(codes)
    assert sorted(packed.tolist()) == list(range(243))
    assert lab.pack_ternary(torch.tensor([1, 0, 2, 0, 0])).tolist() == [1 + 2 * 9], "the first code counts least"


@pytest.mark.parametrize("codes", [[3], [-1], []], ids=str)
def test_only_ternary_codes_are_packed(codes):
    with pytest.raises(ValueError):
        lab.pack_ternary(torch.tensor(codes))


def test_bytes_of_another_shape_are_refused():
    packed = lab.pack_ternary(torch.zeros(11))
    for shape in ((10,), (16,)):
        with pytest.raises(ValueError, match="3 bytes"):
            lab.unpack_ternary(packed, shape)


def test_the_bits_are_those_of_the_bytes():
    model = checkpoint.load("shakespeare-800k")
    ternary, two = (lab.true_bits(model, lab.quantized(model, m)[1])[0] for m in (lab.by_ternary, lab.by_two_bits))
    n, matrices = 851_968, lab.matrices(model).values()
    padded = sum(8 * math.ceil(layer.weight.numel() / 5) + 16 for layer in matrices)
    assert ternary == padded / n and 1.6 < ternary < 1.601
    assert two == 2 + 16 / 32


def test_the_bytes_of_two_bits_restore_the_model():
    model = checkpoint.load("shakespeare-30k")
    rounded, stored = lab.quantized(model, lab.by_two_bits)
    for name, layer in lab.matrices(rounded).items():
        codes = lab.unpack_bits(stored[f"{name}.0"], 2, layer.weight.shape) + 2
        groups = (codes.float() - 1.5).unflatten(1, (-1, 32)) * stored[f"{name}.1"].float()[..., None]
        assert torch.equal(groups.flatten(1), layer.weight), name


# Straight through


ROUNDINGS = {"two bits": lambda w: lab.two_bits(w)[0], "ternary": lambda w: lab.ternary(w)[0]}
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS.keys())


@each_rounding
@settings(deadline=None, max_examples=30)
@given(seeds, scales)
def test_forward_is_the_rounding_and_backward_the_identity_to_the_bit(rounding, seed, scale):
    w = normal(4, 64, seed=seed, scale=scale).requires_grad_()
    upstream = normal(4, 64, seed=seed + 1)
    out = lab.StraightThrough(rounding)(w)
    out.backward(upstream)
    assert torch.equal(out, rounding(w.detach()))
    assert torch.equal(w.grad, upstream)


def test_forward_is_exact_where_adding_the_rounding_error_is_not():
    w = normal(4, 64).requires_grad_()
    w_hat = normal(4, 64, seed=1)
    assert not torch.equal(w + (w_hat - w), w_hat), "the usual way to write it is off by a bit"
    out = lab.StraightThrough(lambda w: w_hat)(w)
    out.sum().backward()
    assert torch.equal(out, w_hat) and torch.equal(w.grad, torch.ones(4, 64))


@each_rounding
def test_a_model_with_rounding_is_the_rounded_model_and_leaves_the_float_one_alone(rounding):
    model, windows = tiny(), torch.randint(40, (2, 33), generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    rounded, _ = lab.quantized(model, lambda name, w: (rounding(w), []))
    student = lab.with_rounding(model, rounding)
    for m in (rounded, student):
        m.loss(windows).backward()
    assert torch.equal(student(windows), rounded(windows))
    assert torch.equal(student.loss(windows), rounded.loss(windows))
    gradients = {name: layer.weight.grad for name, layer in lab.matrices(rounded).items()}
    assert len(gradients) == 14
    for name, layer in lab.matrices(student).items():
        latent = layer.parametrizations.weight.original
        assert torch.equal(latent.detach(), before[f"blocks.{name}.weight"]), name
        assert torch.equal(latent.grad, gradients[name]), name
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# The experiment


def test_the_experiment_rounds_as_the_lab_does():
    run = experiment()
    assert set(run.ROUNDINGS) == set(ROUNDINGS)
    model = checkpoint.load("shakespeare-800k")
    ws = [layer.weight.detach() for layer in lab.matrices(model).values()]
    for w in (*ws, normal(8, 64, scale=40.0), torch.zeros(2, 32)):
        for name, rounding in ROUNDINGS.items():
            assert torch.equal(run.ROUNDINGS[name](w), rounding(w)), name
    w = normal(4, 64).requires_grad_()
    out = run.StraightThrough(run.ternary)(w)
    out.backward(normal(4, 64, seed=1))
    assert torch.equal(out, lab.ternary(w.detach())[0]) and torch.equal(w.grad, normal(4, 64, seed=1))


def test_the_experiment_judges_as_the_lab_does():
    run, model, other = experiment(), tiny(), tiny(norm_eps=0.5)
    windows = torch.randint(40, (6, 65), generator=torch.Generator().manual_seed(0))
    row = lab.Judge(model, windows)(other)
    answers = [run.log_probabilities(m, windows) for m in (other, model)]
    found = run.compare(*answers, windows)
    for ours, theirs in {"difference": "difference", "error": "standard_error", "kl": "kl"}.items():
        assert found[theirs] == pytest.approx(row[ours], rel=1e-4, abs=1e-7), ours
    assert found["agreement"] == row["agreement"] and len(found["window_losses"]) == 6
    mean = sum(found["window_losses"]) / 6
    assert mean == pytest.approx(found["loss"], abs=1e-5)


def arms() -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {"none": [], "two bits": [], "ternary": []}
    for record in read_records(EXPERIMENT):
        if record["config"]["steps"] == 250:
            found[record["config"]["rounding"]].append(record)
    return found


def test_the_records_are_those_of_the_script():
    run = experiment()
    assert {r["key"] for r in read_records(EXPERIMENT)} == {run_key(config) for config in run.CONFIGS}
    windows = data.fixed_windows(data.shakespeare().val_tokens, run.SEQ_LEN)[:: run.EVERY]
    for runs in arms().values():
        assert [r["seed"] for r in sorted(runs, key=lambda r: r["seed"])] == [0, 1, 2]
        assert all(len(r["window_losses"]) == len(windows) for r in runs)


def test_training_wins_back_more_than_half_whatever_the_seed_and_the_baseline():
    found = arms()
    trained_float = sum(r["difference"] for r in found["none"]) / 3
    assert abs(trained_float) < 0.01, "the control neither learns nor forgets much"
    for name in ("two bits", "ternary"):
        for record in found[name]:
            left = record["difference"] - min(trained_float, 0)
            assert left + 2 * record["standard_error"] < 0.5 * record["untrained"], (name, record["seed"])


def test_the_summary_pairs_windows_and_averages_seeds():
    base = {"untrained": 1.0, "standard_error": 0.1, "kl": 0.2, "agreement": 0.5}
    arm = [
        {**base, "difference": 0.3, "loss": 2.0, "window_losses": [1.0, 2.0, 3.0]},
        {**base, "difference": 0.5, "loss": 2.2, "window_losses": [1.2, 2.2, 3.2]},
    ]
    control = [{**base, "difference": 0.0, "loss": 1.0, "window_losses": [0.5, 1.0, 2.5]}]
    found = lab.summary(arm, control)
    paired = torch.tensor([0.6, 1.1, 0.6])
    assert found["difference"] == pytest.approx(0.4) and found["untrained"] == 1.0
    assert found["as_long"] == pytest.approx(paired.mean().item())
    assert found["as_long_error"] == pytest.approx((paired.std() / 3**0.5).item(), rel=1e-5)
    assert found["seeds_apart"] == pytest.approx(0.2)


# The KV cache


def affine_slow(x: list[float], bits: int) -> list[float]:
    """One stretch of numbers on its own affine grid, the scale rounded to float16."""
    low, high = min(*x, 0), max(*x, 0)
    scale = torch.tensor((high - low) / (2**bits - 1)).half().item() or 1.0
    zero = min(round(-low / scale), 2**bits - 1)
    codes = [min(max(round(value / scale) + zero, 0), 2**bits - 1) for value in x]
    return [(code - zero) * scale for code in codes]


def close(x_hat: torch.Tensor, slow: torch.Tensor, x: torch.Tensor, bits: int) -> bool:
    """Equal but for ties, which two ways of computing may break differently: those are a step apart."""
    off = (x_hat - slow).abs()
    step = (x.max() - x.min()) / (2**bits - 1)
    return (off > 1e-3 * step).double().mean() < 0.01 and bool((off < 1.01 * step).all())


@settings(deadline=None, max_examples=15)
@given(seeds, st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 31, 32, 33, 70]))
def test_keys_share_a_scale_by_channel_and_group_of_tokens(seed, bits, t):
    x = normal(2, 2, t, 4, seed=seed) + 3 * normal(1, 2, 1, 4, seed=seed + 1)
    found, slow = lab.per_channel(x, bits), x.clone()
    for b, h, d in itertools.product(range(2), range(2), range(4)):
        for start in range(0, t - 31, 32):
            slow[b, h, start : start + 32, d] = torch.tensor(affine_slow(x[b, h, start : start + 32, d].tolist(), bits))
    assert found.shape == x.shape and close(found, slow, x, bits)
    newest = t % 32
    assert torch.equal(found[:, :, t - newest :], x[:, :, t - newest :]), "the newest tokens wait in float"


@settings(deadline=None, max_examples=15)
@given(seeds, st.sampled_from([2, 3, 4, 8]), st.integers(1, 9))
def test_values_share_a_scale_by_token_and_head(seed, bits, t):
    x = normal(2, 3, t, 8, seed=seed)
    found, slow = lab.per_token(x, bits), x.clone()
    for b, h, s in itertools.product(range(2), range(3), range(t)):
        slow[b, h, s] = torch.tensor(affine_slow(x[b, h, s].tolist(), bits))
    assert found.shape == x.shape and close(found, slow, x, bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_the_cache_keeps_restores_what_the_model_sees(bits):
    x = normal(2, 3, 5, 32)
    x_hat, (codes, scale, zero) = lab.round_cached(x, bits, axis=-1)
    assert torch.equal((codes.float() - zero.float()) * scale.float(), x_hat)
    assert scale.dtype == torch.float16 and zero.dtype == torch.uint8 and codes.int().max() < 2**bits
    assert lab.kept_bytes(x, bits, axis=-1) == x.numel() * bits // 8 + 3 * x.numel() // 32


@pytest.mark.parametrize("size", [2e-7, 1e-9, 0.0])
def test_numbers_too_small_for_a_stored_scale_stay_small(size):
    x = size * normal(1, 1, 32, 4).abs()
    for rounded in (lab.per_token(x, 8), lab.per_channel(x, 8)):
        assert (rounded - x).abs().max() <= 4 * size


def test_bad_caches_are_refused():
    with pytest.raises(ValueError):
        lab.per_token(torch.full((1, 1, 2, 4), math.nan), 4)
    with pytest.raises(ValueError):
        lab.per_channel(torch.ones(1, 1, 32, 4), 9)


def test_a_cache_that_rounds_nothing_changes_nothing():
    model = tiny(n_kv_heads=2)
    tokens = torch.randint(40, (2, 70), generator=torch.Generator().manual_seed(0))
    whole = lab.with_cache(model, lab.untouched, lab.untouched, 4)
    with torch.no_grad():
        assert torch.equal(whole(tokens), model(tokens))
        rounded = lab.with_cache(model, lab.per_channel, lab.per_token, 2)
        assert not torch.allclose(rounded(tokens), model(tokens), atol=1e-3)
        assert torch.equal(whole(tokens), model(tokens)), "the model itself is as before"


def test_a_model_with_a_rounded_cache_attends_to_rounded_keys_and_values(monkeypatch):
    model = tiny(n_layers=1, n_kv_heads=2)
    tokens = torch.randint(40, (2, 64), generator=torch.Generator().manual_seed(0))
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []
    plain = [KVCache()]
    with torch.no_grad():
        model(tokens, plain)
        monkeypatch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda q, k, v, **options: seen.append((k, v)) or attend(q, k, v, **options),
        )
        lab.with_cache(model, lab.per_channel, lab.per_token, 3)(tokens)
    k, v = (x.repeat_interleave(2, dim=1) for x in (plain[0].k, plain[0].v))
    assert torch.equal(seen[0][0], lab.per_channel(k, 3)), "keys after rotation, by channel"
    assert torch.equal(seen[0][1], lab.per_token(v, 3)), "values, by token"


def test_a_growing_cache_rounds_a_group_once_and_for_all():
    x = normal(1, 2, 80, 4)
    cache, kept = lab.RoundedCache(lab.per_channel, lab.per_token, 4), None
    for s in range(80):
        k, v = cache.append(x[:, :, s : s + 1], -x[:, :, s : s + 1])
        assert k.shape == v.shape == (1, 2, s + 1, 4)
        whole = (s + 1) // 32 * 32
        assert torch.equal(k[:, :, whole:], x[:, :, whole : s + 1]), "no full group yet"
        if kept is not None:
            assert torch.equal(k[:, :, : kept.shape[2]], kept), "what is stored never changes"
        kept = k[:, :, :whole]
    assert torch.equal(k, lab.per_channel(x, 4)) and torch.equal(v, lab.per_token(-x, 4))


def test_token_by_token_is_the_model_when_nothing_is_rounded():
    model = tiny()
    tokens = torch.randint(40, (2, 40), generator=torch.Generator().manual_seed(0))
    found = lab.token_by_token(model, tokens, [KVCache() for _ in model.blocks])
    with torch.no_grad():
        torch.testing.assert_close(found, model(tokens).log_softmax(-1), atol=1e-5, rtol=0)


# A real model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random Llama in Hugging Face's format, with grouped heads and an untied output."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        tie_word_embeddings=False,
        initializer_range=0.15,  # large enough that what it writes is not noise
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("method, bits", [("nearest", 4.5), ("nf4", 4.5), ("gptq", 4.5)])
def test_a_hugging_face_checkpoint_is_rounded_by_the_labs_functions(folder, method, bits):
    row = lab.quantize_checkpoint(folder, method, n=4, length=64)
    assert row["bits"] == bits and row["bits"] < row["file_bits"] < 32
    assert 0 < row["kl"] < 0.2 and 0.3 < row["agreement"] < 1
    assert row["difference"] == pytest.approx(row["kl"], abs=5 * row["error"]), "on what the model wrote, the same"


def test_what_transformers_computes_with_the_rounded_weights_is_what_is_judged(folder):
    """Their model with our rounded matrices put in gives the same logits as ours."""
    ours, _ = lab.quantized(checkpoint.from_hf(folder), lab.nf4)
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    for name, layer in lab.matrices(ours).items():
        theirs.get_parameter(checkpoint.hf_name(f"blocks.{name}.weight")).data = layer.weight.data
    tokens = lab.own_windows(ours, 3, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=2e-5, rtol=0)


def test_any_method_can_be_given(folder):
    same = lab.quantize_checkpoint(folder, lambda name, w: (w, [w]), n=2, length=32)
    assert same["bits"] == 32 and same["kl"] == pytest.approx(0, abs=1e-7) and same["agreement"] == 1
    eight = lab.quantize_checkpoint(folder, lab.nearest(8, 32), n=2, length=32)
    assert eight["bits"] == 8.5 and eight["kl"] < 1e-3


def test_gptq_calibrates_on_the_model_at_hand(folder):
    model = checkpoint.from_hf(folder)
    windows = lab.own_windows(model, 4, 64, seed=1)
    method = lab.gptq_for(model, windows, 3, 32)
    inputs = lab.layer_inputs(model, windows)
    better = 0
    for name, layer in lab.matrices(model).items():
        w, x = layer.weight.detach(), inputs[name]
        errors = [((m(name, w)[0] - w) @ x.T).square().mean() for m in (method, lab.nearest_clipped(3, 32))]
        better += errors[0] < errors[1]
    assert better == 14, "a smaller output error in every matrix"


def test_own_windows_are_what_the_model_writes(folder):
    model = checkpoint.from_hf(folder)
    a, b, c = (lab.own_windows(model, 3, 20, seed=s) for s in (0, 0, 1))
    assert a.shape == (3, 21) and torch.equal(a, b) and not torch.equal(a, c)
    with torch.no_grad():
        written = -model(a[:, :-1]).log_softmax(-1).gather(-1, a[:, 1:, None]).mean()
    assert written < 0.9 * math.log(120), "likelier than chance"


def test_contexts_too_short_for_the_length_are_cut(folder):
    assert lab.quantize_checkpoint(folder, "nearest", n=2, length=500)["bits"] == 4.5


def test_other_methods_and_folders_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="int3"):
        lab.quantize_checkpoint(folder, "int3")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        lab.quantize_checkpoint(tmp_path)
