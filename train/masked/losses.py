"""The trainers' losses: plain functions, tensors in, scalar out, each with its equation.

Shapes: B batch, N rows, K words (entries of the discriminative codebook), D their width, S entries of a neighbour set.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from semdict.pipeline.kmeans import neighbours as kmeans_neighbours

CHUNK_NUMBERS = 1 << 22  # logits alive at once in the fused contrast: 16 MiB of float32
Gather = Callable[[Tensor], Tensor]


def local(rows: Tensor) -> Tensor:
    """The gather of a single process: its rows are all rows."""
    return rows


def reconstruction_loss(
    logits_NK: Tensor, codes_N: Tensor, smoothing: float = 0.1, shares_N: Tensor | None = None
) -> Tensor:
    """Mean nats per masked token: L_R = mean_i [(1 - s)(-log p_i[t_i]) + s mean_c(-log p_i[c])], p = softmax(logits).

    shares_N: weights of a weighted mean instead (see `masking.row_shares`).

    logits_NK: (N, K) at masked positions only, any float type, worked in float32 or better; codes_N: (N,) int64.
    N = 0 gives 0. MAGE, arXiv:2211.09117, equation 1; label smoothing s.
    """
    logits_NK = logits_NK if logits_NK.dtype == torch.float64 else logits_NK.float()
    if shares_N is not None:
        nats_N = F.cross_entropy(logits_NK, codes_N, reduction="none", label_smoothing=smoothing)
        return (nats_N * shares_N.to(nats_N.dtype)).sum()
    total = F.cross_entropy(logits_NK, codes_N, reduction="sum", label_smoothing=smoothing)
    return total / max(1, codes_N.shape[0])


def neighbour_table(centroids: Tensor, size: int = 6, tau: float = 0.1) -> tuple[Tensor, Tensor]:
    """Targets of every word: ids (K, S) int64, weights (K, S) summing to 1; S = size, the word itself first.

    S_k = k and its size - 1 nearest by cosine, descending; w_kj = softmax_j(C_k . C_j / tau) over S_k, rows of C
    normalised here. LEASE, section 3. Computed on the CPU by `pipeline.kmeans.neighbours`; shards hold the same table
    for size 6 and tau 0.1. Both results are on the centroids' device; weights are float64 for float64, else float32.
    """
    K = len(centroids)
    if centroids.ndim != 2 or not 1 <= size <= K:
        raise ValueError(f"a neighbour set of {size} does not exist for centroids of shape {tuple(centroids.shape)}")
    exact = centroids.detach().to("cpu", torch.float64 if centroids.dtype == torch.float64 else torch.float32)
    ids, weights = kmeans_neighbours.neighbour_table(exact.numpy(), size, tau)
    return torch.from_numpy(ids).long().to(centroids.device), torch.from_numpy(weights).to(centroids.device)


def codebook_contrastive(
    z: Tensor,
    words: Tensor,
    centroids: Tensor,
    neighbours: Tensor,
    weights: Tensor,
    temperature: float,
    shares: Tensor | None = None,
) -> Tensor:
    """Contrast of N vectors with a frozen codebook, several positives each; a scalar in nats.

    L_C = mean_i [ logsumexp_k(z_i . C_k / T) - sum_{j in S_i} w_ij z_i . C_j / T ],  S_i, w_i = row words_i

    z: (N, D) float, taken as it is (LEASE passes unit rows); words: (N,) int64 in [0, K); centroids: (K, D), unit rows
    in LEASE, no gradient; neighbours: (K, S) int64 and weights: (K, S), rows summing to 1, from `neighbour_table`.
    shares: (N,) weights of the vectors instead of 1 / N each (see `masking.row_shares`).
    Since sum_j w_ij = 1 the positives are one mixed centroid m_i = sum_j w_ij C_j, and the gradient is known in closed
    form, dL/dz_i = (softmax_k(z_i . C_k / T) C - m_i) / (N T): it is computed in the forward pass, in chunks of rows,
    so no (N, K) array outlives a chunk. Accumulates in float32, float64 for float64 z. N = 0 gives 0 with zero
    gradients. LEASE, equation of the codebook contrast.
    """
    (K, D), N = centroids.shape, z.shape[0]
    if z.ndim != 2 or z.shape[1] != D or words.shape != (N,):
        raise ValueError(f"z {tuple(z.shape)} and words {tuple(words.shape)} do not fit centroids {(K, D)}")
    if neighbours.shape != weights.shape or neighbours.shape[0] != K:
        raise ValueError(f"neighbours {tuple(neighbours.shape)}, weights {tuple(weights.shape)}: want two (K={K}, S)")
    if centroids.requires_grad or weights.requires_grad:
        raise ValueError("the codebook is frozen: detach centroids and weights, or learn them by another loss")
    if N == 0:
        return z.sum() * 0.0
    shares = z.new_full((N,), 1 / N, dtype=torch.promote_types(z.dtype, torch.float32)) if shares is None else shares
    return _FusedContrast.apply(z, words.long(), centroids, neighbours, weights, temperature, shares)


class _FusedContrast(torch.autograd.Function):
    """`codebook_contrastive` for N > 0; keeps only the (N, D) gradient between forward and backward."""

    @staticmethod
    def forward(ctx, z, words, centroids, neighbours, weights, temperature, shares):
        N, K = z.shape[0], centroids.shape[0]
        exact = torch.float64 if z.dtype == torch.float64 else torch.float32
        low = _product_type(z)
        centroids = centroids.detach().to(exact)
        codebook_KD = centroids.to(low)
        loss = torch.zeros((), dtype=exact, device=z.device)
        grad_ND = torch.empty(z.shape, dtype=exact, device=z.device) if ctx.needs_input_grad[0] else None
        step = min(N, max(1, CHUNK_NUMBERS // K))
        for start in range(0, N, step):
            rows = slice(start, start + step)
            z_RD, word_R = z[rows].to(exact), words[rows]
            mixed_RD = F.embedding_bag(
                neighbours[word_R], centroids, per_sample_weights=weights[word_R].to(exact), mode="sum"
            )
            odds_RK = _product(z[rows].to(low), codebook_KD.T, exact).mul_(1 / temperature)
            top_R1 = odds_RK.amax(dim=1, keepdim=True)
            total_R1 = odds_RK.sub_(top_R1).exp_().sum(dim=1, keepdim=True)
            share_R1 = shares[rows, None].to(exact)
            loss += (share_R1 * (top_R1 + total_R1.log())).sum() - (share_R1 * z_RD * mixed_RD).sum() / temperature
            if grad_ND is not None:
                odds_RK.div_(total_R1)
                grad_ND[rows] = _product(odds_RK.to(low), codebook_KD, exact).sub_(mixed_RD).mul_(share_R1)
            del odds_RK
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND.mul_(1 / temperature).to(z.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer):
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * outer.to(grad_ND.dtype), None, None, None, None, None, None


def _product_type(z: Tensor) -> torch.dtype:
    """Type of the two large products: half precision where a GPU trains in it, else that of the accumulation."""
    if z.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    if z.is_cuda and z.dtype in (torch.bfloat16, torch.float16):
        return z.dtype
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _product(left: Tensor, right: Tensor, out: torch.dtype) -> Tensor:
    """left @ right in their own type, accumulated and returned in `out`, independent of autocast."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype == out:
            return left @ right
        return torch.mm(left, right, out_dtype=out)


