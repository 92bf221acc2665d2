"""Codebook schedules against the printed table 2 and numbers worked out by hand; floor and ceil must be convicted."""

import math
from fractions import Fraction

import pytest
import torch

from semdict.pipeline.analysis.curves import equation_1
from semdict.pipeline.analysis.estimates import cliff_position
from semdict.train.vcq.schedule import KINDS, bits_per_pixel, codebook_sizes

IMAGENET = 1_281_167
# kind, k_min, k_max: mean (rounded sizes), printed mean, printed BPP, total bits, t* at 50K, 1.28M, 12.8M
TABLE = [
    ("constant", 16384, 16384, 16384.00, 16384, 0.0547, 3584.0, (2, 2, 2)),
    ("constant", 8192, 8192, 8192.00, 8192, 0.0508, 3328.0, (2, 2, 2)),
    ("linear", 2, 16384, 8193.00, 8193, 0.0490, 3208.7, (4, 4, 5)),
    ("cosine", 2, 16384, 5963.68, 5964, 0.0443, 2904.6, (7, 9, 9)),
    ("power", 2, 16384, 4696.33, 4696, 0.0411, 2690.8, (10, 12, 13)),
    ("cosine", 2, 11264, 4100.42, 4100, 0.0423, 2768.9, (8, 9, 10)),
]


@pytest.mark.parametrize("row", TABLE)
def test_table_2(row):
    kind, k_min, k_max, mean, printed, bpp, bits, stars = row
    sizes_L = codebook_sizes(kind, 256, k_min, k_max)
    assert sizes_L.dtype == torch.int64
    assert sizes_L.shape == (256,)
    assert float(sizes_L.double().mean()) == pytest.approx(mean, abs=0.005)
    assert round(float(sizes_L.double().mean())) == printed
    assert bits_per_pixel(sizes_L) == pytest.approx(bpp, abs=6e-5)  # the table's fourth digit comes from rounded bits
    assert float(sizes_L.double().log2().sum()) == pytest.approx(bits, abs=0.05)
    assert tuple(cliff_position(sizes_L, n) for n in (50_000, IMAGENET, 10 * IMAGENET)) == stars


def test_first_sizes():
    first = {
        ("linear", 16384): [2, 66, 130, 195, 259, 323, 387, 452, 516, 580],
        ("cosine", 16384): [2, 2, 3, 5, 7, 10, 13, 17, 22, 27],
        ("power", 16384): [2, 2, 2, 2, 3, 3, 3, 4, 5, 6],
        ("cosine", 11264): [2, 2, 3, 4, 5, 7, 10, 12, 16, 19],
    }
    for (kind, k_max), sizes in first.items():
        assert codebook_sizes(kind, k_max=k_max)[:10].tolist() == sizes


def test_floor_and_ceil_would_fail_the_table():
    """The test above separates the three roundings: the mean of cosine is 5963.17, 5963.68, 5964.16."""
    real_L = 2 + 16382 * (1 - torch.cos(math.pi / 2 * torch.arange(256, dtype=torch.float64) / 255))
    real_L = real_L.round(decimals=9)  # 8193 and 16384 are exact, float64 misses them by 2e-12
    assert float(real_L.floor().mean()) == pytest.approx(5963.17, abs=0.005)
    assert float(real_L.ceil().mean()) == pytest.approx(5964.16, abs=0.005)
    assert not torch.equal(codebook_sizes("cosine"), real_L.floor().long())
    assert not torch.equal(codebook_sizes("cosine"), real_L.ceil().long())


def test_linear_is_exact_rational_arithmetic():
    exact = [math.floor(2 + Fraction(16382 * t, 255) + Fraction(1, 2)) for t in range(256)]
    assert codebook_sizes("linear").tolist() == exact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "k_min", "k_max"), [(256, 2, 16384), (16, 2, 64), (7, 5, 6), (1, 3, 3), (9, 1, 9)])
def test_ends_and_order(kind, length, k_min, k_max):
    sizes_L = codebook_sizes(kind, length, k_min, k_max, power=1.7)
    assert int(sizes_L[-1]) == k_max
    assert int(sizes_L[0]) == (k_max if kind == "constant" else k_min)
    assert bool((sizes_L.diff() >= 0).all())
    assert len(sizes_L) == length


@pytest.mark.parametrize("kind", KINDS)
def test_equal_ends_are_the_constant_schedule(kind):
    assert torch.equal(codebook_sizes(kind, 32, 77, 77), torch.full((32,), 77))


def test_table_1():
    printed = {50_000: 2, 118_000: 2, IMAGENET: 2, 12_000_000: 2, 400_000_000: 3, 5_000_000_000: 3}
    for samples, star in printed.items():
        assert equation_1(samples, 16384) == star
        assert cliff_position(codebook_sizes("constant"), samples) == star
    assert pytest.approx(209.5, abs=0.05) == 16384**2 / IMAGENET


def test_cliff_may_not_be_reached():
    assert cliff_position([16] * 4, 2**20) is None
    assert cliff_position([16] * 4, 2**16) == 4
    assert bits_per_pixel(torch.tensor([1, 2, 8]), pixels=8) == 0.5


@pytest.mark.parametrize(
    "bad", [{"kind": "cosin"}, {"kind": "linear", "k_min": 9, "k_max": 4}, {"kind": "power", "power": 0.0}]
)
def test_bad_schedule_is_named(bad):
    with pytest.raises(ValueError, match=r"cosin|k_min 9|power 0"):
        codebook_sizes(**bad)
