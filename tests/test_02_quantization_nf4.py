"""NF4 and double quantization of lab 02, held against bitsandbytes on the CPU and against their definitions."""

from __future__ import annotations

import contextlib
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_source import definitions
from tinylm import checkpoint

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    import bitsandbytes
    from bitsandbytes import functional as bnb

lab = definitions("02_quantization")
LEVELS = lab.nf4_levels()
MIDPOINTS = (LEVELS[1:] + LEVELS[:-1]) / 2
BLOCK_SIZES = [32, 64, 128, 4096]  # some of those that bitsandbytes takes
REACH = 2.0**-16  # its search for the nearest of 256 levels is never further off than this (measured)


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles a few functions, anew for each shape; here they run as they are written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs(w: torch.Tensor, block_size: int = 64, double: bool = False):
    """What bitsandbytes makes of w: bytes (n,), its state, and the dequantized tensor.

    Where a row's end falls into a block, its bytes are dequantized as one row: with rows of a multiple of 16 numbers, the
    AVX-512 kernel of 0.50.2 takes such blocks' scales from their neighbours (its other kernels do not). A single byte it
    takes for a transposed matrix, so n is at least 3 in this file.
    """
    packed, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4", compress_statistics=double)
    if w.shape[-1] % block_size:
        state.shape = torch.Size([w.numel()])
    return packed.flatten(), state, bnb.dequantize_4bit(packed, state).reshape(w.shape)


def ours(w: torch.Tensor, block_size: int = 64):
    codes, absmax = lab.nf4_quantize(w, block_size)
    return codes, absmax, lab.nf4_dequantize(codes, absmax, w.shape, block_size)


def differences(w: torch.Tensor, block_size: int = 64) -> tuple[int, float]:
    """Codes that differ from bitsandbytes', and the largest difference of dequantized values."""
    codes, absmax, w_hat = ours(w, block_size)
    packed, state, expected = theirs(w, block_size)
    assert torch.equal(lab.nf4_pack(codes), packed), "bytes, the padding of an odd number of codes included"
    whole = w.numel() // block_size
    assert torch.equal(absmax[:whole], state.absmax[:whole])
    assert torch.equal(absmax[whole:].clamp(min=1e-38), state.absmax[whole:])  # their short block of zeros has 1e-38
    wrong = codes != lab.nf4_unpack(packed, w.numel())
    return int(wrong.sum()), float((w_hat.to(w.dtype) - expected).abs().max())


def random(shape, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ties(seed: int, scale: float, n: int = 257) -> torch.Tensor:
    """Numbers at, just above and just below the midpoints between levels, times a scale; the last block is short."""
    g = torch.Generator().manual_seed(seed)
    x = scale * MIDPOINTS[torch.randint(15, (n,), generator=g)]
    direction = torch.randint(-1, 2, (n,), generator=g) * math.inf
    x = torch.where(direction.isnan(), x, torch.nextafter(x, direction))
    x[::32] = scale
    return x


def weights() -> list[torch.Tensor]:
    return [layer.weight.detach() for layer in lab.matrices(checkpoint.load("shakespeare-800k")).values()]


# Against bitsandbytes


def test_the_levels_are_theirs_to_the_last_bit():
    assert torch.equal(LEVELS, bnb.get_4bit_type("nf4", device="cpu")) and LEVELS.dtype == torch.float32


shapes = st.one_of(
    st.tuples(st.integers(3, 700)),
    st.tuples(st.integers(1, 9), st.integers(3, 150)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(3, 80)),
    st.tuples(st.integers(1, 7), st.sampled_from([32, 64, 128, 256, 384])),
)
scales = st.sampled_from([1e-37, 1e-6, 0.02, 1.0, 3.7, 1e5, 1e37])


@settings(deadline=None, max_examples=60)
@given(
    shapes,
    st.integers(0, 2**31),
    scales,
    st.sampled_from(BLOCK_SIZES),
    st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_codes_and_values_are_theirs(shape, seed, scale, block_size, dtype):
    w = random(shape, seed, min(scale, 100) if dtype == "float16" else scale).to(getattr(torch, dtype))
    assert differences(w, block_size) == (0, 0)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.floats(1e-30, 1e30), st.integers(3, 400), st.sampled_from(BLOCK_SIZES))
def test_ties_fall_as_theirs_do(seed, scale, n, block_size):
    assert differences(ties(seed, scale, n), block_size) == (0, 0)


@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-45, -1e-40, 3e-39])
@pytest.mark.parametrize("n", [3, 64, 100, 128])
def test_zeros_and_subnormal_numbers(tiny, n):
    w = torch.full((n,), tiny)
    for x in (w, torch.cat([w, random(64, 0), torch.zeros(64), w])):
        codes, value = differences(x)
        assert codes == 0
        # of a short block of subnormal numbers they store 1e-38 as the largest, and give back more than went in
        assert value == 0 or len(x) % 64 and value < 1e-38
    assert ours(torch.zeros(n))[2].abs().max() == 0


