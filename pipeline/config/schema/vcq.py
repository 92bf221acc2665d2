"""Sections of VCQ: the 1-D tokenizer, its autoregressive model, samples and measures."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from semdict.pipeline.config.schema.base import (
    Betas,
    Count,
    CountOrZero,
    Dropout,
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

Shape = Annotated[list[Count], Field(min_length=3, max_length=3)]  # depth, width, heads


class VcqPerceptual(Section):
    """One network that may serve as the perceptual loss: an entry of a list, with the keys that its kind has."""

    kind: Literal["lpips-vgg", "logits", "features"]
    weights: str
    sha256: str | None = None
    model: str | None = None  # timm name, for logits and features
    kwargs: dict[str, Any] = {}  # arguments of timm's model
    layers: Count | Annotated[list[CountOrZero], Field(min_length=1)] | None = None  # for features
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None  # pixels a side; None = as the network was trained

    @model_validator(mode="after")
    def _complete(self) -> "VcqPerceptual":
        needed = {"lpips-vgg": (), "logits": ("model",), "features": ("model", "layers")}[self.kind]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing, kind {self.kind} needs it")
        return self


class VqganTrain(Section):
    """A VQGAN trained on one's own images: shape, losses, optimisation."""

    image_size: Annotated[int, Field(ge=8, le=4096)]
    patch: Annotated[int, Field(ge=2, le=64)]
    widths: Annotated[list[Annotated[int, Field(ge=32, le=2048, multiple_of=32)]], Field(min_length=2, max_length=6)]
    blocks: Annotated[int, Field(ge=1, le=16)]
    decoder_blocks: Annotated[int, Field(ge=1, le=16)]
    codes: Annotated[int, Field(ge=2, le=2**20)]
    dim: Annotated[int, Field(ge=1, le=1024)]
    commitment: Weight
    codebook_decay: Share
    quantize_start: Count
    quantize_ramp: CountOrZero
    l1_weight: Weight
    l2_weight: Weight
    perceptual: list[VcqPerceptual]
    warm_perceptual: VcqPerceptual | None
    warm_steps: CountOrZero
    perceptual_weight: Weight
    adversarial_weight: Weight
    discriminator_weight: Weight
    discriminator_start: CountOrZero
    discriminator_ramp: CountOrZero
    discriminator_channels: Count
    augment: Share
    lecam_weight: Weight
    splits: Splits
    held_out: list[str]
    steps: Count
    batch: Count
    accumulate: Count
    lr: Rate
    final_lr: Weight
    warmup: CountOrZero
    hold: CountOrZero
    betas: Betas
    weight_decay: Weight
    clip: Weight
    ema: Share
    precision: Precision
    seed: Seed
    stored: Literal["float32", "float16"]
    measured_images: Count

    @model_validator(mode="after")
    def _fits(self) -> "VqganTrain":
        stride = self.patch * 2 ** (len(self.widths) - 1)
        if self.image_size % stride:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the stride {stride} "
                f"(patch {self.patch}, {len(self.widths)} widths)"
            )
        return self


class Vcq(Section):
    """The tokenizer: shape, losses, optimisation."""

    size: Literal["tiny", "base", "large", "large_496"]
    image_size: Annotated[int, Field(ge=1, le=65536)]
    patch: Annotated[int, Field(ge=1, le=65536)]
    tokens: Count
    encoder: Shape | None
    decoder: Shape | None
    latent_queries: bool
    schedule: Literal["constant", "linear", "cosine", "power"]
    k_min: Count
    k_max: Annotated[int, Field(ge=2, le=65535)] | None
    power: Rate
    dim: Count
    l2: bool
    beta: Weight
    codebook_weight: Weight
    quantize_start: CountOrZero
    quantize_ramp: CountOrZero
    perceptual: list[VcqPerceptual]
    warm_perceptual: VcqPerceptual | None
    warm_steps: CountOrZero
    l1_weight: Weight
    perceptual_weight: Weight
    adversarial_weight: Weight
    discriminator_weight: Weight
    discriminator_start: CountOrZero
    discriminator_ramp: CountOrZero
    discriminator_channels: Count
    augment: Share
    lecam_weight: Weight
    reset_patience: Weight
    reset_protected: CountOrZero
    splits: Splits
    held_out: list[str]
    steps: Count
    batch: Count
    accumulate: Count
    lr: Rate
    final_lr: Weight
    warmup: CountOrZero
    hold: CountOrZero
    betas: Betas
    weight_decay: Weight
    clip: Weight
    ema: Share
    precision: Precision
    seed: Seed
    usage_images: Count
    measured_images: Count


class Ar(Section):
    """The autoregressive model."""

    size: Literal["tiny", "b", "l", "xl"]
    depth: Count | None
    width: Count | None
    heads: Count | None
    mask_vocab: Literal["train", "sample_only", "off"]
    dropout: Dropout
    token_dropout: Dropout
    attention_dropout: Dropout
    label_dropout: Share
    splits: Splits
    held_out: list[str]
    steps: Count
    batch: Count
    accumulate: Count
    lr: Rate
    final_lr: Weight
    warmup: CountOrZero
    hold: CountOrZero
    betas: Betas
    weight_decay: Weight
    decay_tables: bool
    clip: Weight
    precision: Precision
    seed: Seed
    nll_images: Count


class ArSample(Section):
    """Class-conditional sampling with guidance."""

    classes: list[CountOrZero]
    per_class: Count
    scale: Weight
    power: Rate
    start: Weight
    mode: Literal["ramp_ratio", "ramp", "ratio", "ratio_power", "constant"]
    temperature: Rate
    unguided_temperature: Rate
    seed: Seed
    batch: Count
    precision: SamplingPrecision


class FirstK(WarmedUp):
    """Linear probe on the first k tokens."""

    first: Annotated[list[Count], Field(min_length=1)]
    features: Annotated[list[Literal["pre", "code"]], Field(min_length=1)]
    pools: Annotated[list[Literal["mean", "concat"]], Field(min_length=1)]
    epochs: Count
    batch: Count
    base_lr: Rate
    warmup_epochs: CountOrZero
    weight_decay: Weight
    seed: Seed


class VcqEvaluate(Section):
    """Reconstruction, codebook use and first-k probe of a tokenizer."""

    train_splits: Splits
    test_splits: Splits
    shown: Count
    batch: Count
    precision: SamplingPrecision
    probe: FirstK
