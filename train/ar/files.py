"""Autoregressive models as files: plain tensors and the configuration that rebuilds the module."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import WeightsError
from pipeline.files import write_aside
from pipeline.safeload import load_checkpoint
from train.ar.model import ArConfig, ArModel

KIND = "semdict-ar"
MODEL = "model.pt"


def save_ar(path: Path, model: ArModel, about: dict[str, Any]) -> None:
    """Write {"kind", "config", "model", "about"}; `about` is plain data (settings, identity of the tokens)."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    with write_aside(path) as aside, aside.open("wb") as file:
        torch.save({"kind": KIND, "config": asdict(model.config), "model": state, "about": about}, file)


def load_ar(path: str | Path, device: str | torch.device = "cpu") -> tuple[ArModel, dict[str, Any]]:
    """(model in evaluation mode, what the file says of itself); `path` is a run's folder or its model.pt.

    WeightsError when it is not an AR model or damaged.
    """
    path = Path(path)
    path = path / MODEL if path.is_dir() else path
    found = load_checkpoint(path)
    if found.get("kind") != KIND:
        raise WeightsError(f"{path} is not a model that `semdict ar train` wrote; its entries are {list(found)[:6]}")
    try:
        model = ArModel(ArConfig(**{**found["config"], "sizes": tuple(found["config"]["sizes"])}))
        model.load_state_dict(found["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: the model does not fit its configuration: {error}") from None
    return model.to(device).eval(), found["about"]
