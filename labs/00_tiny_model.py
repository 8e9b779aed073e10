# %% [markdown]
# # Lab 00 · The tiny model
#
# A Llama-architecture language model built in the open, from characters to text that looks like a play, and what each of its parts costs.
#
# > **The claims.** Three texts of 2023 set the scene. A weekly reported what a large model takes: GPT-3, 175 billion
# > parameters, 300 billion words (tokens, in the paper), thousands of GPUs for weeks (claim 1). A leaked memo and a blog said that 4-bit rounding
# > runs LLaMA on a laptop's CPU, 7 and 13 billion parameters on a 64 GB notebook (claim 8). And the blog argued that opening an *experiment* tells outsiders
# > more than opening its code (claim 19). This lab is the third claim's method applied to the first two: it measures what one
# > operation and one byte cost on *your* machine, and computes from that what the two others would ask of it.
#
# - **You will build** a tokenizer, RMSNorm, rotary embeddings, attention, SwiGLU, the block, the model, its loss and its training loop.
# - **You will measure** parameters, floating-point operations and bytes; the speed of your machine for both; a training run; and the agreement with the library that production uses.
# - **You need** Python and a little PyTorch: tensors, `nn.Module`, `backward()`. No GPU. The lab ran in RUN_TIME on two CPU cores; reading it, with its five exercises, takes 60 to 90 minutes.
#
# Every section here is *live*: it runs as you read. Only the larger model near the end, and the losses by play in section 9, are *recorded*: they come from two models trained beforehand (by `python -m tinylm.pretrain shakespeare-800k shakespeare-30k`) and their cards.

# %% tags=["setup"]
# build.py puts the setup cell here.

# %% [markdown]
# Dimensions, named once: `b` batch, `t` time (a query's position), `s` time (a key's position), `h` heads, `g` key-value heads, `d` channels of a head, `c` channels
# of the model, `v` vocabulary. They are the letters in every einops pattern and every shape comment below.

# %%
import math
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tinylm.model
from tinylm import checkpoint, data
from tinylm.figures import interactive
from tinylm.model import Config
from tinylm.plot import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    label,
    reference_line,
    show,
    smooth,
    use_style,
)
from tinylm.predict import predict, predictions
from tinylm.report import report, verdict
from tinylm.train import TrainConfig, budget_fraction, evaluate, train

use_style()
torch.manual_seed(0)
config = Config(
    data.VOCAB_SIZE, dim=32, n_layers=2, n_heads=2, hidden_dim=96, max_len=128
)

# %% [markdown]
# ## 1 · Text becomes numbers
# *Live, 3 minutes.*
#
# A language model predicts the next *token*. Large models use tokens of about four letters; ours are single characters, so
# that the vocabulary fits on one line and the embedding table does not dwarf the rest of a tiny model. Our corpus is the 38 plays of
# Shakespeare. Four of them are held out: no line of *Hamlet* is ever trained on. The plays are in Markdown, which the model has to learn with the words:
# two asterisks around the name of who speaks, underscores around stage directions.

# %%
corpus = data.shakespeare()
hamlet = corpus.val["hamlet"]
print(
    len(corpus.train), "plays to train on,", f"{len(corpus.train_tokens):,} characters"
)
print(len(corpus.val), "plays held out,", f"{len(corpus.val_tokens):,} characters")
print(*corpus.val, sep=", ", end="\n\n")
print(hamlet[hamlet.index("_FRANCISCO") :][:200])

# %%
characters = "\n" + "".join(chr(code) for code in range(32, 127))
index_of = {character: index for index, character in enumerate(characters)}


def encode(text: str) -> Tensor:
    return torch.tensor([index_of[character] for character in text])


def decode(tokens: Tensor) -> str:
    return "".join(characters[index] for index in tokens)


line = "To be, or not to be"
print(encode(line).tolist())
assert decode(encode(line)) == line, "decoding must undo encoding"
assert torch.equal(encode(line), data.encode(line)), "tinylm uses the same vocabulary"

# %% [markdown]
# ## 2 · RMSNorm
# *Live, 7 minutes.*
#
# Each layer reads the *residual stream*, a vector of $c$ channels per position, and adds to it. What it reads is first brought to
# a standard size, so that a layer sees the same scale however much its predecessors have added:
#
# $$\operatorname{RMSNorm}(x) = \frac{x}{\sqrt{\frac1c\sum_i x_i^2 + \varepsilon}} \odot g$$
#
# with one learned gain $g_i$ a channel. LayerNorm would also subtract the mean; Zhang and Sennrich (2019) found that it need not.
#
# ### EXERCISE rms_norm
# Write the formula for tensors of any number of dimensions; the channels are the last one.


