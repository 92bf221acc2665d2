"""What every section of params.yaml is made of: strict sections and bounded numbers.

Types, bounds and rules only; every default stands in presets/base.yaml. Bounds are wide: they refuse slips of the
keyboard (a seed of 10^23, infinite epochs), not unusual experiments.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

BILLION = 1_000_000_000

Count = Annotated[int, Field(ge=1, le=BILLION)]
CountOrZero = Annotated[int, Field(ge=0, le=BILLION)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(gt=0.0, le=1e6)]  # learning rates, temperatures, powers
Weight = Annotated[float, Field(ge=0.0, le=1e6)]
Decibels = Annotated[float, Field(ge=-100.0, le=1000.0)]
Betas = Annotated[list[Share], Field(min_length=2, max_length=2)]
Splits = Annotated[list[str], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Precision = Literal["float32", "bfloat16", "float16"]
SamplingPrecision = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """Frozen and without defaults; an unknown key is an error, and so is a number written as text, NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, allow_inf_nan=False)


class Runtime(Section):
    """How and where things run: no key shapes a result, no stage of dvc.yaml watches it, no fingerprint contains it."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    workers: Annotated[int, Field(ge=0, le=4096)]
    scheduler: Annotated[str, Field(pattern=r"^(in-process|local(-\d+)?|(tcp|tls|ucx)://.+)$")]
    compile: bool
    log_every: Count
    save_every: CountOrZero
    keep: Count
    picture_every: CountOrZero
    pictures: Count
    tensorboard: bool


def check_crop(value: Any) -> Any:
    """ValueError unless it is one of the crop protocols, see `pipeline.images.crops.Crop`."""
    if value in ("resize", "adm"):
        return value
    factor = value.get("resize-larger") if isinstance(value, dict) and len(value) == 1 else None
    if isinstance(factor, (int, float)) and factor is not True and 1 <= factor <= 4:
        return {"resize-larger": float(factor)}
    raise ValueError("must be resize, adm or {resize-larger: F}, F from 1 to 4; pixels.size is the side of the crop")


CropProtocol = Annotated[str | dict[str, float], PlainValidator(check_crop)]


def check_warmup(warmup_epochs: int, epochs: int) -> None:
    """ValueError when the warm-up is longer than the training."""
    if warmup_epochs > epochs:
        raise ValueError(f"warmup_epochs {warmup_epochs} is more than epochs {epochs}")
