"""Number formats against PyTorch's casts, llama.cpp's block formats against gguf: bit for bit, byte for byte."""

from __future__ import annotations

import math
from functools import cache
from importlib.metadata import version

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_source import definitions
from tinylm import checkpoint

lab = definitions("02_quantization")

CASTS = {  # name: (torch's dtype, one of the same width to read its bits with)
    "bfloat16": (torch.bfloat16, torch.int16),
    "float16": (torch.float16, torch.int16),
    "e5m2": (torch.float8_e5m2, torch.uint8),
    "e4m3fn": (torch.float8_e4m3fn, torch.uint8),
}
PACKED = {"Q8_0": (Kind.Q8_0, 34), "Q4_0": (Kind.Q4_0, 18), "MXFP4": (Kind.MXFP4, 17)}
ours = pytest.mark.parametrize("name", CASTS)
theirs = pytest.mark.parametrize("name", PACKED)


def as_float(bits) -> torch.Tensor:
    """Patterns of 32 bits as float32."""
    return torch.from_numpy(np.asarray(bits, dtype=np.uint32)).view(torch.float32)


def torch_bits(x: torch.Tensor, name: str) -> torch.Tensor:
    dtype, container = CASTS[name]
    return x.to(dtype).view(container).long() & 2 ** (8 * dtype.itemsize) - 1


def overflow(name: str) -> torch.Tensor:
    """Around the largest number, the tie beyond it, the level that would follow, and far out."""
    top = lab.decode_float(torch.tensor(lab.largest_code(name)), name).item()
    below = lab.decode_float(torch.tensor(lab.largest_code(name) - 1), name).item()
    step = top - below
    x = torch.tensor([top, top + step / 4, top + step / 2, top + 3 * step / 4, top + step, 2 * top, 1e30, math.inf])
    up = torch.full_like(x, math.inf)
    x = torch.cat([x, x.nextafter(up), x.nextafter(-up)])
    return torch.cat([x, -x])


@cache
def all_cases(name: str) -> torch.Tensor:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000)
    x = torch.cat([lab.hard_cases(name), overflow(name), as_float(bits), torch.tensor([math.nan, -math.nan])])
    return x.clone()


def pattern_difference(x: torch.Tensor, name: str) -> torch.Tensor:
    """Our bits less PyTorch's; two NaN are the same, whichever of their bits."""
    bits, expected = lab.encode_float(x, name), torch_bits(x, name)
    nan = lab.decode_float(bits, name).isnan()
    assert torch.equal(nan, lab.decode_float(expected, name).isnan())
    return torch.where(nan, 0, bits - expected).abs()


@ours
def test_every_pattern_stands_for_what_pytorch_says(name):
    dtype, container = CASTS[name]
    patterns = torch.arange(2 ** (8 * dtype.itemsize))
    expected = patterns.to(container).view(dtype).float()
    decoded = lab.decode_float(patterns, name)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(decoded.signbit() | decoded.isnan(), expected.signbit() | expected.isnan())


@ours
def test_casts_are_pytorchs_on_every_value_tie_and_neighbour_and_beyond_the_range(name):
    x = all_cases(name)
    assert {0.0, math.inf, -math.inf} < set(x.tolist()) and x.isnan().any()
    wrong = pattern_difference(x, name) > 0
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {len(x)} differ, such as {x[wrong][:5].tolist()}"


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), st.sampled_from(sorted(CASTS)))
def test_casts_are_pytorchs_on_any_float32(bits, name):
    assert pattern_difference(as_float(bits), name).max() == 0


@ours
def test_a_single_number_is_cast_like_many(name):
    """PyTorch has other code for whole vectors than for what is left over."""
    x = torch.cat([overflow(name), torch.tensor([0.0, -0.0, 1.1, math.nan])])
    for number in x:
        assert pattern_difference(number[None].clone(), name).item() == 0, number


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_float32_comes_out_as_it_went_in(bits):
    x = as_float(bits)
    expected = torch.from_numpy(np.asarray(bits, dtype=np.int64))
    known = ~x.isnan()
    assert torch.equal(lab.encode_float(x, "float32")[known], expected[known])
    torch.testing.assert_close(lab.decode_float(expected, "float32"), x, rtol=0, atol=0, equal_nan=True)


