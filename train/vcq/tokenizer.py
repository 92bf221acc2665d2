"""The 1-D tokenizer: an image becomes L codes, in the order in which an autoregressive model will predict them.

Single-stage TiTok (arXiv:2406.07550) that predicts pixels, with a variable-size codebook (arXiv:2605.06207). Shapes: B
images, P patches, L tokens, E width of a stack, D code width.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from semdict.pipeline.common.errors import WeightsError
from semdict.train.engine.layers import EPS, Block
from semdict.train.engine.model_file import load_model
from semdict.train.vcq.quantizer import VariableQuantizer
from semdict.train.vcq.schedule import codebook_sizes

LAYOUT = "semdict-vcq-1"  # names this tokenizer in the recipe of its tokens


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything that decides the shape of a tokenizer; written into its file, which rebuilds it."""

    image_size: int = 256
    patch: int = 16
    tokens: int = 256
    encoder: tuple[int, int, int] = (12, 768, 12)  # depth, width, heads
    decoder: tuple[int, int, int] = (12, 768, 12)
    latent_queries: bool = True  # False: the patch tokens themselves are the codes (a plain ViT autoencoder)
    schedule: str = "cosine"
    k_min: int = 2
    k_max: int = 16384
    power: float = 2.5
    dim: int = 8
    l2: bool = True
    beta: float = 1.0
    codebook_weight: float = 1.0
    groups: int = 16

    @property
    def patches(self) -> int:
        """Cells of the image grid."""
        return (self.image_size // self.patch) ** 2


PRESETS = {
    "tiny": TokenizerConfig(32, 8, 16, (2, 64, 2), (2, 64, 2), k_max=64, dim=8),
    "base": TokenizerConfig(),
    "large": TokenizerConfig(decoder=(24, 1024, 16), k_max=11264),
    "large_496": TokenizerConfig(decoder=(32, 1024, 16), k_max=11264),
}


class Reconstruction(NamedTuple):
    """Result of a training pass."""

    images: Tensor  # (B, 3, H, W), nominally in [0, 1], unclamped
    ids: Tensor  # (B, L) int64
    latents: Tensor  # (B, L, D) before quantization
    vq_loss: Tensor  # scalar


class Encoder(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, L, D): cls, patches and latent queries through one ViT, the queries kept."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        depth, width, heads = config.encoder
        self.queries = config.latent_queries
        self.patch_embed = nn.Conv2d(3, width, config.patch, config.patch)
        self.pos_patches = nn.Parameter(torch.empty(config.patches + self.queries, width))
        if self.queries:
            self.cls = nn.Parameter(torch.empty(1, width))
            self.latents = nn.Parameter(torch.empty(config.tokens, width))
            self.pos_latents = nn.Parameter(torch.empty(config.tokens, width))
        self.norm_pre = nn.LayerNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm_post = nn.LayerNorm(width, eps=EPS)
        self.out = nn.Linear(width, config.dim)

    def forward(self, images: Tensor) -> Tensor:
        x_BPE = self.patch_embed(images).flatten(2).mT
        if self.queries:
            cls_B1E = self.cls.expand(len(x_BPE), -1, -1)
            queries_BLE = (self.latents + self.pos_latents).expand(len(x_BPE), -1, -1)
            x_BPE = torch.cat([torch.cat([cls_B1E.to(x_BPE), x_BPE], 1) + self.pos_patches, queries_BLE], 1)
        else:
            x_BPE = x_BPE + self.pos_patches
        x_BPE = self.norm_pre(x_BPE)
        for block in self.blocks:
            x_BPE = block(x_BPE)
        if self.queries:
            x_BPE = x_BPE[:, -len(self.latents) :]
        return self.out(self.norm_post(x_BPE))


class Decoder(nn.Module):
    """(B, L, D) codes -> (B, 3, H, W): cls, one repeated mask token per cell and the codes through one ViT."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        depth, width, heads = config.decoder
        self.queries, self.patch, self.patches = config.latent_queries, config.patch, config.patches
        self.side = config.image_size // config.patch
        self.embed = nn.Linear(config.dim, width)
        self.pos_latents = nn.Parameter(torch.empty(config.tokens, width))
        if self.queries:
            self.cls = nn.Parameter(torch.empty(1, width))
            self.mask_token = nn.Parameter(torch.empty(1, width))
            self.pos_patches = nn.Parameter(torch.empty(config.patches + 1, width))
        self.norm_pre = nn.LayerNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm_post = nn.LayerNorm(width, eps=EPS)
        self.out = nn.Linear(width, 3 * config.patch**2)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, codes_BLD: Tensor) -> Tensor:
        x_BPE = self.embed(codes_BLD) + self.pos_latents
        if self.queries:
            canvas_PE = torch.cat([self.cls, self.mask_token.expand(self.patches, -1)]) + self.pos_patches
            x_BPE = torch.cat([canvas_PE.expand(len(x_BPE), -1, -1).to(x_BPE), x_BPE], 1)
        x_BPE = self.norm_pre(x_BPE)
        for block in self.blocks:
            x_BPE = block(x_BPE)
        if self.queries:
            x_BPE = x_BPE[:, 1 : 1 + self.patches]
        pixels_BPC = self.out(self.norm_post(x_BPE))
        return self.smooth(self._unpatchify(pixels_BPC))

    def _unpatchify(self, pixels_BPC: Tensor) -> Tensor:
        """(B, P, 3 * p * p), channels first within a cell -> (B, 3, H, W)."""
        B, side, p = len(pixels_BPC), self.side, self.patch
        return pixels_BPC.view(B, side, side, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, 3, side * p, side * p)


class Tokenizer1d(nn.Module):
    """Encoder, variable-size quantizer, decoder. `identity`: its part of a recipe, with the SHA-256 of its file."""

    KIND, COMMAND = "semdict-vcq-tokenizer", "semdict vcq train"

    def __init__(self, config: TokenizerConfig, seed: int = 0) -> None:
        super().__init__()
        _check(config)
        self.config = config
        sizes_L = codebook_sizes(config.schedule, config.tokens, config.k_min, config.k_max, config.power)
        self.encoder = Encoder(config)
        self.quantizer = VariableQuantizer(
            sizes_L, config.dim, config.l2, config.beta, config.codebook_weight, config.groups
        )
        self.decoder = Decoder(config)
        self.identity: dict[str, Any] = {"layout": LAYOUT, **asdict(config)}
        self._init(torch.Generator().manual_seed(seed))

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain data, for a model file."""
        return asdict(self.config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Tokenizer1d":
        """A module of the configuration that `config_dict` gave; TypeError for an unknown key."""
        return cls(TokenizerConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}))

    @property
    def codebook_size(self) -> int:
        """K_max; position t uses ids below `codebook_sizes[t]`."""
        return max(self.quantizer.sizes)

    @property
    def codebook_sizes(self) -> Tensor:
        """(L,) int64."""
        return self.quantizer.sizes_L

    @property
    def stride(self) -> int:
        """Pixels per patch and side; the image size is fixed all the same."""
        return self.config.patch

    def grid(self, image_size: int) -> tuple[int, ...]:
        """(rows, columns) where patches are the tokens, (L,) with latent queries; WeightsError for another size."""
        if image_size != self.config.image_size:
            raise WeightsError(
                f"image size {image_size} is not the {self.config.image_size} that the tokenizer was trained for"
            )
        side = image_size // self.config.patch
        return (self.config.tokens,) if self.config.latent_queries else (side, side)

    def no_weight_decay(self) -> set[str]:
        """Learned tokens, positions and the codebook are not decayed (choice O8)."""
        learned = ("cls", "latents", "mask_token", "codebook")
        return {n for n, _ in self.named_parameters() if n.rsplit(".", 1)[-1].startswith(("pos_", *learned))}

    def forward(self, images: Tensor, strength: float = 1.0) -> Reconstruction:
        """(B, 3, H, W) in [0, 1] -> Reconstruction; `strength` as in the quantizer, which always works in float32."""
        latents_BLD = self.encoder(images)
        quantized = self.quantizer(latents_BLD, strength)
        return Reconstruction(self.decoder(quantized.codes), quantized.ids, latents_BLD, quantized.loss)

    def features(self, images: Tensor, quantized: bool = False) -> Tensor:
        """(B, L, D) float32: projected encoder outputs, or their nearest codes."""
        z_BLD = self.quantizer.project(self.encoder(images))
        return self.quantizer.lookup(self.quantizer.search(z_BLD)) if quantized else z_BLD

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, L) int64, ids[:, t] < codebook_sizes[t]."""
        return self.quantizer.search(self.quantizer.project(self.encoder(images)))

    @torch.no_grad()
    def decode(self, ids_BL: Tensor) -> Tensor:
        """(B, L) int64 -> (B, 3, H, W) clamped to [0, 1]; ValueError for an id that its position does not have."""
        wrong = torch.nonzero((ids_BL < 0) | (ids_BL >= self.codebook_sizes))
        if len(wrong):
            row, t = wrong[0].tolist()
            raise ValueError(
                f"id {int(ids_BL[row, t])} at row {row}, position {t}: "
                f"this tokenizer has {self.quantizer.sizes[t]} codes there"
            )
        return self.decoder(self.quantizer.lookup(ids_BL)).clamp(0, 1)

    @torch.no_grad()
    def _init(self, rng: torch.Generator) -> None:
        """Truncated normal for linear and conv, zero biases, learned tokens width^-0.5 * normal, from `rng`.

        The deviation is 0.02 from width 768 on, as in TiTok, and keeps the same gain in narrower stacks. Mid-grey goes
        in as zero and comes out at the start: the patch embedding's bias cancels 0.5, the pixel head has a tenth of the
        weights and bias 0.5, and the last convolution is the identity (choice O20).
        """
        if self.quantizer.codebook.is_meta:
            return
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                std = 0.02 * max(1.0, 768 / min(self.config.encoder[1], self.config.decoder[1])) ** 0.5
                nn.init.trunc_normal_(part.weight, std=std, generator=rng)
                nn.init.zeros_(part.bias)
            for parameter in part.parameters(recurse=False):
                if isinstance(part, Encoder | Decoder):
                    parameter.normal_(generator=rng).mul_(parameter.shape[-1] ** -0.5)
        embed = self.encoder.patch_embed
        embed.bias.copy_(-0.5 * embed.weight.sum((1, 2, 3)))
        self.decoder.out.weight.mul_(0.1)
        self.decoder.out.bias.fill_(0.5)
        nn.init.dirac_(self.decoder.smooth.weight)
        self.quantizer.reset_parameters(rng)


def _check(config: TokenizerConfig) -> None:
    if config.image_size % config.patch:
        raise ValueError(f"image_size {config.image_size} is not a multiple of patch {config.patch}")
    if not config.latent_queries and config.tokens != config.patches:
        raise ValueError(
            f"without latent queries every patch is a token: {config.patches} patches, but tokens is {config.tokens}"
        )


def load_vcq_tokenizer(path: str | Path, device: str | torch.device = "cpu") -> Tokenizer1d:
    """The tokenizer of a `semdict vcq train` run (averaged weights) or of its file, in evaluation mode."""
    tokenizer, file = load_model(path, Tokenizer1d, device)
    tokenizer.identity |= {"sha256": file.sha256}
    return tokenizer
