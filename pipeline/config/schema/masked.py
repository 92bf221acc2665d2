"""Sections of the masked-token models: `pretrain` (LEASE, Sorcen, MAGE), `condition`, `generate`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from semdict.pipeline.config.schema.base import (
    Betas,
    Count,
    CountOrZero,
    Dropout,
    Extensible,
    Precision,
    Rate,
    SamplingPrecision,
    Section,
    Seed,
    Share,
    Splits,
    WarmedUp,
    Weight,
)

Widths = Annotated[list[Count], Field(min_length=2, max_length=2)]  # hidden, output


class Mask(Section):
    """Mask ratio: a normal distribution truncated to [min, max]."""

    mode: Share
    std: Rate
    min: Annotated[float, Field(ge=0.5, le=1.0)]
    max: Annotated[float, Field(ge=0.5, le=1.0)]

    @model_validator(mode="after")
    def _ordered(self) -> "Mask":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class PretrainLease(Section):
    """Codebook contrast (LEASE, table A.1)."""

    contrast: Literal["encoder", "decoder", "both"]
    neighbours: CountOrZero
    tau: Rate
    alpha: Rate


class PretrainSorcen(Section):
    """Echo contrast (Sorcen, table A.1)."""

    temperature: Rate
    top: Count
    echo_warmup_epochs: CountOrZero
    uniform_weight: Weight
    momentum: Share
    projector: Widths
    predictor: Widths
    as_released: bool


class PretrainMage(Section):
    """Reconstruction only: no keys of its own."""


class Pretrain(Extensible, WarmedUp):
    """Masked-token training on token shards, with a section for every objective."""

    table: ClassVar = ("semdict.train.masked.objectives", "OBJECTIVES")
    needed: ClassVar = True

    size: Literal["tiny", "small", "vit_base", "vit_large"]
    width: Count | None
    depth: Count | None
    heads: Count | None
    decoder_width: Count | None
    decoder_depth: Count | None
    decoder_heads: Count | None
    splits: Splits
    loader: Literal["resident", "streaming"]
    epochs: Count
    batch: Count
    accumulate: Count
    base_lr: Rate
    min_lr: Weight
    warmup_epochs: CountOrZero
    weight_decay: Weight
    decay_tables: bool
    betas: Betas
    clip: Weight
    dropout: Dropout
    label_smoothing: Dropout
    contrast_weight: Annotated[float, Field(ge=0, le=1e6, alias="lambda")]
    mask: Mask
    mask_group: Count
    online_classifier: bool
    precision: Precision
    seed: Seed
    lease: PretrainLease
    sorcen: PretrainSorcen
    mage: PretrainMage

    def values(self, objective: str) -> dict[str, Any]:
        """Every value that a run of one objective uses, by key of params.yaml: shared keys and its own section."""
        shared = self.model_dump(by_alias=True, exclude=set(self.entries()))
        return {**shared, objective: self.section(objective).model_dump()}


class Condition(WarmedUp):
    """Class-conditional fine-tuning of the decoder under a frozen encoder (LEASE, table A.5)."""

    class_embeddings: str | None
    centroids: bool
    label_dropout: Share
    word_dropout: Share
    splits: Splits
    held_out: list[str]
    held_out_images: Count
    epochs: Count
    batch: Count
    accumulate: Count
    base_lr: Rate
    min_lr: Weight
    warmup_epochs: CountOrZero
    weight_decay: Weight
    decay_tables: bool
    betas: Betas
    clip: Weight
    dropout: Dropout
    label_smoothing: Dropout
    mask: Mask
    mask_group: Count
    precision: Precision
    seed: Seed


class Generate(Section):
    """Iterative decoding of a masked model."""

    images: Count
    steps: Count
    temperature: Weight
    last: Literal["family", "argmax", "sampled"]
    batch: Count
    seed: Seed
    split: str
    box: Annotated[list[CountOrZero], Field(min_length=4, max_length=4)]
    mask_ratio: Share
    classes: list[CountOrZero]
    words: bool
    scale: Weight
    uint8: Literal["truncate", "round"]
    shown: Count
    precision: SamplingPrecision
