# %% [markdown]
# # Lab 02 · Quantization
#
# Every way of rounding a model's weights that people use, built from scratch on one model, each judged by what it stores and what it breaks.
#
# > **The claims.** A weekly reported in 2023 that rounding lets a model of GPT-3's size run on one high-end GPU instead of five, with negligible loss of accuracy
# > (claim 7; the method is GPTQ). A leaked memo and a blog said that 4-bit rounding runs LLaMA on a laptop's CPU, and on a phone (claim 8). Lab 00 counted the bytes and found that
# > they fit. What it could not say is whether a model so rounded is still the same model. This lab measures that.
#
# - **You will build** absmax and affine rounding, groups, 4-bit packing, the NF4 format and GPTQ; and, if you go further, the byte formats of llama.cpp, fp8 and MXFP4, SmoothQuant, AWQ and rotations, training against rounding, a quantized KV cache, and matrix-vector kernels in 8 and 4 bits that beat PyTorch's.
# - **You will measure**, for each rung of the ladder, the bits a weight really takes and three distances from the unrounded model: in loss, in probabilities, and in the tokens that it would choose; each beside a control.
# - **You need** lab 00. No GPU. The lab ran in RUN_TIME on two CPU cores; its core path, sections 1 to 6, takes 60 to 90 minutes with six exercises.
#
# Sections say whether they are *live* or *recorded*. Whatever is headed *Going further* can be skipped without breaking anything.

# %% tags=["setup"]
# build.py puts the setup cell here.

# %% [markdown]
# Dimensions, named once: `o` outputs and `i` inputs of a matrix (a row makes one output), `g` a group's weights, `n` tokens or windows, `b` batch, `t` time, `v` vocabulary. A matrix $W$ is stored `(o, i)` and computes $y = Wx$. The rounded
# matrix is $\hat W$.

# %%
import copy
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from tinylm import checkpoint, data
from tinylm.figures import interactive
from tinylm.model import TinyLlama
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
    legible,
    reference_line,
    show,
    use_style,
)
from tinylm.predict import predict, predictions
from tinylm.report import report, report_table, verdict
from tinylm.train import budget_fraction

use_style()
torch.manual_seed(0)
corpus = data.shakespeare()
model = checkpoint.load("shakespeare-800k")

# %% [markdown]
# ## 1 · One model, one measure
# *Live, 6 minutes.*
#
# The patient is `shakespeare-800k`, trained in lab 00 on 34 plays. All rungs round the same 28 matrices, those inside the blocks. Embedding and norms stay as they are: 1.6 % of the parameters, and the first to be missed.


# %%
def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside a model's blocks, by name: what every rung rounds."""
    layers = model.blocks.named_modules()
    return {name: x for name, x in layers if isinstance(x, nn.Linear)}


n_weights = sum(layer.weight.numel() for layer in matrices(model).values())
n_params = model.config.n_params()
print(len(matrices(model)), "matrices,", f"{n_weights:,} of {n_params:,} parameters")

# %% [markdown]
# A *method* takes a matrix and gives back two things: the rounded matrix that the model computes with, and the tensors that a file would have to hold to restore it (codes, scales, zero points). Bits are counted from those
# tensors, not from the name of the method, and twice: over the rounded matrices, and over the whole file, everything in it included.


# %%
def quantized(model: nn.Module, method) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of a model with every matrix rounded, and the tensors stored for them.

    method: (name, w (o, i) float32) -> (w_hat (o, i) float32, [stored tensors]).
    """
    model, stored = copy.deepcopy(model), {}
    for name, layer in matrices(model).items():
        w_hat, tensors = method(name, layer.weight.detach())
        layer.weight.data = w_hat
        stored |= {f"{name}.{i}": x.contiguous() for i, x in enumerate(tensors)}
    return model, stored


def true_bits(model: nn.Module, stored: dict[str, Tensor]) -> tuple[float, float]:
    """Bits a weight over the rounded matrices, and bits a parameter over the file."""
    rounded = {f"blocks.{name}.weight" for name in matrices(model)}
    rest = {k: v for k, v in model.state_dict().items() if k not in rounded}
    if model.config.tie_embeddings:
        rest.pop("lm_head.weight")
    weights = sum(layer.weight.numel() for layer in matrices(model).values())
    size = sum(x.nbytes for x in stored.values())
    file = len(to_safetensors({**stored, **rest}))
    return 8 * size / weights, 8 * file / model.config.n_params()


# %% [markdown]
# The *judge* keeps what the unrounded model says on fixed windows of held-out plays. Of a rounded model it reports
#
# - the **loss difference**, paired: both models on the same windows, so that what makes a window hard cancels. Behind each ± stands a standard error over windows;
# - $\mathrm{KL}(p\,\|\,\hat p) = \sum_x p(x) \ln\frac{p(x)}{\hat p(x)}$, averaged over positions: how far the probabilities moved, in nats, whether or not the loss noticed;
# - **agreement**: at what share of positions the likeliest token is still the same.


# %%
class Judge:
    """Compares models with one reference on windows (n, t + 1) of text."""

    def __init__(self, model: nn.Module, windows: Tensor):
        self.windows = windows
        self.log_p = self.answers(model)  # (n, t, v)
        self.loss = self.losses(self.log_p)

    @torch.no_grad()
    def answers(self, model: nn.Module) -> Tensor:
        parts = self.windows[:, :-1].split(32)
        return torch.cat([model(x).log_softmax(-1) for x in parts])

    def losses(self, log_p: Tensor) -> Tensor:  # (n, t, v) -> (n): one a window
        return -log_p.gather(-1, self.windows[:, 1:, None]).mean((1, 2))

    def __call__(self, model: nn.Module) -> dict[str, float | Tensor]:
        log_q = self.answers(model)
        loss = self.losses(log_q) - self.loss  # (n), as all below: one a window
        kl = (self.log_p.exp() * (self.log_p - log_q)).sum(-1).mean(-1)
        same = (log_q.argmax(-1) == self.log_p.argmax(-1)).double().mean(-1)
        return {
            "difference": loss.mean().item(),
            "error": standard_error(loss),
            "kl": kl.mean().item(),
            "kl_error": standard_error(kl),
            "agreement": same.mean().item(),
            "windows": {"difference": loss, "kl": kl},
        }


def standard_error(x: Tensor) -> float:
    """Of the mean of x (n,)."""
    return (x.std() / len(x) ** 0.5).item()


# %% tags=["trained"]
windows = data.fixed_windows(corpus.val_tokens, 256)[::12]
if budget_fraction() < 1:
    windows = windows[::8]  # a quick run looks at a part
judge = Judge(model, windows)
same = judge(model)
report("float_loss", judge.loss.mean().item(), "nats per character, unrounded")
report("judged", windows[:, 1:].numel(), "characters of held-out plays judged")
assert same["difference"] == 0 and same["agreement"] == 1 and abs(same["kl"]) < 1e-6

# %% [markdown]
# Calibration, where a method asks for it, is done on *training* text, never on what is judged.

# %%
calibration = data.random_windows(corpus.train_tokens, 64, 256, seed=0)  # (64, 257)

# %% [markdown]
# Each rung becomes a row of one table, and prints a line: its name, bits a weight, the loss difference and its error in nats, KL, and agreement.

# %%
table: dict[str, dict] = {}


def signed(x: float) -> str:
    """Four decimals and a sign, but no sign for what rounds to zero."""
    return f"{x:+.4f}" if abs(x) >= 0.00005 else f"{0:.4f}"


def rung(name: str, method, control: bool = False, change=None) -> dict:
    """Round the model, judge it, print and keep the row. change: done to the copy."""
    rounded, stored = quantized(model, method)
    if change is not None:
        change(rounded)
    bits, file_bits = true_bits(model, stored)
    row = {"bits": bits, "file_bits": file_bits, "control": control, **judge(rounded)}
    table[name] = row
    print(
        f"{name:36}{bits:5.2f}{signed(row['difference']):>9} ± {row['error']:.4f}"
        f"   KL {row['kl']:.4f}   same {row['agreement']:.1%}"
    )
    return row


def paired(a: str, b: str, key: str = "difference") -> tuple[float, float]:
    """By how much rung a exceeds rung b, and its standard error: window by window."""
    more = table[a]["windows"][key] - table[b]["windows"][key]
    return more.mean().item(), standard_error(more)


# %% [markdown]
# ## 2 · Rounding to a grid
# *Live, 18 minutes.*
#
# To store a number in $b$ bits, choose $2^b$ levels and write down which level is nearest. The simplest grid is *symmetric*: evenly spaced levels around zero, the outermost of them at the largest magnitude. With the *codes* $q$
# and the *scale* $s$,
#
# $$s = \frac{\max_i |x_i|}{2^{b-1} - 1},\qquad q_i = \operatorname{round}\!\left(\frac{x_i}{s}\right),\qquad \hat x_i = s\,q_i .$$
#
# Of the $2^b$ codes, one is left unused, so that there are as many levels below zero as above.


# %%
def check_input(x: Tensor, bits: int, least: int = 1) -> None:
    """Refuse what has no sensible rounding, before any work. Raises ValueError."""
    if x.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has nothing to round")
    if not all(end.isfinite() for end in x.aminmax()):  # NaN is passed on
        raise ValueError("the tensor has NaN or infinite entries: mend them first")
    if type(bits) is not int or not least <= bits <= 8:
        raise ValueError(f"bits must be an integer from {least} to 8, got {bits!r}")


def every_axis(x: Tensor, axis: int | None) -> int | tuple[int, ...]:
    """The dimensions to reduce over: the one named, or all of them for None."""
    return tuple(range(x.ndim)) if axis is None else axis


# %% [markdown]
# ### EXERCISE absmax_quantize
# Write the formula. `axis` names the dimension whose entries share a scale: with `axis=1` each *row* of a matrix `(o, i)` has its own. A maximum with `keepdim=True` leaves a scale that
# broadcasts. Where all entries are zero the scale is 1. (`every_axis` turns `axis` into what `amax` wants as its `dim`.)


# %% tags=["exercise:absmax_quantize"]
def absmax_quantize(
    x: Tensor, bits: int, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """Round to the symmetric grid whose outermost level is the largest magnitude.

    x: float, any shape; bits: 2 to 8; axis: the dimension that shares a scale, None
    for one scale in all. Returns q, int8 of x's shape, within 2^(bits-1) - 1 of zero,
    and scale, of x's dtype, broadcastable: x is near q * scale. A scale of 0 becomes 1.
    """
    check_input(x, bits, least=2)
    ### BEGIN SOLUTION
    scale = x.abs().amax(every_axis(x, axis), keepdim=True) / (2 ** (bits - 1) - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    largest = 2 ** (bits - 1) - 1  # a scale that was rounded down may ask for more
    return (x / scale).round().clamp(-largest, largest).to(torch.int8), scale
    ### END SOLUTION


# %% tags=["check:absmax_quantize:3"]
x = torch.tensor([[0.5, -3.5, 1.4], [0.1, 0.7, -0.2], [4.0, 30.0, 20.0]])
q, scale = absmax_quantize(x[:2], 4)
assert q.dtype == torch.int8, "codes are whole bytes, int8: what is stored is counted"
small = torch.tensor([0.1, -0.2, 0.4])
assert absmax_quantize(small, 4)[0].abs().max() > 0, (
    "numbers below a half all became 0: they were rounded before they were divided"
)
assert q.abs().max() != 8, (
    "the largest magnitude got code 8, which 4 bits cannot hold on both sides: there are "
    "2^(bits-1) - 1 steps"
)
assert q[0, 1] == -7, (
    "-3.5, the largest magnitude, should get code -7: is the scale from the largest "
    "absolute value?"
)
assert torch.all((q * scale - x[:2]).abs() <= scale / 2 + 1e-6), (
    "an entry is further than half a step from its level: round, do not cut off"
)
q, scale = absmax_quantize(x, 4, axis=1)
assert scale.shape == (3, 1), "axis=1 should give one scale a row, shape (3, 1)"
assert not torch.allclose(scale[:, 0], x.abs().amax(0) / 7), (
    "these are the columns' scales: axis=1 is the dimension that shares a scale"
)
assert torch.equal(q.abs().amax(1), torch.tensor([7, 7, 7])), (
    "each row's largest magnitude should get code 7: is the scale the row's own?"
)
q, scale = absmax_quantize(torch.zeros(2, 3), 4, axis=1)
assert torch.equal(scale, torch.ones(2, 1)) and q.abs().max() == 0, (
    "a row of zeros: its scale should be 1, so that nothing is divided by zero"
)
### BEGIN HIDDEN TESTS
y = torch.linspace(-2, 1, 999, dtype=torch.float64).reshape(3, 9, 37)
kept = y.clone()
for bits in (2, 3, 4, 5, 6, 7, 8):
    q, scale = absmax_quantize(y, bits, axis=2)
    assert torch.equal(y, kept), "the input was changed in place"
    assert q.abs().max() == 2 ** (bits - 1) - 1, "other widths than 4 bits are off"
    assert ((q * scale - kept).abs() <= scale / 2 + 1e-12).all(), (
        "in three dimensions, or float64, an entry is off its nearest level"
    )
### END HIDDEN TESTS

# %% [markdown]
# The error of one entry is at most half a step, $\Delta / 2 = s/2$. If entries fall anywhere in a step with equal chance, its mean square is $\Delta^2/12$. For numbers spread evenly over $[-a, a]$, whose mean
# square is $a^2/3$, the ratio of signal to error is then known exactly: $\Delta = a / (2^{b-1}-1)$ gives
#
# $$\mathrm{SNR} = \frac{a^2/3}{\Delta^2/12} = (2^b - 2)^2, \qquad\text{in decibels}\quad 20\log_{10}(2^b - 2) .$$
#
# Each further bit doubles the levels and adds $20 \log_{10} 2 = 6.02$ dB, once there are many. We hold three kinds of numbers against this rule: even ones, normal ones, and a matrix of the model.


# %%
def snr_db(x: Tensor, x_hat: Tensor) -> float:
    """Signal to error in decibels: 10 log10(sum x^2 / sum (x - x_hat)^2)."""
    return 10 * math.log10(x.square().sum() / (x - x_hat).square().sum())


w = matrices(model)["1.mlp.gate_proj"].weight.detach()
g = torch.Generator().manual_seed(0)
kinds = {
    "even": torch.rand(w.shape, generator=g) * 2 - 1,
    "normal": torch.randn(w.shape, generator=g),
    "weights": w,
}
measured = {}
for kind, x in kinds.items():
    for bits in range(2, 9):
        q, scale = absmax_quantize(x, bits)
        measured[kind, bits] = snr_db(x, q * scale)
rule = {bits: 20 * math.log10(2**bits - 2) for bits in range(2, 9)}
gain = {kind: measured[kind, 8] - measured[kind, 7] for kind in kinds}
print("dB for the 8th bit:", {kind: f"{x:.1f}" for kind, x in gain.items()})
third = {kind: measured[kind, 3] - measured[kind, 2] for kind in kinds}
print("dB for the 3rd bit:", {kind: f"{x:.1f}" for kind, x in third.items()})
report("third_bit_weights", round(third["weights"], 2), "dB, a weight matrix")
assert all(abs(measured["even", b] - rule[b]) < 0.1 for b in rule), "the rule is exact"
assert all(abs(x - 6.02) < 0.5 for x in gain.values())

# %% tags=["plot"]
figure, axis = plt.subplots()
axis.plot(list(rule), list(rule.values()), color=MUTED, lw=1, ls=(0, (4, 3)))
label(axis, 8, rule[8], "$20\\,\\log_{10}(2^b-2)$", MUTED)
for kind, color in (("even", SKY), ("normal", BLUE), ("weights", VERMILION)):
    ratios = [measured[kind, bits] for bits in rule]
    axis.plot(list(rule), ratios, "o-", color=color, ms=5)
    place = {"even": (6, -11), "normal": (6, 3), "weights": (6, -4)}[kind]
    text = {"even": "spread evenly", "normal": "normal", "weights": "a weight matrix"}
    label(axis, 8, ratios[-1], text[kind], color, xytext=place)
axis.set(
    xlabel="bits",
    ylabel="signal to error (dB)",
    title="Six decibels a bit, once there are many levels",
    xlim=(1.8, 9.6),
)
axis.axhline(0, color=INK, lw=0.8)
show(
    figure,
    "fig_snr",
    "Signal-to-error ratio in decibels against bits from 2 to 8. Evenly spread numbers "
    "lie on the theoretical curve. Normal numbers and a weight matrix run together about "
    "8 decibels below it, and at 2 bits are barely above zero.",
)

# %% [markdown]
# All three gain six decibels a bit at the top. But the scale is set by the *largest* entry, and a normal sample's largest of 49 thousand is more than four standard deviations out, so most levels lie where there is almost nothing. At 2 bits the error of the
# weight matrix is as large as the matrix. And the way from 3 bits to 2 costs more than six: nine and a half by the rule, since a symmetric grid goes from 7 levels to 3, and seven for the matrix, whose error at 2 bits cannot be larger than the weights that become zero.
#
# **Zero points.** Some numbers are not symmetric: what SiLU lets through in the model's MLP is never below $-0.28$. A symmetric grid then wastes nearly half its levels. An *affine* grid runs from the smallest to the largest entry, and the code of zero, the
# *zero point* $z$, is stored beside the scale:
#
# $$s = \frac{\max(x, 0) - \min(x, 0)}{2^b - 1},\qquad z = \operatorname{round}\!\left(\frac{-\min(x, 0)}{s}\right),$$
#
# $$q_i = \operatorname{clamp}\!\left(\operatorname{round}\!\left(\frac{x_i}{s}\right) + z,\; 0,\; 2^b - 1\right),\qquad \hat x_i = s\,(q_i - z).$$
#
# The range is stretched to hold zero, so that zero has a code of its own: padding and switched-off channels must stay exactly zero.
#
# Codes and zero points are unsigned bytes, and $3 - 5$ is 254 in unsigned bytes: they get a sign before they are subtracted.


# %%
def affine_dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(q - zero_point) * scale, in signed arithmetic. Shapes broadcast."""
    return (q.int() - zero_point.int()) * scale


# %% [markdown]
# ### EXERCISE affine_quantize
# Write these formulas. Everything is per group of entries that share a scale, as before; a scale of 0 becomes 1.


