"""Section `vcq_evaluate`: reconstruction, use of the codebook, first-k-token probe of a VCQ tokenizer."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from semdict.pipeline.config.schema.base import Device, Positive, Section


class FirstK(Section):
    """Linear probe on the first k tokens (table 6); rate, norm and length as GigaTok and MAE probe."""

    first: Annotated[list[Positive], Field(min_length=1)] = [10, 256]  # k
    features: Annotated[list[Literal["pre", "code"]], Field(min_length=1)] = ["pre", "code"]  # of quantization
    pools: Annotated[list[Literal["mean", "concat"]], Field(min_length=1)] = ["mean", "concat"]
    epochs: Positive = 90
    batch: Positive = 4096
    base_lr: Annotated[float, Field(gt=0)] = 0.1  # at a batch of 256
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fits(self) -> "FirstK":
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is more than epochs {self.epochs}")
        return self


class VcqEvaluate(Section):
    """Which images; scores of reconstructions and samples follow section scores."""

    train_splits: Annotated[list[str], Field(min_length=1)] = ["train"]  # what the probe's head learns from
    test_splits: Annotated[list[str], Field(min_length=1)] = ["val"]  # reconstructed, and probed
    shown: Positive = 16  # pictures in the grid
    batch: Positive = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    workers: Annotated[int, Field(ge=0)] = 0  # decode threads, 0 = one per core
    device: Device = "auto"
    probe: FirstK = FirstK()
