"""A straightforward LEASE, written directly from its equations: the baseline of the step benchmark.

It keeps the published vocabulary of 17,030 rows, embeds all 257 ids before half are dropped, projects every position
onto every row of the vocabulary, computes every row's neighbours in each step, holds all (N, K) logits in memory, and
evaluates the decoder's contrast head and multiplies it by zero. Its blocks are plain torch: fast attention, nn.Dropout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.train.engine.layers import EPS, init_weights, pos2d
from semdict.train.masked.vocab import LEASE

CODES, CELLS = LEASE.codes, 256


class Block(nn.Module):
    """Pre-norm transformer block with torch's own attention and dropout; parameters named as the package's."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, N, E = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        x = x + self.drop(self.attn["proj"](mixed.transpose(1, 2).reshape(B, N, E)))
        hidden = self.drop(F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + self.drop(self.mlp["fc2"](hidden))


class StraightLease(nn.Module):
    """size: width, depth, heads, decoder_width, decoder_depth, decoder_heads; centroids (K, D)."""

    def __init__(self, size: dict[str, int], centroids: Tensor, dropout: float = 0.1) -> None:
        super().__init__()
        E, F_ = size["width"], size["decoder_width"]
        self.word, self.position = nn.Embedding(LEASE.rows, E), nn.Embedding(CELLS + 1, E)
        self.embed_norm, self.drop = nn.LayerNorm(E, eps=EPS), nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(E, size["heads"], dropout=dropout) for _ in range(size["depth"])))
        self.norm = nn.LayerNorm(E, eps=EPS)
        self.decoder_embed = nn.Linear(E, F_)
        self.decoder_position = nn.Embedding(385, F_)
        self.decoder = nn.Sequential(
            *(Block(F_, size["decoder_heads"], dropout=dropout) for _ in range(size["decoder_depth"]))
        )
        self.decoder_norm = nn.LayerNorm(F_, eps=EPS)
        self.head_fc, self.head_norm = nn.Linear(F_, E), nn.LayerNorm(E, eps=1e-5)
        self.head_bias = nn.Parameter(torch.zeros(LEASE.rows))
        self.to_words = nn.Linear(E, centroids.shape[1], bias=False)
        self.decoder_to_words = nn.Linear(F_, centroids.shape[1], bias=False)
        self.register_buffer("centroids", centroids)
        self.register_buffer("grid_code", pos2d(E, 16))
        init_weights(self, torch.Generator().manual_seed(0))

    def forward(self, tokens: Tensor, words: Tensor, masked: Tensor, keep_idx: Tensor) -> Tensor:
        """tokens, words (B, 256) int64, masked (B, 256) bool, keep_idx (B, 128) -> loss."""
        B = len(tokens)
        ids = torch.cat([tokens.new_full((B, 1), LEASE.cls), tokens.masked_fill(masked, LEASE.mask)], dim=1)
        x = self.drop(self.embed_norm(self.word(ids) + self.position.weight))
        rows = keep_idx[..., None].expand(-1, -1, x.shape[-1])
        x = torch.cat([x[:, :1], x[:, 1:].gather(1, rows) + self.grid_code[keep_idx]], dim=1)
        x = self.norm(self.blocks(x))
        y = self.decode(x, masked, keep_idx)
        logits = self.head_norm(F.gelu(self.head_fc(y))) @ self.word.weight.detach().T + self.head_bias
        nats = F.cross_entropy(
            logits[:, 1:, :CODES].float().transpose(1, 2), tokens, reduction="none", label_smoothing=0.1
        )
        reconstruction = (nats * masked).sum() / (masked.sum() + 1e-6)
        visible = ~masked.gather(1, keep_idx)
        contrast = self.contrast(x[:, 1:][visible], words.gather(1, keep_idx)[visible])
        decoder_logits = self.cosines(self.decoder_to_words(y[:, 1:][masked]))
        decoder_side = F.cross_entropy(decoder_logits, words[masked])
        return reconstruction + 0.1 * contrast + 0.0 * decoder_side

    def decode(self, x: Tensor, masked: Tensor, keep_idx: Tensor) -> Tensor:
        """(B, 257, F) decoder features: visible latents added to cells that are filled with the CLS row."""
        u = self.decoder_embed(x)
        canvas = u[:, :1].repeat(1, CELLS, 1)
        shown = u[:, 1:] * ~masked.gather(1, keep_idx)[..., None]
        canvas = canvas.scatter_add(1, keep_idx[..., None].expand_as(shown), shown)
        return self.decoder_norm(
            self.decoder(torch.cat([u[:, :1], canvas], 1) + self.decoder_position.weight[: CELLS + 1])
        )

    def cosines(self, projected: Tensor) -> Tensor:
        """(N, K) cosines with every centroid, over the temperature 0.1."""
        return F.normalize(projected.float(), dim=1) @ F.normalize(self.centroids, dim=1).T / 0.1

    def contrast(self, visible: Tensor, words: Tensor) -> Tensor:
        """Contrast with neighbours and weights computed for every row, log-softmax of all logits."""
        logp = self.cosines(self.to_words(visible)).log_softmax(dim=1)
        unit = F.normalize(self.centroids, dim=1)
        with torch.no_grad():
            sims, near = (unit[words] @ unit.T).topk(6, dim=1)
            share = (sims / 0.1).softmax(dim=1)
        return -(share * logp.gather(1, near)).sum(dim=1).mean()
