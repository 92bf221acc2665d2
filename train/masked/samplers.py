"""Samplers: unconditional and class-conditional; either gives the logits of the unknown cells to iterative decoding.

B images of a batch, L cells, n unknown cells of the batch, K codes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.train.engine.checkpoint import differences
from semdict.train.engine.guidance import combine
from semdict.train.engine.model_file import ModelFile, load_model, model_kind, model_path
from semdict.train.masked.class_conditional_model import ConditionalTransformer
from semdict.train.masked.context import Context
from semdict.train.masked.encoder import Encoder, load_encoder, run_name
from semdict.train.masked.iterative_decoding import LogitsAt, share_equal_contexts
from semdict.train.masked.objectives import objective_class

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Generate


class UnconditionalSampler:
    """A masked model without conditions."""

    needs_words = False  # whether it is conditioned on discriminative tokens of real images

    def __init__(self, encoder: Encoder, cfg: "Generate") -> None:
        self.encoder, self.cfg, config = encoder, cfg, encoder.model.config
        self.family, self.vocab, self.grid = config.family, config.vocab, config.grid

    @property
    def last_step(self) -> Literal["argmax", "sampled"]:
        """How the cells that are hidden after the last step are filled: generate.last, or as the objective's paper."""
        return objective_class(self.family).last_step if self.cfg.last == "family" else self.cfg.last

    def labels(self, numbers: list[int], context: Context | None) -> np.ndarray | None:
        """None: no image has a class."""
        return None

    def logits_at(self, numbers: list[int], context: Context | None) -> LogitsAt:
        """The function that gives (n, K) logits of the unknown cells of the images with these numbers."""
        return share_equal_contexts(self.encoder.model.logits_at)


class ClassConditionalSampler(UnconditionalSampler):
    """A class-conditional model.

    Task class: the classes of generate.classes in turn, or, where the model is conditioned on centroids, the classes
    and discriminative tokens of real images. Other tasks: the classes of the images that they start from, or none.
    """

    def __init__(self, model: ConditionalTransformer, file: ModelFile, name: str, cfg: "Generate", task: str) -> None:
        recipe = file.about.get("token_set", {}).get("recipe")
        super().__init__(Encoder(model.base, name, file.sha256, recipe, None), cfg)
        self.model, self.about, self.task = model, file.about, task
        self.needs_words = bool(task == "class" and cfg.words and model.config.words)
        for label in cfg.classes:
            if label >= model.null_class:
                raise UsageError(f"generate.classes: {label} is not below the model's {model.null_class} classes")
        self._check_dropout("label_dropout", bool(cfg.scale) or task == "unconditional")
        self._check_dropout("word_dropout", bool(model.config.words) and (bool(cfg.scale) or not self.needs_words))

    def _check_dropout(self, key: str, needed: bool) -> None:
        """UsageError if sampling leaves out a condition that was never left out in training."""
        if needed and self.about.get("cfg", {}).get(key) == 0:
            raise UsageError(
                f"{self.encoder.name} was trained with condition.{key} 0, so it cannot sample without; train it with "
                "more" + (" or set generate.scale: 0" if self.cfg.scale else "")
            )

    def check_words(self, path: Path, recipe: dict[str, Any]) -> None:
        """ShardError when the discriminative tokens at `path` are of another codebook than in training."""
        trained = self.about.get("token_set", {}).get("recipe", {})
        if changed := differences({"disc": trained.get("disc")}, {"disc": recipe.get("disc")}):
            raise ShardError(f"{path} has words of another codebook than the model: {'; '.join(changed)}")

    def labels(self, numbers: list[int], context: Context | None) -> np.ndarray:
        """(B,) int64 class of each image, the null class where it has none."""
        null = self.model.null_class
        if context is not None:
            labels = context.labels[numbers].astype(np.int64)
            return np.where((labels < 0) | (labels >= null), null, labels)
        if self.task != "class":
            return np.full(len(numbers), null)
        classes = self.cfg.classes or range(null)
        return np.array([classes[number % len(classes)] for number in numbers])

    def logits_at(self, numbers: list[int], context: Context | None) -> LogitsAt:
        """The function that gives (n, K) logits, guided by generate.scale.

        Conditions are computed once, and the encoder, which sees none, runs once per step.
        """
        device = self.model.no_class.device
        labels_B = torch.from_numpy(self.labels(numbers, context)).to(device)
        words_BL = torch.from_numpy(context.disc[numbers]).to(device) if self.needs_words else None
        conditional = self.model.conditioned(labels_B, words_BL)
        if not self.cfg.scale:
            return conditional.logits_at
        unconditional = self.model.conditioned(torch.full_like(labels_B, self.model.null_class), None)

        def at(tokens_BL: Tensor, unknown_BL: Tensor) -> Tensor:
            latents_BNE = conditional.encode(tokens_BL)
            logits = [model.logits_at(tokens_BL, unknown_BL, latents_BNE) for model in (conditional, unconditional)]
            return combine(logits[0].float(), logits[1].float(), self.cfg.scale)

        return at


def open_sampler(
    path: Path, num_heads: int | None, decoder_num_heads: int | None, cfg: "Generate", task: str, device: torch.device
) -> UnconditionalSampler:
    """The sampler of a run's folder, its model.pt or a released file.

    UsageError for task class with a model that has no classes.
    """
    if model_path(path).is_file() and model_kind(path) == ConditionalTransformer.KIND:
        model, file = load_model(path, ConditionalTransformer, device)
        return ClassConditionalSampler(model.requires_grad_(False), file, run_name(path), cfg, task)
    encoder = load_encoder(path, num_heads, decoder_num_heads, device)
    if task == "class":
        raise UsageError(f"{path} has no classes; `semdict condition --model {path}` trains its decoder on them")
    return UnconditionalSampler(encoder, cfg)
