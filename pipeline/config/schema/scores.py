"""Section `scores`: image scores of samples through torch-fidelity."""

from typing import Annotated, Literal

from pydantic import Field

from semdict.pipeline.config.schema.base import Device, Positive, Section


class Scores(Section):
    """Where the weights are, and the numbers that the protocols leave open."""

    protocol: Literal["val50k", "adm", "teacher"] = "val50k"  # teacher: where there is no Inception, as in the demo
    reference: str | None = None  # folder of PNGs, ADM's .npz, or a manifest; None = the preset's manifest
    inception: str | None = None  # weights-inception-2015-12-05-6726825d.pth; None = torch's hub cache
    inception_sha256: str | None = None  # refused when the file has another
    download: bool = True  # fetch the weights where they are neither given nor cached
    batch: Positive = 64
    kid_subsets: Positive = 100
    kid_subset_size: Positive = 1000  # fewer where there are fewer images
    neighbours: Positive = 3  # of precision and recall
    split: str = "val"  # of a manifest as reference
    references: Annotated[int, Field(ge=0)] = 0  # images of a manifest as reference, 0 = all
    shown: Positive = 8  # samples beside their nearest training images
    device: Device = "auto"