def test_overflow_follows_its_rule():
    x = torch.tensor([448.0, 464.0, 464.1, 1e9, math.inf, -1e9])
    saturated = [448, 448, 448, 448, 448, -448]
    assert lab.round_to_float(x, "e4m3fn").tolist() == saturated
    unsaturated = lab.round_to_float(x, "e4m3fn", saturate=False)
    assert unsaturated[:2].tolist() == [448, 448] and unsaturated[2:].isnan().all()
    x = torch.tensor([61439.0, 61440.0, -math.inf])
    assert lab.round_to_float(x, "e5m2").tolist() == [57344, math.inf, -math.inf]
    assert lab.round_to_float(x, "e5m2", saturate=True).tolist() == [57344, 57344, -57344]
    assert lab.round_to_float(torch.tensor([65519.0, 65520.0]), "float16").tolist() == [65504, math.inf]


def test_e2m1_has_the_levels_of_gguf_and_rounds_to_the_nearest_even_one():
    levels = lab.decode_float(torch.arange(16), "e2m1")
    assert (2 * levels).tolist() == list(map(float, quants.MXFP4.kvalues)) and levels[8].signbit()
    for x in torch.linspace(0, 8, 1025):
        error = (levels[:8] - x).abs()
        best = [int(i) for i in (error == error.min()).nonzero()]
        best = [i for i in best if i % 2 == 0] or best
        assert lab.encode_float(x, "e2m1").item() == best[0], x
        assert lab.encode_float(-x, "e2m1").item() == best[0] + 8, x


def test_powers_of_two_are_exact():
    e = torch.arange(-126, 128)
    assert torch.equal(lab.power_of_two(e), torch.ldexp(torch.ones(254, dtype=torch.float64), e))
    assert torch.equal(lab.floor_log2(lab.power_of_two(e)), e)
    assert torch.equal(lab.floor_log2(lab.power_of_two(e).float().nextafter(torch.tensor(0.0))), e - 1)


