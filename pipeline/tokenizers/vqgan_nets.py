"""Layers of the convolutional VQGAN tokenizer, in the two layouts that checkpoints are published in.

`mage` (LTH14/mage): bias-free 3x3 convolutions, average pooling, a shortcut that ignores the block input, no attention.
`taming` (CompVis/taming-transformers, arXiv:2012.09841): biases, strided convolutions, attention, 1x1 convolutions
around the codebook. Parameter names are those of the published files, so a state dict loads as it is.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from semdict.pipeline.common.nearest import nearest

GROUPS, GROUP_EPS = 32, 1e-6


@dataclass(frozen=True)
class VqganConfig:
    """Everything that shapes a VQGAN; the defaults are MAGE's released tokenizer."""

    layout: str = "mage"  # or "taming"
    stem: int = 128  # channels after the first convolution
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)  # per level, finest first
    blocks: int = 2  # residual blocks per encoder level
    decoder_blocks: int = 2  # and per decoder level (taming: one more than in the encoder)
    z_channels: int = 256  # channels of the latent
    codes: int = 1024  # K
    dim: int = 256  # D, width of a code
    attention: tuple[int, ...] = ()  # encoder and decoder levels with attention
    strided: bool = False  # strided convolution between levels; average pooling otherwise

    @property
    def stride(self) -> int:
        """Pixels per grid cell and side."""
        return 2 ** (len(self.widths) - 1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm as every published VQGAN has it."""
    return nn.GroupNorm(GROUPS, channels, eps=GROUP_EPS)


class MageBlock(nn.Module):
    """Residual block of the MAGE layout, (B, C_in, H, W) -> (B, C_out, H, W).

    x + h when the width is kept, h + W h when it changes: the input is then not added at all, as in the released file.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(width_in), group_norm(width_out)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_out, width_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


class TamingBlock(nn.Module):
    """Residual block of the taming layout, (B, C_in, H, W) -> (B, C_out, H, W): the shortcut carries the input."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(width_in), group_norm(width_out)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class GridAttention(nn.Module):
    """Single-head attention over all positions of a feature map, (B, C, H, W) -> same; taming layout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).mT.unsqueeze(1) for part in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT.reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve both sides: taming's strided 3x3 convolution, padded on the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks (and attentions) of one resolution; a change of resolution is hung on by the caller."""

    def __init__(self, config: VqganConfig, index: int, width_in: int, width_out: int, blocks: int) -> None:
        super().__init__()
        inputs = [width_in] + [width_out] * (blocks - 1)
        self.block = nn.ModuleList(_block(config, width, width_out) for width in inputs)
        attended = blocks if index in config.attention else 0
        self.attn = nn.ModuleList(GridAttention(width_out) for _ in range(attended))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        return x


class Middle(nn.Module):
    """Two residual blocks at the coarsest resolution, with attention between them in the taming layout."""

    def __init__(self, config: VqganConfig, width: int) -> None:
        super().__init__()
        self.block_1 = _block(config, width, width)
        if config.layout == "taming":
            self.attn_1 = GridAttention(width)
        self.block_2 = _block(config, width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        if hasattr(self, "attn_1"):
            x = self.attn_1(x)
        return self.block_2(x)


class Encoder(nn.Module):
    """(B, 3, H, W) in the layout's own range -> latents (B, z_channels, H / stride, W / stride)."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        taming = config.layout == "taming"
        self.conv_in = nn.Conv2d(3, config.stem, 3, padding=1, bias=taming)
        inputs = (config.stem, *config.widths[:-1])
        self.down = nn.ModuleList(
            Level(config, index, width_in, width, config.blocks)
            for index, (width_in, width) in enumerate(zip(inputs, config.widths, strict=True))
        )
        for level, width in zip(self.down[:-1], config.widths[:-1], strict=True):
            level.downsample = Downsample(width) if config.strided else nn.AvgPool2d(2)
        self.mid = Middle(config, config.widths[-1])
        self.norm_out = group_norm(config.widths[-1])
        kernel = 3 if taming else 1
        self.conv_out = nn.Conv2d(config.widths[-1], config.z_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) -> (B, 3, h * stride, w * stride) in the layout's own range, not clipped."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        coarse = config.widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, coarse, 3, padding=1)
        self.mid = Middle(config, coarse)
        inputs = (*config.widths[1:], coarse)  # level i takes what level i + 1 gives
        self.up = nn.ModuleList(
            Level(config, index, width_in, width, config.decoder_blocks)
            for index, (width_in, width) in enumerate(zip(inputs, config.widths, strict=True))
        )
        for level, width in zip(self.up[1:], config.widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.norm_out = group_norm(config.widths[0])
        self.conv_out = nn.Conv2d(config.widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """The table of codes, named as in the published files; called on latents it finds the nearest codes."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    def forward(self, z_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) float -> (B, h * w) int64, row-major: least squared distance, lowest id on a tie."""
        points_ND = z_BDhw.detach().permute(0, 2, 3, 1).reshape(-1, z_BDhw.shape[1])
        return nearest(points_ND, self.embedding.weight.detach()).reshape(z_BDhw.shape[0], -1)


def _block(config: VqganConfig, width_in: int, width_out: int) -> nn.Module:
    return (TamingBlock if config.layout == "taming" else MageBlock)(width_in, width_out)
