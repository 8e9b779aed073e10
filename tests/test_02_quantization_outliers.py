"""Lab 02: what its rewrites keep, to the bit or to 1e-10, and what rounding inputs does, against slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_source import definitions
from tinylm import checkpoint
from tinylm.model import Config, TinyLlama

lab = definitions("02_quantization")

CONFIG = Config(96, dim=32, n_layers=2, n_heads=2, hidden_dim=96, max_len=32)
GROUPED = Config(50, dim=48, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=96, max_len=32)


def small(config: Config = CONFIG, seed: int = 0) -> TinyLlama:
    """A random model with gains that are not all one."""
    torch.manual_seed(seed)
    model = TinyLlama(config)
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
    return model


def tokens(config: Config = CONFIG, n: int = 3) -> torch.Tensor:
    return torch.randint(config.vocab_size, (n, config.max_len), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: TinyLlama) -> torch.Tensor:
    return model(tokens(model.config))


def rand(*shape, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Planting: the same function, to the bit.


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, CONFIG.dim - 1), min_size=1, max_size=8),
    st.integers(-12, 12),
    st.integers(0, 5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_power_of_two_changes_no_bit_of_the_logits(channels, exponent, seed, dtype):
    model = small(seed=seed).to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    planted = lab.plant_outliers(model, channels, 2.0**exponent)
    assert torch.equal(logits(planted), logits(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the model itself was changed"


def test_planting_lifts_what_every_matrix_reads():
    model, channels = small(), [3, 17]
    planted = lab.plant_outliers(model, channels, 64)
    windows = tokens()
    ours, theirs = lab.layer_inputs(planted, windows), lab.layer_inputs(model, windows)
    for name, x in theirs.items():
        factor = torch.ones(x.shape[1])
        factor[channels] = 64
        assert torch.equal(ours[name], x * factor), name


def test_the_shipped_model_too():
    model = checkpoint.load("shakespeare-800k")
    x = torch.randint(96, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(lab.plant_outliers(model, [17, 59, 101], 64)(x), model(x))


@pytest.mark.parametrize("s", [3.0, 0.0, -2.0, 1.5, 63.999, math.inf, math.nan])
def test_other_factors_are_refused(s):
    with pytest.raises(ValueError, match="power of two"):
        lab.plant_outliers(small(), [0], s)


@pytest.mark.parametrize("channels", [[], [-1], [CONFIG.dim], [0, 99]])
def test_channels_that_are_not_there_are_refused(channels):
    with pytest.raises(ValueError, match="channels"):
        lab.plant_outliers(small(), channels, 2.0)


def test_with_grouped_heads_the_seam_at_the_values_is_left_out():
    model = small(GROUPED)
    readers = [names for _, names in lab.seams(model)]
    assert len(readers) == 3 * GROUPED.n_layers and not any("o_proj" in name for names in readers for name in names)
    assert torch.equal(logits(lab.plant_outliers(model, [5, 40], 32)), logits(model))


# Rescaling: the same function, to float64's rounding.


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from([CONFIG, GROUPED]))
def test_any_positive_factors_keep_the_function(seed, config):
    model, g = small(config).double(), torch.Generator().manual_seed(seed)
    rescaled = lab.rescale(model, lambda name, w: torch.exp(2 * torch.randn(w.shape[1], generator=g).double()))
    assert not torch.equal(rescaled.blocks[0].mlp.down_proj.weight, model.blocks[0].mlp.down_proj.weight)
    torch.testing.assert_close(logits(rescaled), logits(model), atol=1e-10, rtol=0)


def test_each_matrix_is_read_at_one_seam():
    model = small()
    names = [name for _, readers in lab.seams(model) for name in readers]
    assert sorted(names) == sorted(lab.matrices(model))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_factors_must_be_positive_and_finite(bad):
    with pytest.raises(ValueError, match="positive, finite"):
        lab.rescale(small(), lambda name, w: torch.full_like(w[0], bad))
    with pytest.raises(ValueError, match="positive, finite"):
        lab.rescale(small(), lambda name, w: torch.ones(3))


# SmoothQuant.


def calibrated(model: TinyLlama) -> dict[str, torch.Tensor]:
    return lab.layer_inputs(model, tokens(model.config))


@settings(deadline=None, max_examples=15)
@given(st.floats(0, 1), st.integers(0, 5))
def test_smoothquant_keeps_the_function(alpha, seed):
    model = small(seed=seed).double()
    smoothed, _ = lab.migrate(model, calibrated(model), lambda x, w: lab.smoothing(x, w, alpha))
    torch.testing.assert_close(logits(smoothed), logits(model), atol=1e-10, rtol=0)


def test_at_one_half_inputs_and_columns_have_the_same_maxima():
    model = small().double()
    smoothed, _ = lab.migrate(model, calibrated(model), lab.smoothing)
    read, layers = calibrated(smoothed), lab.matrices(smoothed)
    for n in range(CONFIG.n_layers):
        w = layers[f"{n}.mlp.down_proj"].weight.abs().amax(0)
        torch.testing.assert_close(read[f"{n}.mlp.down_proj"].abs().amax(0), w)


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 1), st.integers(0, 2**31))
def test_the_factors_agree_with_a_loop(alpha, seed):
    x, w = rand(7, 5, seed=seed), rand(4, 5, seed=seed + 1)
    columns = zip(x.T.abs().tolist(), w.T.abs().tolist(), strict=True)
    expected = [max(x_j) ** alpha / max(w_j) ** (1 - alpha) for x_j, w_j in columns]
    assert lab.smoothing(x, w, alpha).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_undoes_the_planting_by_construction(alpha):
    model = small().double()
    planted = lab.plant_outliers(model, [1, 30], 64)

    def smoothing(x, w):
        return lab.smoothing(x, w, alpha)

    ours, f = lab.migrate(planted, calibrated(planted), smoothing)
    theirs, f0 = lab.migrate(model, calibrated(model), smoothing)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-10, msg=name)
    ratio = f["0.mlp.down_proj"] / f0["0.mlp.down_proj"]
    assert ratio[[1, 30]].tolist() == pytest.approx([64, 64]) and ratio[2].item() == pytest.approx(1)


def test_dead_channels_do_no_harm_and_bad_alphas_are_refused():
    x, w = rand(9, 4), rand(5, 4, seed=1)
    x[:, 2] = 0
    w[:, 1] = 0
    assert (s := lab.smoothing(x, w)).isfinite().all() and (s > 0).all()
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            lab.smoothing(x, w, alpha)


def test_permuted_factors_are_the_same_elsewhere():
    factors = {"a": rand(50), "b": rand(20, seed=1) > 0}
    shuffled = lab.permuted(factors)
    for name, f in factors.items():
        assert not torch.equal(shuffled[name], f) and torch.equal(shuffled[name].sort()[0], f.sort()[0])
        assert torch.equal(lab.permuted(factors)[name], shuffled[name]), "the same seed, the same order"


# Rounding inputs.

arrays = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 500.0]))


@settings(deadline=None, max_examples=60)
@given(arrays, st.integers(2, 8), st.booleans())
def test_rounding_agrees_with_a_loop(shape, bits, per_token):
    n, i, seed, scale = shape
    x = scale * rand(n, i, seed=seed)
    if seed % 3 == 0:
        x[0] = 0
    rows = x.tolist()
    top = 2 ** (bits - 1) - 1
    largest = [max(map(abs, row)) for row in rows]
    largest = largest if per_token else [max(largest)] * n
    expected = [
        [round(v / (m / top)) * (m / top) if m > 0 else 0.0 for v in row] for row, m in zip(rows, largest, strict=True)
    ]
    ours = lab.absmax_round(x, bits, -1 if per_token else None)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=1e-12 * scale)


@settings(deadline=None, max_examples=40)
@given(arrays, st.integers(2, 8), st.integers(-8, 8))
def test_a_tokens_scale_is_its_own(shape, bits, exponent):
    n, i, seed, scale = shape
    x = scale * rand(n, i, seed=seed)
    scaled = x.clone()
    scaled[0] *= 2.0**exponent
    one, other = lab.absmax_round(x, bits, -1), lab.absmax_round(scaled, bits, -1)
    assert torch.equal(other[0], one[0] * 2.0**exponent), "scaling a token should scale what it is rounded to"
    assert torch.equal(other[1:], one[1:]), "and leave the other tokens alone"


def test_one_scale_for_the_tensor_lets_tokens_disturb_each_other():
    x = rand(4, 8)
    loud = x.clone()
    loud[0] *= 64
    assert not torch.equal(lab.absmax_round(loud, 8)[1:], lab.absmax_round(x, 8)[1:])


@pytest.mark.parametrize("x", [torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), torch.zeros(0, 3)])
def test_bad_inputs_are_refused(x):
    with pytest.raises(ValueError):
        lab.absmax_round(x, 8)


@pytest.mark.parametrize("bits", [0, 1, 9, 4.0, True])
def test_bad_widths_are_refused(bits):
    with pytest.raises(ValueError, match="bits"):
        lab.absmax_round(torch.ones(3), bits)


def test_every_matrix_reads_the_changed_input_and_nothing_else_changes():
    model, seen = small(), []
    before = logits(model)

    def change(name, x):
        seen.append((name, x.shape[-1]))
        return 2 * x

    doubled = lab.change_inputs(lab.copy.deepcopy(model), change)
    out = logits(doubled)
    layers = lab.matrices(model)
    expected = {readers[0]: layers[readers[0]].in_features for _, readers in lab.seams(model)}
    assert dict(seen) == expected and len(seen) == len(expected), "q, k and v share one input, gate and up another"
    assert torch.equal(logits(model), before) and not torch.allclose(out, before)
    for layer in lab.matrices(model).values():
        layer.weight.data *= 2
    assert torch.equal(out, logits(model)), "twice the input is twice the weight"


# LLM.int8()'s split.


def plain_int8(x, w):
    return lab.absmax_round(x, 8, -1) @ lab.absmax_round(w, 8, -1).T


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 9), st.sampled_from([torch.float32, torch.float64]))
def test_the_splits_ends_are_float_and_plain_int8(seed, i, n, dtype):
    x, w = rand(n, i, seed=seed, dtype=dtype), rand(5, i, seed=seed + 1, dtype=dtype)
    assert torch.equal(lab.split_product(x, w, 0), x @ w.T)
    assert torch.equal(lab.split_product(x, w, math.inf), plain_int8(x, w))


def test_between_them_the_outliers_alone_are_kept():
    x, w = rand(200, 32), rand(16, 32, seed=1)
    x[:, [4, 9]] *= 100
    assert lab.outlier_columns(x, 20).nonzero().flatten().tolist() == [4, 9]
    exact = x @ w.T
    kept, lost = (lab.split_product(x, w, t) - exact for t in (20, math.inf))
    assert kept.norm() < lost.norm() / 10
    quiet = x.clone()
    quiet[:, [4, 9]] = 0
    loud = lab.quantize_except(x, lab.outlier_columns(x, 20), 8, -1)
    assert torch.equal(loud[:, [4, 9]], x[:, [4, 9]])
    loud[:, [4, 9]] = 0
    assert torch.equal(loud, lab.absmax_round(quiet, 8, -1)), "the others' scale should not see what is kept"


def test_the_split_refuses_bad_thresholds_and_masks():
    x = rand(4, 6)
    for threshold in (-1.0, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            lab.outlier_columns(x, threshold)
    for kept in (torch.zeros(5, dtype=torch.bool), torch.zeros(6), torch.zeros(6, dtype=torch.int64)):
        with pytest.raises(ValueError, match="kept"):
            lab.quantize_except(x, kept, 8)


# AWQ.


def output_distance(w, w_hat, x):
    """Mean square of the outputs' error, by the inputs themselves and a loop over tokens."""
    return sum(((w_hat - w) @ row).square().sum() for row in x).item() / len(x) / len(w)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_awq_is_never_worse_than_rounding_to_nearest_on_its_calibration_text(seed, bits, outlier):
    x, w = rand(40, 32, seed=seed), rand(8, 32, seed=seed + 1)
    if outlier:
        x[:, 7] *= 50
    s = lab.awq_scale(x, w, bits, group_size=16)
    assert s.log().mean().item() == pytest.approx(0, abs=1e-9)
    plain, ours = (
        output_distance(w, lab.dequantize_groups(*lab.quantize_groups(w * f, bits, 16)) / f, x)
        for f in (torch.ones_like(s), s)
    )
    assert ours <= plain * (1 + 1e-6)
    error = lab.scaled_error(w, s, x.T @ x / len(x), bits, 16)
    assert error == pytest.approx(ours, rel=1e-6), "the error from X^T X should be the error of the outputs"
    if outlier:
        assert s.argmax() == 7, "the salient channel should be scaled most"
        assert bits == 8 or ours < plain