@pytest.mark.parametrize(
    ("x", "name", "options", "error"),
    [
        (torch.ones(2), "e3m4", {}, "unknown format 'e3m4'"),
        (torch.ones(2).double(), "float16", {}, "must be float32, got torch.float64"),
        (torch.tensor([math.nan]), "e2m1", {}, "no pattern for NaN"),
        (torch.ones(2), "e2m1", {"saturate": False}, "it saturates"),
    ],
)
def test_formats_refuse_what_they_cannot_express(x, name, options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        lab.encode_float(x, name, **options)


# Block formats.


def ours_for(name: str):
    stem = name.lower()
    return getattr(lab, f"{stem}_pack"), getattr(lab, f"{stem}_unpack")


@cache
def random_matrices() -> list[torch.Tensor]:
    """Many scales, zeros, extremes of either sign (and both at once), ties, outliers, even grids."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(64, 128, generator=g)
    scale = 2.0 ** torch.randint(-12, 12, (64, 1), generator=g) * (1 + torch.rand(64, 1, generator=g))
    integers = torch.randint(-16, 17, (64, 128), generator=g) / 2.0
    integers[:, ::32] = torch.tensor([8.0, -8.0]).repeat(32)[:, None]  # ties of Q4_0: the scale is exactly 1
    bytes_ = torch.randint(-254, 255, (64, 128), generator=g) / 2.0
    bytes_[:, ::32] = 127.0  # ties of Q8_0
    both = torch.randn(64, 128, generator=g).clamp(-1, 1)
    both[:, 5::32], both[:, 9::32] = 1.5, -1.5
    outlier = normal.clone()
    outlier[:, ::32] *= 1000
    sparse = normal * (torch.rand(64, 128, generator=g) < 0.05)
    grid = torch.randint(-12, 13, (64, 128), generator=g) / 4  # ties of e2m1
    beside = torch.rand(64, 1, generator=g) + 0.5  # beside ties: whether one divides by d or multiplies by 1 / d shows
    beside = torch.cat([beside, (torch.randint(-7, 7, (64, 31), generator=g) + 0.5) * (beside / 8)], 1)
    beside_8 = beside[:, :1] * (torch.randint(-127, 127, (64, 31), generator=g) + 0.5) / 127
    beside_8 = torch.cat([beside[:, :1], beside_8], 1)
    zeros = torch.zeros(2, 64)
    zeros[1, 32:] = -0.0
    return [
        normal,
        normal * scale,
        integers,
        -integers,
        bytes_,
        both,
        outlier,
        sparse,
        grid,
        beside,
        beside_8,
        zeros,
        torch.ones(1, 32),
    ]


@cache
def checkpoint_matrices() -> list[torch.Tensor]:
    model = checkpoint.load("shakespeare-800k")
    weights = [layer.weight.detach() for layer in lab.matrices(model).values()]
    assert len(weights) == 28
    return weights


def byte_differences(name: str, matrices: list[torch.Tensor]) -> list[np.ndarray]:
    pack, _ = ours_for(name)
    out = []
    for w in matrices:
        data, expected = pack(w), quants.quantize(w.numpy(), PACKED[name][0])
        assert data.dtype == torch.uint8 and data.shape == expected.shape
        out.append(np.abs(data.numpy().astype(int) - expected).ravel())
    return out


@cache
def all_byte_differences(name: str) -> list[np.ndarray]:
    return byte_differences(name, checkpoint_matrices() + random_matrices())


@theirs
def test_bytes_are_ggufs(name):
    for i, differences in enumerate(all_byte_differences(name)):
        what = f"matrix {i} of the checkpoint" if i < 28 else f"random matrix {i - 28}"
        assert differences.max() == 0, f"{name}, {what}: {np.count_nonzero(differences)} bytes differ"


blocks = st.tuples(
    st.integers(0, 2**31), st.integers(-100, 9), st.sampled_from(["normal", "halves", "wide", "few"]), st.integers(1, 3)
)


def random_block(case) -> torch.Tensor:
    seed, exponent, kind, rows = case
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 64, generator=g)
    if kind == "halves":
        x = (4 * x).round() / 2
    elif kind == "wide":
        x = x * 2.0 ** torch.randint(-30, 3, x.shape, generator=g)
    elif kind == "few":
        x = x.sign() * torch.randint(0, 2, x.shape, generator=g)
    return x * 2.0**exponent


@theirs
@settings(deadline=None, max_examples=150)
@given(case=blocks)
def test_bytes_are_ggufs_on_any_block(name, case):
    assert byte_differences(name, [random_block(case)])[0].max() == 0


@theirs
@settings(deadline=None, max_examples=60)
@given(case=blocks)
def test_what_comes_back_is_ggufs(name, case):
    pack, unpack = ours_for(name)
    w = random_block(case)
    w_hat = unpack(pack(w), w.shape)
    assert w_hat.dtype == torch.float32 and w_hat.shape == w.shape
    assert np.array_equal(w_hat.numpy(), quants.dequantize(pack(w).numpy(), PACKED[name][0]))


@pytest.mark.parametrize(("name", "kind", "size", "weights"), [
    *((name, kind, size, 32) for name, (kind, size) in PACKED.items()), ("Q4_K", Kind.Q4_K, 144, 256),
])  # fmt: skip
def test_any_bytes_stand_for_what_gguf_says(name, kind, size, weights):
    data = np.random.default_rng(0).integers(0, 256, (2000, size), dtype=np.uint8)
    if name == "MXFP4":
        data[:, 0] %= 253  # 255 is the NaN of e8m0; the two below, times 6, are beyond float32
    else:
        for at in (0, 2) if name == "Q4_K" else (0,):
            data[:, at + 1] &= 0xBF  # finite float16 scales
    w_hat = ours_for(name)[1](torch.from_numpy(data), (2000, weights))
    assert np.array_equal(w_hat.numpy(), quants.dequantize(data, kind))


def test_mxfp4_keeps_to_the_standard_where_a_float32_logarithm_rounds_up():
    """The one place where gguf's exponent is another: the last float32 below a power of two."""
    powers = 2.0 ** torch.arange(-60, 60)
    w = torch.zeros(len(powers), 32)
    w[:, 3] = powers.nextafter(torch.tensor(0.0))
    scale = lab.mxfp4_pack(w)[:, 0].int()
    assert torch.equal(scale - 127, torch.arange(-60, 60) - 3), "X is the exponent of the maximum, less 2"
    gguf = torch.from_numpy(quants.quantize(w.numpy(), Kind.MXFP4)[:, 0].astype(int))
    assert set((gguf - scale).tolist()) == {0, 1}


def test_the_scale_byte_of_mxfp4_is_pytorchs_e8m0():
    w = 2.0 ** torch.arange(-120, 126)[:, None] * torch.ones(1, 32)
    scale = lab.mxfp4_pack(w)[:, 0].view(torch.float8_e8m0fnu).float()
    assert torch.equal(scale * 4, w[:, 0])
    assert lab.mxfp4_pack(torch.full((1, 32), 1e-44))[0, 0] == 0, "below the least scale, 2^-127, it stays"


def test_mxfp4_is_off_by_less_than_a_spacing_or_a_quarter_at_the_top():
    w = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    x, error = (z.reshape(-1, 32) for z in (w, lab.mxfp4_unpack(lab.mxfp4_pack(w), w.shape) - w))
    unit = 2.0 ** (x.abs().amax(1, keepdim=True).log2().floor() - 2)
    inside = x.abs() <= 6 * unit
    half = torch.where(x.abs() < 2 * unit, 0.25, torch.where(x.abs() < 4 * unit, 0.5, 1)) * unit
    assert (error.abs() <= half)[inside].all()
    assert (error.abs() < x.abs() / 4)[~inside].all() and (~inside).any()


def nvfp4_in_ggufs_layout(codes: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """Super-blocks of 64: four scales, then eight bytes for each block, code j beside code j + 8."""
    low, high = codes.reshape(-1, 4, 2, 8).unbind(2)
    return torch.cat([scales.reshape(-1, 4), (low | high << 4).reshape(-1, 32)], 1).numpy()


def nvfp4_difference(w: torch.Tensor) -> np.ndarray:
    codes, scales, t = lab.nvfp4_quantize(w)
    expected = quants.dequantize(nvfp4_in_ggufs_layout(codes, scales), Kind.NVFP4).reshape(w.shape)
    levels = lab.nvfp4_dequantize(codes, scales, torch.tensor(1.0))  # gguf keeps the tensor's scale elsewhere
    return np.abs(levels.numpy() - expected).ravel()


@cache
def nvfp4_differences() -> list[np.ndarray]:
    return [nvfp4_difference(w) for w in [*checkpoint_matrices(), *random_matrices()] if w.numel() % 64 == 0]


def test_nvfp4_is_ggufs():
    assert max(x.max() for x in nvfp4_differences()) == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(-60, 60))
def test_nvfp4_has_its_properties(seed, k):
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    codes, scales, t = lab.nvfp4_quantize(w)
    assert (codes.shape, scales.shape, t.shape) == ((8, 64), (8, 4), ()) and t.dtype == torch.float32
    assert codes.dtype == scales.dtype == torch.uint8 and codes.max() < 16
    assert lab.decode_float(scales, "e4m3fn").max() == 448, "the tensor's scale puts the largest block at 448"
    step = (lab.decode_float(scales, "e4m3fn") * t)[..., None]
    top = (w.reshape(8, 4, 16).abs().amax(-1, keepdim=True) / step).ravel()
    assert ((top - 6).abs() <= 6 / 16).all(), "a block's largest entry lands at 6, up to the rounding of its scale"
    error = (lab.nvfp4_dequantize(codes, scales, t) - w).reshape(8, 4, 16)
    assert (error.abs() <= step * (1 + 1e-5)).all(), "half of the widest spacing, 4 to 6, in units of the scale"
    again = lab.nvfp4_quantize(w * 2.0**k)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales) and again[2] == t * 2.0**k
    moved = lab.nvfp4_quantize(w.flip(0))
    assert torch.equal(moved[0], codes.flip(0)) and torch.equal(moved[1], scales.flip(0))


