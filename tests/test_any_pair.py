"""Released tokenizers and other teachers through the whole pipeline: images of any size to verified token shards."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from semdict.pipeline.shards import open_shards
from semdict.pipeline.tokenizers import load_features, load_tokenizer
from semdict.pipeline.tokenizers.timm_backbone import build_network
from semdict.train.engine.model_file import save_model
from semdict.train.vcq.tokenizer import PRESETS, Tokenizer1d
from tests import tiny

CONVNEXT = {"model": "convnext_atto", "layer": -2, "kwargs": {"depths": (1, 1, 1, 1), "dims": (24, 32, 40, 48)}}
DINOV3 = {"model": "vit_tiny_patch16_dinov3_qkvb", "layer": -1, "kwargs": {"depth": 2, "embed_dim": 24, "num_heads": 2}}
DEIT = {**tiny.TEACHER, "layer": -1}
# tokenizer, pixels, teacher, pixels that the teacher sees, cells a side
PAIRS = {
    "llamagen and convnext": ("llamagen_vq8_tiny.pt", 64, CONVNEXT, 128, 8),
    "magvit2 and dinov3": ("magvit2_tiny.ckpt", 64, DINOV3, 128, 8),
    "maskgit and deit": ("maskgit_vqgan_tiny.bin", 128, DEIT, 112, 8),
    "ibq and deit": ("ibq_tiny.ckpt", 512, DEIT, 448, 32),
    "vcq and convnext": (None, 32, CONVNEXT, 64, 4),
}


@pytest.fixture(scope="module", params=PAIRS)
def world(request, golden, tmp_path_factory):
    """A folder with three images, encoded by a pair; and the pair's description."""
    root = tmp_path_factory.mktemp("pair")
    file, size, teacher, teacher_size, cells = PAIRS[request.param]
    tiny.make_images(root / "images", classes=1, each=3)
    weights = root / "vcq" if file is None else golden / file
    if file is None:
        weights.mkdir()
        save_model(weights / "tokenizer.pt", Tokenizer1d(PRESETS["tiny"], seed=1), {})
    torch.manual_seed(0)
    network = build_network(teacher["model"], None if "convnext" in teacher["model"] else 224, teacher["kwargs"])
    torch.save(network.state_dict(), root / "teacher.pth")
    params = tiny.params(root)
    params["pixels"]["size"] = size
    params["vqgan"]["weights"] = params["inputs"]["vqgan"] = str(weights)
    kwargs = {name: list(value) if isinstance(value, tuple) else value for name, value in teacher["kwargs"].items()}
    params["features"] |= {**teacher, "kwargs": kwargs}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    for command in ("manifest", "sample-features", "kmeans", "encode"):
        assert tiny.semdict(root, command) == 0
    return root, weights, size, {**teacher, "weights": root / "teacher.pth"}, teacher_size, cells


def test_shards_are_sound_and_of_the_pairs_grid(world):
    root, _, _, _, _, cells = world
    assert tiny.semdict(root, "shards", "verify", "shards/tiny") == 0
    shards = open_shards(root / "shards" / "tiny")
    assert shards.grid == (cells, cells) and len(shards) == 3
    assert np.asarray(shards.gen[:]).shape == np.asarray(shards.disc[:]).shape == (3, 1, cells * cells)


def test_tokens_are_those_of_the_two_models_alone(world):
    root, weights, size, teacher, teacher_size, cells = world
    shards = open_shards(root / "shards" / "tiny")
    tokenizer, model = load_tokenizer(weights), load_features(**teacher, grid=cells)
    assert model.image_size == teacher_size
    centroids = np.load(root / "data/tiny/kmeans/centroids.npy")
    for row, path in enumerate(sorted((root / "images" / "train").rglob("*.png"))):
        image = Image.open(path).convert("RGB")
        scale = size / min(image.size)
        image = image.resize([int(scale * side) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2) for side in image.size)
        pixels = np.asarray(image.crop((left, top, left + size, top + size)))
        batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        gen = np.asarray(shards.gen[row])[0]
        assert (gen != tokenizer.encode(batch)[0].numpy()).mean() < 0.01  # batches of another size round otherwise
        distances = np.square(model(batch)[0].double().numpy()[:, None] - centroids[None]).sum(-1)
        disc = np.asarray(shards.disc[row])[0].astype(np.int64)
        assert np.allclose(distances[np.arange(len(disc)), disc], distances.min(1), atol=1e-3)


def test_the_recipe_names_both_models(world):
    root, _, _, teacher, teacher_size, cells = world
    recipe = open_shards(root / "shards" / "tiny").meta["recipe"]
    assert len(recipe["gen"]["sha256"]) == len(recipe["disc"]["sha256"]) == 64
    assert (recipe["disc"]["model"], recipe["disc"]["image_size"]) == (teacher["model"], teacher_size)
    assert recipe["disc"]["grid"] == cells