# %% tags=["exercise:rms_norm"]
def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Bring each vector to root mean square 1, then apply one gain a channel.

    x: (..., c) float; gain: (c,). Returns (..., c). eps keeps a zero vector finite.
    """
    ### BEGIN SOLUTION
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(mean_square + eps) * gain
    ### END SOLUTION


# %% [markdown]
# What has to be true: the output has root mean square 1, the mean is not taken out, a zero vector does no harm, and each channel has its own gain.

# %% tags=["check:rms_norm:2"]
ones, x = torch.ones(32), 3 + 5 * torch.randn(4, 32)
rms_before = x.pow(2).mean(-1).sqrt()
out = rms_norm(x, ones, eps=1e-5)
assert not torch.allclose(out.mean(-1), torch.zeros(4), atol=1e-3), (
    "the mean of the channels became 0: that is LayerNorm, RMSNorm leaves it in"
)
assert not torch.allclose(out.norm(dim=-1), torch.ones(4), atol=1e-3), (
    "each vector has length 1: the formula has the mean of the squares, not their sum"
)
rms = out.pow(2).mean(-1).sqrt()
assert not torch.allclose(rms * rms_before, torch.ones(4), atol=1e-3), (
    "a row with large entries came out too small: the mean of squares lacks its root"
)
assert torch.allclose(rms, torch.ones(4), atol=1e-4), (
    "the root mean square of each row should be 1: over which dimension is your mean?"
)
zero = rms_norm(torch.zeros(1, 32), ones, eps=1e-5)
assert zero.isfinite().all(), "a zero vector gave NaN: where does eps belong?"
gain = torch.arange(32.0)
assert torch.allclose(rms_norm(x, gain, eps=1e-5), out * gain, atol=1e-4), (
    "the gain should multiply the normalised vector, channel by channel"
)
### BEGIN HIDDEN TESTS
y = torch.randn(2, 3, 5, 8, dtype=torch.float64)
expected = F.rms_norm(y, (8,), eps=1e-2)
assert torch.allclose(rms_norm(y, torch.ones(8).double(), 1e-2), expected, atol=1e-9), (
    "other shapes, or an eps large enough to matter, give another result"
)
kept = y.clone()
rms_norm(y, torch.ones(8).double(), 1e-5)
assert torch.equal(y, kept), "the input was changed in place"
### END HIDDEN TESTS

# %% [markdown]
# The layer holds the gain as a parameter, and agrees with PyTorch's own:


# %%
class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # (..., c) -> (..., c)
        return rms_norm(x, self.weight, self.eps)


norm, x = RMSNorm(32, eps=1e-5), 5 * torch.randn(4, 32)
torch.testing.assert_close(norm(x), F.rms_norm(x, (32,), eps=1e-5))

# %% [markdown]
# ## 3 · Rotary embeddings: position as an angle
# *Live, 12 minutes.*
#
# Attention compares a query with keys and would not notice if the positions were shuffled. Rotary embeddings (Su et al. 2021) tell it where
# things stand: they take the $d$ channels of a head as $d/2$ points in a plane and turn the $i$-th by an angle that grows with the position $p$,
#
# $$\begin{pmatrix} a_i' \\ b_i' \end{pmatrix} =
# \begin{pmatrix} \cos p\,\theta_i & -\sin p\,\theta_i \\ \sin p\,\theta_i & \cos p\,\theta_i \end{pmatrix}
# \begin{pmatrix} a_i \\ b_i \end{pmatrix},\qquad \theta_i = \theta^{-2i/d},\quad \theta = 10\,000.$$
#
# The fast pairs tell neighbours apart, the slow ones distant passages. We pair channel $i$ with channel $i + d/2$, as the released Llama weights for `transformers` do.


# %%
def rotary_table(
    head_dim: int, max_len: int, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    frequency = 1 / theta ** (torch.arange(0, head_dim, 2) / head_dim)  # (d/2)
    angle = einsum(torch.arange(max_len).float(), frequency, "t, i -> t i")
    return angle.cos(), angle.sin()


# %% [markdown]
# The table holds the cosines and sines of all angles, one row a position.
#
# ### EXERCISE rotate
# Turn the pairs: channel $i$ of the first half is $a_i$, channel $i$ of the second half is $b_i$.


# %% tags=["exercise:rotate"]
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pair i of each vector, its channels i and i + d/2, by the angle of its row.

    x: (b, h, t, d) float; cos, sin: (t, d/2). Returns (b, h, t, d).
    """
    ### BEGIN SOLUTION
    a, b = rearrange(x, "b h t (two i) -> two b h t i", two=2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    ### END SOLUTION


# %% tags=["check:rotate:3"]
cos, sin = rotary_table(head_dim=8, max_len=50)
x = torch.randn(1, 2, 50, 8)
turned = rotate(x, cos, sin)
assert torch.allclose(turned[:, :, 0], x[:, :, 0], atol=1e-5), (
    "position 0 has angle 0 and should stay as it is: which of cos and sin goes where, "
    "and are a and b back in their places?"
)
assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-4), (
    "a rotation keeps lengths: look at the signs"
)
east = torch.zeros(1, 1, 50, 8)
east[..., 0] = 1.0  # pair 0 is (1, 0) at every position
north = rotate(east, cos, sin)
assert not torch.allclose(north[0, 0, :, 1], sin[:, 0], atol=1e-4), (
    "channel 0 was paired with channel 1: here it belongs with channel d/2"
)
assert torch.allclose(north[0, 0, :, 4], sin[:, 0], atol=1e-4), (
    "(1, 0) should turn to (cos, sin): this turns the other way, or another pair"
)
### BEGIN HIDDEN TESTS
cos, sin = rotary_table(head_dim=6, max_len=9)
x = torch.randn(3, 2, 9, 6)
kept = x.clone()
half = torch.complex(x[..., :3], x[..., 3:]) * torch.complex(cos, sin)
expected = torch.cat([half.real, half.imag], -1)
assert torch.allclose(rotate(x, cos, sin), expected, atol=1e-5), (
    "other batch sizes or head dims give another result"
)
assert torch.equal(x, kept), "the input was changed in place"
### END HIDDEN TESTS


# %% [markdown]
# Two things follow from "a rotation by an angle proportional to position", and both are exact. A vector keeps its length. And the product of a query at $p$ with a key at $p'$
# depends on $p - p'$ alone, since turning both by the same angle changes nothing: absolute angles make *relative* positions. We check both; the tables are float32, so they hold to about that precision:

# %%
cos, sin = rotary_table(head_dim=16, max_len=256)
q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
turned_q, turned_k = (
    rotate(repeat(z, "b h 1 d -> b h t d", t=256), cos.double(), sin.double())
    for z in (q, k)
)
score = einsum(
    turned_q, turned_k, "b h t d, b h s d -> t s"
)  # one query and one key, at every pair of positions

torch.testing.assert_close(
    turned_q.norm(dim=-1), q.norm().expand(1, 1, 256), atol=1e-6, rtol=0
)
for distance in (0, 1, 7, 100):
    along_diagonal = score.diagonal(-distance)  # t - s = distance
    assert (along_diagonal - along_diagonal[0]).abs().max() < 1e-4, (
        "the score must depend on t - s only"
    )

# %% tags=["plot"]
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2), width_ratios=(1, 1.25))
left.imshow(
    score[:64, :64], cmap="PuOr", vmin=-score.abs().max(), vmax=score.abs().max()
)
left.set(
    xlabel="key position s",
    ylabel="query position t",
    title="Score of one query and one key",
)
left.grid(False)
for head_dim, color in ((16, SKY), (128, BLUE)):
    mean_score = rotary_table(head_dim, 256)[0].mean(
        -1
    )  # E[score] / length^2 of a vector in a random direction
    right.plot(mean_score, color=color)
    label(
        right, 255, mean_score[-1], f"d = {head_dim}", color, xytext=(6, head_dim / 9)
    )
right.set(
    xlabel="distance t - s (tokens)",
    ylabel="mean score / length squared",
    title="A vector against itself",
    xlim=(0, 300),
)
show(
    figure,
    "fig_rotary",
    "Left: a 64 by 64 map of attention scores, constant along each diagonal. "
    "Right: the mean score of a vector with its own rotated copy against their "
    "distance up to 255 tokens, for head dims 16 and 128: 1 at distance 0, then "
    "falling with ripples.",
)

