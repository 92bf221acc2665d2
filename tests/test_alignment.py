"""Both token sets see the same pixels at the same index: proved per view with models that can be read by eye.

The tokenizer and the teachers below are the real classes, loaded from files, with weights such that every cell's token
depends on that cell's mean colour alone. The codebooks are the cells of one crop, in order: a token is a cell number.
"""

from functools import cache

import numpy as np
import pytest
import torch

from semdict.pipeline.common.device import to_device
from semdict.pipeline.images.crops import Crop, crop_views, expand_views
from semdict.pipeline.tokenizers import load_features, load_tokenizer
from semdict.pipeline.tokenizers.base import ConvTokenizer, save_tokenizer
from semdict.pipeline.tokenizers.mage import MageTokenizer
from semdict.pipeline.tokenizers.pair import PairTokenizer
from semdict.pipeline.tokenizers.teachers import Teacher
from semdict.pipeline.tokenizers.timm_backbone import build_network
from semdict.pipeline.tokenizers.vqgan import Sizes

SIDE, CELL = 16, 16  # cells a side; pixels of a 256-pixel crop per cell
CELLS = torch.arange(SIDE * SIDE)
RESIZE, ADM = Crop("resize", 256), Crop("adm", 256)
VIEWS = expand_views(["centre", "flip", "ten-crop", "random-4"])
WIDTH = 24
VIT = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "reg_tokens": 4, "no_embed_class": True}
# timm name, layer, arguments. Prefix tokens that were not removed would shift every index.
TEACHERS = {
    "vit at patch 14": ("deit_tiny_patch16_224", -1, {**VIT, "patch_size": 14}),
    "vit at patch 16": ("deit_tiny_patch16_224", -1, {**VIT, "patch_size": 16}),
    "convnext": ("convnext_atto", -2, {"depths": (1, 1, 1, 1), "dims": (WIDTH,) * 4}),
}


