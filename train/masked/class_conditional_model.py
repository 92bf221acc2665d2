"""Class-conditional model as in LEASE (section A, table A.5): a frozen encoder, and a decoder with condition tokens.

The decoder attends to one row for the class and one for the centroid of every cell besides its own rows.
Shapes: B images, L cells, n unknown cells, X condition rows, F decoder width, K words (entries of the discriminative
codebook), D their width.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.pipeline.common.errors import UsageError
from semdict.train.engine.layers import init_weights
from semdict.train.engine.loop import START, Batch, Clock
from semdict.train.engine.rng import rand_rows
from semdict.train.masked.model import MaskedTokenTransformer, ModelConfig
from semdict.train.masked.objectives.mage import Mage, Masking, Scalars

DECODER = ("decoder_embed", "decoder_position", "decoder_blocks", "decoder_norm")  # fine-tuned, unlike the token head


@dataclass(frozen=True)
class ConditionalConfig:
    """Configuration of a class-conditional model.

    base: the pretrained model's. classes: labels are [0, classes). class_width: width of the class embeddings from a
    file (CLIP's text embeddings), 0 = a learned table. words, word_width: size of the discriminative codebook whose
    centroids are condition rows, 0 = none.
    """

    base: ModelConfig
    classes: int
    class_width: int = 0
    words: int = 0
    word_width: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of numbers and strings for a file; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ConditionalConfig":
        """The configuration that `to_dict` wrote."""
        return cls(**{**config, "base": ModelConfig.from_dict(config["base"])})


class ConditionalTransformer(nn.Module):
    """A pretrained model (`base`) whose decoder also attends to a row for the class and one per cell for its centroid.

    Class rows are W e + b with e the class's embedding at unit length times sqrt(D), or a learned table. Centroid rows
    are W' C[word] + b' plus the decoder's position of their cell. A missing class and missing centroids each have a
    learned row of their own, so both can be left out. Only the decoder and the new rows take gradients: "the encoder
    and rest of the elements" stay frozen (section A), and so does the token head.
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
        """Set the frozen tables: class embeddings (classes, class_width) and centroids (words, word_width)."""
        for buffer, rows in ((self.class_vectors, class_vectors), (self.centroids, centroids)):
            if buffer is not None:
                buffer.copy_(F.normalize(rows.float(), dim=1) * buffer.shape[1] ** 0.5)

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

    def condition_rows(self, labels_B: Tensor, words_BL: Tensor | None) -> Tensor:
        """(B, X, F) condition rows: labels in [0, null_class]; words int64, rows of -1 or None = no centroids."""
        class_B1F = self.class_rows(labels_B)[:, None]
        if self.word_embed is None:
            return class_B1F
        if words_BL is None:
            words_BL = labels_B.new_full((len(labels_B), self.config.base.grid**2), -1)
        return torch.cat([class_B1F, self.word_rows(words_BL)], dim=1)

    def class_rows(self, labels_B: Tensor) -> Tensor:
        """(B, F) rows of the classes."""
        known_B = labels_B.clamp(max=self.config.classes - 1)
        rows_BF = self.class_embed(known_B if self.class_vectors is None else self.class_vectors[known_B])
        return torch.where((labels_B < self.null_class)[:, None], rows_BF, self.no_class.to(rows_BF.dtype))

    def word_rows(self, words_BL: Tensor) -> Tensor:
        """(B, L, F) rows of the centroids; each word is projected once where a batch has more cells than words."""
        known_BL = words_BL.clamp(min=0)
        if words_BL.numel() > self.config.words:
            rows_BLF = F.embedding(known_BL, self.word_embed(self.centroids))
        else:
            rows_BLF = self.word_embed(self.centroids[known_BL])
        rows_BLF = torch.where((words_BL >= 0)[..., None], rows_BLF, self.no_word.to(rows_BLF.dtype))
        return rows_BLF + self.base.decoder_position.weight[1 : 1 + words_BL.shape[1]]

    def conditioned(self, labels_B: Tensor, words_BL: Tensor | None = None) -> "Conditioned":
        """The model under one condition, computed once for any number of passes; arguments as `condition_rows`.

        UsageError for labels or words out of range, and for words where the model was trained without centroids.
        """
        check_range("label", labels_B, 0, self.null_class)
        if words_BL is not None:
            if self.word_embed is None:
                raise UsageError("this model was trained without centroids; train it with condition.centroids: true")
            check_range("word", words_BL, -1, self.config.words - 1)
        return Conditioned(self, self.condition_rows(labels_B, words_BL))

    def logits(self, tokens_BL: Tensor, labels_B: Tensor, words_BL: Tensor | None = None) -> Tensor:
        """(B, L, codes) for tokens with the mask id at unknown cells; `null_class` without words is unconditional."""
        model = self.conditioned(labels_B, words_BL)
        features_BLF = model.decode(model.encode(tokens_BL), tokens_BL == self.base.mask_token)
        return model.token_logits(features_BLF[:, 1:])


class Conditioned:
    """A class-conditional model under one condition, with the methods of an unconditional model."""

    def __init__(self, model: ConditionalTransformer, condition_BXF: Tensor) -> None:
        self.model, self.condition_BXF = model, condition_BXF

    @property
    def training(self) -> bool:
        """Whether the decoder is in training mode."""
        return self.model.training

    def encode(self, tokens_BL: Tensor, masked_BL: Tensor | None = None, keep_idx: Tensor | None = None) -> Tensor:
        """Latents of the frozen encoder, which sees no condition."""
        with torch.no_grad():
            return self.model.base.encode(tokens_BL, masked_BL, keep_idx)

    def decode(self, latents_BNE: Tensor, masked_BL: Tensor, keep_idx: Tensor | None = None) -> Tensor:
        """Decoder features (B, 1 + L, F), CLS first."""
        return self.model.base.decode(latents_BNE, masked_BL, keep_idx, self.condition_BXF)

    def token_logits(self, features: Tensor) -> Tensor:
        """(..., F) -> (..., codes)."""
        return self.model.base.token_logits(features)

    def logits_at(self, tokens_BL: Tensor, unknown_BL: Tensor, latents_BNE: Tensor | None = None) -> Tensor:
        """(n, codes) logits of the unknown cells; `latents_BNE`: the encoder's output where it is known already."""
        latents_BNE = self.encode(tokens_BL) if latents_BNE is None else latents_BNE
        return self.token_logits(self.decode(latents_BNE, unknown_BL)[:, 1:][unknown_BL])


class ConditionalReconstruction(Mage):
    """Masked reconstruction by a decoder conditioned on each image's class and centroids.

    label_dropout, word_dropout: share of images whose class / centroids are dropped, independently of each other.
    """

    def __init__(self, label_dropout: float, word_dropout: float, masking: Masking, smoothing: float) -> None:
        super().__init__(masking, smoothing)
        self.label_dropout, self.word_dropout = label_dropout, word_dropout

    def forward(
        self, model: ConditionalTransformer, batch: Batch, rng: torch.Generator, clock: Clock = START
    ) -> tuple[Tensor, Scalars]:
        labels_B, words_BL = self.drop(*batch_conditions(batch, model), model.null_class, rng)
        conditioned = Conditioned(model, model.condition_rows(labels_B, words_BL))  # unchecked: that waits for the GPU
        loss = self.reconstruction(conditioned, self.masked_pass(conditioned, batch, rng))
        return loss, {"loss": loss.detach()}

    def drop(
        self, labels_B: Tensor, words_BL: Tensor | None, null_class: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """The conditions, without the classes of some images and the words of some images."""
        chance_B2 = rand_rows(len(labels_B), 2, rng=rng).to(labels_B.device)
        labels_B = torch.where(chance_B2[:, 0] < self.label_dropout, null_class, labels_B)
        if words_BL is not None:
            words_BL = words_BL.masked_fill((chance_B2[:, 1] < self.word_dropout)[:, None], -1)
        return labels_B, words_BL


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """UsageError when a value lies outside of [low, high]."""
    wrong = values[(values < low) | (values > high)]
    if len(wrong):
        raise UsageError(f"{name} {int(wrong[0])} is unknown to the model, which takes {low} to {high}")


def batch_conditions(batch: Batch, model: ConditionalTransformer) -> tuple[Tensor, Tensor | None]:
    """Labels (B,), the null class where an image has none, and words (B, L) where the model has centroids."""
    labels_B = batch["label"].long()
    words_BL = batch["disc"].long() if model.config.words else None
    return torch.where(labels_B < 0, model.null_class, labels_B), words_BL
