"""Sections of the token pipeline: manifest to shards."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from semdict.pipeline.config.schema.base import (
    BILLION,
    Count,
    CropProtocol,
    Decibels,
    Precision,
    Rate,
    Section,
    Seed,
    Share,
)

NO_FILE = "weights/README.md"  # stands in `inputs` where there is no file to watch

View = Annotated[str, Field(pattern=r"^(centre|flip|ten-crop|random-[1-9]\d{0,3})$")]


class Inputs(Section):
    """Files, or folders around them, that DVC watches besides the parameters; NO_FILE where there is none."""

    images: str
    vqgan: str
    features: str
    centroids: str
    perceptual: str


class Manifest(Section):
    """Which images there are."""

    images: dict[str, str] = Field(min_length=1)  # split name -> folder, tar glob or parquet glob
    shares: dict[str, Annotated[float, Field(gt=0, lt=1)]]  # split name -> share of the images of its folder
    layout: Literal["auto", "classes", "flat", "webdataset", "parquet"]
    label_key: str | None
    max_bad_fraction: Share

    @model_validator(mode="after")
    def _shared(self) -> "Manifest":
        for path in {self.images.get(split, "") for split in self.shares}:
            splits = [split for split, other in self.images.items() if other == path]
            total = sum(self.shares.get(split, 0.0) for split in splits)
            if not splits or set(splits) - set(self.shares) or abs(total - 1) > 1e-6:
                raise ValueError(
                    f"shares {self.shares} must name every split of a folder and sum to 1; splits of "
                    f"{path or 'no folder'}: {', '.join(splits) or 'none'}"
                )
        return self


class Pixels(Section):
    """How a file becomes pixels."""

    size: Annotated[int, Field(ge=8, le=4096)]
    crop: CropProtocol
    decoder: Literal["auto", "simplejpeg", "pillow"]
    max_pixels: Annotated[int, Field(ge=1, le=357_913_940)]
    decode_memory: Annotated[int, Field(ge=10_000_000, le=1_000 * BILLION)]


class Vqgan(Section):
    """The generative tokenizer."""

    weights: str
    layout: str | None
    ema: bool
    psnr_floor: Decibels
    psnr_images: Count


class Features(Section):
    """The discriminative teacher."""

    model: str
    weights: str | None
    layer: Annotated[int, Field(ge=-1000, le=-1)]
    image_size: Annotated[int, Field(ge=1, le=65536)] | None
    pool: Annotated[int, Field(ge=1, le=64)]
    kwargs: dict[str, Any]


class SampleFeatures(Section):
    """Patch features that k-means learns from."""

    splits: list[str]
    points: Count
    images: Annotated[float, Field(gt=0, le=1)]
    batch: Count
    chunk: Count
    seed: Seed
    precision: Precision


class Kmeans(Section):
    """The discriminative codebook."""

    k: Annotated[int, Field(ge=2, le=65535)]
    iterations: Count
    seed: Seed
    engine: Literal["auto", "faiss", "torch"]
    max_points_per_centroid: Count
    centroids: str | None


class Encode(Section):
    """Every image to both token sets."""

    views: list[View]
    precision: Precision
    precision_images: Count
    compile: bool
    batch: Count
    chunk: Count
    seed: Seed


class VcqEncode(Encode):
    """Every image to the tokens of the 1-D tokenizer."""

    psnr_floor: Decibels
    psnr_images: Count


class Shards(Section):
    """How tokens are stored, and what the dataset card says of them."""

    codec: Literal["pcodec", "blosc"]
    chunk_rows: Count
    shard_rows: Count
    title: str
    licence: str
    source: str

    @model_validator(mode="after")
    def _aligned(self) -> "Shards":
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows {self.shard_rows} is not a multiple of chunk_rows {self.chunk_rows}")
        return self


class Analyse(Section):
    """The two codebooks of a token set compared (LEASE, appendix D)."""

    split: str | None
    view: str | None
    bound: Rate
    top: Count
    pmi_tokens: Annotated[int, Field(ge=1, le=1000)]
    min_count: Count
    seed: Seed
