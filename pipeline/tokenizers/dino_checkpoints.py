"""Tensor names of DINOv2 and DINOv3 checkpoints, as training, the published files and Hugging Face spell them.

Everything is brought to the names of the published files, which timm's own filters know.
"""

import re

import torch
from torch import Tensor

# Hugging Face's name -> published name. DINOv2 (`encoder.layer`) and DINOv3 (`layer`) share most of them.
HUGGING_FACE = [
    (r"^(model|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(encoder\.)?layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
]
DINOV3_MLP = {True: {"gate": "w1", "up": "w2", "down": "w3"}, False: {"up": "fc1", "down": "fc2"}}  # gated or not


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names of the published DINO files, unchanged where it is of another family."""
    if any(name.startswith("backbone.") for name in state):  # DINOv2's training: backbone and heads side by side
        state = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    if any(name.endswith("embeddings.cls_token") for name in state):
        state = _from_hugging_face(state)
    if "cls_token" in state:  # DINOv2's training keeps blocks in chunks: blocks.1.7 is block 7
        state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): t for name, t in state.items()}
    return state


def _from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    dinov3 = "embeddings.position_embeddings" not in {re.sub(HUGGING_FACE[0][0], "", name) for name in state}
    renamed = {}
    for name, tensor in state.items():
        published = name
        for pattern, replacement in HUGGING_FACE:
            published = re.sub(pattern, replacement, published)
        renamed[published] = tensor
    if dinov3:
        gated = any(".mlp.gate_proj." in name for name in renamed)
        for old, new in DINOV3_MLP[gated].items():
            renamed = {name.replace(f".mlp.{old}_proj.", f".mlp.{new}."): t for name, t in renamed.items()}
        renamed = {name.replace("register_tokens", "storage_tokens"): t for name, t in renamed.items()}
    return _joined(renamed)


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of each block as one tensor; DINOv3 has no bias of keys, which is zero then."""
    joined, parts = {}, {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn\.)(query|key|value|q|k|v)\.(weight|bias)", name)
        if match:
            parts.setdefault(f"{match[1]}qkv.{match[3]}", {})[match[2][0]] = tensor
        else:
            joined[name] = tensor
    for name, thirds in parts.items():
        some = next(iter(thirds.values()))
        joined[name] = torch.cat([thirds.get(third, torch.zeros_like(some)) for third in "qkv"])
    return joined
