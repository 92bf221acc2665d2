"""Sections of the token pipeline: manifest to shards."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from semdict.pipeline.config.schema.base import Device, Positive, Section, Share

NONE = "presets/none"  # stands where a preset has no file to watch


class Inputs(Section):
    """Files, or folders they lie in, that DVC watches besides the parameters; `presets/none` where there is none.

    An image store of millions of files is not for DVC to hash: only the demo's own images are named here.
    """

    images: str
    vqgan: str
    features: str
    centroids: str
    perceptual: str


class Manifest(Section):
    """Where the images are; the only stage that looks at the image store itself."""

    images: dict[str, str] = Field(min_length=1)  # split name -> folder, tar glob or parquet glob
    layout: Literal["auto", "classes", "flat", "webdataset", "parquet"] = "auto"
    workers: Annotated[int, Field(ge=0)] = 0  # 0 = one per core
    max_bad_fraction: Share = 0.01


class Pixels(Section):
    """How a file becomes pixels: the same for every stage that looks at images."""

    crop: Literal["resize-256", "adm-256", "resize-292"] = "resize-256"
    decoder: Literal["auto", "simplejpeg", "pillow"] = "auto"
    max_pixels: Annotated[int, Field(ge=1, le=357_913_940)] = 178_956_970  # a larger image is quarantined unread


class Vqgan(Section):
    """The generative tokenizer."""

    weights: str
    psnr_floor: float = 14.0  # dB; a wrong input range is far below
    psnr_images: Positive = 64


class Features(Section):
    """The discriminative teacher: any timm ViT."""

    model: str
    weights: str | None = None  # None = from the hub
    layer: Annotated[int, Field(le=-1)] = -1  # counted from the end, -1 = last block
    image_size: Positive = 224


class SampleFeatures(Section):
    """Patches drawn for k-means, evenly over the whole dataset."""

    splits: list[str] = ["train"]
    points: Positive = 4_194_304  # over all images; k-means uses at most kmeans.max_points_per_centroid * k
    batch: Positive = 64
    chunk: Positive = 1024  # images per unit of resume
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Device = "auto"


class Kmeans(Section):
    """The discriminative dictionary."""

    k: Annotated[int, Field(ge=2, le=65535)]
    iterations: Positive = 20
    seed: Annotated[int, Field(ge=0)] = 0
    engine: Literal["auto", "faiss", "torch"] = "auto"
    max_points_per_centroid: Positive = 256
    centroids: str | None = None  # an existing (K, D) .npy instead of clustering
    device: Device = "auto"


class Encode(Section):
    """Every image to both words of every grid cell."""

    views: list[Annotated[str, Field(pattern=r"^(centre|flip|ten-crop|random-[1-9]\d*)$")]] = ["centre"]
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    precision_images: Positive = 64  # compared with float32 when the precision is lower
    batch: Positive = 32
    chunk: Positive = 4096  # images per unit of resume
    workers: Annotated[int, Field(ge=0)] = 0  # decode threads, 0 = one per core
    scheduler: Annotated[str, Field(pattern=r"^(in-process|local(-\d+)?|(tcp|tls|ucx)://.+)$")] = "in-process"
    seed: Annotated[int, Field(ge=0)] = 0
    device: Device = "auto"


class VcqEncode(Encode):
    """Every image to the words of the 1-D tokenizer; the paper trains on ten crops."""

    psnr_floor: float = 10.0  # dB; below it the tokenizer does not know these images
    psnr_images: Positive = 64


class Shards(Section):
    """How tokens are stored, and what the dataset card says of them."""

    codec: Literal["pcodec", "blosc"] = "pcodec"
    chunk_rows: Positive = 4096
    shard_rows: Positive = 65536
    title: str = "semdict token shards"
    licence: str = "other"
    source: str = ""

    @model_validator(mode="after")
    def _aligned(self) -> "Shards":
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows {self.shard_rows} is not a multiple of chunk_rows {self.chunk_rows}")
        return self
