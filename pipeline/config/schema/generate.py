"""Section `generate`: how images are drawn from a masked-token model."""

from typing import Annotated, Literal

from pydantic import Field

from semdict.pipeline.config.schema.base import Device, Positive, Section, Share

Cells = Annotated[int, Field(ge=0)]


class Generate(Section):
    """Iterative decoding; steps and temperature are those of the published scripts (Sorcen's supplement: 20 steps)."""

    images: Positive = 50_000
    steps: Positive = 20
    temperature: Annotated[float, Field(ge=0)] = 6.0
    last: Literal["family", "argmax", "sampled"] = "family"  # the last cell: as the model's family publishes it
    batch: Positive = 64
    seed: Annotated[int, Field(ge=0)] = 0
    split: str = "val"  # of the token shards, for what starts from real images
    box: Annotated[list[Cells], Field(min_length=4, max_length=4)] = [4, 4, 8, 8]  # row, column, height, width in cells
    mask_ratio: Share = 0.75  # task reconstruct
    classes: list[Cells] = []  # task class; empty = all in turn
    words: bool = True  # task class: tell the centroids of real images, where the model knows them
    scale: Annotated[float, Field(ge=0)] = 0.0  # task class: guidance, 0 = none
    uint8: Literal["truncate", "round"] = "truncate"  # of 255 x; the published scripts truncate
    shown: Positive = 32  # images in the grid
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Device = "auto"
