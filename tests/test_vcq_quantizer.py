"""The quantizer against brute force in float64, a separately written plain VQ, and what each position may reach."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from semdict.train.vcq import quantizer as module
from semdict.train.vcq.quantizer import VariableQuantizer, nearest_codes, position_groups, search_flops
from semdict.train.vcq.schedule import KINDS, codebook_sizes
from semdict.train.vcq.usage import CodeReset, CodeUsage, expected_hits

L, K, D = 24, 96, 5


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def make(kind="cosine", l2=True, groups=16, seed=0, **keys):
    quantizer = VariableQuantizer(codebook_sizes(kind, L, 2, K), D, l2, groups=groups, **keys)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.randn(K, D, generator=rng(seed)))
    return quantizer


def brute_force(z_BLD, codes_KD, sizes):
    """(B, L) smallest squared distances in float64, one position at a time."""
    z, e = z_BLD.double(), codes_KD.double()
    return torch.stack(
        [(z[:, t, None] - e[None, :k]).square().sum(-1).min(-1).values for t, k in enumerate(sizes)], dim=1
    )


def distances(z_BLD, codes_KD, ids_BL):
    return (z_BLD.double() - codes_KD.double()[ids_BL]).square().sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("l2", [True, False])
@pytest.mark.parametrize("groups", [1, 4, 16, 64])
@pytest.mark.parametrize("batch", [1, 7])
def test_nearest_agrees_with_brute_force_under_every_grouping(kind, l2, groups, batch):
    quantizer = make(kind, l2, groups)
    z_BLD = quantizer.project(torch.randn(batch, L, D, generator=rng(1)))
    codes_KD = quantizer.project(quantizer.codebook.detach())
    ids_BL = quantizer.search(z_BLD)
    assert bool((ids_BL < quantizer.sizes_L).all())
    want = brute_force(z_BLD, codes_KD, quantizer.sizes)
    torch.testing.assert_close(distances(z_BLD, codes_KD, ids_BL), want, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31))
def test_any_order_of_sizes_is_respected(length, groups, k, seed):
    """Not only growing schedules: a run's strip is cut by its own smallest and largest size."""
    sizes = tuple(torch.randint(1, k + 1, (length,), generator=rng(seed)).tolist())
    z_BLD, codes_KD = torch.randn(3, length, 4, generator=rng(seed)), torch.randn(k, 4, generator=rng(seed + 1))
    ids_BL = nearest_codes(z_BLD, codes_KD, sizes, groups)
    assert bool((ids_BL < torch.tensor(sizes)).all())
    torch.testing.assert_close(distances(z_BLD, codes_KD, ids_BL), brute_force(z_BLD, codes_KD, sizes))


def test_small_blocks_give_the_same_ids(monkeypatch):
    quantizer = make()
    z_BLD = quantizer.project(torch.randn(9, L, D, generator=rng(1)))
    want = quantizer.search(z_BLD)
    monkeypatch.setitem(module.BLOCK, "cpu", 500)
    assert torch.equal(quantizer.search(z_BLD), want)


def test_a_forbidden_code_is_never_chosen_even_when_it_is_the_input():
    quantizer = make(l2=False)
    for t, k in enumerate(quantizer.sizes[:-1]):
        z_BLD = quantizer.codebook.detach()[k:, None].expand(-1, L, -1)
        assert int(quantizer.search(z_BLD)[:, t].max()) < k


def test_ties_go_to_the_lowest_code():
    codes_KD = torch.randn(K, D, generator=rng()).repeat_interleave(2, 0)[:K]
    ids_BL = nearest_codes(torch.randn(6, L, D, generator=rng(1)), codes_KD, (K,) * L)
    assert bool((ids_BL % 2 == 0).all())


def plain_vq(z_BLD, codebook_KD, beta):
    """VQ-VAE's quantizer as usually written: one-shot distances, gather, two terms."""
    z, e = z_BLD, codebook_KD
    ids_BL = torch.cdist(z.detach(), e.detach()[None]).argmin(-1)
    q_BLD = e[ids_BL]
    loss = ((q_BLD - z.detach()) ** 2).mean() + beta * ((q_BLD.detach() - z) ** 2).mean()
    return z + (q_BLD - z).detach(), ids_BL, loss


