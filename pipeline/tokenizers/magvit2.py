"""Open-MAGVIT2 (TencentARC/SEED-Voken, arXiv:2409.04410): lookup-free quantisation, 2^18 or 2^14 codes of +1 and -1.

Public files: `hf-hub:TencentARC/Open-MAGVIT2-Tokenizer-256-resolution/imagenet_256_L.ckpt`, and for 128 pixels
`hf-hub:TencentARC/Open-MAGVIT2-Tokenizer-128-resolution/imagenet_128_L.ckpt`. Tokens and images come from the averaged
weights; the released AR models are trained on tokens of the plain ones (`load_tokenizer(..., ema=False)`).
"""

import re

import torch
from torch import Tensor, nn

from semdict.pipeline.tokenizers.base import ConvTokenizer
from semdict.pipeline.tokenizers.vqgan import Variant


class BinaryCodebook(nn.Module):
    """Every channel gives one bit, channel 0 the least significant one; there is no table to store."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.codes, self.dim = codes, dim

    @property
    def table(self) -> Tensor:
        """(K, D) float: token i decodes from row i."""
        return self.lookup(torch.arange(self.codes))

    def lookup(self, tokens: Tensor) -> Tensor:
        """Ids of any shape -> codes (..., D) of +1 and -1, float32."""
        bits = tokens.unsqueeze(-1) >> torch.arange(self.dim, device=tokens.device) & 1
        return bits.float() * 2 - 1

    def forward(self, z_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) float -> (B, h * w) int64, row-major; a latent of zero gives bit 0."""
        weights_D = 1 << torch.arange(self.dim, device=z_BDhw.device)
        return ((z_BDhw.detach() > 0) * weights_D[:, None, None]).sum(1).flatten(1)


class Magvit2Tokenizer(ConvTokenizer):
    """Images in [-1, 1] inside; bias-free blocks, no attention, depth-to-space upsampling, adaptive decoder norms."""

    layout = "magvit2"
    present = (
        "encoder.conv_in.weight",
        "encoder.down.0.block.0.conv1.weight",
        "encoder.mid_block.0.conv1.weight",
        "decoder.adaptive.0.gamma.weight",
    )
    averaged = True
    variant = Variant(
        bias=False,
        latent_kernel=1,
        mid_attention=False,
        projection=False,
        padding="both",
        depth_to_space=True,
        adaptive=True,
    )
    codebook_type = BinaryCodebook

    @classmethod
    def renamed(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {_name(name): tensor for name, tensor in tensors.items()}

    @classmethod
    def codebook_shape(cls, state: dict[str, Tensor]) -> tuple[int, int]:
        bits = state["encoder.conv_out.weight"].shape[0]
        return 2**bits, bits


def _name(name: str) -> str:
    name = re.sub(r"\.mid_block\.(\d+)\.", lambda match: f".mid.block_{int(match[1]) + 1}.", name)
    return name.replace(".downsample.", ".downsample.conv.").replace(".upsample.conv1.", ".upsample.conv.")
