"""MaskGIT's VQGAN as bytedance/1d-tokenizer ships it (arXiv:2202.04200): the tokenizer of TiTok, RAR and MaskGen.

Public file: `hf-hub:fun-research/TiTok/maskgit-vqgan-imagenet-f16-256.bin`, 1,024 codes of width 256.
"""

import re

from torch import Tensor

from semdict.pipeline.tokenizers.mage import MageTokenizer


class MaskgitTokenizer(MageTokenizer):
    """The arithmetic of MAGE's tokenizer, images in [0, 1]; the middle part has as many blocks as a level."""

    layout = "maskgit"
    present = (
        "encoder.conv_in.weight",
        "encoder.down.0.block.0.conv1.weight",
        "encoder.mid.0.conv1.weight",
        "quantize.embedding.weight",
    )

    @classmethod
    def renamed(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {_name(name): tensor for name, tensor in tensors.items()}


def _name(name: str) -> str:
    name = re.sub(r"\.mid\.(\d+)\.", lambda match: f".mid.block_{int(match[1]) + 1}.", name)
    return name.replace(".upsample_conv.", ".upsample.conv.")
