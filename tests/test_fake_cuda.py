"""The pipeline at full ImageNet size on fake CUDA tensors: devices, host waits, GPU memory and products in float32."""

import contextlib
import copy
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from semdict.pipeline.common import nearest as search
from semdict.pipeline.encode import worker as encode_worker
from semdict.pipeline.encode.worker import EncodeJob, EncodeWorker
from semdict.pipeline.execute.store import Chunk
from semdict.pipeline.images.batches import CropBatch, CropRecipe
from semdict.pipeline.images.crops import Crop, expand_views
from semdict.pipeline.kmeans.sample_features import SampleJob, SampleWorker, points_per_row
from semdict.pipeline.kmeans.torch_engine import one_pass
from semdict.pipeline.tokenizers import timm_backbone
from semdict.pipeline.tokenizers.mage import RELEASED, MageTokenizer
from semdict.pipeline.tokenizers.pair import PairTokenizer
from semdict.pipeline.tokenizers.teachers import load_features
from tests.fake_cuda import CUDA, GIB, Trace, empty, fake_cuda, to_cuda

DINO = "vit_large_patch14_reg4_dinov2.lvd142m"
WORDS, WIDTH = 16_384, 1024


@dataclass
class GoodRows:
    """A manifest in which every row is good."""

    status: np.ndarray


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """MAGE's VQGAN and DINOv2 ViT-L to layer -3, without numbers."""
    build = timm_backbone.build_network

    def on_meta(model, image_size=None, kwargs=None, from_hub=False):
        with torch.device("meta"):
            return build(model, image_size, kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(timm_backbone, "build_network", on_meta)
        patch.setattr(timm_backbone, "_sha256_tensors", lambda _: "")
        tokenizer = MageTokenizer(RELEASED).requires_grad_(False).eval()
        return tokenizer, load_features(DINO, layer=-3, image_size=224, device="meta")


def full_size_pair(tokenizer: nn.Module, teacher: nn.Module) -> PairTokenizer:
    """Both models and 16,384 centroids on the fake GPU."""
    return PairTokenizer(to_cuda(tokenizer), to_cuda(teacher), empty(WORDS, WIDTH), CUDA)


def encode_chunk(patch: pytest.MonkeyPatch, models: tuple, batches: int, images: int, views: list[str]) -> Trace:
    """The trace of a worker that encodes one chunk of `batches` batches in bfloat16."""
    recipe = CropRecipe(Crop("resize", 256), tuple(expand_views(views)))
    chunk, shape = Chunk(0, 0, batches * images), (images, len(recipe.views))
    stream = [
        CropBatch(
            chunk=chunk,
            rows=np.arange(start, start + images),
            pixels=np.zeros((*shape, 256, 256, 3), np.uint8),
            boxes=np.zeros((*shape, 5), np.float32),
            bad={},
            size=images,
            last=start + images == chunk.stop,
        )
        for start in range(0, chunk.stop, images)
    ]
    patch.setattr(encode_worker, "stream_batches", lambda *_: iter(stream))
    job = EncodeJob("", "", (), recipe, None, (("gen", "uint16"), ("disc", "uint16")), 256, images, 1, "bfloat16")
    models = tuple(copy.deepcopy(model) for model in models)
    with fake_cuda() as trace:
        pair = full_size_pair(*models)
        trace.reset()
        worker = EncodeWorker(job, GoodRows(np.zeros(chunk.stop, np.uint8)), None, pair)
        ((_, arrays),) = worker.process([chunk], lambda *_: None)
    assert arrays["disc"].shape == (chunk.stop, len(recipe.views), 256)
    assert json.loads(arrays["reasons"].tobytes()) == {}
    return trace


def assert_fits(trace: Trace, images: int) -> None:
    """GPU memory above the models, float32 work and host waits of bfloat16 encoding stay under their bounds."""
    assert trace.grown() < 16 * GIB, "crops in pieces of at most 128"
    assert trace.flops["bfloat16"] / images == pytest.approx(280e9, rel=0.02), "encoder 128.6, teacher 151 GFLOP"
    assert trace.flops["float32"] / images < 0.2e9, "the full search of 16,384 words takes 8.6 GFLOP"
    assert trace.waited() == {"pipeline/common/device.py arrays"}


def test_encode(monkeypatch, models):
    trace = encode_chunk(monkeypatch, models, batches=3, images=256, views=["centre"])
    assert_fits(trace, 3 * 256)
    assert trace.waits.total() == 3, "one wait a batch, for a copy that was queued a batch before"
    assert trace.attention.keys() == {"flash"}


def test_encode_of_ten_crops(monkeypatch, models):
    assert_fits(encode_chunk(monkeypatch, models, batches=1, images=32, views=["ten-crop"]), 320)


def test_bounds_notice_what_they_guard_against(monkeypatch, models):
    """Whole batches of ten crops, the full float32 search, a wait for finite features: each breaks its bound."""
    with monkeypatch.context() as patch:
        patch.setattr(encode_worker, "CROPS", 2**30)
        patch.setattr(search, "SHORTLIST_CODES", 2**30)
        patch.setattr(encode_worker, "marked_non_finite", contextlib.nullcontext)
        trace = encode_chunk(patch, models, batches=1, images=32, views=["ten-crop"])
    assert trace.grown() > 30 * GIB
    assert trace.flops["float32"] / 320 > 8e9
    assert "pipeline/common/nearest.py refuse_non_finite" in trace.waited()


def kmeans_pass(points: int) -> Trace:
    """The trace of one iteration's pass over a float16 sample on the GPU."""
    with fake_cuda() as trace:
        sample_ND, centroids_KD = empty(points, WIDTH, dtype=torch.float16), empty(WORDS, WIDTH)
        trace.reset()
        one_pass(sample_ND, centroids_KD, 2.0**30)
    return trace


def test_kmeans_over_four_million_points():
    points = 256 * WORDS
    trace = kmeans_pass(points)
    assert trace.waited() == set(), "several GPUs work at the same time only if no pass waits"
    assert trace.grown() < 6 * GIB, "beside the sample of 8 GiB"
    assert trace.flops["tf32"] == 2 * points * WORDS * WIDTH
    assert trace.flops["float32"] < trace.flops["tf32"] / 400 and not trace.float32_products


def test_kmeans_bounds_notice_a_full_search(monkeypatch):
    monkeypatch.setattr(search, "SHORTLIST_CODES", 2**30)
    assert kmeans_pass(32 * WORDS).float32_products


def test_sampling_for_kmeans(models, monkeypatch):
    """A batch's features of the sampled cells are copied, not those of all cells, and nothing else is waited for."""
    rows, cells = 256, 256
    batch = CropBatch(
        chunk=Chunk(0, 0, rows),
        rows=np.arange(rows),
        pixels=np.zeros((rows, 1, 256, 256, 3), np.uint8),
        boxes=np.zeros((rows, 1, 5), np.float32),
        bad={},
        size=rows,
        last=True,
    )
    job = SampleJob("", "", (), (), None, {}, 16, "cuda:0", "bfloat16", 1000, 1.0, 0, rows, 1)
    teacher = copy.deepcopy(models[1])
    with fake_cuda() as trace:
        worker = SampleWorker(job, None, None, to_cuda(teacher), points_per_row(rows, 1000, cells))
        trace.reset()
        features = worker._queue(batch).arrays()["features"]
    assert features.shape == (1000, WIDTH) and features.dtype == np.float16
    assert trace.waited() == {"pipeline/common/device.py arrays"} and trace.grown() < 4 * GIB
