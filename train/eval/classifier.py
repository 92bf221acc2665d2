"""The encoder as a classifier, fine-tuned as MAE and MAGE do it: patch mean, a new norm, a linear head.

B images, L grid cells, E width, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from semdict.train.engine.layers import EPS
from semdict.train.engine.optim import parameter_groups
from semdict.train.masked.model import MaskedTokenTransformer, ModelConfig

HEAD_STD = 2e-5  # of the released fine-tuning's head
PRETRAINING = (
    "norm", "decoder_embed", "decoder_position", "decoder_blocks", "decoder_norm", "token_head", "proj_to_dino",
    "dec_to_dino", "projector", "predictor",
)  # fmt: skip


class Classifier(nn.Module):
    """Tokens (B, L) int64 -> (B, C) logits: last block's output, mean over cells, layer norm (1e-6), linear.

    Changes `model`: modules that only pretraining uses are removed, all others are trained. drop_path: rate of the
    last block, rising linearly from 0 at the first (stochastic depth, arXiv:1603.09382); dropout: inside the blocks.
    """

    KIND, COMMAND = "semdict-classifier", "semdict evaluate fine-tune"

    def __init__(
        self, model: MaskedTokenTransformer, classes: int, drop_path: float = 0.0, dropout: float = 0.0,
        embedding_dropout: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name in PRETRAINING:
            setattr(model, name, None)
        self.encoder = model.requires_grad_(True)
        width, depth = model.config.width, len(model.blocks)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)
        model.token_emb.drop.p = embedding_dropout
        for number, block in enumerate(model.blocks):
            block.drop_path = drop_path * number / max(1, depth - 1)
            block.attn.dropout = block.attn.drop.p = block.mlp.drop.p = dropout

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain data, for a model file."""
        return {"encoder": self.encoder.config.to_dict(), "classes": self.head.out_features}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Classifier":
        """A module of the configuration that `config_dict` gave."""
        return cls(MaskedTokenTransformer(ModelConfig.from_dict(config["encoder"])), config["classes"])

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder.encode(tokens_BL, norm=False)[:, 1:].mean(dim=1)))


def layer_of(name: str, depth: int) -> int:
    """0 for the embeddings, i + 1 for block i, depth + 1 for norm and head."""
    if name.startswith("encoder.token_emb."):
        return 0
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def layer_groups(classifier: Classifier, weight_decay: float, decay: float) -> list[dict[str, Any]]:
    """AdamW groups with `lr_scale` = decay^(depth + 1 - layer), as MAE's fine-tuning (BEiT, arXiv:2106.08254)."""
    depth = len(classifier.encoder.blocks)
    merged: dict[tuple[int, float], dict[str, Any]] = {}
    for group in parameter_groups(classifier, weight_decay):
        for name, parameter in group["params"]:
            layer, wd = layer_of(name, depth), group["weight_decay"]
            fresh = {"params": [], "weight_decay": wd, "lr_scale": decay ** (depth + 1 - layer)}
            merged.setdefault((layer, wd), fresh)["params"].append((name, parameter))
    return [merged[key] for key in sorted(merged)]