def test_the_checkpoints_matrices():
    matrices = weights()
    assert len(matrices) == 28
    for w in matrices:
        for block_size in BLOCK_SIZES:
            assert differences(w, block_size) == (0, 0)


def test_the_dynamic_map_is_theirs():
    levels = lab.dynamic_map()
    assert torch.equal(levels, bnb.create_dynamic_map()) and len(levels) == 256


def compare_double(w: torch.Tensor) -> dict[str, torch.Tensor]:
    """Our codes of the scales and theirs, and how far each is from the scaled truth, in float64."""
    codes, absmax2, offset = lab.double_quantize(lab.nf4_quantize(w)[1])
    _, state, _ = theirs(w, double=True)
    assert torch.equal(offset, state.offset) and torch.equal(absmax2, state.state2.absmax)
    expected = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    others = state.absmax.long()
    decoded = lab.double_dequantize(others, absmax2, offset)
    assert torch.equal(decoded, expected), "their codes, decoded by us"
    levels = lab.dynamic_map().double()
    scale = absmax2.repeat_interleave(256)[: len(codes)].double()
    truth = (theirs(w)[1].absmax - offset).double() / scale
    codes = codes.long()
    return {
        "levels": (codes - others).abs(),
        "ours": (levels[codes] - truth).abs(),
        "theirs": (levels[others] - truth).abs(),
        "truth": truth,
    }


def compare_all(tensors) -> dict[str, torch.Tensor]:
    found = [compare_double(w) for w in tensors]
    return {key: torch.cat([f[key] for f in found]) for key in found[0]}


def many() -> list[torch.Tensor]:
    """Tensors of a million numbers each: normal, even, heavy-tailed; and one with a short last block."""
    normal = [random((512, 2048), seed, 0.02) for seed in range(4)]
    g = torch.Generator().manual_seed(4)
    even = torch.rand(512, 2048, generator=g) - 0.5
    return [*normal, even, random((512, 2048), 5) ** 3, random((77, 999), 6)]


@pytest.mark.parametrize("tensors", [weights, many], ids=["checkpoint", "random"])
def test_double_quantized_scales(tensors):
    found = compare_all(tensors())
    differ = found["levels"] > 0
    assert differ.double().mean() <= 0.005
    # where codes differ, theirs is not the nearest, and the two are a hair's breadth apart
    assert (found["ours"] <= found["theirs"] + 1e-7).all()
    assert (found["theirs"] - found["ours"])[differ].max() <= 2 * REACH
    # one level apart; around zero, levels are closer than that breadth, and theirs may step over a few
    assert (found["levels"][found["truth"].abs() > REACH] <= 1).all() and found["levels"].max() <= 3


def test_double_quantized_weights_are_theirs_where_the_scales_are():
    same = total = 0
    for w in weights():
        codes, absmax = lab.nf4_quantize(w)
        double = lab.double_quantize(absmax)
        w_hat = lab.nf4_dequantize(codes, lab.double_dequantize(*double), w.shape).reshape(-1, 64)
        _, state, expected = theirs(w, double=True)
        agree = double[0] == state.absmax
        assert torch.equal(w_hat[agree], expected.reshape(-1, 64)[agree])
        same, total = same + int(agree.sum()), total + len(agree)
    assert same / total >= 0.995


