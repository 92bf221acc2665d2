"""Patch features against hooks on the timm model, in both published layouts, and against fakes."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.tokenizers import load_features
from semdict.pipeline.tokenizers.teachers import Teacher, build_vit

SPEC = "vit:patch=14,dim=24,depth=3,heads=2,reg=0"
WITH_REGISTERS = "vit:patch=14,dim=24,depth=3,heads=2,reg=4"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def randomise(vit: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights in which every part matters: norms off identity, positions and registers of size one."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in vit.state_dict().items():
            noise = torch.randn(tensor.shape, generator=rng)
            plain = "norm" in name or "gamma" in name
            tensor.copy_(1 + 0.3 * noise if plain and name.endswith(("weight", "gamma")) else 0.3 * noise)
    return vit.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(9))


def saved(tmp_path, vit: torch.nn.Module, wrap: str | None = None) -> str:
    state = vit.state_dict()
    torch.save({wrap: state} if wrap else state, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"


@torch.no_grad()
def by_hook(vit: torch.nn.Module, images: torch.Tensor, block: int, size: int = 224) -> torch.Tensor:
    """The output of block number `block` (from 0) seen by a hook, then the final norm written out."""
    seen = []
    handle = vit.blocks[block].register_forward_hook(lambda module, given, result: seen.append(result))
    x = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    vit.forward_features((x - MEAN) / STD)
    handle.remove()
    tokens = seen[0][:, vit.num_prefix_tokens :].double()
    centred = tokens - tokens.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + vit.norm.eps).sqrt()
    return (scaled * vit.norm.weight.double() + vit.norm.bias.double()).float()


@pytest.mark.parametrize("spec", [SPEC, WITH_REGISTERS])
@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_features_are_the_normed_patch_tokens_of_the_layer(tmp_path, images, spec, layer):
    vit = randomise(build_vit(spec))
    model = load_features(spec, saved(tmp_path, vit), layer=layer)
    got = model(images)
    assert got.shape == (2, 256, 24) and got.dtype == torch.float32
    assert torch.allclose(got, by_hook(vit, images, 3 + layer), atol=1e-4)
    for other in {0, 1, 2} - {3 + layer}:
        assert not torch.allclose(got, by_hook(vit, images, other), atol=0.1), "another layer would pass"
    assert (model.grid, model.dim) == ((16, 16), 24)


def test_mistakes_of_range_norm_and_prefix_would_show(tmp_path, images):
    vit = randomise(build_vit(WITH_REGISTERS))
    model = load_features(WITH_REGISTERS, saved(tmp_path, vit), layer=-2)
    right = by_hook(vit, images, 1)
    assert not torch.allclose(model(images * 2 - 1), right, atol=0.05)
    assert not torch.allclose(model(images.flip(1)), right, atol=0.05)
    small = F.interpolate(images, (224, 224), mode="bicubic", antialias=True)
    assert torch.allclose(model(small), right, atol=1e-4)
    raw = vit.forward_intermediates((small - MEAN) / STD, indices=[1], output_fmt="NLC", intermediates_only=True)[0]
    assert not torch.allclose(model(images), raw, atol=0.05), "the final norm would not be missed"


def test_order_is_row_major(tmp_path):
    """With nothing but the patch embedding at work, the changed cell is the changed token."""
    vit = randomise(build_vit("vit:patch=14,dim=24,depth=1,heads=2"))
    for part in (vit.blocks[0].attn.proj, vit.blocks[0].mlp.fc2):
        torch.nn.init.zeros_(part.weight)
    model = load_features("vit:patch=14,dim=24,depth=1,heads=2", saved(tmp_path, vit))
    base = torch.full((1, 3, 224, 224), 0.5)
    changed = base.clone()
    changed[:, :, 2 * 14 : 3 * 14, 5 * 14 : 6 * 14] = 1.0
    moved = (model(changed) - model(base)).abs().sum(-1)[0]
    assert moved.nonzero().flatten().tolist() == [2 * 16 + 5]


def to_dinov2(vit: torch.nn.Module, old_grid: int = 16, swiglu: bool = False) -> dict[str, torch.Tensor]:
    """The state dict of a timm ViT under the names of the original DINOv2 files, positions on another grid."""
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    position = state.pop("pos_embed")
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        class_position = torch.full((1, 1, position.shape[-1]), 0.7)
        position = torch.cat([class_position, position], 1)
        state["cls_token"] = state["cls_token"] - class_position
    if swiglu:
        state = {name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): t for name, t in state.items()}
    state["pos_embed"] = position
    state["mask_token"] = torch.zeros(1, position.shape[-1])
    return state


@pytest.mark.parametrize("wrap", [None, "chunks"])
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "giant"])
def test_original_dinov2_layout(tmp_path, images, name, wrap, monkeypatch):
    """Layer scale, registers and gated MLPs of DINOv2 files, by the registered models cut down to three blocks."""
    kwargs = {"depth": 3, "embed_dim": 24, "num_heads": 2}
    create, registered = timm.create_model, "vit_giant_patch14_reg4_dinov2" if name == "giant" else name
    monkeypatch.setattr(timm, "create_model", lambda *given, **more: create(*given, **{**more, **kwargs}))
    vit = randomise(build_vit(registered))
    state = to_dinov2(vit, swiglu=name == "giant")
    assert "blocks.0.ls1.gamma" in state and ("blocks.0.mlp.w12.weight" in state) == (name == "giant")
    if wrap == "chunks":
        state = {
            "teacher": {
                "backbone." + key.replace("blocks.", "blocks.0.").replace("blocks.0.2.", "blocks.1.2."): tensor
                for key, tensor in state.items()
            }
        }
        state["teacher"]["dino_head.mlp.0.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "dinov2.pth")
    model = load_features(registered, tmp_path / "dinov2.pth", layer=-2)
    assert torch.allclose(model(images), by_hook(vit, images, 1), atol=1e-4)


@pytest.mark.parametrize("spec", [SPEC, WITH_REGISTERS])
def test_positions_are_interpolated_from_518_pixels(tmp_path, images, spec):
    """A 37 x 37 table that a 16 x 16 grid resamples: smooth positions keep their meaning, class position apart."""
    large, small = randomise(build_vit(spec, 518)), build_vit(spec, 224)
    axis = (torch.arange(37) + 0.5) / 37
    rows, columns = axis[:, None, None].expand(37, 37, 12), torch.sin(3 * axis)[None, :, None].expand(37, 37, 12)
    table = torch.cat([columns, rows], 2)
    prefix = large.pos_embed.shape[1] - 37 * 37
    large.pos_embed.data[:, prefix:] = table.reshape(1, -1, 24)
    torch.save(to_dinov2(large), tmp_path / "dinov2.pth")
    model = load_features(spec, tmp_path / "dinov2.pth")
    got = model.vit.pos_embed[0]
    assert got.shape == small.pos_embed.shape[1:]
    want = F.interpolate(table.permute(2, 0, 1)[None], (16, 16), mode="bicubic", antialias=True)[0]
    assert torch.allclose(got[prefix:], want.flatten(1).T, atol=1e-5)
    if prefix:
        assert torch.equal(got[:1], large.pos_embed[0, :1])
    assert model(images).shape == (2, 256, 24)


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_files_with_a_classifier_load(tmp_path, wrap):
    vit = randomise(build_vit(SPEC))
    state = {**vit.state_dict(), "head.weight": torch.zeros(10, 24), "head.bias": torch.zeros(10)}
    torch.save({wrap: state} if wrap else state, tmp_path / "t.pth")
    model = load_features(SPEC, tmp_path / "t.pth")
    assert torch.equal(model.vit.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)


def test_any_registered_vit_by_name(tmp_path, images):
    """Another family (rotary positions), other patch size, the mean and std of its own card."""
    model = Teacher(build_vit("vit_tiny_patch16_224"), -1, 224, {}).eval()
    assert model.identity["mean"] == [0.5, 0.5, 0.5] and model(images).shape == (2, 196, 192)
    rotary = build_vit("vit_tiny_patch16_dinov3_qkvb", 256)
    torch.save(rotary.state_dict(), tmp_path / "r.pth")
    assert load_features("vit_tiny_patch16_dinov3_qkvb", tmp_path / "r.pth", image_size=256)(images).shape[1] == 256


def test_frozen_and_described(tmp_path, images):
    model = load_features(SPEC, saved(tmp_path, randomise(build_vit(SPEC))), layer=-2)
    assert not model.training and not any(tensor.requires_grad for tensor in model.parameters())
    assert not model(images.requires_grad_()).requires_grad
    said = json.loads(json.dumps(model.identity))
    assert (said["model"], said["layer"], said["image_size"], said["source"]) == (SPEC, -2, 224, "file")
    assert len(said["sha256"]) == 64 and (said["grid"], said["dim"]) == (16, 24)


def test_autocast_still_gives_float32(tmp_path, images):
    vit = randomise(build_vit(SPEC))
    model = load_features(SPEC, saved(tmp_path, vit))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(images)
    assert got.dtype == torch.float32 and F.cosine_similarity(got, model(images), dim=-1).min() > 0.9


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("vit_smal_patch16_224", ["vit_small_patch16_224"]),
        ("resnet18", ["not a vision transformer"]),
        ("swin_tiny_patch4_window7_224", ["not a vision transformer"]),
        ("vit:patch=14,width=3", ["width=3", "dim"]),
        ("vit:patch=14,dim=x", ["dim=x"]),
        ("vit:patch=15", ["224", "15", "240"]),
    ],
)
def test_wrong_names_are_refused(tmp_path, model, says):
    with pytest.raises(WeightsError) as caught:
        load_features(model, tmp_path / "none.pth")
    assert all(part in str(caught.value) for part in [model, *says] if "patch=15" not in model), caught.value
    assert all(part in str(caught.value) for part in says)


def test_files_of_another_size_show_both_sides(tmp_path):
    wide = build_vit("vit:patch=14,dim=32,depth=3,heads=2")
    with pytest.raises(WeightsError, match=r"(?s)teacher\.pth.*32.*24"):
        load_features(SPEC, saved(tmp_path, wide))
    deep = build_vit("vit:patch=14,dim=24,depth=4,heads=2")
    with pytest.raises(WeightsError, match=r"blocks\.3.*nothing"):
        load_features(SPEC, saved(tmp_path, deep))
    registers = build_vit(WITH_REGISTERS)
    with pytest.raises(WeightsError, match="reg_token"):
        load_features(SPEC, saved(tmp_path, registers))
    with pytest.raises(WeightsError, match="does not exist"):
        load_features(SPEC, tmp_path / "none.pth")
    with pytest.raises(WeightsError, match=r"3 blocks: layer -4"):
        load_features(SPEC, saved(tmp_path, build_vit(SPEC)), layer=-4)
    with pytest.raises(WeightsError, match="layer 0"):
        load_features(SPEC, saved(tmp_path, build_vit(SPEC)), layer=0)


def test_no_weights_and_no_network():
    with pytest.raises(WeightsError, match=r"no published weights.*features\.weights"):
        load_features(SPEC)
    code = (
        "from semdict.pipeline.tokenizers import load_features\n"
        "try: load_features('vit_tiny_patch16_224.augreg_in21k_ft_in1k')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "HF_HUB_CACHE": "/nonexistent"}
    said = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True).stdout
    assert said.startswith("WeightsError") and "vit_tiny_patch16_224" in said and "features.weights" in said
