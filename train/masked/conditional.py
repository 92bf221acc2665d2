"""Conditional generation as LEASE has it (section A, table A.5): the encoder is frozen, and the decoder learns to use
rows beside its canvas, one for the class and one for the centroid of every cell.

Shapes: B images, L cells, n unknown cells, X rows beside the canvas, F decoder width, K words, D their width.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.pipeline.common.errors import UsageError
from semdict.train.engine.layers import init_weights
from semdict.train.engine.loop import Batch, Clock
from semdict.train.engine.rng import rand_rows
from semdict.train.masked.model import MaskedTokenTransformer, ModelConfig
from semdict.train.masked.objectives.mage import START, Mage, Masking, Scalars

DECODER = ("decoder_embed", "decoder_position", "decoder_blocks", "decoder_norm")  # what is fine-tuned; no token head


@dataclass(frozen=True)
class ConditionalConfig:
    """What rebuilds a conditional model.

    base: the pretrained model's configuration. classes: labels are [0, classes). class_width: width of the class
    embeddings that came from a file (CLIP's text embeddings), 0 = a learned table. words, word_width: size of the
    dictionary whose centroids stand beside the canvas, 0 = none.
    """

    base: ModelConfig
    classes: int
    class_width: int = 0
    words: int = 0
    word_width: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of numbers and strings for a file; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "ConditionalConfig":
        """The configuration that `to_dict` wrote."""
        return cls(**{**given, "base": ModelConfig.from_dict(given["base"])})


class ConditionalTransformer(nn.Module):
    """A pretrained model (`base`) whose decoder sees a class, and a centroid per cell, beside its canvas.

    Class rows are W e + b with e the class's embedding at unit length times sqrt(D), or a learned table. Centroid rows
    are W' C[word] + b' plus the decoder's position of their cell. What is not told is a learned row of its own, so that
    class and centroids can each be left out. Only the decoder and the new rows take gradients: "the encoder and rest of
    the elements" stay frozen (section A), and so does the token head.
    """

    KIND, COMMAND = "semdict-conditional", "semdict condition --model RUN"

    def __init__(self, config: ConditionalConfig, base: MaskedTokenTransformer | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config, c = config, config
        self.base = MaskedTokenTransformer(c.base) if base is None else base
        width = c.base.decoder_width
        self.class_embed = nn.Linear(c.class_width, width) if c.class_width else nn.Embedding(c.classes, width)
        self.no_class = nn.Parameter(torch.zeros(width))
        self.word_embed = nn.Linear(c.word_width, width) if c.words else None
        self.no_word = nn.Parameter(torch.zeros(width)) if c.words else None
        self.register_buffer("class_vectors", torch.zeros(c.classes, c.class_width) if c.class_width else None)
        self.register_buffer("centroids", torch.zeros(c.words, c.word_width) if c.words else None)
        rng = torch.Generator().manual_seed(seed)
        for part in (self.class_embed, self.word_embed):
            if part is not None:
                init_weights(part, rng)
        self.base.requires_grad_(False)
        for name in DECODER:
            getattr(self.base, name).requires_grad_(True)

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain data, for a model file."""
        return self.config.to_dict()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ConditionalTransformer":
        """A module of the configuration that `config_dict` gave."""
        return cls(ConditionalConfig.from_dict(config))

    def fill(self, class_vectors: Tensor | None, centroids: Tensor | None) -> None:
        """Put in the frozen tables: class embeddings (classes, class_width) and centroids (words, word_width)."""
        for mine, given in ((self.class_vectors, class_vectors), (self.centroids, centroids)):
            if mine is not None:
                mine.copy_(F.normalize(given.float(), dim=1) * mine.shape[1] ** 0.5)

    def train(self, mode: bool = True) -> "ConditionalTransformer":
        """Training mode for the decoder only: the frozen encoder has no dropout."""
        super().train(mode)
        for name, part in self.base.named_children():
            part.train(mode and name in DECODER)
        return self

    @property
    def null_class(self) -> int:
        """The label of "no class"."""
        return self.config.classes

    def beside(self, labels_B: Tensor, words_BL: Tensor | None) -> Tensor:
        """(B, X, F) rows of what is told: labels in [0, null_class]; words int64, a row of -1 or None = not told."""
        class_B1F = self.class_rows(labels_B)[:, None]
        if self.word_embed is None:
            return class_B1F
        if words_BL is None:
            words_BL = labels_B.new_full((len(labels_B), self.config.base.grid**2), -1)
        return torch.cat([class_B1F, self.word_rows(words_BL)], dim=1)

    def class_rows(self, labels_B: Tensor) -> Tensor:
        """(B, F)."""
        known_B = labels_B.clamp(max=self.config.classes - 1)
        rows_BF = self.class_embed(known_B if self.class_vectors is None else self.class_vectors[known_B])
        return torch.where((labels_B < self.null_class)[:, None], rows_BF, self.no_class.to(rows_BF.dtype))

    def word_rows(self, words_BL: Tensor) -> Tensor:
        """(B, L, F). Where the batch has more cells than the dictionary words, each word is projected once."""
        known_BL = words_BL.clamp(min=0)
        if words_BL.numel() > self.config.words:
            rows_BLF = F.embedding(known_BL, self.word_embed(self.centroids))
        else:
            rows_BLF = self.word_embed(self.centroids[known_BL])
        rows_BLF = torch.where((words_BL >= 0)[..., None], rows_BLF, self.no_word.to(rows_BLF.dtype))
        return rows_BLF + self.base.decoder_position.weight[1 : 1 + words_BL.shape[1]]

    def told(self, labels_B: Tensor, words_BL: Tensor | None = None) -> "Told":
        """The model with its condition made once, for any number of passes; UsageError when it knows no such thing."""
        refuse_beyond("label", labels_B, 0, self.null_class)
        if words_BL is not None:
            if self.word_embed is None:
                raise UsageError("this model was not taught words; train it with condition.centroids: true")
            refuse_beyond("word", words_BL, -1, self.config.words - 1)
        return Told(self, self.beside(labels_B, words_BL))

    def logits(self, tokens_BL: Tensor, labels_B: Tensor, words_BL: Tensor | None = None) -> Tensor:
        """(B, L, codes) for a canvas with the mask id at unknown cells; `null_class` and no words tell nothing."""
        told = self.told(labels_B, words_BL)
        features_BLF = told.decode(told.encode(tokens_BL), tokens_BL == self.base.mask_token)
        return told.token_logits(features_BLF[:, 1:])


class Told:
    """A conditional model with what it is told: encodes, decodes and predicts like the plain model."""

    def __init__(self, model: ConditionalTransformer, beside_BXF: Tensor) -> None:
        self.model, self.beside_BXF = model, beside_BXF

    @property
    def training(self) -> bool:
        """Of the decoder."""
        return self.model.training

    def encode(self, tokens_BL: Tensor, masked_BL: Tensor | None = None, keep_idx: Tensor | None = None) -> Tensor:
        """Latents of the frozen encoder, which is told nothing."""
        with torch.no_grad():
            return self.model.base.encode(tokens_BL, masked_BL, keep_idx)

    def decode(self, latents_BNE: Tensor, masked_BL: Tensor, keep_idx: Tensor | None = None) -> Tensor:
        """Decoder features (B, 1 + L, F), CLS first."""
        return self.model.base.decode(latents_BNE, masked_BL, keep_idx, self.beside_BXF)

    def token_logits(self, features: Tensor) -> Tensor:
        """(..., F) -> (..., codes)."""
        return self.model.base.token_logits(features)

    def logits_at(self, tokens_BL: Tensor, unknown_BL: Tensor, latents_BNE: Tensor | None = None) -> Tensor:
        """(n, codes) logits of the unknown cells; `latents_BNE` where the encoder's answer is there already."""
        latents_BNE = self.encode(tokens_BL) if latents_BNE is None else latents_BNE
        return self.token_logits(self.decode(latents_BNE, unknown_BL)[:, 1:][unknown_BL])


class Telling(Mage):
    """Masked reconstruction by a decoder that is told each image's class and centroids, each withheld now and then.

    label_dropout, word_dropout: share of images from which the class / all centroids are withheld, drawn apart.
    """

    def __init__(self, label_dropout: float, word_dropout: float, masking: Masking, smoothing: float) -> None:
        super().__init__(masking, smoothing)
        self.label_dropout, self.word_dropout = label_dropout, word_dropout

    def forward(
        self, model: ConditionalTransformer, batch: Batch, rng: torch.Generator, clock: Clock = START
    ) -> tuple[Tensor, Scalars]:
        labels_B, words_BL = self.withhold(*conditions(batch, model), model.null_class, rng)
        told = Told(model, model.beside(labels_B, words_BL))  # not looked at again: that would wait for the GPU
        loss = self.reconstruction(told, self.masked_pass(told, batch, rng))
        return loss, {"loss": loss.detach()}

    def withhold(
        self, labels_B: Tensor, words_BL: Tensor | None, null_class: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """The conditions with some images' classes and some images' words taken away."""
        chance_B2 = rand_rows(len(labels_B), 2, rng=rng).to(labels_B.device)
        labels_B = torch.where(chance_B2[:, 0] < self.label_dropout, null_class, labels_B)
        if words_BL is not None:
            words_BL = words_BL.masked_fill((chance_B2[:, 1] < self.word_dropout)[:, None], -1)
        return labels_B, words_BL


def refuse_beyond(what: str, given: Tensor, low: int, high: int) -> None:
    """UsageError when a number lies outside of [low, high]."""
    wrong = given[(given < low) | (given > high)]
    if len(wrong):
        raise UsageError(f"{what} {int(wrong[0])} is unknown to the model, which takes {low} to {high}")


def conditions(batch: Batch, model: ConditionalTransformer) -> tuple[Tensor, Tensor | None]:
    """Labels (B,), the null class where there is none, and words (B, L) where the model takes any."""
    labels_B = batch["label"].long()
    words_BL = batch["disc"].long() if model.config.words else None
    return torch.where(labels_B < 0, model.null_class, labels_B), words_BL