def projection_contrast(
    projected_ND: Tensor,
    words: Tensor,
    centroids: Tensor,
    neighbours: Tensor,
    weights: Tensor,
    alpha: float = 0.1,
    shares: Tensor | None = None,
) -> Tensor:
    """`codebook_contrastive` of the normalised rows z = x / |x| of a projection, normalised in float32 or better."""
    exact = projected_ND if projected_ND.dtype == torch.float64 else projected_ND.float()
    return codebook_contrastive(F.normalize(exact, dim=1), words, centroids, neighbours, weights, alpha, shares)


def masked_contrast(
    projected_ND: Tensor, words: Tensor, centroids: Tensor, alpha: float = 0.1, shares: Tensor | None = None
) -> Tensor:
    """Decoder-side variant: hard cross-entropy -mean_i log softmax_k(z_i . C_k / alpha)[words_i] at masked positions.

    projected_ND: (N, D) decoder features after their projection, not normalised; words: (N,); centroids: (K, D), unit
    rows. The released LEASE training multiplies this term by 0, its inference class by 0.1.
    """
    self_K1 = torch.arange(centroids.shape[0], device=words.device)[:, None]
    return projection_contrast(
        projected_ND, words, centroids, self_K1, torch.ones_like(self_K1, dtype=centroids.dtype), alpha, shares
    )


def uniformity(pooled_BE: Tensor, gather: Gather = local) -> Tensor:
    """Mean over all B^2 pairs, diagonal included, of (v_i . v_j)^2 with v = pooled / |pooled|; Sorcen adds 0.01 of it.

    pooled_BE: (B, E) mean of the latents, CLS included; `gather` joins the rows of all ranks, with gradient.
    """
    unit_BE = F.normalize(gather(pooled_BE.float() if pooled_BE.dtype != torch.float64 else pooled_BE), dim=1)
    return (unit_BE @ unit_BE.T).square().mean()


def info_nce(teacher_BP: Tensor, student_BP: Tensor, temperature: float = 0.3) -> Tensor:
    """One-directional InfoNCE: -mean_i log softmax_j(a_i . b_j / T)[i], a = unit teacher rows, b = unit student rows.

    teacher_BP, student_BP: (B, P), row i of both from the same image; rows of all ranks, gathered before. Sorcen.
    """
    exact = torch.promote_types(student_BP.dtype, torch.float32)
    rows, columns = F.normalize(teacher_BP.to(exact), dim=1), F.normalize(student_BP.to(exact), dim=1)
    return F.cross_entropy(rows @ columns.T / temperature, torch.arange(len(rows), device=rows.device))
