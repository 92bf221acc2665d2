"""Section `pretrain`: LEASE, Sorcen and MAGE on cached tokens."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from semdict.pipeline.config.schema.base import Device, Positive, Section, Share


class PretrainMask(Section):
    """Mask ratio: a normal distribution cut off at both ends, one draw per batch (as published) or per sample."""

    mode: Share = 0.55
    std: Annotated[float, Field(gt=0)] = 0.25
    min: Annotated[float, Field(ge=0.5, le=1.0)] = 0.5
    max: Annotated[float, Field(ge=0.5, le=1.0)] = 1.0
    per_sample: bool = False


class PretrainLease(Section):
    """Codebook contrast (LEASE, Table A.1): how many neighbours are positives, and both temperatures."""

    contrast: Literal["encoder", "decoder", "both"] = "encoder"
    neighbours: Annotated[int, Field(ge=0)] = 5
    tau: Annotated[float, Field(gt=0)] = 0.1
    alpha: Annotated[float, Field(gt=0)] = 0.1


class PretrainSorcen(Section):
    """Echo contrast (Sorcen, Table A.1)."""

    temperature: Annotated[float, Field(gt=0)] = 0.3
    top: Positive = 15  # codes that an echo is drawn from
    echo_warmup_epochs: Annotated[int, Field(ge=0)] = 40
    uniform_weight: Annotated[float, Field(ge=0)] = 0.01
    momentum: Share = 0.996
    projector: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [4096, 512]  # hidden, out
    predictor: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [2048, 512]
    as_released: bool = False


class Pretrain(Section):
    """Masked-token training on cached shards.

    The values are the papers' (LEASE A.1, Sorcen A.1), but dropout is the released code's 0.1, not the tables' 0.5.
    """

    size: Literal["tiny", "small", "vit_base", "vit_large"] = "vit_base"
    width: Positive | None = None  # each of these six replaces the size's own number
    depth: Positive | None = None
    heads: Positive | None = None
    decoder_width: Positive | None = None
    decoder_depth: Positive | None = None
    decoder_heads: Positive | None = None
    splits: Annotated[list[str], Field(min_length=1)] = ["train"]
    loader: Literal["resident", "streaming"] = "resident"
    epochs: Positive = 1600
    batch: Positive = 4096  # over all processes and micro-batches
    accumulate: Positive = 1
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4  # at a batch of 256
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_epochs: Annotated[int, Field(ge=0)] = 40
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    clip: Annotated[float, Field(ge=0)] = 3.0  # largest gradient norm, 0 = none
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    contrast_weight: Annotated[float, Field(ge=0, alias="lambda")] = 0.1
    mask: PretrainMask = PretrainMask()
    lease: PretrainLease = PretrainLease()
    sorcen: PretrainSorcen = PretrainSorcen()
    online_classifier: bool = False  # a small head on detached latents, for the curve only
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    compile: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    device: Device = "auto"
    save_every: Annotated[int, Field(ge=0)] = 1000  # steps, 0 = only at the end
    keep: Positive = 2  # checkpoints
    log_every: Positive = 20  # steps
    picture_every: Annotated[int, Field(ge=0)] = 0  # steps between reconstruction grids, 0 = none
    pictures: Positive = 8  # images in a grid
    tensorboard: bool = True

    @model_validator(mode="after")
    def _fits(self) -> "Pretrain":
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is more than epochs {self.epochs}")
        if self.mask.min > self.mask.max:
            raise ValueError(f"mask.min {self.mask.min} is above mask.max {self.mask.max}")
        return self
