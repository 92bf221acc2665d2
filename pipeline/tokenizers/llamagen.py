"""LlamaGen's VQ-16 and VQ-8 (FoundationVision/LlamaGen, arXiv:2406.06525): 16,384 codes of width 8.

Public files: `hf-hub:FoundationVision/LlamaGen/vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`, and `hf-hub:peizesun/llamagen_t2i/
vq_ds16_t2i.pt`. A training checkpoint with `ema` and `model` gives the averaged weights, as in LlamaGen's tokenizer
scripts.
"""

import re

import torch.nn.functional as F
from torch import Tensor

from semdict.pipeline.common.nearest import nearest
from semdict.pipeline.tokenizers.base import Codebook, ConvTokenizer
from semdict.pipeline.tokenizers.vqgan import Variant

MIDDLE = {"0": "block_1", "1": "attn_1", "2": "block_2"}


class UnitCodebook(Codebook):
    """Codes and latents are compared, and codes decoded, at unit length; the stored table is not normalised."""

    @property
    def table(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1)

    def lookup(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.embedding(tokens), dim=-1)

    def search(self, points_ND: Tensor) -> Tensor:
        return nearest(F.normalize(points_ND.float(), dim=-1), self.table.detach().float())


class LlamagenTokenizer(ConvTokenizer):
    """Images in [-1, 1] inside; taming's arithmetic under other names, and a codebook on the unit sphere."""

    layout = "llamagen"
    present = (
        "encoder.conv_in.weight",
        "encoder.conv_blocks.0.res.0.conv1.weight",
        "encoder.mid.1.q.weight",
        "quantize.embedding.weight",
        "quant_conv.weight",
    )
    ignored = (*ConvTokenizer.ignored, "quantize.codebook_used")
    variant = Variant()
    codebook_type = UnitCodebook

    @classmethod
    def renamed(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Decoder levels are numbered as they run, the coarsest first; here level 0 is the finest, as elsewhere."""
        numbers = [int(match[1]) for name in tensors if (match := re.match(r"decoder\.conv_blocks\.(\d+)\.", name))]
        coarsest = max(numbers, default=0)

        def name_here(name: str) -> str:
            name = re.sub(r"^encoder\.conv_blocks\.", "encoder.down.", name)
            name = re.sub(r"^decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{coarsest - int(m[1])}.", name)
            name = re.sub(r"\.mid\.([012])\.", lambda m: f".mid.{MIDDLE[m[1]]}.", name)
            return name.replace(".res.", ".block.")

        return {name_here(name): tensor for name, tensor in tensors.items()}
