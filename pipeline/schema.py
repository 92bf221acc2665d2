"""What params.yaml may hold: one validated section per stage, each key with its type, range and meaning."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Adam = tuple[float, float]


class Section(BaseModel):
    """Frozen; an unknown key is an error, and so is a number given as text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


NONE = "presets/none"  # stands where a preset has no file to watch


class Inputs(Section):
    """Files or folders that DVC watches besides the parameters; `presets/none` where there is nothing to watch.

    An image store of millions of files is not for DVC to hash: only the demo's own images are named here.
    """

    images: str
    features: str
    centroids: str


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
    seed: Annotated[int, Field(ge=0)] = 0
    batch: Positive = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Device = "auto"


class Params(Section):
    """The whole of params.yaml."""

    preset: Name
    inputs: Inputs
    manifest: Manifest
    pixels: Pixels = Pixels()
    vqgan: Vqgan
    features: Features
    sample_features: SampleFeatures = SampleFeatures()
    kmeans: Kmeans
    encode: Encode = Encode()
    shards: Shards = Shards()
    pretrain: Pretrain = Pretrain()
    vcq: Vcq = Vcq()
    ar: Ar = Ar()
    ar_sample: ArSample = ArSample()

    @model_validator(mode="after")
    def _watched(self) -> "Params":
        pairs = {"features": self.features.weights, "centroids": self.kmeans.centroids}
        for name, path in pairs.items():
            watched = getattr(self.inputs, name)
            if watched != (path or NONE):
                key = "features.weights" if name == "features" else "kmeans.centroids"
                raise ValueError(f"inputs.{name} is {watched}, {key} is {path}: set inputs.{name}: {path or NONE}")
        return self