# Rotation.


@pytest.mark.parametrize("n", [1, 2, 8, 128])
def test_hadamard_is_orthogonal_and_flat(n):
    h = lab.hadamard(n)
    torch.testing.assert_close(h @ h.T, torch.eye(n).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(h.abs(), torch.full((n, n), n**-0.5).double())


@pytest.mark.parametrize("n", [0, -2, 3, 384])
def test_sylvesters_sizes_only(n):
    with pytest.raises(ValueError, match="power of two"):
        lab.hadamard(n)
    with pytest.raises(ValueError, match="divide"):
        lab.rotation(100, 64)


@pytest.mark.parametrize(
    "turn", [lambda n: lab.rotation(n, 32), lambda n: lab.signed_permutation(n), lambda n: lab.rotation(n, 1)]
)
@pytest.mark.parametrize("config", [CONFIG, Config(96, dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=96)])
def test_rotating_keeps_the_function(turn, config):
    model = small(config).double()
    before = logits(model)
    rotated = lab.rotated(model, turn)
    torch.testing.assert_close(logits(rotated), before, atol=1e-10, rtol=0)
    assert torch.equal(logits(model), before), "the model itself was changed"
    for name, layer in lab.matrices(rotated).items():
        assert not torch.allclose(layer.weight, lab.matrices(model)[name].weight), f"{name} was not rotated"


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([32, 96, 128]), st.integers(2, 8))
def test_rounding_commutes_with_signed_permutations_and_not_with_rotations(seed, n, bits):
    x = rand(5, n, seed=seed, dtype=torch.float32)
    q = lab.signed_permutation(n, seed).float()
    assert torch.equal(lab.absmax_round(x @ q.T, bits, -1), lab.absmax_round(x, bits, -1) @ q.T)
    q = lab.rotation(n, 32, seed).float()
    assert not torch.allclose(lab.absmax_round(x @ q.T, bits, -1), lab.absmax_round(x, bits, -1) @ q.T, atol=1e-3)


