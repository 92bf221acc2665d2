"""Section `condition`: teaching a pretrained model classes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from semdict.pipeline.config.schema.base import Device, Positive, Section, Share
from semdict.pipeline.config.schema.pretrain import PretrainMask


class Condition(Section):
    """Fine-tuning the decoder under a frozen encoder.

    The values are LEASE's (Table A.5), but dropout is the released code's 0.1, not the table's 0.5, as in pretraining;
    the two dropouts of what is told are ours.
    """

    class_embeddings: str | None = None  # (classes, D) .npy or .safetensors, CLIP's in the paper; None = learned
    centroids: bool = True  # the image's own beside the canvas too
    label_dropout: Share = 0.1  # images that are not told their class; guidance needs some
    word_dropout: Share = 0.1  # images that are not told their centroids; drawing without them needs some
    splits: Annotated[list[str], Field(min_length=1)] = ["train"]
    held_out: list[str] = ["val"]  # for the loss with and without what is told; [] = none
    held_out_images: Positive = 10_000
    epochs: Positive = 300
    batch: Positive = 4096  # over all processes and micro-batches
    accumulate: Positive = 1
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4  # at a batch of 256
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_epochs: Annotated[int, Field(ge=0)] = 5
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    clip: Annotated[float, Field(ge=0)] = 3.0  # largest gradient norm, 0 = none
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of the decoder
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    mask: PretrainMask = PretrainMask()
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    compile: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    device: Device = "auto"
    save_every: Annotated[int, Field(ge=0)] = 1000  # steps, 0 = only at the end
    keep: Positive = 2  # checkpoints
    log_every: Positive = 20  # steps
    tensorboard: bool = True

    @model_validator(mode="after")
    def _fits(self) -> "Condition":
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is more than epochs {self.epochs}")
        if self.mask.min > self.mask.max:
            raise ValueError(f"mask.min {self.mask.min} is above mask.max {self.mask.max}")
        return self
