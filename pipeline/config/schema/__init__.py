"""What params.yaml may hold: one validated section per stage, each key with its type, range and meaning."""

from pathlib import PurePath

from pydantic import model_validator

from semdict.pipeline.common.hub import is_hub_name
from semdict.pipeline.config.schema.base import Name, Section
from semdict.pipeline.config.schema.condition import Condition
from semdict.pipeline.config.schema.evaluate import Evaluate
from semdict.pipeline.config.schema.generate import Generate
from semdict.pipeline.config.schema.pretrain import Pretrain
from semdict.pipeline.config.schema.scores import Scores
from semdict.pipeline.config.schema.tokens import (
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
from semdict.pipeline.config.schema.vcq import Ar, ArSample, Vcq
from semdict.pipeline.config.schema.vcq_evaluate import VcqEvaluate


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
    def _watched(self) -> "Params":
        for name, key, path in self.watched():
            watched = getattr(self.inputs, name)
            holds = path is not None and PurePath(watched) in PurePath(path).parents and watched != "."
            if watched != (path or NONE) and not holds:
                wanted = f"{path}, or a folder around it" if path else NONE
                raise ValueError(f"inputs.{name} is {watched}, {key} is {path}: set inputs.{name}: {wanted}")
        return self
