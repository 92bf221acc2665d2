"""The convolutional encoder and decoder that every released VQGAN family varies.

Introduced with VQGAN (arXiv:2012.09841); later families keep the shape (levels of residual blocks, halved or doubled
in size between levels, a middle part) and change its details, which are the fields of `Variant`. Modules have the names
of the taming-transformers files; a layout with other names renames its tensors on load. B images, C channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS, GROUP_EPS = 32, 1e-6


@dataclass(frozen=True)
class Variant:
    """Details that are fixed within a released family. The defaults are those of taming-transformers."""

    signed: bool = True  # images enter and leave in [-1, 1], else in [0, 1]
    bias: bool = True  # residual blocks and the encoder's first convolution have biases
    shortcut: str = "input"  # where the width changes: "input" h + W x; "output" h + W h, the input is dropped
    latent_kernel: int = 3  # of the convolution that ends the encoder
    mid_attention: bool = True  # one attention between the two middle blocks
    projection: bool = True  # 1x1 convolutions before and after quantisation
    padding: str = "after"  # of strided convolutions: "after" one row below and one column right; "both" sides by one
    depth_to_space: bool = False  # upsampling by channels, else nearest neighbour and a convolution
    adaptive: bool = False  # adaptive group norm before each decoder level, driven by the quantised latents
    final_norm: bool = True  # group norm and SiLU before the last convolution of encoder and decoder


@dataclass(frozen=True)
class Sizes:
    """Sizes that differ between the files of a family; a loader reads them from the tensors' shapes."""

    stem: int  # channels after the first convolution
    widths: tuple[int, ...]  # channels per level, finest first
    blocks: int  # residual blocks per encoder level
    decoder_blocks: int  # residual blocks per decoder level
    z_channels: int  # channels of the latents
    codes: int  # K, size of the codebook
    dim: int  # D, width of a code
    mid_blocks: int = 2  # residual blocks of the middle part
    attention: tuple[int, ...] = ()  # levels with attention, in encoder and decoder
    strided: bool = True  # strided convolution between encoder levels, else average pooling
    patch: int = 1  # pixels per side of a position of the finest level

    @property
    def stride(self) -> int:
        """Pixels per grid cell and side."""
        return self.patch * 2 ** (len(self.widths) - 1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm as in every released file."""
    return nn.GroupNorm(GROUPS, channels, eps=GROUP_EPS)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut, (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, variant: Variant, width_in: int, width_out: int) -> None:
        super().__init__()
        bias, self.drops_input = variant.bias, variant.shortcut == "output"
        self.norm1, self.norm2 = group_norm(width_in), group_norm(width_out)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=bias)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_out if self.drops_input else width_in, width_out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if not hasattr(self, "nin_shortcut"):
            return h + x
        return h + self.nin_shortcut(h if self.drops_input else x)


class GridAttention(nn.Module):
    """Single-head attention over all positions of a feature map, (B, C, H, W) -> same shape."""

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
    """Halves both sides by a strided 3x3 convolution."""

    def __init__(self, width: int, padding: str = "after") -> None:
        super().__init__()
        self.padding = (0, 1, 0, 1) if padding == "after" else (1, 1, 1, 1)
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DepthToSpace(nn.Module):
    """Doubles both sides: a 3x3 convolution to 4 C channels, whose quarters are the four pixels of each 2x2 square.

    Output pixel (2 y + r, 2 x + c) of channel k is input channel (2 r + c) * C + k, not the order of `PixelShuffle`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        quarters = self.conv(x).view(B, 2, 2, C, H, W)  # r, c, channel, y, x
        return quarters.permute(0, 3, 4, 1, 5, 2).reshape(B, C, 2 * H, 2 * W)


class AdaptiveNorm(nn.Module):
    """Group norm whose scale and shift are linear in the quantised latents' deviation and mean, per image."""

    def __init__(self, width: int, z_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=GROUP_EPS, affine=False)
        self.gamma, self.beta = nn.Linear(z_channels, width), nn.Linear(z_channels, width)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        var, mean = torch.var_mean(z, dim=(2, 3), correction=1)
        gamma, beta = self.gamma((var + GROUP_EPS).sqrt()), self.beta(mean)
        return self.norm(x) * gamma[..., None, None] + beta[..., None, None]


class Level(nn.Module):
    """The residual blocks (and attentions) of one resolution; the caller adds the change of resolution."""

    def __init__(self, variant: Variant, width_in: int, width_out: int, blocks: int, attention: bool) -> None:
        super().__init__()
        inputs = [width_in] + [width_out] * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(variant, width, width_out) for width in inputs)
        self.attn = nn.ModuleList(GridAttention(width_out) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        return x


class Middle(nn.Sequential):
    """Residual blocks at the coarsest resolution: block_1, attn_1 where the variant has it, block_2, ..."""

    def __init__(self, variant: Variant, width: int, blocks: int) -> None:
        super().__init__()
        for number in range(1, blocks + 1):
            self.add_module(f"block_{number}", ResidualBlock(variant, width, width))
            if variant.mid_attention and number == 1:
                self.add_module("attn_1", GridAttention(width))


class Encoder(nn.Module):
    """(B, 3, H, W) in the family's own range -> latents (B, z_channels, H / stride, W / stride)."""

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        super().__init__()
        coarse, patch = sizes.widths[-1], sizes.patch
        if patch > 1:
            self.conv_in = nn.Conv2d(3, sizes.stem, patch, stride=patch, bias=variant.bias)
        else:
            self.conv_in = nn.Conv2d(3, sizes.stem, 3, padding=1, bias=variant.bias)
        inputs = (sizes.stem, *sizes.widths[:-1])
        self.down = nn.ModuleList(
            Level(variant, width_in, width, sizes.blocks, index in sizes.attention)
            for index, (width_in, width) in enumerate(zip(inputs, sizes.widths, strict=True))
        )
        for level, width in zip(self.down[:-1], sizes.widths[:-1], strict=True):
            level.downsample = Downsample(width, variant.padding) if sizes.strided else nn.AvgPool2d(2)
        self.mid = Middle(variant, coarse, sizes.mid_blocks)
        self.norm_out = group_norm(coarse) if variant.final_norm else None
        self.conv_out = nn.Conv2d(coarse, sizes.z_channels, variant.latent_kernel, padding=variant.latent_kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(_normalised(self.mid(x), self.norm_out))


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) -> (B, 3, h * stride, w * stride) in the family's own range, not clipped."""

    def __init__(self, variant: Variant, sizes: Sizes) -> None:
        super().__init__()
        coarse = sizes.widths[-1]
        self.conv_in = nn.Conv2d(sizes.z_channels, coarse, 3, padding=1)
        self.mid = Middle(variant, coarse, sizes.mid_blocks)
        inputs = (*sizes.widths[1:], coarse)  # level i takes the output of level i + 1
        self.up = nn.ModuleList(
            Level(variant, width_in, width, sizes.decoder_blocks, index in sizes.attention)
            for index, (width_in, width) in enumerate(zip(inputs, sizes.widths, strict=True))
        )
        for level, width in zip(self.up[1:], sizes.widths[1:], strict=True):
            level.upsample = DepthToSpace(width) if variant.depth_to_space else Upsample(width)
        if variant.adaptive:
            self.adaptive = nn.ModuleList(AdaptiveNorm(width, sizes.z_channels) for width in inputs)
        self.norm_out = group_norm(sizes.widths[0]) if variant.final_norm else None
        self.conv_out = nn.Conv2d(sizes.widths[0], 3 * sizes.patch**2, 3, padding=1)
        self.patch = sizes.patch

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for index, level in reversed(list(enumerate(self.up))):
            if hasattr(self, "adaptive"):
                x = self.adaptive[index](x, z)
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        x = self.conv_out(_normalised(x, self.norm_out))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x


def _normalised(x: Tensor, norm: nn.GroupNorm | None) -> Tensor:
    return x if norm is None else F.silu(norm(x))