def test_a_rotation_shares_an_outlier_out():
    x = torch.zeros(1, 128, dtype=torch.float64)
    x[0, 77] = 5.0
    assert lab.peak(x) == pytest.approx(128**0.5) and lab.kurtosis(x) == pytest.approx(128)
    assert lab.peak(x @ lab.rotation(128).T) == pytest.approx(1)
    assert lab.peak(x @ lab.rotation(128, 8).T) == pytest.approx(16**0.5)
    assert lab.peak(x @ lab.signed_permutation(128).T) == pytest.approx(128**0.5)
    normal = rand(2000, 128)
    assert lab.kurtosis(normal) == pytest.approx(3, abs=0.1) and 2.6 < lab.peak(normal) < (2 * math.log(256)) ** 0.5


def test_the_seed_decides_the_rotation():
    assert torch.equal(lab.rotation(64, 64, 1), lab.rotation(64, 64, 1))
    assert not torch.equal(lab.rotation(64, 64, 1), lab.rotation(64, 64, 2))


# A rung on a rewritten model.


def rungs(model: TinyLlama):
    """The lab with its table and a judge that keeps the logits it is shown, and what matrices read (hooks included)."""
    shown, table = [], {}
    figures = {"difference": 0.0, "error": 0.0, "kl": 0.0, "agreement": 1.0}

    def judge(rounded):
        shown.append(logits(rounded))
        table["read"] = lab.layer_inputs(rounded, tokens(rounded.config))
        return figures

    return definitions("02_quantization", model=model, table=table, judge=judge), shown, table