# Against the definitions


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(0, 2**31), st.sampled_from([1e-30, 0.02, 1.0, 1e30]), st.integers(1, 130))
def test_each_code_is_the_nearest_level(shape, seed, scale, block_size):
    w = random(shape, seed, scale)
    codes, absmax, w_hat = ours(w, block_size)
    assert codes.dtype == torch.uint8 and codes.shape == (w.numel(),) and codes.max() <= 15
    assert absmax.dtype == torch.float32 and w_hat.shape == w.shape
    for at, block in enumerate(w.flatten().split(block_size)):
        assert absmax[at] == block.abs().max()
        x = block.double() / absmax[at].double()
        mine = codes[at * block_size :][: len(block)].long()
        distance = (x[:, None] - LEVELS.double()).abs()
        assert (distance[torch.arange(len(block)), mine] <= distance.amin(1) + 1e-6).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(-60, 60), st.integers(1, 200), st.sampled_from([3, 16, 64]))
def test_numbers_made_of_levels_come_back_exactly(seed, exponent, n, block_size):
    g = torch.Generator().manual_seed(seed)
    picks = torch.randint(16, (n,), generator=g)
    picks[::block_size] = 15 * torch.randint(2, picks[::block_size].shape, generator=g)  # each block has a 1 or -1
    w = LEVELS[picks] * 2.0**exponent
    codes, _, w_hat = ours(w, block_size)
    assert torch.equal(codes.long(), picks) and torch.equal(w_hat, w)
    again, _, _ = ours(w_hat, block_size)
    assert torch.equal(again, codes)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(0, 2**31))
