"""The masked-token transformer: one module for every objective, with the few switches in which they differ.

Shapes: B batch, L = grid^2 cells (row-major), M kept cells, E encoder width, F decoder width, K image codes.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.pipeline.common.errors import suggestion
from semdict.train.engine.layers import EPS, Block, Dropout, init_weights, pos2d, projection_head
from semdict.train.masked.vocab import Vocab, compact_vocab

HEAD_EPS = 1e-5  # the token head's norm differs from all others in the published models


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the module's shape and arithmetic; saved in checkpoints, rebuilds the model.

    family: name of the objective it is trained with; vocab: ids of the embedding table; grid: cells per side.
    grid_code: add the fixed 2-D table after the embedding norm (LEASE). visible: the visible latents are added to a
    decoder input filled with CLS ("add", LEASE) or replace it ("replace", MAGE and Sorcen). decoder_rows: rows of the
    decoder's learned position table, of which the first grid^2 + 1 are used (the published LEASE files have 385).
    encoder_projection, decoder_projection: width D of the codebook that encoder / decoder outputs are projected to,
    0 = no projection. projector, predictor: (hidden, out) of Sorcen's heads, None = none. dropout: after the embedding
    norm, on attention probabilities and after every block linear but qkv. kernel: one of engine.layers.KERNELS.
    """

    family: str
    vocab: Vocab
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    grid: int = 16
    mlp_ratio: int = 4
    grid_code: bool = False
    visible: str = "replace"
    decoder_rows: int = 257
    encoder_projection: int = 0
    decoder_projection: int = 0
    projector: tuple[int, int] | None = None
    predictor: tuple[int, int] | None = None
    dropout: float = 0.1
    kernel: str = "sdpa"

    def __post_init__(self) -> None:
        if self.visible not in ("add", "replace"):
            raise ValueError(f"visible {self.visible!r} must be add or replace")
        if self.decoder_rows < self.grid**2 + 1:
            raise ValueError(f"decoder_rows {self.decoder_rows} is below CLS and {self.grid}^2 cells")

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of numbers and strings for a checkpoint; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The configuration that `to_dict` wrote; an unknown key is a ValueError."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"model configuration has unknown keys {unknown}; known are {sorted(known)}")
        heads = {key: tuple(values[key]) for key in ("projector", "predictor") if values.get(key) is not None}
        return cls(**{**values, **heads, "vocab": Vocab(**values["vocab"])})


SIZES: dict[str, dict[str, int]] = {
    name: dict(zip(("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads"), row, strict=True))
    for name, row in {
        "tiny": (64, 2, 4, 64, 2, 4),
        "small": (192, 6, 6, 192, 4, 6),
        "vit_base": (768, 12, 12, 768, 8, 16),
        "vit_large": (1024, 24, 16, 1024, 8, 16),
    }.items()
}


def model_config(family: str, size: str, codes: int = 1024, **changes: Any) -> ModelConfig:
    """Configuration for training from scratch, with the compact vocabulary.

    size: a key of SIZES; codes: image codes; changes: any ModelConfig field, as an objective's `architecture` has them.
    """
    if size not in SIZES:
        raise ValueError(f"unknown model size {size!r}; {suggestion(size, SIZES)}")
    grid = changes.get("grid", 16)
    base = ModelConfig(family=family, vocab=compact_vocab(codes), decoder_rows=grid**2 + 1, **SIZES[size], grid=grid)
    return replace(base, **changes)


class TokenEmbedding(nn.Module):
    """LN(word[id] + position[index]; 1e-6), then dropout; index 0 is CLS, index p + 1 is grid cell p."""

    def __init__(self, rows: int, positions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.word = nn.Embedding(rows, width)
        self.position = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.drop = Dropout(dropout)

    def forward(self, ids_BN: Tensor, index_BN: Tensor) -> Tensor:
        return self.drop(self.norm(self.word(ids_BN) + self.position(index_BN)))


class TokenHead(nn.Module):
    """h = LN(GELU(fc(y)); 1e-5), logits = h . word^T + bias over image codes only; the table is tied but detached."""

    def __init__(self, decoder_width: int, width: int, rows: int) -> None:
        super().__init__()
        self.fc = nn.Linear(decoder_width, width)
        self.norm = nn.LayerNorm(width, eps=HEAD_EPS)
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, features: Tensor, table_KE: Tensor) -> Tensor:
        hidden = self.norm(F.gelu(self.fc(features)))
        return F.linear(hidden, table_KE.detach(), self.bias[: table_KE.shape[0]])


