"""The table of released tokenizer layouts, and the loader that finds a file's layout by its tensors' names."""

import os
from pathlib import Path

import torch
from torch import Tensor

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.common.safeload import load_tensors
from semdict.pipeline.tokenizers.base import ConvTokenizer
from semdict.pipeline.tokenizers.mage import MageTokenizer
from semdict.pipeline.tokenizers.taming import TamingTokenizer

LAYOUTS: dict[str, type[ConvTokenizer]] = {layout.layout: layout for layout in (MageTokenizer, TamingTokenizer)}
STEM = "encoder.conv_in.weight"  # every layout has it; what stands before it is the prefix of a larger model
KNOWN_OTHERS = {"quantize.embed.weight": "it is a Gumbel VQGAN; only nearest-code models are supported"}


def load_tokenizer(path: str | os.PathLike, device: str | torch.device = "cpu") -> ConvTokenizer:
    """Read a tokenizer from a checkpoint of any known layout: frozen, in evaluation mode, float32.

    The layout is recognised by the names of the tensors, sizes are read from their shapes. WeightsError when the file
    is of no known layout (names those that were tried, and the nearest) or its tensors do not fit each other.
    """
    path = Path(path)
    layout, tensors = recognise(load_tensors(path), path)
    model = layout.from_tensors(tensors, path)
    model.identity["sha256"] = sha256_file(path)
    return model.requires_grad_(False).eval().to(device)


def recognise(tensors: dict[str, Tensor], path: Path) -> tuple[type[ConvTokenizer], dict[str, Tensor]]:
    """The layout of a state dict, and the tokenizer's part of it without its prefix."""
    parts = {prefix: _part(tensors, prefix) for prefix in _prefixes(tensors)}
    for part in parts.values():
        for layout in LAYOUTS.values():
            if not _differences(layout, part):
                return layout, part
    whole = next(iter(parts.values()))
    nearest = min(LAYOUTS.values(), key=lambda layout: len(_differences(layout, whole)))
    because = next((text for name, text in KNOWN_OTHERS.items() if name in whole), None)
    because = because or f"{nearest.layout} is nearest, but {' and '.join(_differences(nearest, whole)[:3])}"
    raise WeightsError(
        f"{path} is a tokenizer of no known layout: {because}. Layouts tried: {', '.join(LAYOUTS)}; the file holds "
        f"{', '.join(list(tensors)[:4])}, ... ({len(tensors)} tensors). docs/tokenizers.md shows how to add a layout"
    )


def _prefixes(tensors: dict[str, Tensor]) -> list[str]:
    """What stands before the stem's name, shortest first; nothing where there is no stem."""
    found = {name.removesuffix(STEM) for name in tensors if name == STEM or name.endswith(f".{STEM}")}
    return sorted(found, key=len) or [""]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _differences(layout: type[ConvTokenizer], tensors: dict[str, Tensor]) -> list[str]:
    """In what the tensors' names are not those of the layout."""
    missing = [f"{name} is missing" for name in layout.present if name not in tensors]
    return missing + [f"{name} does not belong to it" for name in layout.absent if name in tensors]