@pytest.mark.parametrize("l2", [True, False])
def test_constant_schedule_is_plain_vq(l2):
    quantizer = make("constant", l2, beta=0.25)
    z = torch.randn(4, L, D, generator=rng(1), requires_grad=True)
    up = torch.randn(4, L, D, generator=rng(2))
    got = quantizer(z)
    ((got.codes * up).sum() + got.loss).backward()
    z2, e2 = z.detach().clone().requires_grad_(), quantizer.codebook.detach().clone().requires_grad_()
    scale = (lambda x: F.normalize(x, dim=-1)) if l2 else (lambda x: x)
    codes, ids, loss = plain_vq(scale(z2), scale(e2), 0.25)
    ((codes * up).sum() + loss).backward()
    assert torch.equal(got.ids, ids)
    torch.testing.assert_close(got.loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z.grad, z2.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.codebook.grad, e2.grad, rtol=1e-5, atol=1e-6)


def test_codes_beyond_a_position_change_nothing_there():
    quantizer = make(l2=False)
    z_BLD = torch.randn(5, L, D, generator=rng(1))
    before = quantizer.search(z_BLD)
    t = L // 2
    with torch.no_grad():
        quantizer.codebook[quantizer.sizes[t] :] = z_BLD[0, t]  # as tempting as can be
    after = quantizer.search(z_BLD)
    assert torch.equal(after[:, : t + 1], before[:, : t + 1])
    assert not torch.equal(after, before)
    with torch.no_grad():
        quantizer.codebook[0] = z_BLD[0, 0]
    assert int(quantizer.search(z_BLD)[0, 0]) == 0


def test_gradients():
    quantizer = make(l2=False, beta=0.0, codebook_weight=1.0)
    z = torch.randn(3, L, D, generator=rng(1), requires_grad=True)
    up = torch.randn(3, L, D, generator=rng(2))
    out = quantizer(z)
    (out.codes * up).sum().backward()
    torch.testing.assert_close(z.grad, up)
    assert quantizer.codebook.grad is None  # nothing flows into the codes but through the codebook term
    z.grad = None
    out = quantizer(z)
    out.loss.backward()
    assert z.grad is None or not z.grad.any()  # beta 0: no commitment; the codebook term gives the input nothing
    used = torch.zeros(K, dtype=torch.bool)
    used[out.ids.flatten()] = True
    moved = quantizer.codebook.grad.abs().sum(1) > 0
    assert torch.equal(moved, used)
    assert not used.all()


def test_strength_lets_the_input_through():
    quantizer = make(beta=1.0, codebook_weight=0.0)
    z = torch.randn(3, L, D, generator=rng(1))
    open_, half, full = (quantizer(z, s) for s in (0.0, 0.5, 1.0))
    torch.testing.assert_close(open_.codes, quantizer.project(z))
    torch.testing.assert_close(half.codes, (open_.codes + full.codes) / 2)
    torch.testing.assert_close(full.codes, quantizer.lookup(full.ids))
    assert [float(q.loss.detach() / full.loss.detach()) for q in (open_, half)] == [0.0, 0.5]


def test_commitment_pulls_the_input_alone():
    quantizer = make(l2=False, beta=2.0, codebook_weight=0.0)
    z = torch.randn(3, L, D, generator=rng(1), requires_grad=True)
    out = quantizer(z)
    out.loss.backward()
    want = 2.0 * 2 * (z.detach() - quantizer.codebook.detach()[out.ids]) / z.numel()
    torch.testing.assert_close(z.grad, want)
    assert not quantizer.codebook.grad.any()


@pytest.mark.parametrize("l2", [True, False])
def test_quantizing_a_reachable_code_returns_it(l2):
    quantizer = make(l2=l2)
    ids_BL = torch.stack([torch.randint(0, k, (8,), generator=rng(k)) for k in quantizer.sizes], 1)
    out = quantizer(quantizer.lookup(ids_BL))
    assert torch.equal(out.ids, ids_BL)
    assert float(out.loss.detach()) < 1e-12


def test_parameters_do_not_depend_on_the_schedule():
    counts = {sum(p.numel() for p in make(kind).parameters()) for kind in KINDS}
    assert counts == {K * D}


