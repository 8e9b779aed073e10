"""The model built in lab 00 and tinylm.model are one model; the lab's functions hold what the lab says of them."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

import tinylm.model
from lab_source import definitions
from test_checkpoint import KINDS, llama, make, tokens
from tinylm.checkpoint import from_hf, hf_name, to_hf
from tinylm.model import Config

lab = definitions("00_tiny_model")

CONFIGS = [
    Config(96, dim=32, n_layers=2, n_heads=2, hidden_dim=96),
    Config(50, dim=48, n_layers=3, n_heads=6, n_kv_heads=2, max_len=64, rope_theta=500.0, norm_eps=1e-6),
    Config(17, dim=16, n_layers=1, n_heads=4, n_kv_heads=1, max_len=32),
]


def twins(config: Config):
    torch.manual_seed(0)
    ours = lab.TinyLlama(config)
    theirs = tinylm.model.TinyLlama(config)
    theirs.load_state_dict({**ours.state_dict(), "lm_head.weight": ours.embed.weight})
    return ours, theirs


@pytest.mark.parametrize("config", CONFIGS, ids=["heads", "groups", "one group"])
def test_the_lab_and_tinylm_are_one_model(config):
    ours, theirs = twins(config)
    window = torch.randint(config.vocab_size, (3, config.max_len + 1))
    torch.testing.assert_close(ours(window[:, :-1]), theirs(window[:, :-1]), atol=1e-5, rtol=0)
    ours.loss(window).backward()
    theirs.loss(window).backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_both_start_from_the_same_distribution():
    config = CONFIGS[0]
    torch.manual_seed(0)
    ours = dict(lab.TinyLlama(config).named_parameters())
    for name, p in tinylm.model.TinyLlama(config).named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(ours[name].std().item(), rel=0.1), name


shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 6), st.sampled_from([2, 4, 8]))


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 30.0]))
def test_attention_agrees_with_a_loop_in_float64(shape, seed, scale):
    b, h, t, more, d = shape
    g = torch.Generator().manual_seed(seed)
    q = scale * torch.randn(b, h, t, d, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, b, h, t + more, d, generator=g, dtype=torch.float64)
    out = lab.attention(q, k, v)
    for i in range(t):  # query i stands at position more + i
        seen = more + i + 1
        weights = torch.zeros(b, h, seen, dtype=torch.float64)
        for j in range(seen):
            weights[:, :, j] = (q[:, :, i] * k[:, :, j]).sum(-1) / math.sqrt(d)
        weights = (weights - weights.max(-1, keepdim=True).values).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = sum(weights[:, :, j, None] * v[:, :, j] for j in range(seen))
        torch.testing.assert_close(out[:, :, i], mixed, atol=1e-10, rtol=1e-10)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([2, 8, 32]), st.integers(0, 100), st.integers(0, 100), st.integers(0, 27))
def test_rotation_keeps_length_and_makes_scores_relative(seed, d, p, s, shift):
    q, k = torch.randn(2, 1, 1, 1, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cos, sin = (table.double() for table in tinylm.model.rotary_table(d, 128, 10_000.0))
    # float32 tables: cos^2 + sin^2 and the angle sums are exact to about 1e-5
    def at(x, position):
        return lab.rotate(x, cos[position : position + 1], sin[position : position + 1])

    assert at(q, p).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
    score, shifted = (at(q, p) * at(k, s)).sum(), (at(q, p + shift) * at(k, s + shift)).sum()
    assert abs(score - shifted) < 1e-4 * q.norm() * k.norm()


def test_the_labs_rotary_table_is_tinylms():
    for ours, theirs in zip(lab.rotary_table(16, 256, 500.0), tinylm.model.rotary_table(16, 256, 500.0), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 65), st.sampled_from([1e-3, 1.0, 1e4]))
def test_rmsnorm_agrees_with_pytorchs(seed, c, scale):
    x = scale * torch.randn(3, c, generator=torch.Generator().manual_seed(seed))
    norm = lab.RMSNorm(c, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    expected = torch.nn.functional.rms_norm(x, (c,), norm.weight, eps=1e-5)
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-5)


def test_parity_table(parity, tmp_path):
    """What chapter 0 shows of our agreement with other libraries."""
    rows = []

    def row(what, against, dtype, tolerance, differences):
        facts = {"what": what, "against": against, "dtype": dtype, "cases": len(differences), "tolerance": tolerance}
        worst = max(float(x.detach()) if isinstance(x, torch.Tensor) else abs(x) for x in differences)
        rows.append({**facts, "worst": worst})

    library, pytorch = f"transformers {transformers.__version__}", f"PyTorch {torch.__version__.split('+')[0]}"
    out, back, slopes, params, flops = [], [], [], [], []
    for i, change in enumerate(KINDS.values()):
        model = make(**change)
        theirs = LlamaForCausalLM.from_pretrained(to_hf(model, tmp_path / f"{i}"))
        config, others = llama(tmp_path / f"llama{i}", **change)
        x = tokens(config)
        out.append((model(x) - theirs(x).logits).abs().max())
        back.append((from_hf(tmp_path / f"llama{i}")(x) - others(x).logits).abs().max())
        model.loss(x).backward()
        theirs(x, labels=x).loss.backward()
        names = dict(theirs.named_parameters())
        slopes += [(p.grad - names[hf_name(n)].grad).abs().max() for n, p in model.named_parameters()]
        params.append(model.config.n_params() - theirs.num_parameters())
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.loss(x).backward()
        flops.append(len(x) * model.config.train_flops(x.shape[1] - 1) - counter.get_total_flops())
    row("logits, our weights in their model", f"{library} LlamaForCausalLM", "float32", 1e-5, out)
    row("logits, their weights in our model", f"{library} LlamaForCausalLM", "float32", 1e-5, back)
    row("gradients of the loss", f"{library} LlamaForCausalLM", "float32", 1e-5, slopes)
    row("number of parameters", f"{library} LlamaForCausalLM", "integer", 0, params)
    row("operations of a training step", f"{pytorch} FlopCounterMode", "integer", 0, flops)

    g = torch.Generator().manual_seed(0)
    attended, normed = [], []
    for t, d in [(1, 4), (7, 8), (64, 16), (100, 32)]:
        q, k, v = torch.randn(3, 2, 3, t, d, generator=g, dtype=torch.float64)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended.append((lab.attention(q, k, v) - expected).abs().max())
        norm = lab.RMSNorm(d, eps=1e-5).double()
        normed.append((norm(q) - torch.nn.functional.rms_norm(q, (d,), norm.weight, eps=1e-5)).abs().max())
    row("the lab's attention", f"{pytorch} scaled_dot_product_attention", "float64", 1e-12, attended)
    row("the lab's RMSNorm", f"{pytorch} rms_norm", "float64", 1e-12, normed)
    parity("00_tiny_model", rows)
