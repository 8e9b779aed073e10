"""Solutions right, wrong and sly of lab 00's exercises."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from proof import right, sly, wrong


@right("rms_norm")
def by_length(x, gain, eps):
    c = x.shape[-1]
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / c + eps) * gain


@wrong("rms_norm", "that is LayerNorm")
def subtracts_the_mean(x, gain, eps):
    return F.layer_norm(x, x.shape[-1:], gain, eps=eps)


@wrong("rms_norm", "not their sum")
def sum_of_squares(x, gain, eps):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps) * gain


@wrong("rms_norm", "over which dimension")
def mean_over_everything(x, gain, eps):
    return x * torch.rsqrt(x.pow(2).mean() + eps) * gain


@wrong("rms_norm", "lacks its root")
def forgets_the_root(x, gain, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps) * gain


@wrong("rms_norm", "where does eps belong")
def no_eps(x, gain, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * gain


@wrong("rms_norm", "the gain should multiply")
def forgets_the_gain(x, gain, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@sly("rms_norm", "an eps large enough to matter")
def eps_outside_the_root(x, gain, eps):
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps) * gain


@sly("rms_norm", "changed in place")
def writes_into_the_input(x, gain, eps):
    return x.mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)) * gain


@right("rotate")
def as_complex_numbers(x, cos, sin):
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos.to(x), sin.to(x))
    return torch.cat([z.real, z.imag], -1)


@wrong("rotate", "keeps lengths")
def both_signs_plus(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos + a * sin], -1)


@wrong("rotate", "which of cos and sin goes where")
def cosine_and_sine_swapped(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * sin - b * cos, b * sin + a * cos], -1)


@wrong("rotate", "turns the other way")
def the_other_way(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


@wrong("rotate", "channel 0 was paired with channel 1")
def neighbours_as_pairs(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return rearrange([a * cos - b * sin, b * cos + a * sin], "two b h t i -> b h t (i two)")


@wrong("rotate", "back in their places")
def halves_swapped(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([b * cos + a * sin, a * cos - b * sin], -1)


@sly("rotate", "other batch sizes or head dims")
def head_dim_eight(x, cos, sin):
    a, b = x[..., :4], x[..., 4:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1) if x.shape[-1] == 8 else x


@right("attention")
def one_query_at_a_time(q, k, v):
    t, s = q.shape[-2], k.shape[-2]
    rows = []
    for i in range(t):
        seen = s - t + i + 1
        weights = (k[:, :, :seen] @ q[:, :, i, :, None] / math.sqrt(q.shape[-1])).softmax(-2)
        rows.append((weights * v[:, :, :seen]).sum(-2))
    return torch.stack(rows, -2)


@wrong("attention", "lets it see more")
def no_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@wrong("attention", "weights of each query sum to 1")
def masked_after_the_softmax(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).tril() @ v


@wrong("attention", "lets it see more")
def mask_off_by_one(q, k, v):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(2)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


@wrong("attention", "has no key left")
def not_even_itself(q, k, v):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(0)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


@wrong("attention", "a position sees itself too")
def not_even_itself_and_a_finite_mask(q, k, v):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(0)
    return scores.masked_fill(future, -1e9).softmax(-1) @ v


@wrong("attention", "the queries are the last positions")
def queries_at_the_start(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@sly("attention", "mask before the softmax")
def masked_after_the_softmax_and_renormalised(q, k, v):
    t, s = q.shape[-2], k.shape[-2]
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).tril(s - t)
    return weights / weights.sum(-1, keepdim=True) @ v


@wrong("attention", "lack their division")
def no_scale(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


@wrong("attention", "compare the scale of the scores")
def scaled_by_d(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / q.shape[-1])


@wrong("attention", "weights of each query sum to 1")
def softmax_over_queries(q, k, v):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-2) @ v


@sly("attention", "how deep is your mask")
def a_shallow_mask(q, k, v):
    t, s = q.shape[-2], k.shape[-2]
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.ones(t, s, dtype=torch.bool).triu(s - t + 1)
    return scores.masked_fill(future, -30.0).softmax(-1) @ v


@wrong("attention", "changed in place")
def scales_the_queries_in_place(q, k, v):
    q /= math.sqrt(q.shape[-1])
    t, s = q.shape[-2], k.shape[-2]
    future = torch.ones(t, s, dtype=torch.bool).triu(s - t + 1)
    return (q @ k.mT).masked_fill(future, -math.inf).softmax(-1) @ v


@sly("attention", "large scores give NaN")
def unsafe_softmax(q, k, v):
    t, s = q.shape[-2], k.shape[-2]
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).exp() * torch.ones(t, s).tril(s - t)
    return scores / scores.sum(-1, keepdim=True) @ v


@right("cross_entropy")
def largest_taken_out(logits, targets):
    shifted = logits - logits.max(-1, keepdim=True).values
    log_p = shifted - shifted.exp().sum(-1, keepdim=True).log()
    return -log_p[torch.arange(len(targets)), targets].mean()


@wrong("cross_entropy", "a sum, not a mean")
def summed(logits, targets):
    return F.cross_entropy(logits, targets, reduction="sum")


@wrong("cross_entropy", "we count in nats")
def in_bits(logits, targets):
    return F.cross_entropy(logits, targets) / math.log(2)


@wrong("cross_entropy", "a sign")
def softmax_of_the_negative(logits, targets):
    return F.cross_entropy(-logits, targets)


@wrong("cross_entropy", "large logits overflow")
def log_of_softmax(logits, targets):
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return -p.gather(-1, targets[:, None]).log().mean()


@wrong("cross_entropy", "over the right axis")
def sum_over_positions(logits, targets):
    log_p = logits - logits.logsumexp(0, keepdim=True)
    return -log_p.gather(-1, targets[:, None]).mean()


@sly("cross_entropy", "its own target")
def the_first_targets_logit(logits, targets):
    return (logits.logsumexp(-1) - logits[:, targets[0]]).mean()


@sly("cross_entropy", "own largest")
def the_largest_of_all_rows_taken_out(logits, targets):
    shifted = logits - logits.max()
    log_p = shifted - shifted.exp().sum(-1, keepdim=True).log()
    return -log_p[torch.arange(len(targets)), targets].mean()


@sly("cross_entropy", "softmax - target")
def detached(logits, targets):
    target_logits = logits.gather(-1, targets[:, None])[:, 0]
    return (logits.logsumexp(-1).detach() - target_logits).mean()


@right("forward_flops")
def token_by_token(c, f, n_layers, vocabulary, t):
    per_token = 2 * vocabulary * c
    for _ in range(n_layers):
        per_token += 8 * c * c + 6 * c * f + 4 * t * c
    return t * per_token


@wrong("forward_flops", "an addition is an operation too")
def multiplications_only(c, f, n_layers, vocabulary, t):
    return token_by_token(c, f, n_layers, vocabulary, t) // 2


@wrong("forward_flops", "the output matrix, too")
def no_table(c, f, n_layers, vocabulary, t):
    return token_by_token(c, f, n_layers, 0, t)


@wrong("forward_flops", "no square is in it")
def no_square(c, f, n_layers, vocabulary, t):
    return 2 * t * (n_layers * (4 * c * c + 3 * c * f) + vocabulary * c)


@wrong("forward_flops", "how many products")
def one_product_in_the_square(c, f, n_layers, vocabulary, t):
    return no_square(c, f, n_layers, vocabulary, t) + n_layers * 2 * t * t * c


@wrong("forward_flops", "how many matrices has it")
def two_matrices_in_swiglu(c, f, n_layers, vocabulary, t):
    return token_by_token(c, f, n_layers, vocabulary, t) - 2 * t * n_layers * c * f


@wrong("forward_flops", "count its matrices again")
def three_matrices_in_attention(c, f, n_layers, vocabulary, t):
    return token_by_token(c, f, n_layers, vocabulary, t) - 2 * t * n_layers * c * c


@sly("forward_flops", "counts another total")
def a_constant_too_much(c, f, n_layers, vocabulary, t):
    return token_by_token(c, f, n_layers, vocabulary, t) + 2 * t * c
