"""Sections `vcq`, `ar`, `ar_sample`: the 1-D tokenizer with a growing codebook and its autoregressive model."""

from typing import Annotated, Literal

from pydantic import Field

from semdict.pipeline.config.schema.base import Device, Positive, Section, Share


class VcqPerceptual(Section):
    """One network that may serve as the perceptual loss; the first whose weights are there is used."""

    kind: Literal["lpips-vgg", "logits", "features"]
    weights: str
    sha256: str | None = None
    model: str = "convnext_small"  # timm name, for logits and features
    layers: Positive = 3  # intermediate maps, for features


class Vcq(Section):
    """The 1-D tokenizer with a growing codebook: shape, losses, optimisation; VCQ's appendix A where stated."""

    size: Literal["tiny", "base", "large", "large_496"] = "base"
    image_size: Positive = 256
    patch: Positive = 16
    tokens: Positive = 256
    encoder: Annotated[list[Positive], Field(min_length=3, max_length=3)] | None = None  # depth, width, heads
    decoder: Annotated[list[Positive], Field(min_length=3, max_length=3)] | None = None
    latent_queries: bool = True
    schedule: Literal["constant", "linear", "cosine", "power"] = "cosine"
    k_min: Positive = 2
    k_max: Annotated[int, Field(ge=2, le=65535)] | None = None  # the size's own: 16384, large 11264
    power: Annotated[float, Field(gt=0)] = 2.5
    dim: Positive = 8
    l2: bool = True
    beta: Annotated[float, Field(ge=0)] = 1.0
    codebook_weight: Annotated[float, Field(ge=0)] = 1.0
    quantize_start: Annotated[int, Field(ge=0)] = 0  # steps without quantization, for narrow models
    quantize_ramp: Annotated[int, Field(ge=0)] = 0
    perceptual: list[VcqPerceptual] = []
    warm_perceptual: VcqPerceptual | None = None  # used before step warm_steps
    warm_steps: Annotated[int, Field(ge=0)] = 0
    l1_weight: Annotated[float, Field(ge=0)] = 1.0
    perceptual_weight: Annotated[float, Field(ge=0)] = 1.0
    adversarial_weight: Annotated[float, Field(ge=0)] = 0.1
    discriminator_weight: Annotated[float, Field(ge=0)] = 1.0
    discriminator_start: Annotated[int, Field(ge=0)] = 20_000
    discriminator_ramp: Annotated[int, Field(ge=0)] = 2_000
    discriminator_channels: Positive = 64
    augment: Share = 1.0  # probability of DiffAug
    lecam_weight: Annotated[float, Field(ge=0)] = 0.0  # discriminator regulariser, not named by the paper
    reset_patience: Annotated[float, Field(ge=0)] = 0.0  # re-seed codes unused for so many expected uses; 0 = never
    reset_protected: Annotated[int, Field(ge=0)] = 16  # first codes, which no reset touches
    splits: Annotated[list[str], Field(min_length=1)] = ["train"]
    held_out: list[str] = ["val"]  # for PSNR and pictures
    steps: Positive = 1_300_000
    batch: Positive = 256
    accumulate: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 1e-4
    final_lr: Annotated[float, Field(ge=0)] = 3e-5
    warmup: Annotated[int, Field(ge=0)] = 13_000
    hold: Annotated[int, Field(ge=0)] = 65_000  # step until which the peak is held
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    clip: Annotated[float, Field(ge=0)] = 1.0
    ema: Share = 0.9999
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    compile: bool = False
    workers: Annotated[int, Field(ge=0)] = 0  # decode threads, 0 = one per core
    seed: Annotated[int, Field(ge=0)] = 0
    device: Device = "auto"
    save_every: Annotated[int, Field(ge=0)] = 5000
    keep: Positive = 2
    log_every: Positive = 50
    usage_images: Positive = 65_536  # window of the codebook statistics
    measured_images: Positive = 1000  # held-out images for PSNR
    tensorboard: bool = True


class Ar(Section):
    """The autoregressive model on VCQ tokens; the values are appendix A's for the base tokenizer."""

    size: Literal["tiny", "b", "l", "xl"] = "b"
    depth: Positive | None = None  # each of these three replaces the size's own number
    width: Positive | None = None
    heads: Positive | None = None
    mask_vocab: Literal["train", "sample_only", "off"] = "train"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    label_dropout: Share = 0.1
    splits: Annotated[list[str], Field(min_length=1)] = ["train"]
    held_out: list[str] = ["val"]  # for the likelihood per position
    steps: Positive = 1_000_000
    batch: Positive = 512
    accumulate: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 2e-4
    final_lr: Annotated[float, Field(ge=0)] = 4e-5
    warmup: Annotated[int, Field(ge=0)] = 10_000
    hold: Annotated[int, Field(ge=0)] = 50_000
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.96]
    weight_decay: Annotated[float, Field(ge=0)] = 0.03
    clip: Annotated[float, Field(ge=0)] = 1.0
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    compile: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    device: Device = "auto"
    save_every: Annotated[int, Field(ge=0)] = 5000
    keep: Positive = 2
    log_every: Positive = 50
    nll_images: Positive = 10_000
    tensorboard: bool = True


class ArSample(Section):
    """How images are drawn; scale 0 is no guidance (tables 7 and 8)."""

    classes: list[Annotated[int, Field(ge=0)]] = []  # empty = all
    per_class: Positive = 50
    scale: Annotated[float, Field(ge=0)] = 10.0
    power: Annotated[float, Field(gt=0)] = 1.5
    start: Annotated[float, Field(ge=0)] = 0.0
    mode: Literal["ramp_ratio", "ramp", "ratio", "ratio_power", "constant"] = "ramp_ratio"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    unguided_temperature: Annotated[float, Field(gt=0)] = 1.0  # the paper's "w/o CFG" rows: 0.85 to 0.95
    seed: Annotated[int, Field(ge=0)] = 0
    batch: Positive = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Device = "auto"
