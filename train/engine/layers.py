"""Attention, MLP, transformer block and the fixed position table; shapes: B batch, N rows, E width, H heads."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EPS = 1e-6  # of the embedding, block and final norms


class _CpuDropout(torch.autograd.Function):
    """Dropout with 16 random bits per number: three times faster on a CPU than a Bernoulli sample per number."""

    @staticmethod
    def forward(ctx, x, p):
        dropped = round(p * 65536)  # of 65,536 equally likely values; the scale is that of the rounded share
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        keep = (bits[: x.numel()] >= dropped - 32768).view(x.shape)
        ctx.save_for_backward(keep)
        ctx.scale = 65536 / (65536 - dropped)
        return torch.where(keep, x * ctx.scale, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer):
        (keep,) = ctx.saved_tensors
        return torch.where(keep, outer * ctx.scale, 0.0), None


def dropout(x: Tensor, p: float) -> Tensor:
    """x with every number zeroed with probability p, the rest divided by 1 - p; from torch's global generator."""
    if p == 0:
        return x
    if x.device.type == "cpu" and p < 1 and not torch.compiler.is_compiling():
        return _CpuDropout.apply(x, p)
    return F.dropout(x, p)


class Dropout(nn.Module):
    """`dropout` in training, nothing in evaluation."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


def plain_attention(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, dropout_p: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with all probabilities in memory; the fast kernels must equal it."""
    scores = (q_BHND * q_BHND.shape[-1] ** -0.5) @ k_BHND.mT
    return dropout(scores.softmax(-1), dropout_p) @ v_BHND


def fast_attention(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, dropout_p: float = 0.0) -> Tensor:
    """scaled_dot_product_attention; with dropout on a CPU `plain_attention`, which is faster there."""
    if dropout_p and q_BHND.device.type == "cpu":
        return plain_attention(q_BHND, k_BHND, v_BHND, dropout_p)
    return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, dropout_p=dropout_p)


KERNELS = {"sdpa": fast_attention, "plain": plain_attention}


class Recompute(nn.Module):
    """Base of layers that can recompute cheap activations in the backward pass instead of keeping them.

    recompute: True, False, or None = on a CPU, where attention with dropout keeps all probabilities and memory is
    scarce. Recomputation costs a few per cent of time there and gives the same bits, dropout included.
    """

    recompute: bool | None = None

    def recomputed(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """part(x); where recomputation is on, only x is kept for the backward pass."""
        enabled = x.device.type == "cpu" if self.recompute is None else self.recompute
        if enabled and self.training and torch.is_grad_enabled():
            return checkpoint(part, x, use_reentrant=False)
        return part(x)


class Attention(Recompute):
    """Multi-head self-attention over all rows, no mask; `qkv` is one linear ordered [q | k | v]."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, kernel: str = "sdpa") -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads, self.dropout, self.kernel = heads, dropout, kernel
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = Dropout(dropout)

    def forward(self, x_BNE: Tensor) -> Tensor:
        qkv_BN3E = self.qkv(x_BNE)
        light = self.recompute is None and not self.dropout  # the fast kernel keeps no probabilities
        return self.drop(self.attend(qkv_BN3E) if light else self.recomputed(self.attend, qkv_BN3E))

    def attend(self, qkv_BN3E: Tensor) -> Tensor:
        """Attention and output projection of (B, N, 3E) queries, keys and values, (B, N, E)."""
        B, N, E = *qkv_BN3E.shape[:2], qkv_BN3E.shape[2] // 3
        q, k, v = qkv_BN3E.view(B, N, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        out = KERNELS[self.kernel](q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(out.transpose(1, 2).reshape(B, N, E))


class Mlp(Recompute):
    """fc2(GELU(fc1(x))), exact GELU, dropout after both linears."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = Dropout(dropout)

    def forward(self, x_BNE: Tensor) -> Tensor:
        # the product of fc2 is not repeated: only its input is needed, and recomputation stops there
        return self.drop(self.recomputed(lambda h: self.fc2(self.drop(F.gelu(h))), self.fc1(x_BNE)))


def drop_path(x: Tensor, p: float) -> Tensor:
    """x (B, ...) with whole samples zeroed with probability p, the rest divided by 1 - p (arXiv:1603.09382)."""
    return x * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - p).div_(1 - p)


class Block(nn.Module):
    """Pre-norm transformer block: x += attention(LN(x)); x += mlp(LN(x)).

    drop_path: share of samples for which a branch is dropped in training; an attribute, set by fine-tuning.
    """

    drop_path: float = 0.0

    def __init__(self, width: int, heads: int, mlp_ratio: int = 4, dropout: float = 0.0, kernel: str = "sdpa") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads, dropout, kernel)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, mlp_ratio * width, dropout)

    def forward(self, x_BNE: Tensor) -> Tensor:
        x_BNE = x_BNE + self.kept(self.attn(self.norm1(x_BNE)))
        return x_BNE + self.kept(self.mlp(self.norm2(x_BNE)))

    def kept(self, branch_BNE: Tensor) -> Tensor:
        """The branch, without its dropped samples in training."""
        return drop_path(branch_BNE, self.drop_path) if self.drop_path and self.training else branch_BNE


def pos2d(width: int, grid: int) -> Tensor:
    """(grid^2, width) float32 fixed table: [sin(c w), cos(c w), sin(r w), cos(r w)] at row r, column c, row-major.

    w_i = 10000^(-i / (width/4)), i = 0 .. width/4 - 1; the column part comes first, as in MAE's released table.
    """
    if width % 4:
        raise ValueError(f"the 2-D position table needs a width that is a multiple of 4, got {width}")
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [axis.reshape(-1, 1).double() * omega for axis in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def projection_head(width: int, hidden: int, out: int) -> nn.Sequential:
    """Sorcen's two-layer head: linear, BatchNorm (eps 1e-5, momentum 0.1), ReLU, linear."""
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


def table_std(width: int) -> float:
    """Standard deviation of a fresh embedding table: 0.02 from ViT-B's width (768) up, more for narrower ones."""
    return 0.02 * max(1.0, 768 / width) ** 0.5


def init_weights(module: nn.Module, rng: torch.Generator) -> None:
    """Initialise every parameter of `module` from `rng`: linears Xavier-uniform with zero bias, norms to one and zero,
    tables normal(0, 0.02). As MAE, arXiv:2111.06377.

    Below ViT-B's width the tables get the standard deviation that keeps ViT-B's row length: the token head cannot
    stretch the (detached) word table, so short rows would cap the logits of a narrow model for long.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, generator=rng)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=table_std(part.embedding_dim), generator=rng)
        elif isinstance(part, (nn.LayerNorm, nn.BatchNorm1d)):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
