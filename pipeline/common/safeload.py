"""The only door for files that others made: checkpoints and arrays are read as data, never executed."""

import argparse
import os
import pathlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from semdict.pipeline.common.errors import WeightsError


class Inert:
    """Stands where a checkpoint names a training-time class that is not needed to read its tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


# Plain data that released checkpoints carry beside their tensors: an argument namespace, paths, numpy scalars.
HARMLESS = [
    argparse.Namespace,
    pathlib.PosixPath,
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    np.dtype,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    np.dtypes.Int32DType,
    np.dtypes.BoolDType,
]
# taming-transformers' released files name this class as a dictionary key; its code is never imported.
FORGOTTEN = ["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"]


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a .pt, .pth, .ckpt (torch, weights only) or .safetensors file to the CPU; the top level is a dict.

    WeightsError when the file is missing, damaged, not a checkpoint, or holds a pickle that would run code.
    """
    path = existing_file(path)
    try:
        found = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    except Exception as error:
        raise WeightsError(_why_not(path, error)) from None
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds a {type(found).__name__}, expected a dictionary of tensors")
    return found


def load_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict of a checkpoint: the file itself, or what stands under `state_dict`, `model` or `teacher`.

    A `module.` prefix from a wrapped model is removed. WeightsError when there are no tensors.
    """
    found: Any = load_checkpoint(path)
    for key in ("state_dict", "model", "teacher"):
        if isinstance(found.get(key), dict):
            found = found[key]
            break
    tensors = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(found)[:6])) or "nothing"
        raise WeightsError(f"{path} holds no tensors; its entries are: {keys}")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def refuse_misfit(state: dict[str, Tensor], model: nn.Module, path: str | os.PathLike, what: str) -> None:
    """WeightsError unless `state` has exactly the names and shapes of `model`; shows both sides of the first three."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [
        f"{name}: the file holds {found.get(name, 'nothing')}, {what} has {wanted.get(name, 'nothing')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{path} does not fit:\n  " + "\n  ".join(wrong[:3]) + more)


def load_array(path: str | os.PathLike, mmap: bool = False) -> np.ndarray:
    """Read a .npy file of plain numbers, memory-mapped read-only on request; WeightsError for anything else."""
    path = existing_file(path)
    try:
        found = np.load(path, allow_pickle=False, mmap_mode="r" if mmap else None)
    except Exception as error:
        raise WeightsError(f"{path} is not a .npy array of numbers and was not loaded: {_first_line(error)}") from None
    if not isinstance(found, np.ndarray):
        found.close()
        raise WeightsError(f"{path} is a .npz archive, expected one .npy array")
    return found


def existing_file(path: str | os.PathLike) -> Path:
    """The path, once it is known to be a file; WeightsError when it is not."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}, expected a file of weights")
    return path


def _load_torch(path: Path) -> Any:
    inert = [(Inert, name) for name in FORGOTTEN]
    with torch.serialization.safe_globals([*HARMLESS, *inert]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _why_not(path: Path, error: Exception) -> str:
    text = str(error)
    if "Unsupported global" in text or "Unsupported operand" in text or "weights_only" in text.lower():
        return (
            f"{path} was refused and nothing in it was executed: it is not plain tensors ({_unsafe_part(text)}). "
            "Save its state dict alone (torch.save of tensors, or safetensors) and use that file"
        )
    return f"{path} cannot be read as a checkpoint, it is damaged or of another kind: {_first_line(error)}"


def _unsafe_part(text: str) -> str:
    """The sentence in torch's message that names what was not allowed."""
    lines = [line.strip() for line in text.splitlines()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines)[0].split(". Please use")[0][:200]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
