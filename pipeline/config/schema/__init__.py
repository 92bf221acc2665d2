"""What params.yaml may hold: one validated section per stage, each key with its type and bounds."""

from pathlib import PurePath
from typing import Annotated

from pydantic import Field, model_validator

from semdict.pipeline.common.errors import suggestion
from semdict.pipeline.common.hub import is_hub_name
from semdict.pipeline.config.schema.base import Name, Runtime, Section
from semdict.pipeline.config.schema.evaluate import Evaluate, Scores
from semdict.pipeline.config.schema.masked import Condition, Generate, Pretrain
from semdict.pipeline.config.schema.tokens import (
    NO_FILE,
    Analyse,
    Encode,
    Features,
    Inputs,
    Kmeans,
    Manifest,
    Pixels,
    SampleFeatures,
    Shards,
    VcqEncode,
    Vqgan,
)
from semdict.pipeline.config.schema.vcq import Ar, ArSample, Vcq, VcqEvaluate, VqganTrain

__all__ = [
    "Analyse",
    "Ar",
    "ArSample",
    "Condition",
    "Encode",
    "Evaluate",
    "Features",
    "Generate",
    "Kmeans",
    "Manifest",
    "Params",
    "Pretrain",
    "Runtime",
    "Scores",
    "Section",
    "Shards",
    "Vcq",
    "VcqEncode",
    "VcqEvaluate",
    "Vqgan",
    "VqganTrain",
]


class Params(Section):
    """The whole of params.yaml, in the order of presets/base.yaml."""

    preset: Name
    inputs: Inputs
    runtime: Runtime
    objectives: Annotated[list[str], Field(min_length=1)]
    conditioned: list[str]
    manifest: Manifest
    pixels: Pixels
    vqgan: Vqgan
    vqgan_train: VqganTrain
    features: Features
    sample_features: SampleFeatures
    kmeans: Kmeans
    encode: Encode
    shards: Shards
    analyse: Analyse
    pretrain: Pretrain
    condition: Condition
    generate: Generate
    vcq: Vcq
    vcq_encode: VcqEncode
    ar: Ar
    ar_sample: ArSample
    vcq_evaluate: VcqEvaluate
    evaluate: Evaluate
    scores: Scores

    def watched(self) -> list[tuple[str, str, str | None]]:
        """(key of `inputs`, key of the file it stands for, the file or None) of the weights that DVC watches."""

        def local(path: str | None) -> str | None:
            return None if path and is_hub_name(path) else path

        first = self.vcq.perceptual[0].weights if self.vcq.perceptual else None
        return [
            ("vqgan", "vqgan.weights", local(self.vqgan.weights)),
            ("features", "features.weights", local(self.features.weights)),
            ("centroids", "kmeans.centroids", self.kmeans.centroids),
            ("perceptual", "the first of vcq.perceptual", first),
        ]

    @model_validator(mode="after")
    def _trainers(self) -> "Params":
        """`dvc repro` trains known objectives, each once, and conditions models that it trains."""
        known = Pretrain.entries()
        for key, names, allowed in (
            ("objectives", self.objectives, known),
            ("conditioned", self.conditioned, self.objectives),
        ):
            for name in names:
                if name not in allowed:
                    raise ValueError(f"{key} has {name!r}; {suggestion(name, allowed)}")
            if len(set(names)) < len(names):
                raise ValueError(f"{key} names an objective twice: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _watched(self) -> "Params":
        for name, key, path in self.watched():
            watched = getattr(self.inputs, name)
            contains = path is not None and PurePath(watched) in PurePath(path).parents and watched != "."
            if watched != (path or NO_FILE) and not contains:
                wanted = f"{path}, or a folder around it" if path else NO_FILE
                raise ValueError(f"inputs.{name} is {watched}, {key} is {path}: set inputs.{name}: {wanted}")
        return self