def test_search_flops_are_those_of_the_prefixes():
    quantizer = make(l2=False, groups=4)
    z_BLD = torch.randn(3, L, D, generator=rng())
    with FlopCounterMode(display=False) as counter:
        quantizer.search(z_BLD)
    assert counter.get_total_flops() == 3 * search_flops(quantizer.sizes, D, 4)
    full = tuple(codebook_sizes("constant").tolist())
    cosine = tuple(codebook_sizes("cosine").tolist())
    ratios = [search_flops(cosine, 12, g) / search_flops(full, 12, g) for g in (4, 8, 16, 32, 64, 256)]
    assert ratios == pytest.approx([0.495, 0.427, 0.394, 0.378, 0.370, 0.364], abs=1e-3)


def test_positions_matter_under_a_growing_codebook_only():
    z_BLD = torch.randn(6, L, D, generator=rng(1))
    flip = torch.arange(L - 1, -1, -1)
    for kind, same in (("constant", True), ("cosine", False)):
        quantizer = make(kind)
        assert torch.equal(quantizer.search(z_BLD)[:, flip], quantizer.search(z_BLD[:, flip])) is same


def test_autocast_and_tf32_do_not_reach_the_search():
    quantizer = make()
    z_BLD = torch.randn(16, L, D, generator=rng(1))
    want = quantizer(z_BLD)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            got = quantizer(z_BLD)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got.ids, want.ids)
    assert got.codes.dtype == torch.float32
    assert torch.equal(got.loss, want.loss)


def test_groups_cut_the_positions_once():
    for length, groups in [(256, 16), (10, 4), (3, 8), (1, 1)]:
        cuts = list(position_groups(length, groups))
        assert [t for start, stop in cuts for t in range(start, stop)] == list(range(length))
        assert all(stop > start for start, stop in cuts)
        assert len(cuts) == min(length, groups)


def test_usage_counts_per_position():
    sizes_L = torch.tensor([2, 4])
    usage = CodeUsage(sizes_L)
    usage.add(torch.tensor([[0, 0], [1, 1], [0, 2]]))
    usage.add(torch.tensor([[1, 3]]))
    utilisation_L, used_L = usage.per_position()
    assert utilisation_L.tolist() == pytest.approx([1.0, 1.0])
    assert used_L.tolist() == [1.0, 1.0]
    assert usage.summary()["images"] == 4
    usage.clear()
    usage.add(torch.tensor([[0, 1], [0, 2]]))
    utilisation_L, used_L = usage.per_position()
    assert utilisation_L.tolist() == pytest.approx([0.5, 0.5])
    assert used_L.tolist() == [0.5, 0.5]


def test_expected_hits_are_those_of_even_use():
    hits_K = 256 * expected_hits(codebook_sizes("cosine"))
    named = {0: 593, 1: 593, 100: 44, 1000: 11.9, 8192: 1.88, 15000: 0.23, 16000: 0.063, 16383: 0.016}
    for code, hits in named.items():
        assert float(hits_K[code]) == pytest.approx(hits, rel=0.03)
    assert float(hits_K.sum()) == pytest.approx(256 * 256)


def test_reset_reseeds_dead_codes_from_positions_that_reach_them():
    quantizer = make(l2=False)
    sizes_L = quantizer.sizes_L
    reset = CodeReset(sizes_L, protected=4, patience=20.0)
    before = quantizer.codebook.detach().clone()
    ids_BL = torch.zeros(64, L, dtype=torch.int64)
    marks_BLD = (
        torch.arange(L, dtype=torch.float32)[None, :, None].expand(64, L, D).clone()
    )  # a vector says its position
    changed = []
    for seed in range(40):
        changed.append(reset.step(quantizer, marks_BLD, ids_BL, rng(seed)))
    codes = torch.cat(changed).unique()
    assert codes.min() >= 4
    assert int(codes.max()) >= K // 2
    assert torch.equal(quantizer.codebook.detach()[:4], before[:4])
    positions = quantizer.codebook.detach()[codes, 0].long()
    assert bool((sizes_L[positions] > codes).all())


def test_reset_leaves_a_healthy_tail_alone():
    """Even use of every position: rare tail codes stay, though they occur far less often than 1 / K."""
    quantizer = make(l2=False)
    reset = CodeReset(quantizer.sizes_L, protected=2, patience=20.0)
    before = quantizer.codebook.detach().clone()
    generator = rng(3)
    for _ in range(300):
        ids_BL = (torch.rand(8, L, generator=generator) * quantizer.sizes_L).long()
        assert not len(reset.step(quantizer, torch.zeros(8, L, D), ids_BL, generator))
    assert torch.equal(quantizer.codebook.detach(), before)
