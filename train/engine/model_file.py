"""Model files: a module's tensors, the configuration that rebuilds it, and facts about its training.

Every model that is trained here is written and read by these functions. The bytes of a file depend only on its
contents, so equal runs publish equal files. `semdict.load_model` opens a file by its kind.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from semdict.pipeline.common.digests import check_published
from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import atomic_write
from semdict.pipeline.common.hub import is_hub_name, local_file
from semdict.pipeline.common.safeload import load_checkpoint

MODEL = "model.pt"
TOKENIZER = "tokenizer.pt"
PUSHED = "model.safetensors"  # in repositories of the Hugging Face Hub


class SavedModule(Protocol):
    """A module that can be saved: its kind in the file, the command that writes it, and its configuration."""

    KIND: ClassVar[str]
    COMMAND: ClassVar[str]

    def config_dict(self) -> dict[str, Any]:
        """Plain numbers and strings from which `from_config` rebuilds the module."""
        ...

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SavedModule": ...

    def state_dict(self) -> dict[str, Tensor]: ...


Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class ModelFile:
    """Where a model was read from, the SHA-256 of the file, and the facts about its training that it contains."""

    path: Path
    sha256: str
    about: dict[str, Any]


def save_model(path: str | Path, model: SavedModule, about: dict[str, Any]) -> None:
    """Write {"kind", "config", "model", "about"}; `about` is plain data."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    plain = json.loads(json.dumps({"config": model.config_dict(), "about": about}))  # pickle writes shared objects once
    contents = {"kind": model.KIND, **plain, "model": state}
    with atomic_write(path) as staged, staged.open("wb") as file:  # torch would store the temporary name of a path
        torch.save(contents, file)


def load_model(path: str | Path, cls: type[Module], device: str | torch.device = "cpu") -> tuple[Module, ModelFile]:
    """(module of class `cls` in evaluation mode, its file); `path` is a run's folder or the file.

    Raises WeightsError if the file is of another kind, damaged, or not the one that its run published.
    """
    path = model_path(path)
    contents = load_checkpoint(path)
    kind = contents.get("kind")
    if kind != cls.KIND:
        reason = f"its kind is {kind!r}" if kind else f"it has no kind, its entries are {list(contents)[:6]}"
        raise WeightsError(f"{path} was not written by `{cls.COMMAND}`: {reason}")
    sha256 = check_published(path)
    try:
        model = cls.from_config(contents["config"])
        model.load_state_dict(contents["model"])
        about = contents["about"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: the model does not fit its configuration: {error}") from None
    return model.to(device).eval(), ModelFile(path, sha256, about)


def model_path(path: str | Path) -> Path:
    """`path` itself, or the model file in a run's folder, or that of a repository `hf-hub:owner/name`, fetched."""
    if is_hub_name(path):
        return local_file(f"{path}/{PUSHED}" if str(path).count("/") == 1 else path)
    path = Path(path)
    if not path.is_dir():
        return path
    return next((path / name for name in (MODEL, TOKENIZER, PUSHED) if (path / name).exists()), path / MODEL)


def model_kind(path: str | Path) -> str | None:
    """The kind of a model file, None for a checkpoint that was not written by `save_model`."""
    return load_checkpoint(model_path(path)).get("kind")
