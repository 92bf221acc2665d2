"""VQModel of CompVis/taming-transformers (arXiv:2012.09841), also inside latent-diffusion checkpoints."""

from semdict.pipeline.tokenizers.base import ConvTokenizer
from semdict.pipeline.tokenizers.vqgan import Variant


class TamingTokenizer(ConvTokenizer):
    """Images in [-1, 1] inside; biases, attention, strided convolutions, 1x1 convolutions around the codebook."""

    layout = "taming"
    present = (
        "encoder.conv_in.weight",
        "encoder.conv_in.bias",
        "encoder.down.0.block.0.conv1.weight",
        "encoder.mid.attn_1.q.weight",
        "quantize.embedding.weight",
        "quant_conv.weight",
        "post_quant_conv.weight",
    )
    absent = ("model_ema.encoderconv_inweight", "encoder.down.0.block.3.conv1.weight")  # both are signs of IBQ
    variant = Variant()
