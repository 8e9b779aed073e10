"""Lab 02: grids, groups, packing, GPTQ and the judge hold what the lab says of them; what other libraries agree with."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

from lab_source import definitions
from tinylm import checkpoint, data
from tinylm.model import Config, TinyLlama
from tinylm.train import window_losses

lab = definitions("02_quantization")
PARTS = sorted(p.stem for p in Path(__file__).parent.glob("test_02_quantization_*.py"))

seeds = st.integers(0, 2**31)
many = settings(deadline=None, max_examples=40)


def random(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny() -> TinyLlama:
    torch.manual_seed(0)
    return TinyLlama(Config(20, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_len=24))


# Grids


@many
@given(seeds, st.integers(2, 8), st.sampled_from([None, 0, 1]), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_absmax_takes_the_nearest_of_its_levels(seed, bits, axis, size):
    x = size * random(seed, 3, 7, dtype=torch.float64)
    q, scale = lab.absmax_quantize(x, bits, axis)
    top = 2 ** (bits - 1) - 1
    absmax = x.abs().max() if axis is None else x.abs().amax(axis, keepdim=True)
    torch.testing.assert_close(scale * top, absmax.expand_as(scale), rtol=1e-12, atol=0)
    levels = torch.arange(-top, top + 1) * scale.expand_as(x)[..., None]
    distance = (levels - x[..., None]).abs().amin(-1)
    assert ((q * scale - x).abs() <= distance * (1 + 1e-9) + 1e-12 * size).all()


@many
@given(seeds, st.integers(2, 8), st.integers(-40, 40))
def test_absmax_follows_powers_of_two_and_signs(seed, bits, power):
    x = random(seed, 4, 6)
    q, scale = lab.absmax_quantize(x, bits, 1)
    scaled, scale_scaled = lab.absmax_quantize(-x * 2.0**power, bits, 1)
    assert torch.equal(scaled, -q) and torch.equal(scale_scaled, scale * 2.0**power)


@many
@given(seeds, st.integers(1, 8), st.sampled_from([None, 0, 1]), st.floats(-3, 3))
def test_affine_is_near_and_keeps_zero(seed, bits, axis, shift):
    x = random(seed, 3, 7, dtype=torch.float64) + shift
    x[1, 2] = 0.0
    q, scale, zero = lab.affine_quantize(x, bits, axis)
    assert q.dtype == zero.dtype == torch.uint8 and int(q.max()) < 2**bits
    x_hat = lab.affine_dequantize(q, scale, zero)
    assert x_hat[1, 2] == 0
    # half a step of its own, and at the ends half a step of the rounded zero point
    assert ((x_hat - x).abs() <= scale * (1 + 1e-9)).all()
    assert ((x_hat - x).abs() <= scale * 0.5000001).double().mean() > 0.5


@pytest.mark.parametrize("x", [torch.tensor([190.0, 1.0]) * 2.0**-149, random(0, 200, 64).bfloat16()])
def test_a_scale_that_was_rounded_down_pushes_no_code_over_the_end(x):
    """Subnormal numbers, and a format with 8 bits of precision."""
    for bits in (4, 8):
        q, _ = lab.absmax_quantize(x, bits, x.ndim - 1)
        assert q.int().abs().max() <= 2 ** (bits - 1) - 1 and (q.float() * x.float() >= 0).all()


def test_the_rule_of_six_decibels_is_exact_for_even_numbers():
    x = torch.linspace(-1, 1, 1_000_001, dtype=torch.float64)
    for bits in range(2, 9):
        q, scale = lab.absmax_quantize(x, bits)
        assert lab.snr_db(x, q * scale) == pytest.approx(20 * math.log10(2**bits - 2), abs=1e-3)


@many
@given(seeds, st.integers(2, 8), st.sampled_from([None, 0, 1]))
def test_clipping_never_loses(seed, bits, axis):
    x = random(seed, 5, 40)

    def error(q, scale):
        return (q * scale - x).square().sum().item()

    assert error(*lab.clipped_quantize(x, bits, axis)) <= error(*lab.absmax_quantize(x, bits, axis)) * (1 + 1e-6)


@many
@given(seeds, st.integers(2, 8), st.sampled_from([1, 2, 8, 24]), st.sampled_from([1e-6, 1e-3, 1.0, 1e4]))
def test_groups_agree_with_a_loop(seed, bits, group_size, size):
    w = size * random(seed, 3, 24)
    codes, scale = lab.quantize_groups(w, bits, group_size)
    assert scale.dtype == torch.float16 and scale.shape == (3, 24 // group_size)
    top = 2 ** (bits - 1) - 1
    for r in range(3):
        for n in range(24 // group_size):
            part = w[r, n * group_size : (n + 1) * group_size].numpy()
            s = np.float16(np.abs(part).max() / np.float32(top))
            s = np.float32(s if s > 0 else 1)
            assert float(scale[r, n]) == s
            expected = np.clip(np.round(part / s), -top, top)
            assert codes[r, n * group_size : (n + 1) * group_size].tolist() == expected.tolist()


@many
@given(seeds, st.integers(2, 8), st.sampled_from([4, 12]))
def test_clipped_groups_are_nearest_under_their_stored_scale(seed, bits, group_size):
    w = random(seed, 4, 24)
    codes, scale = lab.clipped_groups(w, bits, group_size)
    step = lab.dequantize_groups(torch.ones_like(codes), scale)
    top = 2 ** (bits - 1) - 1
    assert torch.equal(codes.float(), (w / step).round().clamp(-top, top))
    plain = lab.dequantize_groups(*lab.quantize_groups(w, bits, group_size))
    assert (lab.dequantize_groups(codes, scale) - w).norm() <= (plain - w).norm() * 1.002  # float16 scales


# Bytes


@many
@given(seeds, st.integers(1, 4), st.integers(1, 9))
def test_packed_nibbles_come_back(seed, o, half):
    codes = torch.randint(-8, 8, (o, 2 * half), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = lab.pack_int4(codes)
    assert packed.nbytes == o * half and torch.equal(lab.unpack_int4(packed, codes.shape), codes)
    assert int(packed[0, 0]) == (int(codes[0, 0]) + 8) + 16 * (int(codes[0, 1]) + 8)


@many
@given(seeds, st.integers(1, 8), st.integers(1, 40))
def test_packed_bits_come_back_and_take_no_byte_too_many(seed, bits, n):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = lab.pack_bits(codes, bits)
    assert packed.nbytes == math.ceil(n * bits / 8) and torch.equal(lab.unpack_bits(packed, bits, (n,)), codes)


def test_bits_are_counted_from_what_a_file_would_hold(tmp_path):
    model = tiny()
    rounded, stored = lab.quantized(model, lab.nearest(4, 16))
    bits, file_bits = lab.true_bits(model, stored)
    assert bits == 4 + 16 / 16
    rest = {k: v for k, v in model.state_dict().items() if "_proj" not in k and k != "lm_head.weight"}
    content = to_safetensors({**stored, **rest})
    assert set(from_safetensors(content)) == {*stored, *rest}
    (tmp_path / "file").write_bytes(content)
    assert file_bits == 8 * (tmp_path / "file").stat().st_size / model.config.n_params()
    # what is stored is enough to restore what the model computes with
    for name, layer in lab.matrices(rounded).items():
        codes = lab.unpack_bits(stored[f"{name}.0"], 4, layer.weight.shape)
        assert torch.equal(lab.dequantize_groups(codes, stored[f"{name}.1"]), layer.weight)
    assert not any(torch.equal(a.weight, b.weight) for a, b in zip(
        lab.matrices(model).values(), lab.matrices(rounded).values(), strict=True
    ))  # fmt: skip


# The judge


def test_the_judge_pairs_windows_and_measures_three_distances():
    model = checkpoint.load("shakespeare-30k")
    windows = data.fixed_windows(data.shakespeare().val_tokens, 64)[:40]
    judge = lab.Judge(model, windows)
    rounded, _ = lab.quantized(model, lab.nearest(3))
    row = judge(rounded)
    difference = window_losses(rounded, windows) - window_losses(model, windows)
    assert row["difference"] == pytest.approx(difference.mean().item(), abs=1e-5)
    assert row["error"] == pytest.approx((difference.std() / 40**0.5).item(), rel=1e-3)
    assert row["kl_error"] == pytest.approx(lab.standard_error(row["windows"]["kl"]))
    with torch.no_grad():
        p, q = (m(windows[:, :-1]).double().softmax(-1) for m in (model, rounded))
    assert row["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert row["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=1e-3)
    assert judge(model)["kl"] < 1e-9 and judge(model)["agreement"] == 1


def test_the_control_noise_is_as_large_as_the_error():
    w = random(0, 64, 96)
    method = lab.nearest(3, 32)
    error, noise = (m("", w)[0] - w for m in (method, lab.noise_like(method, 1)))
    assert noise.norm() == pytest.approx(error.norm().item(), rel=0.03)
    assert abs((noise * error).sum()) < 0.05 * error.square().sum()


# GPTQ


def hessian_of(seed: int, n: int, samples: int = 200) -> torch.Tensor:
    x = random(seed, samples, n) @ random(seed + 1, n, n)
    return x.T @ x / samples


@many
@given(seeds, st.sampled_from([2, 3, 4, 8]), st.sampled_from([None, 4, 6]), st.sampled_from([0.01, 0.1]), st.booleans())
def test_gptq_agrees_with_its_definition(seed, bits, group_size, damp, clip):
    w, h = random(seed, 3, 12), hessian_of(seed, 12)
    fast = lab.gptq(w, h, bits, group_size, damp, clip)
    torch.testing.assert_close(fast, lab.gptq_slow(w, h, bits, group_size, damp, clip), atol=1e-5, rtol=0)
    for block in (1, 5, 12):
        torch.testing.assert_close(lab.gptq_lazy(w, h, bits, group_size, damp, clip, block=block), fast, atol=1e-5, rtol=0)
    codes = fast / lab.step_sizes(lab.grid_scales(w, bits, group_size, clip), 12)
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert codes.abs().max() < 2 ** (bits - 1) - 0.99


@many
@given(seeds)
def test_what_is_passed_on_is_the_least_squares_answer(seed):
    """After one column is rounded, no other change of the rest makes the output error smaller."""
    n = 6
    w, h = random(seed, 1, n, dtype=torch.float64), hessian_of(seed, n).double()
    u = lab.inverse_factor(h, damp=0.0)
    error = w[0, 0].round() - w[0, 0]
    moved = error / u[0, 0] * u[0, 1:]  # what the lab adds to the other columns
    best = torch.linalg.solve(h[1:, 1:], -h[1:, 0] * error)
    torch.testing.assert_close(moved, best, rtol=1e-6, atol=1e-8)


def test_the_factor_is_that_of_the_inverse():
    h = hessian_of(3, 10).double()
    u = lab.inverse_factor(h, damp=0.05)
    damped = h + 0.05 * h.diagonal().mean() * torch.eye(10)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.T @ u @ damped, torch.eye(10, dtype=torch.float64), atol=1e-6, rtol=0)


@many
@given(seeds)
def test_without_correlation_gptq_rounds_to_nearest(seed):
    w = random(seed, 4, 16)
    plain = lab.dequantize_groups(*lab.clipped_groups(w, 3, 16))
    torch.testing.assert_close(lab.gptq(w, torch.eye(16), 3), plain, atol=1e-6, rtol=0)


def test_an_order_is_undone_in_the_result():
    w, h = random(0, 4, 12), hessian_of(0, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = lab.gptq(w[:, order], h[order][:, order], 4)  # one scale a row does not see the order
    torch.testing.assert_close(lab.gptq_lazy(w, h, 4, order=order)[:, order], shuffled, atol=1e-5, rtol=0)


def test_on_the_model_gptq_makes_every_output_error_smaller():
    model = checkpoint.load("shakespeare-30k")
    windows = data.random_windows(data.shakespeare().train_tokens, 32, 64, seed=0)
    inputs = lab.layer_inputs(model, windows)
    assert set(inputs) == set(lab.matrices(model))
    for name, layer in lab.matrices(model).items():
        x, w = inputs[name], layer.weight.detach()
        h = x.T @ x / len(x)
        near = lab.dequantize_groups(*lab.clipped_groups(w, 3, w.shape[1]))
        aware = lab.gptq(w, h, 3)
        outputs = [(x @ (w_hat - w).T).square().mean().item() for w_hat in (near, aware)]
        assert outputs[1] < outputs[0], name
        assert lab.output_error(w, aware, h) == pytest.approx(outputs[1], rel=1e-3)


# Bad input

W = random(0, 4, 8)
bad_numbers = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", bad_numbers)
@pytest.mark.parametrize("name", ["absmax_quantize", "affine_quantize", "clipped_quantize"])
def test_numbers_that_are_none_are_refused(name, bad):
    x = W.clone()
    x[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        getattr(lab, name)(x, 4)
    with pytest.raises(ValueError, match="NaN or infinite"):
        lab.quantize_groups(x, 4, 4)


@pytest.mark.parametrize("bits", [0, 9, -1, 4.0, True, "4"])
def test_bits_outside_one_to_eight_are_refused(bits):
    for function in (lab.absmax_quantize, lab.affine_quantize):
        with pytest.raises(ValueError, match="bits must be an integer"):
            function(W, bits)
    with pytest.raises(ValueError, match="from 2 to 8"):
        lab.absmax_quantize(W, 1)
    lab.affine_quantize(W, 1)


def test_empty_tensors_and_groups_that_do_not_divide_are_refused():
    for function in (lab.absmax_quantize, lab.affine_quantize):
        with pytest.raises(ValueError, match="nothing to round"):
            function(torch.empty(0, 3), 4)
    for group_size in (3, 0, -4, 16, 4.0):
        for function in (lab.quantize_groups, lab.clipped_groups):
            with pytest.raises(ValueError, match="choose a divisor"):
                function(W, 4, group_size)
    with pytest.raises(ValueError, match="a matrix"):
        lab.quantize_groups(W[0], 4, 4)
    with pytest.raises(ValueError, match="does not fit float16"):
        lab.quantize_groups(1e6 * W, 4, 4)


def test_packing_refuses_what_does_not_fit():
    for codes in (torch.tensor([[8, 0]]), torch.tensor([[-9, 0]]), torch.tensor([[1, 2, 3]])):
        with pytest.raises(ValueError, match="even"):
            lab.pack_int4(codes)
    with pytest.raises(ValueError, match="do not hold"):
        lab.unpack_int4(torch.zeros(3, dtype=torch.uint8), (2, 4))


def test_a_hessian_that_cannot_be_is_refused():
    for function in (lab.gptq, lab.gptq_lazy):
        with pytest.raises(ValueError, match="hessian of that size"):
            function(W, torch.eye(7), 4)
        with pytest.raises(ValueError, match="not positive definite"):
            function(W, torch.zeros(8, 8), 4)
        with pytest.raises(ValueError, match="not positive definite"):
            function(W, torch.ones(8, 8), 4, damp=0.0)
        with pytest.raises(ValueError, match="NaN or infinite"):
            function(W, torch.full((8, 8), math.nan), 4)
        with pytest.raises(ValueError, match="not symmetric"):
            function(W, torch.eye(8) + torch.ones(8, 8).triu(1), 4)
        with pytest.raises(ValueError, match="a matrix"):
            function(W[0], torch.eye(8), 4)
    assert lab.gptq(W, torch.ones(8, 8), 4).isfinite().all(), "damping makes a singular one usable"
    with pytest.raises(ValueError, match="once"):
        lab.gptq_lazy(W, torch.eye(8), 4, order=torch.zeros(8, dtype=torch.int64))


# Other libraries


def test_parity_table(parity):
    """What chapter 02 shows of our agreement with torch, gguf and bitsandbytes."""
    rows = [row for part in PARTS if hasattr(module := import_module(part), "parity_rows") for row in module.parity_rows()]
    assert {row["against"].split()[0] for row in rows} >= {"PyTorch", "gguf", "bitsandbytes"}
    parity("02_quantization", rows)
