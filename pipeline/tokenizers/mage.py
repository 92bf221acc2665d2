"""MAGE's VQGAN (LTH14/mage): the released file, or a MAGE checkpoint that contains it under `vqgan.`."""

from semdict.pipeline.tokenizers.base import ConvTokenizer
from semdict.pipeline.tokenizers.vqgan import Sizes, Variant

# vqgan_jax_strongaug.ckpt
RELEASED = Sizes(
    stem=128,
    widths=(128, 128, 256, 256, 512),
    blocks=2,
    decoder_blocks=2,
    z_channels=256,
    codes=1024,
    dim=256,
    strided=False,
)


class MageTokenizer(ConvTokenizer):
    """Images in [0, 1]; bias-free residual blocks, average pooling, no attention; shortcuts act on the block's output.

    Where a residual block changes the width, its input is not added at all: the released weights need that.
    """

    layout = "mage"
    present = (
        "encoder.conv_in.weight",
        "encoder.down.0.block.0.conv1.weight",
        "encoder.mid.block_1.conv1.weight",
        "quantize.embedding.weight",
    )
    absent = ("quant_conv.weight",)
    variant = Variant(
        signed=False, bias=False, shortcut="output", latent_kernel=1, mid_attention=False, projection=False
    )
