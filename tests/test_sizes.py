"""64-pixel images on 8 x 8 cells and 512-pixel images on 32 x 32, from images to scores on a tiny world."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from semdict.pipeline.common.device import to_device
from semdict.pipeline.execute.store import split_rows
from semdict.pipeline.images.batches import CropRecipe, stream_batches
from semdict.pipeline.images.crops import Crop, expand_views
from semdict.pipeline.images.decode import DecodeSpec
from semdict.pipeline.manifest.table import load_manifest
from semdict.pipeline.shards import open_shards, verify_shards
from semdict.pipeline.tokenizers import load_tokenizer
from semdict.train.data.augment import TimmAugmentation
from semdict.train.data.images import ImageLoader, ImageRows, RandomCrop, centre_crops, usable_rows
from semdict.train.data.resident import ResidentLoader, table_from_shards
from semdict.train.data.streaming import StreamingLoader
from semdict.train.data.token_set import TokenSet
from tests import tiny
from tests.test_eval_cli import EVALUATE, MODEL, RUNTIME, images

VIEWS = ["centre", "random-1"]


@pytest.fixture(scope="module", params=[(64, 8), (512, 16)], ids=["64", "512"])
def world(request, tmp_path_factory) -> SimpleNamespace:
    """Shards of 12 training and 6 test images."""
    size, stride = request.param
    root = tmp_path_factory.mktemp("world")
    folders = {split: str(root / "images" / split) for split in ("train", "val")}
    images(root, "train", 3, 4, 0)
    images(root, "val", 3, 2, 50)
    tiny.make_vqgan(root / "vqgan.ckpt", levels=stride.bit_length())
    tiny.make_teacher(root / "teacher.pth")
    tiny.write_params(
        root,
        manifest={"images": folders},
        pixels={"size": size},
        encode={"views": VIEWS},
        runtime=RUNTIME,
        pretrain=MODEL,
        evaluate=EVALUATE,
    )
    tiny.run_until_centroids(root)
    assert tiny.semdict(root, "encode") == 0
    return SimpleNamespace(root=root, size=size, stride=stride, grid=size // stride, folders=folders)


def test_shards_have_the_grid_and_the_tokens_of_the_crops(world):
    shards = open_shards(world.root / "shards/tiny")
    assert tuple(shards.grid) == (world.grid, world.grid) and shards.gen.shape == (18, 2, world.grid**2)
    assert verify_shards(world.root / "shards/tiny").ok
    manifest = load_manifest(world.root / "data/tiny/manifest/manifest.parquet")
    recipe = CropRecipe(Crop("resize", world.size), tuple(expand_views(VIEWS)))
    reader, tokenizer = manifest.reader(world.folders), load_tokenizer(world.root / "vqgan.ckpt")
    (batch,) = stream_batches(reader, manifest, split_rows(2, 2), recipe, 2)
    assert batch.pixels.shape == (2, 2, world.size, world.size, 3)
    ids = tokenizer.encode(to_device(batch.pixels.reshape(-1, *batch.pixels.shape[2:]), torch.device("cpu")))
    assert np.mean(ids.reshape(2, 2, -1).numpy() != shards.gen[:2]) < 5e-3  # near-ties of a random codebook
    assert len(np.unique(shards.gen[:])) > 10


def test_token_loaders_give_whole_grids(world, tmp_path):
    shards, tars = world.root / "shards/tiny", tmp_path / "tars"
    assert TokenSet.open(shards).grid == world.grid
    assert tiny.semdict(world.root, "shards", "export", "shards/tiny", str(tars), "--to", "webdataset") == 0
    resident = next(ResidentLoader(table_from_shards(shards, ["train"]), 4, 0))
    streamed = next(StreamingLoader(tars, ["train"], 4, 0))
    for batch in (resident, streamed):
        assert batch["gen"].shape == batch["disc"].shape == (4, world.grid**2)


def test_image_loaders_give_whole_images(world):
    manifest = load_manifest(world.root / "data/tiny/manifest/manifest.parquet")
    rows = ImageRows(manifest, world.folders, usable_rows(manifest, ["train"]), DecodeSpec())
    crops = ImageLoader(rows, RandomCrop(world.size, 0), 4, 0, workers=2, floats=True)
    augment = TimmAugmentation(0, "rand-m9-mstd0.5-inc1", (0.2, 1.0), world.size)
    augmented = ImageLoader(rows, augment, 4, 0, workers=1, processes=True)
    for loader, dtype in ((crops, torch.float32), (augmented, torch.uint8)):
        batch = next(loader)["images"]
        assert batch.shape == (4, 3, world.size, world.size) and batch.dtype == dtype
        assert batch.float().std((0, 2, 3)).min() > 0.05
        loader.close()
    assert centre_crops(rows, world.size, 3).shape == (3, world.size, world.size, 3)


def test_a_model_is_trained_sampled_and_scored(world):
    root = world.root
    assert tiny.semdict(root, "pretrain", "--objective", "mage") == 0
    model = ("--model", "runs/tiny/mage")
    for source in ("tokens", "images"):
        assert tiny.semdict(root, "evaluate", "knn", *model, "--set", f"evaluate.source={source}") == 0
    few = ("--set", "generate.images=2", "--set", "generate.steps=2")
    assert tiny.semdict(root, "generate", *model, *few, "--out", "samples") == 0
    samples = [path for path in Path(root / "samples").rglob("*.png") if path.stem.isdigit()]
    assert len(samples) == 2 and {Image.open(path).size for path in samples} == {(world.size, world.size)}


def test_a_size_that_the_stride_does_not_divide_is_refused(world, capsys):
    wrong = ("--set", f"pixels.size={world.size + 4}")
    assert tiny.semdict(world.root, "encode", *wrong, "--out", "other") == 1
    assert f"{world.size + 4} is not a multiple of the tokenizer's stride {world.stride}" in capsys.readouterr().err