# %% [markdown]
# Left: stripes along the diagonals, and nothing else, is the relative-position property. Right: averaged over
# directions, the score of a vector with itself is $\frac2d\sum_i\cos\big((t-s)\,\theta_i\big)$. It tends to fall with distance, with large ripples where a head has few pairs.
#
# ## 4 · Attention
# *Live, 14 minutes.*
#
# Every position asks a question (query), offers a label (key) and a content (value). A query's scores with all keys, softened into weights, mix the values:
#
# $$\operatorname{attention}(Q, K, V) = \operatorname{softmax}\!\left(\frac{QK^\top}{\sqrt d} + M\right)V,\qquad
# M_{ij} = \begin{cases}0 & j \le i\\ -\infty & j > i\end{cases}$$
#
# The mask $M$ keeps the future out, so that one pass over a text trains a prediction at every position. The $\sqrt d$ keeps the scores of random vectors at
# variance one, so that the softmax starts soft.
#
# ### EXERCISE attention
# Write the formula, $i$ being the position of a query and $j$ that of a key, with products and a softmax. (`F.scaled_dot_product_attention` is what it is compared with.) There may be more keys than queries, $s > t$; then the queries are the *last* positions: the last query stands where the last key does.


# %% tags=["exercise:attention"]
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, scores and all. q: (b, h, t, d); k, v: (b, h, s, d), s >= t.

    Returns (b, h, t, d). The last query stands at the last key's position.
    """
    ### BEGIN SOLUTION
    t, s = q.shape[-2], k.shape[-2]
    scores = einsum(q, k, "b h t d, b h s d -> b h t s") / math.sqrt(q.shape[-1])
    future = torch.ones(t, s, dtype=torch.bool).triu(s - t + 1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return einsum(weights, v, "b h t s, b h s d -> b h t d")
    ### END SOLUTION


# %% tags=["check:attention:4"]
q, k, v = torch.randn(3, 2, 4, 50, 16)
kept, same_v = q.clone(), torch.ones(2, 4, 50, 16)
out = attention(q, k, v)
assert torch.equal(q, kept), "the queries were changed in place"
assert not out.isnan().any(), (
    "NaN: some query has no key left. Which key may the first query look at?"
)
k2, v2 = k.clone(), v.clone()
k2[:, :, 30], v2[:, :, 30] = 2.0, 9.0
after = attention(q, k2, v2)
assert not torch.allclose(out[:, :, 30], after[:, :, 30]), (
    "query 30 does not see key 30: a position sees itself too"
)
assert torch.allclose(attention(q, k, same_v), same_v, atol=1e-4), (
    "if all values are 1 so is every mixture: do the weights of each query sum to 1?"
)
assert torch.allclose(out[:, :, 0], v[:, :, 0], atol=1e-5), (
    "the first query sees only the first value: the mask lets it see more"
)
assert torch.allclose(out[:, :, :30], after[:, :, :30], atol=1e-4), (
    "a position saw the future"
)
plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
unscaled = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
assert not torch.allclose(out, unscaled, atol=1e-3), "the scores lack their division"
assert torch.allclose(out, plain, atol=1e-4), (
    "PyTorch's causal attention gives something else: compare the scale of the scores"
)
assert torch.allclose(attention(q[:, :, -3:], k, v), out[:, :, -3:], atol=1e-4), (
    "with fewer queries than keys, the queries are the last positions"
)
### BEGIN HIDDEN TESTS
q64, k64, v64 = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)
expected = F.scaled_dot_product_attention(q64, k64, v64, is_causal=True)
assert torch.allclose(attention(q64[:, :, -2:], k64, v64), expected[:, :, -2:]), (
    "other shapes, or float64, give another result"
)
big = attention(30 * q, 30 * k, v)
assert big.isfinite().all(), (
    "large scores give NaN: mask before the softmax, and is it a safe one?"
)
expected = F.scaled_dot_product_attention(30 * q, 30 * k, v, is_causal=True)
assert torch.allclose(big, expected, atol=1e-3), (
    "with large scores the future shines through: how deep is your mask?"
)
### END HIDDEN TESTS

# %%
q, k, v = torch.randn(3, 2, 4, 50, 16)
scores = q @ k.mT / math.sqrt(16)
assert abs(scores.var() - 1) < 0.2, "random vectors give scores of variance one"
fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.testing.assert_close(attention(q, k, v), fused, atol=1e-5, rtol=1e-5)

# %% [markdown]
# PyTorch's fused kernel agrees, and the model will call that one, because it never writes the $t \times s$ matrix to memory; lab 04 builds it.
#
# The layer around it: four matrices, and a split of the channels into heads, which is one einops pattern. In *grouped-query* attention (Ainslie et al. 2023) several query heads share one
# key-value head, which shrinks the cache that generation keeps; with `n_kv_heads = n_heads`, as in our tiny configuration, it is ordinary multi-head attention.


# %%
class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.head_dim, self.group = config.head_dim, config.n_heads // config.n_kv_heads
        kv_dim = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:  # (b, t, c) -> (b, t, c)
        q, k, v = (
            rearrange(layer(x), "b t (h d) -> b h t d", d=self.head_dim)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (repeat(z, "b g t d -> b (g n) t d", n=self.group) for z in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)"))


# %% [markdown]
# ## 5 · SwiGLU, the block, the model
# *Live, 11 minutes.*
#
# Attention moves information between positions; the feed-forward layer works on each position alone. Llama's is a gated one (Shazeer 2020): one matrix computes what could be passed on, a
# second, through $\operatorname{silu}(z) = z\,\sigma(z)$, how much of it is:
#
# $$\operatorname{SwiGLU}(x) = W_\text{down}\big(\operatorname{silu}(W_\text{gate}\,x) \odot W_\text{up}\,x\big)$$


# %%
class SwiGLU(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (b, t, c) -> (b, t, c)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


# %% [markdown]
# The **loss** is the mean surprise: $-\ln p$ of the token that came, averaged over all positions, in nats. From logits $z$,
#
# $$-\ln p_j = \ln\sum_i e^{z_i} - z_j .$$
#
# ### EXERCISE cross_entropy
# Write it so that large logits do no harm: $e^{100}$ is more than a float32 can hold, but $\ln\sum_i e^{z_i}$ is not, if the largest logit of each row is taken out of the sum first. Do without `F.cross_entropy`: it is what the loss is compared with.


# %% tags=["exercise:cross_entropy"]
def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean surprise of the targets, in nats.

    logits: (n, v) float; targets: (n,) int64, the tokens that came. Returns a scalar.
    """
    ### BEGIN SOLUTION
    target_logits = logits.gather(-1, targets[:, None])[:, 0]
    return (logits.logsumexp(-1) - target_logits).mean()
    ### END SOLUTION