def test_nvfp4_of_zeros_and_of_blocks_too_small_for_a_scale_is_zero():
    w = torch.zeros(2, 32)
    assert lab.nvfp4_dequantize(*lab.nvfp4_quantize(w)).abs().max() == 0
    w[0, :16], w[1, :16] = 1.0, 1e-9
    w_hat = lab.nvfp4_dequantize(*lab.nvfp4_quantize(w))
    assert w_hat[0, :16].sub(1).abs().max() < 1e-6 and w_hat[1].abs().max() == 0


# Q4_K.


def q4_k_difference(w: torch.Tensor, **options) -> np.ndarray:
    data = lab.q4_k_pack(w, **options)
    assert data.dtype == torch.uint8 and data.shape == (w.numel() // 256, 144)
    expected = quants.dequantize(data.numpy(), Kind.Q4_K).reshape(w.shape)
    return np.abs(lab.q4_k_unpack(data, w.shape).numpy() - expected).ravel()


def q4_k_matrices() -> list[torch.Tensor]:
    return [w for w in random_matrices() if w.numel() % 256 == 0] + [
        torch.zeros(4, 64), torch.full((256,), 0.3), torch.full((256,), -0.3), torch.arange(512.0), torch.full((256,), 1e-9),
    ]  # fmt: skip


@cache
def q4_k_differences() -> list[np.ndarray]:
    return [q4_k_difference(w) for w in [*checkpoint_matrices(), *q4_k_matrices()]]


def test_q4_k_dequantized_by_gguf_is_ours():
    assert max(x.max() for x in q4_k_differences()) == 0
    assert max(q4_k_difference(w, fit=lab.fit_range).max() for w in q4_k_matrices()) == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(-8, 12), st.floats(-3, 3), st.booleans())
