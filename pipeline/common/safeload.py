"""Checkpoints and arrays made by others are read here, as data: nothing in them is executed.

Torch files go through torch's weights-only unpickler. What training code leaves beside the tensors (random states,
configuration objects, callbacks) is replaced by inert objects, so that the tensors load; any other name in a pickle is
refused. The state dict is looked for in the entries that training code wraps it in, and wrapper prefixes are removed
from tensor names.
"""

import argparse
import json
import math
import os
import pathlib
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.digests import check_digest
from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.hub import local_file


class Inert:
    """Takes the place of a class or function that a checkpoint names and that reading its tensors does not need."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def plain_dict(*args: Any) -> dict:
    """Takes the place of `collections.defaultdict`."""
    return {}


# Plain data that released checkpoints carry beside their tensors: an argument namespace, paths, numpy scalars.
HARMLESS = [
    argparse.Namespace,
    pathlib.PosixPath,
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    np.dtype,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
    (plain_dict, "collections.defaultdict"),
]
# Names that training code leaves in checkpoints, replaced by `Inert`; their modules are never imported.
LEFTOVERS = re.compile(
    r"numpy\.random\..+|numpy\.(_?core)\.multiarray\._reconstruct|numpy\.(ndarray|dtypes\.\w+)"
    r"|(omegaconf|hydra|yacs|easydict|ml_collections|addict|pytorch_lightning|lightning|lightning_fabric)\..+"
    r"|typing\.\w+|collections\.deque|datetime\.\w+|builtins\.(dict|list|tuple|int|float|str|bool|bytes|object)"
    r"|torch\.torch_version\.TorchVersion|torch\.optim\..+|__main__\.\w+"
)
# Entries that hold a state dict, by precedence; averaged weights come first unless ema=False.
AVERAGED = ("ema", "model_ema", "state_dict_ema", "ema_state_dict")
PLAIN = ("state_dict", "model", "model_state_dict", "module", "teacher", "student")
WRAPPERS = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module")  # DDP, compile, Fabric, FSDP
WRAPPED = re.compile(rf"^(?:(?:{'|'.join(WRAPPERS)})\.)+|(?<=\.)(?:(?:{'|'.join(WRAPPERS[1:])})\.)+")
ARRAYS_INFLATION, ARRAYS_SLACK = 64, 1 << 24  # the same of an .npz: token grids and flat images compress well
INFLATION, SLACK = 4, 1 << 20  # members of a zip file may take this many times its size, and this many bytes more


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a .pt, .pth, .ckpt, .bin (torch, weights only) or .safetensors file to the CPU; the top level is a dict.

    WeightsError when the file is missing, damaged (record checksums included), not a checkpoint, holds a pickle that
    would run code, or would take far more memory than its size.
    """
    path = existing_file(path)
    try:
        checkpoint = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(_explain(path, error)) from None
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path} holds a {type(checkpoint).__name__}, expected a dictionary of tensors")
    return checkpoint


def open_checkpoint(path: str | os.PathLike) -> dict:
    """`load_checkpoint` for names and shapes alone: tensors are memory-mapped, no checksum is compared.

    Files from before torch 1.6 are read whole.
    """
    path = existing_file(path)
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)  # maps the file; a tensor is read where it is used
        if not zipfile.is_zipfile(path):
            return load_checkpoint(path)
        with zipfile.ZipFile(path) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
        checkpoint = _unpickle(path, set().union(*map(_globals, pickles)), mmap=True)
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(_explain(path, error)) from None
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path} holds a {type(checkpoint).__name__}, expected a dictionary of tensors")
    return checkpoint


def load_tensors(path: str | os.PathLike, ema: bool = True) -> dict[str, Tensor]:
    """The state dict of a checkpoint file, as `state_dict_of` finds it in `load_checkpoint`."""
    return state_dict_of(load_checkpoint(path), path, ema)