class MaskedTokenTransformer(nn.Module):
    """Encoder over CLS and the kept cells, decoder over the whole grid, tied token head (MAGE, arXiv:2211.09117).

    All parameters are initialised from `seed`. Methods take int64 tokens (B, L) in [0, codes) or the mask id.
    """

    KIND, COMMAND = "semdict-pretrained", "semdict pretrain"

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        cells, c = config.grid**2, config
        self.token_emb = TokenEmbedding(c.vocab.rows, cells + 1, c.width, c.dropout)
        self.blocks = self._blocks(c.depth, c.width, c.heads)
        self.norm = nn.LayerNorm(c.width, eps=EPS)
        self.decoder_embed = nn.Linear(c.width, c.decoder_width)
        self.decoder_position = nn.Embedding(c.decoder_rows, c.decoder_width)
        self.decoder_blocks = self._blocks(c.decoder_depth, c.decoder_width, c.decoder_heads)
        self.decoder_norm = nn.LayerNorm(c.decoder_width, eps=EPS)
        self.token_head = TokenHead(c.decoder_width, c.width, c.vocab.rows)
        self.proj_to_dino, self.dec_to_dino = (
            nn.Linear(width, out, bias=False) if out else None
            for width, out in ((c.width, c.encoder_projection), (c.decoder_width, c.decoder_projection))
        )
        self.projector = projection_head(c.width, *c.projector) if c.projector else None
        self.predictor = projection_head(c.projector[1], *c.predictor) if c.predictor and c.projector else None
        self.register_buffer("pos2d", pos2d(c.width, c.grid) if c.grid_code else None, persistent=False)
        init_weights(self, torch.Generator().manual_seed(seed))

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain data, for a model file."""
        return self.config.to_dict()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MaskedTokenTransformer":
        """A module of the configuration that `config_dict` gave."""
        return cls(ModelConfig.from_dict(config))

    def _blocks(self, depth: int, width: int, heads: int) -> nn.ModuleList:
        c = self.config
        return nn.ModuleList(Block(width, heads, c.mlp_ratio, c.dropout, c.kernel) for _ in range(depth))

    @property
    def family(self) -> str:
        """Name of the objective that the model is trained with."""
        return self.config.family

    @property
    def mask_token(self) -> int:
        """The id at unknown positions."""
        return self.config.vocab.mask

    @property
    def codebook_size(self) -> int:
        """Number of image codes, the width of the logits."""
        return self.config.vocab.codes

    def embed(self, tokens_BL: Tensor, keep_idx: Tensor | None = None) -> Tensor:
        """(B, 1 + M, E): CLS and the kept cells (all when `keep_idx` (B, M) is None) at their own positions.

        Only the kept ids are embedded: the norm works per row, so embedding all and dropping gives the same numbers.
        """
        B, L = tokens_BL.shape
        if self.config.grid**2 != L:
            raise ValueError(f"tokens have {L} cells per image, the model's grid {self.config.grid}^2")
        if keep_idx is None:
            keep_idx = torch.arange(L, device=tokens_BL.device).expand(B, L)
        ids_BM = tokens_BL.gather(1, keep_idx)
        ids = torch.cat([ids_BM.new_full((B, 1), self.config.vocab.cls), ids_BM], dim=1)
        x_BNE = self.token_emb(ids, F.pad(keep_idx + 1, (1, 0)))
        if self.pos2d is None:
            return x_BNE
        return x_BNE + F.pad(self.pos2d[keep_idx], (0, 0, 1, 0))

    def encode(
        self,
        tokens_BL: Tensor,
        masked_BL: Tensor | None = None,
        keep_idx: Tensor | None = None,
        blocks: nn.ModuleList | None = None,
        norm: bool = True,
    ) -> Tensor:
        """Latents (B, 1 + M, E), CLS first: masked ids become the mask id, dropped cells are left out.

        `blocks` replaces the encoder's own (by a teacher's); `norm` False stops before the final norm.
        """
        if masked_BL is not None:
            tokens_BL = tokens_BL.masked_fill(masked_BL, self.config.vocab.mask)
        x_BNE = self.embed(tokens_BL, keep_idx)
        for block in self.blocks if blocks is None else blocks:
            x_BNE = block(x_BNE)
        return self.norm(x_BNE) if norm else x_BNE

    def decode(
        self,
        latents_BNE: Tensor,
        masked_BL: Tensor,
        keep_idx: Tensor | None = None,
        condition_BXF: Tensor | None = None,
    ) -> Tensor:
        """Decoder features (B, 1 + L, F) after the decoder's norm, CLS first.

        `condition_BXF`: rows that the grid attends to but that predict nothing (a class), appended as they are.
        """
        x_BLF = self.decoder_input(self.decoder_embed(latents_BNE), masked_BL, keep_idx)
        rows = x_BLF.shape[1]
        x_BLF = x_BLF + self.decoder_position.weight[:rows]
        if condition_BXF is not None:
            x_BLF = torch.cat([x_BLF, condition_BXF.to(x_BLF.dtype)], dim=1)
        for block in self.decoder_blocks:
            x_BLF = block(x_BLF)
        return self.decoder_norm(x_BLF[:, :rows])

    def decoder_input(self, u_BNF: Tensor, masked_BL: Tensor, keep_idx: Tensor | None = None) -> Tensor:
        """(B, 1 + L, F): CLS, and a grid of CLS rows to which visible latents are added or that they replace.

        Latents of masked cells are not used.
        """
        B, L = masked_BL.shape
        if keep_idx is None:
            keep_idx = torch.arange(L, device=masked_BL.device).expand(B, L)
        cls_B1F, latent_BMF = u_BNF[:, :1], u_BNF[:, 1:]
        visible_BMF = cls_B1F + latent_BMF if self.config.visible == "add" else latent_BMF
        cells_BMF = torch.where(masked_BL.gather(1, keep_idx)[..., None], cls_B1F, visible_BMF)
        grid_BLF = cls_B1F.expand(-1, L, -1).scatter(1, keep_idx[..., None].expand_as(cells_BMF), cells_BMF)
        return torch.cat([cls_B1F, grid_BLF], dim=1)

    def token_logits(self, features: Tensor) -> Tensor:
        """(..., F) decoder features -> (..., K) logits of the image codes only; pass just the rows that are needed."""
        return self.token_head(features, self.token_emb.word.weight[: self.config.vocab.codes])

    def features(self, tokens_BL: Tensor) -> Tensor:
        """(B, E): all tokens visible, last block's output averaged over cells, layer norm without affine (eps 1e-6).

        The published linear probe's input: the encoder's final norm is not applied.
        """
        pooled_BE = self.encode(tokens_BL, norm=False)[:, 1:].mean(dim=1)
        return F.layer_norm(pooled_BE, pooled_BE.shape[-1:], eps=EPS)

    def logits(self, tokens_BL: Tensor) -> Tensor:
        """(B, L, K) float logits for tokens with `mask_token` at unknown cells; no cell is dropped."""
        masked_BL = tokens_BL == self.config.vocab.mask
        return self.token_logits(self.decode(self.encode(tokens_BL), masked_BL)[:, 1:])

    def logits_at(self, tokens_BL: Tensor, unknown_BL: Tensor) -> Tensor:
        """(n, K) logits of the unknown cells only, row-major; the other cells never reach the head."""
        features_BLF = self.decode(self.encode(tokens_BL), unknown_BL)[:, 1:]
        return self.token_logits(features_BLF[unknown_BL])
