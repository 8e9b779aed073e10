"""A Llama-architecture decoder, small enough to read in one sitting.

Dimensions: b batch, t time (queries), s time (keys), h heads, g key-value heads, d head dim, c channels, v vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The shape of a model. `n_kv_heads` defaults to `n_heads`, `hidden_dim` to 8/3 of `dim` rounded up to 32."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    hidden_dim: int | None = None
    max_len: int = 256
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.hidden_dim is None:
            object.__setattr__(self, "hidden_dim", -(-8 * self.dim // 3 // 32) * 32)
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "max_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim={self.dim} is not a multiple of n_heads={self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head dim dim / n_heads = {self.head_dim} is odd; rotary embeddings turn pairs of channels")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if not self.rope_theta > 0 or not self.norm_eps > 0:
            raise ValueError(f"rope_theta and norm_eps must be positive, got {self.rope_theta} and {self.norm_eps}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def to_dict(self) -> dict:
        return asdict(self)

    # Counts from the shapes alone.

    def _linear_params(self) -> int:
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.n_kv_heads * self.head_dim
        return self.n_layers * (attention + 3 * self.dim * self.hidden_dim)

    def n_params(self, embeddings: bool = True) -> int:
        """Parameters, with or without those of the embedding and the output head (a tied head counts once)."""
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.dim
        return self._linear_params() + (2 * self.n_layers + 1) * self.dim + (tables if embeddings else 0)

    def forward_flops(self, seq_len: int, causal: bool = False) -> int:
        """Floating-point operations of one forward pass over `seq_len` tokens; a multiply-add is two.

        Counts matrix products only (most of the work, and what PyTorch's counter counts): the linear layers, the
        output head, and attention's QK^T and PV. `causal=False` counts the whole t x t square, as PyTorch does;
        `causal=True` only the t (t + 1) / 2 pairs that a causal kernel needs.
        """
        pairs = seq_len * (seq_len + 1) // 2 if causal else seq_len * seq_len
        linear = 2 * seq_len * (self._linear_params() + self.vocab_size * self.dim)
        return linear + self.n_layers * 2 * 2 * pairs * self.dim

    def train_flops(self, seq_len: int, causal: bool = False) -> int:
        """Operations of a forward and backward pass over `seq_len` tokens: each product has two gradients, so 3 times."""
        return 3 * self.forward_flops(seq_len, causal)

    def decode_flops(self, context: int) -> int:
        """Operations to produce one token with a KV cache that then holds `context` tokens."""
        return 2 * (self._linear_params() + self.vocab_size * self.dim) + self.n_layers * 2 * 2 * context * self.dim

    def kv_cache_bytes(self, context: int, bytes_per_value: int = 4) -> int:
        """Bytes of keys and values kept for one sequence of `context` tokens."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * context * bytes_per_value


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_table(head_dim: int, max_len: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/d), each (max_len, d / 2) float32 (Su et al. 2021, eq. 15)."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angle = torch.outer(torch.arange(max_len, dtype=torch.int64).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + d/2) by its position's angle. x: (b, t, h, d); cos, sin: (t, 1, d).

    (a, b) becomes (a cos - b sin, b cos + a sin): roll swaps a and b, and the first half of `sin` brings its minus sign.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with rotary embeddings and grouped key-value heads (Ainslie et al. 2023)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        kv_dim = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        d = self.config.head_dim
        q = rotate(rearrange(self.q_proj(x), "b t (h d) -> b t h d", d=d), cos, sin)
        k = rotate(rearrange(self.k_proj(x), "b t (g d) -> b t g d", d=d), cos, sin)
        v = rearrange(self.v_proj(x), "b t (g d) -> b t g d", d=d)
        q, k, v = (rearrange(z, "b t h d -> b h t d") for z in (q, k, v))  # last, so that rotate works on whole rows
        if cache is not None:
            k, v = cache.append(k, v)
        if k.shape[1] < q.shape[1]:
            k, v = (repeat(z, "b g s d -> b (g n) s d", n=q.shape[1] // z.shape[1]) for z in (k, v))
        t, s = q.shape[2], k.shape[2]
        # Query i stands at position s - t + i and sees the keys up to there.
        mask = torch.ones(t, s, dtype=torch.bool, device=x.device).tril(s - t) if 1 < t < s else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < t == s)
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)"))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and SwiGLU, each on the normed residual stream and added back to it."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cache)
        return x + self.mlp(self.mlp_norm(x))


class KVCache:
    """One layer's keys and values so far, each (b, g, s, d)."""

    def __init__(self):
        self.k = self.v = None

    def __len__(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.k, self.v


class TinyLlama(nn.Module):
    """Token ids (b, t) int64 to logits (b, t, v) float."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        cos, sin = rotary_table(config.head_dim, config.max_len, config.rope_theta)
        # (max_len, 1, d): spread over both halves of the channels, and broadcast over the heads, as rotate wants them
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1)[:, None], persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1)[:, None], persistent=False)
        self.init_weights()
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def init_weights(self) -> None:
        """Gaussian: 0.02 for the tables, 1 / sqrt(fan in) for the layers, less on what is added to the residual stream."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 if name in ("embed.weight", "lm_head.weight") else p.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= (2 * self.config.n_layers) ** 0.5
                nn.init.normal_(p, std=std)

    def forward(self, tokens: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        start = len(cache[0]) if cache else 0
        stop = start + tokens.shape[1]
        if stop > self.config.max_len:
            raise ValueError(f"sequence of {stop} tokens is longer than max_len={self.config.max_len}")
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        x = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache[i] if cache else None)
        return self.lm_head(self.norm(x))

    def loss(self, window: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token of a window (b, t + 1): each token predicted from those before it."""
        logits = self(window[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        n_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue a prompt. prompt: (t,) or (b, t) int64; returns prompt and continuation, (t + n) or (b, t + n).

        `temperature=0` takes the most likely token; `top_k` keeps only the k most likely. When the window is full,
        its older half is dropped and the cache is computed anew, so length is not limited by `max_len`. With and
        without the cache the tokens are the same; without it each costs a full forward pass.
        """
        if prompt.shape[-1] == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if temperature < 0 or (top_k is not None and top_k < 1) or n_tokens < 0:
            raise ValueError(f"need temperature >= 0, top_k >= 1, n_tokens >= 0; got {temperature}, {top_k}, {n_tokens}")
        tokens = prompt.reshape(-1, prompt.shape[-1]).to(self.embed.weight.device)
        generator = torch.Generator(device=tokens.device).manual_seed(seed)
        cache, start = None, max(0, tokens.shape[1] - self.config.max_len)
        for _ in range(n_tokens):
            if tokens.shape[1] - start > self.config.max_len:
                cache, start = None, tokens.shape[1] - max(1, self.config.max_len // 2)
            if cache is None or not use_cache:
                cache = [KVCache() for _ in self.blocks] if use_cache else None
                logits = self(tokens[:, start:], cache)[:, -1]
            else:
                logits = self(tokens[:, -1:], cache)[:, -1]
            tokens = torch.cat([tokens, _sample(logits, temperature, top_k, generator)], dim=1)
        return tokens.reshape(*prompt.shape[:-1], -1)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One token a row, (b, 1), from logits (b, v)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
