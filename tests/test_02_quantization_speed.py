"""Lab 02's matrix-vector kernels against float64, their layer against the matrix it stands for, and their refusals."""

from __future__ import annotations

import copy
import platform

import numba
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lab_source import definitions
from tinylm.model import Config, TinyLlama

lab = definitions("02_quantization")
EPS = torch.finfo(torch.float32).eps


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The matrix in float64, by another way than the lab's."""
    scale = scale.reshape(len(codes), -1).double()
    return codes.double() * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, written out: the first in the low nibble, both plus 8."""
    return ((codes[:, 0::2].int() + 8) + 16 * (codes[:, 1::2].int() + 8)).to(torch.uint8)


def product4(codes, scale, x):
    return lab.gemv_int4(lab.repack_rows(pack(codes), codes.shape[1] // scale.shape[1]), scale, x)


def assert_product(y, codes, scale, x, kind: int) -> None:
    """Within what float32 sums of these magnitudes may round. A stored 4-bit code is up to 15, the sum starts at -8 x."""
    matrix = dense(codes, scale)
    assert y.dtype == torch.float32 and y.shape == (len(codes),)
    size = (
        (matrix.abs() @ x.double().abs()) if kind == 8 else dense(torch.full_like(codes, 23), scale) @ x.double().abs()
    )
    terms = max(8, codes.shape[1] ** 0.5)
    worst = ((y - matrix @ x.double()).abs() / (size + 1e-30)).max()
    assert worst < terms * EPS, worst


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 41), st.integers(1, 70), st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_int8_is_the_product(o, group, n, per_row, seed):
    g = seeded(seed)
    n = 1 if per_row else n
    codes = torch.randint(-127, 128, (o, group * n), generator=g, dtype=torch.int8)
    scale = torch.rand(o, n, generator=g) * 10 ** torch.randint(-3, 3, (o, n), generator=g).float()
    x = torch.randn(group * n, generator=g)
    assert_product(lab.gemv_int8(codes, scale, x), codes, scale, x, 8)
    if per_row:
        torch.testing.assert_close(lab.gemv_int8(codes, scale[:, 0], x), lab.gemv_int8(codes, scale, x), rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 41), st.sampled_from([8, 16, 32, 40, 64, 128]), st.integers(1, 19), st.integers(0, 2**31))
def test_int4_is_the_product(o, group, n, seed):
    g = seeded(seed)
    codes = torch.randint(-8, 8, (o, group * n), generator=g, dtype=torch.int8)
    scale = torch.rand(o, n, generator=g) * 10 ** torch.randint(-3, 3, (o, n), generator=g).float()
    x = torch.randn(group * n, generator=g)
    assert_product(product4(codes, scale, x), codes, scale, x, 4)


def test_every_code_lands_where_it_belongs():
    """Unit vectors pick out one column each: all must come back exactly."""
    codes4 = torch.randint(-8, 8, (16, 64), generator=seeded(1), dtype=torch.int8)
    codes8 = torch.randint(-128, 128, (16, 64), generator=seeded(1), dtype=torch.int8)
    scale = 2.0 ** torch.randint(-3, 3, (16, 2), generator=seeded(2))
    for j, unit in enumerate(torch.eye(64)):
        assert torch.equal(product4(codes4, scale, unit).double(), dense(codes4, scale)[:, j]), j
        assert torch.equal(lab.gemv_int8(codes8, scale, unit).double(), dense(codes8, scale)[:, j]), j


@pytest.mark.parametrize("code", [-128, -127, -1, 0, 1, 127])
def test_extreme_int8_codes(code):
    codes, scale = torch.full((9, 4096), code, dtype=torch.int8), torch.full((9,), 3e-3)
    x = torch.randn(4096, generator=seeded(3))
    assert_product(lab.gemv_int8(codes, scale, x), codes, scale, x, 8)


@pytest.mark.parametrize("code", [-8, -1, 0, 1, 7])
def test_extreme_int4_codes(code):
    codes, scale = torch.full((9, 4096), code, dtype=torch.int8), torch.full((9, 128), 3e-3)
    x = torch.randn(4096, generator=seeded(3))
    assert_product(product4(codes, scale, x), codes, scale, x, 4)


def test_zeros_give_zero_and_nan_is_not_hidden():
    codes8, codes4 = torch.ones(5, 64, dtype=torch.int8), torch.full((5, 64), 3, dtype=torch.int8)
    scale, x = torch.ones(5, 2), torch.zeros(64)
    assert torch.equal(lab.gemv_int8(codes8, scale, x), torch.zeros(5))
    assert torch.equal(product4(codes4, scale, x), torch.zeros(5))
    x[17] = float("nan")
    assert lab.gemv_int8(codes8, scale, x).isnan().all() and product4(codes4, scale, x).isnan().all()


def test_large_matrices_use_threads_and_give_the_same_every_time():
    g, before = seeded(4), torch.get_num_threads()
    codes = torch.randint(-8, 8, (1030, 1024), generator=g, dtype=torch.int8)  # more than one thread's work, ragged
    scale, x = torch.rand(1030, 32, generator=g), torch.randn(1024, generator=g)
    try:
        results = {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results[threads] = [(lab.gemv_int8(codes, scale, x), product4(codes, scale, x)) for _ in range(3)]
            assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
    finally:
        torch.set_num_threads(before)
    for y8, y4 in results[1] + results[2]:
        assert torch.equal(y8, results[1][0][0]) and torch.equal(y4, results[1][0][1])
    assert_product(results[2][0][0], codes, scale, x, 8)
    assert_product(results[2][0][1], codes, scale, x, 4)


def test_views_and_strides_are_read_right():
    g = seeded(5)
    codes = torch.randint(-8, 8, (64, 24), generator=g, dtype=torch.int8).T  # not contiguous
    scale, x = torch.rand(2, 24, generator=g).T, torch.randn(64, 3, generator=g)[:, 1]
    assert_product(lab.gemv_int8(codes, scale, x), codes, scale, x, 8)
    words = lab.repack_rows(pack(codes), 32)
    assert_product(lab.gemv_int4(words, scale, x), codes, scale, x, 4)


def test_the_vector_instructions_are_there():
    """That the loops are vectors is what their speed rests on: eight weights, a convert and a multiply-add."""
    lab.gemv_int8(torch.ones(4, 64, dtype=torch.int8), torch.ones(4), torch.ones(64))
    product4(torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 2), torch.ones(64))
    if platform.machine() != "x86_64":
        pytest.skip("looks for x86 instructions")
    for kernel in (lab.int8_rows, lab.int4_rows):
        code = "\n".join(kernel.inspect_asm().values())
        lines = [line for line in code.splitlines() if "ymm" in line or "zmm" in line]
        if not lines:
            pytest.skip("this processor has no vectors of 256 bits")
        assert any("cvtdq2ps" in line for line in lines), kernel.py_func.__name__
        assert not any("cvtqq2ps" in line for line in lines), "codes are widened to 64 bits"


ones8, ones4 = torch.ones(4, 64, dtype=torch.int8), torch.zeros(4, 4, 2, dtype=torch.int32)
BAD = {
    "codes of another type": (TypeError, lambda: lab.gemv_int8(ones8.int(), torch.ones(4), torch.ones(64))),
    "scale in float16": (TypeError, lambda: lab.gemv_int8(ones8, torch.ones(4).half(), torch.ones(64))),
    "x in float64": (TypeError, lambda: lab.gemv_int8(ones8, torch.ones(4), torch.ones(64).double())),
    "too short a vector": (ValueError, lambda: lab.gemv_int8(ones8, torch.ones(4), torch.ones(63))),
    "a batch": (ValueError, lambda: lab.gemv_int8(ones8, torch.ones(4), torch.ones(2, 64))),
    "too few scales": (ValueError, lambda: lab.gemv_int8(ones8, torch.ones(3), torch.ones(64))),
    "groups that do not divide": (ValueError, lambda: lab.gemv_int8(ones8, torch.ones(4, 3), torch.ones(64))),
    "no scales": (ValueError, lambda: lab.gemv_int8(ones8, torch.ones(4, 0), torch.ones(64))),
    "codes of one dimension": (ValueError, lambda: lab.gemv_int8(ones8[0], torch.ones(64), torch.ones(64))),
    "no rows": (ValueError, lambda: lab.gemv_int8(ones8[:0], torch.ones(0), torch.ones(64))),
    "no columns": (ValueError, lambda: lab.gemv_int8(ones8[:, :0], torch.ones(4), torch.ones(0))),
    "a gradient": (ValueError, lambda: lab.gemv_int8(ones8, torch.ones(4), torch.ones(64, requires_grad=True))),
    "words of another type": (TypeError, lambda: lab.gemv_int4(ones4.long(), torch.ones(4, 2), torch.ones(64))),
    "bytes instead of words": (ValueError, lambda: lab.gemv_int4(pack(ones8), torch.ones(4, 2), torch.ones(64))),
    "scales of other groups": (ValueError, lambda: lab.gemv_int4(ones4, torch.ones(4, 4), torch.ones(64))),
    "another vector": (ValueError, lambda: lab.gemv_int4(ones4, torch.ones(4, 2), torch.ones(32))),
    "no words": (ValueError, lambda: lab.gemv_int4(ones4[:0], torch.ones(0, 2), torch.ones(64))),
    "a group of four": (ValueError, lambda: lab.repack_rows(pack(ones8), 4)),
    "a group that does not divide": (ValueError, lambda: lab.repack_rows(pack(ones8), 24)),
    "a group of zero": (ValueError, lambda: lab.repack_rows(pack(ones8), 0)),
    "codes not packed": (ValueError, lambda: lab.repack_rows(ones8, 32)),
    "three bits": (ValueError, lambda: lab.QuantLinear(ones8, torch.ones(4, 1), 3)),
    "weights that are not finite": (
        ValueError,
        lambda: lab.QuantLinear.from_linear(bad_layer(float("nan")), 8),
    ),
}


def bad_layer(value: float) -> nn.Linear:
    layer = nn.Linear(32, 4)
    nn.init.constant_(layer.weight, value)
    return layer


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_sentence(name):
    error, call = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error and len(str(caught.value)) > 20, caught.value


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([4, 8]),
    st.integers(1, 21),
    st.integers(1, 4),
    st.booleans(),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_the_layer_is_the_linear_layer_of_its_matrix(bits, o, n, bias, batch, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(32 * n, o, bias=bias)
    quant = lab.QuantLinear.from_linear(layer, bits)
    codes, scale = lab.quantize_groups(layer.weight.detach(), bits, 32 if bits == 4 else 32 * n)
    matrix = dense(codes, scale.float()).float()
    torch.testing.assert_close(quant.dequantized(), matrix, rtol=1e-6, atol=0)
    x = torch.randn(batch, 32 * n)
    with torch.no_grad():
        expected = F.linear(x, matrix, layer.bias)
        together = quant(x)
        one_by_one = torch.stack([quant(row) for row in x])
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one_by_one, expected, rtol=1e-4, atol=1e-5)  # the batch path is the token path


@pytest.mark.parametrize("bits", [8, 4])
def test_the_layer_keeps_the_shapes_of_a_linear_layer(bits):
    layer = nn.Linear(64, 5)
    quant = lab.QuantLinear.from_linear(layer, bits)
    with torch.no_grad():
        for shape in ((64,), (1, 64), (1, 1, 64), (3, 2, 64), (0, 64), (2, 20, 64)):
            assert quant(torch.zeros(shape)).shape == layer(torch.zeros(shape)).shape == (*shape[:-1], 5)
    assert not list(quant.parameters())
    state = copy.deepcopy(quant.state_dict())
    again = lab.QuantLinear.from_linear(nn.Linear(64, 5), bits)
    again.load_state_dict(state)
    x = torch.randn(64)
    with torch.no_grad():
        assert torch.equal(again(x), quant(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_whole_model_in_fewer_bits_writes_what_its_matrices_say(bits):
    torch.manual_seed(0)
    model = TinyLlama(Config(96, dim=32, n_layers=2, n_heads=2, hidden_dim=96, max_len=64)).eval()
    fast, slow = copy.deepcopy(model), copy.deepcopy(model)
    lab.use_quant_linear(fast.blocks, bits)
    kinds = [type(m).__name__ for m in fast.modules()]
    assert kinds.count("QuantLinear") == 14 and kinds.count("Linear") == 1, "all in the blocks, and the head is left"
    for name, layer in slow.blocks.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = fast.blocks.get_submodule(name).dequantized()
    tokens = torch.randint(96, (2, 30), generator=seeded(6))
    with torch.no_grad():
        torch.testing.assert_close(fast(tokens), slow(tokens), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fast(tokens[:, :3]), slow(tokens[:, :3]), rtol=1e-4, atol=1e-4)
    assert torch.equal(fast.generate(tokens[0], 20, temperature=0), slow.generate(tokens[0], 20, temperature=0))
