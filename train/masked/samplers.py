"""What draws: a plain masked-token model, or one that is told classes; either answers for a canvas' unknown cells."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.train.engine.checkpoint import differences
from semdict.train.engine.guidance import combine
from semdict.train.engine.model_file import load_model, model_kind, model_path
from semdict.train.masked.conditional import ConditionalTransformer
from semdict.train.masked.context import Known
from semdict.train.masked.encoder import Encoder, load_encoder, run_name
from semdict.train.masked.sampling import LogitsAt, once_where_equal

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Generate


class Plain:
    """A model that is told nothing but the canvas."""

    takes_words = False

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, config = encoder, encoder.model.config
        self.family, self.vocab, self.grid = config.family, config.vocab, config.grid

    def labels(self, numbers: list[int], known: Known | None) -> np.ndarray | None:
        """None: no image has a class."""
        return None

    def logits_at(self, numbers: list[int], known: Known | None) -> LogitsAt:
        """(n, K) logits of the unknown cells of the images with these numbers."""
        return once_where_equal(self.encoder.model.logits_at)


class Classed(Plain):
    """A conditional model. Task class: the classes asked for in turn, or those of real images, whose words it is told
    as well; other tasks: the classes of the images that they start from, or none.
    """

    def __init__(
        self, model: ConditionalTransformer, encoder: Encoder, about: dict[str, Any], given: "Generate", task: str
    ) -> None:
        super().__init__(encoder)
        self.model, self.about, self.given, self.task = model, about, given, task
        self.takes_words = bool(task == "class" and given.words and model.config.words)
        for label in given.classes:
            if label >= model.null_class:
                raise UsageError(f"generate.classes: {label} is not below the model's {model.null_class} classes")
        self.check_untold("label_dropout", bool(given.scale) or task == "unconditional")
        self.check_untold("word_dropout", bool(model.config.words) and (bool(given.scale) or not self.takes_words))

    def check_untold(self, key: str, needed: bool) -> None:
        """UsageError when the model always was told in training what it would not be told now."""
        if needed and self.about.get("cfg", {}).get(key) == 0:
            raise UsageError(
                f"{self.encoder.name} was trained with condition.{key} 0, so it cannot draw without; train it with more"
                + (" or set generate.scale: 0" if self.given.scale else "")
            )

    def check_words(self, where: Path, recipe: dict[str, Any]) -> None:
        """ShardError when the words of `where` are not from the dictionary of training."""
        trained = self.about.get("token_set", {}).get("recipe", {})
        if changed := differences({"disc": trained.get("disc")}, {"disc": recipe.get("disc")}):
            raise ShardError(f"{where} has words of another dictionary than the model: {'; '.join(changed)}")

    def labels(self, numbers: list[int], known: Known | None) -> np.ndarray:
        """(B,) int64 class of each image, the null class where it has none."""
        null = self.model.null_class
        if known is not None:
            found = known.labels[numbers].astype(np.int64)
            return np.where((found < 0) | (found >= null), null, found)
        if self.task != "class":
            return np.full(len(numbers), null)
        classes = self.given.classes or range(null)
        return np.array([classes[number % len(classes)] for number in numbers])

    def logits_at(self, numbers: list[int], known: Known | None) -> LogitsAt:
        """(n, K) logits, guided where `generate.scale` says so; what is told is prepared once, and the encoder, which
        is told nothing, runs once per step.
        """
        device = self.model.no_class.device
        labels_B = torch.from_numpy(self.labels(numbers, known)).to(device)
        words_BL = torch.from_numpy(known.words[numbers]).to(device) if self.takes_words else None
        told = self.model.told(labels_B, words_BL)
        if not self.given.scale:
            return told.logits_at
        nothing = self.model.told(torch.full_like(labels_B, self.model.null_class), None)

        def at(tokens_BL: Tensor, unknown_BL: Tensor) -> Tensor:
            latents_BNE = told.encode(tokens_BL)
            with_it, without = (one.logits_at(tokens_BL, unknown_BL, latents_BNE).float() for one in (told, nothing))
            return combine(with_it, without, self.given.scale)

        return at


def open_drawer(
    path: Path, num_heads: int | None, decoder_num_heads: int | None, given: "Generate", task: str, device: torch.device
) -> Plain:
    """A run's folder, its model.pt or a released file; UsageError when task class meets a model without classes."""
    if model_path(path).is_file() and model_kind(path) == ConditionalTransformer.KIND:
        model, file = load_model(path, ConditionalTransformer, device)
        model.requires_grad_(False)
        recipe = file.about.get("token_set", {}).get("recipe")
        encoder = Encoder(model.base, run_name(path), file.sha256, recipe, None)
        return Classed(model, encoder, file.about, given, task)
    encoder = load_encoder(path, num_heads, decoder_num_heads, device)
    if task == "class":
        raise UsageError(f"{path} knows no classes; `semdict condition --model {path}` teaches them to its decoder")
    return Plain(encoder)