def picture(height: int = 330, width: int = 420, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: red grows to the right, green downwards, blue in random blocks; no two regions look alike."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10))
    rgb = np.empty((height, width, 3), np.uint8)
    rgb[..., 0] = np.linspace(0, 255, width)[None]
    rgb[..., 1] = np.linspace(0, 255, height)[:, None]
    rgb[..., 2] = np.kron(blocks, np.ones((10, 10)))
    return rgb


def colour_vqgan(path) -> ConvTokenizer:
    """Residual blocks that add nothing: average pooling of the colours remains."""
    sizes = Sizes(stem=32, widths=(32,) * 5, blocks=1, decoder_blocks=1, z_channels=3, codes=256, dim=3, strided=False)
    model = MageTokenizer(sizes)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.startswith("encoder.") and "norm" not in name:
                tensor.zero_()
        for colour in range(3):
            model.encoder.conv_in.weight[colour, colour, 1, 1] = 1
            model.encoder.conv_out.weight[colour, colour, 0, 0] = 1
        model.encoder.norm_out.bias.fill_(3.0)  # keeps the activation in its monotone part
    save_tokenizer(model, path)
    return load_tokenizer(path)


def colour_teacher(path, kind: str) -> Teacher:
    """Blocks that add nothing, no positions: a cell's mean colour beside fixed numbers remains, normalised."""
    name, layer, kwargs = TEACHERS[kind]
    network, rng = build_network(name, kwargs=kwargs), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if any(part in key for part in ("attn.proj", "mlp.fc2", "pos_embed", ".gamma")):
                tensor.zero_()
        for part in (part for part in network.modules() if isinstance(part, torch.nn.Conv2d) and part.stride[0] > 1):
            first = part.in_channels == 3
            part.weight.zero_()
            for channel in range(3 if first else WIDTH):
                part.weight[channel, channel] = 1 / part.kernel_size[0] ** 2
            part.bias.copy_(2 * torch.randn(WIDTH, generator=rng) if first else torch.zeros(WIDTH))
    torch.save(network.state_dict(), path)
    return load_features(name, path, layer=layer, kwargs=kwargs)


@pytest.fixture(scope="module", params=TEACHERS)
def pair(tmp_path_factory, request) -> PairTokenizer:
    folder = tmp_path_factory.mktemp("colour")
    tokenizer, teacher = colour_vqgan(folder / "vqgan.ckpt"), colour_teacher(folder / "teacher.pth", request.param)
    return PairTokenizer(tokenizer, teacher, torch.zeros(256, WIDTH), torch.device("cpu"))


def name_cells(pair: PairTokenizer, z_DL: torch.Tensor, features_LD: torch.Tensor) -> None:
    """Make the cells of one crop the codebooks: entry i is the feature of cell i."""
    pair.tokenizer.codebook.copy_(z_DL.T)
    pair.centroids = features_LD


def name_cells_of(pair: PairTokenizer, image: torch.Tensor) -> None:
    name_cells(pair, pair.tokenizer.encode_features(image[None])[0].flatten(1), pair.teacher(image[None])[0])


@cache
def crops(crop: Crop = RESIZE) -> torch.Tensor:
    """(V, 3, 256, 256) in [0, 1], all views of the picture."""
    return to_device(crop_views(picture(), crop, VIEWS, "key", 0)[0], torch.device("cpu"))


def both(pair: PairTokenizer, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = pair.tokens(images)
    return tokens["gen"], tokens["disc"]


def with_another_cell(image: torch.Tensor, index: int) -> torch.Tensor:
    """The same crop, but for the colour of one cell."""
    rows, columns = (slice(number * CELL, (number + 1) * CELL) for number in divmod(index, SIDE))
    other = image.clone()
    other[:, rows, columns] = (image[:, rows, columns].mean((1, 2), keepdim=True) + 0.5) % 1
    return other


EVERY = [(RESIZE, number) for number in range(len(VIEWS))] + [(ADM, 0), (Crop("resize-larger", 256, 1.14), 0)]


@pytest.mark.parametrize(("crop", "number"), EVERY, ids=[f"{crop.name}-{VIEWS[number].name}" for crop, number in EVERY])
def test_a_cell_has_one_index_in_both(pair, crop, number):
    image = crops(crop)[number]
    changed = [SIDE - 1, *np.random.default_rng(number).choice(SIDE * SIDE, 1).tolist()]
    images = torch.stack([image, *(with_another_cell(image, index) for index in changed)])
    z, features = pair.tokenizer.encode_features(images).flatten(2), pair.teacher(images)
    name_cells(pair, z[0], features[0])
    gen, disc = both(pair, images)
    assert torch.equal(gen[0], CELLS) and torch.equal(disc[0], CELLS), "cells are not distinguished, or not row-major"
    for row, index in enumerate(changed, start=1):
        assert (z[row] - z[0]).norm(dim=0).argmax() == index == (features[row] - features[0]).norm(dim=1).argmax()
        assert (gen[row] != CELLS).nonzero().tolist() == [[index]] == (disc[row] != CELLS).nonzero().tolist()


@pytest.mark.parametrize("crop", [RESIZE, ADM])
def test_a_flipped_view_has_its_cells_flipped_in_both(pair, crop):
    centre, flip = crops(crop)[:2]
    name_cells_of(pair, centre)
    mirrored = CELLS.reshape(SIDE, SIDE).flip(1).flatten()
    gen, disc = both(pair, flip[None])
    assert torch.equal(gen[0], mirrored) and torch.equal(disc[0], mirrored)


@pytest.mark.parametrize("mistake", ["transposed", "one column off", "other view", "prefix kept"])
def test_misalignment_would_be_noticed(pair, mistake):
    """The same question put to tokenizers that are wrong: tokens of the cells no longer count from 0 to 255."""
    image = crops()[0]
    name_cells_of(pair, image)
    features = pair.teacher(image[None])[0]
    if mistake == "transposed":
        features = features.reshape(SIDE, SIDE, -1).transpose(0, 1).reshape(256, -1)
    elif mistake == "one column off":
        features = pair.teacher(image.roll(CELL, 2)[None])[0]
    elif mistake == "other view":
        features = pair.teacher(crops()[2][None])[0]
    else:
        features = torch.cat([features[:1], features[:-1]])
    wrong = PairTokenizer(pair.tokenizer, lambda images: features[None], pair.centroids, pair.device)
    gen, disc = both(wrong, image[None])
    assert torch.equal(gen[0], CELLS) and (disc[0] != CELLS).sum() > 200
