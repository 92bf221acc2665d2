"""Masks and echoes: exact counts, one order for both, the truncated normal, rows of the global batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.train.engine.rng import batch_generator
from semdict.train.masked.masking import draw_masks, draw_ratios, row_shares
from semdict.train.masked.objectives.sorcen import draw_squares, sample_codes, square_mask


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
    got = draw_ratios(20000, seeded(2), group=1).numpy()
    normal = np.random.default_rng(0).normal(0.55, 0.25, 400000)
    want = normal[(normal >= 0.5) & (normal <= 1.0)]
    assert got.min() >= 0.5 and got.max() <= 1.0
    quantiles = np.linspace(0.02, 0.98, 25)
    assert np.abs(np.quantile(got, quantiles) - np.quantile(want, quantiles)).max() < 0.012


def test_a_group_of_rows_shares_its_ratio_and_its_square_whatever_the_split():
    """64 ratios in a batch of 4,096, as 64 processes of 64 rows have in the released trainings, not one."""
    ratios = draw_ratios(4096, batch_generator(3, 0, 4096))
    assert ratios.reshape(64, 64).std(dim=1).max() == 0 and len(ratios.unique()) == 64
    sides = draw_squares(4096, 16, batch_generator(4, 0, 4096)).sum(dim=1).sqrt().reshape(64, 64)
    assert sides.std(dim=1).max() == 0 and len(sides[:, 0].unique()) == 9  # 8 to 16 cells
    for rows in (32, 48, 4096):  # processes and micro-batches that cut groups in two
        parts = [draw_ratios(n, batch_generator(3, start, 4096)) for start, n in spans(4096, rows)]
        assert torch.equal(torch.cat(parts), ratios)


def spans(total, rows):
    return [(start, min(rows, total - start)) for start in range(0, total, rows)]


def test_row_shares_give_the_mean_over_groups_that_separate_processes_compute():
    """Two processes, each with its own ratio: the mean of their means, which the mean over all cells is not."""
    masks = [draw_masks(4, 64, ratio, seeded(1))[1] for ratio in (0.5, 0.9)]
    nats = [torch.rand(4, 64, generator=seeded(2)) + number for number in (0, 1)]
    released = sum(value[mask].mean() for value, mask in zip(nats, masks, strict=True)) / 2
    mask, value = torch.cat(masks), torch.cat(nats)
    torch.testing.assert_close((value[mask] * row_shares(mask)).sum(), released)
    assert abs(value[mask].mean() - released) > 0.1
    assert row_shares(torch.zeros(2, 3, dtype=torch.bool)).shape == (0,)


def test_draws_belong_to_rows_of_the_global_batch():
    """Two processes with equal generators hide and echo what one process with the whole batch does."""

    def draws(start, rows):
        rng = batch_generator(5, start, 6)
        ratio = draw_ratios(rows, rng, group=4)
        return ratio, *draw_masks(rows, 64, ratio, rng), draw_squares(rows, 8, rng, group=4)

    whole, parts = draws(0, 6), [draws(0, 2), draws(2, 4)]
    for one, *split in zip(whole, *parts, strict=True):
        assert torch.equal(one, torch.cat(split))


def test_squares_lie_inside_the_grid_and_reach_every_side_and_corner():
    sides, corners = set(), set()
    inside = draw_squares(1200, 16, seeded(4), group=1).reshape(-1, 16, 16)
    for cells in inside:
        rows, columns = cells.any(dim=1).nonzero()[:, 0], cells.any(dim=0).nonzero()[:, 0]
        side = len(rows)
        sides.add(side)
        assert len(columns) == side and cells.sum() == side * side
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == side - 1
        if side == 8:
            corners.add((int(rows[0]), int(columns[0])))
    assert sides == set(range(8, 17))
    assert max(r for r, _ in corners) == 8 and max(c for _, c in corners) == 8 and min(corners) <= (1, 8)


def test_square_equals_golden(golden):
    io = np.load(golden / "sorcen_io.npz")
    side, corner = int(io["echo_square_size"]), torch.from_numpy(io["echo_square_top_left_row_col"])
    inside = square_mask(torch.full((len(corner), 1), side), corner, 16)
    sampled = torch.from_numpy(io["echo_sampled_before_square"]).long()
    assert np.array_equal(sampled.masked_fill(~inside, 2024).numpy(), io["echo_tokens"])


def test_samples_follow_the_softmax_of_the_top_codes_without_the_first():
    logits = torch.linspace(0, 2, 30)[torch.randperm(30, generator=seeded(0))]
    drawn = sample_codes(logits.expand(20000, 30), torch.rand(20000, 4, generator=seeded(1)))
    order = logits.argsort(descending=True)
    share = torch.bincount(drawn, minlength=30) / len(drawn)
    assert share[order[0]] == 0 and share[order[5:]].sum() == 0
    torch.testing.assert_close(share[order[1:5]], logits[order[1:5]].softmax(0), atol=0.015, rtol=0)