def test_a_rung_without_rounding_is_the_rewritten_model():
    model = small()
    here, shown, table = rungs(model)
    planted = here.plant_outliers(model, [2, 9], 64)
    odd = here.rescale(model, lambda name, w: torch.full_like(w[0], 3))
    for name, source in {"planted": planted, "odd": odd}.items():
        here.rung_of(name, source, lambda name, w: (w, [w]), control=True)
        assert torch.equal(shown[-1], logits(source)), "weights or gains are not those of the rewritten model"
        assert table[name]["bits"] == 32 and table[name]["control"]


def test_w4a4_rounds_in_the_rotated_frame():
    model = small()
    here, shown, table = rungs(model)
    here.w4a4("naive", model)
    here.w4a4("shuffled", model, here.signed_permutation)
    here.w4a4("turned", model, lambda n: here.rotation(n, 32))
    for name, x in table["read"].items():
        codes = x / x.abs().amax(-1, keepdim=True) * 7
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0, msg=f"{name} reads what was not rounded")
    harm = (shown[0] - logits(model)).norm()
    assert harm > 0 and (shown[1] - shown[0]).norm() < harm / 4, "mixing nothing should round as before"
    assert (shown[2] - shown[0]).norm() > harm / 4, "and mixing should not"
    assert (shown[2] - logits(model)).norm() < 2 * harm, "rounded in one frame and multiplied in another"
    assert table["naive"]["bits"] == table["turned"]["bits"] < 5, "a rotation from a seed takes no bytes"
