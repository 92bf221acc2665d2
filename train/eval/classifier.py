"""The encoder as a classifier, fine-tuned as MAE and MAGE do it: patch mean, a new norm, a linear head.

B images, L grid cells, E width, C classes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import write_aside
from semdict.pipeline.common.safeload import load_checkpoint
from semdict.train.engine.layers import EPS
from semdict.train.engine.optim import groups
from semdict.train.masked.model import MaskedTokenTransformer, ModelConfig

KIND = "semdict-classifier"
HEAD_STD = 2e-5  # of the released fine-tuning's head
PRETRAINING = (
    "norm", "decoder_embed", "decoder_position", "decoder_blocks", "decoder_norm", "token_head", "proj_to_dino",
    "dec_to_dino", "projector", "predictor",
)  # fmt: skip


class Classifier(nn.Module):
    """Tokens (B, L) int64 -> (B, C) logits: last block's output, mean over cells, layer norm (1e-6), linear.

    Takes `model` over: what only pretraining uses is removed from it, and all that stays learns. drop_path: rate of the
    last block, rising linearly from 0 at the first (stochastic depth, arXiv:1603.09382); dropout: inside the blocks.
    """

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
    found: dict[tuple[int, float], dict[str, Any]] = {}
    for group in groups(classifier, weight_decay):
        for name, parameter in group["params"]:
            layer, wd = layer_of(name, depth), group["weight_decay"]
            fresh = {"params": [], "weight_decay": wd, "lr_scale": decay ** (depth + 1 - layer)}
            found.setdefault((layer, wd), fresh)["params"].append((name, parameter))
    return [found[key] for key in sorted(found)]


def save_classifier(path: Path, model: Classifier, about: dict[str, Any]) -> None:
    """Write {"kind", "config", "classes", "model", "about"}; `about` is plain data."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    config, classes = model.encoder.config.to_dict(), model.head.out_features
    with write_aside(path) as aside, aside.open("wb") as file:
        torch.save({"kind": KIND, "config": config, "classes": classes, "model": state, "about": about}, file)


def load_classifier(path: str | Path) -> tuple[Classifier, dict[str, Any]]:
    """(classifier in evaluation mode on the CPU, what its file says); WeightsError when it is none, or damaged."""
    found = load_checkpoint(Path(path))
    if found.get("kind") != KIND:
        raise WeightsError(f"{path} was not written by `semdict evaluate fine-tune`; its entries are {list(found)[:6]}")
    try:
        model = Classifier(MaskedTokenTransformer(ModelConfig.from_dict(found["config"])), found["classes"])
        model.load_state_dict(found["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: the model does not fit its configuration: {error}") from None
    return model.eval(), found["about"]
