"""Models trained here, as files."""

from pathlib import Path
from typing import Any

from semdict.train.engine.modelfile import MODEL, load_model, save_model
from semdict.train.masked.model import MaskedTokenTransformer, ModelConfig

__all__ = ["KIND", "MODEL", "load_pretrained", "save_pretrained"]
KIND = "semdict-pretrained"
OTHER = "{path} is not a model that `semdict pretrain` wrote; its entries are {entries}"


def save_pretrained(path: Path, model: MaskedTokenTransformer, about: dict[str, Any]) -> None:
    """Write the model; `about` is plain data."""
    save_model(path, KIND, model, model.config.to_dict(), about)


def load_pretrained(path: str | Path) -> tuple[MaskedTokenTransformer, dict[str, Any]]:
    """(model in evaluation mode on the CPU, what the file says about its training).

    `path` is a run's folder or its model.pt; WeightsError when it is not one, or damaged.
    """
    return load_model(path, KIND, lambda config: MaskedTokenTransformer(ModelConfig.from_dict(config)), OTHER)
