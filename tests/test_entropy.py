"""Entropy along the sequence and between codebooks, against prefix counting, closed forms and the chain rule."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.pipeline.analysis import conditional_entropy
from semdict.pipeline.analysis.cooccurrence import (
    cooccurrence,
    entropy_given_column,
)
from semdict.pipeline.analysis.estimates import (
    cliff_position,
    remaining_capacity,
    remaining_entropy,
    shuffled_null,
    uniform_null,
)
from semdict.pipeline.shards.ids import order0_entropy

IMAGENET = 1_281_167


def by_prefixes(tokens: np.ndarray) -> np.ndarray:
    """H(x_<=t) - H(x_<t) by its definition, from counts of prefixes."""
    n, previous, curve = len(tokens), 0.0, []
    for t in range(1, tokens.shape[1] + 1):
        counts = np.array(list(Counter(map(tuple, tokens[:, :t].tolist())).values()), np.float64)
        joint = -(counts / n * np.log2(counts / n)).sum()
        curve.append(joint - previous)
        previous = joint
    return np.array(curve)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    length=st.integers(1, 30),
    codes=st.integers(1, 5),
    repeat=st.integers(1, 4),
    copies=st.booleans(),
    dtype=st.sampled_from(["uint8", "uint16", "int16", "int32", "int64", "uint64"]),
    seed=st.integers(0, 999),
)
def test_equals_prefix_counting(n, length, codes, repeat, copies, dtype, seed):
    """With and without duplicate rows, and beyond the block after which duplicates are merged."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, codes, (n, length)).astype(dtype)
    tokens = tokens[rng.integers(0, n, n)] if copies else tokens
    tokens = np.repeat(tokens, repeat, axis=0)[rng.permutation(n * repeat)]
    assert np.abs(conditional_entropy(tokens) - by_prefixes(tokens)).max() < 1e-9


