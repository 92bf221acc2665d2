"""Sections `evaluate` and `scores`: measures of an encoder, and image scores of samples."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from semdict.pipeline.config.schema.base import (
    Betas,
    Count,
    CountOrZero,
    CropProtocol,
    Dropout,
    Extensible,
    Name,
    Precision,
    Rate,
    Section,
    Seed,
    Share,
    Splits,
    WarmedUp,
    Weight,
)


class EvaluateProbe(WarmedUp):
    """Linear probe (LEASE and Sorcen, tables A.2)."""

    epochs: Count
    batch: Count
    base_lr: Rate
    warmup_epochs: CountOrZero
    weight_decay: Weight
    momentum: Share
    embedding_dropout: Dropout
    seed: Seed
    eval_every: Count


class SecondSet(Section):
    """A shifted data set: its token shards (or its manifest, with source images) and how its classes map.

    An entry that users add under a name of their own, so what it leaves out cannot stand in presets/base.yaml.
    """

    shards: str | None = None
    manifest: str | None = None
    images: dict[str, str] = {}  # with manifest: split -> where its images are, as in section manifest
    splits: list[str] = []  # [] = all
    view: str = "centre"
    class_map: str | None = None  # yaml or json, its class -> training class(es); null = the names are the same

    @model_validator(mode="after")
    def _one(self) -> "SecondSet":
        if (self.shards is None) == (self.manifest is None):
            raise ValueError("name either shards or manifest")
        if (self.manifest is None) != (not self.images):
            raise ValueError("images (split -> folder) belong to manifest, and a manifest needs them")
        return self


class EvaluateKnn(Section):
    """Cosine nearest neighbours."""

    k: Count
    temperature: Rate
    vote: Literal["weighted", "majority"]
    second: dict[Name, SecondSet]


class EvaluateFewShot(WarmedUp):
    """Linear probe on a few images per class (LEASE, table A.4)."""

    shots: Annotated[list[Count], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    epochs: Count
    batch: Count
    base_lr: Rate
    warmup_epochs: CountOrZero
    weight_decay: Weight
    momentum: Share
    embedding_dropout: Dropout

    @model_validator(mode="after")
    def _distinct(self) -> "EvaluateFewShot":
        for name in ("shots", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} names one twice")
        return self


class EvaluateUmap(Section):
    """Pictures of the latents by UMAP (Sorcen, figures F.1 and F.2)."""

    classes: list[str]
    neighbours: Annotated[int, Field(ge=2, le=1000)]
    min_dist: Share
    metric: Literal["euclidean", "cosine"]
    seed: Seed

    @model_validator(mode="after")
    def _once(self) -> "EvaluateUmap":
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes {self.classes} names one twice")
        return self


class EvaluateFinetune(WarmedUp):
    """End-to-end fine-tuning on images (LEASE, table A.3)."""

    epochs: Count
    batch: Count
    accumulate: Count
    base_lr: Rate
    min_lr: Weight
    warmup_epochs: CountOrZero
    weight_decay: Weight
    betas: Betas
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    clip: Weight
    label_smoothing: Dropout
    rand_augment: Annotated[str, Field(pattern=r"^$|^rand-")]
    crop_scale: Annotated[list[Share], Field(min_length=2, max_length=2)]
    mixup: Weight
    cutmix: Weight
    drop_path: Dropout
    dropout: Dropout
    embedding_dropout: Dropout
    eval_every: Count
    precision: Precision
    seed: Seed

    @model_validator(mode="after")
    def _rises(self) -> "EvaluateFinetune":
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale {self.crop_scale} must rise from above 0")
        return self


class Evaluate(Extensible):
    """Where features come from, shared by all measures, and one subsection per measure."""

    table: ClassVar = ("semdict.train.eval.measures", "MEASURES")
    needed: ClassVar = False

    source: Literal["tokens", "images"]
    train_splits: Splits
    test_splits: Splits
    train_views: list[str]
    test_view: str
    test_crop: CropProtocol
    batch: Count
    precision: Precision
    dtype: Literal["float32", "float16"]
    probe: EvaluateProbe
    knn: EvaluateKnn
    few_shot: EvaluateFewShot
    umap: EvaluateUmap
    finetune: EvaluateFinetune


class Scores(Section):
    """Image scores of samples through torch-fidelity."""

    protocol: Literal["val50k", "adm", "teacher"]
    reference: str | None
    inception: str | None
    inception_sha256: str | None
    download: bool
    batch: Count
    kid_subsets: Count
    kid_subset_size: Count
    neighbours: Count
    split: str
    references: CountOrZero
    shown: Count
