"""Autoregressive models as files."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from semdict.train.ar.model import ArConfig, ArModel
from semdict.train.engine.modelfile import MODEL, load_model, save_model

__all__ = ["MODEL", "load_ar", "save_ar"]
KIND = "semdict-ar"
OTHER = "{path} is not a model that `semdict ar train` wrote; its entries are {entries}"


def save_ar(path: Path, model: ArModel, about: dict[str, Any]) -> None:
    """Write the model; `about` is plain data (settings, identity of the tokens, names of the classes)."""
    save_model(path, KIND, model, asdict(model.config), about)


def load_ar(path: str | Path, device: str | torch.device = "cpu") -> tuple[ArModel, dict[str, Any]]:
    """(model in evaluation mode, what the file says of itself); `path` is a run's folder or its model.pt.

    WeightsError when it is not an AR model or damaged.
    """
    model, about = load_model(path, KIND, _build, OTHER)
    return model.to(device), about


def _build(config: dict[str, Any]) -> ArModel:
    return ArModel(ArConfig(**{**config, "sizes": tuple(config["sizes"])}))