# %% tags=["check:cross_entropy:3"]
even = cross_entropy(torch.zeros(6, 8), torch.arange(6))
assert not math.isclose(even, 6 * math.log(8), rel_tol=1e-4), "a sum, not a mean"
assert not math.isclose(even, math.log2(8), rel_tol=1e-4), "bits: we count in nats"
assert math.isclose(even, math.log(8), rel_tol=1e-4), (
    "eight equally likely tokens have a surprise of ln 8: is the sum over the right axis?"
)
sure = torch.tensor([[5.0, 0.0, 0.0]])
low, high = (cross_entropy(sure, torch.tensor([i])) for i in (0, 1))
assert low < high, "the token with the largest logit should surprise least: a sign?"
large = cross_entropy(100 * sure, torch.tensor([1]))
assert large.isfinite(), "large logits overflow: take the largest out of the sum first"
assert math.isclose(large, 500, rel_tol=1e-4), "logits 0 against 500 have surprise 500"
### BEGIN HIDDEN TESTS
z = torch.randn(7, 5, requires_grad=True)
targets = torch.randint(5, (7,))
loss = cross_entropy(z, targets)
assert torch.allclose(loss, F.cross_entropy(z, targets), atol=1e-5), (
    "logits of several rows: does each row use its own target and its own sum?"
)
apart = torch.tensor([[200.0, 0.0], [0.0, 0.0]])
loss_apart = cross_entropy(apart, torch.tensor([0, 0]))
assert math.isclose(loss_apart, math.log(2) / 2, rel_tol=1e-4), (
    "a row with small logits beside one with large: take out each row's own largest"
)
(slope,) = torch.autograd.grad(loss, z)
expected = (z.softmax(-1) - F.one_hot(targets, 5)).detach() / 7
assert torch.allclose(slope, expected, atol=1e-5), (
    "the gradient is not softmax - target"
)
### END HIDDEN TESTS

# %% [markdown]
# The model: look each token up, pass it through the blocks, and compare the result with every token's vector. The table that looks up
# and the matrix that compares are one and the same, *tied* (Press and Wolf 2017): at this size a second one would be a tenth of all parameters.


