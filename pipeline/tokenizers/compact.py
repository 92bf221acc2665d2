"""The layout of `semdict vqgan train`: a VQGAN that works on patches of pixels, so that a CPU can train it."""

from torch import Tensor

from semdict.pipeline.tokenizers.base import ConvTokenizer
from semdict.pipeline.tokenizers.vqgan import Sizes, Variant


class CompactTokenizer(ConvTokenizer):
    """Images in [-1, 1] inside; the first convolution reads patches, the last one writes them (sub-pixel convolution,
    arXiv:1609.05158), and nothing is normalised outside the residual blocks.

    So a linear path leads from the pixels to the latents and back: colours and brightness, which a group norm before
    the last convolution takes out of each image, need not be learnt around it.
    """

    layout = "compact"
    present = (
        "encoder.conv_in.weight",
        "encoder.down.0.block.0.conv1.weight",
        "encoder.mid.block_1.conv1.weight",
        "quantize.embedding.weight",
    )
    absent = ("encoder.norm_out.weight", "quant_conv.weight")
    variant = Variant(latent_kernel=1, mid_attention=False, projection=False, final_norm=False)

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.identity["patch"] = sizes.patch

    @classmethod
    def patch_of(cls, state: dict[str, Tensor]) -> int:
        """The kernel of the first convolution is a patch."""
        return state["encoder.conv_in.weight"].shape[-1]
