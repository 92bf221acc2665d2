"""Masks and echoes: exact counts, one order for both, the truncated normal, rows of the global batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.train.engine.rng import batch_generator
from semdict.train.masked.masking import draw_masks, draw_ratio
from semdict.train.masked.objectives.sorcen import draw_square, echo_tokens, sample_codes, square_cells


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.sampled_from([16, 64, 256]), st.floats(0.5, 1.0), st.integers(0, 1000))
def test_masks_have_exact_counts_and_nest(batch, length, ratio, seed):
    keep, masked, dropped = draw_masks(batch, length, ratio, seeded(seed))
    assert keep.shape == (batch, length // 2) and (keep.diff(dim=1) > 0).all()
    assert (masked.sum(1) == math.ceil(ratio * length)).all() and (dropped.sum(1) == length // 2).all()
    assert not (dropped & ~masked).any()
    assert torch.equal(torch.zeros_like(dropped).scatter_(1, keep, True), ~dropped)


def test_a_ratio_per_sample_masks_each_its_own_count():
    ratio = torch.tensor([0.5, 0.6951, 1.0])
    _, masked, _ = draw_masks(3, 256, ratio, seeded())
    assert masked.sum(1).tolist() == [128, 178, 256]


def test_masks_are_uniform_over_cells_and_differ_between_samples():
    _, masked, dropped = draw_masks(4000, 16, 0.75, seeded(3))
    assert (masked.float().mean(0) - 0.75).abs().max() < 0.03 and (dropped.float().mean(0) - 0.5).abs().max() < 0.035
    assert len({tuple(row.tolist()) for row in masked}) > 500


def test_equal_generators_draw_equal_masks_and_others_do_not():
    first, again, other = (draw_masks(2, 64, 0.6, seeded(s))[1] for s in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("ratio", [0.49, 1.01, torch.tensor([0.6, 0.2])])
def test_a_ratio_outside_the_range_is_refused(ratio):
    with pytest.raises(ValueError, match=r"\[0.5, 1\]"):
        draw_masks(2, 64, ratio, seeded())


def test_ratio_follows_the_truncated_normal():
    """Against rejection sampling, which shares nothing with the inverse of the distribution."""
    ours = np.array([draw_ratio(rng := seeded(1))] + [draw_ratio(rng) for _ in range(3000)])
    many = draw_ratio(seeded(2), rows=20000).numpy()
    normal = np.random.default_rng(0).normal(0.55, 0.25, 400000)
    want = normal[(normal >= 0.5) & (normal <= 1.0)]
    for got, slack in ((ours, 0.03), (many, 0.012)):
        assert got.min() >= 0.5 and got.max() <= 1.0
        quantiles = np.linspace(0.02, 0.98, 25)
        assert np.abs(np.quantile(got, quantiles) - np.quantile(want, quantiles)).max() < slack


def test_draws_belong_to_rows_of_the_global_batch():
    """Two processes with equal generators hide and echo what one process with the whole batch does."""
    logits = torch.randn(6, 4, 40, generator=seeded(9))

    def draws(start, rows):
        rng = batch_generator(5, start, 6)
        ratio = draw_ratio(rng)
        per_sample = draw_ratio(rng, rows=rows)
        masks = draw_masks(rows, 64, ratio, rng)
        side, cells = draw_square(rows, 8, rng)
        return ratio, side, [per_sample, *masks, cells, sample_codes(logits[start : start + rows], rng)]

    whole, parts = draws(0, 6), [draws(0, 2), draws(2, 4)]
    assert whole[:2] == parts[0][:2] == parts[1][:2]
    for one, *split in zip(whole[2], *(p[2] for p in parts), strict=True):
        assert torch.equal(one, torch.cat(split))


def test_squares_lie_inside_the_grid_and_reach_every_side_and_corner():
    sides, corners = set(), set()
    rng = seeded(4)
    for _ in range(400):
        side, cells = draw_square(3, 16, rng)
        sides.add(side)
        assert cells.shape == (3, side * side) and (cells.diff(dim=1) > 0).all() and cells.max() < 256
        rows, columns = cells // 16, cells % 16
        assert (rows.amax(1) - rows.amin(1) == side - 1).all() and (columns.amax(1) - columns.amin(1) == side - 1).all()
        if side == 8:
            corners |= {(int(c[0] // 16), int(c[0] % 16)) for c in cells}
    assert sides == set(range(8, 17))
    assert max(r for r, _ in corners) == 8 and max(c for _, c in corners) == 8 and min(corners) <= (1, 8)


def test_square_equals_golden_and_samples_are_among_the_likely(golden):
    io = np.load(golden / "sorcen_io.npz")
    cells = square_cells(int(io["echo_square_size"]), torch.from_numpy(io["echo_square_top_left_row_col"]), 16)
    sampled = torch.from_numpy(io["echo_sampled_before_square"]).long()
    echo = echo_tokens(sampled.gather(1, cells), cells, 256, 2024)
    assert np.array_equal(echo.numpy(), io["echo_tokens"])


def test_samples_follow_the_softmax_of_the_top_codes_without_the_first():
    logits = torch.linspace(0, 2, 30)[torch.randperm(30, generator=seeded(0))]
    drawn = sample_codes(logits.expand(50, 400, 30), seeded(1), top=4).flatten()
    order = logits.argsort(descending=True)
    share = torch.bincount(drawn, minlength=30) / len(drawn)
    assert share[order[0]] == 0 and share[order[5:]].sum() == 0
    torch.testing.assert_close(share[order[1:5]], logits[order[1:5]].softmax(0), atol=0.015, rtol=0)