# %%
class TinyLlama(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        cos, sin = rotary_table(config.head_dim, config.max_len, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 if name == "embed.weight" else p.shape[1] ** -0.5
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    p,
                    std=std / math.sqrt(2 * self.config.n_layers)
                    if into_stream
                    else std,
                )

    def forward(self, tokens: Tensor) -> Tensor:  # (b, t) -> (b, t, v)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]])
        return einsum(self.norm(x), self.embed.weight, "b t c, v c -> b t v")

    def loss(self, window: Tensor) -> Tensor:  # (b, t + 1) -> scalar
        logits = self(window[:, :-1])
        return cross_entropy(
            rearrange(logits, "b t v -> (b t) v"),
            rearrange(window[:, 1:], "b t -> (b t)"),
        )


model = TinyLlama(config)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## 6 · The loss, before any training
# *Live, 4 minutes.*
#
# What does the loss say of a model that has seen nothing? Commit to a guess before you run on.

# %%
predict(
    "A model that has seen nothing chooses among 96 characters. Its loss is about",
    ["0.01 nats", "1 nat", "4.6 nats", "96 nats"],
    answer=2,
    why="Small weights give nearly equal logits, so each of the 96 characters gets "
    "probability 1/96, and its surprise is ln 96.",
)

# %%
window = data.random_windows(corpus.train_tokens, batch_size=16, seq_len=128, seed=0)
with torch.no_grad():
    initial_loss = model.loss(window).item()
print(f"loss at initialisation {initial_loss:.1f}, ln(96) = {math.log(96):.3f}")
assert abs(initial_loss - math.log(96)) < 0.1, (
    "an untrained model should spread its guesses evenly"
)

# %% [markdown]
# It is the cheapest test there is of a new model: a loss far above $\ln v$ means weights that start
# too large, one below it means that the target leaks into the input.
#
# ## 7 · What it costs: parameters, operations, bytes
# *Live, 13 minutes.*
#
# **Parameters**, by hand. A block has four $c \times c$ matrices in attention, three $c \times f$ matrices in SwiGLU and two gains of $c$:

# %%
c, f, n_layers, vocabulary = (
    config.dim,
    config.hidden_dim,
    config.n_layers,
    config.vocab_size,
)
matrices = n_layers * (4 * c * c + 3 * c * f)
gains = (2 * n_layers + 1) * c
table = vocabulary * c
n_params = matrices + gains + table

assert n_params == sum(p.numel() for p in model.parameters()) == config.n_params()
report("params_30k", n_params, "parameters")
report("params_30k_table", round(100 * table / n_params, 1), "% of them in the table")

# %% [markdown]
# **Operations**, by hand. A matrix with $n$ entries costs one multiplication and one addition per entry and token: $2n$ operations. The table counts once more at the end, as the output
# matrix. Attention adds $QK^\top$ and $PV$: for $t$ queries and $t$ keys, $2 \cdot 2\,t^2 c$ a layer. (This counts the whole square, as PyTorch does; a causal kernel
# needs only the half below the diagonal.) The backward pass computes two gradients, by inputs and by weights, for every product: twice the forward pass, so training costs three forward passes.

#
# ### EXERCISE forward_flops
# Write the count for the forward pass over one window, for multi-head attention (as many key-value heads as heads).


# %% tags=["exercise:forward_flops"]
def forward_flops(c: int, f: int, n_layers: int, vocabulary: int, t: int) -> int:
    """Operations in the matrix products of one forward pass over t tokens.

    c: channels; f: hidden channels of SwiGLU. A multiplication and an addition are 2,
    attention's square counts whole; norms, rotations, softmax and SiLU are left out.
    """
    ### BEGIN SOLUTION
    matrices = n_layers * (4 * c * c + 3 * c * f) + vocabulary * c
    square = n_layers * 2 * 2 * t * t * c
    return 2 * t * matrices + square
    ### END SOLUTION


# %% tags=["check:forward_flops:3"]
def torch_flops(c, f, n_layers, vocabulary, t):
    """What PyTorch itself counts. It sees attention only in its plain form, MATH."""
    shape = Config(vocabulary, dim=c, n_layers=n_layers, n_heads=1, hidden_dim=f)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tinylm.model.TinyLlama(shape)(torch.zeros(1, t, dtype=torch.int64))
    return counter.get_total_flops()


def growth(count, name):
    """By how much the count grows when one number is doubled."""
    shape = {"c": 16, "f": 40, "n_layers": 2, "vocabulary": 7, "t": 20}
    before = count(**shape) * (2 if name == "t" else 1)  # t: beyond twice as much
    return count(**{**shape, name: 2 * shape[name]}) - before


names = ("vocabulary", "f", "t", "n_layers")
share = {n: growth(forward_flops, n) / growth(torch_flops, n) for n in names}
assert any(abs(x - 0.5) > 1e-9 for x in share.values()), (
    "an addition is an operation too"
)
assert share["vocabulary"] > 0, "the table costs nothing? It is the output matrix, too"
assert share["t"] > 0, (
    "twice the tokens cost just twice as much? Then no square is in it"
)
assert share["t"] == 1, "attention's square: how many products, and how many layers?"
assert share["f"] == 1, "a wider SwiGLU costs another amount: how many matrices has it?"
assert share["n_layers"] == 1, "a layer costs another amount: count its matrices again"
assert share["vocabulary"] == 1, "a larger table costs another amount"
### BEGIN HIDDEN TESTS
for shape in [(8, 3, 5, 11, 9), (12, 50, 3, 96, 64), (16, 40, 2, 7, 1)]:
    assert forward_flops(*shape) == torch_flops(*shape), "PyTorch counts another total"
### END HIDDEN TESTS

# %%
t = 128
forward = forward_flops(c, f, n_layers, vocabulary, t)
square = forward_flops(c, f, n_layers, vocabulary, 2 * t) // 2 - forward  # grows as t^2
ratio = 3 * forward / t / n_params
print(f"forward pass over {t} tokens: {forward / 1e6:.2f} million operations")
print(f"of these in attention: {square / forward:.0%}")
report(
    "ops_per_param_30k", round(ratio, 2), "operations per token and parameter (not 6)"
)

# %% [markdown]
# And of our own model, forward and backward, PyTorch counts three times as much:

# %%
with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
    model.loss(window[:1]).backward()
model.zero_grad()
assert counter.get_total_flops() == 3 * forward == config.train_flops(t)
print(f"counted by PyTorch: {counter.get_total_flops():,} = 3 x {forward:,}")

# %% [markdown]
# The rule *6 operations per parameter and token* ($C \approx 6ND$) that scaling laws are written in comes from here: 2 forward, 4 backward. For a model this small it is too low,
# because attention's square does not belong to any parameter. Lab 01 needs the exact count for that reason.
#
# **Bytes**: in float32 every parameter takes 4.

# %%
predict(
    "How many bytes does training with AdamW keep for each parameter, activations aside?",
    ["4", "8", "12", "16"],
    answer=3,
    why="The weight, its gradient, and the two moments of AdamW, 4 bytes each.",
)

# %% [markdown]
# Generation keeps a key and a value of $c$ channels, per layer and position.

# %%
weights, training = 4 * n_params, 16 * n_params
cache = 2 * n_layers * c * config.max_len * 4
assert weights == sum(p.nbytes for p in model.parameters())
assert cache == config.kv_cache_bytes(config.max_len)
print(f"weights {weights / 1e3:.0f} kB, training state {training / 1e3:.0f} kB")
print(f"KV cache at {config.max_len} tokens {cache / 1e3:.0f} kB")

# %% [markdown]
# The same counts for any shape, to play with. **Commit to a guess** first. LLaMA 7B was trained on contexts of 2,048 tokens. With twice the context, the work to generate a token
#
# (a) stays the same &emsp; (b) grows by less than a tenth &emsp; (c) doubles?
#
# And which of the other numbers change? Then press *LLaMA 7B* and move *Context* one step. (A page without a kernel shows a still here; the chapter has the figure live.) More to try: find the widest model whose weights fit the
# laptop at 16 bits; give LLaMA 7B fewer key-value heads; widen our own model until its table no longer shows.

# %% tags=["widget"]
interactive("model_size", like="shakespeare-800k")

# %%
llama_7b = Config(
    32_000, dim=4096, n_layers=32, n_heads=32, hidden_dim=11_008, tie_embeddings=False
)
work = llama_7b.decode_flops(4096) / llama_7b.decode_flops(2048)
cache = llama_7b.kv_cache_bytes(4096) / llama_7b.kv_cache_bytes(2048)
print(f"{llama_7b.n_params():,} parameters, at any context")
print(f"at twice the context: work for a token x {work:.3f}, KV cache x {cache:.0f}")
assert 1 < work < 1.1 and cache == 2

# %% [markdown]
# (b): the weights do not know the context and the cache doubles. Of the work, only attention's share doubles, and beside matrices 4,096 channels wide it is small. In a model as narrow as ours the same step costs far more: try it.
#
# ## 8 · What your machine can do: a roofline
# *Live, 8 minutes.*
#
# A processor has two speeds: how many operations it performs a second, and how many bytes it moves to and from memory. An operation that does $I$ operations for each byte it moves (its *arithmetic intensity*) runs
# at best at
#
# $$\min(\text{peak},\; I \times \text{bandwidth}),$$
#
# a roof with a slope and a flat (Williams, Waterman and Patterson 2009). We measure both on the spot: the peak with a matrix product, the bandwidth with a copy too large for any cache, and, since a tiny
# model may live in the cache, the cache's bandwidth with a small copy.

# %%


def best_time(function, repeats: int = 5) -> float:
    """Seconds of the fastest of many runs: others can only slow a run down."""
    function()  # warms up
    times = []
    while len(times) < repeats or sum(times) < 0.3:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


# %% tags=["timing"]
products = [torch.randn(n, n) for n in (512, 1024, 1536)]
peak = max(2 * len(a) ** 3 / best_time(lambda a=a: a @ a) for a in products)
source = torch.randn(50_000_000)  # 200 MB
target = torch.empty_like(source)
bandwidth = (
    2 * 4 * source.numel() / best_time(lambda: target.copy_(source))
)  # bytes read and written per second
small, copy = torch.randn(2, 50_000)  # 200 kB each
read_bandwidth = 4 * source.numel() / best_time(lambda: source.sum())  # bytes read
cache_bandwidth = 2 * 4 * small.numel() / best_time(lambda: copy.copy_(small))
del source, target
report("peak_gflops", peak / 1e9, "GFLOP/s in a float32 matrix product")
report("bandwidth_gbs", bandwidth / 1e9, "GB/s in a copy from memory to memory")
report("read_gbs", read_bandwidth / 1e9, "GB/s in a sum, which only reads")
report("cache_gbs", cache_bandwidth / 1e9, "GB/s in a copy within the cache")
report("ridge", peak / bandwidth, "operations per byte where the roof bends")
assert peak > bandwidth > 1e8, (
    "a matrix product does more operations a second than a copy moves bytes"
)

# %% [markdown]
# Now the model's own operations, on the shapes of the 800-thousand-parameter model that later labs use: the product in its feed-forward layer (on a batch, and on one token, as in generation), attention, a norm, and the optimizer's
# step. For each we count operations and the bytes it has to move, compute the roof, and time it.

# %%
big = checkpoint.load("shakespeare-800k")
width, hidden, rows = big.config.dim, big.config.hidden_dim, 16 * 256
x, w, one = torch.randn(rows, width), torch.randn(width, hidden), torch.randn(1, width)
q, k, v = torch.randn(3, 16, 4, 256, 32)
p, g, m1, m2 = torch.randn(4, big.config.n_params())
gain = torch.ones(width)


def adamw():
    m1.lerp_(g, 0.1)
    m2.mul_(0.95).addcmul_(g, g, value=0.05)
    p.addcdiv_(m1, m2.abs().sqrt().add_(1e-8), value=-1e-3)


operations = {  # name: (function, operations, bytes that must move at least)
    "product, batch": (
        lambda: x @ w,
        2 * rows * width * hidden,
        4 * (rows * width + width * hidden + rows * hidden),
    ),
    "product, one token": (
        lambda: one @ w,
        2 * width * hidden,
        4 * (width + width * hidden + hidden),
    ),
    "attention": (
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        2 * 2 * 16 * (256 * 257 // 2) * width,  # the causal half of the square
        4 * 4 * rows * width,
    ),
    "RMSNorm": (
        lambda: F.rms_norm(x, (width,), gain),
        4 * rows * width,
        4 * 2 * rows * width,
    ),
    "AdamW": (adamw, 12 * p.numel(), 4 * 7 * p.numel()),
}

# %% tags=["timing"]
measured = {}
for name, (function, flops, moved) in operations.items():
    seconds = best_time(function)
    measured[name] = (flops / moved, flops / seconds)
    roof = min(peak, flops / moved * bandwidth)
    print(
        f"{name:20}{flops / moved:7.2f} op/byte {flops / seconds / 1e9:7.1f} GFLOP/s,"
        f" roof from memory {roof / 1e9:6.1f}"
    )
assert measured["product, batch"][1] > 2 * measured["RMSNorm"][1], (
    "products should run faster than norms"
)

# %% tags=["plot"]
figure, axis = plt.subplots()
intensity = torch.logspace(-1.3, 3, 200)
axis.loglog(
    intensity, torch.clamp(intensity * bandwidth, max=peak) / 1e9, color=INK, lw=2
)
axis.loglog(
    intensity,
    torch.clamp(intensity * cache_bandwidth, max=peak) / 1e9,
    color=MUTED,
    lw=1,
    ls=(0, (4, 3)),
)
places = {
    "product, one token": (9, 2),
    "RMSNorm": (9, -8),
    "AdamW": (-9, -3),
    "attention": (8, -10),
    "product, batch": (-8, -10),
}
for (name, (i, speed)), color in zip(
    measured.items(), (BLUE, SKY, GREEN, ORANGE, PURPLE), strict=True
):
    axis.plot(i, speed / 1e9, "o", ms=8, color=color)
    label(
        axis,
        i,
        speed / 1e9,
        name,
        color,
        xytext=places[name],
        ha="right" if places[name][0] < 0 else "left",
    )
label(
    axis,
    1000,
    peak / 1e9,
    f"peak {peak / 1e9:.0f} GFLOP/s",
    INK,
    xytext=(0, 9),
    ha="right",
)
label(
    axis,
    0.1,
    0.1 * bandwidth / 1e9,
    f"memory {bandwidth / 1e9:.0f} GB/s",
    INK,
    xytext=(6, -10),
)
cache_text = f"cache {cache_bandwidth / 1e9:.0f} GB/s"
label(
    axis,
    1.2,
    1.2 * cache_bandwidth / 1e9,
    cache_text,
    MUTED,
    xytext=(-8, 4),
    ha="right",
)
axis.set(
    xlabel="arithmetic intensity (operations per byte)",
    ylabel="speed (GFLOP/s)",
    title="The roof of this machine, and five operations",
)
show(
    figure,
    "fig_roofline",
    "A roofline on logarithmic axes: a line rises with arithmetic intensity at the "
    "slope of the memory bandwidth, then is flat at the peak of the processor; a "
    "dashed one rises at the slope of the cache. Matrix products on a batch and "
    "attention lie high on the right; "
    "RMSNorm, AdamW and the product for one token lie on the left, lower.",
)

# %% [markdown]
# Read it from left to right. AdamW, the norm and the product with *one* token do about one operation or less per byte: the movement of data sets their roof, and more arithmetic units would not raise it. Those that stand *above* the memory line have their
# data in a cache; a model too large for it would fall back to the line. The products of a training batch do dozens of operations a byte and come near the peak. So a batch's large products are bound by arithmetic and generation by bytes,
# which is why quantization (lab 02) speeds up generation. Whatever in training is not a large product, attention written out above all, stays bound by bytes: lab 04. And at this size the cost of each call counts as well.
#
# ## 9 · A minute of training
# *Live, 6 minutes.*
#
# The loop itself is four lines: draw a batch, compute the loss, follow its gradient, repeat.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
for step in range(10):
    loss = model.loss(
        data.random_windows(corpus.train_tokens, batch_size=16, seq_len=128, seed=step)
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert loss < initial_loss - 0.5, "ten steps already teach which characters are common"
held = 0
for p in model.parameters():
    state = optimizer.state[p]
    held += (
        p.nbytes + p.grad.nbytes + state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    )
assert held == training, "16 bytes a parameter, as counted"
print(f"at the tenth step the loss is below {math.ceil(loss.item() * 2) / 2}")

# %% [markdown]
# `tinylm.train` is that loop with what a real run needs: a learning rate that warms up and then falls along a cosine, clipped gradients, evaluation on text that was held out, a progress bar, and exact resumption. (`budget_fraction()`, in the
# asserts below, is 1. Quick runs of the lab, such as those of the tests, shorten the training by an environment variable; then it is less, and nothing is asserted about a model that was not trained to the end.) Keep a sample of what
# the untrained model writes, then train it. **Commit to a guess** before you look: the frequencies of the characters alone, a model of 96 numbers, bring the loss down by more than one nat. After a minute, on plays it never saw, our model loses
#
# (a) 3.0 &emsp; (b) 2.4 &emsp; (c) 1.7 &emsp; (d) 0.5 nats?


# %%
def write(model, prompt: str, n: int, temperature: float = 0.7, seed: int = 0) -> str:
    """Sample n characters. Slow and obvious: a full pass for every one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = encode(prompt)
    with torch.no_grad():
        for _ in range(n):
            logits = model(tokens[None, -model.config.max_len :])[0, -1]
            weights = (logits / temperature).softmax(-1)
            new = torch.multinomial(weights, 1, generator=generator)
            tokens = torch.cat([tokens, new])
    return decode(tokens)


torch.manual_seed(0)
model = TinyLlama(config)
sample_before = write(model, "**HAMLET**  \n", 80)
recipe = TrainConfig(
    steps=1800, batch_size=16, seq_len=128, lr=1e-2, eval_every=200, seed=0
)

# %% tags=["trained"]
openings = encode("".join(text[:4000] for text in corpus.val.values()))
history = train(model, corpus.train_tokens, recipe, val=openings, eval_windows=None)
live_loss = evaluate(model, corpus.val_tokens, seq_len=128)
report("live_loss", live_loss, "nats per character on held-out plays")
report("live_seconds", history.seconds, "s of training")
report("live_tokens", history.tokens, "characters seen")
report("live_gflops", history.flops / history.seconds / 1e9, "GFLOP/s sustained")
assert live_loss < 1.8 or budget_fraction() < 1, "a minute should bring it below 1.8"

# %% [markdown]
# The answer is (c). To know what a loss means, hold it against simple models. The *unigram* model knows how often each character occurs, the *bigram* model how often it follows another. Both are counts over the training text, evaluated on the held-out plays:

# %%
train_tokens, val_tokens = corpus.train_tokens, corpus.val_tokens
pairs = (
    torch.zeros(96, 96).index_put_(
        (train_tokens[:-1], train_tokens[1:]), torch.tensor(1.0), accumulate=True
    )
    + 0.01
)
bigram = pairs / pairs.sum(-1, keepdim=True)
unigram = pairs.sum(0) / pairs.sum()
unigram_loss = -unigram[val_tokens[1:]].log().mean().item()
bigram_loss = -bigram[val_tokens[:-1], val_tokens[1:]].log().mean().item()
report("unigram_loss", round(unigram_loss, 3), "nats per character")
report("bigram_loss", round(bigram_loss, 3), "nats per character")

# %% tags=["trained"]
windows = None if budget_fraction() == 1 else 100  # a quick run takes the first hundred
big_loss = evaluate(big, val_tokens, seq_len=256, limit=windows)
assert big_loss < 1.45 and (live_loss < bigram_loss or budget_fraction() < 1)
report("big_loss", big_loss, "nats per character, 800-thousand-parameter model")
report("big_bits", big_loss / math.log(2), "bits per character")

# %% [markdown]
# Held-out plays are not equally hard. Each checkpoint's card says how it did on each of the four:

# %%
for name in ("shakespeare-30k", "shakespeare-800k"):
    by_play = checkpoint.read_card(name)["val_loss_by_play"]
    print(name, *(f"{play} {loss:.2f}" for play, loss in by_play.items()), sep="  ")

# %% [markdown]
# *Richard III* is the easiest for both. That it stood in the training text under another name would be the first suspicion, but no passage of 200 characters is shared (a test looks), and the model of 30 thousand parameters, too small to remember
# passages, finds it easier too. It continues the three *Henry VI* plays, which are in the training text, with their persons, their headings and their phrases.

# %% tags=["plot"]
figure, axis = plt.subplots()
seen = [
    (i + 1) * recipe.batch_size * recipe.seq_len / 1e6 for i in range(len(history.loss))
]
axis.plot(seen, history.loss, color=BLUE, alpha=0.18, lw=0.8)
axis.plot(seen, smooth(history.loss, 20), color=BLUE)
held_out = [
    (step * recipe.batch_size * recipe.seq_len / 1e6, loss)
    for step, loss in history.val
]
axis.plot(*zip(*held_out, strict=True), "o", color=VERMILION)
label(
    axis,
    *held_out[-1],
    f"held-out plays {live_loss:.2f}",
    VERMILION,
    xytext=(0, 13),
    ha="right",
)
label(
    axis,
    seen[len(seen) // 6],
    smooth(history.loss, 20)[len(seen) // 6],
    "training text",
    BLUE,
    xytext=(8, 14),
)
reference_line(axis, math.log(96), "uniform over 96 characters")
reference_line(axis, unigram_loss, "unigram counts")
reference_line(axis, bigram_loss, "bigram counts")
reference_line(axis, big_loss, "800-thousand-parameter model, trained longer", GREEN)
axis.set(
    xlabel="million characters seen",
    ylabel="loss (nats per character)",
    title="A minute of training, 30 thousand parameters",
    ylim=(1.1, 4.75),
)
show(
    figure,
    "fig_training",
    "Loss against characters seen for the 30-thousand-parameter model. It starts at "
    "4.6 nats, the uniform level, falls within the first half million characters "
    "below the levels of unigram and bigram counts, and then flattens near 1.6 nats, "
    "above the dashed line of the 800-thousand-parameter model.",
)

# %% [markdown]
# ## 10 · Text before and after
# *Live, 2 minutes.*

# %% tags=["trained"]
sample_after = write(model, "**HAMLET**  \n", 240)
print(
    "UNTRAINED",
    sample_before,
    "\n" + "-" * 72,
    "\nAFTER A MINUTE",
    sample_after,
    sep="\n",
)
assert sample_after.count(" ") > 3 * sample_before.count(" "), (
    "a trained model knows the commonest character"
)

# %% [markdown]
# A *temperature* below 1 sharpens the distribution: fewer accidents, less variety. A minute of training gives speakers in capitals, lines of the right length and many real words. The larger model, with the same code and a longer run, gives
# phrases that hold together for a line or two, if not sense. It is `tinylm.model`'s, which computes each new position alone
# and keeps the keys and values of the earlier ones in a cache:

# %% tags=["trained"]
started = time.perf_counter()
text = data.decode(
    big.generate(data.encode("**HAMLET**  \n"), 600, temperature=0.7, seed=0)
)
speed = 600 / (time.perf_counter() - started)
print(text)
report("generation_speed", speed, "characters per second")
assert text.count("**") >= 4 or budget_fraction() < 1, (
    "a play has more than one speaker"
)

# %% [markdown]
# ## 11 · The same weights in the library that production uses
# *Live, 4 minutes.*
#
# Our model is not *like* Llama, it *is* one. Write its weights under the names that Hugging Face's `transformers` expects, let `LlamaForCausalLM` load them, and the logits must agree to within float32 rounding.

# %%
import tempfile

from transformers import LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
twin = tinylm.model.TinyLlama(config)  # takes the lab's weights as they are
twin.load_state_dict({**model.state_dict(), "lm_head.weight": model.embed.weight})
with tempfile.TemporaryDirectory() as folder:
    llama = LlamaForCausalLM.from_pretrained(checkpoint.to_hf(twin, folder)).eval()

with torch.no_grad():
    tokens = window[:, :-1]
    ours, tinylms, theirs = model(tokens), twin(tokens), llama(tokens).logits
worst = (ours - theirs).abs().max().item()
assert worst < 1e-4 and (ours - tinylms).abs().max() < 1e-4
print(f"{theirs.numel():,} logits agree within 1e-4")

# %% [markdown]
# That is what makes the later labs count: what we do to this model can be held against the tools that people use on real ones, on the same weights.
#
# ## 12 · From your machine to GPT-3
# *Live, 4 minutes.*
#
# With one operation and one byte priced, the two claims become arithmetic. GPT-3's training: $C = 6ND$ with $N$ = 175 billion and $D$ = 300 billion. At your machine's peak, that takes

# %% tags=["timing"]
gpt3_flops = 6 * 175e9 * 300e9
years = gpt3_flops / peak / (365.25 * 24 * 3600)
v100_weeks = gpt3_flops / (1000 * 125e12 * 0.25) / (7 * 24 * 3600)
report("gpt3_flops", gpt3_flops, "operations to train GPT-3")
report("gpt3_years_here", years, "years on this machine at its peak")
report(
    "gpt3_weeks_1000_v100",
    v100_weeks,
    "weeks on 1,000 V100s at a quarter of their 125 TFLOP/s",
)
assert years > 100, "no laptop trains GPT-3"

# %% [markdown]
# And LLaMA on a laptop: generating one token reads every weight once, so the speed of reading, divided by the bytes of the weights, is an estimate of the most that memory allows. Four-bit weights need a scale for each group; with one 16-bit scale for 32 weights, as llama.cpp's Q4_0 has it since May 2023 (before that the scale had 32 bits), a weight takes 4.5 bits:

# %% tags=["timing"]
for billions in (7, 13):
    for bits in (16, 4.5):
        size = billions * 1e9 * bits / 8
        name = f"llama_{billions}b_{'4bit' if bits == 4.5 else '16bit'}"
        report(f"{name}_gb", size / 1e9, "GB")
        report(
            f"{name}_speed",
            read_bandwidth / size,
            "tokens per second, if reading the weights were all",
        )
assert read_bandwidth > 0.5 * bandwidth, "reading should not be slower than copying"

# %% [markdown]
# The memory bandwidth, not the processor, sets that figure, and rounding from 16 to 4.5 bits raises it by 16 / 4.5 = 3.6 times. That is the case for claim 8 from bytes. One question arithmetic cannot
# answer: is the model still any good? Lab 02 measures it.
#
# ## The verdict

# %% tags=["trained"]
assert big_loss < live_loss, "the larger model, trained longer, must be better"
size_13b, speed_7b = 13e9 * 4.5 / 8 / 1e9, read_bandwidth / (7e9 * 4.5 / 8)
verdict(
    1,
    "holds in part",
    measured=f"6ND is {gpt3_flops:.2e} operations, {v100_weeks:.0f} weeks on 1,000 V100s "
    "at a quarter of their peak",
    interval="arithmetic from published sizes; the quarter is an assumption, and the "
    "weeks go as its inverse",
    why="Thousands of GPUs for weeks is consistent with the sizes. The price depends on "
    "what an hour cost, which lab 01 takes up; no run here can test it.",
)
verdict(
    8,
    "holds in part",
    measured=f"13 billion parameters at 4.5 bits take {size_13b:.1f} GB; reading "
    f"7 billion of them allows {speed_7b:.1f} tokens per second here",
    interval="an estimate from one bandwidth, the best of 5 sums; no LLaMA was run",
    why="It fits, and the bytes alone would allow that speed. Whether quality survives "
    "four bits is for lab 02.",
)
verdict(
    19,
    "cannot be told at this scale",
    measured="two implementations, one set of weights, logits within 1e-4; "
    f"{live_loss:.2f} nats per character after {history.seconds:.0f} s of training",
    interval="one seed, one machine",
    why="A reader can rerun every number above and change it, which the code alone would "
    "not give. That this teaches more than code does is a claim about readers, and no "
    "reader was measured.",
)

# %% [markdown]
# What you predicted, beside what came out:

# %%
predictions()

# %% [markdown]
# ## Questions to go on with
#
# 1. *Position.* Remove the two `rotate` calls and train again. How much does the loss rise, and why is it not as bad as a bigram model's? (A causal mask alone leaks position. How?)
# 2. *Cost.* At which context length $t$ does attention's square take half of the forward operations of our tiny configuration? Of LLaMA with 7 billion parameters, which has $c$ = 4096, $f$ = 11,008, 32 blocks and $v$ = 32,000? Derive it, then check with `config.forward_flops`.
# 3. *Bytes.* How many tokens of KV cache take as many bytes as the weights of `shakespeare-800k`? What changes with `n_kv_heads=1`?
# 4. *Roofline.* Time the product `one @ w` with $c = f = 4096$. On which side of the ridge is it, and which bandwidth does it reach?
# 5. *Initialisation.* Start the table with standard deviation 1 instead of 0.02. Predict the loss at initialisation before you measure it.
#
# ## Further reading
#
# - Vaswani et al. 2017, *Attention is all you need* (arXiv 1706.03762), and Touvron et al. 2023, *LLaMA* (2302.13971): the architecture, then and as built here.
# - Su et al. 2021, *RoFormer* (2104.09864); Zhang and Sennrich 2019, *Root mean square layer normalization* (1910.07467); Shazeer 2020, *GLU variants improve Transformer* (2002.05202); Ainslie et al. 2023, *GQA* (2305.13245).
# - Williams, Waterman and Patterson 2009, *Roofline*, Communications of the ACM 52(4).
# - Shannon 1951, *Prediction and entropy of printed English*: the first measurement of what our loss curve approaches, with people as the model.
