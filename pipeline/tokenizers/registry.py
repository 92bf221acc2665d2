"""The tables of tokenizer layouts, and the loader that finds a file's layout by its tensors' names."""

import difflib
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.common.hub import local_file
from semdict.pipeline.common.safeload import load_checkpoint, open_checkpoint, state_dict_of
from semdict.pipeline.tokenizers.base import ConvTokenizer, Tokenizer
from semdict.pipeline.tokenizers.compact import CompactTokenizer
from semdict.pipeline.tokenizers.ibq import IbqTokenizer
from semdict.pipeline.tokenizers.llamagen import LlamagenTokenizer
from semdict.pipeline.tokenizers.mage import MageTokenizer
from semdict.pipeline.tokenizers.magvit2 import Magvit2Tokenizer
from semdict.pipeline.tokenizers.maskgit import MaskgitTokenizer
from semdict.pipeline.tokenizers.taming import TamingTokenizer

LAYOUTS: dict[str, type[ConvTokenizer]] = {
    "compact": CompactTokenizer,
    "mage": MageTokenizer,
    "taming": TamingTokenizer,
    "maskgit": MaskgitTokenizer,
    "llamagen": LlamagenTokenizer,
    "ibq": IbqTokenizer,
    "magvit2": Magvit2Tokenizer,
}
# Tokenizers that state their kind in the file: kind -> "module:loader", imported by name when such a file is read.
# That keeps the pipeline free of imports from semdict.train, where the VCQ tokenizer lives.
KINDS = {"semdict-vcq-tokenizer": "semdict.train.vcq.tokenizer:load_vcq_tokenizer"}
RUN_FILE = "tokenizer.pt"  # the tokenizer in the folder of its training run
STEM = "encoder.conv_in.weight"  # every layout has it; a longer name ends in it inside a larger model
HINTS = {  # tensor name -> explanation for a file that has it and fits no layout
    "quantize.embed.weight": "it is a Gumbel VQGAN; only nearest-code models are supported",
    "encoder.down.0.block.3.conv1.weight": (
        "with four residual blocks per level it is an IBQ tokenizer without its averaged weights, or an unusual one of "
        "taming-transformers, whose tensors have the same names; pass layout"
    ),
}


def load_tokenizer(
    path: str | os.PathLike, device: str | torch.device = "cpu", layout: str | None = None, ema: bool = True
) -> Tokenizer:
    """Read a tokenizer: a checkpoint of any known layout, a run of `semdict vcq train`, or a file on the hub.

    path: a file, a run's folder, or `hf-hub:owner/name/file`. layout: a name of LAYOUTS; by default it is recognised
    by the tensors' names. ema: use averaged weights where the file has both. Frozen, in evaluation mode, float32; sizes
    are read from the tensors' shapes. WeightsError when the file is of no known layout (names those that were tried,
    and the nearest) or its tensors do not fit each other.
    """
    file = _file_of(path, layout)
    checkpoint = load_checkpoint(file)
    if (loader := _own_loader(checkpoint)) is not None:
        return loader(file, device)
    cls, tensors = recognise(state_dict_of(checkpoint, file, ema), path, layout)
    model = cls.from_tensors(tensors, path, ema)
    model.identity["sha256"] = sha256_file(file)
    if not ema:
        model.identity["ema"] = False
    return model.requires_grad_(False).eval().to(device)


def inspect_tokenizer(path: str | os.PathLike, layout: str | None = None, ema: bool = True) -> Tokenizer:
    """A tokenizer without its weights, from the names and shapes in its file: for codebook_size, stride and grid.

    WeightsError as `load_tokenizer`.
    """
    file = _file_of(path, layout)
    checkpoint = open_checkpoint(file)
    if (loader := _own_loader(checkpoint)) is not None:
        return loader(file, "cpu")
    cls, tensors = recognise(state_dict_of(checkpoint, file, ema), path, layout)
    return cls.from_tensors({name: tensor.to("meta") for name, tensor in tensors.items()}, Path(path), ema)


def _file_of(path: str | os.PathLike, layout: str | None) -> Path:
    """The file of weights; WeightsError for a layout that is unknown."""
    if layout is not None and layout not in LAYOUTS:
        near = difflib.get_close_matches(layout, LAYOUTS, n=1) or LAYOUTS
        raise WeightsError(f"tokenizer layout {layout} is unknown; did you mean {', '.join(near)}?")
    file = local_file(path)
    return file / RUN_FILE if file.is_dir() else file


def _own_loader(checkpoint: dict) -> Callable[[Path, str | torch.device], Tokenizer] | None:
    """The loader of a file that states its kind; None for a published layout."""
    if not isinstance(checkpoint.get("kind"), str) or checkpoint["kind"] not in KINDS:
        return None
    module, _, loader = KINDS[checkpoint["kind"]].partition(":")
    return getattr(importlib.import_module(module), loader)


def recognise(
    tensors: dict[str, Tensor], path: str | os.PathLike, layout: str | None = None
) -> tuple[type[ConvTokenizer], dict[str, Tensor]]:
    """The layout of a state dict, and the tokenizer's part of it without its prefix."""
    parts = [_part(tensors, prefix) for prefix in _prefixes(tensors)]
    if layout is not None:
        return LAYOUTS[layout], parts[0]
    for part in parts:
        for candidate in LAYOUTS.values():
            if not _differences(candidate, part):
                return candidate, part
    nearest = min(LAYOUTS.values(), key=lambda candidate: len(_differences(candidate, parts[0])))
    because = next((text for name, text in HINTS.items() if name in parts[0]), None)
    because = because or f"{nearest.layout} is nearest, but {' and '.join(_differences(nearest, parts[0])[:3])}"
    raise WeightsError(
        f"{path} is a tokenizer of no known layout: {because}. Layouts tried: {', '.join(LAYOUTS)}; the file holds "
        f"{', '.join(list(tensors)[:4])}, ... ({len(tensors)} tensors). docs/tokenizers.md shows how to add a layout"
    )


def _prefixes(tensors: dict[str, Tensor]) -> list[str]:
    """What stands before the stem's name, shortest first; the empty prefix where there is no stem."""
    stems = (name for name in tensors if name == STEM or name.endswith(f".{STEM}"))
    return sorted((name.removesuffix(STEM) for name in stems), key=len) or [""]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _differences(layout: type[ConvTokenizer], tensors: dict[str, Tensor]) -> list[str]:
    """Differences between the tensors' names and those of the layout, one phrase each."""
    missing = [f"{name} is missing" for name in layout.present if name not in tensors]
    return missing + [f"{name} does not belong to it" for name in layout.absent if name in tensors]