def test_packing_is_undone_and_takes_half_a_byte(n, seed):
    codes = torch.randint(16, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = lab.nf4_pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == ((n + 1) // 2,)
    assert torch.equal(lab.nf4_unpack(packed, n), codes)


def test_the_first_code_goes_into_the_high_nibble():
    assert lab.nf4_pack(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist() == [0x12, 0x37]


def test_bits_are_counted_from_what_is_stored():
    model = checkpoint.load("shakespeare-800k")
    nf4 = lab.true_bits(model, lab.quantized(model, lab.nf4)[1])[0]
    double = lab.true_bits(model, lab.quantized(model, lab.nf4_double)[1])[0]
    weights = sum(layer.weight.numel() for layer in lab.matrices(model).values())
    assert nf4 == 4 + 32 / 64
    second = sum(-(-layer.weight.numel() // (64 * 256)) for layer in lab.matrices(model).values())
    assert double == pytest.approx(4 + 8 / 64 + 32 * (second + 28) / weights, abs=1e-12)  # + 28 means


def test_double_quantization_of_equal_scales():
    scales = torch.full((300,), 0.75)
    codes, absmax2, offset = lab.double_quantize(scales)
    assert (lab.dynamic_map()[codes.long()] == 0).all() and codes.shape == (300,)
    assert absmax2.tolist() == [0, 0] and offset == 0.75
    assert torch.equal(lab.double_dequantize(codes, absmax2, offset), scales)


def test_learned_levels_make_less_error():
    blocks = random((512, 64), 0, 0.02)
    learned = lab.learned_levels(blocks)
    errors = [(lab.round_blocks(levels, blocks)[0] - blocks).square().mean() for levels in (LEVELS, learned)]
    assert errors[1] < 0.95 * errors[0] and (learned.diff() > 0).all()


def test_round_blocks_with_nf4s_levels_is_nf4():
    w = random((40, 64), 1)
    torch.testing.assert_close(lab.round_blocks(LEVELS, w)[0], ours(w)[2], atol=1e-6, rtol=0)
    rounded, stored = lab.with_levels(LEVELS)("any", w)
    torch.testing.assert_close(rounded, ours(w)[2], atol=1e-6, rtol=0)
    assert [x.nbytes for x in stored] == [40 * 32, 40 * 4]
    assert [x.nbytes for x in lab.with_levels()("any", w)[1]] == [40 * 32, 40 * 4, 16 * 4]


# Bad input


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", ["nf4_quantize", "double_quantize"])
def test_numbers_that_are_none_are_refused(bad, function):
    x = torch.ones(70)
    x[66] = bad
    with pytest.raises(ValueError, match="NaN|infinite"):
        getattr(lab, function)(x)
    with pytest.raises(ValueError):
        getattr(lab, function)(torch.empty(0, 3))


@pytest.mark.parametrize("block_size", [0, -64, 1.5, "64", None, True])
def test_block_sizes_that_are_none_are_refused(block_size):
    codes, absmax = lab.nf4_quantize(torch.ones(64))
    for call in (
        lambda: lab.nf4_quantize(torch.ones(64), block_size),
        lambda: lab.nf4_dequantize(codes, absmax, (64,), block_size),
        lambda: lab.double_quantize(torch.ones(64), block_size),
    ):
        with pytest.raises(ValueError, match="block_size must be a positive integer"):
            call()


def test_codes_that_do_not_fit_together_are_refused():
    codes, absmax = lab.nf4_quantize(torch.ones(3, 50))
    assert lab.nf4_dequantize(codes, absmax, (3, 50)).shape == (3, 50)
    with pytest.raises(ValueError, match="150 codes in blocks of 64 need 3 scales"):
        lab.nf4_dequantize(codes, absmax[:2], (3, 50))
    with pytest.raises(ValueError, match="a shape of 150 numbers"):
        lab.nf4_dequantize(codes, absmax, (3, 51))
    with pytest.raises(ValueError, match="codes go from 0 to 15, got 15 to 16"):
        lab.nf4_dequantize(codes + (torch.arange(150) == 7), absmax, (150,))
    with pytest.raises(ValueError, match="0 codes"):
        lab.nf4_dequantize(codes[:0], absmax[:0], (0,))


def test_the_input_stays_as_it_is():
    w = random((3, 64), 3)
    for x in (w, w[:, :50]):
        kept = x.clone()
        ours(x)
        lab.double_quantize(x.abs())
        assert torch.equal(x, kept)


# What the chapter shows


def parity_rows() -> list[dict]:
    """Rows of the chapter's parity table: {what, against, dtype, cases, tolerance, worst}."""
    against = f"bitsandbytes {bitsandbytes.__version__} on the CPU"
    rows = []

    def row(what, dtype, cases, tolerance, worst):
        facts = {"what": what, "against": against, "dtype": dtype, "cases": cases, "tolerance": tolerance}
        rows.append({**facts, "worst": float(worst)})

    with torch.compiler.set_stance("force_eager"):
        table = bnb.get_4bit_type("nf4", device="cpu")
        row("NF4's 16 levels", "float32", 16, 0, (LEVELS - table).abs().max())
        tensors = weights()
        tensors += [random(s, i, 10.0 ** (i - 4)) for i, s in enumerate([(640,), (7, 91), (64, 64), (2, 3, 65)])]
        tensors += [ties(seed, 0.3 + seed) for seed in range(4)] + [torch.zeros(130)]
        found = [differences(w) for w in tensors]
        cases = sum(w.numel() for w in tensors)
        row("NF4 codes that differ", "4-bit codes", cases, 0, sum(wrong for wrong, _ in found))
        row("weights dequantized from NF4", "float32", cases, 0, max(worst for _, worst in found))
        dynamic = lab.dynamic_map() - bnb.create_dynamic_map()
        row("the dynamic map's 256 levels", "float32", 256, 0, dynamic.abs().max())
        scales = compare_all(weights())
        n, apart = len(scales["levels"]), scales["levels"].max()
        row("double-quantized scales of the checkpoint, levels apart", "8-bit codes", n, 1, apart)
        scales = {key: torch.cat([scales[key], more]) for key, more in compare_all(many()).items()}
        n, share = len(scales["levels"]), (scales["levels"] > 0).double().mean()
        row("double-quantized scales, share of codes that differ", "8-bit codes", n, 0.005, share)
        further = (scales["ours"] - scales["theirs"]).clamp(min=0).max()
        row("double-quantized scales, how much further from the truth than theirs", "float64", n, 1e-7, further)
    return rows


def test_parity_rows():
    rows = parity_rows()
    assert len(rows) == 7 and all(r["worst"] <= r["tolerance"] for r in rows), rows