def state_dict_of(checkpoint: Mapping[Any, Any], path: str | os.PathLike, ema: bool = True) -> dict[str, Tensor]:
    """The state dict in a checkpoint: the checkpoint itself, or what an entry such as `state_dict` or `ema` holds.

    Averaged weights are preferred where a file has both, plain ones with ema=False. Prefixes of wrapping modules
    (`module.`, `_orig_mod.`) are removed. WeightsError when there are no tensors, or when a tensor is larger than the
    file (a view that repeats its few stored numbers).
    """
    order = (*AVERAGED, *PLAIN) if ema else (*PLAIN, *AVERAGED)
    state = _search(checkpoint, order)
    tensors = {} if state is None else {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        entries = ", ".join(map(str, list(checkpoint)[:6])) or "nothing"
        raise WeightsError(f"{path} holds no tensors; its entries are: {entries}")
    limit = max(existing_file(path).stat().st_size, SLACK)
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > limit:
            raise WeightsError(f"{path}: {name} has shape {tuple(tensor.shape)}, more than the whole file holds")
    return unwrapped(tensors)


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without prefixes of wrapping modules in their names; unchanged where two names would become one."""
    renamed = {WRAPPED.sub("", name): tensor for name, tensor in tensors.items() if name != "n_averaged"}
    return renamed if len(renamed) == len(tensors.keys() - {"n_averaged"}) else tensors


def refuse_misfit(
    state: Mapping[str, Tensor], needed: Mapping[str, Tensor], path: str | os.PathLike, description: str
) -> None:
    """WeightsError unless `state` has exactly the names and shapes of `needed`; shows both sides of the first three."""
    expected = {name: tuple(tensor.shape) for name, tensor in needed.items()}
    actual = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [
        f"{name}: the file holds {actual.get(name, 'nothing')}, {description} has {expected.get(name, 'nothing')}"
        for name in sorted(expected.keys() | actual.keys())
        if expected.get(name) != actual.get(name)
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{path} does not fit:\n  " + "\n  ".join(wrong[:3]) + more)


def load_array(path: str | os.PathLike, mmap: bool = False) -> np.ndarray:
    """Read a .npy file of plain numbers, memory-mapped read-only on request.

    WeightsError for anything else, and for a file that is not the one whose digest lies beside it.
    """
    path = existing_file(path)
    check_digest(path, WeightsError)
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r" if mmap else None)
    except Exception as error:
        raise WeightsError(f"{path} is not a .npy array of numbers and was not loaded: {_first_line(error)}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise WeightsError(f"{path} is a .npz archive, expected one .npy array")
    return array


def load_centroids(path: str | os.PathLike) -> np.ndarray:
    """(K, D) float32 centroids of a .npy file, in their order; WeightsError if they are not finite rows of floats."""
    stored = load_array(path)
    if stored.ndim != 2 or stored.dtype.kind != "f" or not stored.size:
        raise WeightsError(f"{path} holds {stored.dtype} {stored.shape}, centroids are float (K, D)")
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, which is refused
        centroids = np.ascontiguousarray(stored, np.float32)
    unsound = np.flatnonzero(~np.isfinite(centroids).all(axis=1))
    if len(unsound):
        raise WeightsError(f"{path}: centroid {unsound[0]} holds NaN, Inf or more than float32 can ({len(unsound)} do)")
    return centroids


def plain_array(value: Any) -> np.ndarray | None:
    """A tensor of a checkpoint, or a numpy array pickled into it, as an array of numbers; None for anything else.

    `load_checkpoint` leaves pickled arrays inert; here one is rebuilt from its shape, type and bytes, so that nothing
    is executed. bfloat16, which numpy does not have, becomes float32.
    """
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
        value = value.detach().cpu().resolve_conj().resolve_neg()
        return (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    if not isinstance(value, Inert) or not isinstance(value.state, tuple) or len(value.state) != 5:
        return None
    _, shape, dtype, fortran, data = value.state
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf" or not isinstance(data, bytes):
        return None
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        return None
    if math.prod(shape) * dtype.itemsize != len(data):
        return None
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def existing_file(path: str | os.PathLike) -> Path:
    """The path of a file that exists, fetched first where it is on the hub; WeightsError when there is none."""
    path = local_file(path)
    if not path.is_file():
        raise WeightsError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}, expected a file of weights")
    return path


def _search(checkpoint: Any, order: tuple[str, ...], depth: int = 4) -> Mapping | None:
    """The first dictionary with tensors, entries asked in `order`; None where there is none."""
    if not isinstance(checkpoint, Mapping) or not depth:
        return None
    for entry in order:
        if (state := _search(checkpoint.get(entry), order, depth - 1)) is not None:
            return state
    return checkpoint if any(isinstance(value, Tensor) for value in checkpoint.values()) else None


def _load_torch(path: Path) -> Any:
    return _unpickle(path, _check_zip(path) if zipfile.is_zipfile(path) else _globals_of_legacy(path))


def _unpickle(path: Path, names: set[str], mmap: bool = False) -> Any:
    """torch.load, weights only; `names` are those that the file's pickles refer to."""
    if "builtins.bytearray" in names:
        raise WeightsError(f"{path} was refused: it asks for a bytearray, whose size the file does not bound")
    inert = [(Inert, name) for name in names if LEFTOVERS.fullmatch(name)]
    with torch.serialization.safe_globals([*inert, *HARMLESS]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def check_npz_size(path: Path) -> None:
    """ValueError if the members of an .npz, by its directory, would take far more memory than the file has bytes."""
    with zipfile.ZipFile(path) as archive:
        inflated, stored = sum(record.file_size for record in archive.infolist()), path.stat().st_size
    if inflated > ARRAYS_INFLATION * stored + ARRAYS_SLACK:
        raise ValueError(f"its {stored} bytes would inflate to {inflated}")


def _check_zip(path: Path) -> set[str]:
    """Check sizes and checksums of a zip file's records; returns the names that its pickle refers to."""
    with zipfile.ZipFile(path) as archive:
        records, limit = archive.infolist(), INFLATION * path.stat().st_size + SLACK
        inflated = sum(record.file_size for record in records)
        if inflated > limit:
            raise WeightsError(f"{path} was refused: its {path.stat().st_size} bytes would inflate to {inflated}")
        names: set[str] = set()
        for record in records:
            with archive.open(record) as stream:
                if record.filename.endswith("data.pkl"):
                    names |= _globals(stream.read())
                while stream.read(1 << 20):  # the end of a record is where its checksum is compared
                    pass
        return names


def _globals_of_legacy(path: Path) -> set[str]:
    """The names in the four pickles at the start of a file from before torch 1.6, or in a file that is one pickle."""
    names: set[str] = set()
    with path.open("rb") as stream:
        try:
            for _ in range(4):
                names |= _globals(stream)
        except Exception:  # not a pickle: torch.load explains what is wrong with the file
            return names
    return names


def _globals(pickled: Any) -> set[str]:
    """`module.name` of every global in a pickle, names of Python 2 translated as torch does."""
    names = set()
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            module, _, name = argument.partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            names.add(f"{module}.{name}")
    return names


def _load_safetensors(path: Path) -> dict[str, Any]:
    """Tensors by name; a model of `semdict model push` as its {"kind", "config", "about", "model"}."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        about = (file.metadata() or {}).get("semdict")
    return load_file(path) if about is None else {**json.loads(about), "model": load_file(path)}


def _explain(path: Path, error: Exception) -> str:
    text = str(error)
    if "Unsupported global" in text or "Unsupported operand" in text or "weights_only" in text.lower():
        out = path.with_name(f"{path.stem}-tensors.pt")
        return (
            f"{path} was refused and nothing in it was executed: it is not plain tensors ({_unsafe_part(text)}). "
            'If you trust it, save its state dict alone in the environment that wrote it: python -c "import torch; c = '
            f"torch.load('{path}', weights_only=False); torch.save(c.get('state_dict', c), '{out}')\""
        )
    return f"{path} cannot be read as a checkpoint, it is damaged or of another kind: {_first_line(error)}"


def _unsafe_part(text: str) -> str:
    """The sentence in torch's message that names the object that was refused."""
    lines = [line.strip() for line in text.splitlines()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines)[0].split(". Please use")[0][:200]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
