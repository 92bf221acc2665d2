"""Models trained here: one file of plain tensors from which the module rebuilds itself."""

from pathlib import Path
from typing import Any

import torch

from pipeline.errors import WeightsError
from pipeline.files import write_aside
from pipeline.safeload import load_checkpoint
from train.model import MaskedTokenTransformer, ModelConfig

KIND = "semdict-pretrained"
MODEL = "model.pt"


def save_pretrained(path: Path, model: MaskedTokenTransformer, about: dict[str, Any]) -> None:
    """Write {"kind", "config", "model", "about"}: the configuration rebuilds the module, `about` is plain data."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    with write_aside(path) as aside, aside.open("wb") as file:  # a file object, since torch stores a path's name
        torch.save({"kind": KIND, "config": model.config.to_dict(), "model": state, "about": about}, file)


def load_pretrained(path: str | Path) -> tuple[MaskedTokenTransformer, dict[str, Any]]:
    """(model in evaluation mode on the CPU, what the file says about its training).

    `path` is a run's folder or its model.pt; WeightsError when it is not one, or damaged.
    """
    path = Path(path)
    path = path / MODEL if path.is_dir() else path
    found = load_checkpoint(path)
    if found.get("kind") != KIND:
        raise WeightsError(f"{path} is not a model that `semdict pretrain` wrote; its entries are {list(found)[:6]}")
    try:
        model = MaskedTokenTransformer(ModelConfig.from_dict(found["config"]))
        model.load_state_dict(found["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: the model does not fit its configuration: {error}") from None
    return model.eval(), found["about"]
