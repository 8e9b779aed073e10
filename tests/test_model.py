"""tinylm.model: its counts are PyTorch's counts, its attention is the textbook's, and its cache changes no token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinylm.model import Attention, Config, KVCache, TinyLlama, rotary_table, rotate

SMALL = Config(17, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24, max_len=12)


@st.composite
def configs(draw) -> Config:
    kv_heads, group, d = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    return Config(
        vocab_size=draw(st.integers(2, 40)),
        dim=kv_heads * group * d,
        n_layers=draw(st.integers(1, 3)),
        n_heads=kv_heads * group,
        n_kv_heads=kv_heads,
        hidden_dim=draw(st.integers(1, 40)),
        max_len=draw(st.integers(8, 16)),
        rope_theta=draw(st.sampled_from([100.0, 10_000.0])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        tie_embeddings=draw(st.booleans()),
    )


def make(config: Config, seed: int = 0) -> TinyLlama:
    """A model whose every weight matters: with gains of 1 and small tables mistakes could hide."""
    torch.manual_seed(seed)
    model = TinyLlama(config).eval()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
        elif name == "embed.weight":
            torch.nn.init.normal_(p, std=0.5)
    return model


def random_tokens(config: Config, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


few = settings(deadline=None, max_examples=25)

# Counts


@few
@given(configs())
def test_parameter_counts(config):
    model = TinyLlama(config)
    tables = {id(p): p.numel() for p in (model.embed.weight, model.lm_head.weight)}
    assert config.n_params() == sum(p.numel() for p in model.parameters())
    assert config.n_params(embeddings=False) == config.n_params() - sum(tables.values())


@few
@given(configs(), st.integers(1, 8))
def test_flops_are_those_that_pytorch_counts(config, t):
    model, window = TinyLlama(config), random_tokens(config, 1, t + 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        model(window[:, :-1])
    assert config.forward_flops(t) == forward.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        model.loss(window).backward()
    assert config.train_flops(t) == both.get_total_flops()


@few
@given(configs(), st.integers(1, 7))
def test_decode_flops_and_cache_bytes_are_those_of_a_real_cache(config, context):
    model, cache = TinyLlama(config), [KVCache() for _ in range(config.n_layers)]
    tokens = random_tokens(config, 1, context)
    with torch.no_grad():
        if context > 1:
            model(tokens[:, :-1], cache)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(tokens[:, -1:], cache)
    assert config.decode_flops(context) == counter.get_total_flops()
    assert [len(c) for c in cache] == [context] * config.n_layers
    held = sum(z.numel() * z.element_size() for c in cache for z in (c.k, c.v))
    assert config.kv_cache_bytes(context) == held == 2 * config.kv_cache_bytes(context, bytes_per_value=2)


def test_causal_counting_leaves_out_the_pairs_above_the_diagonal():
    t = 10
    above = t * (t - 1) // 2
    assert SMALL.forward_flops(t) - SMALL.forward_flops(t, causal=True) == SMALL.n_layers * 4 * above * SMALL.dim
    assert SMALL.train_flops(t, causal=True) == 3 * SMALL.forward_flops(t, causal=True)
    per_token = [SMALL.decode_flops(s) for s in range(1, t + 1)]
    assert sum(per_token) == SMALL.forward_flops(t, causal=True)


# The forward pass


def slow_attention(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """One query, one head, one key at a time, in float64. x: (t, c)."""
    config, t, d = attention.config, x.shape[0], attention.config.head_dim
    weight = {k: v.double() for k, v in attention.state_dict().items()}
    q, k, v = (x.double() @ weight[f"{n}_proj.weight"].T for n in "qkv")

    def turned(z, position):
        out = torch.empty_like(z)
        for i in range(d // 2):
            angle = position * config.rope_theta ** (-2 * i / d)
            out[i] = z[i] * math.cos(angle) - z[i + d // 2] * math.sin(angle)
            out[i + d // 2] = z[i + d // 2] * math.cos(angle) + z[i] * math.sin(angle)
        return out

    out = torch.zeros(t, config.dim, dtype=torch.float64)
    for head in range(config.n_heads):
        group = head // (config.n_heads // config.n_kv_heads)
        own, shared = slice(head * d, (head + 1) * d), slice(group * d, (group + 1) * d)
        for i in range(t):
            scores = [turned(q[i, own], i) @ turned(k[j, shared], j) / math.sqrt(d) for j in range(i + 1)]
            weights = torch.stack(scores).softmax(0)
            out[i, own] = sum(w * v[j, shared] for j, w in enumerate(weights))
    return out @ weight["o_proj.weight"].T


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_attention_agrees_with_the_slow_reference(n_kv_heads):
    config = Config(5, dim=24, n_layers=1, n_heads=4, n_kv_heads=n_kv_heads, max_len=9, rope_theta=50.0)
    model, x = make(config), torch.randn(2, 9, 24)
    attention = model.blocks[0].attention
    with torch.no_grad():
        ours = attention(x, model.cos, model.sin)
    for i in range(2):
        torch.testing.assert_close(ours[i].double(), slow_attention(attention, x[i]), atol=1e-5, rtol=0)


def test_block_follows_its_formulas():
    model = make(SMALL)
    block, x = model.blocks[0].double(), torch.randn(1, 6, SMALL.dim, dtype=torch.float64)
    cos, sin = model.cos[:6].double(), model.sin[:6].double()

    def normed(z, gain):
        return z / (z.square().mean(-1, keepdim=True) + SMALL.norm_eps).sqrt() * gain

    middle = x + block.attention(normed(x, block.attention_norm.weight), cos, sin)
    z = normed(middle, block.mlp_norm.weight)
    gate, up, down = (getattr(block.mlp, f"{n}_proj").weight for n in ("gate", "up", "down"))
    expected = middle + (z @ gate.T * torch.sigmoid(z @ gate.T) * (z @ up.T)) @ down.T
    torch.testing.assert_close(block(x, cos, sin), expected, atol=1e-12, rtol=0)


@few
@given(configs(), st.data())
def test_a_later_token_changes_no_earlier_logit(config, pick):
    model, tokens = make(config), random_tokens(config, 1, 8)
    place = pick.draw(st.integers(1, 7))
    changed = tokens.clone()
    changed[0, place] = (changed[0, place] + 1) % config.vocab_size
    with torch.no_grad():
        a, b = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(a[:place], b[:place], atol=1e-6, rtol=0)
    assert (a[place] - b[place]).abs().max() > 1e-6


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 500), st.integers(0, 9))
@few
def test_rotary_scores_depend_on_the_distance_alone(m, n, shift, seed):
    d, theta = 8, 1000.0
    angle = torch.outer(torch.arange(1001).double(), theta ** (-torch.arange(0, d, 2).double() / d))
    cos, sin = torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)
    q, k = torch.randn(2, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def score(i, j):
        return rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j])

    torch.testing.assert_close(score(m, n), score(m + shift, n + shift), atol=1e-10, rtol=0)
    torch.testing.assert_close(rotate(q, cos[m], sin[m]).norm(), q.norm(), atol=1e-10, rtol=0)
    if m == n:
        torch.testing.assert_close(score(m, n), q @ k, atol=1e-10, rtol=0)


def test_rotary_table_agrees_with_float64():
    d, theta = 6, 500.0
    cos, sin = rotary_table(d, 300, theta)
    angle = torch.outer(torch.arange(300).double(), theta ** (-torch.arange(0, d, 2).double() / d))
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (300, 3)
    torch.testing.assert_close(cos.double(), angle.cos(), atol=1e-4, rtol=0)
    torch.testing.assert_close(sin.double(), angle.sin(), atol=1e-4, rtol=0)


def test_loss_is_the_mean_of_next_token_surprise():
    model, window = make(SMALL), random_tokens(SMALL, 3, 9)
    with torch.no_grad():
        p = model(window[:, :-1]).double().softmax(-1)
    surprise = [-math.log(p[b, i, window[b, i + 1]]) for b in range(3) for i in range(8)]
    assert model.loss(window).item() == pytest.approx(sum(surprise) / 24, abs=1e-5)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("dim", "n_layers"), [(32, 2), (128, 4)])
def test_loss_starts_at_that_of_a_uniform_guess(dim, n_layers, tie):
    torch.manual_seed(0)
    model = TinyLlama(Config(96, dim, n_layers, 4, tie_embeddings=tie))
    window = random_tokens(model.config, 8, 65)
    assert model.loss(window).item() == pytest.approx(math.log(96), abs=0.1)


def test_defaults():
    config = Config(96, 128, 4, 4)
    assert (config.n_kv_heads, config.hidden_dim, config.head_dim) == (4, 352, 32)
    assert Config(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dim": 0}, "dim must be a positive integer, got 0"),
        ({"n_layers": 1.5}, "n_layers must be a positive integer, got 1.5"),
        ({"dim": 18}, "dim=18 is not a multiple of n_heads=4"),
        ({"dim": 12}, "head dim dim / n_heads = 3 is odd"),
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"rope_theta": 0}, "rope_theta and norm_eps must be positive"),
        ({"norm_eps": -1e-5}, "rope_theta and norm_eps must be positive"),
    ],
)
def test_impossible_shapes_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**{**SMALL.to_dict(), **change})


def test_a_sequence_beyond_max_len_is_refused():
    with pytest.raises(ValueError, match="13 tokens is longer than max_len=12"):
        TinyLlama(SMALL)(random_tokens(SMALL, 1, 13))


# Generation


@settings(few, derandomize=True)  # a near-tie between two tokens may fall either way in float32
@given(configs(), st.sampled_from([0.0, 0.7, 1.3]), st.integers(1, 20), st.integers(0, 30), st.integers(0, 5))
def test_the_cache_changes_no_token(config, temperature, prompt_len, n, seed):
    model, prompt = make(config), random_tokens(config, 2, prompt_len)
    fast, slow = (model.generate(prompt, n, temperature, seed=seed, use_cache=c) for c in (True, False))
    assert torch.equal(fast, slow) and fast.shape == (2, prompt_len + n)
    assert torch.equal(fast[:, :prompt_len], prompt)


def test_greedy_takes_the_most_likely_token():
    model = make(SMALL)
    out = model.generate(random_tokens(SMALL, 3), 9, temperature=0)
    assert torch.equal(out[3:], model(out[None, :-1])[0, 2:].argmax(-1))


def test_a_full_window_drops_its_older_half():
    model, seen = make(SMALL), []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    out = model.generate(random_tokens(SMALL, 10), 18, use_cache=False)
    assert [w.shape[1] for w in seen] == [10, 11, 12, *range(6, 13), *range(6, 13), 6]
    assert all(torch.equal(w[0], out[10 + i - w.shape[1] : 10 + i]) for i, w in enumerate(seen))
    seen.clear()
    model.generate(random_tokens(SMALL, 30), 1)
    assert torch.equal(seen[0][0], random_tokens(SMALL, 30)[-12:])


def test_prompts_of_a_batch_do_not_see_each_other():
    model, prompts = make(SMALL), random_tokens(SMALL, 4, 5)
    together = model.generate(prompts, 15, temperature=0)
    for prompt, out in zip(prompts, together, strict=True):
        assert torch.equal(model.generate(prompt, 15, temperature=0), out)


def test_the_seed_decides_the_sample():
    model, prompt = make(SMALL), random_tokens(SMALL, 4)
    assert torch.equal(model.generate(prompt, 30, seed=1), model.generate(prompt, 30, seed=1))
    assert not torch.equal(model.generate(prompt, 30, seed=1), model.generate(prompt, 30, seed=2))


def test_top_k_of_one_is_greedy_and_of_k_stays_among_k():
    model, prompt = make(SMALL), random_tokens(SMALL, 4)
    assert torch.equal(model.generate(prompt, 20, top_k=1), model.generate(prompt, 20, temperature=0))
    first = model.generate(prompt.expand(300, 4), 1, temperature=5.0, top_k=3)[:, -1]
    assert set(first.tolist()) == set(model(prompt[None])[0, -1].topk(3).indices.tolist())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_at_that_temperature(temperature):
    model, prompt, n = make(SMALL), random_tokens(SMALL, 4), 20_000
    sampled = model.generate(prompt.expand(n, 4), 1, temperature)[:, -1]
    share = torch.bincount(sampled, minlength=SMALL.vocab_size) / n
    p = F.softmax(model(prompt[None])[0, -1] / temperature, -1)
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": 0}, {"n_tokens": -1}])
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(ValueError, match="need temperature >= 0, top_k >= 1, n_tokens >= 0"):
        make(SMALL).generate(random_tokens(SMALL, 4), **{"n_tokens": 1, **bad})


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        make(SMALL).generate(torch.empty(0, dtype=torch.int64), 3)


def test_a_cache_filled_in_pieces_gives_the_same_logits():
    model, tokens = make(SMALL), random_tokens(SMALL, 2, 10)
    cache = [KVCache() for _ in range(SMALL.n_layers)]
    with torch.no_grad():
        pieces = torch.cat([model(tokens[:, a:b], cache) for a, b in [(0, 3), (3, 4), (4, 9), (9, 10)]], dim=1)
        torch.testing.assert_close(pieces, model(tokens), atol=1e-5, rtol=0)