# %% tags=["exercise:affine_quantize"]
def affine_quantize(
    x: Tensor, bits: int, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to the grid that runs from the smallest entry (or 0) to the largest (or 0).

    x: float, any shape; bits: 1 to 8; axis as in absmax_quantize. Returns q, uint8 in
    0 .. 2^bits - 1; scale, of x's dtype; zero_point, uint8: x is near
    (q - zero_point) * scale, and 0 comes back as exactly 0.
    """
    check_input(x, bits)
    ### BEGIN SOLUTION
    dims, top = every_axis(x, axis), 2**bits - 1
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / top
    scale = torch.where(scale > 0, scale, 1.0)
    zero_point = (-low / scale).round()
    q = ((x / scale).round() + zero_point).clamp(0, top)
    return q.to(torch.uint8), scale, zero_point.to(torch.uint8)
    ### END SOLUTION


# %% tags=["check:affine_quantize:3"]
x = torch.tensor([[-0.32, 0.0, 1.12, 2.68], [5.0, 6.0, 7.0, 8.0]])
q, scale, zero = affine_quantize(x, 4, axis=1)
x_hat = affine_dequantize(q, scale, zero)
assert q.dtype == zero.dtype == torch.uint8, "codes and zero points are bytes, uint8"
assert scale.shape == (2, 1) == zero.shape, "one scale and one zero point a row"
assert not torch.allclose(x_hat[0, 2:] + 2 * zero[0] * scale[0], x[0, 2:], atol=0.11), (
    "entries came back two zero points too low: look at the zero point's sign"
)
assert not torch.equal(scale[0], scale[1]), "rows share one range: each has its own"
assert zero[0] < 16, (
    "the zero point is not among the codes 0 to 15; below 0 it wraps around: its sign?"
)
assert zero[1] == 0, (
    "a row without negative entries has zero point 0: stretch the range to hold zero"
)
assert q[0, 1] == zero[0], "the entry 0 should have the zero point as its code"
assert q[0].max() == 15, (
    "the largest entry of a row with both signs should get the last code, 15"
)
assert torch.all((x_hat - x).abs() <= scale / 2 + 1e-5), (
    "an entry is further than half a step from its level: how many steps are there from "
    "the first code to the last, and is the zero point rounded before it is added?"
)
zeros = affine_quantize(torch.zeros(2, 3), 4, axis=1)
assert torch.equal(zeros[1], torch.ones(2, 1)), (
    "a row of nothing but zeros: its scale should be 1"
)
### BEGIN HIDDEN TESTS
negative = affine_quantize(-torch.rand(4, 5) - 2, 3, axis=1)
assert (negative[2] == 7).all(), (
    "rows without positive entries should have the last code as their zero point"
)
even = affine_quantize(torch.tensor([-1.5, 0.2, 1.5]), 2)[0]
assert even.max() <= 3, "a code has more bits than there are: both ends rounded up"
y = torch.linspace(-1.7, 0.9, 999, dtype=torch.float64).reshape(3, 9, 37)
for bits in range(1, 9):
    for axis in (None, 0, 2):
        q, scale, zero = affine_quantize(y, bits, axis)
        y_hat = affine_dequantize(q, scale, zero)
        assert ((y_hat - y).abs() <= scale + 1e-12).all(), (
            "other widths, axes or dtypes: an entry is more than a step off"
        )
### END HIDDEN TESTS

# %% [markdown]
# What a zero point buys depends on what is rounded. On what SiLU lets through, and on a weight matrix, at 4 bits:

# %%
with torch.no_grad():
    block = model.blocks[0]
    x = model.embed(calibration[:8, :-1])
    x = x + block.attention(block.attention_norm(x), model.cos[:256], model.sin[:256])
    silu = F.silu(block.mlp.gate_proj(block.mlp_norm(x))).flatten(0, 1)  # (tokens, f)

zero_gain = {}
for kind, x in {"SiLU's output": silu, "a weight matrix": w}.items():
    q, scale = absmax_quantize(x, 4, axis=1)
    symmetric = snr_db(x, q * scale)
    zero_gain[kind] = (
        snr_db(x, affine_dequantize(*affine_quantize(x, 4, 1))) - symmetric
    )
    print(f"{kind}: an affine grid gains {zero_gain[kind]:.0f} dB over a symmetric one")
assert zero_gain["SiLU's output"] > 4 > 2 > zero_gain["a weight matrix"] > 0

# %% [markdown]
# One bit's worth where the numbers have one sign, and little where they have both: the weights' affine grid only follows each row's slight asymmetry, and uses the code that the symmetric grid leaves out. Weights are mostly rounded
# symmetrically, activations with a zero point.
#
# **Clipping.** The largest entry need not be a level. Letting a few entries be cut off, so that the rest get a finer grid, may lower the sum of squared errors. How far to cut, a search can tell: try ratios of the largest magnitude, and keep for each group the best.


# %%
def clipped_quantize(
    x: Tensor, bits: int, axis: int | None = None, steps: int = 40
) -> tuple[Tensor, Tensor]:
    """absmax_quantize with each group cut where its squared error is least.

    Tries `steps` ratios of the largest magnitude down from 1; so never worse than 1.
    """
    check_input(x, bits, least=2)
    dims, top = every_axis(x, axis), 2 ** (bits - 1) - 1
    widest = x.abs().amax(dims, keepdim=True) / top
    widest = torch.where(widest > 0, widest, 1.0)
    best, scale = torch.full_like(widest, math.inf), widest
    for ratio in torch.linspace(1, 0.2, steps):
        tried = ratio * widest
        x_hat = tried * (x / tried).round().clamp(-top, top)
        error = (x_hat - x).square().sum(dims, keepdim=True)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    return (x / scale).round().clamp(-top, top).to(torch.int8), scale


for bits in (2, 3, 4, 8):
    q, scale = absmax_quantize(w, bits, axis=1)
    q_cut, scale_cut = clipped_quantize(w, bits, axis=1)
    kept = (scale_cut / scale).mean()
    gained = snr_db(w, q_cut * scale_cut) - snr_db(w, q * scale)
    print(f"{bits} bits: cut at {kept:.2f} of the largest, gains {gained:.1f} dB")
    assert gained >= 0

# %% [markdown]
# The fewer the levels, the deeper the best cut. At 2 bits it buys more than half a bit, at 8 next to nothing. (Least squared error of the *weights* is a stand-in for what we want. Section 5 does better.)

# %% [markdown]
# ## 3 · Granularity and bytes
# *Live, 16 minutes.*
#
# One large entry stretches the grid of everything that shares its scale. So share less: a scale for each row, or for each *group* of $g$ neighbouring weights in a row. Every scale costs 16 bits, $16/g$ for each weight, and that is the whole trade.
#
# The scale is *stored*, in float16, so the codes must be computed with the scale as stored, or they are not the nearest.
#
# ### EXERCISE quantize_groups
# Round each group of a row symmetrically, with float16 scales. (`rearrange(w, "o (n g) -> o n g", g=group_size)` cuts rows into groups of neighbours. A stored scale that was rounded down can ask for a code past the last level, so clamp.)


# %%
def check_groups(w: Tensor, group_size: int) -> None:
    """Refuse matrices that the groups do not divide. Raises ValueError."""
    if w.ndim != 2:
        raise ValueError(f"a matrix (o, i) is needed, got shape {tuple(w.shape)}")
    if type(group_size) is not int or group_size < 1 or w.shape[1] % group_size:
        raise ValueError(
            f"group_size={group_size!r} does not divide the {w.shape[1]} inputs of a "
            "row: choose a divisor (padding would be stored and paid for)"
        )


def stored_scale(scale: Tensor) -> Tensor:
    """A scale as a file holds it, in float16. Raises ValueError where that overflows."""
    half = scale.half()
    if half.isinf().any():
        raise ValueError(f"a scale of {scale.max():.3g} does not fit float16 (65504)")
    return torch.where(half > 0, half, 1.0).half()  # zeros, and what rounds to zero


# %% tags=["exercise:quantize_groups"]
def quantize_groups(w: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Round each group of `group_size` weights of a row to its own symmetric grid.

    w: (o, i) float; bits: 2 to 8; group_size: a divisor of i. Returns codes, int8 (o, i),
    within 2^(bits-1) - 1 of zero, and scale, float16 (o, i / group_size), as stored:
    the codes are the nearest under the stored scale.
    """
    check_input(w, bits, least=2)
    check_groups(w, group_size)
    ### BEGIN SOLUTION
    largest = 2 ** (bits - 1) - 1
    groups = rearrange(w, "o (n g) -> o n g", g=group_size)
    scale = stored_scale(groups.abs().amax(-1) / largest)
    codes = (groups / scale.to(w.dtype)[..., None]).round().clamp(-largest, largest)
    return rearrange(codes, "o n g -> o (n g)").to(torch.int8), scale
    ### END SOLUTION


# %%
def dequantize_groups(codes: Tensor, scale: Tensor) -> Tensor:
    """codes (o, i) times the scales (o, n) of their groups, in float32."""
    return codes * repeat(
        scale.float(), "o n -> o (n g)", g=codes.shape[1] // scale.shape[1]
    )


# %% tags=["check:quantize_groups:3"]
g = torch.Generator().manual_seed(1)
x = torch.randn(8, 32, generator=g) * torch.logspace(-2, 2, 8)[:, None]
x[0, 0] = 50.0  # one outlier, in the first group of the first row
x[7] = -x[7].abs()  # and a row without positive entries
codes, scale = quantize_groups(x, 4, group_size=8)
assert codes.dtype == torch.int8, "codes are whole bytes, int8"
assert scale.shape == (8, 4) and scale.dtype == torch.float16, (
    "one float16 scale for each 8 weights of a row: shape (8, 4)"
)
tiny = quantize_groups(torch.full((1, 8), 0.01), 4, 8)[0]
assert tiny.abs().max() > 0, "small weights became 0: rounded before they were divided?"
down = rearrange(x, "(n g) i -> n g i", g=8).abs().amax(1).flatten() / 7
assert not torch.allclose(scale.flatten().float(), down, rtol=1e-2), (
    "the groups run down the columns: a group is neighbours in a row"
)
x_hat, step = (dequantize_groups(y, scale) for y in (codes, torch.ones_like(codes)))
assert torch.all((x - x_hat).abs() <= 0.51 * step), (
    "a weight is further than half a step from its level: does the scale come from the "
    "group's largest absolute value?"
)
rest = (x - x_hat)[0, 8:].norm() / x[0, 8:].norm()
assert rest < 0.2, (
    "an outlier in the first group spoilt the others of its row: is each group's scale "
    "its own?"
)
x = torch.randn(64, 512, generator=g)
codes, scale = quantize_groups(x, 4, group_size=8)
step = dequantize_groups(torch.ones_like(codes), scale)
assert torch.equal(codes.float(), (x / step).round().clamp(-7, 7)), (
    "some codes are not the nearest under the stored float16 scale: round the scale "
    "first, then the weights"
)
assert quantize_groups(torch.zeros(1, 8), 4, 8)[0].abs().max() == 0
### BEGIN HIDDEN TESTS
g = torch.Generator().manual_seed(2)
for bits in (2, 3, 5, 8):
    w2 = torch.randn(5, 48, generator=g)
    codes, scale = quantize_groups(w2, bits, 16)
    assert codes.abs().max() == 2 ** (bits - 1) - 1, "other widths than 4 bits are off"
    step = dequantize_groups(torch.ones_like(codes), scale)
    assert ((w2 - codes * step).abs() <= 0.52 * step).all(), (
        "other widths than 4 bits, or other groups, are not rounded to the nearest"
    )
codes = quantize_groups(1e-6 * torch.randn(16, 16, generator=g), 4, 16)[0]
assert codes.abs().max() <= 7, (
    "a stored scale that was rounded down pushes a code past the last level"
)
### END HIDDEN TESTS

# %% [markdown]
# **Bytes.** A code of 4 bits in an `int8` still takes 8. Two of them must share a byte: the first in its low half (*nibble*), the second in its high half, each shifted by 8, so that $-8 \dots 7$ becomes $0 \dots 15$. (This is our order; every format has its own, and mixing them up gives a model
# that talks nonsense and raises no error.)
#
# ### EXERCISE pack_int4
# Pack; the unpacking is given.


# %% tags=["exercise:pack_int4"]
def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte along the last dimension, the first in the low nibble.

    codes: (..., i) integers in -8 .. 7, i even. Returns (..., i / 2) uint8 of
    (code + 8). Raises ValueError for an odd i or a code out of range.
    """
    if codes.shape[-1] % 2 or codes.min() < -8 or codes.max() > 7:
        raise ValueError("codes must be in -8 .. 7 and their last dimension even")
    ### BEGIN SOLUTION
    low, high = rearrange(
        (codes + 8).to(torch.uint8), "... (n two) -> two ... n", two=2
    )
    return low | high << 4
    ### END SOLUTION


# %%
def unpack_int4(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The codes (..., i) int8 that pack_int4 packed; `shape` is theirs."""
    if packed.numel() * 2 != math.prod(shape):
        raise ValueError(
            f"{packed.numel()} bytes do not hold a tensor of shape {shape}"
        )
    nibbles = torch.stack([packed & 15, packed >> 4], -1)
    return nibbles.reshape(shape).to(torch.int8) - 8


# %% tags=["check:pack_int4:2"]
packed = pack_int4(torch.tensor([[-8, 7], [0, 1]], dtype=torch.int8))
assert packed.dtype == torch.uint8, "a byte is uint8: others take more of them"
assert packed.shape == (2, 1), "two codes make one byte: the last dimension halves"
assert packed[0, 0] != 0x0F, (
    "the nibbles are the wrong way round: the first code belongs in the low one"
)
assert packed[0, 0] == 0xF0, (
    "-8 and 7 should become nibbles 0 and 15, the byte 0xF0: shift by 8 first?"
)
assert packed[1, 0] == 0x98, "0 and 1 should become nibbles 8 and 9, the byte 0x98"
codes = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
assert torch.equal(unpack_int4(pack_int4(codes.clone()), (2, 8)), codes), (
    "neighbours should share a byte, codes 2n and 2n + 1"
)
### BEGIN HIDDEN TESTS
g = torch.Generator().manual_seed(303)
codes = torch.randint(-8, 8, (3, 5, 6), generator=g).to(torch.int8)
kept = codes.clone()
packed = pack_int4(codes)
assert torch.equal(codes, kept), "the codes were changed in place"
assert torch.equal(unpack_int4(packed, (3, 5, 6)), kept), (
    "tensors of three dimensions do not come back"
)
### END HIDDEN TESTS

# %% [markdown]
# Three bits do not divide a byte, but eight codes of three bits fill three bytes. For widths other than 4 we write the codes' bits one after the other:


# %%
def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes, shifted to 0 .. 2^bits - 1, as one string of bits: (n) uint8."""
    shifted = (codes.int() + 2 ** (bits - 1)).flatten().numpy()
    string = shifted[:, None] >> np.arange(bits) & 1
    return torch.from_numpy(np.packbits(string.astype(np.uint8)))


def unpack_bits(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes that pack_bits packed, int8 of the given shape."""
    string = np.unpackbits(packed.numpy(), count=bits * math.prod(shape))
    shifted = string.reshape(-1, bits) @ (1 << np.arange(bits))
    return (torch.from_numpy(shifted).reshape(shape) - 2 ** (bits - 1)).to(torch.int8)


codes, scale = quantize_groups(w, 3, 32)
assert torch.equal(unpack_bits(pack_bits(codes, 3), 3, codes.shape), codes)
print(f"{codes.numel():,} codes of 3 bits take {pack_bits(codes, 3).nbytes:,} bytes")

# %% [markdown]
# Now the first rungs: one scale for a tensor, one for a row, one for each 32 and each 8 weights, at 8 to 2 bits. A *method* is what section 1 asked for, the rounded matrix and what is stored for it.


# %%
def nearest(bits: int, group_size: int | None = None):
    """Round to nearest; group_size None: one scale a row."""

    def method(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        codes, scale = quantize_groups(w, bits, group_size or w.shape[1])
        return dequantize_groups(codes, scale), [pack_bits(codes, bits), scale]

    return method


def nearest_tensor(bits: int):
    """Round to nearest, one float32 scale for the whole tensor."""

    def method(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        q, scale = absmax_quantize(w, bits)
        return q * scale, [pack_bits(q, bits), scale]

    return method


# %% [markdown]
# And the same with each group cut where its squared error is least, as in section 2:


# %%
def clipped_groups(w: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """quantize_groups with the scale of least squared error instead of the largest."""
    check_input(w, bits, least=2)
    check_groups(w, group_size)
    groups, largest = (
        rearrange(w, "o (n g) -> o n g", g=group_size),
        2 ** (bits - 1) - 1,
    )
    scale = stored_scale(clipped_quantize(groups, bits, axis=2)[1][..., 0])
    codes = (groups / scale.float()[..., None]).round().clamp(-largest, largest)
    return rearrange(codes, "o n g -> o (n g)").to(torch.int8), scale


def nearest_clipped(bits: int, group_size: int | None = None):
    """Round to nearest on the clipped grid; group_size None: one scale a row."""

    def method(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        codes, scale = clipped_groups(w, bits, group_size or w.shape[1])
        return dequantize_groups(codes, scale), [pack_bits(codes, bits), scale]

    return method


# %%
predict(
    "The model's loss is about 1.3 nats. One scale a row, 4 bits a weight: it rises by",
    ["less than 0.001", "about 0.02", "about 0.3", "more than 1 nat"],
    answer=1,
    why="Four bits a row cost something that can be measured and is hard to see. "
    "Two bits a row cost more than a nat.",
)

# %% tags=["trained"]
rung("8 bits, one scale a tensor", nearest_tensor(8))
rung("8 bits, one a row", nearest(8))
rung("4 bits, one scale a tensor", nearest_tensor(4))
rung("4 bits, one a row", nearest(4))
rung("4 bits, groups of 32", nearest(4, 32))
rung("4 bits, groups of 8", nearest(4, 8))
rung("3 bits, one a row", nearest(3))
rung("3 bits, one a row, clipped", nearest_clipped(3))
rung("3 bits, groups of 32", nearest(3, 32))
rung("2 bits, one a row", nearest(2))
rung("2 bits, groups of 32", nearest(2, 32))
loss = {name: row["difference"] for name, row in table.items()}
plain_rungs = dict(table)
full = budget_fraction() == 1  # a quick run judges too little text for fine differences
assert loss["4 bits, one scale a tensor"] > loss["4 bits, one a row"] > 0.01
assert loss["4 bits, one a row"] > loss["4 bits, groups of 32"] or not full
assert loss["3 bits, one a row"] > 2 * loss["3 bits, one a row, clipped"] or not full
assert loss["2 bits, one a row"] > 5 * loss["3 bits, one a row"]

# %% [markdown]
# Is it the *rounding* that hurts, some structure in it, or just that the weights moved? The control adds normal noise, as large in each group as the error that rounding made there.


# %%
def noise_like(method, seed: int):
    """Normal noise instead of rounding error, of its size in each group of 32."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        w_hat, stored = method(name, w)
        error = rearrange(w_hat - w, "o (n g) -> o n g", g=32)
        size = error.square().mean(-1, keepdim=True).sqrt()
        noise = torch.randn(error.shape, generator=generator) * size
        return w + rearrange(noise, "o n g -> o (n g)"), stored

    return noisy


# %% tags=["trained"]
for seed in (0, 1):
    name = f"noise like 3 bits a row, seed {seed}"
    rung(name, noise_like(nearest(3), seed), control=True)
    ratio = table[name]["difference"] / plain_rungs["3 bits, one a row"]["difference"]
    report(f"noise_ratio_{seed}", ratio, "times the loss of 3 bits a row")
    assert 0.7 < ratio < 1.4 or budget_fraction() < 1, "rounding error acts like noise"

# %% [markdown]
# Noise of the same size does about the same harm. So at this width the model minds how *large* the error is and hardly what it looks like, and a method can help in two ways: make the error smaller, as groups do, or point it where the model does not look. The second is GPTQ's (section 5).

# %% [markdown]
# ## 4 · NF4: levels where the weights are
# *Live, 16 minutes.*
#
# An even grid suits numbers that are spread evenly. Weights are not: most are small, and an even grid spends half of its codes on the few that are not. NF4 (NormalFloat, Dettmers et al. 2023) takes weights to be normal and spaces its levels so that each
# stands for about as many of them. At evenly spaced *probabilities* $p$ these are the quantiles $\Phi^{-1}(p)$ of the normal distribution. With the outermost probability $p_1 = 0.9677083$,
#
# $$\ell = \frac{1}{\Phi^{-1}(p_1)}\,\Big\{-\Phi^{-1}(p)\ \text{at 7 values of } p,\quad 0,\quad \Phi^{-1}(p)\ \text{at 8 values}\Big\},$$
#
# $p$ evenly spaced from $p_1$ towards $\tfrac12$.
#
# Sixteen codes cannot make a zero and two equal halves. The zero has to be there, so the positive half got one level more. And $p_1$ leaves half a slice of probability beyond the last level: it is half-way between what 16 slices and what 15 would ask for.


# %%
def normal_quantiles(n: int, outermost: float = 0.9677083) -> Tensor:
    """n quantiles of the standard normal, (n,) float32, falling from `outermost`'s.

    At n + 1 even probabilities down to 1/2, whose own quantile, 0, is left out.
    """
    probability = torch.linspace(outermost, 0.5, n + 1)[:-1]  # float32, as bitsandbytes
    return torch.special.ndtri(probability.double()).float()


def nf4_levels() -> Tensor:
    """The levels of NF4, (16,) float32, rising from -1 to 1: 7 below zero, 0, 8 above.

    Source: Dettmers et al. 2023 (QLoRA), as in create_normal_map of bitsandbytes.
    """
    zero = torch.zeros(1)
    levels = torch.cat([-normal_quantiles(7), zero, normal_quantiles(8).flip(0)])
    return levels / levels.max()


assert abs(1 - (1 / 32 + 1 / 30) / 2 - 0.9677083) < 1e-7  # half a slice of 16, of 15
even_levels = torch.cat([torch.linspace(-1, 0, 8), torch.linspace(0, 1, 9)[1:]])
levels = nf4_levels()
print("even", " ".join(f"{x:.2f}".replace("0.", ".") for x in even_levels))
print("NF4 ", " ".join(f"{x:.2f}".replace("0.", ".") for x in levels))
assert (levels.diff() > 0).all() and levels[7] == 0 and levels[0] == -levels[15] == -1

# %% [markdown]
# Under these levels, and under 16 even ones, all weights of the model, each divided by the largest magnitude of its *block* of 64 neighbours:

# %% tags=["plot"]
layers = matrices(model).values()
blocks = torch.cat([layer.weight.detach().reshape(-1, 64) for layer in layers])
x = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()
figure, axes = plt.subplots(2, 1, figsize=(7.2, 4.6), sharex=True, sharey=True)
grids = (even_levels, "Even levels", SKY), (levels, "NF4's levels", ORANGE)
for axis, (grid, name, color) in zip(axes, grids, strict=True):
    axis.hist(x, bins=121, range=(-1.01, 1.01), density=True, color="#c9ccd1")
    axis.vlines(grid, 0, 1.3, color=color, lw=1.6)
    used = torch.bucketize(x, (grid[1:] + grid[:-1]) / 2).bincount() / len(x)
    text = f"the rarest code stands for {used.min():.1%} of the weights,\n"
    text += f"the commonest for {used.max():.1%}"
    axis.text(-0.99, 1.45, text, fontsize=8.5, color=INK, va="bottom")
    axis.set(ylabel="density", title=name, ylim=(0, 1.9))
    axis.grid(False)
axes[1].set(xlabel="weight / largest magnitude in its block of 64")
show(
    figure,
    "fig_nf4_levels",
    "Two copies of the histogram of the model's weights, each divided by the largest "
    "magnitude in its block of 64: a bell around zero with a narrow spike at -1 and at "
    "1. Above, 16 even levels drawn over it; below, the 16 levels of NF4, close "
    "together around zero and further apart towards the ends. Even "
    "levels are used less evenly.",
)

# %% [markdown]
# A bell, and a spike at each end: a block's largest magnitude is itself a level, $\pm 1$. So what is rounded is not normal, and even NF4's codes are not equally common. We come back to that.
#
# A matrix is rounded as one long row, cut into blocks, the last of which may be short. A block $B$ stores its largest magnitude and a code for each weight:
#
# $$a_B = \max_{i \in B} |w_i|,\qquad c_i = \operatorname*{arg\,min}_k \left|\frac{w_i}{a_B} - \ell_k\right|,\qquad \hat w_i = a_B\,\ell_{c_i} .$$


# %%
def check_block_size(block_size: int) -> None:
    """Raises ValueError unless block_size is a positive integer."""
    if type(block_size) is not int or block_size < 1:
        raise ValueError(f"block_size must be a positive integer, got {block_size!r}")


def in_blocks(x: Tensor, block_size: int) -> Tensor:
    """x (any shape) as one long row, in blocks: (n, block_size), the last 0-padded."""
    row = x.flatten()
    return F.pad(row, (0, -len(row) % block_size)).reshape(-1, block_size)


def nf4_dequantize(
    codes: Tensor, absmax: Tensor, shape: tuple[int, ...], block_size: int = 64
) -> Tensor:
    """The weights that codes stand for: the level of each times its block's absmax.

    codes: (n,) uint8 in 0 .. 15; absmax: (blocks,) float32; shape: of n numbers.
    Returns float32 of that shape. Raises ValueError where these do not fit together.
    """
    check_block_size(block_size)
    n, n_blocks = codes.numel(), -(-codes.numel() // block_size)
    if n == 0 or math.prod(shape) != n or absmax.shape != (n_blocks,):
        raise ValueError(
            f"{n} codes in blocks of {block_size} need {n_blocks} scales and a shape "
            f"of {n} numbers, got {tuple(absmax.shape)} and {tuple(shape)}"
        )
    if codes.min() < 0 or codes.max() > 15:
        raise ValueError(f"codes go from 0 to 15, got {codes.min()} to {codes.max()}")
    x = nf4_levels()[in_blocks(codes.long(), block_size)] * absmax[:, None]
    return x.flatten()[:n].reshape(shape)


# %% [markdown]
# ### EXERCISE nf4_quantize
# Write $a_B$ and $c_i$. `in_blocks` cuts and pads; zeros as padding change no maximum. A block of zeros must not divide by zero, and its codes are that of the level 0. To find the nearest of sorted levels, `torch.bucketize(x, boundaries)` counts the boundaries below $x$: which
# 15 boundaries part 16 levels?


# %% tags=["exercise:nf4_quantize"]
def nf4_quantize(w: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Round to NF4: the nearest of 16 levels times the largest magnitude of the block.

    w: float, any shape, n numbers; a block is block_size neighbours of the flattened
    tensor, the last may be short. Returns codes, uint8 (n,) in 0 .. 15, and absmax,
    float32 (blocks,). Raises ValueError for NaN, infinite or no numbers.
    """
    check_input(w, 4)
    check_block_size(block_size)
    ### BEGIN SOLUTION
    levels, blocks = nf4_levels(), in_blocks(w.detach().float(), block_size)
    absmax = blocks.abs().amax(1)
    divisor = absmax.clamp(min=1e-38)[:, None]
    x = blocks * (1 / divisor)  # as bitsandbytes rounds; in a short block it divides:
    whole = w.numel() // block_size
    x[whole:] = blocks[whole:] / divisor[whole:]
    codes = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    return codes.flatten()[: w.numel()].to(torch.uint8), absmax
    ### END SOLUTION


# %% tags=["check:nf4_quantize:3"]
g, levels = torch.Generator().manual_seed(4), nf4_levels()
w_check = torch.randn(5, 128, generator=g) * torch.logspace(-2, 1, 5)[:, None]
w_check[0, 3] = -0.08  # the largest magnitude of the first block is negative
kept = w_check.clone()
rows = w_check.reshape(10, 64)
largest = rows.abs().amax(1)
codes, absmax = nf4_quantize(w_check)
assert codes.shape == (640,) and codes.dtype == torch.uint8, (
    "one code a weight, in the order of the flattened tensor, each a byte (uint8)"
)
assert torch.equal(w_check, kept), "the input was changed in place"
assert not torch.allclose(absmax, rows.amax(1)), (
    "a block's scale is its largest magnitude, not its largest value: -3 beats 2"
)
assert not torch.allclose(absmax, w_check.abs().max().expand(10)), (
    "one scale for the whole tensor: each block of 64 has its own"
)
assert torch.allclose(absmax, largest), (
    "absmax should hold the largest magnitude of each 64 neighbours, row after row"
)
assert torch.equal(nf4_quantize(4 * w_check)[0], codes), (
    "weights 4 times as large got other codes: divide by the scale before comparing"
)
picks = torch.randint(16, (10, 64), generator=g)
picks[:, 0] = 15  # a level of magnitude 1 in each block; the scales are powers of two
exact = levels[picks] * 2.0 ** torch.arange(-5, 5)[:, None]
got = nf4_quantize(exact)[0].reshape(10, 64).long()
assert not torch.equal(got, ((levels[picks] + 1) * 7.5).round().long()), (
    "these are the codes of an even grid: NF4's levels are not evenly spaced"
)
assert (got - picks).abs().sum() == 0 or not ((got - picks).abs() <= 1).all(), (
    "numbers that are levels got the code next to theirs: what does bucketize count?"
)
assert torch.equal(got, picks), "levels times a scale should get their own codes"
x = rows / largest[:, None]
distance = (x - levels[codes.reshape(10, 64).long()]).abs()
least = (x[..., None] - levels).abs().amin(-1)  # the slow, obvious way
assert (distance <= least + 1e-6).all(), (
    "a weight between two levels was not rounded to the nearer: the boundaries are the "
    "midpoints"
)
### BEGIN HIDDEN TESTS
w_check = torch.cat([torch.zeros(64), torch.randn(64, generator=g)])
codes, absmax = nf4_quantize(w_check)
assert (codes[:64] == 7).all() and absmax[0].abs() < 1e-6, (
    "a block of zeros should get scale 0 and the code of level 0"
)
for n, block_size in ((1, 64), (100, 64), (65, 32), (129, 128)):
    w_check = 0.02 * torch.randn(n, generator=g)
    codes, absmax = nf4_quantize(w_check, block_size)
    short = w_check[n // block_size * block_size :]
    assert torch.allclose(absmax[-1], short.abs().max()), (
        "a short last block has its own largest magnitude"
    )
    error = (nf4_dequantize(codes, absmax, w_check.shape, block_size) - w_check).abs()
    scale = absmax.repeat_interleave(block_size)[:n]
    assert (error <= 0.153 * scale).all(), "other block sizes give another result"
### END HIDDEN TESTS

# %% [markdown]
# Two codes go into a byte. The library that QLoRA uses, bitsandbytes, puts the *first* into the high nibble, the other way round than our `pack_int4`; we store what it stores.


# %%
def nf4_pack(codes: Tensor) -> Tensor:
    """codes (n,) uint8 in ceil(n / 2) bytes, the first of two in the high nibble.

    An odd last code is followed by 7, which stands for 0. As bitsandbytes stores them.
    """
    first, second = F.pad(codes, (0, codes.numel() % 2), value=7).reshape(-1, 2).T
    return first << 4 | second


def nf4_unpack(packed: Tensor, n: int) -> Tensor:
    """The n codes that nf4_pack packed."""
    return torch.stack([packed >> 4, packed & 15], 1).flatten()[:n]


g = torch.Generator().manual_seed(5)
codes, absmax = nf4_quantize(torch.randn(3, 67, generator=g))
packed = nf4_pack(codes)
print(f"{codes.numel()} codes in {packed.nbytes} bytes, {absmax.numel()} scales")
assert torch.equal(nf4_unpack(packed, codes.numel()), codes)

# %% [markdown]
# ### The scales, rounded too
#
# A float32 scale for 64 weights costs half a bit a weight. QLoRA rounds the scales in turn (*double quantization*): less their mean, in blocks of 256, to 8 bits. All scales are positive, hence the mean. It uses the bitsandbytes library's *dynamic* map (Dettmers et al. 2022), whose 255 non-zero levels reach over seven decades: in
# the decade up to $10^{-j}$, $j = 0 \dots 6$, the middles of $2^{6-j}$ equal pieces, with both signs; and 0 and 1 besides. (In the bits: a run of zeros says how small a number is, and what is left of the byte places it.)


# %%
def dynamic_map() -> Tensor:
    """The 256 levels of bitsandbytes' signed 8-bit dynamic type, rising, float32."""
    decades = []
    for j in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - j) + 1)
        decades.append((edges[1:] + edges[:-1]) / 2 * 10.0**-j)
    positive = torch.cat(decades)
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


def double_quantize(
    absmax: Tensor, block_size: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """Round scales (n,) to 8 bits, around their mean, by blocks.

    Returns codes, uint8 (n,); absmax2, float32 (blocks,), the scales' own scales; and
    offset, float32 (), the mean. Raises ValueError as nf4_quantize does.
    """
    check_input(absmax, 8)
    check_block_size(block_size)
    levels, offset = dynamic_map(), absmax.float().mean()
    blocks = in_blocks(absmax.float() - offset, block_size)
    absmax2 = blocks.abs().amax(1)
    x = blocks * (1 / absmax2.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    return codes.flatten()[: absmax.numel()].to(torch.uint8), absmax2, offset


def double_dequantize(
    codes: Tensor, absmax2: Tensor, offset: Tensor, block_size: int = 256
) -> Tensor:
    """The scales (n,), float32, that double_quantize rounded."""
    x = dynamic_map()[in_blocks(codes.long(), block_size)] * absmax2[:, None]
    return x.flatten()[: codes.numel()] + offset


# %% [markdown]
# And the rungs. The first control keeps blocks, scales and bits, and rounds evenly: it tells whether the *shape* of the levels helps, or only the blocks. The other asks whether NF4's shape is the best there is: it *learns* 16 levels from each matrix,
# by $k$-means (each level moves to the mean of the weights that chose it, as Lloyd and Max had it).


# %%
def nf4(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
    codes, absmax = nf4_quantize(w)
    return nf4_dequantize(codes, absmax, w.shape), [nf4_pack(codes), absmax]


def nf4_double(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
    codes, absmax = nf4_quantize(w)
    stored = double_quantize(absmax)
    absmax = double_dequantize(*stored)
    return nf4_dequantize(codes, absmax, w.shape), [nf4_pack(codes), *stored]


def round_blocks(levels: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (n, g) at the nearest of the levels (k,) times their absmax; codes."""
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
    codes = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return levels[codes] * scale, codes


def learned_levels(blocks: Tensor, steps: int = 20) -> Tensor:
    """16 levels (16,) that make the squared error of blocks (n, g) small: k-means."""
    levels, scale = nf4_levels(), blocks.abs().amax(1, keepdim=True).expand_as(blocks)
    for _ in range(steps):
        codes = round_blocks(levels, blocks)[1].flatten()
        top = codes.bincount((scale * blocks).flatten(), minlength=16)
        weight = codes.bincount(scale.square().flatten(), minlength=16)
        levels = torch.where(weight > 0, top / weight.clamp(min=1e-38), levels).float()
    return levels


def with_levels(fixed: Tensor | None = None):
    """A method: blocks of 64 on fixed levels (16,), or on ones learned from each w."""

    def method(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        blocks = w.reshape(-1, 64)
        levels = learned_levels(blocks) if fixed is None else fixed
        w_hat, codes = round_blocks(levels, blocks)
        stored = [nf4_pack(codes.flatten().to(torch.uint8)), blocks.abs().amax(1)]
        return w_hat.reshape(w.shape), stored + [levels] * (fixed is None)

    return method


# %% tags=["trained"]
rung("NF4, blocks of 64", nf4)
rung("NF4, scales rounded too", nf4_double)
rung("16 even levels, same blocks", with_levels(even_levels), control=True)
rung("16 learned levels, same blocks", with_levels(), control=True)
kl = {name: row["kl"] / table["NF4, blocks of 64"]["kl"] for name, row in table.items()}
report("nf4_even", kl["16 even levels, same blocks"], "times NF4's KL, 16 even levels")
report("nf4_learned", kl["16 learned levels, same blocks"], "times, 16 learned levels")
report("nf4_double", kl["NF4, scales rounded too"], "times, NF4 with rounded scales")
assert kl["16 even levels, same blocks"] > 1.05 or budget_fraction() < 1, (
    "with the same blocks and bits, the shape of the levels helps"
)
assert kl["16 learned levels, same blocks"] < 1 or budget_fraction() < 1, (
    "and a shape learned from the weights is better still"
)
assert 0.9 < kl["NF4, scales rounded too"] < 1.1 or budget_fraction() < 1, (
    "rounding the scales does little"
)

# %% [markdown]
# So the shape helps: with the same blocks and scales, even levels do more harm. (Whether it is the best use of 4.5 bits is another question: NF4 has half the scales of a group of 32 and stores them in twice the bits. Section 9 has a format with even levels that does better.) Rounding the scales saves three quarters of their cost, and the judge hardly notices. But learned levels, whose 16 numbers have to be stored for each matrix, are closer still to the unrounded model, in KL; the loss cannot tell the two apart. NF4 was proposed as "information
# theoretically optimal" for normal weights. Yoshida (2023) pointed out that it is not: what is rounded is not a normal number but one divided by the largest of its block, and how that is spread depends on the size of the block. Besides, codes that are equally common do not make the least error: where weights are rare, levels become so too, and the few weights there are
# moved far. On normal numbers, in blocks of 16 to 1024:

# %%
g, sizes = torch.Generator().manual_seed(6), (16, 32, 64, 128, 256, 1024)
excess: dict[str, list[float]] = {"even": [], "NF4": []}
for size in sizes:
    blocks = torch.randn(2**18 // size, size, generator=g)
    grids = even_levels, nf4_levels(), learned_levels(blocks)
    even, nf, best = (
        (round_blocks(grid, blocks)[0] - blocks).square().mean().item()
        for grid in grids
    )
    excess["even"].append(even / best)
    excess["NF4"].append(nf / best)
assert min(excess["NF4"]) > 1.05, "at no block size has NF4 the least squared error"
assert excess["even"][0] < excess["NF4"][0], "in blocks of 16 even levels beat it"
assert excess["even"][2] > 1.1 * excess["NF4"][2], "in blocks of 64 it beats them"

# %% tags=["plot"]
figure, axis = plt.subplots()
for (name, ratios), color in zip(excess.items(), (SKY, ORANGE), strict=True):
    axis.plot(sizes, ratios, "o-", color=color, ms=5)
    label(axis, sizes[-1], ratios[-1], f"{name} levels", color)
reference_line(axis, 1, "16 levels learned at each size")
axis.axvline(64, color=MUTED, lw=1, ls=(0, (1, 3)))
axis.set(xscale="log", xticks=sizes, xticklabels=sizes, xlim=(14, 2600))
axis.minorticks_off()
axis.set(
    xlabel="normal numbers in a block",
    ylabel="squared error / that of learned levels",
    ylim=(0.95, None),
    title="NF4 is never the best, and near it from 64 to 256",
)
show(
    figure,
    "fig_nf4_blocks",
    "Mean squared error relative to 16 learned levels, against block size from 16 to "
    "1024. NF4 starts a fifth above, falls to under a tenth above at 128 and 256, and "
    "rises again. Even levels start just below NF4 at 16 and rise to almost twice the "
    "error of learned ones at 1024.",
)

# %% [markdown]
# ## 5 · GPTQ: rounding that looks at the data
# *Live, 20 minutes.*
#
# Rounding to nearest makes the error of each *weight* as small as it can be. But nobody asks for the weights; what counts is what the layer says to the inputs that it meets. For one row $w$ of $W$ and inputs $x_1, x_2, \dots$ of a calibration text, the squared error of the output is a quadratic form, a sum over pairs of errors,
#
# $$\frac1n \sum_t \big((\hat w - w)\, x_t\big)^2 = (\hat w - w)\, H\, (\hat w - w)^\top,\qquad H = \frac1n \sum_t x_t x_t^\top = \frac1n X^\top X .$$
#
# Inputs are correlated, each a little with many others, and so errors can cancel: what rounding weight 5 up adds to the output, rounding weight 9 down can take away. GPTQ (Frantar et al. 2022) goes through the columns from left to right. It rounds column $j$ and then moves
# all columns *not yet rounded* so that they make up for its error as well as they can. From the formula of the optimal brain surgeon (derived in the chapter), where $H^{-1}$ is the inverse of $H$ restricted to the columns not yet rounded,
#
# $$\delta = \frac{w_j - \hat w_j}{[H^{-1}]_{jj}},\qquad w_k \leftarrow w_k - \delta\,[H^{-1}]_{jk}\quad\text{for } k > j .$$
#
# The same $H$ serves all rows of a matrix. We collect it first, from what each matrix reads while the model runs over 16 thousand characters of *training* text.


# %%
@torch.no_grad()
def layer_inputs(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """What each matrix of the blocks reads on windows (n, t + 1): name -> (n t, i)."""
    inputs, hooks = {}, []
    for name, layer in matrices(model).items():

        def keep(layer, args, name=name):
            inputs[name] = args[0].flatten(0, 1)

        hooks.append(layer.register_forward_pre_hook(keep))
    model(windows[:, :-1])
    for hook in hooks:
        hook.remove()
    return inputs


inputs = layer_inputs(model, calibration)
hessians = {
    name: einsum(x, x, "n i, n k -> i k") / len(x) for name, x in inputs.items()
}
h = hessians["1.mlp.gate_proj"]
correlation = h / (h.diagonal().outer(h.diagonal())).sqrt()
off = correlation[~torch.eye(len(h), dtype=torch.bool)]
print(f"{inputs['1.mlp.gate_proj'].shape[0]:,} inputs of {len(h)} channels")
print(
    f"correlation of two channels, root mean square: {off.square().mean().sqrt():.2f}"
)
del inputs  # 200 MB

# %% [markdown]
# What the formula needs of $H^{-1}$ is one row for each $j$: the first row of the inverse of $H$ without the columns already rounded. One Cholesky factorisation, a triangular square root, holds all of these rows: if $H^{-1} = U^\top U$ with $U$ upper triangular, row $j$ of $U$ is that row
# divided by the root of its first entry. So with $U$ the step becomes what you will write, its $\delta$ scaled by that root:
#
# $$\delta = \frac{w_j - \hat w_j}{U_{jj}},\qquad w_k \leftarrow w_k - \delta\,U_{jk} .$$
#
# A channel that is always zero, or two that are always equal, would make $H$ singular, so a share of the mean of its diagonal is added to it (*damping*).


# %%
def inverse_factor(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """U, upper triangular float64 (i, i), with U^T U the inverse of the damped hessian.

    hessian: (i, i), symmetric; damp: the share of the mean diagonal that is added.
    Raises ValueError where the damped hessian is not positive definite.
    """
    h = hessian.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    factor, failed = torch.linalg.cholesky_ex(h)
    if failed or not factor.isfinite().all():
        raise ValueError(
            f"the hessian is not positive definite at damp={damp}: give more damping, "
            "or more calibration text"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)


def grid_scales(w: Tensor, bits: int, group_size: int | None, clip: bool) -> Tensor:
    """The float16 scales (o, n) of section 3's grids, with or without clipping."""
    round_groups = clipped_groups if clip else quantize_groups
    return round_groups(w, bits, group_size or w.shape[1])[1]


def step_sizes(scale: Tensor, n_inputs: int) -> Tensor:
    """Scales (o, n) spread over the weights that they belong to: (o, i) float32."""
    return repeat(scale.float(), "o n -> o (n g)", g=n_inputs // scale.shape[1])


def check_hessian(w: Tensor, hessian: Tensor) -> None:
    """Refuse a hessian that is not of these inputs. Raises ValueError."""
    check_groups(w, 1)
    if hessian.shape != (w.shape[1], w.shape[1]):
        raise ValueError(
            f"a matrix with {w.shape[1]} inputs needs a hessian of that size on both "
            f"sides, got {tuple(hessian.shape)}: collect the inputs of this very layer"
        )
    if not hessian.isfinite().all():
        raise ValueError("the hessian has NaN or infinite entries: look at the inputs")
    if not torch.allclose(
        hessian, hessian.T, rtol=1e-3, atol=1e-3 * hessian.abs().max()
    ):
        raise ValueError("the hessian is not symmetric: it should be the mean of x x^T")


# %% [markdown]
# The grid stays what it was in section 3, scales and all, clipped or not. GPTQ only chooses other codes, so its file has the same size, and the comparison with rounding to nearest is a fair one.
#
# ### EXERCISE gptq
# Round column after column, with the two formulas in $U$. `step` holds each weight's step; the levels go up to `largest` steps on both sides. The weights are the caller's: work on a copy.


# %% tags=["exercise:gptq"]
def gptq(
    w: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int | None = None,
    damp: float = 0.01,
    clip: bool = True,
) -> Tensor:
    """Round w so that the error of its outputs is small (Frantar et al. 2022).

    w: (o, i) float32; hessian: (i, i), the mean of x x^T over inputs; bits: 2 to 8;
    group_size: a divisor of i, None for one scale a row; clip: the grid is that of
    clipped_groups, else of quantize_groups. Returns w_hat (o, i) float32 on that grid.
    Raises ValueError for a hessian of another size or one that damping does not make
    positive definite.
    """
    check_hessian(w, hessian)
    step = step_sizes(grid_scales(w, bits, group_size, clip), w.shape[1]).double()
    largest = 2 ** (bits - 1) - 1
    u = inverse_factor(hessian, damp)
    w_hat = torch.zeros_like(step)
    ### BEGIN SOLUTION
    w = w.double().clone()
    for j in range(w.shape[1]):
        code = (w[:, j] / step[:, j]).round().clamp(-largest, largest)
        w_hat[:, j] = code * step[:, j]
        delta = (w[:, j] - w_hat[:, j]) / u[j, j]
        w[:, j + 1 :] -= torch.outer(delta, u[j, j + 1 :])
    ### END SOLUTION
    return w_hat.float()


# %% [markdown]
# The check holds it against the slow obvious way: invert what remains of $H$ anew for every column, which takes on the order of $i^4$ operations.


# %% tags=["hide-input"]
def gptq_slow(w, hessian, bits, group_size=None, damp=0.01, clip=True) -> Tensor:
    """gptq by its definition: the inverse of the remaining hessian, column by column."""
    step = step_sizes(grid_scales(w, bits, group_size, clip), w.shape[1]).double()
    largest = 2 ** (bits - 1) - 1
    h, w = hessian.double(), w.double().clone()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        rounded = (w[:, j] / step[:, j]).round().clamp(-largest, largest) * step[:, j]
        w[:, j:] -= torch.outer((w[:, j] - rounded) / inverse[0, 0], inverse[0])
        w[:, j] = rounded
    return w.float()


def output_error(w: Tensor, w_hat: Tensor, hessian: Tensor) -> float:
    """Mean squared error of an output: trace of (w_hat - w) H (w_hat - w)^T, over o."""
    error = (w_hat - w).double()
    return (error @ hessian.double() * error).sum().item() / len(w)


# %% tags=["check:gptq:4"]
g = torch.Generator().manual_seed(4)
w_small = torch.randn(8, 16, generator=g)
x = torch.randn(200, 16, generator=g) @ torch.randn(16, 16, generator=g)
h_small = x.T @ x / len(x)
to_nearest = dequantize_groups(*clipped_groups(w_small, 4, 16))
plain = gptq(w_small.clone(), torch.eye(16), 4)
data_aware = gptq(w_small.clone(), h_small, 4)
codes = data_aware / step_sizes(grid_scales(w_small, 4, None, clip=True), 16)
assert torch.allclose(codes, codes.round(), atol=1e-3), (
    "some weights are off the grid: what is returned should be levels times steps"
)
assert codes.abs().max() < 7.01, "a code is past the last level: clamp before scaling"
assert torch.allclose(plain, to_nearest, atol=1e-6), (
    "uncorrelated inputs (H = 1) leave nothing to make up for: the result should be "
    "rounding to nearest"
)
assert not torch.allclose(data_aware, to_nearest, atol=1e-6), (
    "correlated inputs change nothing: the error of a column is not passed on (or by a "
    "column of U, which is zero below the diagonal, instead of its row)"
)
near, aware = (output_error(w_small, y, h_small) for y in (to_nearest, data_aware))
assert aware < near, (
    "the outputs are further off than by rounding to nearest: look at the sign with "
    "which the error is passed on, and at what it is divided by"
)
slow = gptq_slow(w_small, h_small, 4)
assert torch.allclose(data_aware, slow, atol=1e-4), (
    "it helps, but the slow way by definition helps otherwise: compare which columns are "
    "changed, and by how much"
)
### BEGIN HIDDEN TESTS
kept = w_small.clone()
grouped = gptq(w_small, h_small, 3, group_size=4, damp=0.1)
assert torch.equal(w_small, kept), "the weights were changed in place"
assert torch.allclose(grouped, gptq_slow(w_small, h_small, 3, 4, 0.1), atol=1e-4), (
    "groups, other widths or other damping are not as by definition"
)
### END HIDDEN TESTS

# %% [markdown]
# Now the model. Each matrix is rounded with its own $H$; the codes are packed as before.
#
# In section 3, 3 bits a row cost many times what 4 bits in groups of 32 cost, and clipping took away about half. Now the same clipped grid, the same bytes, other codes. (The rows of GPTQ are on clipped grids where they do not say otherwise.)

# %%
predict(
    "3 bits, one scale a row, the same clipped grid for both: of the loss that rounding "
    "to nearest added, GPTQ leaves",
    ["more than all of it", "nine tenths", "about half", "nothing"],
    answer=2,
    why="Much of an error's harm can be taken back by the columns that follow, because "
    "the inputs are correlated. What cannot be is what remains.",
)

# %% [markdown]
# Its control is GPTQ with the Hessian of *other* inputs: the same one, its channels shuffled.


# %%
def shuffled(h: Tensor) -> Tensor:
    """A hessian with its channels in another order, the same each time: a control."""
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(0))
    return h[order][:, order]


def by_gptq(bits: int, group_size: int | None = None, clip=True, change=lambda h: h):
    """GPTQ with the hessians collected above; the same bytes as round to nearest."""

    def method(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        w_hat = gptq(w, change(hessians[name]), bits, group_size, clip=clip)
        scale = grid_scales(w, bits, group_size, clip)
        codes = (w_hat / step_sizes(scale, w.shape[1])).round()
        return w_hat, [pack_bits(codes, bits), scale]

    return method


# %% tags=["trained"]
rung("GPTQ, 3 bits, one a row, not clipped", by_gptq(3, clip=False))
rung("GPTQ, 3 bits, one a row", by_gptq(3))
rung("GPTQ, 3 bits, hessian shuffled", by_gptq(3, change=shuffled), control=True)
rung("GPTQ, 4 bits, one a row", by_gptq(4))
rung("4 bits, groups of 32, clipped", nearest_clipped(4, 32))
rung("GPTQ, 4 bits, groups of 32", by_gptq(4, 32))
rung("GPTQ, 2 bits, groups of 32", by_gptq(2, 32))
gptq_rungs = {name: row for name, row in table.items() if name.startswith("GPTQ")}
loss = {name: row["difference"] for name, row in table.items()}
nearest_3 = plain_rungs["3 bits, one a row"]["difference"]
three = loss["GPTQ, 3 bits, one a row"]
left = three / plain_rungs["3 bits, one a row, clipped"]["difference"]
unclipped = loss["GPTQ, 3 bits, one a row, not clipped"] / nearest_3
report("gptq_left", three / nearest_3, "of what 3 bits a row cost, to nearest")
report("gptq_left_same_grid", left, "of what they cost on the same clipped grid")
report("gptq_left_not_clipped", unclipped, "when neither is clipped")
report("gptq_permuted", loss["GPTQ, 3 bits, hessian shuffled"], "nats, the control")
report("nearest_clipped_3", loss["3 bits, one a row, clipped"], "nats, to nearest")
report("gptq_4_row", loss["GPTQ, 4 bits, one a row"], "nats, GPTQ at 4 bits a row")
assert (three < 0.5 * nearest_3 and left < 0.7) or budget_fraction() < 1
assert loss["GPTQ, 3 bits, hessian shuffled"] > 3 * three or budget_fraction() < 1
assert loss["GPTQ, 4 bits, groups of 32"] < 0.003 or budget_fraction() < 1

# %% [markdown]
# Two things share the credit, and each about halves the loss: the clipped grid, and the choice of codes on it. Together they leave less than a quarter. (Leaving *at most half on the same grid* is just missed; another order of the columns reaches it, section 7.) With the wrong Hessian GPTQ does far more harm than rounding to nearest: what helps is not that weights are moved, but
# that they are moved by what these inputs have in common.

# %% [markdown]
# ## 6 · What the rungs say so far
# *Live, 8 minutes.*
#
# All rungs, most bits first. *File* counts everything that a file would hold, the unrounded embedding and norms too. A control is marked with a dot.


# %% tags=["hide-input"]
def show_table(name: str, table: dict[str, dict]) -> None:
    """The rungs as a table, most bits a weight first."""
    headings = ["rung", "bits", "file", "loss, nats", "KL", "same token"]
    rows = [
        [
            ("· " if row["control"] else "") + rung,
            f"{row['bits']:.2f}",
            f"{row['file_bits']:.2f}",
            f"{signed(row['difference'])} ± {row['error']:.4f}".replace(" ", "\xa0"),
            f"{row['kl']:.4f} ± {row['kl_error']:.4f}".replace(" ", "\xa0"),
            f"{row['agreement']:.1%}",
        ]
        for rung, row in sorted(table.items(), key=lambda x: -x[1]["bits"])
    ]
    report_table(name, headings, rows)


# %% tags=["trained"]
show_table("ladder_core", table)
rungs = (table | gptq_rungs).values()  # with those of section 5, or not at all
found = [row for row in rungs if row["bits"] <= 4.6 and not row["control"]]
best = min(found, key=lambda row: row["difference"])
report("best_4bit", best["difference"], "nats, the best rung with at most 4.6 bits")
report("best_4bit_error", best["error"], "nats, its standard error")
report("best_4bit_file", best["file_bits"], "bits a parameter over its whole file")
report("best_4bit_kl", best["kl"], "nats of KL divergence")
report("best_4bit_changed", 100 * (1 - best["agreement"]), "% of choices changed")
assert best["difference"] < 0.003 or budget_fraction() < 1
assert best["kl"] > 10 * best["kl_error"] and best["agreement"] < 0.98

# %% [markdown]
# Look at the best rung with at most 4.6 bits. Its loss is that of the unrounded model, within the error. *It is not the same model*: the last two lines say how far its probabilities moved, and how often it would choose another character. In the mean these
# moves help the loss as much as they hurt it. Whoever reports only the loss (or perplexity, or an accuracy) does not see them; a user who compares two answers does.


# %% tags=["plot"]
def draw_ladder(name: str, table: dict[str, dict], families: dict, alt: str) -> None:
    """Two distances against bits; a family is (part of a rung's name, colour)."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.6), sharey=True)
    for axis, key in zip(axes, ("difference", "kl"), strict=True):
        for rung, row in table.items():
            found = [color for part, color in families.items() if part in rung]
            color = found[0] if found else MUTED
            shape = (
                {"mfc": "none", "marker": "s"} if row["control"] else {"marker": "o"}
            )
            low = max(row[key], 2e-4)
            error = row["error"] if key == "difference" else 0
            axis.plot(row["bits"], low, color=color, ls="", ms=5, **shape)
            top, bottom = row[key] + error, max(row[key] - error, 2e-4)
            axis.plot([row["bits"]] * 2, [bottom, max(top, 2e-4)], color=color, lw=1)
        axis.set(yscale="log", xlabel="bits a weight, as stored", xlim=(1.2, 8.6))
    axes[0].text(1.4, 1.7e-4, "at the foot: 0.0002 or less", fontsize=8, color=INK)
    axes[0].set(title="Loss above the unrounded model", ylabel="nats", ylim=(1.5e-4, 6))
    axes[1].set(title="KL(unrounded || rounded)")
    for y, (part, color) in enumerate(families.items()):
        place = (0.98, 0.95 - 0.07 * y)
        axes[1].annotate(
            part, place, xycoords="axes fraction", ha="right", va="top", fontsize=9,
            color=legible(color),
        )  # fmt: skip
    axes[1].annotate(
        "open squares: controls", (0.98, 0.95 - 0.07 * len(families)), fontsize=8.5,
        xycoords="axes fraction", ha="right", va="top", color=legible(MUTED),
    )  # fmt: skip
    show(figure, name, alt)


draw_ladder(
    "fig_ladder_core",
    table,
    {"GPTQ": VERMILION, "NF4": PURPLE},
    "Two panels against bits a weight, logarithmic: loss above the unrounded model, and "
    "KL divergence. Both fall steeply from more than a nat at 2 bits to below a "
    "thousandth at 8. GPTQ lies below rounding to nearest at the same bits; near 4.5 "
    "bits its loss difference is near the foot of the picture, its KL about a hundredth.",
)

# %% [markdown]
# **What claim 7 asks for.** GPT-3 has 175 billion weights. One high-end GPU of 2022 held 80 GB; five of them hold the model at 16 bits:

# %%
for bits in (16, 8, 4.5, 4, 3.1, 3):
    size = 175e9 * bits / 8 / 1e9
    print(f"{bits:4} bits: {size:6.1f} GB, {math.ceil(size / 80)} card(s) of 80 GB")
assert 175e9 * 4 / 8 > 80e9 > 175e9 * 3.5 / 8

# %% [markdown]
# Four bits do not suffice: 87.5 GB are more than a card holds. The claim stands or falls with *three* bits a row, where the rows are so long that their scales cost next to nothing. That rung is in the table above. At this size it is not free.

# %% [markdown]
# ### To play with
#
# Four rows of one of our matrices, under the grid of a format. One weight is marked, and a slider moves it away from the others.

# %%
predict(
    "The marked weight goes to 12 standard deviations, and all 1,536 weights share one "
    "4-bit grid. How many of its 15 levels do they still use?",
    ["14", "7", "2"],
    answer=1,
    why="The grid is stretched to reach the outlier, so the others, within three and a "
    "half standard deviations, fall on the few levels in the middle.",
)

# %% [markdown]
# Press *One outlier*. The grid of everything that shares the outlier's scale is stretched, so that most weights become zero. Then make the groups smaller: the damage stays in one group, and every group asks for a scale of its own. (A page without a kernel shows a still here; the chapter has the figure live.)
# More to try: find the largest groups in which 4 bits make a smaller error with the outlier than one grid for all weights made without it; see which format minds the outlier least, and why; buy back with bits what the outlier took, and compare the price.

# %% tags=["widget"]
interactive("rounding_grid")

# %% [markdown]
# The weights' error is not the model's. Below, a choice of method, bits and group size rounds the whole model; the judge of section 1 says what that loses, and the model writes, with the same seed as before rounding.


# %% tags=["hide-input"]
def nf4_blocks(block_size: int | None = None):
    """NF4 in blocks of any size; None: a block is a row."""

    def method(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        size = block_size or w.shape[1]
        codes, absmax = nf4_quantize(w, size)
        return nf4_dequantize(codes, absmax, w.shape, size), [nf4_pack(codes), absmax]

    return method


def writes(model: TinyLlama, n: int = 160) -> str:
    """What the model says after Hamlet's name: n characters, the same seed each time."""
    prompt = data.encode("**HAMLET**  \n")
    text = data.decode(model.generate(prompt, n, temperature=0.7, seed=0))
    return text[len(prompt) :]


def explore(model, judge, name: str, bits: int, group_size: int | None) -> dict:
    """Round the whole model, judge it, let it write.

    name: "round to nearest", "GPTQ" or "NF4" (4 bits); group_size None: a row.
    Returns the judge's numbers, the true bits a weight, and the text.
    """
    methods = {"round to nearest": nearest, "GPTQ": by_gptq}
    if name not in (*methods, "NF4") or (name == "NF4" and bits != 4):
        raise ValueError(
            f"no method {name!r} of {bits} bits: {', '.join(methods)}, NF4"
        )
    if name == "NF4":
        method = nf4_blocks(group_size)
    else:
        method = methods[name](bits, group_size)
    rounded, stored = quantized(model, method)
    bits_stored = true_bits(model, stored)[0]
    return {"bits": bits_stored, **judge(rounded), "text": writes(rounded)}


def tries_figure(table: dict[str, dict], tries: dict[str, dict]):
    """The tries, the last one labelled, among the rungs of the lab: (figure, alt)."""
    figure, axis = plt.subplots()
    rungs = [r for r in table.values() if not r["control"] and r["kl"] > 0]
    axis.plot([r["bits"] for r in rungs], [r["kl"] for r in rungs], "o", color=MUTED)
    name, last = list(tries.items())[-1]
    earlier = [r for r in tries.values() if r is not last]
    places = [r["bits"] for r in earlier], [r["kl"] for r in earlier]
    axis.plot(*places, "o", mfc="none", mec=VERMILION, ms=7)
    axis.plot(last["bits"], last["kl"], "o", color=VERMILION, ms=8)
    left = last["bits"] > 6
    away = {"xytext": (-9, -9) if left else (9, 9), "ha": "right" if left else "left"}
    label(axis, last["bits"], last["kl"], name, VERMILION, **away)
    axis.set(
        xlabel="true bits a weight",
        ylabel="KL to the unrounded model (nats)",
        yscale="log",
        xlim=(1.8, 10.2),
        title="Your tries (orange) among the rungs of this lab (grey)",
    )
    alt = (
        f"KL divergence from the unrounded model, logarithmic, against true bits a "
        f"weight, for {len(rungs)} rungs of the lab and {len(tries)} of your tries. "
        f"The last try, {name}: {last['bits']:.2f} bits, KL {last['kl']:.2g} nats, loss "
        f"{last['difference']:+.3f} nats, the same likeliest character at "
        f"{last['agreement']:.1%} of the positions."
    )
    return figure, alt.replace("%", " %")


def in_words(tried: dict, unrounded: str) -> str:
    """What a try lost, and what it wrote."""
    pairs = enumerate(zip(tried["text"], unrounded, strict=True))
    same = next((i for i, (a, b) in pairs if a != b), len(unrounded))
    return (
        f"{tried['bits']:.2f} true bits a weight. Loss {tried['difference']:+.4f} +- "
        f"{tried['error']:.4f} nats, KL {tried['kl']:.4f},\nthe likeliest character the "
        f"same at {tried['agreement']:.1%} of positions.\nIt writes, the first {same} "
        f"characters as without rounding:\n\n{tried['text']}"
    )


# %% tags=["widget", "hide-input"]
def explorer(attempt):
    """Controls that call attempt(method, bits, group_size) -> (figure, alt, words).

    Returns the box of ipywidgets, or None without ipywidgets.
    """
    try:
        import ipywidgets
    except ImportError:
        print("A still: with ipywidgets (pip install ipywidgets) it can be operated.")
        return None
    import html

    from tinylm.plot import bundle

    sizes = [("a row", None), *((str(g), g) for g in (128, 64, 32, 16, 8))]
    names = ["round to nearest", "GPTQ", "NF4"]
    method = ipywidgets.Dropdown(options=names, description="Method")
    bits = ipywidgets.IntSlider(4, 2, 8, description="Bits")
    group = ipywidgets.Dropdown(options=sizes, description="Group")
    button = ipywidgets.Button(description="Round the model")
    shown = ipywidgets.HTML()

    def chosen(change) -> None:
        bits.disabled = method.value == "NF4"  # its codes have 4 bits
        bits.value = 4 if bits.disabled else bits.value

    def pressed(_) -> None:
        button.disabled, button.description = True, "Rounding ..."
        try:
            figure, alt, words = attempt(method.value, bits.value, group.value)
            image = bundle(figure, "fig_explorer", alt)[0]["image/png"]
            shown.value = (
                f'<img style="width: 100%; max-width: 720px" alt="{html.escape(alt)}" '
                f'src="data:image/png;base64,{image}"><pre style="white-space: pre-wrap">'
                f"{html.escape(words)}</pre>"
            )
        except Exception as error:  # a button would hide it in a log
            shown.value = f"<p>{type(error).__name__}: {html.escape(str(error))}</p>"
        finally:
            button.disabled, button.description = False, "Round the model"

    method.observe(chosen, "value")
    button.on_click(pressed)
    return ipywidgets.VBox([method, bits, group, button, shown])


tries, as_before = {}, writes(model)


def attempt(name: str, bits: int, group_size: int | None):
    """One try: kept in `tries`, drawn, put in words."""
    tried = explore(model, judge, name, bits, group_size)
    group = f"groups of {group_size}" if group_size else "a row"
    tries.pop(key := f"{name}, {bits} bits, {group}", None)  # the last stands last
    tries[key] = tried
    return *tries_figure(table, tries), in_words(tried, as_before)


figure, alt, words = attempt("round to nearest", 3, None)
show(figure, "fig_explorer", alt)
print(words)
explorer(attempt)

# %% [markdown]
# ## 7 · Going further: GPTQ in blocks, and in another order
# *Live, 10 minutes.*
#
# The exercise's loop touches every remaining column at every step: $i$ times through the whole matrix, one multiplication and addition for each number moved. On a large matrix that is bound by memory, as lab 00 measured. But column $j$ needs only what columns before it have done to *it*. So update
# within a block of columns at once, and the rest after the block, in one matrix product ("lazy batches"): the same arithmetic, with far fewer trips.
#
# The order of columns is free as well. Early columns have many others to make up for them, the last one has none. Rounding the columns with the largest inputs first (*act-order*: by falling diagonal of $H$) spends the help where it counts.


# %%
def gptq_lazy(
    w: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int | None = None,
    damp: float = 0.01,
    clip: bool = True,
    order: Tensor | None = None,
    block: int = 32,
) -> Tensor:
    """gptq in blocks of columns, in any order: `order` is a permutation of 0 .. i - 1.

    The groups stay groups of neighbours, whatever the order. Raises ValueError as gptq
    does, and for an order that is no permutation.
    """
    check_hessian(w, hessian)
    n = w.shape[1]
    order = torch.arange(n) if order is None else order
    if not torch.equal(order.sort().values, torch.arange(n)):
        raise ValueError(f"order must hold each of 0 .. {n - 1} once")
    step = step_sizes(grid_scales(w, bits, group_size, clip), n).double()[:, order]
    u = inverse_factor(hessian[order][:, order], damp)
    w, largest = w.double()[:, order], 2 ** (bits - 1) - 1
    w_hat, delta = torch.zeros_like(w), torch.zeros_like(w)
    for start in range(0, n, block):
        stop = min(start + block, n)
        for j in range(start, stop):
            code = (w[:, j] / step[:, j]).round().clamp(-largest, largest)
            w_hat[:, j] = code * step[:, j]
            delta[:, j] = (w[:, j] - w_hat[:, j]) / u[j, j]
            w[:, j + 1 : stop] -= torch.outer(delta[:, j], u[j, j + 1 : stop])
        w[:, stop:] -= delta[:, start:stop] @ u[start:stop, stop:]
    return torch.zeros_like(w_hat).index_copy(1, order, w_hat).float()


for block in (1, 5, 16, 64):
    lazy = gptq_lazy(w_small, h_small, 4, block=block)
    assert torch.allclose(lazy, gptq(w_small, h_small, 4), atol=1e-5), block
print("in blocks of 1, 5, 16 and 64 columns: the same result")

# %% tags=["timing"]
size = 768 if budget_fraction() == 1 else 128
g = torch.Generator().manual_seed(6)
w_large = torch.randn(size, size, generator=g)
x = torch.randn(2 * size, size, generator=g)
h_large, seconds = x.T @ x / len(x), {}
for name, function in (("column by column", gptq), ("in blocks", gptq_lazy)):
    started = time.perf_counter()
    function(w_large, h_large, 4, clip=False)
    seconds[name] = time.perf_counter() - started
ratio = seconds["column by column"] / seconds["in blocks"]
report("lazy_speedup", ratio, f"times as fast in blocks of 32, {size} x {size}")
assert ratio > 0.8 or budget_fraction() < 1, "blocks should not be slower"

# %% [markdown]
# Which order? By falling diagonal of $H$, and as controls by rising diagonal and at random. (The scales are fixed beforehand, so that any order may be combined with groups.)


# %%
def by_gptq_in_order(bits: int, order_of, group_size: int | None = None):
    """GPTQ on the clipped grid, columns in the order that `order_of(hessian)` gives."""

    def method(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        h = hessians[name]
        w_hat = gptq_lazy(w, h, bits, group_size, order=order_of(h))
        scale = grid_scales(w, bits, group_size, clip=True)
        codes = (w_hat / step_sizes(scale, w.shape[1])).round()
        return w_hat, [pack_bits(codes, bits), scale]

    return method


def falling(h: Tensor) -> Tensor:
    return h.diagonal().argsort(descending=True)


def rising(h: Tensor) -> Tensor:
    return h.diagonal().argsort()


def at_random(h: Tensor) -> Tensor:
    return torch.randperm(len(h), generator=torch.Generator().manual_seed(len(h)))


orders = {"falling": falling, "rising": rising, "random": at_random}
errors = {}
for name, order_of in orders.items():
    h = hessians["1.mlp.gate_proj"]
    matrix = matrices(model)["1.mlp.gate_proj"].weight.detach()
    w_hat = gptq_lazy(matrix, h, 3, order=order_of(h))
    errors[name] = output_error(matrix, w_hat, h)
smallest = min(errors, key=errors.get)
print("of one matrix, the output error is smallest by", smallest, "diagonal")
assert errors["falling"] < errors["random"] < errors["rising"]

# %% tags=["trained"]
natural = gptq_rungs["GPTQ, 3 bits, one a row"]["kl"]  # of section 5
rung("GPTQ, 3 bits, act-order", by_gptq_in_order(3, falling))
rung("GPTQ, 3 bits, rising order", by_gptq_in_order(3, rising), control=True)
rung("GPTQ, 3 bits, random order", by_gptq_in_order(3, at_random), control=True)
kl = {name: row["kl"] for name, row in table.items()}
first = kl["GPTQ, 3 bits, act-order"]
report("act_order_kl", first / natural, "of the KL in the order as it comes")
report("act_order_kl_random", first / kl["GPTQ, 3 bits, random order"], "of random's")
left = (
    table["GPTQ, 3 bits, act-order"]["difference"] / loss["3 bits, one a row, clipped"]
)
report("act_order_left", left, "of the loss to nearest, on the same clipped grid")
for key in ("difference", "kl"):
    more, error = paired("GPTQ, 3 bits, act-order", "GPTQ, 3 bits, one a row", key)
    print(f"act-order against the order as it comes, {key}: {more:+.4f} ± {error:.4f}")
assert more < -3 * error or budget_fraction() < 1, "KL, paired, tells them apart"
assert (left < 0.55 and first < kl["GPTQ, 3 bits, rising order"]) or (
    budget_fraction() < 1
)

# %% [markdown]
# In KL, act-order is ahead of the order as it comes by more than chance, and of the others by far; in loss the lead over the order as it comes is hardly more than its error. It costs nothing to store, since the codes go back to their places.

# %% [markdown]
# ## 8 · Going further: number formats
# *Live, 14 minutes.*
#
# Integers with a scale are levels at even distances, and NF4 puts them where weights are frequent. A *floating-point* format spaces its levels by magnitude. Its bits are a sign $s$, an exponent $e$ of $E$ bits and a mantissa $m$ of $M$ bits, and they stand for
#
# $$(-1)^s \cdot \begin{cases} (2^M + m) \cdot 2^{\,e - B - M} & e > 0 \quad\text{(normal)} \\ m \cdot 2^{\,1 - B - M} & e = 0 \quad\text{(subnormal)}\end{cases}\qquad B = 2^{E-1} - 1 .$$
#
# Between two powers of two there are $2^M$ levels, evenly spaced; at the next power of two the spacing doubles. Below the smallest normal number it stops shrinking, and the subnormals walk down to zero in equal steps. So $E$ buys range and $M$ precision, and formats differ in little more than these two numbers.
# What else they differ in is the top: the largest exponent can be kept for infinity and NaN (IEEE 754's way), or used for numbers, with only the pattern of all ones left for NaN (`e4m3fn`: *finite*, with *NaN*), or used for numbers altogether (`e2m1`, the four-bit one). The 8-bit formats are those of Micikevicius et al. (2022).


# %%
def float_format(name: str) -> tuple[int, int, str]:
    """Bits of exponent and of mantissa, and what stands above the largest number."""
    formats = {
        "float32": (8, 23, "infinity"),
        "bfloat16": (8, 7, "infinity"),
        "float16": (5, 10, "infinity"),
        "e5m2": (5, 2, "infinity"),
        "e4m3fn": (4, 3, "nan"),
        "e2m1": (2, 1, "nothing"),
    }
    if name not in formats:
        raise ValueError(f"unknown format {name!r}: choose from {', '.join(formats)}")
    return formats[name]


def largest_code(name: str) -> int:
    """The bits of a format's largest finite number."""
    e_bits, m_bits, above = float_format(name)
    infinity = 2**e_bits - 1 << m_bits
    ones = 2 ** (e_bits + m_bits) - 1
    return {"infinity": infinity - 1, "nan": ones - 1, "nothing": ones}[above]


# %% [markdown]
# Decoding is the formula. The power of two we write down bit by bit, too, in float64, whose exponent has a bias of 1023 and stands above 52 bits of mantissa: it is exact, where `2.0 ** e` may not be on every machine.


# %%
def power_of_two(e: Tensor) -> Tensor:
    """2^e exactly, as float64; e: integers from -1022 to 1023."""
    return (e.long() + 1023 << 52).view(torch.float64)


def floor_log2(a: Tensor) -> Tensor:
    """The exponent of the power of two at or below a >= 0, int64; -1023 for zero."""
    return (a.double().view(torch.int64) >> 52) - 1023


def decode_float(bits: Tensor, name: str) -> Tensor:
    """What patterns of bits (integers, any shape) stand for, in float32."""
    e_bits, m_bits, above = float_format(name)
    bits = bits.long()
    sign, code = bits >> e_bits + m_bits & 1, bits & 2 ** (e_bits + m_bits) - 1
    e, m = code >> m_bits, code & 2**m_bits - 1
    m = m + 2**m_bits * (e > 0)  # the leading one that normal numbers do not store
    x = m * power_of_two(e.clamp(min=1) - (2 ** (e_bits - 1) - 1) - m_bits)
    special = code - largest_code(name)  # from 1 upwards
    x = torch.where(special > 0, math.nan, x)
    x = torch.where((special == 1) & (above == "infinity"), math.inf, x)
    return ((1 - 2 * sign) * x).float()


for name in ("bfloat16", "float16", "e5m2", "e4m3fn", "e2m1"):
    top, least = decode_float(torch.tensor([largest_code(name), 1]), name).tolist()
    print(f"{name:10} largest {top:<12.6g} smallest above zero {least:.6g}")

# %% [markdown]
# Rounding is division by the spacing. Find the power of two below $|x|$ (not smaller than the smallest normal one); $M$ bits further down is the spacing $\Delta$; then $q = \operatorname{round}(|x| / \Delta)$, where a tie goes to the even neighbour. Now the bits. For a normal number $q$ is $2^M + m$, so the pattern $e \cdot 2^M + m$ is
#
# $$(e - 1) \cdot 2^M + q .$$
#
# And this formula has no exceptions. Subnormals have $e = 1$ in the spacing and no leading one, which makes it $q$, as it should be. When rounding carries $q$ up to $2^{M+1}$, the sum carries into the exponent by itself. Patterns of positive numbers are ordered like the numbers: that is what floating point was designed for.
#
# One carry needs a rule: the one past the largest number. With infinity in the format, everything from the halfway point to the next level upwards becomes infinity, as that is the next pattern. `e4m3fn` has none. A cast can give NaN, the next pattern, or *saturate* at the largest number; the paper and the standard made from it (Open Compute Project 2023) leave the choice. PyTorch's CPU
# casts gave NaN up to version 2.11 and saturate in the version that the course pins; hardware differs, too. We saturate, and `saturate` changes that.


# %%
def encode_float(
    x: Tensor, name: str, saturate: bool | None = None, rounding=torch.round
) -> Tensor:
    """Round float32 numbers to a format: the patterns of bits, int64, of x's shape.

    saturate: whether what is too large becomes the largest number; else it becomes
    infinity, or NaN where there is no infinity. None: only in formats without infinity.
    rounding: of numbers >= 0 to integers; torch.round sends ties to even.
    Raises TypeError for other dtypes, ValueError for what the format cannot express.
    """
    e_bits, m_bits, above = float_format(name)
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32, got {x.dtype}: rounding twice is wrong")
    if above == "nothing" and (saturate is False or x.isnan().any()):
        raise ValueError(f"{name} has no pattern for NaN or overflow: it saturates")
    saturate = above != "infinity" if saturate is None else saturate
    bias, n_bits = 2 ** (e_bits - 1) - 1, e_bits + m_bits
    a = x.double().abs().nan_to_num(0.0, posinf=2.0**129)  # 2^129: beyond them all
    e = floor_log2(a).clamp(min=1 - bias)
    q = rounding(a / power_of_two(e - m_bits)).long()
    code = ((e + bias - 1) << m_bits) + q
    code = code.clamp(max=largest_code(name) + (not saturate))
    code = torch.where(x.isnan(), 2**n_bits - 1, code)
    return code + (x.signbit().long() << n_bits)


def round_to_float(x: Tensor, name: str, saturate: bool | None = None) -> Tensor:
    """The nearest numbers of a format, in float32; see encode_float."""
    return decode_float(encode_float(x, name, saturate), name)


# %% [markdown]
# The check is exhaustive: every pattern of the four small formats against PyTorch's own decoding, and its casts on every finite number, every tie between two neighbours, and the float32 numbers just beside each tie. (Here only what is in range, so that it holds on any version; the tests go beyond.)


# %%
def hard_cases(name: str) -> Tensor:
    """Every finite number of a small format, every tie, and what is beside ties."""
    x = decode_float(torch.arange(largest_code(name) + 1), name)  # ascending
    tie = (x[1:].double() + x[:-1].double()).mul(0.5).float()
    up, down = torch.full_like(tie, math.inf), torch.zeros_like(tie)
    cases = torch.cat([x, tie, tie.nextafter(up), tie.nextafter(down)])
    return torch.cat([cases, -cases])


small = {
    "bfloat16": (torch.bfloat16, torch.int16),
    "float16": (torch.float16, torch.int16),
    "e5m2": (torch.float8_e5m2, torch.uint8),
    "e4m3fn": (torch.float8_e4m3fn, torch.uint8),
}
for name, (dtype, container) in small.items():
    patterns = torch.arange(2 ** (8 * dtype.itemsize))
    theirs = patterns.to(container).view(dtype).float()
    assert torch.equal(
        decode_float(patterns, name).nan_to_num(7.5), theirs.nan_to_num(7.5)
    )
    cases = hard_cases(name)
    theirs = cases.to(dtype).view(container).long() & 2 ** (8 * dtype.itemsize) - 1
    assert torch.equal(encode_float(cases, name), theirs), f"{name}: some bits differ"
    print(f"{name:10}{len(patterns):7,} patterns,{len(cases):8,} casts: the same bits")

# %%
too_large = torch.tensor([448.0, 464.0, 464.1, math.inf])
print("e4m3fn, saturating:", *round_to_float(too_large, "e4m3fn").tolist())
print("e4m3fn, or NaN:    ", *round_to_float(too_large, "e4m3fn", False).tolist())
too_large = torch.tensor([57344.0, 61439.9, 61440.0, math.inf])
print("e5m2:              ", *round_to_float(too_large, "e5m2").tolist())

# %% [markdown]
# 464 lies halfway between 448 and the 480 that the format does not have. The tie goes to the even pattern, which is 448; 61,440 is the same case in `e5m2`, where the even pattern is infinity's.
#
# What do the bits buy? The picture shows how far a number can be from its nearest level, relative to itself, for every magnitude.

# %% tags=["plot"]
figure, axis = plt.subplots(figsize=(7.2, 3.8))
magnitude = torch.logspace(-33, 20, 8000, base=2)
weights = torch.cat([x.weight.detach().flatten() for x in matrices(model).values()])
low, high = weights.abs().quantile(torch.tensor([0.01, 1.0])).log2().tolist()
axis.axvspan(low, high, color=MUTED, alpha=0.15, lw=0)
label(
    axis,
    (low + high) / 2,
    1.3e-2,
    "99 % of this\nmodel's weights",
    MUTED,
    xytext=(0, 0),
    ha="center",
)
curves = {
    "e2m1": (VERMILION, 1.2, 3.6e-1, "e2m1 (4 bits)"),
    "e5m2": (ORANGE, 8.0, 1.9e-1, "e5m2"),
    "e4m3fn": (PURPLE, 4.0, 2.4e-2, "e4m3fn"),
    "bfloat16": (BLUE, 10.0, 6.0e-3, "bfloat16"),
    "float16": (GREEN, 7.2, 1.9e-4, "float16"),
}
for name, (color, at, height, text) in curves.items():
    a = magnitude[magnitude <= decode_float(torch.tensor(largest_code(name)), name)]
    x = decode_float(encode_float(a, name, saturate=True), name)
    spacing = power_of_two(
        floor_log2(a).clamp(min=2 - 2 ** (float_format(name)[0] - 1))
        - float_format(name)[1]
    )
    worst = (spacing / 2 / a).clamp(max=1)
    axis.semilogy(a.log2(), worst, color=color, lw=1.4)
    label(axis, at, height, text, color, xytext=(0, 0))
axis.set(
    xlabel="magnitude |x| (powers of two)",
    ylabel="largest error / |x|",
    title="Exponent bits buy range, mantissa bits precision",
    ylim=(1e-4, 1.6),
)
show(
    figure,
    "fig_formats",
    "Largest relative rounding error against magnitude on logarithmic axes, for five "
    "formats. Each curve is a sawtooth between two levels over the format's range and "
    "rises to 1 below it: float16 near 0.0005 from 2 to the -14 to 2 to the 16, "
    "bfloat16 near 0.004 over the whole picture, e4m3fn near 0.06 from 2 to the -6 to "
    "2 to the 9, e5m2 near 0.12 from 2 to the -14 to 2 to the 16, e2m1 near 0.25 over "
    "three powers of two only. A grey band, from 2 to the -10 to 2 to the 0, marks the "
    "model's weights: in its left half e4m3fn's curve rises to 1, and e2m1's is at 1 "
    "in most of it.",
)

# %% [markdown]
# So a weight cast to `e4m3fn` keeps a relative precision of $2^{-4}$ while it is above $2^{-6}$; below, in the left half of the band, precision fades. A scale for the tensor, which puts its largest entry at 448, moves the whole band to the right. How much that matters we can ask the model. First the formats that share a scale in blocks, built from the same pieces.
#
# ### MXFP4: a block shares an exponent
# The Open Compute Project's microscaling formats (Rouhani et al. 2023) give each block of 32 numbers one scale $2^X$, with $X$ in a byte of its own: the bits of an exponent without sign and mantissa, called `e8m0`. Multiplying by it adds exponents, which is cheap in hardware. In MXFP4 the numbers are `e2m1`, whose levels are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. The standard's rule for the
# exponent, from the block's largest magnitude,
#
# $$X = \big\lfloor \log_2 \max_i |x_i| \big\rfloor - 2,$$
#
# puts that largest magnitude at $4 \dots 8$ units. The largest level is 6, so entries beyond it *saturate*, and are wrong by up to a quarter. The price of a scale without a mantissa.
#
# The bytes are llama.cpp's: the scale's byte, $X + 127$, then 16 bytes, where weight $j$ of the block has the low nibble of byte $j$ and weight $j + 16$ the high one. In two details llama.cpp rounds in its own way, and we follow it: a tie goes toward zero, and a weight that rounds to zero loses its sign. (It also stores doubled levels with a halved scale, to keep them integers, which comes to the same numbers. And it takes the logarithm in float32, which can round up to the integer when the maximum is the last float32 number below a power of two; there we keep to the standard.)


# %%
def mxfp4_pack(w: Tensor) -> Tensor:
    """Blocks of 32 weights as MXFP4 in llama.cpp's layout: a byte 2^X, 32 e2m1 codes.

    w: (o, i) float32, i a multiple of 32. Returns uint8 (o, i / 32 * 17).
    """
    check_input(w, 4)
    check_groups(w, 32)
    x = rearrange(w, "o (n g) -> (o n) g", g=32)
    exponent = (floor_log2(x.abs().amax(-1, keepdim=True)) - 2).clamp(min=-127)
    units = (x / power_of_two(exponent)).float()  # exact
    codes = encode_float(units, "e2m1", rounding=lambda q: (q - 0.5).ceil())
    codes = codes.masked_fill(codes == 8, 0)  # 8 is -0
    signed = rearrange(codes - 8, "n (two j) -> n (j two)", two=2)  # j beside j + 16
    data = torch.cat([(exponent + 127).to(torch.uint8), pack_int4(signed)], 1)
    return data.reshape(len(w), -1)


def mxfp4_unpack(data: Tensor, shape: tuple[int, int]) -> Tensor:
    """The weights, float32 of the given shape, that mxfp4_pack's bytes stand for."""
    blocks = data.reshape(-1, 17)
    codes = unpack_int4(blocks[:, 1:], (len(blocks), 32)) + 8
    codes = rearrange(codes, "n (j two) -> n (two j)", two=2)
    scale = power_of_two(blocks[:, :1].int() - 127)
    return (decode_float(codes, "e2m1") * scale).float().reshape(shape)


block = torch.linspace(-7, 7, 32)[None]
print("scale 2 to the", mxfp4_pack(block)[0, 0].item() - 127, "  -7 to 7 becomes:")
print(*sorted(set(mxfp4_unpack(mxfp4_pack(block), (1, 32))[0].tolist())))
assert torch.equal(
    mxfp4_unpack(mxfp4_pack(block / 64), (1, 32)),
    mxfp4_unpack(mxfp4_pack(block), (1, 32)) / 64,
), "a power of two goes into the scale and changes nothing else"

# %% [markdown]
# ### NVFP4: smaller blocks, finer scales
# NVIDIA's format (NVIDIA 2025) has blocks of 16 and gives their scale a mantissa: it is a number in `e4m3fn`. That has little range, so one float32 number for the tensor puts the largest of the blocks' scales at 448:
#
# $$t = \frac{\max |x|}{6 \cdot 448},\qquad s = \operatorname{e4m3}\!\left(\frac{\max_{\text{block}} |x|}{6\,t}\right),\qquad \hat x = t\, s \cdot \operatorname{e2m1}\!\left(\frac{x}{t\,s}\right).$$
#
# The block's largest entry now lands at 6, up to the rounding of $s$, and little saturates. That costs 4.5 bits a weight instead of 4.25.


# %%
def nvfp4_quantize(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of 16 weights as e2m1 codes with an e4m3fn scale, and one scale in all.

    w: (o, i) float32, i a multiple of 16. Returns codes 0 to 15, uint8 (o, i); the
    patterns of the blocks' scales, uint8 (o, i / 16); and the tensor's scale, float32.
    """
    check_input(w, 4)
    check_groups(w, 16)
    x = rearrange(w, "o (n g) -> o n g", g=16)
    t = w.abs().max() / (6 * 448)
    t = torch.where(t > 0, t, 1.0)
    scales = encode_float(x.abs().amax(-1) / 6 / t, "e4m3fn")
    s = decode_float(scales, "e4m3fn")[..., None] * t
    codes = encode_float(x / torch.where(s > 0, s, math.inf), "e2m1")
    return codes.reshape(w.shape).to(torch.uint8), scales.to(torch.uint8), t


def nvfp4_dequantize(codes: Tensor, scales: Tensor, t: Tensor) -> Tensor:
    """The weights (o, i) float32; see nvfp4_quantize."""
    s = repeat(decode_float(scales, "e4m3fn") * t, "o n -> o (n g)", g=16)
    return decode_float(codes, "e2m1") * s


# %% [markdown]
# ### What the model says
# Each format gets the control that asks for its point: evenly spaced integers in place of its floating-point levels, with as many bits and as many scales. For `e4m3fn` that is section 3's rounding to 8-bit integers with one scale a tensor. In the blocks, 15 even levels from $-7$ to $7$ take the place of the 15 of `e2m1`. And `e4m3fn` once more without a scale.

# %%
predict(
    "8 bits and one scale a tensor: which changes the model's probabilities less?",
    ["e4m3fn", "integers, -127 to 127", "they are alike"],
    answer=1,
    why="e4m3fn spends half of its bits on range: it has 8 levels between 1/2 and 1 of "
    "the largest weight, the integers have 64. The weights of a matrix do not differ "
    "enough in size to need that range.",
)


# %%
def e4m3(name: str, w: Tensor, scaled: bool = True) -> tuple[Tensor, list[Tensor]]:
    """A matrix cast to e4m3fn, its largest entry scaled to 448."""
    scale = w.abs().max().clamp(min=1e-30) / 448 if scaled else torch.tensor(1.0)
    bits = encode_float(w / scale, "e4m3fn").to(torch.uint8)
    return decode_float(bits, "e4m3fn") * scale, [bits, scale]


def mxfp4(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
    data = mxfp4_pack(w)
    return mxfp4_unpack(data, w.shape), [data]


def nvfp4(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
    codes, scales, t = nvfp4_quantize(w)
    return nvfp4_dequantize(codes, scales, t), [pack_int4(codes.int() - 8), scales, t]


def integers(name: str, w: Tensor, group_size: int) -> tuple[Tensor, list[Tensor]]:
    """15 even levels under the scales of MXFP4 (groups of 32) or NVFP4 (of 16)."""
    x = rearrange(w, "o (n g) -> o n g", g=group_size)
    largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    if group_size == 32:
        exponent = floor_log2(largest) - 2
        s, stored = power_of_two(exponent).float(), [exponent.to(torch.int8)]
    else:
        t = largest.max() / (7 * 448)
        bits = encode_float(largest / 7 / t, "e4m3fn")
        s, stored = decode_float(bits, "e4m3fn") * t, [bits.to(torch.uint8), t]
    codes = (x / s).round().clamp(-7, 7)
    packed = pack_int4(codes.to(torch.int8))
    return (codes * s).reshape(w.shape), [packed, *stored]


# %% tags=["trained"]
rung("fp8 e4m3fn, one scale a tensor", e4m3)
rung("fp8 e4m3fn, no scale", lambda n, w: e4m3(n, w, scaled=False), control=True)
rung("MXFP4", mxfp4)
rung("15 even levels, MXFP4's scales", lambda n, w: integers(n, w, 32), control=True)
rung("NVFP4", nvfp4)
rung("15 even levels, NVFP4's blocks", lambda n, w: integers(n, w, 16), control=True)
mx, mx_even, nv, nv_even = (table[name]["kl"] for name in list(table)[-4:])
fp8, no_scale = (table[name]["kl"] for name in list(table)[-6:-4])
int8 = plain_rungs["8 bits, one scale a tensor"]["kl"]
report("fp8_int8_ratio", fp8 / int8, "times the KL of 8-bit integers, fp8 e4m3fn")
report("fp8_no_scale_ratio", no_scale / fp8, "times fp8's KL without a scale")
report("mxfp4_even_ratio", mx_even / mx, "times MXFP4's KL with even levels")
report("nvfp4_even_ratio", nv_even / nv, "times NVFP4's KL with even levels")
report("nvfp4_mxfp4_ratio", nv / mx, "of MXFP4's KL, NVFP4")
assert table["MXFP4"]["bits"] == 4.25 and 4.5 < table["NVFP4"]["bits"] < 4.51
assert fp8 > 1.6 * int8 or budget_fraction() < 1, "8 bits: integers are closer"
assert 0.6 < no_scale / fp8 < 1.6 or budget_fraction() < 1, "range it has enough of"
assert nv < 0.85 * mx and mx < 0.95 * mx_even or budget_fraction() < 1
assert nv_even < 1.1 * nv or budget_fraction() < 1, "even levels do as well"

# %% [markdown]
# Four answers. Where integers stand or fall with their scale, fp8 hardly needs one: its exponent does that work, number by number. But at 8 bits the integers are closer. Weights of one matrix have about one size, and bits spent on range are not spent on precision. (What fp8 is for are numbers that do vary, such as gradients, and activations: section 10.) With MXFP4's scales the levels of `e2m1` help: below 2 units,
# where many weights of a block lie, they are half as far apart as integers. But in NVFP4's blocks, where the even levels get a scale that fits them as well, the two measures disagree: even levels have less KL, `e2m1` the lower loss. What makes NVFP4 better than MXFP4 is its scale and its smaller blocks, not the shape of its levels. What hardware gains from `e2m1` is a small multiplier.

# %% [markdown]
# ## 9 · Going further: what llama.cpp runs
# *Live, 14 minutes.*
#
# The models that people run on laptops are mostly files for llama.cpp (Gerganov 2023), and their weights are stored in *blocks* of bytes that a kernel can read one after the other. Here are the three best known of these formats, to the byte. The tests hold them against llama.cpp's own Python package, `gguf`.
#
# **Q8_0** is section 2's symmetric grid in blocks of 32: a float16 scale $d = \max|x| / 127$, then 32 bytes with the codes, 34 bytes in all. To get the same bytes, details matter. The block is multiplied by $1/d$, not divided by $d$; codes come from the float32 $d$, although its float16 rounding is what the file keeps; and ties go away from zero, as C's `roundf` has it.


# %%
def half_bytes(x: Tensor) -> Tensor:
    """Numbers (n, 1) float32 as the two bytes of a float16, uint8 (n, 2)."""
    half = x.half()
    if half.isinf().any():
        raise ValueError(f"a scale of {x.abs().max():.3g} does not fit float16 (65504)")
    return half.view(torch.uint8)


def reciprocal(d: Tensor) -> Tensor:
    """1 / d in float32, and 0 where that is infinite: float16 makes such d zero."""
    return torch.where((1 / d).isinf(), 0.0, 1 / d)


def q8_0_pack(w: Tensor) -> Tensor:
    """Bytes of llama.cpp's Q8_0: per 32 weights a float16 scale and 32 int8 codes.

    w: (o, i) float32, i a multiple of 32. Returns uint8 (o, i / 32 * 34). Raises
    ValueError for other shapes, NaN, infinity, and scales beyond float16.
    """
    check_input(w, 8)
    check_groups(w, 32)
    x = rearrange(w, "o (n g) -> (o n) g", g=32)
    d = x.abs().amax(-1, keepdim=True) / 127
    x = x * reciprocal(d)
    codes = x.trunc() + (2 * x.frac()).trunc()  # ties away from zero
    return torch.cat([half_bytes(d), codes.char().view(torch.uint8)], 1).view(
        len(w), -1
    )


def q8_0_unpack(data: Tensor, shape: tuple[int, int]) -> Tensor:
    """The weights, float32 of the given shape, that q8_0_pack's bytes stand for."""
    blocks = data.reshape(-1, 34)
    d = blocks[:, :2].contiguous().view(torch.float16).float()
    return (blocks[:, 2:].contiguous().view(torch.int8) * d).reshape(shape)


# %% [markdown]
# **Q4_0** has 4-bit codes, and with 16 codes a question that 256 hardly ask. A symmetric grid uses 15 of them, $-7$ to $7$; the code $-8$ is lost. Q4_0 uses it. Let $m$ be the entry with the largest magnitude, *with its sign*, and
#
# $$d = \frac{m}{-8},\qquad q = \min\!\big(\lfloor x / d + 8.5 \rfloor,\, 15\big) \in \{0, \dots, 15\},\qquad \hat x = (q - 8)\, d .$$
#
# The largest entry gets $q = 0$ and comes back as $-8d = m$. If it is positive, $d$ is negative, which turns the grid around; that costs nothing, as a float16 has a sign anyway. So the step is $|m|/8$ instead of $|m|/7$ for the same bytes. The other side has no $+8$: an entry of opposite sign and nearly the same magnitude is cut down to $7d$. That happens in some blocks; the finer step serves all.
#
# The bytes: $d$ in float16, then 16 bytes, where weight $j$ has the low nibble of byte $j$ and weight $j + 16$ the high one. So one shift and one mask turn 16 bytes into two runs of 16 neighbours, as a vector unit likes them.


# %%
def q4_0_pack(w: Tensor) -> Tensor:
    """Bytes of llama.cpp's Q4_0: per 32 weights a float16 scale and 16 bytes of codes.

    w: (o, i) float32, i a multiple of 32. Returns uint8 (o, i / 32 * 18). Raises
    ValueError for other shapes, NaN, infinity, and scales beyond float16.
    """
    check_input(w, 4)
    check_groups(w, 32)
    x = rearrange(w, "o (n g) -> (o n) g", g=32)
    d = x.gather(1, x.abs().argmax(1, keepdim=True)) / -8
    codes = (x * reciprocal(d) + 8.5).trunc().clamp(0, 15)
    pairs = rearrange(codes.char() - 8, "n (two j) -> n (j two)", two=2)
    return torch.cat([half_bytes(d), pack_int4(pairs)], 1).view(len(w), -1)


def q4_0_unpack(data: Tensor, shape: tuple[int, int]) -> Tensor:
    """The weights, float32 of the given shape, that q4_0_pack's bytes stand for."""
    blocks = data.reshape(-1, 18)
    d = blocks[:, :2].contiguous().view(torch.float16).float()
    codes = unpack_int4(blocks[:, 2:], (len(blocks), 32))
    return (rearrange(codes, "n (j two) -> n (two j)", two=2) * d).reshape(shape)


# %%
ramp = torch.linspace(-1, 0.875, 32)[None]  # 8 levels below zero and 7 above
ramp_bytes = q4_0_pack(ramp)
print("d =", ramp_bytes[0, :2].contiguous().view(torch.float16).item(), end=", ")
print(
    "first codes",
    *(ramp_bytes[0, 2:6] & 15).tolist(),
    "and",
    *(ramp_bytes[0, 2:6] >> 4).tolist(),
)
assert q4_0_unpack(ramp_bytes, (1, 32))[0, 0] == -1, "the extreme comes back exactly"
assert q4_0_unpack(q4_0_pack(-ramp), (1, 32))[0, 0] == 1, "whichever its sign"
assert (q4_0_unpack(ramp_bytes, (1, 32)) - ramp).abs().max() <= 0.125 / 2
assert (q8_0_unpack(q8_0_pack(ramp), (1, 32)) - ramp).abs().max() < 0.51 / 127

# %% [markdown]
# **Q4_K** spends the same 4.5 bits a weight in another way. A *super-block* holds 256 weights in 8 sub-blocks of 32. Each sub-block has a scale *and* a minimum, so that its 16 levels need not be centred at zero: $\hat x = s\,q - m$ with $q$ from 0 to 15. Two float16 numbers for each 32 weights would be a whole bit a weight. Instead, the scales and minima are themselves rounded, to 6 bits, in
# units of two float16 numbers that the super-block shares:
#
# $$\hat x = (d \cdot s_k)\, q - (d_{\min} \cdot m_k),\qquad s_k, m_k \in \{0, \dots, 63\},\quad k = 1 \dots 8 .$$
#
# It is the idea of NF4's double quantization (section 4). The others of the family, Q2_K to Q6_K, differ in the bits of their codes and sub-scales; and a file called Q4_K_M is a mixture that gives some matrices more.
#
# Eight scales and eight minima of 6 bits are 96 bits: 12 bytes. The first four of each fit whole bytes with two bits to spare, and those spare bits hold the upper two of the last four:


# %%
def pack_six(s: Tensor, m: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits, uint8 (n, 8) each, in 12 bytes."""
    first_s, last_s = s.chunk(2, -1)
    first_m, last_m = m.chunk(2, -1)
    tops = [first_s | last_s >> 4 << 6, first_m | last_m >> 4 << 6]
    return torch.cat([*tops, last_s & 15 | (last_m & 15) << 4], -1)


def unpack_six(data: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minima that pack_six packed."""
    s, m, low = data.chunk(3, -1)
    last_s, last_m = low & 15 | s >> 6 << 4, low >> 4 | m >> 6 << 4
    return torch.cat([s & 63, last_s], -1), torch.cat([m & 63, last_m], -1)


numbers = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
again = unpack_six(pack_six(numbers, 63 - numbers))
assert torch.equal(again[0], numbers) and torch.equal(again[1], 63 - numbers)

# %% [markdown]
# Now a sub-block's scale and minimum. The obvious choice spans its *range*: the lowest entry (or zero, if that is lower: $m$ has no sign) becomes code 0, the highest code 15.


# %%
def fit_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum (..., 1) whose levels 0 to 15 span each row of x (..., g)."""
    minimum = -x.amin(-1, keepdim=True).clamp(max=0)
    return (x.amax(-1, keepdim=True) + minimum) / 15, minimum


# %% [markdown]
# But the range is set by the two most extreme entries, and the other thirty would often be better off with a narrower or a shifted grid. llama.cpp searches, and so do we. For codes $q_i$ given, the best scale and minimum are a straight line through the points $(q_i, x_i)$, a regression. So try several spans somewhat wider and narrower, round, fit the line, and keep the one with
# the smallest error. The error is weighted: llama.cpp gives an entry the weight $|x_i|$ plus the root mean square of its block, because large weights matter more to the output. Whether they do, the rungs will say.


# %%
def weigh(x: Tensor) -> Tensor:
    """Importance of each entry of x (..., g): its magnitude plus the block's RMS."""
    return x.abs() + x.square().mean(-1, keepdim=True).sqrt()


def fit_line(q: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted least-squares fit x ~ scale q - minimum, minimum >= 0, over g."""

    def mean(z: Tensor) -> Tensor:
        return (weight * z).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)

    q0, x0 = mean(q), mean(x)
    scale = mean((q - q0) * (x - x0)) / mean((q - q0).square())
    minimum = scale * q0 - x0
    through_zero = mean(q * x) / mean(q * q)
    below = minimum > 0
    return torch.where(below, scale, through_zero), torch.where(below, minimum, 0.0)


def fit_search(x: Tensor, importance=weigh, n_tries: int = 21) -> tuple[Tensor, Tensor]:
    """Scale and minimum (..., 1) of the smallest weighted error among several fits."""
    x = x.double()
    scale, minimum = fit_range(x)
    weight = torch.where(importance(x) > 0, importance(x), 1.0)
    best = torch.full_like(scale, math.inf)
    start = (x + minimum) / torch.where(scale > 0, 15 * scale, 1.0)  # 0 to 1
    for levels in torch.linspace(14, 16, n_tries):
        q = (start * levels).round().clamp(0, 15)
        s, m = fit_line(q, x, weight)
        error = (weight * (s * q - m - x).square()).sum(-1, keepdim=True)
        better = error < best  # never for NaN, from equal entries: the range fits them
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, s, scale), torch.where(better, m, minimum)
    return scale.float(), minimum.float()


# %%
def six_bits(v: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers >= 0 (n, 8) as d times 0 to 63: the bytes of d, (n, 2), codes (n, 8)."""
    data = half_bytes(v.amax(-1, keepdim=True) / 63)
    d = data.view(torch.float16).float()
    codes = (v / torch.where(d > 0, d, math.inf)).round().clamp(max=63)
    return data, codes.to(torch.uint8)


def q4_k_levels(data: Tensor) -> tuple[Tensor, Tensor]:
    """Each sub-block's step and offset (n, 8, 1), from the head of 16 bytes."""
    d, d_min = data[:, :4].contiguous().view(torch.float16).float().chunk(2, -1)
    s, m = unpack_six(data[:, 4:16])
    return (d * s)[..., None], (d_min * m)[..., None]


def q4_k_pack(w: Tensor, fit=fit_search) -> Tensor:
    """Super-blocks of llama.cpp's Q4_K: 256 weights in 144 bytes.

    w: float32, any shape whose size is a multiple of 256; flattened (llama.cpp itself
    wants rows of a multiple of 256). fit: finds scale and minimum of sub-blocks.
    Returns uint8 (size / 256, 144). Raises ValueError as q4_0_pack does.
    """
    check_input(w, 4)
    if w.numel() % 256:
        raise ValueError(f"{w.numel()} weights are no multiple of 256: no padding here")
    x = w.reshape(-1, 8, 32)
    scale, minimum = (z.squeeze(-1) for z in fit(x))
    (d, s), (d_min, m) = six_bits(scale), six_bits(minimum)
    head = torch.cat([d, d_min, pack_six(s, m)], 1)
    step, offset = q4_k_levels(head)
    codes = (x + offset) / torch.where(step > 0, step, math.inf)
    codes = codes.round().clamp(0, 15).char() - 8
    pairs = rearrange(codes, "n (k two) g -> n k (g two)", two=2)  # k and k + 1
    return torch.cat([head, rearrange(pack_int4(pairs), "n k g -> n (k g)")], 1)


def q4_k_unpack(data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weights, float32 of the given shape, that q4_k_pack's bytes stand for."""
    step, offset = q4_k_levels(data)
    codes = unpack_int4(data[:, 16:], (len(data), 4, 64)) + 8
    q = rearrange(codes, "n k (g two) -> n (k two) g", two=2)
    return (step * q - offset).reshape(shape)


# %%
q_proj = matrices(model)["0.attention.q_proj"].weight.detach()
q_bytes = q4_k_pack(q_proj)
print(f"{q_proj.numel():,} weights in {q_bytes.nbytes:,} bytes")
assert q_bytes.nbytes * 8 == 4.5 * q_proj.numel()
fits = {"range": fit_range, "search": fit_search}
gain = {
    name: snr_db(q_proj, q4_k_unpack(q4_k_pack(q_proj, fit), q_proj.shape))
    for name, fit in fits.items()
}
print("signal to error:", *(f"{name} {x:.1f} dB" for name, x in gain.items()))
assert gain["search"] > gain["range"] + 0.3, "the search should find better lines"

# %% [markdown]
# Eight blocks of Q4_0 and one super-block of Q4_K hold the same 256 weights in the same 144 bytes, 16 of them for scales.

# %% tags=["plot"]
figure, axis = plt.subplots(figsize=(7.2, 2.8))


def draw_bytes(
    start: float, width: float, y: float, color: str, text: str = ""
) -> None:
    box = plt.Rectangle((start, y), width, 1, facecolor=color, edgecolor="w", lw=0.8)
    axis.add_patch(box)
    middle = (start + width / 2, y + 0.5)
    axis.text(*middle, text, ha="center", va="center", fontsize=8, color="w")


for k in range(8):
    draw_bytes(18 * k, 2, 2, VERMILION)
    draw_bytes(18 * k + 2, 16, 2, BLUE, "16")
draw_bytes(0, 2, 0, VERMILION)
draw_bytes(2, 2, 0, PURPLE)
draw_bytes(4, 12, 0, GREEN, "12")
for k in range(4):
    draw_bytes(16 + 32 * k, 32, 0, BLUE, f"32: sub-blocks {2 * k + 1} and {2 * k + 2}")
beside = {"xytext": (0, 0), "fontsize": 8.5}
label(axis, 0, 3.3, "scale, 2 bytes", VERMILION, **beside)
label(axis, 28, 3.3, "32 codes: j and j + 16 share a byte", BLUE, **beside)
label(axis, 0, 1.3, "scale", VERMILION, **beside)
label(axis, 14, 1.3, "min", PURPLE, **beside)
label(axis, 24, 1.3, "8 + 8 six-bit multiples", GREEN, **beside)
label(axis, 68, 1.3, "codes: j of two sub-blocks share a byte", BLUE, **beside)
axis.spines["left"].set_visible(False)
axis.tick_params(left=False)
axis.set(
    xlim=(-1, 145),
    ylim=(-0.1, 3.7),
    xticks=range(0, 145, 18),
    yticks=(0.5, 2.5),
    yticklabels=("Q4_K", "Q4_0"),
    xlabel="bytes",
    title="256 weights in 144 bytes, two ways",
)
axis.grid(False)
show(
    figure,
    "fig_llamacpp_blocks",
    "Two rows of 144 bytes drawn to scale. Q4_0: eight blocks, each with a scale of 2 "
    "bytes and then 16 bytes that hold 32 codes. Q4_K: a scale and a minimum of 2 "
    "bytes each, 12 bytes with eight sub-scales and eight sub-minima of 6 bits, and "
    "then four runs of 32 bytes, each with the codes of two sub-blocks.",
)

# %% [markdown]
# ### What the model says
# The control of Q4_0 stands in the table already: groups of 32 with one code unused (section 3) cost the same 4.5 bits. For Q4_K we spend these bits plainly: a float16 scale and a float16 minimum, which only groups of 64 can afford, found by the same search.

# %%
predict(
    "The code -8, for the same bytes: how much of the KL of absmax rounding in groups "
    "of 32 does it take away?",
    ["nothing that can be measured", "about a quarter", "more than half"],
    answer=1,
    why="The step shrinks from |m|/7 to |m|/8, and the error's square, to which KL is "
    "about proportional, by (7/8)^2 = 0.77, less what is cut off at the other end.",
)


# %%
def blocks_of(pack, unpack):
    """A method from a pair of functions that write and read bytes."""

    def method(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        data = pack(w)
        return unpack(data, w.shape), [data]

    return method


def plain_minima(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
    """4-bit codes with a float16 scale and a float16 minimum for each 64 weights."""
    x = rearrange(w, "o (n g) -> o n g", g=64)
    s, m = (z.half() for z in fit_search(x))
    s = torch.where(s > 0, s, 1.0).half()  # a group of zeros
    codes = ((x + m) / s).round().clamp(0, 15)
    packed = pack_int4(codes.char() - 8)
    return (codes * s.float() - m.float()).reshape(w.shape), [packed, s, m]


def equal_weights(w: Tensor) -> Tensor:
    """Q4_K's bytes, with a search in which all entries count alike."""
    return q4_k_pack(w, lambda x: fit_search(x, importance=torch.ones_like))


# %% tags=["trained"]
rung("Q8_0", blocks_of(q8_0_pack, q8_0_unpack))
rung("Q4_0", blocks_of(q4_0_pack, q4_0_unpack))
rung("Q4_K, range", blocks_of(lambda w: q4_k_pack(w, fit_range), q4_k_unpack))
rung("Q4_K, searched", blocks_of(q4_k_pack, q4_k_unpack))
rung("Q4_K, searched, equal weights", blocks_of(equal_weights, q4_k_unpack), True)
rung("plain minima, groups of 64", plain_minima, control=True)
for name in ("q4_0", "q4_k"):
    row = table["Q4_0" if name == "q4_0" else "Q4_K, searched"]
    report(f"{name}_loss", row["difference"], "nats above the unrounded model")
    report(f"{name}_loss_error", row["error"], "nats, its standard error")
kl = {name: row["kl"] for name, row in table.items()}
if "NF4, blocks of 64" in kl:  # section 4 may have been left out
    report("nf4_q4_0", kl["NF4, blocks of 64"] / kl["Q4_0"], "times Q4_0's KL, NF4")
without = plain_rungs["4 bits, groups of 32"]["kl"]
report("q4_0_kl_ratio", kl["Q4_0"] / without, "of the KL without the code -8")
report("q4_k_kl_ratio", kl["Q4_K, searched"] / kl["Q4_0"], "of Q4_0's KL")
plain = kl["plain minima, groups of 64"]
report("q4_k_plain_ratio", plain / kl["Q4_K, searched"], "times Q4_K's KL, plain")
ranged, equal = kl["Q4_K, range"], kl["Q4_K, searched, equal weights"]
report("q4_k_range_ratio", ranged / kl["Q4_K, searched"], "times it without the search")
report("q4_k_equal_ratio", equal / kl["Q4_K, searched"], "times it with equal weights")
assert table["Q8_0"]["bits"] == 8.5 and table["Q4_0"]["bits"] == 4.5
assert table["Q4_K, searched"]["bits"] == table[list(table)[-1]]["bits"] == 4.5
assert kl["Q4_0"] < 0.9 * without or budget_fraction() < 1, "-8 should pay"
assert kl["Q4_K, searched"] < 0.85 * kl["Q4_0"] or budget_fraction() < 1
assert ranged > 1.05 * kl["Q4_K, searched"] or budget_fraction() < 1
assert plain > 1.1 * kl["Q4_K, searched"] or budget_fraction() < 1
assert 0.85 < equal / kl["Q4_K, searched"] < 1.15 or budget_fraction() < 1

# %% [markdown]
# All at 4.5 bits. A code that lay idle, scales in two levels, and a search when the file is written: each brings the model closer to the original, and none costs a byte. What cannot be told apart here is weighing large entries more: equal weights do as well. (llama.cpp can also weigh by what each input carries, measured on a text. That is section 5's idea, with only the diagonal of GPTQ's Hessian.)

# %% [markdown]
# ## 10 · Going further: outliers in the activations
# *Live, 12 minutes.*
#
# So far only weights were rounded, and the product was computed in float. To multiply integers, the *inputs* of each layer have to be rounded too: W8A8 means 8 bits for weights and 8 for activations. In models beyond some 6 billion parameters this
# fails, because a few channels of the residual stream carry values tens of times larger than all others (Dettmers et al. 2022). One scale for all channels then has steps so wide that the ordinary channels are rounded to almost nothing.
#
# Our model is too small to have grown such channels. We can give it some without changing what it computes. Where a channel is made in one place and read in another, as between a norm's gain and the matrices behind it, multiply it by $f_j$ there and divide it by $f_j$ here:
#
# $$W x = \big(W \operatorname{diag}(f)^{-1}\big)\big(\operatorname{diag}(f)\, x\big).$$
#
# A block has four such *seams*: norm to q, k, v; v to o (attention mixes positions, not channels); norm to gate, up; up to down (the gate multiplies each channel by itself).


# %%
def seams(model: nn.Module):
    """Where channels can be rescaled: (parameter that makes them, its readers' names).

    The parameter is a gain (i,) or a matrix (i, ...) whose rows make the channels. With
    grouped key-value heads several columns of o read one row of v: no seam there.
    """
    for n, block in enumerate(model.blocks):
        attention, mlp = block.attention, block.mlp
        if len(attention.v_proj.weight) == attention.o_proj.in_features:
            yield attention.v_proj.weight, [f"{n}.attention.o_proj"]
        yield block.attention_norm.weight, [f"{n}.attention.{x}_proj" for x in "qkv"]
        yield mlp.up_proj.weight, [f"{n}.mlp.down_proj"]
        yield block.mlp_norm.weight, [f"{n}.mlp.gate_proj", f"{n}.mlp.up_proj"]


@torch.no_grad()
def rescale(model: nn.Module, factor) -> nn.Module:
    """A copy that computes the same, its channels at each seam f times as large.

    factor: (first reader's name, w (o, i) of all readers) -> f (i,), positive, finite.
    """
    model = copy.deepcopy(model)
    layers = matrices(model)
    for made, readers in seams(model):
        f = factor(readers[0], torch.cat([layers[x].weight for x in readers]))
        if f.shape != (len(made),) or not (f.isfinite() & (f > 0)).all():
            raise ValueError(f"need {len(made)} positive, finite factors, got {f}")
        made.mul_(f if made.ndim == 1 else f[:, None])
        for x in readers:
            layers[x].weight.div_(f)
    return model


# %% [markdown]
# In real numbers any $f$ would do. In floating point a product is rounded, unless $f$ is a power of two: that moves the exponent and leaves every bit of the significand alone. Then each product inside $Wx$ is the same number as before, and so is each sum.


# %%
def plant_outliers(model: nn.Module, channels: list[int], s: float) -> nn.Module:
    """A copy whose logits are the same to the bit, with some channels s times as large.

    channels: indices below the model's dim, the same at every seam. s: a power of two.
    Exact as long as nothing over- or underflows. ValueError for other s or channels.
    """
    if not (0 < s < math.inf and math.frexp(s)[0] == 0.5):
        raise ValueError(f"s must be a power of two, got {s}: others change the logits")
    if not channels or not all(0 <= c < model.config.dim for c in channels):
        raise ValueError(f"channels must lie in 0..{model.config.dim - 1}: {channels}")

    def factor(name, w):
        f = torch.ones_like(w[0])
        f[channels] = s
        return f

    return rescale(model, factor)


# %%
channels = [17, 59, 101]
planted = plant_outliers(model, channels, s=64)
with torch.no_grad():
    x = windows[:4, :-1]
    assert torch.equal(planted(x), model(x)), "a power of two changes no bit"
    off = rescale(model, lambda name, w: torch.full_like(w[0], 3))
    assert not torch.equal(off(x), model(x)), "3 is not a power of two: bits change"
    torch.testing.assert_close(off(x), model(x), atol=1e-3, rtol=1e-3)
print("logits equal bit for bit:", torch.equal(planted(x), model(x)))

# %% [markdown]
# To the user, the planted model *is* the model. Now round what its layers read. We simulate: round, scale back, go on in float (*fake quantization*). A product of 8-bit integers with exact sums, scaled at the end, would give the same numbers up to float rounding.
# An input can have one scale for the whole tensor (`axis=None`) or one for each token (`axis=-1`). Both are taken from the values at hand; with one scale for the tensor a served model would fix it beforehand, from a calibration text.


# %%
def absmax_round(x: Tensor, bits: int, axis=None) -> Tensor:
    """Round to `bits` by absmax and scale back. x: float; axis: what shares a scale."""
    q, scale = absmax_quantize(x, bits, axis)
    return q * scale


def change_inputs(model: nn.Module, change) -> nn.Module:
    """From now on each matrix reads change(name, x) for x (..., i). In place.

    Matrices that read the same tensor, as q, k, v do, share what the first reads.
    """
    last = {}

    def read(x, name):
        if x is not last.get("x"):
            last.update(x=x, changed=change(name, x))
        return (last["changed"],)

    for name, layer in matrices(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: read(args[0], name))
    return model


# %% [markdown]
# What rounding does to a vector with one outlier: a scale for the tensor is set by the largest token, a scale for the token by its largest channel. Neither helps a small channel beside a large one.

# %%
x = torch.tensor([[1.0, 0.5, 0.25], [64.0, 0.5, 0.25]])  # 2 tokens, 3 channels
for axis, text in ((None, "one scale"), (-1, "one a token")):
    rows = absmax_round(x, 8, axis).tolist()
    print(text.ljust(12), *([f"{entry:.3f}" for entry in row] for row in rows))
assert torch.equal(absmax_round(x, 8, -1)[0], absmax_round(4 * x, 8, -1)[0] / 4)

# %% [markdown]
# A rung of this section takes its weights from a rewritten model, rounds them, and rounds the inputs.


# %%
def as_they_are(name: str, x: Tensor) -> Tensor:
    return x


def rung_of(
    name: str, source: nn.Module, weights, inputs=as_they_are, control: bool = False
) -> dict:
    """A rung on the weights and gains of `source`, a model that computes the same.

    weights: (name, w) -> (w_hat, stored tensors); inputs: (name, x) -> x_hat.
    """
    layers, state = matrices(source), source.state_dict()
    gains = {k: v for k, v in state.items() if "norm" in k}

    def change(rounded):
        rounded.load_state_dict(gains, strict=False)
        change_inputs(rounded, inputs)

    def method(name, w):
        return weights(name, layers[name].weight.detach())

    return rung(name, method, control=control, change=change)


def int8_tensor(name: str, w: Tensor):  # one scale for the matrix
    q, scale = absmax_quantize(w, 8)
    return q * scale, [q, scale]


def int8_input(name: str, x: Tensor) -> Tensor:  # one scale for the tensor
    return absmax_round(x, 8)


# %%
predict(
    "Three channels of 128 are 64 times as large as before. The logits have not "
    "changed by a bit. Weights and activations are rounded to 8 bits, one scale a "
    "tensor. By how much does the loss rise?",
    [
        "not measurably: the function is the same, and 8 bits were enough for it",
        "by some hundredths of a nat, as 4-bit weights cost",
        "by more than a nat: most of what training gained is lost",
    ],
    answer=2,
    why="Rounding does not see the function, it sees the numbers. Of the 127 steps on "
    "each side of zero, a channel 64 times smaller than the largest is left with two; "
    "and in the matrices, where the planted channels' columns are 64 times smaller "
    "than before, it is the weights of those columns that are left with two.",
)


# %%
def int8_rows(name: str, w: Tensor):  # one scale a row
    q, scale = absmax_quantize(w, 8, axis=-1)
    return q * scale, [q, scale]


def int8_tokens(name: str, x: Tensor) -> Tensor:  # one scale a token
    return absmax_round(x, 8, axis=-1)


# %% tags=["trained"]
plain = rung_of("W8A8 per tensor", model, int8_tensor, int8_input)
naive = rung_of("W8A8 per tensor, planted", planted, int8_tensor, int8_input)
finer = rung_of("W8A8 per token, planted", planted, int8_rows, int8_tokens)
report("w8a8", plain["difference"], "nats, 8 bits a tensor, no outliers")
report("w8a8_planted", naive["difference"], "nats, outliers planted")
report("w8a8_planted_token", finer["difference"], "nats, a scale a row and a token")
assert naive["difference"] > 1 > 20 * plain["difference"] or budget_fraction() < 1, (
    "one scale a tensor should break on planted outliers, and only on them"
)
assert naive["difference"] > finer["difference"] > 5 * plain["difference"] or (
    budget_fraction() < 1
), "scales for tokens and rows help, but each token has the outliers in it"

# %% [markdown]
# A scale for each token and each row is the finest that an integer product allows: a scale for each input channel could not be taken out of the sum over channels. It helps, but every token has the same large channels, so it cannot cure. Three ways out follow.
#
# ### Keep them in float
# LLM.int8() (Dettmers et al. 2022) splits the product. Columns of $x$ whose largest entry exceeds a threshold, the set $O$, stay in float, with their columns of $W$; all others are rounded, with scales that no longer see the outliers:
#
# $$W x \approx W_{O}\, x_{O} + \hat W_{\bar O}\, \hat x_{\bar O}.$$
#
# The paper's threshold is 6, for models whose ordinary channels are all of one size. Ours are not: what `down` reads is several times larger than what `q` reads. So we set it at 6 times the median channel's maximum.


# %%
def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """Which columns of x (n, i) exceed the threshold somewhere, (i,) bool."""
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    return x.abs().amax(0) > threshold


def quantize_except(x: Tensor, kept: Tensor, bits: int, axis=None) -> Tensor:
    """Fake quantization of the columns not kept. x: (..., i); kept: (i,) bool."""
    if kept.dtype != torch.bool or kept.shape != x.shape[-1:]:
        raise ValueError(f"kept must be ({x.shape[-1]},) bool, got {kept}")
    rounded = absmax_round(x.masked_fill(kept, 0), bits, axis)
    return torch.where(kept, x, rounded)


# %% [markdown]
# Both ends are exact: threshold 0 keeps every column that is not zero and gives the float product, an infinite threshold is plain W8A8.


# %%
def split_product(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    """x W^T with the columns of x above the threshold in float, the rest in 8 bits."""
    kept = outlier_columns(x, threshold)
    x_hat, w_hat = (quantize_except(z, kept, 8, axis=-1) for z in (x, w))
    return x_hat @ w_hat.T


g = torch.Generator().manual_seed(0)
x, w_toy = torch.randn(50, 16, generator=g), torch.randn(8, 16, generator=g)
x[:, 3] *= 100
exact = x @ w_toy.T
assert torch.equal(split_product(x, w_toy, 0), exact)
rounded = absmax_round(x, 8, -1) @ absmax_round(w_toy, 8, -1).T
assert torch.equal(split_product(x, w_toy, math.inf), rounded)
one_kept = (split_product(x, w_toy, 20) - exact).std()
print(
    f"one column of 16 kept: {(rounded - exact).std() / one_kept:.0f} times less error"
)

# %% [markdown]
# Which columns are kept is read off calibration text. The rest of a matrix is stored in 8 bits; the kept columns are stored whole, and counted. The control keeps as many columns, drawn at random.


# %%
def permuted(values: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The same values on other channels of the same layers: a control."""
    shuffled = {}
    for name, v in values.items():
        g = torch.Generator().manual_seed(seed)  # q, k, v read one input: one order
        shuffled[name] = v[torch.randperm(len(v), generator=g)]
    return shuffled


def split_rung(name: str, kept: dict[str, Tensor], control: bool = False) -> dict:
    """W8A8 of the planted model, a scale a row and a token, with some columns kept."""

    def weights(name, w):
        q, scale = absmax_quantize(w.masked_fill(kept[name], 0), 8, axis=-1)
        w_hat = torch.where(kept[name], w, q * scale)
        columns = kept[name].nonzero().short()
        return w_hat, [q[:, ~kept[name]], scale, w[:, kept[name]], columns]

    def inputs(name, x):
        return quantize_except(x, kept[name], 8, axis=-1)

    return rung_of(name, planted, weights, inputs, control)


# %% tags=["trained"]
planted_x = layer_inputs(planted, calibration[:8])  # name -> (n, i)
kept = {}
for name, x in planted_x.items():
    kept[name] = outlier_columns(x, 6 * x.abs().amax(0).median().item())
share = torch.cat(list(kept.values())).double().mean().item()
split = split_rung("LLM.int8() split, planted", kept)
unlucky = split_rung("random columns kept, planted", permuted(kept), control=True)
report("split_share", 100 * share, "% of columns kept in float")
report("split_planted", split["difference"], "nats, LLM.int8() split")
report("split_random", unlucky["difference"], "nats, as many random columns kept")
found = [columns.nonzero().flatten().tolist() for columns in kept.values()]
assert all(columns == channels for columns in found), "what was planted, no more"
assert split["difference"] < unlucky["difference"] / 5 or budget_fraction() < 1, (
    "the columns that are kept must be the right ones"
)

# %% [markdown]
# ### Move them into the weights
# SmoothQuant (Xiao et al. 2023) keeps nothing in float. It *migrates* the difficulty: each input channel is divided by
#
# $$s_j = \frac{\max|X_j|^{\alpha}}{\max|W_j|^{1-\alpha}}$$
#
# and its column of $W$ multiplied by it, $\alpha = \tfrac12$ sharing the trouble equally: afterwards activations and weights have the same largest entry in each channel. The division costs nothing at run time, because it is folded into whatever makes the channel: the gain of the norm before q, k, v and before gate, up, as in the paper, and here also the rows of v and up.
# It is the rewrite with which we planted, with $f = 1 / s$.


# %%
def smoothing(x: Tensor, w: Tensor, alpha: float = 0.5) -> Tensor:
    """SmoothQuant's factors, (i,): max|X_j|^alpha / max|W_j|^(1 - alpha).

    x: (n, i) inputs; w: (o, i); alpha: 0..1, else ValueError. (Xiao et al. 2023, eq. 4)
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0..1, got {alpha}")
    x_max, w_max = (z.abs().amax(0).clamp(min=1e-5) for z in (x, w))  # dead channels
    return x_max**alpha / w_max ** (1 - alpha)


def migrate(model: nn.Module, inputs: dict[str, Tensor], factor):
    """The model with channel j of each seam divided by f_j, and those f by name.

    inputs: name -> (n, i); factor: (x (n, i), w (o, i)) -> f (i,).
    """
    factors = {}

    def inverse(name, w):
        factors[name] = factor(inputs[name], w)
        return 1 / factors[name]

    return rescale(model, inverse), factors


# %% [markdown]
# Here is what has to be said before the result: on the planted model, this cannot fail. Planting made $\max|X_j|$ of some channels 64 times larger and $\max|W_j|$ 64 times smaller; that makes $s_j$ exactly $64^{\alpha}\, 64^{1-\alpha} = 64$ times larger, for any $\alpha$.
# SmoothQuant undoes the planting *by construction*, and arrives at the model that it would have made of the unplanted one:

# %%
trained_x = layer_inputs(model, calibration[:8])
smooth_model, smooth_factors = migrate(model, trained_x, smoothing)
smoothed, planted_factors = migrate(planted, planted_x, smoothing)
for (name, ours), theirs in zip(
    smoothed.named_parameters(), smooth_model.parameters(), strict=True
):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=name)
with torch.no_grad():
    tokens = windows[:4, :-1]
    torch.testing.assert_close(smoothed(tokens), model(tokens), atol=1e-3, rtol=1e-3)

# %% [markdown]
# So the first row below shows that the algebra is right, no more. Whether migration helps on outliers that nobody planted for it is the question of section 11. The control divides by the same factors, permuted among channels: a rewrite just as harmless, aimed at nothing.

# %% tags=["trained"]
aimless = permuted(planted_factors)
shuffled = rescale(planted, lambda name, w: 1 / aimless[name])
smooth_row = rung_of("SmoothQuant W8A8, planted", smoothed, int8_tensor, int8_input)
shuffled_row = rung_of(
    "SmoothQuant permuted, planted", shuffled, int8_tensor, int8_input, control=True
)
report("smoothquant_planted", smooth_row["difference"], "nats, undone by construction")
report("smoothquant_permuted", shuffled_row["difference"], "nats, the same permuted")
assert smooth_row["difference"] < 0.02 or budget_fraction() < 1
assert shuffled_row["difference"] > 0.5 or budget_fraction() < 1, (
    "the same factors on other channels should not undo anything"
)

# %% [markdown]
# The control does worse than no cure at all: it leaves the outliers where they are and makes new ones in the weights. Migration has to hit.

# %% tags=["plot"]
figure, axes = plt.subplots(1, 2, sharey=True, figsize=(7.2, 3.4))
name = "1.attention.o_proj"
stages = (
    ("planted", VERMILION, planted, planted_x, 6),
    ("as trained", BLUE, model, trained_x, 3),
    ("after migration", GREEN, smoothed, layer_inputs(smoothed, calibration[:8]), 3),
)
order = trained_x[name].abs().amax(0).argsort()
first = min((order == c).nonzero().item() for c in channels)
for stage, color, source, read, size in stages:
    columns = matrices(source)[name].weight.detach()
    for axis, z in zip(axes, (read[name], columns), strict=True):
        largest = z.abs().amax(0)[order]
        axis.plot(largest, "o", color=color, markersize=size)
        if stage == "planted":
            label(axis, first, largest[first], stage, color, xytext=(8, 0))
        else:
            label(axis, 128, largest[-30:].median(), stage, color)
for axis, title in zip(
    axes, ("What a layer reads", "The columns that meet it"), strict=True
):
    axis.set(xlabel="channel (sorted)", title=title, xlim=(-4, 180), yscale="log")
    axis.set_xticks([0, 64, 127])
axes[0].set(ylabel="largest absolute value")
show(
    figure,
    "fig_outliers",
    "The largest absolute value in each of 128 channels, on logarithmic axes: left "
    "of the inputs of one layer, right of the columns of its matrix. As trained, "
    "neither has a channel that stands out. Planting lifts three channels of the "
    "inputs by a factor of 64 and lowers their columns as much. After migration inputs "
    "and columns have the same maxima, and again no channel stands out.",
)

# %% [markdown]
# ### Make room for the columns that matter
# Weight-only rounding meets the same channels from the other side: an error in a column that large inputs meet is multiplied by them. AWQ (Lin et al. 2024) multiplies column $j$ by $s_j > 1$ before rounding, and folds $1/s_j$ away as SmoothQuant does. Within a group the step stays about the same, as long as the group's largest weight is another's; so the error of column $j$ shrinks by $s_j$.
# How far to go, a search decides, for each seam:
#
# $$s = \operatorname{mean}|X|^{\alpha},\qquad \alpha^* = \arg\min_{\alpha \in \{0, .1, \dots, 1\}} \big\| \big(Q(W \operatorname{diag}(s)) \operatorname{diag}(s)^{-1} - W\big) X^\top \big\|^2 .$$
#
# $\alpha = 0$ is rounding to nearest. The norm is computed from $X^\top X$, as GPTQ's was.


# %%
def scaled_error(w: Tensor, s: Tensor, hessian: Tensor, bits: int, group_size: int):
    """Squared error of the outputs: w (o, i) rounded with its columns times s."""
    codes, scale = quantize_groups(w * s, bits, group_size)
    return output_error(w, dequantize_groups(codes, scale) / s, hessian)


def awq_scale(x: Tensor, w: Tensor, bits: int, group_size: int = 32) -> Tensor:
    """AWQ's factors, (i,): mean|X_j|^alpha, with the alpha of least output error.

    x: (n, i) calibration inputs; w: (o, i). (Lin et al. 2024, section 3.2)
    """
    hessian, size = x.T @ x / len(x), x.abs().mean(0).clamp(min=1e-5)
    size = size / size.log().mean().exp()  # float16 scales stay in range

    def error(alpha):
        return scaled_error(w, size**alpha, hessian, bits, group_size)

    return size ** min([i / 10 for i in range(11)], key=error)


# %% [markdown]
# The error of each layer's output on other calibration text than was searched on, beside the error of rounding to nearest (geometric mean over the layers). As a control, the same factors on other channels.


# %%
def against_nearest(model, inputs, factors: dict[str, Tensor], bits: int) -> float:
    """Output error with these factors over that of rounding to nearest, over layers."""
    ratios = []

    def compare(name, w):
        s, h = factors[name], inputs[name].T @ inputs[name] / len(inputs[name])
        ours, plain = (scaled_error(w, f, h, bits, 32) for f in (s, torch.ones_like(s)))
        ratios.append(ours / plain)
        return torch.ones_like(s)

    rescale(model, compare)
    return math.exp(np.log(ratios).mean())


# %% tags=["trained"]
for kind, source, read, bits in (
    ("planted", planted, planted_x, 4),
    ("trained", model, trained_x, 4),
    ("trained", model, trained_x, 3),
):
    half = {k: len(z) // 2 for k, z in read.items()}
    fit = {k: z[: half[k]] for k, z in read.items()}
    other = {k: z[half[k] :] for k, z in read.items()}
    rescaled, factors = migrate(
        source, fit, lambda x, w, bits=bits: awq_scale(x, w, bits)
    )
    ratio = against_nearest(source, other, factors, bits)
    control = against_nearest(source, other, permuted(factors), bits)
    report(f"awq_{kind}_{bits}", ratio, "of round-to-nearest's output error")
    report(f"awq_{kind}_{bits}_permuted", control, "of it, factors permuted")
    assert ratio < 1 < control, "found on one text, the factors should hold on another"
awq_model, awq_factors = rescaled, factors  # of the last case

# %% tags=["trained"]
aimless = permuted(awq_factors)
awq_control = rescale(model, lambda name, w: 1 / aimless[name])
awq_row = rung_of("AWQ, 3 bits, groups of 32", awq_model, nearest(3, 32))
rung_of("AWQ permuted, 3 bits", awq_control, nearest(3, 32), control=True)
plain_row = plain_rungs["3 bits, groups of 32"]
awq_gain = plain_row["difference"] - awq_row["difference"]
report("awq_gain", awq_gain, "nats less than rounding to nearest")
more, error = paired("AWQ, 3 bits, groups of 32", "3 bits, groups of 32")
report("awq_gain_error", error, "nats, its standard error, paired")
report("awq_kl", awq_row["kl"] / plain_row["kl"], "of rounding to nearest's KL")
others = (plain_row, table["AWQ permuted, 3 bits"])
assert awq_row["kl"] < min(row["kl"] for row in others) or budget_fraction() < 1
assert abs(awq_gain) < 0.02 or budget_fraction() < 1, "no outliers, not much to gain"

# %% [markdown]
# With planted outliers the search finds them, and on the model as trained it finds something real, if small: the error of the outputs goes down on text that it did not see, and the permuted factors raise it. The loss hardly moves: paired, the gain over rounding to nearest is little more than its error. KL, which is steadier,
# puts AWQ before both. A model without salient channels gives AWQ nothing to save, which says little about models that have them.

# %% [markdown]
# ## 11 · Going further: four bits for activations too
# *Live, 8 minutes.*
#
# Section 10 planted the trouble that it cured. Now the model as it was trained, at a width where activations hurt by themselves: W4A4, one scale a row for weights, one a token for activations. Three ways: round as it comes, migrate with SmoothQuant, or *rotate*.
#
# For an orthogonal matrix $Q$, $W x = (W Q^\top)(Q x)$: nothing changes until something is rounded. What is gained? Let a vector of $d$ channels with root mean square $\sigma$ have its largest entry at $p\,\sigma$; call $p$ its *peak*. Symmetric rounding to $b$ bits has steps $\Delta = p\,\sigma / (2^{b-1} - 1)$ and a mean squared error near $\Delta^2 / 12$, so that
#
# $$\mathrm{SNR} = \frac{\sigma^2}{\Delta^2 / 12} = \frac{12\,(2^{b-1} - 1)^2}{p^2} .$$
#
# Halving the peak is worth one bit. A vector with a single non-zero channel has $p = \sqrt d$. Each entry of $Qx$, with a random $Q$, is a sum over all channels with random signs, close to normal whatever $x$ was, with the same $\sigma$; and the largest of $d$ normal numbers is near $\sqrt{2 \ln d}\;\sigma$, about 3. An outlier is not removed but shared out.
#
# This is the idea of QuaRot (Ashkboos et al. 2024). Its $Q$ is a Hadamard matrix, entries $\pm 1/\sqrt d$, times random signs: applied by $d \log_2 d$ additions instead of $d^2$ multiplications, and made from a seed, so that nothing is stored.


# %%
def hadamard(n: int) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(n), (n, n) float64, orthogonal; n = 2^k."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"Sylvester's construction needs a power of two, got {n}")
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


def rotation(n: int, block: int = 128, seed: int = 0) -> Tensor:
    """Random signs, then a Hadamard matrix on each block: (n, n) float64."""
    if n % block:
        raise ValueError(f"blocks of {block} do not divide {n} channels")
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (n,), generator=g).double() * 2 - 1
    return torch.block_diag(*[hadamard(block)] * (n // block)) * signs


def signed_permutation(n: int, seed: int = 0) -> Tensor:
    """Channels shuffled, half of them negated: (n, n) float64, orthogonal."""
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (n,), generator=g).double() * 2 - 1
    return torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=g)] * signs


# %% [markdown]
# Our matrices read 128 or 384 channels, so the wide ones are rotated in three blocks of 128. The check is in float64, where rounding errors leave no doubt: the model, with every matrix replaced by $WQ^\top$ and every input by $Qx$, is the same function.


# %%
def rotated(model: nn.Module, turn) -> nn.Module:
    """A copy that computes the same, each matrix reading Q x; turn: i -> Q (i, i)."""
    model = copy.deepcopy(model)
    qs = {}
    for layer in matrices(model).values():
        q = qs.setdefault(layer.in_features, turn(layer.in_features))
        qs[layer.in_features] = q = q.to(layer.weight)
        layer.weight.data = layer.weight @ q.T
    return change_inputs(model, lambda name, x: x @ qs[x.shape[-1]].T)


exact = copy.deepcopy(model).double()
with torch.no_grad():
    tokens = windows[:2, :-1]
    for turn in (rotation, signed_permutation):
        same = rotated(exact, turn)(tokens)
        torch.testing.assert_close(same, exact(tokens), atol=1e-10, rtol=0)
spike = torch.zeros(128, dtype=torch.float64)
spike[5] = 1.0
print(f"largest entry of a spike: 1, rotated {(rotation(128) @ spike).abs().max():.4f}")

# %% [markdown]
# The control for a rotation is an orthogonal matrix that mixes nothing: a permutation with signs. Absmax rounding does not care about order or sign, so it *commutes* with the control, to the bit, and the control's row in the table must be that of naive rounding, up to the order of sums.

# %%
x = torch.randn(20, 128, generator=torch.Generator().manual_seed(1))
q = signed_permutation(128).float()
assert torch.equal(absmax_round(x @ q.T, 4, -1), absmax_round(x, 4, -1) @ q.T)

# %% [markdown]
# How peaked a vector is can be measured by its peak, or by its *kurtosis*, $\operatorname{mean} x^4 / (\operatorname{mean} x^2)^2$, which is 3 for normal numbers.


# %%
def peak(x: Tensor) -> float:
    """Largest absolute entry of a token over its root mean square, mean over tokens."""
    return (x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean().item()


def kurtosis(x: Tensor) -> float:
    """mean x^4 / (mean x^2)^2 of a token's channels, mean over tokens; 3 if normal."""
    return (x.pow(4).mean(-1) / x.square().mean(-1).square()).mean().item()


# %% [markdown]
# The formula above, held against vectors with one entry of growing size, at 8 bits:

# %%
x = torch.randn(100, 128, generator=torch.Generator().manual_seed(2))
for size in (1, 10, 40):
    x[:, 0] = size
    rule = 10 * math.log10(12 * 127**2) - 20 * math.log10(peak(x))
    print(f"peak {peak(x):5.2f}: {rule:.0f} dB by the rule")
    assert abs(snr_db(x, absmax_round(x, 8, -1)) - rule) < 0.5

# %% [markdown]
# Now the model's own inputs: the peak, averaged over tokens, by who reads them, rotated by Hadamard blocks of growing size. A block of 1 is signs alone, the control.

# %% tags=["trained"]
blocks = (1, 2, 8, 32, 128)
print("block".ljust(14), *(f"{b:6d}" for b in blocks), "   kurtosis, 1 and 128")
for kind in ("q_proj", "o_proj", "gate_proj", "down_proj"):
    reads = [z for name, z in trained_x.items() if name.endswith(kind)]
    turned = {b: [z @ rotation(z.shape[1], b).float().T for z in reads] for b in blocks}
    peaks = [np.mean([peak(z) for z in turned[b]]) for b in blocks]
    tails = [np.mean([kurtosis(z) for z in turned[b]]) for b in (1, 128)]
    print(kind.ljust(14), *(f"{p:6.2f}" for p in peaks), *(f"{k:9.1f}" for k in tails))
report("peak_before", peaks[0], "largest over rms, what down reads, as it comes")
report("peak_after", peaks[-1], "the same rotated")
smooth_reads = [
    z / smooth_factors[k] for k, z in trained_x.items() if k.endswith("down_proj")
]
migrated = np.mean([peak(z) for z in smooth_reads])
report("peak_migrated", migrated, "the same divided by SmoothQuant's factors")
report("peak_normal", math.sqrt(2 * math.log(128)), "sqrt(2 ln d), d = 128")
assert peaks[0] > 1.5 * peaks[-1] or budget_fraction() < 1, "a rotation flattens"

# %%
predict(
    "W4A4 on the model as trained costs several times what 4-bit weights alone cost. "
    "Which helps more?",
    [
        "SmoothQuant: it looks at the data, a random rotation does not",
        "the rotation, and it takes away more than half of the loss",
        "both about the same",
    ],
    answer=1,
    why="SmoothQuant can only trade one channel's trouble between activations and "
    "weights, and at 4 bits weights have no precision to spare. What peaks here are "
    "single tokens in single channels, which no factor per channel catches.",
)


# %%
def int4_tokens(name: str, x: Tensor) -> Tensor:  # one scale a token
    return absmax_round(x, 4, axis=-1)


def w4a4(name: str, source: nn.Module, turn=None, control: bool = False) -> dict:
    """4 bits a weight with a scale a row, 4 bits an activation with a scale a token."""
    if turn is None:
        return rung_of(name, source, nearest(4), int4_tokens, control)
    q = {n: turn(n).float() for n in {x.in_features for x in matrices(source).values()}}
    return rung_of(
        name,
        rotated(source, turn),
        nearest(4),
        lambda name, x: int4_tokens(name, x @ q[x.shape[-1]].T),
        control,
    )


# %% tags=["trained"]
aimless = permuted(smooth_factors)
smooth_control = rescale(model, lambda name, w: 1 / aimless[name])
w4a4("W4A4", model)
w4a4("W4A4 SmoothQuant", smooth_model)
for alpha in (0.3, 0.7):
    source, _ = migrate(
        model, trained_x, lambda x, w, alpha=alpha: smoothing(x, w, alpha)
    )
    w4a4(f"W4A4 SmoothQuant, alpha {alpha}", source)
w4a4("W4A4 SmoothQuant permuted", smooth_control, control=True)
w4a4("W4A4 rotation", model, rotation)
w4a4("W4A4 rotation, other signs", model, lambda n: rotation(n, seed=1))
w4a4("W4A4 signed permutation", model, signed_permutation, control=True)
arms = {name: row for name, row in table.items() if name.startswith("W4A4")}
loss = {name: row["difference"] for name, row in arms.items()}
for name in loss:
    if "alpha" not in name and "other" not in name:
        report(name.lower().replace(" ", "_"), loss[name], "nats")
best_smooth = min(x for name, x in loss.items() if "SmoothQuant" in name)
report("w4a4_smoothquant_best", best_smooth, "nats, the best of three alphas")
report("w4a4_rotation_2", loss["W4A4 rotation, other signs"], "nats, other signs")
report("w4a4_error", max(row["error"] for row in arms.values()), "nats at most")
assert loss["W4A4 rotation"] < 0.6 * loss["W4A4"] or budget_fraction() < 1
assert loss["W4A4 rotation"] < 0.6 * best_smooth or budget_fraction() < 1
gap = loss["W4A4 signed permutation"] - loss["W4A4"]
assert abs(gap) < 0.003 or budget_fraction() < 1, "what mixes nothing changes nothing"

# %% tags=["plot"]
figure, axis = plt.subplots(figsize=(7.2, 4.2))
colors = {"as it comes": VERMILION, "SmoothQuant": GREEN, "rotation": BLUE}
for y, (name, row) in enumerate(reversed(arms.items())):
    text = name.removeprefix("W4A4").strip() or "as it comes"
    color = colors.get(text.split(",")[0], MUTED)
    spread = 1.96 * row["error"]
    marker = "s" if row["control"] else "o"
    axis.errorbar(row["difference"], y, xerr=spread, fmt=marker, color=color, capsize=3)
    text += " (control)" if row["control"] else ""
    label(axis, row["difference"] + spread, y, text, color)
only = plain_rungs["4 bits, one a row"]["difference"]
axis.axvline(only, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
label(axis, only, 7.55, "weights alone in 4 bits", MUTED)
axis.set(
    xlabel="loss above the unrounded model (nats per character, 95 % interval)",
    title="W4A4: mixing the channels helps, rescaling them does not",
    xlim=(0, 1.45 * max(loss.values())),
    ylim=(-0.5, 7.9),
    yticks=[],
)
show(
    figure,
    "fig_w4a4",
    "Loss differences of eight ways to round weights and activations to 4 bits, with "
    "intervals. A rotation loses less than half of what the others lose, and lies "
    "nearest to the line of 4-bit weights with float activations. A signed permutation "
    "equals rounding as it comes; SmoothQuant gains little; its permuted control is "
    "worst.",
)

# %% [markdown]
# The rotation takes back most of what rounding the activations cost, without having looked at a single one. Its control, orthogonal too, changes nothing: it is the mixing that helps. (The intervals are over windows; how much the draw of the signs matters, the second draw shows.)
#
# SmoothQuant gains little here at the best of three $\alpha$, and nothing at the usual one. Its factors are aimed, since permuted they do harm; but they act on channels, and `down`'s inputs peak in single tokens: dividing by one factor a channel left their peak almost as it was. On a model with outlier channels, at 8 bits, the
# same method was all that was needed. What the activations' trouble *is* decides which cure works.
#
# A rotation at run time costs additions. QuaRot saves most of them: a rotation of the whole residual stream commutes with RMSNorm once the gains are folded into the next matrices, so that it too can be folded into weights, and only those inside attention and before `down` stay.

# %% [markdown]
# ## 12 · Going further: training against the rounding
# *Live and recorded, 10 minutes.*
#
# At 4 bits a finished model can simply be rounded. Two bits leave four levels, and no rounding of the finished weights to four levels is good. But the weights need not stay where they are: train on with the rounding in the loop, and
# they move to where it hurts less. This is *quantization-aware training*, QAT. The optimizer moves a float *latent* matrix $W$; the model computes with its rounding $\hat W$ (*fake quantization*: floats that lie on the grid).
#
# First the grids. With $n$ levels a step $s$ apart, symmetric about zero,
#
# $$q = \operatorname{clamp}\!\Big(\operatorname{round}\!\Big(\frac{w}{s} + \frac{n-1}{2}\Big),\, 0,\, n - 1\Big),\qquad \hat w = \Big(q - \frac{n-1}{2}\Big)\, s .$$
#
# *Two bits*: $n = 4$, the levels $\pm\frac12 s$ and $\pm\frac32 s$, where $s$ is the root mean square of a group of 32. `quantize_groups` with 2 bits has only $-s, 0, s$: one code of four lies idle, and a scale from the largest magnitude sets levels
# where there are hardly any weights. Of the two-bit grids with one scale a group, computed and not searched for, this one loses least when a finished model is rounded to it, so what training wins is not won from a weak start.
# *Ternary*: $n = 3$, the levels $-1, 0, 1$ times the mean magnitude of the whole matrix (BitNet b1.58, Ma et al. 2024).


# %%
def round_levels(w: Tensor, step: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The nearest of n levels, `step` apart and symmetric about zero.

    w: float; step: positive, broadcastable to w. Returns w_hat and codes 0 .. n - 1.
    """
    middle = (n - 1) / 2
    codes = (w / step + middle).round().clamp(0, n - 1)
    return (codes - middle) * step, codes.to(torch.uint8)


def two_bits(w: Tensor, group_size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Four levels, as far apart as the root mean square of each group of a row.

    w: (o, i) float. Returns w_hat (o, i), codes (o, i) uint8, step (o, n) float16.
    """
    check_input(w, 2)
    check_groups(w, group_size)
    groups = rearrange(w, "o (n g) -> o n g", g=group_size)
    step = groups.square().mean(-1, keepdim=True).sqrt().clamp(min=2**-14).half()
    w_hat, codes = round_levels(groups, step.float(), 4)
    return w_hat.flatten(1), codes.flatten(1), step.squeeze(-1)


def ternary(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels -1, 0 and 1 times the mean magnitude (BitNet b1.58, Ma et al. 2024).

    w: (o, i) float. Returns w_hat (o, i), codes (o, i) uint8, step () float16.
    """
    check_input(w, 2)
    step = w.abs().mean().clamp(min=2**-14).half()
    return *round_levels(w, step.float(), 3), step


# %% [markdown]
# **Bytes.** A ternary code holds $\log_2 3 \approx 1.58$ bits, and no byte can be cut into such pieces. But $3^5 = 243$ is less than 256, so a byte holds five of them, read as a number in base 3: 1.6 bits each.


# %%
def powers_of_three() -> Tensor:
    """1, 3, 9, 27, 81: what the five codes of a byte count."""
    return 3 ** torch.arange(5, dtype=torch.int32)


def pack_ternary(codes: Tensor) -> Tensor:
    """Five codes a byte, the first counting least; the last byte is filled with 0.

    codes: integers 0 .. 2, any shape. Returns (bytes,) uint8. Raises ValueError for
    other codes.
    """
    if codes.numel() == 0 or codes.min() < 0 or codes.max() > 2:
        raise ValueError("ternary codes must be 0, 1 or 2, and at least one")
    flat = F.pad(codes.flatten().int(), (0, -codes.numel() % 5))
    return (flat.unflatten(0, (-1, 5)) * powers_of_three()).sum(-1).to(torch.uint8)


def unpack_ternary(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The codes that pack_ternary packed, uint8; `shape` is theirs."""
    n = math.prod(shape)
    if packed.numel() != -(-n // 5):
        raise ValueError(f"{packed.numel()} bytes do not hold {n} ternary codes")
    codes = packed.int()[:, None] // powers_of_three() % 3
    return codes.flatten()[:n].reshape(shape).to(torch.uint8)


w = matrices(model)["0.mlp.up_proj"].weight.detach()
w_hat, codes, step = ternary(w)
packed = pack_ternary(codes)
restored = (unpack_ternary(packed, w.shape).float() - 1) * step.float()
assert torch.equal(restored, w_hat), "the bytes and the step restore the matrix"
print(f"{8 * packed.nbytes / w.numel():.3f} bits a weight, and 16 for the step")

# %% [markdown]
# Rounded without training, as all rungs so far. The control is the rung of section 3 with the same groups and the same two bits, one code idle.


# %%
def by_two_bits(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
    w_hat, codes, step = two_bits(w)
    return w_hat, [pack_bits(codes.int() - 2, 2), step]


def by_ternary(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
    w_hat, codes, step = ternary(w)
    return w_hat, [pack_ternary(codes), step]


# %% tags=["trained"]
rung("2 bits, four levels", by_two_bits)
rung("ternary", by_ternary)
four, idle = table["2 bits, four levels"], plain_rungs["2 bits, groups of 32"]
assert four["bits"] == idle["bits"] == 2.5 and table["ternary"]["bits"] < 1.602
assert four["difference"] < 0.5 * idle["difference"] or budget_fraction() < 1

# %% [markdown]
# **The straight-through estimator.** Rounding is a staircase: its derivative is 0 almost everywhere, so no gradient comes through. Bengio et al. (2013) pretend that it is 1: forward the rounded weights, backward as if nothing had been done to them,
#
# $$\hat w = \operatorname{round}(w),\qquad \frac{\partial L}{\partial w} := \frac{\partial L}{\partial \hat w}.$$
#
# As a derivative this is wrong. As a rule for moving it is sensible: as long as the loss wants $\hat w$ smaller, the latent weight slides down, until it crosses the border between two levels and $\hat w$ jumps. Small wishes add up, and are not lost in the rounding. In code we add a zero whose gradient
# is 1.


# %%
class StraightThrough(nn.Module):
    """rounding(w) on the way forward, the identity on the way back."""

    def __init__(self, rounding):
        super().__init__()
        self.rounding = rounding  # (o, i) -> (o, i)

    def forward(self, w: Tensor) -> Tensor:
        return self.rounding(w.detach()) + (w - w.detach())


def with_rounding(model: nn.Module, rounding) -> nn.Module:
    """A copy to train, whose matrices are rounded each time that they are used."""
    model = copy.deepcopy(model)
    for layer in matrices(model).values():
        straight = StraightThrough(rounding)
        nn.utils.parametrize.register_parametrization(layer, "weight", straight)
    return model


# %%
x = torch.tensor([[-3.0, -1.0, 0.5, 2.0]], requires_grad=True)
x_hat = StraightThrough(lambda w: ternary(w)[0])(x)
(x_hat * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
print("forward ", x_hat.tolist()[0], "  gradient", x.grad.tolist()[0])
assert torch.equal(x_hat.detach(), ternary(x.detach())[0])
assert x.grad.tolist() == [[1, 2, 3, 4]], "the gradient of x_hat, unchanged"

# %% [markdown]
# Now train, on the training plays, with lab 00's loop. A few steps here, to see it work:

# %%
from tinylm.runs import read_records
from tinylm.train import TrainConfig, train

student = with_rounding(model, lambda w: two_bits(w)[0])
recipe = TrainConfig(
    steps=16, batch_size=16, seq_len=256, lr=1e-3, weight_decay=0.0, warmup=0.1
)

# %% tags=["trained"]
some = Judge(model, windows[::4])
before = some(student)["difference"]
history = train(student, corpus.train_tokens, recipe, progress=False)
after = some(student)["difference"]
print(f"{history.steps} steps: {before:+.3f} nats before, {after:+.3f} after")
assert after < 0.8 * before or budget_fraction() < 1, "training must win some back"

# %% [markdown]
# The whole is *recorded*: 250 steps with three seeds, that is, three samples of training windows, for each grid. The control is the float model itself, trained for as many steps on the same windows, with the best of the learning rates that were tried for it: what it gains comes from the further text, not from rounding. The records hold the loss on
# each of the windows judged here, so that all differences are paired.


# %%
def summary(records: list[dict], trained_float: list[dict]) -> dict[str, float]:
    """An arm of the experiment beside the shipped model, and beside one trained as long.

    Losses in nats, means over seeds; standard errors over windows, paired.
    """
    losses, control = (
        torch.tensor([r["window_losses"] for r in arm], dtype=torch.float64).mean(0)
        for arm in (records, trained_float)
    )  # (n,) each
    mean = {
        key: sum(r[key] for r in records) / len(records)
        for key in ("untrained", "difference", "standard_error", "kl", "agreement")
    }
    finals = [r["loss"] for r in records]
    return mean | {
        "as_long": (losses - control).mean().item(),
        "as_long_error": ((losses - control).std() / len(losses) ** 0.5).item(),
        "seeds_apart": max(finals) - min(finals),
    }


folder = checkpoint.SHIPPED.parent / "experiments" / "02_qat"
records = [r for r in read_records(folder) if r["config"]["steps"] == 250]
arms = {
    name: [r for r in records if r["config"]["rounding"] == name]
    for name in ("none", "two bits", "ternary")
}
assert [len(runs) for runs in arms.values()] == [3, 3, 3]
curves = {
    name: torch.tensor([r["curve"] for r in runs]).mean(0)
    for name, runs in arms.items()
}  # training loss, means of ten steps: (25,)

# %% tags=["trained"]
trained = {name: summary(runs, arms["none"]) for name, runs in arms.items()}
for name, arm in trained.items():
    print(
        f"{name:9} {arm['untrained']:+.4f} before, {arm['difference']:+.4f} +- "
        f"{arm['standard_error']:.4f} after; against float trained as long "
        f"{arm['as_long']:+.4f} +- {arm['as_long_error']:.4f}; seeds within "
        f"{arm['seeds_apart']:.4f}"
    )
two, three = trained["two bits"], trained["ternary"]
report("qat_float", trained["none"]["difference"], "nats, float trained as long")
report("qat_before", two["untrained"], "nats lost by rounding to four levels")
report("qat_after", two["difference"], "nats lost after training")
report("qat_after_error", two["standard_error"], "nats, standard error over windows")
report("qat_as_long", two["as_long"], "nats above the float model trained as long")
report("qat_left", two["difference"] / two["untrained"], "of the loss is left")
report("qat_left_as_long", two["as_long"] / two["untrained"], "beside float as long")
report("ternary_before", three["untrained"], "nats lost by rounding to three levels")
report("ternary_after", three["difference"], "nats lost after training")
assert two["difference"] < 0.4 * two["untrained"], "more than half is won back"
assert -0.01 < trained["none"]["difference"] < 0, "further text gains a little"
assert two["as_long"] < 0.4 * two["untrained"], "and more text is not why"
for name in ("two bits", "ternary"):
    learnt = (curves[name] - curves["none"])[-5:].mean()
    assert learnt > 1.3 * trained[name]["as_long"], "further off on what was trained on"
assert abs(two["untrained"] - four["difference"]) < 0.01 or budget_fraction() < 1

# %% [markdown]
# Both go into the table, with the bytes that the same formats took above.

# %% tags=["trained"]
for name, arm in (("2 bits, four levels", two), ("ternary", three)):
    measured = {key: arm[key] for key in ("difference", "kl", "agreement")}
    measured["kl_error"] = math.nan  # was not recorded
    row = {**table[name], **measured, "error": arm["standard_error"]}
    table[f"{name}, trained"] = row
gptq_2 = gptq_rungs["GPTQ, 2 bits, groups of 32"]["difference"]
assert two["difference"] < gptq_2 or budget_fraction() < 1, "and less than GPTQ loses"

# %% tags=["plot"]
figure, axis = plt.subplots()
for name, color in (("two bits", VERMILION), ("ternary", PURPLE)):
    above = curves[name] - curves["none"]
    axis.plot(10 * torch.arange(len(above)) + 5, above, color=color)
    label(axis, 245, above[-1], name, color)
axis.set(
    xlabel="training steps",
    ylabel="training loss above the float model's (nats)",
    yscale="log",
    xlim=(0, 290),
    ylim=(0.04, 3),
    yticks=[0.05, 0.1, 0.3, 1, 3],
    title="Most is won back in the first fifty steps",
)
axis.yaxis.set_major_formatter("{x:g}")
axis.minorticks_off()
show(
    figure,
    "fig_qat",
    "Training loss above that of the float model on the same batches, means of ten steps "
    "and three seeds, on a logarithmic axis. Both curves fall steeply for about fifty "
    "steps and slowly, but still, afterwards; ternary ends at about twice two bits.",
)

# %% [markdown]
# Two cautions in reading this. The figure shows the loss on *training* windows, which the float model knows better than any other text; on the held-out plays both models are much closer to it, and those are the numbers in the table. And the control moved, too: trained on, with its best learning rate, the float
# model gains a little, so "against float trained as long" is the stricter comparison. Both baselines leave the same verdict.
#
# What it costs: the training text, a gradient and the optimizer's moments for each weight, and hundreds of training steps, where GPTQ reads a few windows once. At 4 bits there is hardly a loss to win back; at 2 bits nothing that only rounds comes near it. Ternary pays for the last bit with a further loss, after 250 steps away from a model
# that was never meant to be ternary. BitNet's models are ternary from the first step on, over billions of tokens; whether those match float models of their size cannot be told from ours.

# %% [markdown]
# ## 13 · Going further: the KV cache
# *Live, 8 minutes.*
#
# Weights are not all that a model keeps in memory. While it writes, it keeps the keys and values of every token so far, and these grow with the text and with the number of users, where the weights do not. So round them, too. The numbers are new ones for each text, so there is no calibration and no time to
# think: a grid from the numbers themselves, and done.
#
# What shares a scale? Look at the numbers first: keys, after rotation, and values, of one head on one text.

# %%
from tinylm.model import Config, KVCache


class Recorder(KVCache):
    """A cache that can be asked for what it was given."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.given = k, v  # (b, h, s, d) each
        return super().append(k, v)


recorders = [Recorder() for _ in model.blocks]
with torch.no_grad():
    model(windows[:8, :-1], recorders)
k, v = recorders[2].given

# %% tags=["trained"]
spread = {}
for name, x in (("keys", k), ("values", v)):
    size = reduce(x.abs(), "b h s d -> h d", "mean")
    spread[name] = (size.max(1).values / size.median(1).values).mean().item()
    report(f"{name}_outlier", spread[name], f"{name}: the largest channel, in medians")
assert spread["keys"] > 2 * spread["values"] or budget_fraction() < 1, "keys have them"

# %% [markdown]
# In each head, a few channels of the *keys* are several times larger than the others, and stay so over the text; the values have no such channels. That is what Liu et al. (2024, KIVI) found in large models, and so they round
#
# - **keys per channel**: each channel has a scale for every 32 successive tokens, so that a large channel does not spoil the grid of the small ones;
# - **values per token**: each token has its own scale for a head's channels. A token's values then do not wait for others.
#
# Both use section 2's affine grid, stored with a float16 scale and a zero point of one byte for each 32 numbers here (a head of this model has 32 channels).


# %%
def round_cached(x: Tensor, bits: int, axis: int) -> tuple[Tensor, list[Tensor]]:
    """x on affine grids, one for each stretch along `axis`; and what is kept of it.

    x: float, any shape. Returns x_hat of its shape; codes, scale float16, zero point.
    """
    scale, top = stored_scale(affine_quantize(x, bits, axis)[1]), 2**bits - 1
    s = scale.float()  # as it is kept: codes and zero points are the nearest under it
    zero = (-x.amin(axis, keepdim=True).clamp(max=0) / s).round().clamp(0, top)
    codes = ((x / s).round() + zero).clamp(0, top)
    kept = [codes.to(torch.uint8), scale, zero.to(torch.uint8)]
    return (codes - zero) * s, kept


def per_token(x: Tensor, bits: int) -> Tensor:
    """One grid for the channels of each token and head. x: (b, h, s, d)."""
    return round_cached(x, bits, axis=-1)[0]


def per_channel(x: Tensor, bits: int, group_size: int = 32) -> Tensor:
    """One grid for each channel of a head and group of successive tokens.

    x: (b, h, s, d). The newest tokens, as long as they are no full group, stay float.
    """
    whole = x.shape[2] - x.shape[2] % group_size
    if whole == 0:
        return x
    groups = rearrange(x[:, :, :whole], "b h (n g) d -> b h n g d", g=group_size)
    x_hat = round_cached(groups, bits, axis=-2)[0].flatten(2, 3)
    return torch.cat([x_hat, x[:, :, whole:]], dim=2)


# %% [markdown]
# The model hands its new keys and values to a cache and computes with what the cache gives back. So all it takes is a cache that gives back rounded numbers.


# %%
class RoundedCache(KVCache):
    """Gives back keys and values rounded, by functions ((b, h, s, d), bits)."""

    def __init__(self, round_k, round_v, bits: int):
        super().__init__()
        self.round_k, self.round_v, self.bits = round_k, round_v, bits

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().append(k, v)
        return self.round_k(k, self.bits), self.round_v(v, self.bits)


def with_cache(model: nn.Module, round_k, round_v, bits: int) -> nn.Module:
    """The same model, but always working from a rounded cache."""
    copied = copy.copy(model)
    copied.forward = lambda tokens: model(
        tokens, [RoundedCache(round_k, round_v, bits) for _ in model.blocks]
    )
    return copied


def untouched(x: Tensor, bits: int) -> Tensor:
    return x


# %% [markdown]
# The control has the same bytes and swaps the two: keys per token, values per channel. First, keys and values apart:

# %% tags=["trained"]
schemes = {"per channel": per_channel, "per token": per_token}
some = Judge(model, windows[::8])
kl = {}
for bits in (2, 3, 4):
    for name, scheme in schemes.items():
        of_keys = with_cache(model, scheme, untouched, bits)
        of_values = with_cache(model, untouched, scheme, bits)
        kl["keys " + name, bits] = some(of_keys)["kl"]
        kl["values " + name, bits] = some(of_values)["kl"]
for bits in (2, 3, 4):
    channel, token = (kl["keys per " + name, bits] for name in ("channel", "token"))
    assert channel < 0.6 * token or budget_fraction() < 1, "keys want channels"

# %% tags=["plot"]
figure, axis = plt.subplots()
looks = {
    "keys per token": (VERMILION, (8, 0)),
    "keys per channel": (BLUE, (8, 6)),
    "values per token": (ORANGE, (8, -3)),
    "values per channel": (SKY, (8, -14)),
}
for name, (color, place) in looks.items():
    widths = [bits for which, bits in kl if which == name]
    line = [kl[name, bits] for bits in widths]
    shape = "o-" if name.startswith("keys") else "s--"
    axis.plot(widths, line, shape, color=color, ms=5)
    label(axis, widths[-1], line[-1], name, color, xytext=place)
axis.set(
    yscale="log",
    xlabel="bits of a code",
    ylabel="KL(unrounded || rounded), nats",
    xlim=(1.9, 4.6),
    ylim=(1e-3, 0.7),
    xticks=[2, 3, 4],
    title="Keys want a scale for each channel; values hardly care",
)
show(
    figure,
    "fig_kv",
    "KL divergence from the unrounded model against the bits of a cached number, 2 to 4, "
    "on a logarithmic axis. Keys rounded per token lie highest at every width, keys per "
    "channel at half of that or less. Values per token and per channel lie close "
    "together below.",
)

# %% [markdown]
# The first half of KIVI's rule holds in this small model too, for the reason given. The second does not show: values have no outlier channels, so it hardly matters how they are grouped, and per channel is even a little better. Per token remains the sensible choice, because nothing has to wait. (KIVI's own grid need not hold zero, which suits keys: their large channels lie on one side of it. Try it.)
#
# Now the whole cache, on all windows and inside the trained context of 256 tokens:

# %% tags=["trained"]
cached = {}
for bits, names in ((8, "channel token"), (4, "channel token"), (4, "token channel")):
    of_k, of_v = (schemes["per " + name] for name in names.split())
    row = judge(with_cache(model, of_k, of_v, bits))
    cached[bits, names] = row
    print(
        f"{bits} bits, per {names.replace(' ', ' and '):18}"
        f"{row['difference']:+9.4f} +- {row['error']:.4f} nats"
        f"   KL {row['kl']:.5f}   same {row['agreement']:6.1%}"
    )
kv_eight, kv_four = cached[8, "channel token"], cached[4, "channel token"]
swapped = cached[4, "token channel"]
report("kv8_changed", 100 * (1 - kv_eight["agreement"]), "% of choices changed, 8 bits")
report("kv4_changed", 100 * (1 - kv_four["agreement"]), "% of choices changed, 4 bits")
report("kv4", kv_four["difference"], "nats lost with 4 bits, keys per channel")
report("kv4_error", kv_four["error"], "nats, its standard error")
report("kv4_kl", kv_four["kl"], "nats of KL divergence")
report("kv4_kl_swapped", swapped["kl"], "nats of KL divergence, swapped")
assert abs(kv_eight["difference"]) < 0.001 and kv_eight["agreement"] > 0.99
assert abs(kv_four["difference"]) < 0.01 or budget_fraction() < 1
assert kv_four["kl"] < 0.75 * swapped["kl"] or budget_fraction() < 1

# %% [markdown]
# These windows were read in one go, all positions at once, and that is an approximation of what a cache does. A real one grows token by token: the newest keys, up to 31 here, wait unrounded until their group is full, and a group's scale cannot know later tokens. In one go every key is rounded, even a position's
# own, by a scale from all 32. Here is the real thing, one token after the other, beside the approximation:


# %%
@torch.no_grad()
def token_by_token(model: nn.Module, tokens: Tensor, caches: list) -> Tensor:
    """Log-probabilities (b, t, v), computed as a model that writes does."""
    logits = [model(token, caches) for token in tokens.split(1, dim=1)]
    return torch.cat(logits, dim=1).log_softmax(-1)


# %% tags=["trained"]
texts = Judge(model, windows[:4])
in_one_go = texts.answers(with_cache(model, per_channel, per_token, 4))
caches = [RoundedCache(per_channel, per_token, 4) for _ in model.blocks]
grown = token_by_token(model, texts.windows[:, :-1], caches)
kl_4 = [
    F.kl_div(x, texts.log_p, log_target=True, reduction="none").sum(-1).mean().item()
    for x in (in_one_go, grown)
]
print(f"KL in one go {kl_4[0]:.4f}, token by token {kl_4[1]:.4f}")
assert kl_4[1] < 1.1 * kl_4[0] or budget_fraction() < 1, "the approximation flatters"

# %% [markdown]
# **Bytes.** What is kept of this model's keys and values for each token, counted from the tensors, and by a formula: $b$ bits of code, and 24 bits of scale and zero point for each 32 numbers.


# %%
def kept_bytes(x: Tensor, bits: int, axis: int) -> int:
    """What a cache keeps of x when it is rounded along `axis`."""
    codes, scale, zero = round_cached(x, bits, axis)[1]
    packed = pack_bits(codes.int() - 2 ** (bits - 1), bits)
    return packed.nbytes + scale.nbytes + zero.nbytes


n_tokens = windows[:8, :-1].numel()
for bits in (8, 4):
    size = 0
    for recorder in recorders:
        k, v = recorder.given
        groups = rearrange(k, "b h (n g) d -> b h n g d", g=32)
        size += kept_bytes(groups, bits, axis=-2) + kept_bytes(v, bits, axis=-1)
    formula = model.config.kv_cache_bytes(1, bytes_per_value=1) * (bits + 24 / 32) / 8
    print(f"{bits} bits: {size / n_tokens:.0f} bytes a token")
    assert size == n_tokens * formula
print(f"float32: {model.config.kv_cache_bytes(1)} bytes a token")

# %% [markdown]
# (The formula takes all tokens as rounded. The newest, up to 31, whose group is not full, keep their keys in float.) It goes where this model cannot: to LLaMA 7B, in its trained context of 2,048 tokens and beyond it, at sixteen times that. The weights at 4.5 bits are beside it.

# %%
llama = Config(32_000, 4096, 32, 32, hidden_dim=11_008, tie_embeddings=False)
weights_gb = llama.n_params() * 4.5 / 8 / 1e9
sizes = {}
for context in (2048, 32_768):
    for name, bits in {"16 bits": 16, "8 bits": 8.75, "4 bits": 4.75}.items():
        size = llama.kv_cache_bytes(context, bytes_per_value=1) * bits / 8 / 1e9
        sizes[name, context] = size
        print(f"{context:6,} tokens, cache in {name:8}{size:6.2f} GB")
print(f"weights at 4.5 bits {weights_gb:.2f} GB")
assert sizes["16 bits", 2048] < weights_gb < sizes["4 bits", 32_768]
report("kv_llama_16", sizes["16 bits", 32_768], "GB for 32,768 tokens of LLaMA 7B")
report("kv_llama_4", sizes["4 bits", 32_768], "GB for the same in 4 bits")

# %% [markdown]
# One user, one long text, and even the 4-bit cache is larger than the 4-bit weights. How the *loss* fares out there, this model cannot tell: it was trained on 256 tokens and knows nothing beyond them, rounded or not.

# %% [markdown]
# ## 14 · Going further: speed, or bytes a token
# *Live and recorded, 14 minutes.*
#
# So far rounding has saved bytes. Does it save time? To write one token, a model multiplies every one of its matrices with *one* vector. Each weight is read once, used for one multiplication and one addition, and not needed again until the next token. Lab 00 placed this product far left in the roofline: it is bound
# by the bytes that move, not by arithmetic. The time that bytes allow is
#
# $$t \ge \frac{\text{bytes of } \hat W}{\text{bandwidth}},$$
#
# so one byte a weight could be 4 times as fast as float32's four, and 4 bits with a float32 scale for each 32 weights, 5 bits in all, 32/5 times. (With a float16 scale it would be 32/4.5 times; Numba has no float16 on a CPU.) But PyTorch's product takes float32, so the rounded weights must become float32 on the way, *in registers*. If that
# is done in memory, before the product, more bytes are moved than were saved. So we write the loop ourselves, and Numba compiles it to the processor's vector instructions.

# %%
from importlib.resources import files

import numba
from numba import njit, prange

# %% [markdown]
# ### Eight bits
#
# In one row $r$, with one scale: $y_r = s_r \sum_j q_{rj} x_j$. Written as a loop it is one line. Two things decide its speed:
#
# - `fastmath` allows the compiler to add in another order. Without it one long sum cannot be cut into the lanes of a vector, and each weight waits for the one before. (It is given these three liberties only; NaN stays NaN.)
# - Eight rows at a time. They share the loads of $x$, and if they come from eight places of the matrix, the processor fetches from eight pages of memory at once instead of waiting for one.
#
# For eight weights, a vector of 256 bits, the processor then does three instructions: widen, convert, multiply and add.


# %%
@njit(fastmath={"reassoc", "contract", "nsz"})
def dot8(c0, c1, c2, c3, c4, c5, c6, c7, x):
    """Eight rows of codes (g,) int8, each times x (g,) float32."""
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = np.float32(0)
    for j in range(len(x)):
        a0 += np.float32(c0[j]) * x[j]
        a1 += np.float32(c1[j]) * x[j]
        a2 += np.float32(c2[j]) * x[j]
        a3 += np.float32(c3[j]) * x[j]
        a4 += np.float32(c4[j]) * x[j]
        a5 += np.float32(c5[j]) * x[j]
        a6 += np.float32(c6[j]) * x[j]
        a7 += np.float32(c7[j]) * x[j]
    return a0, a1, a2, a3, a4, a5, a6, a7


@njit
def piece(codes, r, i, j):
    return codes[min(r, len(codes) - 1), i:j]  # past the end: the last row again


@njit(parallel=True, fastmath={"reassoc", "contract", "nsz"})
def int8_rows(codes, scale, x):
    """codes (o, i) int8, scale (o, n) float32, x (i,) float32 -> (o,) float32."""
    o, n = scale.shape
    g, m = codes.shape[1] // n, (o + 7) // 8
    y = np.empty(8 * m, np.float32)
    for b in prange(m):  # threads share the blocks: rows b, b + m, ..., b + 7m
        y[b::m] = 0
        for k in range(n):
            i, j = k * g, (k + 1) * g
            sums = dot8(
                codes[b, i:j],
                piece(codes, b + m, i, j),
                piece(codes, b + 2 * m, i, j),
                piece(codes, b + 3 * m, i, j),
                piece(codes, b + 4 * m, i, j),
                piece(codes, b + 5 * m, i, j),
                piece(codes, b + 6 * m, i, j),
                piece(codes, b + 7 * m, i, j),
                x[i:j],
            )
            for q in range(8):
                y[b + q * m] += sums[q] * scale[min(b + q * m, o - 1), k]
    return y[:o]


# %% [markdown]
# Numba does not look whether its arrays fit together, so a function that does stands before it. Two more things are its job: Numba takes as many threads as PyTorch, and a small matrix gets one, because to wake another costs more than it helps.


# %%
def check_product(weights: Tensor, dtype, scale: Tensor, x: Tensor, i: int) -> None:
    """Refuse what a kernel would misread; i: the inputs. Raises TypeError, ValueError."""
    for name, t, kind in (
        ("weights", weights, dtype),
        ("scale", scale, torch.float32),
        ("x", x, torch.float32),
    ):
        if t.dtype != kind:
            raise TypeError(f"{name} must be {kind}, got {t.dtype}")
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"the kernel gives {name} no gradient: use torch.no_grad()"
            )
    if 0 in weights.shape:
        raise ValueError(f"the matrix is empty, its shape is {tuple(weights.shape)}")
    if tuple(x.shape) != (i,):
        raise ValueError(f"x must be one vector ({i},), got shape {tuple(x.shape)}")


def use_threads(n_weights: int) -> None:
    """As many threads as PyTorch has, one for a small matrix."""
    most = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(most if n_weights >= 2**19 else 1)


def gemv_int8(codes: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """y = W x, with W the codes (o, i) int8 times the scales of their groups or rows.

    scale: (o, n) or (o,) float32, n a divisor of i; x: (i,) float32. Returns (o,)
    float32. Raises TypeError for other dtypes, ValueError for shapes that do not fit.
    """
    if codes.ndim != 2 or scale.ndim not in (1, 2) or len(scale) != len(codes):
        raise ValueError(
            f"codes (o, i) and scale (o, n) do not fit: got shapes "
            f"{tuple(codes.shape)} and {tuple(scale.shape)}"
        )
    check_product(codes, torch.int8, scale, x, codes.shape[1])
    scale = scale.reshape(len(codes), -1)
    if scale.shape[1] == 0 or codes.shape[1] % scale.shape[1]:
        raise ValueError(
            f"{scale.shape[1]} scales a row do not divide its {codes.shape[1]} codes"
        )
    use_threads(codes.numel())
    arrays = (t.detach().contiguous().numpy() for t in (codes, scale, x))
    return torch.from_numpy(int8_rows(*arrays))


# %%
g = torch.Generator().manual_seed(3)
codes = torch.randint(-127, 128, (37, 96), generator=g, dtype=torch.int8)
x = torch.randn(96, generator=g)
for scale in (torch.rand(37, generator=g), torch.rand(37, 3, generator=g)):
    exact = dequantize_groups(codes, scale.view(37, -1)).double() @ x.double()
    error = (gemv_int8(codes, scale, x) - exact).abs().max() / exact.abs().max()
    assert error < 1e-6, "the same product, within float32's rounding"
print("37 rows of 96 codes: right within float32's rounding")

# %% [markdown]
# ### Four bits
#
# A plain loop over 4-bit codes is *slower* than float32, for three reasons. Each has its cure.
#
# 1. **A sum to finish for every group.** The scale belongs to the group, so its lanes must be added up before it is applied: many slow steps for 32 weights. (`gemv_int8` takes groups, too, and pays for it below.) The cure is a layout in which *a lane is a group*. Eight lanes work on eight groups at once, the scales are a vector as well, and lanes are added up once a row. For that, the first codes of all groups of a row have to lie
#    side by side, then the second ones, and so on.
# 2. **Nibbles must be moved to the right.** Take eight codes as one 32-bit word. The mask that picks out a nibble leaves it where it is, $16^q$ times too large. Divide $x$ by $16^q$ instead, once for all rows: a power of two, so the product stays exactly the same. No nibble moves, except that the upper half of the word has to come down.
# 3. **Codes are stored as code + 8.** $\sum_j (c_j - 8)\,x_j = \sum_j c_j x_j - 8 \sum_j x_j$, and the last sum is the same for all rows: it becomes the value that the sum starts from.
#
# What is left for eight weights is mask, convert, multiply and add: three instructions, as for int8. (The `np.int32` in the code is there because Numba's bit operations give 64-bit integers, of which a vector holds half as many.) Four rows at a time, from the four quarters of the matrix, are enough here: a word holds eight codes.


# %%
def repack_rows(packed: Tensor, group_size: int) -> Tensor:
    """pack_int4's bytes as 32-bit words, word p of all groups of a row side by side.

    packed: (o, i / 2) uint8; group_size: a multiple of 8 that divides i. Returns
    (o, group_size / 8, i / group_size) int32: the same bytes in another order, with
    code 8p + q of a group in nibble q of its word p. (On little-endian machines.)
    """
    i = 2 * packed.shape[-1]
    if packed.ndim != 2 or packed.dtype != torch.uint8:
        raise ValueError(f"packed must be (o, i / 2) uint8, got {packed.dtype}")
    if group_size < 8 or group_size % 8 or i % group_size:
        raise ValueError(
            f"group_size={group_size} must be a multiple of 8 that divides the {i} codes "
            "of a row: a word holds eight"
        )
    words = packed.contiguous().view(torch.int32)
    return rearrange(words, "o (n p) -> o p n", p=group_size // 8).contiguous()


# %%
@njit(fastmath={"reassoc", "contract", "nsz"})
def add_word(a, word, x, p, k):
    """a plus the eight products of word p of group k; x: as spread makes it."""
    for half in range(2):
        for q in range(4):
            nibble = (word >> 16 * half) & (15 << 4 * q)  # 16^q times code + 8
            a += np.float32(np.int32(nibble)) * x[p, half, q, k]
    return a


@njit
def spread(x, n_words, n):
    """x (i,) in the order of the words, over 16^q; and -8 times the sum for each word."""
    wide = np.empty((n_words, 2, 4, n), np.float32)
    start = np.zeros((n_words, n), np.float32)
    j = 0
    for k in range(n):
        for p in range(n_words):
            for half in range(2):
                for q in range(4):
                    wide[p, half, q, k] = x[j] / np.float32(1 << 4 * q)
                    start[p, k] -= np.float32(8) * x[j]
                    j += 1
    return wide, start


@njit(parallel=True, fastmath={"reassoc", "contract", "nsz"})
def int4_rows(words, scale, x):
    """words (o, p, n) int32, scale (o, n) float32, x (8 p n,) float32 -> (o,) float32."""
    o, n_words, n = words.shape
    wide, start = spread(x, n_words, n)
    m = (o + 3) // 4
    y = np.empty(4 * m, np.float32)
    for b in prange(m):  # rows b, b + m, b + 2m, b + 3m
        r1, r2, r3 = min(b + m, o - 1), min(b + 2 * m, o - 1), min(b + 3 * m, o - 1)
        y0 = y1 = y2 = y3 = np.float32(0)
        for p in range(n_words):
            for k in range(n):  # the vector's lanes are groups
                a = start[p, k]
                y0 += scale[b, k] * add_word(a, words[b, p, k], wide, p, k)
                y1 += scale[r1, k] * add_word(a, words[r1, p, k], wide, p, k)
                y2 += scale[r2, k] * add_word(a, words[r2, p, k], wide, p, k)
                y3 += scale[r3, k] * add_word(a, words[r3, p, k], wide, p, k)
        y[b], y[b + m], y[b + 2 * m], y[b + 3 * m] = y0, y1, y2, y3
    return y[:o]


# %%
def gemv_int4(words: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """y = W x, with W the 4-bit codes in words times the scales of their groups.

    words: (o, p, n) int32 of repack_rows; scale: (o, n) float32; x: (8 p n,) float32.
    Returns (o,) float32. Raises TypeError for other dtypes, ValueError for shapes that
    do not fit.
    """
    if words.ndim != 3 or scale.shape != (words.shape[0], words.shape[2]):
        raise ValueError(
            f"words (o, p, n) and scale (o, n) do not fit: got shapes "
            f"{tuple(words.shape)} and {tuple(scale.shape)}"
        )
    check_product(
        words, torch.int32, scale, x, 8 * words[0].numel() if len(words) else 0
    )
    use_threads(8 * words.numel())
    arrays = (t.detach().contiguous().numpy() for t in (words, scale, x))
    return torch.from_numpy(int4_rows(*arrays))


# %%
codes = torch.randint(-8, 8, (37, 96), generator=g, dtype=torch.int8)
scale = torch.rand(37, 3, generator=g)
words = repack_rows(pack_int4(codes), 32)
exact = dequantize_groups(codes, scale).double() @ x.double()
error = (gemv_int4(words, scale, x) - exact).abs().max() / exact.abs().max()
assert words.nbytes * 2 == codes.nbytes and error < 1e-6
print("37 rows of 96 4-bit codes: right within float32's rounding")

# %% [markdown]
# ### The layer, and the model with it
#
# `QuantLinear` keeps the codes and the scales, and nothing in float32 of the matrix's size. A few vectors go through the kernel one by one. For many the matrix is restored and PyTorch multiplies: then its restoring is shared by all.


# %%
class QuantLinear(nn.Module):
    """A linear layer in 8 or 4 bits, for inference.

    codes: (o, i) int8; scale: (o, n); bits: 8 or 4; bias: (o,) or None.
    """

    def __init__(self, codes: Tensor, scale: Tensor, bits: int, bias=None):
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"there are kernels for 8 and 4 bits, not for {bits!r}")
        if bits == 4:
            codes = repack_rows(pack_int4(codes), codes.shape[1] // scale.shape[1])
        self.bits, self.product = bits, gemv_int8 if bits == 8 else gemv_int4
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.float())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_linear(cls, layer: nn.Linear, bits: int, group_size: int | None = None):
        """Round a layer: by default one scale a row for 8 bits, groups of 32 for 4."""
        group_size = group_size or (32 if bits == 4 else layer.in_features)
        w = layer.weight.detach()
        return cls(*quantize_groups(w, bits, group_size), bits, layer.bias)

    def dequantized(self) -> Tensor:  # (o, i) float32
        codes = self.codes
        if self.bits == 4:
            nibbles = codes[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15
            codes = rearrange(nibbles, "o p n q -> o (n p q)") - 8
        return dequantize_groups(codes, self.scale)

    def forward(self, x: Tensor) -> Tensor:  # (..., i) -> (..., o)
        rows = x.reshape(-1, x.shape[-1])
        if 0 < len(rows) <= 16:
            y = torch.stack([self.product(self.codes, self.scale, r) for r in rows])
        else:
            y = rows @ self.dequantized().T
        y = y.reshape(*x.shape[:-1], len(self.scale))
        return y if self.bias is None else y + self.bias


# %% [markdown]
# Swapping it in is a walk over the model's tree:


# %%
def use_quant_linear(module: nn.Module, bits: int, group_size: int | None = None):
    """Replace every nn.Linear below `module`, in place, by its QuantLinear."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, QuantLinear.from_linear(child, bits, group_size))
        else:
            use_quant_linear(child, bits, group_size)


fast = {}
for bits, group_size in ((8, None), (4, 32)):
    fast[bits] = copy.deepcopy(model)
    use_quant_linear(fast[bits].blocks, bits, group_size)
    reference, _ = quantized(model, nearest(bits, group_size))
    with torch.no_grad():
        for t in (1, 64):  # one token: the kernel; many: the restored matrix
            ours, theirs = (m(windows[:1, :t]) for m in (fast[bits], reference))
            assert (ours - theirs).abs().max() < 1e-4
    layers = [m for m in fast[bits].modules() if isinstance(m, QuantLinear)]
    size = sum(b.nbytes for m in layers for b in m.buffers())
    print(
        f"{bits} bits: {len(layers)} layers, {size:,} bytes ({4 * n_weights / size:.1f} "
        "times fewer than float32), logits of the dequantized model within 1e-4"
    )

# %% [markdown]
# ### Measured
#
# One matrix of 4096 x 4096, as in a model with 7 billion weights. The contenders take turns and the fastest call of each counts, as others can only slow a call down. Here all use *one* thread, so that on a busy machine no thread waits for another; the record below uses two.


# %%
def race(contenders: dict, seconds: float, calls: int = 5) -> dict[str, float]:
    """Seconds of each contender's fastest call; they take turns until time is up."""
    for function in contenders.values():
        function()  # compiles, and warms up
    best = dict.fromkeys(contenders, math.inf)
    stop = time.perf_counter() + seconds * budget_fraction()
    while time.perf_counter() < stop or math.inf in best.values():
        for name, function in contenders.items():
            for _ in range(calls):
                started = time.perf_counter()
                function()
                best[name] = min(best[name], time.perf_counter() - started)
    return best


# %%
predict(
    "4 bits take fewer bytes than 8, and both loops do three instructions for eight "
    "weights. With the matrix in the cache, the 4-bit product takes",
    ["about half as long", "about as long", "twice as long"],
    answer=1,
    why="In a cache that is fast enough, the bytes of both arrive in time, and both wait "
    "for the same arithmetic. Fewer bytes pay where bytes are what a product waits for: "
    "out of the cache.",
)

# %% tags=["timing"]
threads = torch.get_num_threads()
torch.set_num_threads(1)
side = 4096 if budget_fraction() == 1 else 1024
layer = nn.Linear(side, side, bias=False).requires_grad_(False)
q8, q4 = (QuantLinear.from_linear(layer, bits) for bits in (8, 4))
x, top8, top4 = torch.randn(side), q8.codes[:256], q4.codes[:256]
size = {"float32": layer.weight.nbytes}
size |= {f"int{q.bits}": q.codes.nbytes + q.scale.nbytes for q in (q8, q4)}
seconds = race(
    {
        "float32": lambda: torch.mv(layer.weight, x),
        "int8": lambda: gemv_int8(q8.codes, q8.scale, x),
        "int4": lambda: gemv_int4(q4.codes, q4.scale, x),
        "int8 groups": lambda: gemv_int8(q8.codes, q4.scale, x),
        "int8 near": lambda: gemv_int8(top8, q8.scale[:256], x),
        "int4 near": lambda: gemv_int4(top4, q4.scale[:256], x),
    },
    seconds=3,
)
speedup = {name: seconds["float32"] / seconds[name] for name in size}
for name in ("int8", "int4"):
    report(f"gemv_{name}_live", speedup[name], "times float32's speed, one thread")
groups = seconds["int8 groups"] / seconds["int8"]
report(
    "gemv_groups_cost", groups, "times as long: int8 with a sum for every 32 weights"
)
assert speedup["int8"] > 1.5 and speedup["int4"] > 1.2 or budget_fraction() < 1
assert groups > 1.2 or budget_fraction() < 1

# %% [markdown]
# Where does that stand under the roof? Two slopes, measured by a sum, which only reads: over the float32 matrix again and again, which a large cache keeps, and over 128 MB piece by piece, which fewer caches keep. Two flats: the peak of a matrix product; and the speed of our loops on 256 rows, whose bytes lie in the second-level cache, so that little but
# instructions (and the call) is left to wait for.

# %% tags=["timing"]
far, a = torch.randn(8, 2**22), torch.randn(512, 512)
turn = iter(range(10**9))
probes = race(
    {
        "far": lambda: far[next(turn) % 8].sum(),
        "near": layer.weight.sum,
        "peak": lambda: a @ a,
    },
    2,
)
far_rate, near_rate = far[0].nbytes / probes["far"], size["float32"] / probes["near"]
peak = 2 * 512**3 / probes["peak"]
loops = 2 * 256 * side / min(seconds["int8 near"], seconds["int4 near"])
del far
report("gemv_far_gbs", far_rate / 1e9, "GB/s, reading 128 MB with one thread")
report("gemv_near_gbs", near_rate / 1e9, "GB/s, reading the matrix again and again")
report("gemv_loops", loops / 1e9, "GFLOP/s of our loops on bytes that lie near")
assert near_rate > far_rate * 0.6 and peak > loops * 0.5

# %% tags=["plot"]
figure, axis = plt.subplots()
for rate, color, text, at, shift, side_of in (
    (far_rate, MUTED, f"128 MB {far_rate / 1e9:.0f} GB/s", 0.2, (10, -8), "left"),
    (near_rate, INK, f"the matrix {near_rate / 1e9:.0f} GB/s", 3.4, (-9, 8), "right"),
):
    reach = np.array([0.16, peak / rate])
    axis.loglog(reach, reach * rate / 1e9, color=color)
    label(axis, at, at * rate / 1e9, text, color, xytext=shift, ha=side_of)
reference_line(axis, peak / 1e9, f"peak of a matrix product {peak / 1e9:.0f} GFLOP/s")
reference_line(axis, loops / 1e9, f"our loops {loops / 1e9:.0f}")
for name, color, shift in zip(
    size, (INK, BLUE, VERMILION), ((-9, 6), (-2, -17), (0, -17)), strict=True
):
    at = 2 * side * side / size[name], 2 * side * side / seconds[name] / 1e9
    axis.plot(*at, "o", ms=8, color=color)
    text = f"{name}, {speedup[name]:.1f} times" if name != "float32" else name
    label(axis, *at, text, color, xytext=shift, ha="right" if shift[0] < 0 else "left")
axis.set(
    xlabel="arithmetic intensity (operations per byte)",
    ylabel="speed (GFLOP/s)",
    title="One token's product, in 32, 8 and 4 bits",
    xlim=(0.14, 12),
    ylim=(0.12 * far_rate / 1e9, 1.7 * peak / 1e9),
)
show(
    figure,
    "fig_gemv_roofline",
    "A roofline on logarithmic axes, one thread. The float32 product lies at half an "
    "operation a byte on the slope of reading the matrix; the int8 product at two and "
    "the int4 product at three operations a byte lie several times higher, at the same "
    "height, near a dashed line: the arithmetic of their own loops.",
)

# %% [markdown]
# Float32 sits on the slope: it waits for bytes, and nothing but fewer bytes helps it. Rounding moves the product to the right, up the slope, until another roof stops it: the three instructions for eight weights. From there on fewer bits help only where bytes come more slowly.
#
# The record holds the same with two threads, medians over many turns, with one matrix that stays in the last-level cache, and with 1.2 GB of matrices in turn, which no cache holds. *allowed* is the ratio of the bytes, *reached* the share of it. *reading 17 MB* is a sum over as many bytes as the int8 matrix has, with no product at all: what a loop can
# reach that reads so little at a time. The experiment's card says what else was tried.

# %%
record = files("tinylm") / "assets" / "experiments" / "02_gemv" / "result.txt"
record = record.read_text(encoding="utf-8")
print(record)
for line in record.splitlines():
    match line.split():
        case [("cache" | "memory") as where, ("int8" | "int4") as name, _, ratio, *_]:
            report(f"gemv_{name}_{where}", float(ratio), "times float32, recorded")

# %% [markdown]
# We had aimed at 4 times from int8 in the cache and 3.2 out of it, and at 3 from int4. The record says what was reached. Four is the whole ratio of the bytes, and PyTorch's float32 product wastes no bandwidth here: in the cache it is as fast as a plain sum, out of it faster. Out of the cache int8 takes hardly longer than
# a sum over as many bytes, so a loop that reads like a sum can get no further; in the cache the three instructions are what is missing, and int4 takes as long as int8, though it reads fewer bytes. Out of the cache, where bytes decide and where a real model's weights are, int4 is clearly ahead.

# %% [markdown]
# ### Where it loses
#
# A *small* matrix costs little to read, and then the call itself is what takes time: checks, Python, the way into compiled code. A *batch* reads a weight once and uses it for every vector, which moves the product to the right along the roof until arithmetic binds it. There PyTorch's product is the better one, and ours pays
# for every vector anew, or for restoring the matrix.


# %%
def beside(layer: nn.Module, other: nn.Module, batch: int) -> float:
    """How many times as fast as `layer` the `other` is, on `batch` vectors."""
    x = torch.randn(batch, layer.in_features)
    pair = {"layer": lambda: layer(x), "other": lambda: other(x)}
    best = race(pair, 0.3, calls=1 if batch > 4 else 5)
    return best["layer"] / best["other"]


# %% tags=["timing"]
small = nn.Linear(128, 128, bias=False).requires_grad_(False)
lost = {"small": beside(small, QuantLinear.from_linear(small, 8), 1)}
report("gemv_small", lost["small"], "times float32: 128 x 128, one vector")
for batch in (1, 4, 64):
    lost[batch] = beside(layer, q8, batch)
    report(f"gemv_batch_{batch}", lost[batch], f"times float32: batch of {batch}")
del layer, q8, q4, top8, top4
assert lost["small"] < 1 and lost[64] < 1, "small matrices and batches lose"

# %% [markdown]
# And our tiny model? Its largest matrix has 384 x 128 weights, 200 kB in float32: all of it lives in the cache, and a token costs 28 calls.

# %% tags=["timing"]
prompt = data.encode("**HAMLET**  \n")
writers = {"float32": model, "int8": fast[8], "int4": fast[4]}
run = {k: lambda m=m: m.generate(prompt, 48, temperature=0) for k, m in writers.items()}
seconds = race(run, 2, calls=1)
for name, one in seconds.items():
    report(f"tokens_{name}", 48 / one, "tokens per second, one thread")
tiny, x = nn.Linear(32, 8, bias=False).requires_grad_(False), torch.zeros(1, 32)
tiny8 = QuantLinear.from_linear(tiny, 8)
call = race({"float32": lambda: tiny(x), "int8": lambda: tiny8(x)}, 0.2)
for name, one in call.items():
    report(f"call_{name}", one * 1e6, "microseconds for a product of next to nothing")
torch.set_num_threads(threads)
assert seconds["int8"] > 0.7 * seconds["float32"], "nothing to win at this size"

# %% [markdown]
# So for a model this small rounding saves bytes and no time: its products are next to nothing, and a call of ours, written in Python, takes longer than one of PyTorch's. (Rows this short also fill the lanes badly: 128 weights are four groups, and a vector has room for eight.) What the kernels gain, a model gains whose matrices are large: at 4096 x 4096 the call is a few percent of the product. That is claim 8's case, a model of 7 billion weights that writes for one reader. And it is why the
# formats of section 9 look as they do: their groups and nibbles are laid out for such loops.

# %% [markdown]
# ## 15 · Going further: the same functions on a real model
# *Live, 3 minutes, if you ask for it.*
#
# Everything above works on matrices, and does not care whose. `tinylm.checkpoint.from_hf` loads a Llama checkpoint in Hugging Face's format, a folder on your disk or a name on its hub, into the same `TinyLlama`, and the judge judges it. One thing is missing: text. Other models have other tokens, and this
# lab has no tokenizer for them. So the model writes the text itself: from each of a few tokens drawn at random it goes on, one sampled token after the other. On text drawn from $p$ the mean of $\ln p - \ln \hat p$ is an estimate of the divergence, too, so loss difference and KL should agree.


# %%
def own_windows(model: nn.Module, n: int, length: int, seed: int = 0) -> Tensor:
    """What a model writes after random first tokens: (n, length + 1) int64."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randint(model.config.vocab_size, (n, 1), generator=g)
    return model.generate(first, length, seed=seed)


def gptq_for(model: nn.Module, windows: Tensor, bits: int, group_size: int):
    """The method of section 5 for any model, calibrated on windows (n, t + 1)."""
    inputs = layer_inputs(model, windows)

    def method(name: str, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = inputs[name]
        hessian = einsum(x, x, "n i, n k -> i k") / len(x)
        w_hat = gptq(w, hessian, bits, group_size)
        scale = grid_scales(w, bits, group_size, clip=True)
        codes = (w_hat / step_sizes(scale, w.shape[1])).round()
        return w_hat, [pack_bits(codes, bits), scale]

    return method


def quantize_checkpoint(
    folder_or_name: str, method="nearest", n: int = 4, length: int = 128
) -> dict[str, float]:
    """Round a Hugging Face Llama checkpoint and compare the two on what it writes.

    method: "nearest", "nf4", "gptq", or a method as in section 1, (name, w) -> (w_hat,
    [stored]); the named ones take 4 bits, in groups of 32, NF4 in blocks of 64. n texts
    of `length` tokens (at most the model's context), as many more to calibrate GPTQ.
    Returns the judge's row with true bits. Raises ValueError for other names, and what
    from_hf and the roundings refuse. A hub name downloads the checkpoint.
    """
    if not callable(method) and method not in ("nearest", "nf4", "gptq"):
        raise ValueError(
            f"method must be nearest, nf4, gptq or callable, got {method!r}"
        )
    model = checkpoint.from_hf(folder_or_name)
    length = min(length, model.config.max_len - 1)
    if method == "gptq":
        method = gptq_for(model, own_windows(model, n, length, seed=1), 4, 32)
    methods = {"nearest": nearest(4, 32), "nf4": nf4}
    judge = Judge(model, own_windows(model, n, length))
    rounded, stored = quantized(model, methods.get(method, method))
    bits, file_bits = true_bits(model, stored)
    return {"bits": bits, "file_bits": file_bits, **judge(rounded)}


# %% [markdown]
# Nothing is downloaded unless you ask for it. Put a name between the quotes, such as `HuggingFaceTB/SmolLM2-135M` (half a gigabyte to fetch), or the path of a folder, and run the cell.

# %%
REAL_MODEL = ""

if not REAL_MODEL:
    print("skipped: REAL_MODEL is empty")
else:
    for method_name in ("nearest", "nf4", "gptq"):
        try:
            row = quantize_checkpoint(REAL_MODEL, method_name)
        except OSError as error:  # no network, or no such checkpoint
            print(f"skipped: {type(error).__name__}: {error}")
            break
        print(
            f"{method_name:8}{row['bits']:6.2f} bits{row['difference']:+9.4f} +- "
            f"{row['error']:.4f} nats   KL {row['kl']:.4f}   same {row['agreement']:6.1%}"
        )

# %% [markdown]
# ## The whole ladder
#
# Every rung that you have run. (The rows that end in *planted*, and those that begin with *W*, round activations too: section 10 and 11. The picture leaves them out.)

# %% tags=["trained"]
show_table("ladder", table)
assert all(math.isfinite(row["difference"]) for row in table.values())

# %% tags=["plot"]
draw_ladder(
    "fig_ladder",
    {k: r for k, r in table.items() if "planted" not in k and not k.startswith("W")},
    {
        "GPTQ": VERMILION,
        "trained": BLUE,
        "NF4": PURPLE,
        "Q4": GREEN,
        "NVFP4": INK,
        "MXFP4": ORANGE,
    },
    "Two panels against bits a weight, logarithmic: loss above the unrounded model, and "
    "KL divergence, for the rungs that round weights. Methods that use data or more "
    "scales lie lower at the same bits, those that train on with the rounding lowest of "
    "all; controls are open squares.",
)

# %% [markdown]
# ## The verdict

# %% tags=["trained"]
three, four = (
    gptq_rungs[f"GPTQ, {x}"] for x in ("3 bits, one a row", "4 bits, groups of 32")
)
plain, plain_four = (
    plain_rungs[x] for x in ("3 bits, one a row", "4 bits, groups of 32")
)
verdict(
    7,
    "holds in part",
    measured=f"GPTQ at {three['bits']:.2f} bits a weight loses "
    f"{three['difference']:+.3f} nats of {judge.loss.mean().item():.2f} and changes "
    f"{1 - three['agreement']:.0%} of the likeliest tokens, where rounding to nearest "
    f"loses {plain['difference']:+.3f}; at {four['bits']:.2f} bits it loses "
    f"{four['difference']:+.4f}",
    interval=f"standard errors {three['error']:.3f} and {four['error']:.4f}, paired over "
    f"{len(windows)} windows; one model, one calibration text",
    why="175 billion weights fit one 80 GB card at 3 bits, not at 4. At 4.5 bits "
    "nothing measurable is lost; at 3 bits clipped grids and GPTQ together make most of "
    "the loss go away, each about halving it, and what is left can be measured. Larger "
    "models are said to lose less; that cannot be told here.",
)
verdict(
    8,
    "holds in part",
    measured=f"rounding to nearest at {plain_four['bits']:.2f} bits a weight (groups of "
    f"32), {13e9 * plain_four['bits'] / 8 / 1e9:.1f} GB for 13 billion, loses "
    f"{plain_four['difference']:+.4f} nats and changes "
    f"{1 - plain_four['agreement']:.0%} of the likeliest tokens; GPTQ in the same bytes "
    f"loses {four['difference']:+.4f} and changes {1 - four['agreement']:.0%}",
    interval=f"standard errors {plain_four['error']:.4f} and {four['error']:.4f}, paired "
    f"over {len(windows)} windows",
    why="What laptops ran in 2023 were roundings to nearest of this kind: a loss that is "
    "small and can be measured. So the model that fits is nearly the model. No LLaMA, "
    "phone or Raspberry Pi was run.",
)
assert three["difference"] < 0.5 * plain["difference"] or budget_fraction() < 1
assert four["difference"] < 0.003 or budget_fraction() < 1

# %% [markdown]
# What you predicted, beside what came out:

# %%
predictions()

# %% [markdown]
# ## Questions to go on with
#
# 1. *Sensitivity.* Round only one of the seven kinds of matrices at 3 bits and keep the others. Which kind costs most, and is it the one with the largest error?
# 2. *Calibration.* Collect the Hessians on `data.python_docs()` instead of Shakespeare. How much of GPTQ's gain is left at 3 bits? And on random characters?
# 3. *In sequence.* The published GPTQ collects the inputs of a layer after the layers before it were rounded. Do it. Does the loss fall further, and does the KL divergence?
# 4. *The table.* Round the embedding as well, at 8 and at 4 bits. It is tied: what does each side of its use mind?
# 5. *A mixed budget.* You may spend 3.5 bits a weight on average and choose 3 or 4 for each matrix. Write down a rule, predict its loss, then measure it.
#
# ## Further reading
#
# - Frantar et al. 2022, *GPTQ* (arXiv 2210.17323); Frantar and Alistarh 2022, *Optimal brain compression* (2208.11580); Hassibi and Stork 1993, *Optimal brain surgeon*.
# - Dettmers et al. 2022, *LLM.int8()* (2208.07339); Xiao et al. 2023, *SmoothQuant* (2211.10438); Lin et al. 2024, *AWQ* (2306.00978); Ashkboos et al. 2024, *QuaRot* (2404.00456).
# - Dettmers et al. 2023, *QLoRA* (2305.14314), which brought NF4; Ma et al. 2024, *The era of 1-bit LLMs* (2402.17764); Liu et al. 2024, *KIVI* (2402.02750).
# - Rouhani et al. 2023, *Microscaling data formats for deep learning* (2310.10537); the source of llama.cpp, `ggml-quants.c`.
