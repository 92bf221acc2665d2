"""The encoder under evaluation: a checkpoint of this project or a released one, and the recipe of its tokens."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from semdict.pipeline.common.errors import ShardError, WeightsError
from semdict.pipeline.common.files import sha256_file
from semdict.train.engine.checkpoint import differences
from semdict.train.engine.model_file import MODEL, load_model, model_kind, model_path
from semdict.train.masked.model import MaskedTokenTransformer
from semdict.train.masked.released import load_released

# parts of a token recipe that do not change the meaning of a generative token
IGNORED = ("disc",)
IGNORED_CROP = ("views", "random", "ten_crop")


@dataclass(frozen=True)
class Encoder:
    """A frozen model in evaluation mode; recipe: of its training tokens, None where the file does not say."""

    model: MaskedTokenTransformer
    name: str
    sha256: str
    recipe: dict[str, Any] | None
    epochs: int | None

    def about(self) -> dict[str, Any]:
        """The model's entry in score files."""
        config = self.model.config
        shape = {"family": config.family, "width": config.width, "depth": config.depth, "heads": config.heads}
        return {"name": self.name, "sha256": self.sha256, **shape, "epochs": self.epochs}

    def only(self, part: str) -> "Encoder":
        """The same encoder with only one part of its token recipe, for sources that differ in the other parts."""
        recipe = {part: self.recipe[part]} if self.recipe and part in self.recipe else None
        return replace(self, recipe=recipe)

    def check_tokens(
        self, path: Path, codes: int, cells: int, recipe: dict[str, Any], allow_other: bool = False
    ) -> str:
        """ "same", "other" or "unknown": whether tokens at `path` have the recipe of the training tokens.

        ShardError when they cannot be the model's (other codebook size or grid), or, unless `allow_other`, when their
        recipe differs (crop, decoder, precision, tokenizer).
        """
        config = self.model.config
        if (codes, cells) != (config.vocab.codes, config.grid**2):
            raise ShardError(
                f"{path} has {codes} codes on {cells} cells, the model {self.name} has {config.vocab.codes} codes on "
                f"{config.grid**2} cells"
            )
        if self.recipe is None:
            return "unknown"
        changed = differences(comparable(self.recipe), comparable(recipe))
        if changed and not allow_other:
            raise ShardError(
                f"{path}: the model {self.name} was trained on other tokens, which differ in: {'; '.join(changed)} "
                "(model -> tokens). Encode with the same recipe, or pass --other-recipe to score it anyway"
            )
        return "other" if changed else "same"


def comparable(recipe: dict[str, Any]) -> dict[str, Any]:
    """The part of a token recipe in which a model's training and its evaluation must agree."""
    compared = {name: value for name, value in recipe.items() if name not in IGNORED}
    if isinstance(compared.get("crop"), dict):
        compared["crop"] = {name: value for name, value in compared["crop"].items() if name not in IGNORED_CROP}
    return compared


def load_encoder(
    path: str | Path, num_heads: int | None = None, decoder_num_heads: int | None = None,
    device: torch.device | str = "cpu",
) -> Encoder:  # fmt: skip
    """The encoder of a run's folder, its model.pt, or a released MAGE, Sorcen or LEASE checkpoint.

    WeightsError when `path` is none of them.
    """
    path = Path(path)
    file = model_path(path)
    if not file.is_file():
        raise WeightsError(f"{file} does not exist; --model takes a run's folder, its {MODEL} or a released checkpoint")
    if model_kind(file) == MaskedTokenTransformer.KIND:
        model, saved = load_model(file, MaskedTokenTransformer)
        sha256, recipe = saved.sha256, saved.about.get("token_set", {}).get("recipe")
        epochs = saved.about.get("cfg", {}).get("epochs")
    else:
        model = load_released(file, num_heads, decoder_num_heads)
        sha256, recipe, epochs = sha256_file(file), None, model.released.epoch
    frozen = model.requires_grad_(False).to(device).eval()
    return Encoder(frozen, run_name(path), sha256, recipe, epochs)


def run_name(path: Path) -> str:
    """ "lease" for runs/demo/lease and for its model.pt; a released file's name without its suffix."""
    path = Path(path)
    if path.is_dir():
        return path.resolve().name
    return path.resolve().parent.name if path.name == MODEL else path.stem
