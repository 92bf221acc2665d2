"""Models as files: plain tensors, the configuration that rebuilds the module, and what the file says of itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import write_aside
from semdict.pipeline.common.safeload import load_checkpoint

MODEL = "model.pt"
Module = TypeVar("Module", bound=nn.Module)


def save_model(path: Path, kind: str, model: nn.Module, config: dict[str, Any], about: dict[str, Any]) -> None:
    """Write {"kind", "config", "model", "about"}; `config` and `about` are plain data."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    with write_aside(path) as aside, aside.open("wb") as file:  # a file object, since torch stores a path's name
        torch.save({"kind": kind, "config": config, "model": state, "about": about}, file)


def load_model(
    path: str | Path, kind: str, build: Callable[[dict[str, Any]], Module], otherwise: str
) -> tuple[Module, dict[str, Any]]:
    """(module in evaluation mode on the CPU, what the file says of itself); `path` is a run's folder or its model.pt.

    build: configuration -> module. WeightsError when it is of another kind (then `otherwise`, in which {path} and
    {entries} stand for themselves) or damaged.
    """
    path = Path(path)
    path = path / MODEL if path.is_dir() else path
    found = load_checkpoint(path)
    if found.get("kind") != kind:
        raise WeightsError(otherwise.format(path=path, entries=list(found)[:6]))
    try:
        model = build(found["config"])
        model.load_state_dict(found["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: the model does not fit its configuration: {error}") from None
    return model.eval(), found["about"]