def test_q4_k_codes_are_the_nearest_levels_of_their_sub_block(seed, k, shift, search):
    w = (torch.randn(2, 256, generator=torch.Generator().manual_seed(seed)) + shift) * 2.0**k
    data = lab.q4_k_pack(w, fit=lab.fit_search if search else lab.fit_range)
    step, offset = lab.q4_k_levels(data)
    levels = step[..., None] * torch.arange(16) - offset[..., None]  # (2, 8, 1, 16)
    nearest = (levels - w.reshape(2, 8, 32, 1)).abs().amin(-1)
    error = (lab.q4_k_unpack(data, w.shape) - w).reshape(2, 8, 32).abs()
    assert (error <= nearest + 1e-5 * w.abs().max()).all()
    assert error.square().mean().sqrt() < 0.15 * w.square().mean().sqrt()


def test_equal_entries_come_back():
    for value in (0.3, -0.3, 100.0, -1e-3):
        w = torch.full((256,), value)
        assert (lab.q4_k_unpack(lab.q4_k_pack(w), (256,)) / value - 1).abs().max() < 2e-3, value


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.floats(-2, 2))
def test_the_search_finds_no_worse_line_than_the_range(seed, shift):
    x = torch.randn(16, 8, 32, generator=torch.Generator().manual_seed(seed)) + shift

    def error(scale, minimum):
        q = ((x + minimum) / scale).round().clamp(0, 15)
        return (lab.weigh(x) * (q * scale - minimum - x).square()).sum(-1)

    scale, minimum = lab.fit_search(x)
    assert (minimum >= 0).all() and (scale > 0).all()
    ratio = error(scale, minimum) / error(*lab.fit_range(x))
    assert ratio.max() < 1 + 1e-4 and ratio.mean() < 0.95


