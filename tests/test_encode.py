"""From images to shards on a tiny world: the tokens are those of a plain loop, for every scheduler, view and fault."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.inference import CROPS
from semdict.pipeline.encode.worker import EncodeWorker
from semdict.pipeline.execute.store import Chunk, ChunkStore
from semdict.pipeline.images.batches import CropBatch
from semdict.pipeline.manifest.table import load_manifest
from semdict.pipeline.shards import open_shards, verify_shards
from semdict.pipeline.tokenizers import load_features, load_tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tiny.make_world(root)
    tiny.run_until_centroids(root)
    assert tiny.semdict(root, "encode") == 0
    return root


@pytest.fixture
def copy(world, tmp_path) -> Path:
    """A copy of the world before `encode`, which a test may change."""
    root = tmp_path / "copy"
    shutil.copytree(world, root, ignore=shutil.ignore_patterns("shards", "work", "reports"))
    tiny.write_params(root)
    return root


def plain_tokens(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """One image at a time, with PIL and matrix algebra around the two models: the expected tokens."""
    vqgan = load_tokenizer(root / "vqgan.ckpt")
    teacher = load_features(**tiny.TEACHER, weights=root / "teacher.pth")
    words = np.load(root / "data/tiny/kmeans/centroids.npy").astype(np.float64)
    gens, discs = [], []
    for path in sorted((root / "images" / "train").rglob("*.png")):
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize([int(scale * side) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - 256) / 2) for side in image.size)  # as torchvision.transforms.CenterCrop
        pixels = np.asarray(image.crop((left, top, left + 256, top + 256)))
        batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            gens.append(vqgan.encode(batch)[0].numpy())
            features = teacher(batch)[0].double().numpy()
        discs.append(np.square(features[:, None] - words[None]).sum(-1).argmin(1))
    return np.stack(gens), np.stack(discs)


def test_tokens_equal_a_plain_loop(world):
    gen, disc = plain_tokens(world)
    shards = open_shards(world / "shards" / "tiny")
    assert len(np.unique(gen)) > 10, "the check needs varied tokens"
    assert len(np.unique(disc)) > 4
    assert np.mean(shards.gen[:, 0] != gen) < 5e-3  # near-ties of a random codebook; one pixel's shift gives 0.1
    assert np.mean(shards.disc[:, 0] != disc) < 1e-3
    assert verify_shards(world / "shards" / "tiny").ok


def test_ids_of_a_codebook_beyond_16_bits_are_kept(copy):
    """70,000 codes: the chunks and the shards hold 32-bit ids; none wraps around."""
    tiny.make_vqgan(copy / "vqgan.ckpt", codes=70_000)
    assert tiny.semdict(copy, "encode") == 0
    shards = open_shards(copy / "shards" / "tiny")
    gen, _ = plain_tokens(copy)
    assert shards.gen.dtype == np.uint32 and shards.disc.dtype == np.uint16
    assert gen.max() > 65_535
    assert np.mean(shards.gen[:, 0] != gen) < 5e-3
    assert verify_shards(copy / "shards" / "tiny").ok


def test_rows_labels_and_keys_are_the_manifests(world):
    shards = open_shards(world / "shards" / "tiny")
    manifest = load_manifest(world / "data/tiny/manifest/manifest.parquet")
    np.testing.assert_array_equal(shards.label[:], manifest.label)
    assert shards.index.column("key").to_pylist() == [manifest.key(i) for i in range(len(manifest))]
    assert shards.label[:].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_centroids_cluster_the_sampled_features(world):
    """The sample uses every centroid, and they are numbered by falling frequency."""
    words = np.load(world / "data/tiny/kmeans/centroids.npy")
    assert words.shape == (tiny.WORDS, 24)
    counts = np.bincount(open_shards(world / "shards" / "tiny").disc[:].ravel(), minlength=tiny.WORDS)
    assert counts[:4].sum() > counts[-4:].sum()


@pytest.mark.parametrize("scheduler", ["in-process", "local-2"])
def test_every_scheduler_writes_the_same_bytes(world, copy, scheduler):
    assert tiny.semdict(copy, "encode", "--scheduler", scheduler) == 0
    # the paths differ, the recipe must not name them
    assert tiny.digest(copy / "shards" / "tiny") == tiny.digest(world / "shards" / "tiny")


def test_assembling_opens_each_chunk_once(copy, monkeypatch):
    """Computed in this run: one read to write the shards. Already there: one more to verify it."""
    opened = []
    real = ChunkStore.read

    def read(self, chunk, names=()):
        opened.append(chunk.index)
        return real(self, chunk, names)

    monkeypatch.setattr(ChunkStore, "read", read)
    monkeypatch.setattr(ChunkStore, "sweep", lambda self: None)
    for times in (1, 2):
        opened.clear()
        assert tiny.semdict(copy, "encode") == 0
        assert sorted(opened) == sorted([*range(6)] * times)


def test_the_preflight_reports_psnr_and_keeps_the_grid(world):
    report = json.loads((world / "reports" / "tiny" / "encode.json").read_text())
    assert report["images"] == {"rows": 12, "bad": 0, "status": {"ok": 12}}
    assert 0 < report["preflight"]["psnr_mean"] < 60
    grid = Image.open(world / "reports" / "tiny" / "reconstructions.png")
    assert min(grid.size) > 200


def test_a_psnr_under_the_floor_stops_before_anything_is_published(copy, capsys):
    tiny.write_params(copy, vqgan={"psnr_floor": 60.0})
    assert tiny.semdict(copy, "encode") == 1
    assert "under vqgan.psnr_floor 60" in capsys.readouterr().err
    assert not (copy / "shards" / "tiny").exists()


def test_lower_precision_is_counted_against_float32(copy):
    tiny.write_params(copy, encode={"precision": "bfloat16"})
    assert tiny.semdict(copy, "encode") == 0
    unlike = json.loads((copy / "reports" / "tiny" / "encode.json").read_text())["preflight"]["tokens_unlike_float32"]
    assert 0 < unlike["gen"] < 0.5
    assert open_shards(copy / "shards" / "tiny").recipe["precision"] == "bfloat16"


def test_an_image_that_turns_bad_keeps_its_row(copy):
    """One truncated file: its row has a status and a reason, no other row changes."""
    damaged = sorted((copy / "images" / "train").rglob("*.png"))[5]
    damaged.write_bytes(damaged.read_bytes()[:-200])
    tiny.write_params(copy, manifest={"max_bad_fraction": 0.1})
    assert tiny.semdict(copy, "manifest") == 0
    assert tiny.semdict(copy, "encode") == 0
    shards = open_shards(copy / "shards" / "tiny")
    assert np.flatnonzero(shards.status[:]).tolist() == [5]
    assert (shards.gen[5] == 65535).all()
    assert shards.index.column("reason").to_pylist()[5]
    gen, _ = plain_tokens_without(copy, damaged)
    assert np.mean(np.delete(shards.gen[:, 0], 5, axis=0) != gen) < 5e-3
    assert verify_shards(copy / "shards" / "tiny").ok


def plain_tokens_without(root: Path, damaged: Path) -> tuple[np.ndarray, np.ndarray]:
    damaged.unlink()
    return plain_tokens(root)


def test_too_many_bad_images_stop_the_stage_and_name_them(copy, capsys):
    for damaged in sorted((copy / "images" / "train").rglob("*.png"))[:3]:
        damaged.write_bytes(damaged.read_bytes()[:-200])
    tiny.write_params(copy, manifest={"max_bad_fraction": 0.1})
    codes = [tiny.semdict(copy, command) for command in ("manifest", "encode")]
    assert 1 in codes
    errors = capsys.readouterr().err
    assert "max_bad_fraction" in errors
    assert "i000" in errors
    assert not (copy / "shards" / "tiny").exists()


def test_a_file_changed_since_the_manifest_is_named(copy, capsys):
    damaged = sorted((copy / "images" / "train").rglob("*.png"))[7]
    Image.fromarray(tiny.draw_image(999)).save(damaged)
    assert tiny.semdict(copy, "encode") == 1
    errors = capsys.readouterr().err
    assert damaged.name in errors
    assert "manifest" in errors
    assert not (copy / "shards" / "tiny").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"features": {"image_size": 112}}, "grids differ"),
        ({"vqgan": {"weights": "missing.ckpt"}, "inputs": {"vqgan": "missing.ckpt"}}, "missing.ckpt"),
        ({"features": {"kwargs": {**tiny.VIT, "embed_dim": 32}}}, "32"),
    ],
)
def test_models_that_do_not_fit_are_refused_with_both_sides(copy, capsys, sections, message):
    tiny.write_params(copy, **sections)
    assert tiny.semdict(copy, "encode") == 1
    assert message in capsys.readouterr().err


def test_centroids_of_another_width_are_refused(copy, capsys):
    centroids = copy / "data/tiny/kmeans/centroids.npy"
    np.save(centroids, np.zeros((tiny.WORDS, 40), np.float32))
    centroids.with_name("centroids.npy.sha256").unlink()
    assert tiny.semdict(copy, "encode") == 1
    errors = capsys.readouterr().err
    assert "40" in errors
    assert "24" in errors


def test_existing_centroids_can_be_used(copy):
    words = np.random.default_rng(0).normal(size=(tiny.WORDS, 24)).astype(np.float32)
    np.save(copy / "km.npy", words)
    km = str(copy / "km.npy")
    tiny.write_params(copy, kmeans={"centroids": km}, inputs={"centroids": km})
    tiny.run_until_centroids(copy)
    np.testing.assert_array_equal(np.load(copy / "data/tiny/kmeans/centroids.npy"), words)
    assert not (copy / "data" / "tiny" / "features.zarr" / "features").exists()
    assert tiny.semdict(copy, "encode") == 0


def test_ten_crop_and_random_views_are_encoded_and_their_boxes_kept(copy):
    tiny.write_params(copy, encode={"views": ["centre", "flip", "random-2"]})
    assert tiny.semdict(copy, "encode") == 0
    shards = open_shards(copy / "shards" / "tiny")
    assert shards.gen.shape == (12, 4, 256)
    assert [view["name"] for view in shards.views] == ["centre", "flip", "random-0", "random-1"]
    boxes = np.stack(shards.index.column("boxes").to_pylist()).reshape(12, 4, 5)
    assert len(np.unique(boxes[:, 2:, 0])) > 6, "random boxes differ between images"
    assert (boxes[:, 1, 4] == 1).all()


class MeanTokenizer:
    """Tokens that tell the crops apart: the mean of each channel; keeps how many crops came at a time."""

    device = torch.device("cpu")

    def __init__(self):
        self.sizes: list[int] = []

    def tokens(self, images: torch.Tensor, precision: str) -> dict[str, torch.Tensor]:
        self.sizes.append(len(images))
        return {"gen": (images.mean((2, 3)) * 255).round().long()}


@pytest.mark.parametrize("count", [1, CROPS, CROPS + 1, 2 * CROPS + 31])
def test_the_models_see_a_bounded_number_of_crops_at_a_time(count):
    crops = np.random.default_rng(0).integers(0, 256, (count, 1, 1, 3), dtype=np.uint8)
    worker = EncodeWorker(SimpleNamespace(precision="float32"), None, None, MeanTokenizer())
    np.testing.assert_array_equal(worker._tokens(crops).arrays()["gen"], crops.reshape(count, 3))
    assert max(worker.tokenizer.sizes) <= CROPS and sum(worker.tokenizer.sizes) == count


class NanTokenizer(MeanTokenizer):
    """Marks a cell as a search does whose features hold NaN."""

    def tokens(self, images, precision):
        return {"gen": torch.tensor([[3, -1, 4]]).repeat(len(images), 1)}


def test_features_that_are_not_finite_stop_the_run_by_image(world):
    """No token stands for NaN: the image is named, and nothing is written for its batch."""
    manifest = load_manifest(world / "data/tiny/manifest/manifest.parquet")
    job = SimpleNamespace(precision="bfloat16", dtypes=(("gen", "uint16"),))
    worker = EncodeWorker(job, manifest, None, NanTokenizer())
    crops = np.zeros((2, 1, 1, 1, 3), np.uint8)
    batch = CropBatch(Chunk(0, 0, 2), np.array([0, 1]), crops, np.zeros((2, 1, 5), np.float32), {}, 2, True)
    tokens = worker._queue(batch).arrays()
    with pytest.raises(SemdictError, match=f"{manifest.key(0)}.*gen tokens hold NaN.*2 cells.*bfloat16"):
        worker._fill({"gen": np.zeros((2, 1, 3), np.uint16)}, {}, batch, tokens)
