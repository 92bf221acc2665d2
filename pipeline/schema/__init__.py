"""What params.yaml may hold: one validated section per stage, each key with its type, range and meaning."""

from pathlib import PurePath

from pydantic import model_validator

from pipeline.schema.base import Name, Section
from pipeline.schema.condition import Condition
from pipeline.schema.evaluate import Evaluate
from pipeline.schema.generate import Generate
from pipeline.schema.pretrain import Pretrain
from pipeline.schema.scores import Scores
from pipeline.schema.tokens import (
    NONE,
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
from pipeline.schema.vcq import Ar, ArSample, Vcq
from pipeline.schema.vcq_evaluate import VcqEvaluate


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
    condition: Condition = Condition()
    generate: Generate = Generate()
    vcq: Vcq = Vcq()
    vcq_encode: VcqEncode = VcqEncode()
    ar: Ar = Ar()
    ar_sample: ArSample = ArSample()
    vcq_evaluate: VcqEvaluate = VcqEvaluate()
    evaluate: Evaluate = Evaluate()
    scores: Scores = Scores()

    def watched(self) -> list[tuple[str, str, str | None]]:
        """(key of the file, what `inputs` names for it, the file or None) of everything that DVC watches."""
        first = self.vcq.perceptual[0].weights if self.vcq.perceptual else None
        return [
            ("vqgan.weights", self.inputs.vqgan, self.vqgan.weights),
            ("features.weights", self.inputs.features, self.features.weights),
            ("kmeans.centroids", self.inputs.centroids, self.kmeans.centroids),
            ("the first of vcq.perceptual", self.inputs.perceptual, first),
        ]

    @model_validator(mode="after")
    def _watched(self) -> "Params":
        names = ("vqgan", "features", "centroids", "perceptual")
        for name, (key, watched, path) in zip(names, self.watched(), strict=True):
            holds = path is not None and PurePath(watched) in PurePath(path).parents and watched != "."
            if watched != (path or NONE) and not holds:
                wanted = f"{path}, or a folder around it" if path else NONE
                raise ValueError(f"inputs.{name} is {watched}, {key} is {path}: set inputs.{name}: {wanted}")
        return self
