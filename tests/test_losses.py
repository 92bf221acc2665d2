"""Losses against float64 autograd written out in full, and against the golden fixtures."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.train.masked import losses
from semdict.train.masked.losses import (
    codebook_contrastive,
    info_nce,
    masked_contrast,
    neighbour_table,
    projection_contrast,
    reconstruction_loss,
    uniformity,
)


def full_contrast(z, words, centroids, neighbours, weights, temperature):
    """The loss as a mean over rows of -sum_j w_j log p_j with every logit written out."""
    logp = (z @ centroids.T / temperature).log_softmax(dim=1)
    return -(weights[words] * logp.gather(1, neighbours[words])).sum(dim=1).mean()


def problem(n, k, d, size, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    centroids = F.normalize(torch.randn(k, d, generator=rng, dtype=dtype), dim=1)
    z = F.normalize(torch.randn(n, d, generator=rng, dtype=dtype), dim=1)
    words = torch.randint(0, k, (n,), generator=rng)
    return z, words, centroids, *neighbour_table(centroids, size)


def both(z, words, centroids, neighbours, weights, temperature):
    """((value, gradient) of ours, (value, gradient) of the full version in float64)."""
    results = []
    for loss, dtype in ((codebook_contrastive, z.dtype), (full_contrast, torch.float64)):
        leaf = z.detach().to(dtype).requires_grad_()
        value = loss(leaf, words, centroids.to(dtype), neighbours, weights.to(dtype), temperature)
        (3 * value).backward()  # a gradient from outside must scale
        results.append((value.detach().double(), leaf.grad.double()))
    return results


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.integers(2, 30), st.integers(1, 9), st.integers(1, 6), st.floats(0.02, 3), st.integers(0, 99)
)
def test_contrast_equals_float64_autograd(n, k, d, size, temperature, seed):
    case = problem(n, k, d, min(size, k), seed)
    (ours, grad), (full, want) = both(*case, temperature)
    assert ours == pytest.approx(full.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-12)


def test_contrast_in_many_chunks_equals_one(monkeypatch):
    case = problem(101, 64, 16, 6, dtype=torch.float32)
    whole = both(*case, 0.1)
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 7 * 64)  # 7 rows a chunk: 14 full ones and a rest of 3
    parts = both(*case, 0.1)
    assert parts[0][0] == pytest.approx(whole[1][0].item(), abs=2e-6)
    torch.testing.assert_close(parts[0][1], whole[1][1], rtol=1e-4, atol=1e-7)


def test_contrast_passes_gradcheck():
    z, *rest = problem(5, 7, 3, 3)
    assert torch.autograd.gradcheck(lambda x: codebook_contrastive(x, *rest, 0.3), z.requires_grad_())


@pytest.mark.parametrize("scale", [1e-30, 1e3, 1e6])
def test_contrast_with_extreme_logits_is_finite_and_right(scale):
    z, *rest = problem(20, 50, 8, 6, dtype=torch.float32)
    (ours, grad), (full, want) = both(z * scale, *rest, 0.1)
    assert torch.isfinite(ours) and torch.isfinite(grad).all()
    assert ours == pytest.approx(full.item(), rel=2e-6)
    torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-4)


def test_contrast_of_nothing_is_zero_with_zero_gradients():
    projection = torch.nn.Linear(4, 8, bias=False)
    _, _, *table = problem(1, 12, 8, 3, dtype=torch.float32)
    loss = projection_contrast(projection(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.long), *table)
    loss.backward()
    assert loss == 0 and torch.equal(projection.weight.grad, torch.zeros(8, 4))


def test_contrast_keeps_no_array_of_rows_by_words():
    """What autograd saves between forward and backward stays (N, D)."""
    z, *rest = problem(256, 512, 8, 6, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        codebook_contrastive(z.requires_grad_(), *rest, 0.1)
    assert saved and max(saved) <= z.numel()


def test_contrast_peak_of_live_arrays_is_one_chunk(monkeypatch):
    """Count every array that an operation makes: none as large as (N, K), though N x K is 64 chunks."""
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 4 * 512)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(
                max((t.numel() for t in (out if isinstance(out, tuple) else (out,)) if hasattr(t, "numel")), default=0)
            )
            return out

    z, *rest = problem(256, 512, 8, 6, dtype=torch.float32)
    with Watch():
        codebook_contrastive(z.requires_grad_(), *rest, 0.1).backward()
    assert max(largest) <= max(4 * 512, 512 * 8)


def test_contrast_without_gradient_gives_the_same_value():
    z, *rest = problem(9, 20, 5, 4)
    with torch.no_grad():
        assert codebook_contrastive(z, *rest, 0.1) == codebook_contrastive(z.clone().requires_grad_(), *rest, 0.1)


def test_contrast_under_autocast_stays_exact_on_the_cpu():
    z, *rest = problem(30, 40, 16, 6, dtype=torch.float32)
    want = codebook_contrastive(z, *rest, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert codebook_contrastive(z, *rest, 0.1) == want


def test_contrast_in_bfloat16_accumulates_in_float32():
    z, *rest = problem(64, 300, 32, 6, dtype=torch.float32)
    low = z.bfloat16().requires_grad_()
    loss = codebook_contrastive(low, *rest, 0.1)
    loss.backward()
    (_, _), (full, want) = both(low.detach().float(), *rest, 0.1)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(full.item(), rel=1e-6)
    torch.testing.assert_close(low.grad.double(), want / 3, rtol=1e-2, atol=1e-5)


def test_contrast_refuses_what_does_not_fit():
    z, words, centroids, ids, weights = problem(4, 10, 6, 3)
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(10, 6\)"):
        codebook_contrastive(z[:, :5], words, centroids, ids, weights, 0.1)
    with pytest.raises(ValueError, match="K=10"):
        codebook_contrastive(z, words, centroids, ids[:9], weights[:9], 0.1)
    with pytest.raises(ValueError, match="frozen"):
        codebook_contrastive(z, words, centroids.clone().requires_grad_(), ids, weights, 0.1)


def test_neighbour_table_is_brute_force_even_with_doubles():
    rng = torch.Generator().manual_seed(5)
    centroids = torch.randn(40, 7, generator=rng, dtype=torch.float64) * torch.rand(40, 1, generator=rng) * 9
    centroids[17] = 2 * centroids[3]  # the same direction: each is its own first neighbour all the same
    ids, weights = neighbour_table(centroids, size=4, tau=0.2)
    unit = centroids.numpy() / np.linalg.norm(centroids.numpy(), axis=1, keepdims=True)
    for k in range(40):
        sims = unit @ unit[k]
        assert ids[k, 0] == k and len(set(ids[k].tolist())) == 4
        np.testing.assert_allclose(sims[ids[k]], np.sort(sims)[::-1][:4], atol=1e-12)
        odds = np.exp(sims[ids[k]] / 0.2)
        np.testing.assert_allclose(weights[k], odds / odds.sum(), atol=1e-12)
    with pytest.raises(ValueError, match="neighbour set of 41"):
        neighbour_table(centroids, size=41)


def test_neighbour_table_equals_golden(golden):
    raw = torch.from_numpy(np.load(golden / "lease_dictionary_raw.npy"))
    want = np.load(golden / "lease_neighbours.npz")
    ids, weights = neighbour_table(raw)
    assert np.array_equal(ids.numpy(), want["neighbour_idx"])
    np.testing.assert_allclose(weights.numpy(), want["neighbour_weights"], atol=5e-6)
    unit = F.normalize(raw, dim=1)
    np.testing.assert_allclose((unit[:, None] * unit[ids]).sum(-1).numpy(), want["neighbour_sims"], atol=1e-6)


def test_reconstruction_loss_is_its_definition():
    rng = torch.Generator().manual_seed(0)
    logits, codes = torch.randn(11, 7, generator=rng, dtype=torch.float64), torch.randint(0, 7, (11,), generator=rng)
    logp = logits.log_softmax(1)
    want = (0.9 * -logp.gather(1, codes[:, None])[:, 0] + 0.1 * -logp.mean(1)).mean()
    assert reconstruction_loss(logits, codes).item() == pytest.approx(want.item(), rel=1e-12)
    assert reconstruction_loss(logits[:0], codes[:0]) == 0
    assert reconstruction_loss(torch.zeros(3, 1024), torch.zeros(3).long()).item() == pytest.approx(math.log(1024))


def test_masked_contrast_is_hard_cross_entropy_of_cosines():
    z, words, centroids, *_ = problem(13, 20, 6, 3)
    want = F.cross_entropy(F.normalize(5 * z, dim=1) @ centroids.T / 0.1, words)
    assert masked_contrast(5 * z, words, centroids).item() == pytest.approx(want.item(), rel=1e-10)


def test_info_nce_rows_are_the_teacher_and_only_one_direction():
    rng = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(2, 6, 5, generator=rng, dtype=torch.float64)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (teacher, student)]
    odds = (unit[0] @ unit[1].T / 0.3).exp()
    want = -(odds.diagonal() / odds.sum(dim=1)).log().mean()
    other = -(odds.diagonal() / odds.sum(dim=0)).log().mean()
    assert info_nce(teacher, student).item() == pytest.approx(want.item(), rel=1e-12)
    assert abs(want - other) > 1e-3


def test_uniformity_counts_the_diagonal_and_gathered_rows():
    rows = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    want = (3 * 1 + 2 * 0 + 4 * 0.5) / 9
    assert uniformity(rows).item() == pytest.approx(want)
    assert uniformity(rows[:1], gather=lambda own: torch.cat([own, rows[1:]])).item() == pytest.approx(want)


def test_shares_weigh_the_vectors_of_the_contrast_and_the_tokens():
    """Weights of 1 / N are the plain mean; others are the weighted sum of one-row losses, gradients included."""
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(5, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    centroids = F.normalize(torch.randn(7, 4, generator=rng, dtype=torch.float64), dim=1)
    words, shares = torch.tensor([0, 3, 3, 6, 1]), torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2], dtype=torch.float64)
    table = (centroids, *neighbour_table(centroids, 3), 0.2)
    (grad,) = torch.autograd.grad(codebook_contrastive(z, words, *table, shares), z)
    rows = [codebook_contrastive(z[i : i + 1], words[i : i + 1], *table) for i in range(5)]
    want = sum(share * row for share, row in zip(shares, rows, strict=True))
    torch.testing.assert_close(codebook_contrastive(z, words, *table, shares), want)
    torch.testing.assert_close(grad, torch.autograd.grad(want, z)[0])
    even = torch.full((5,), 0.2, dtype=torch.float64)
    torch.testing.assert_close(codebook_contrastive(z, words, *table, even), codebook_contrastive(z, words, *table))
    torch.testing.assert_close(reconstruction_loss(z, words % 4, 0.1, even), reconstruction_loss(z, words % 4, 0.1))