def test_a_fitted_line_is_a_least_squares_solution():
    g = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (50, 32), generator=g).double()
    x = 0.1 * q + torch.randn(50, 32, generator=g, dtype=torch.float64) * 0.05 - torch.linspace(-0.5, 1.5, 50)[:, None]
    weight = torch.rand(50, 32, generator=g, dtype=torch.float64) + 0.1
    scale, minimum = lab.fit_line(q, x, weight)
    root = weight.sqrt()
    free = torch.linalg.lstsq(torch.stack([q, -torch.ones_like(q)], -1) * root[..., None], (x * root)[..., None])
    best = free.solution[..., 0]
    inside = best[:, 1] > 0
    assert 10 < inside.sum() < 50
    torch.testing.assert_close(torch.cat([scale, minimum], 1)[inside], best[inside])
    assert (minimum[~inside] == 0).all()
    proportion = (weight * q * x).sum(1) / (weight * q * q).sum(1)
    torch.testing.assert_close(scale[~inside, 0], proportion[~inside])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 63), min_size=16, max_size=16))
def test_six_bits_are_packed_as_gguf_unpacks_them(numbers):
    s, m = torch.tensor(numbers, dtype=torch.uint8).reshape(2, 1, 8)
    packed = lab.pack_six(s, m)
    assert packed.shape == (1, 12)
    for got, expected in zip(quants.Q4_K.get_scale_min(packed.numpy()), (s, m), strict=True):
        assert np.array_equal(got, expected.numpy())
    assert all(torch.equal(a, b) for a, b in zip(lab.unpack_six(packed), (s, m), strict=True))


packers = pytest.mark.parametrize("pack", ["q8_0_pack", "q4_0_pack", "q4_k_pack", "mxfp4_pack", "nvfp4_quantize"])


@packers
@pytest.mark.parametrize(
    ("w", "error"),
    [
        (torch.ones(4, 40), "does not divide|no multiple of 256"),
        (torch.full((8, 32), math.nan), "NaN or infinite"),
        (torch.full((8, 32), math.inf), "NaN or infinite"),
        (torch.ones(0, 32), "nothing to round"),
    ],
)
def test_packing_refuses_bad_input(pack, w, error):
    with pytest.raises(ValueError, match=error):
        getattr(lab, pack)(w)


@pytest.mark.parametrize("pack", ["q8_0_pack", "q4_0_pack", "q4_k_pack"])
def test_a_scale_beyond_float16_is_refused(pack):
    with pytest.raises(ValueError, match="does not fit float16"):
        getattr(lab, pack)(torch.full((8, 32), 1e9))


@packers
def test_the_input_is_left_alone(pack):
    w = torch.randn(8, 64)
    kept = w.clone()
    getattr(lab, pack)(w)
    assert torch.equal(w, kept)


def parity_rows() -> list[dict]:
    """Rows of the chapter's parity table: what agrees with PyTorch's casts and with gguf."""
    rows = []

    def row(what, against, dtype, differences):
        cases, worst = sum(map(len, differences)), max(float(x.max()) for x in differences)
        rows.append({"what": what, "against": against, "dtype": dtype, "cases": cases, "tolerance": 0, "worst": worst})

    pytorch, gguf = f"PyTorch {torch.__version__.split('+')[0]}", f"gguf {version('gguf')}"
    for name, (dtype, _) in CASTS.items():
        against = f"{pytorch} {dtype}".replace("torch.", "")
        row(f"cast of float32 to {name}", against, "bits", [pattern_difference(all_cases(name), name)])
    for name in PACKED:
        row(f"bytes of {name}", f"{gguf} quantize", "bytes", all_byte_differences(name))
    row("our Q4_K, dequantized", f"{gguf} dequantize", "float32", q4_k_differences())
    row("our NVFP4, dequantized", f"{gguf} dequantize", "float32", nvfp4_differences())
    return rows


def test_parity_rows_are_exact():
    rows = parity_rows()
    assert len(rows) == 9 and all(row["worst"] <= row["tolerance"] == 0 and row["cases"] > 1000 for row in rows), rows
