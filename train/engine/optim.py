"""Parameter groups for weight decay, and AdamW over them."""

from typing import Any

import torch
from torch import Tensor, nn


def is_decayed(name: str, parameter: Tensor) -> bool:
    """timm's rule, used by MAE, MAGE and LEASE: everything with two or more axes that is not called `bias`."""
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] != "bias"


def is_table(name: str) -> bool:
    """Whether a parameter is a position, class or mask token by its name; nn.Embedding weights count besides."""
    last = name.rsplit(".", 1)[-1]
    return last.startswith(("pos", "cls", "mask_token")) or "pos_embed" in name or "position" in name


def parameter_groups(module: nn.Module, weight_decay: float, decay_tables: bool = True) -> list[dict[str, Any]]:
    """Parameters that require a gradient as two AdamW groups, with and without weight decay; names are stored.

    Biases, norms and other vectors are never decayed, nor what the module names in an attribute `no_weight_decay` (a
    set of names, or a method). decay_tables=False spares embedding tables, positions and learned tokens too. A
    parameter with two names is listed once.
    """
    named = getattr(module, "no_weight_decay", ())
    spared = set(named() if callable(named) else named)
    if not decay_tables:
        spared |= {name for name, _ in module.named_parameters() if is_table(name)}
        spared |= {
            f"{name}.weight" if name else "weight"
            for name, part in module.named_modules()
            if isinstance(part, nn.Embedding)
        }
    split: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            split[is_decayed(name, parameter) and name not in spared].append((name, parameter))
    both = [{"params": split[True], "weight_decay": weight_decay}, {"params": split[False], "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def adamw(
    module: nn.Module,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float = 1e-8,
    decay_tables: bool = True,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; the loop sets the learning rate. Fused, on the CPU too: 4x faster."""
    groups = parameter_groups(module, weight_decay, decay_tables)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
