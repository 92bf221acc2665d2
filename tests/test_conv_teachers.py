"""Convolutional networks as teachers: stages, norms, files that end early, and where a cell's receptive field lies."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.config.presets import resolve
from semdict.pipeline.tokenizers import load_features
from semdict.pipeline.tokenizers.timm_backbone import TimmBackbone, build_network
from tests.conftest import ROOT, SHARED

MOBILENET = ("mobilenetv1_100", {"pad_type": "same"})


@pytest.fixture(scope="module")
def mobilenet() -> Path:
    """MobileNetV1's ImageNet weights under timm's names, stem to the stage of stride 16."""
    path = SHARED / "data" / "teacher" / "mobilenetv1_100.safetensors"
    if not path.is_file():
        pytest.skip(f"no weights at {path} (set SEMDICT_SHARED)")
    return path


def images(count: int = 2, side: int = 256, seed: int = 1) -> torch.Tensor:
    """Smooth random images (B, 3, H, W) in [0, 1]."""
    noise = torch.rand(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)


def saved(tmp_path: Path, name: str, classes: int = 0, **kwargs) -> Path:
    """Random weights of a whole network, statistics of its batch norms off their defaults."""
    torch.manual_seed(0)
    network = build_network(name, kwargs=kwargs)
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
    state = network.state_dict()
    if classes:
        state |= {"fc.weight": torch.zeros(classes, 512), "fc.bias": torch.zeros(classes)}
    torch.save({"state_dict": state}, tmp_path / "conv.pth")
    return tmp_path / "conv.pth"


def plain_mobilenet(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """MobileNetV1 up to stride 16, straight from arXiv:1704.04861, in float64, padded as TensorFlow does."""
    s = {name: tensor.double() for name, tensor in state.items() if tensor.is_floating_point()}

    def convolution(x: torch.Tensor, weight: str, norm: str, stride: int = 1) -> torch.Tensor:
        kernel = s[weight]
        if kernel.shape[-1] == 3:  # stride 2 needs one row below and one column right, stride 1 one on each side
            x = F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        x = F.conv2d(x, kernel, stride=stride, groups=x.shape[1] // kernel.shape[1])
        mean, var, scale, shift = (
            s[f"{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(0, 6)

    x = convolution(x.double() * 2 - 1, "conv_stem.weight", "bn1", stride=2)
    for stage, blocks in enumerate((1, 2, 2, 6)):
        for block in range(blocks):
            name = f"blocks.{stage}.{block}"
            x = convolution(x, f"{name}.conv_dw.weight", f"{name}.bn1", stride=2 if block == 0 and stage else 1)
            x = convolution(x, f"{name}.conv_pw.weight", f"{name}.bn2")
    return x.flatten(2).mT


def test_mobilenet_of_the_shared_weights(mobilenet):
    from safetensors.torch import load_file

    name, kwargs = MOBILENET
    model = load_features(name, mobilenet, layer=-2, kwargs=kwargs)
    assert (model.image_size, model.grid, model.dim) == (256, (16, 16), 512)
    assert model.identity["mean"] == model.identity["std"] == [0.5, 0.5, 0.5]
    assert model.identity["norm"] == "none" and model.identity["receptive_field_offset"] == 0.4688  # 7.5 of 16 pixels
    x = images()
    features = model(x)
    assert features.shape == (2, 256, 512) and features.std() > 0.1
    assert torch.allclose(features.double(), plain_mobilenet(load_file(mobilenet), x), atol=1e-3)


def test_pooled_cells_are_means_of_the_cells_of_a_larger_image(tmp_path):
    path = saved(tmp_path, "resnet18")
    fine = load_features("resnet18", path, layer=-2, image_size=128)
    pooled = load_features("resnet18", path, layer=-2, grid=4, pool=2)
    assert (pooled.image_size, pooled.grid, pooled.identity["pool"]) == (128, (4, 4), 2)
    assert "pool" not in fine.identity
    x = images(side=64)
    cells = fine(x).view(2, 4, 2, 4, 2, -1)  # rows, rows within, columns, columns within
    torch.testing.assert_close(pooled(x), cells.mean((2, 4)).flatten(1, 2))
    with pytest.raises(WeightsError, match="image_size 144 is no multiple of 32, the stride of resnet18 times"):
        load_features("resnet18", path, layer=-2, image_size=144, pool=2)


@pytest.mark.parametrize(("pixels", "pool", "size"), [(64, 1, 64), (70, 1, 64), (73, 1, 80), (5, 1, 16), (64, 2, 64)])
def test_a_teacher_near_the_images_sees_the_nearest_multiple_of_its_stride(tmp_path, pixels, pool, size):
    model = load_features("resnet18", saved(tmp_path, "resnet18"), layer=-2, near=pixels, pool=pool)
    assert model.image_size == size


def test_a_file_that_ends_before_the_layer_names_the_last_one_that_fits(mobilenet):
    name, kwargs = MOBILENET
    with pytest.raises(WeightsError, match=r"blocks\.4\.0.*nothing(.|\n)*the file ends at layer -2; set"):
        load_features(name, mobilenet, kwargs=kwargs)


@pytest.mark.parametrize(("layer", "size", "dim"), [(-1, 512, 512), (-2, 256, 256), (-3, 128, 128), (-5, 32, 64)])
def test_stages_are_counted_from_the_end(tmp_path, layer, size, dim):
    path = saved(tmp_path, "resnet18", classes=10)
    model = load_features("resnet18", path, layer=layer)
    assert (model.image_size, model.grid, model.dim) == (size, (16, 16), dim)
    network = build_network("resnet18").eval()
    network.load_state_dict({k: t for k, t in torch.load(path)["state_dict"].items() if not k.startswith("fc.")})
    seen = []
    part = getattr(network, {-1: "layer4", -2: "layer3", -3: "layer2", -5: "act1"}[layer])
    part.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    x = images(1, size)
    with torch.no_grad():
        network.forward_features((x - model.mean) / model.std)
    assert torch.allclose(model(x)[0], seen[0].flatten(2).mT[0], atol=1e-4)


def test_the_final_norm_of_a_convnext_belongs_to_its_last_stage(tmp_path):
    kwargs = {"depths": (1, 1, 1, 1), "dims": (24, 32, 40, 48)}
    path = saved(tmp_path, "convnext_atto", **kwargs)
    last, inner = (load_features("convnext_atto", path, layer=layer, kwargs=kwargs) for layer in (-1, -2))
    assert (last.identity["norm"], inner.identity["norm"]) == ("final", "none")
    features = last(images(1))
    assert features.shape == (1, 256, 48)
    assert features.mean(-1).abs().max() < 1e-4 and features.std(-1, correction=0).sub(1).abs().max() < 1e-2
    assert inner(images(1)).mean(-1).abs().max() > 1e-2


CENTRES = [  # model, layer, arguments, offset in cells of 16 pixels
    ("mobilenetv1_100", -2, {}, -0.4688),
    ("mobilenetv1_100", -2, {"pad_type": "same"}, 0.4688),
    ("resnet18", -2, {}, -0.4688),
    ("convnext_atto", -2, {"depths": (1, 1, 1, 1), "dims": (24, 24, 24, 24)}, 0.0),
]


@pytest.mark.parametrize(("name", "layer", "kwargs", "offset"), CENTRES)
def test_receptive_fields_lie_where_the_identity_says(tmp_path, name, layer, kwargs, offset):
    """The centroid of the squared gradient of the four central cells with respect to noise, averaged over channels."""
    model = load_features(name, saved(tmp_path, name, **kwargs), layer=layer, kwargs=kwargs)
    assert model.identity["receptive_field_offset"] == offset
    assert isinstance(model.backbone, TimmBackbone)
    rng, weight_SS = torch.Generator().manual_seed(0), torch.zeros(256, 256)
    for _ in range(6):
        noise = torch.randn(4, 3, 256, 256, generator=rng).requires_grad_()
        central = model.backbone(noise)[..., 7:9, 7:9]
        signs = torch.randint(0, 2, central.shape, generator=rng) * 2 - 1
        (gradient,) = torch.autograd.grad((central * signs).sum(), noise)
        weight_SS += gradient.square().sum((0, 1))
    pixels = torch.arange(256) + 0.5 - 128
    for dim in (0, 1):
        centroid = (weight_SS.sum(1 - dim) * pixels).sum() / weight_SS.sum()
        assert abs(float(centroid) / 16 - offset) < 0.12


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("resnet18", {"image_size": 250}, "image_size 250 is no multiple of the stride 32 .* 16x16 cells need 512"),
        ("resnet18", {"layer": -6}, "5 layers: layer -6"),
        ("resnet18", {"kwargs": {"pad_typ": "same"}}, "resnet18 cannot be built"),
    ],
)
def test_mistakes_are_named(tmp_path, model, arguments, message):
    with pytest.raises(WeightsError, match=message):
        load_features(model, saved(tmp_path, "resnet18"), **arguments)


PRESETS = {  # preset -> pixels a side that its teacher sees for 256-pixel images at stride 16, and width
    "in1k": (224, 1024),
    "in1k-dinov3": (256, 768),
    "in1k-dinov3-convnext": (512, 768),
    "in1k-siglip2": (256, 768),
    "in1k-mae": (256, 768),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_teachers_of_the_presets_have_the_tokenizers_grid(preset):
    """The table of docs/tokenizers.md; the weights of each teacher are on the hub."""
    cfg = resolve(preset, ROOT / "presets")["features"]
    assert timm.models.is_model_pretrained(cfg["model"]) and cfg["image_size"] is None and not cfg["weights"]
    with torch.device("meta"):
        stage = build_network(cfg["model"], kwargs=cfg["kwargs"]).feature_info[cfg["layer"]]
    assert (16 * stage["reduction"], stage["num_chs"]) == PRESETS[preset]
    row = f"| `{preset}` | `{cfg['model']}` | {cfg['layer']} | {PRESETS[preset][0]} | 16 x 16 |"
    assert row in (ROOT / "docs" / "tokenizers.md").read_text()