def test_large_ids_and_strides():
    """Ids near 2^63 do not overflow the key of a group and a code, and strided arrays equal their copies."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (300, 12))
    huge = tokens * (1 << 60)
    assert np.allclose(conditional_entropy(huge), by_prefixes(tokens), atol=1e-9)
    assert np.allclose(conditional_entropy(tokens[::2, ::-1]), by_prefixes(tokens[::2, ::-1]), atol=1e-9)


def test_chain_rule():
    """The curve sums to the entropy of whole rows."""
    tokens = np.random.default_rng(0).integers(0, 2, (2000, 14))
    counts = np.unique(tokens, axis=0, return_counts=True)[1]
    whole = math.log2(2000) - (counts * np.log2(counts)).sum() / 2000
    assert conditional_entropy(tokens).sum() == pytest.approx(whole, abs=1e-9)


def test_extremes():
    """Equal rows carry nothing; a first column that is unique in every row carries everything."""
    assert not conditional_entropy(np.full((500, 40), 7)).any()
    distinct = np.random.default_rng(0).integers(0, 9, (512, 20))
    distinct[:, 0] = np.random.default_rng(1).permutation(512)
    assert np.allclose(conditional_entropy(distinct), [9] + [0] * 19, atol=1e-12)
    assert conditional_entropy(np.zeros((0, 4), int)).tolist() == [0] * 4
    counter_example = np.stack([np.zeros(1024, int), np.arange(1024) % 256], axis=1)
    assert np.allclose(conditional_entropy(counter_example), [0, 8]), "more than log2 N - log2 K at position 2"
    for bad in (np.zeros((3, 4)), np.zeros(3, int), np.array([[0, -1]])):
        with pytest.raises(ValueError):
            conditional_entropy(bad)


def test_invariance_and_bounds():
    """Neither the order of rows nor the numbering of codes matters; no position carries more than log2 K_t."""
    rng = np.random.default_rng(0)
    sizes = np.array([2, 2, 3, 5, 8, 13, 21, 34, 55, 89])
    tokens = (rng.random((3000, 10)) ** 2 * sizes).astype(np.uint16)
    curve = conditional_entropy(tokens)
    assert (curve <= np.log2(sizes) + 1e-12).all() and curve.sum() <= math.log2(3000) + 1e-9
    assert np.allclose(conditional_entropy(tokens[rng.permutation(3000)]), curve, atol=1e-10)
    names = [rng.permutation(4 * size)[:size] for size in sizes]
    renamed = np.stack([names[t][tokens[:, t]] for t in range(10)], axis=1)
    assert np.allclose(conditional_entropy(renamed), curve, atol=1e-10)
    assert not np.allclose(conditional_entropy(tokens[:, ::-1]), curve, atol=0.1)


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ([16384] * 4, [13.99, 6.29, 0.005, 0]),
        ("cosine", [1, 1, 1.58, 2.32, 2.81, 3.32, 3.67, 3.51, 1.01, 0.06]),
    ],
)
def test_uniform_null_at_imagenet_size(sizes, want):
    """Uniform noise has its cliff at t*, to the printed digits."""
    if sizes == "cosine":
        sizes = np.floor(2 + 16382 * (1 - np.cos(np.pi * np.arange(256) / 510)) + 0.5).astype(int)
    assert np.abs(uniform_null(IMAGENET, sizes)[: len(want)] - want).max() < 0.006


def test_shuffled_null_keeps_marginals_only():
    """Two equal columns: the second carries nothing; after shuffling it carries all that the sample size allows."""
    column = np.random.default_rng(0).integers(0, 4, 20000)
    tokens = np.stack([column, column], axis=1)
    assert conditional_entropy(tokens)[1] < 1e-12
    curve = shuffled_null(tokens, seed=1)
    assert curve[0] == pytest.approx(conditional_entropy(tokens)[0], abs=1e-12) and curve[1] > 1.99
    assert np.array_equal(curve, shuffled_null(tokens, seed=1))


def test_cliff_positions_of_the_paper():
    """Table 1 (equation 1), and equation 2 for three schedules; None if the sequence ends before t*."""
    for rows, position in ((50_000, 2), (118_000, 2), (IMAGENET, 2), (400_000_000, 3), (5_000_000_000, 3)):
        assert cliff_position([16384] * 256, rows) == position
    share = np.arange(256) / 255
    for growth, want in ((share, (4, 4, 5)), (1 - np.cos(np.pi * share / 2), (7, 9, 9)), (share**2.5, (10, 12, 13))):
        sizes = np.floor(2 + 16382 * growth + 0.5)
        assert tuple(cliff_position(sizes, rows) for rows in (50_000, IMAGENET, 12_811_670)) == want
    assert cliff_position([2] * 4, 100) is None


def test_remaining_curves():
    tokens = np.random.default_rng(0).integers(0, 4, (4096, 10))
    left = remaining_entropy(conditional_entropy(tokens), 4096)
    assert left[0] == 12 and (np.diff(left) <= 1e-12).all()
    assert np.allclose(remaining_capacity([4] * 4, 4096), [12, 10, 8, 6])


def test_pairs():
    """Joint counts by brute force, and the measures by their definitions, on a table with empty rows."""
    rng = np.random.default_rng(0)
    gen, disc = rng.integers(0, 6, (40, 5)).astype(np.uint16), rng.integers(0, 9, (40, 5)).astype(np.uint16)
    gen[disc == 3] = 2
    joint = cooccurrence(gen, disc, 7, 10)
    count = Counter(zip(gen.ravel().tolist(), disc.ravel().tolist(), strict=True))
    assert all(joint[g, d] == count[g, d] for g in range(7) for d in range(10)) and joint.sum() == 200
    again = cooccurrence(gen[:10], disc[:10], 7, 10)
    assert np.array_equal(cooccurrence(gen[10:], disc[10:], 7, 10, out=again), joint)
    per_word = entropy_given_column(joint)
    for d in range(10):
        share = joint[:, d][joint[:, d] > 0] / max(1, joint[:, d].sum())
        want = -(share * np.log2(share)).sum() if joint[:, d].any() else np.nan
        assert per_word[d] == pytest.approx(want, abs=1e-12, nan_ok=True)
    assert per_word[3] == pytest.approx(0, abs=1e-12) and np.isnan(per_word[9])
    for wrong in ((gen + 5, disc), (gen, disc[:3])):
        with pytest.raises(ValueError):
            cooccurrence(*wrong, 7, 10)


def test_order0():
    assert order0_entropy(np.array([1, 1, 1, 1, 0])) == 2 and order0_entropy(np.zeros(3)) == 0
    assert order0_entropy(np.array([5])) == 0 and order0_entropy(np.array([3, 1])) == pytest.approx(0.811278, abs=1e-6)
