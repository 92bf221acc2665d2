"""Index back-propagation quantisation (TencentARC/SEED-Voken, arXiv:2412.02692): up to 262,144 codes of width 256.

Public files: `hf-hub:TencentARC/IBQ-Tokenizer-{1024,8192,16384,262144}/imagenet256_{same}.ckpt`. Tokens and images come
from the averaged weights, as in the released evaluation scripts. A file without them has the tensor names of
taming-transformers: name its layout.
"""

import torch
from torch import Tensor

from semdict.pipeline.common.nearest import exact_float32, rows_per_chunk
from semdict.pipeline.tokenizers.base import AVERAGED, Codebook
from semdict.pipeline.tokenizers.taming import TamingTokenizer


class DotProductCodebook(Codebook):
    """A latent's token is the code of largest dot product with it; nothing is normalised."""

    def search(self, points_ND: Tensor) -> Tensor:
        codes_KD = self.embedding.weight.detach().float()
        parts = points_ND.split(rows_per_chunk(codes_KD))
        with torch.autocast(points_ND.device.type, enabled=False), exact_float32():
            return torch.cat([(part.float() @ codes_KD.T).argmax(dim=1) for part in parts])


class IbqTokenizer(TamingTokenizer):
    """Taming's network with a codebook that is searched by dot product; averaged weights are used."""

    layout = "ibq"
    present = (*TamingTokenizer.present, f"{AVERAGED}encoderconv_inweight")
    absent = ()
    averaged = True
    codebook_type = DotProductCodebook
