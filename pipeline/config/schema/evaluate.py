"""Section `evaluate`: scores of a frozen or fine-tuned encoder; defaults are LEASE's tables A.2 to A.4."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from semdict.pipeline.config.schema.base import Device, Name, Positive, Section, Share

Seed = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
Splits = Annotated[list[str], Field(min_length=1)]


class EvaluateProbe(Section):
    """Linear probe (LEASE and Sorcen, Tables A.2): LARS on batch-normalised features."""

    epochs: Positive = 90
    batch: Positive = 4096
    base_lr: Rate = 0.1  # at a batch of 256
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    weight_decay: Amount = 0.0
    momentum: Share = 0.9
    embedding_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # source images only, as the released probe has it
    seed: Seed = 0
    eval_every: Positive = 1  # epochs between points of the curve

    @model_validator(mode="after")
    def _fits(self) -> "EvaluateProbe":
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is more than epochs {self.epochs}")
        return self


class SecondSet(Section):
    """A dataset of shifted images: its token shards (or its manifest, with source images) and how its classes map."""

    shards: str | None = None
    manifest: str | None = None
    images: dict[str, str] = {}  # with manifest: split -> where its images are, as in section manifest
    splits: list[str] = []  # [] = all
    view: str = "centre"
    class_map: str | None = None  # yaml or json, its class -> training class(es); None = the names are the same

    @model_validator(mode="after")
    def _one(self) -> "SecondSet":
        if (self.shards is None) == (self.manifest is None):
            raise ValueError("name either shards or manifest")
        if (self.manifest is None) != (not self.images):
            raise ValueError("images (split -> folder) belong to manifest, and a manifest needs them")
        return self


class EvaluateKnn(Section):
    """Nearest neighbours by cosine, weighted by exp(similarity / temperature) (Wu et al., arXiv:1805.01978)."""

    k: Positive = 20
    temperature: Rate = 0.07
    vote: Literal["weighted", "majority"] = "weighted"
    second: dict[Name, SecondSet] = {}


class EvaluateFewShot(Section):
    """Linear probe on a few images per class (LEASE, Table A.4)."""

    shots: Annotated[list[Positive], Field(min_length=1)] = [4, 8, 16, 25]
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0, 1, 2, 3, 4]
    epochs: Positive = 10
    batch: Positive = 16
    base_lr: Rate = 1.0  # at a batch of 256
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    weight_decay: Amount = 0.0
    momentum: Share = 0.9
    embedding_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # source images only

    @model_validator(mode="after")
    def _fits(self) -> "EvaluateFewShot":
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is more than epochs {self.epochs}")
        for name in ("shots", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} names one twice")
        return self


class EvaluateFinetune(Section):
    """End-to-end fine-tuning on images tokenised as they come (LEASE, Table A.3); what it leaves open is MAGE's."""

    epochs: Positive = 100
    batch: Positive = 1024  # over all processes and micro-batches
    accumulate: Positive = 1
    base_lr: Rate = 2.5e-4  # at a batch of 256
    min_lr: Amount = 1e-6
    warmup_epochs: Annotated[int, Field(ge=0)] = 5
    weight_decay: Amount = 0.05
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65
    clip: Amount = 0.0  # largest gradient norm, 0 = none
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    rand_augment: Annotated[str, Field(pattern=r"^$|^rand-")] = "rand-m9-mstd0.5-inc1"  # timm's name; "" = none
    crop_scale: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.2, 1.0]  # share of the image's area
    mixup: Amount = 0.8
    cutmix: Amount = 1.0
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # inside the blocks
    embedding_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    eval_every: Positive = 1  # epochs between looks at the test set
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    compile: bool = False
    seed: Seed = 0
    save_every: Annotated[int, Field(ge=0)] = 500  # steps, 0 = only at the end
    keep: Positive = 2  # checkpoints
    log_every: Positive = 20  # steps
    tensorboard: bool = True

    @model_validator(mode="after")
    def _fits(self) -> "EvaluateFinetune":
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is more than epochs {self.epochs}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale {self.crop_scale} must rise from above 0")
        return self


class Evaluate(Section):
    """Where features come from, shared by all measures, and one subsection per measure.

    source tokens: the views of a shard directory, features cached. source images: crops of the protocol (training:
    random resized crop and flip, new every epoch; test: resize 292, centre 256, as MAGE), VQGAN online.
    """

    source: Literal["tokens", "images"] = "tokens"
    train_splits: Splits = ["train"]
    test_splits: Splits = ["val"]
    train_views: list[str] = []  # source tokens: names of the shards' views, [] = all
    test_view: str = "centre"  # source tokens
    test_crop: Literal["resize-256", "adm-256", "resize-292"] = "resize-292"  # source images
    batch: Positive = 64  # images per forward pass of the frozen models; memory only, no score
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of the encoder; the VQGAN's is float32
    dtype: Literal["float32", "float16"] = "float32"  # of cached features
    workers: Annotated[int, Field(ge=0)] = 0  # decode threads or processes, 0 = one per core
    device: Device = "auto"
    probe: EvaluateProbe = EvaluateProbe()
    knn: EvaluateKnn = EvaluateKnn()
    few_shot: EvaluateFewShot = EvaluateFewShot()
    finetune: EvaluateFinetune = EvaluateFinetune()
