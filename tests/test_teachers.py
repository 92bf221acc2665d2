"""Vision transformers as teachers: features against hooks on the timm model, in every published layout."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.tokenizers import load_features
from semdict.pipeline.tokenizers.timm_backbone import build_network

MODEL = "deit_tiny_patch16_224"
PLAIN = {"patch_size": 14, "embed_dim": 24, "depth": 3, "num_heads": 2}
WITH_REGISTERS = {**PLAIN, "reg_tokens": 4, "no_embed_class": True}
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


def vit_of(kwargs: dict = PLAIN, image_size: int = 224) -> torch.nn.Module:
    """The network that a teacher of MODEL and `kwargs` wraps."""
    return build_network(MODEL, image_size, kwargs)


def saved(tmp_path, vit: torch.nn.Module, wrap: str | None = None) -> str:
    state = vit.state_dict()
    torch.save({wrap: state} if wrap else state, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"


@torch.no_grad()
def by_hook(vit: torch.nn.Module, images: torch.Tensor, block: int, size: int = 224) -> torch.Tensor:
    """The output of block number `block` (from 0) seen by a hook, then the final norm written out."""
    seen = []
    handle = vit.blocks[block].register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    vit.forward_features((x - MEAN) / STD)
    handle.remove()
    tokens = seen[0][:, vit.num_prefix_tokens :].double()
    centred = tokens - tokens.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + vit.norm.eps).sqrt()
    return (scaled * vit.norm.weight.double() + vit.norm.bias.double()).float()


@pytest.mark.parametrize("kwargs", [PLAIN, WITH_REGISTERS], ids=["plain", "registers"])
@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_features_are_the_normed_patch_tokens_of_the_layer(tmp_path, images, kwargs, layer):
    vit = randomise(vit_of(kwargs))
    model = load_features(MODEL, saved(tmp_path, vit), layer=layer, kwargs=kwargs)
    features = model(images)
    assert features.shape == (2, 256, 24) and features.dtype == torch.float32
    assert torch.allclose(features, by_hook(vit, images, 3 + layer), atol=1e-4)
    for other in {0, 1, 2} - {3 + layer}:
        assert not torch.allclose(features, by_hook(vit, images, other), atol=0.1), "another layer would pass"
    assert (model.grid, model.dim) == ((16, 16), 24)


def test_mistakes_of_range_norm_and_prefix_would_show(tmp_path, images):
    vit = randomise(vit_of(WITH_REGISTERS))
    model = load_features(MODEL, saved(tmp_path, vit), layer=-2, kwargs=WITH_REGISTERS)
    right = by_hook(vit, images, 1)
    assert not torch.allclose(model(images * 2 - 1), right, atol=0.05)
    assert not torch.allclose(model(images.flip(1)), right, atol=0.05)
    small = F.interpolate(images, (224, 224), mode="bicubic", antialias=True)
    assert torch.allclose(model(small), right, atol=1e-4)
    raw = vit.forward_intermediates((small - MEAN) / STD, indices=[1], output_fmt="NLC", intermediates_only=True)[0]
    assert not torch.allclose(model(images), raw, atol=0.05), "the final norm would not be missed"


def test_order_is_row_major(tmp_path):
    """With nothing but the patch embedding at work, the changed cell is the changed token."""
    kwargs = {**PLAIN, "depth": 1}
    vit = randomise(vit_of(kwargs))
    for part in (vit.blocks[0].attn.proj, vit.blocks[0].mlp.fc2):
        torch.nn.init.zeros_(part.weight)
    model = load_features(MODEL, saved(tmp_path, vit), kwargs=kwargs)
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


DINOV2 = {"plain": "vit_small_patch14_dinov2", "registers": "vit_small_patch14_reg4_dinov2",
          "gated": "vit_giant_patch14_reg4_dinov2"}  # fmt: skip
SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 2}


@pytest.mark.parametrize("wrap", [None, "training", "hugging face"])
@pytest.mark.parametrize("kind", DINOV2)
def test_layouts_of_dinov2(tmp_path, images, kind, wrap):
    """Layer scale, registers and gated MLPs of DINOv2 files, by the registered models cut down to three blocks."""
    vit = randomise(build_network(DINOV2[kind], 224, SMALL))
    state = to_dinov2(vit, swiglu=kind == "gated")
    assert "blocks.0.ls1.gamma" in state and ("blocks.0.mlp.w12.weight" in state) == (kind == "gated")
    if wrap == "training":  # blocks in chunks of two, heads beside the backbone
        state = {
            "teacher": {
                "backbone." + key.replace("blocks.", "blocks.0.").replace("blocks.0.2.", "blocks.1.2."): tensor
                for key, tensor in state.items()
            }
        }
        state["teacher"]["dino_head.mlp.0.weight"] = torch.zeros(2, 2)
    elif wrap == "hugging face":
        state = to_hugging_face_dinov2(state)
    torch.save(state, tmp_path / "dinov2.pth")
    model = load_features(DINOV2[kind], tmp_path / "dinov2.pth", layer=-2, kwargs=SMALL)
    assert torch.allclose(model(images), by_hook(vit, images, 1), atol=1e-4)


def split_thirds(state: dict[str, torch.Tensor], names: tuple[str, str, str]) -> dict[str, torch.Tensor]:
    """qkv tensors as three, named as transformers' conversion scripts do."""
    split = {}
    for name, tensor in state.items():
        if "qkv" in name:
            split |= {name.replace("qkv", part): third for part, third in zip(names, tensor.chunk(3), strict=True)}
        else:
            split[name] = tensor
    return split


def renamed(state: dict[str, torch.Tensor], rules: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    for old, new in rules:
        state = {re.sub(old, new, name): tensor for name, tensor in state.items()}
    return state


def to_hugging_face_dinov2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that transformers' convert_dinov2_to_hf.py gives to an original state dict."""
    rules = [
        (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
        (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
        ("w12", "weights_in"),
        ("w3", "weights_out"),
    ]
    return renamed(split_thirds(state, ("query", "key", "value")), rules)


def to_dinov3(vit: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a timm DINOv3 under the names of the original files."""
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    state["storage_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 24)
    for name in [name for name in state if name.endswith(".q_bias")]:
        query, value = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    rules = [(r"\.gamma_(\d)$", r".ls\1.gamma"), ("fc1_g", "w1"), ("fc1_x", "w2")]
    state = renamed(state, rules)
    if any(".w1." in name for name in state):
        state = renamed(state, [(r"\.mlp\.fc2\.", ".mlp.w3.")])
    return state


def to_hugging_face_dinov3(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that transformers' convert_dinov3_vit_to_hf.py gives to an original state dict."""
    rules = [
        (r"^(cls_token|mask_token)$", r"embeddings.\1"),
        (r"^storage_tokens$", "embeddings.register_tokens"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings"),
        (r"^blocks\.(\d+)\.attn\.proj", r"layer.\1.attention.o_proj"),
        (r"^blocks\.(\d+)\.attn\.", r"layer.\1.attention."),
        (r"^blocks\.(\d+)\.ls(\d)\.gamma", r"layer.\1.layer_scale\2.lambda1"),
        (r"^blocks\.(\d+)\.mlp\.fc1", r"layer.\1.mlp.up_proj"),
        (r"^blocks\.(\d+)\.mlp\.fc2", r"layer.\1.mlp.down_proj"),
        (r"^blocks\.", "layer."),
        ("w1", "gate_proj"),
        ("w2", "up_proj"),
        ("w3", "down_proj"),
    ]
    state = renamed(split_thirds(state, ("q_proj", "k_proj", "v_proj")), rules)
    return {name: tensor for name, tensor in state.items() if not name.endswith("k_proj.bias")}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"])
@pytest.mark.parametrize("layout", ["timm", "published", "hugging face"])
def test_layouts_of_dinov3(tmp_path, images, name, layout):
    """Rotary positions, registers, biases of queries and values; gated MLPs in the second."""
    vit = randomise(build_network(name, 256, SMALL))
    state = vit.state_dict() if layout == "timm" else to_dinov3(vit)
    if layout == "hugging face":
        state = to_hugging_face_dinov3(state)
    torch.save(state, tmp_path / "dinov3.pth")
    model = load_features(name, tmp_path / "dinov3.pth", layer=-2, kwargs=SMALL)
    assert model.grid == (16, 16)
    assert torch.allclose(model(images), by_hook(vit, images, 1, size=256), atol=1e-4)


def test_biases_that_timm_would_drop_are_refused(tmp_path):
    state = to_dinov3(randomise(build_network("vit_small_patch16_dinov3_qkvb", 256, SMALL)))
    torch.save(state, tmp_path / "dinov3.pth")
    with pytest.raises(WeightsError, match=r"biases of queries and values.*_qkvb"):
        load_features("vit_small_patch16_dinov3", tmp_path / "dinov3.pth", kwargs=SMALL)
    zero = {name: torch.zeros_like(t) if name.endswith("qkv.bias") else t for name, t in state.items()}
    torch.save(zero, tmp_path / "dinov3.pth")
    assert load_features("vit_small_patch16_dinov3", tmp_path / "dinov3.pth", kwargs=SMALL).dim == 24


def test_other_layouts_of_hugging_face_are_named(tmp_path):
    torch.save({"vision_model.embeddings.patch_embedding.weight": torch.zeros(24, 3, 14, 14)}, tmp_path / "x.bin")
    with pytest.raises(WeightsError, match=r"Hugging Face's transformers; .*hf-hub:timm/deit_.*model\.safetensors"):
        load_features(MODEL, tmp_path / "x.bin", kwargs=PLAIN)


@pytest.mark.parametrize("kwargs", [PLAIN, WITH_REGISTERS], ids=["plain", "registers"])
def test_positions_are_interpolated_from_518_pixels(tmp_path, images, kwargs):
    """A 37 x 37 table that a 16 x 16 grid resamples: smooth positions keep their meaning, class position apart."""
    large, small = randomise(vit_of(kwargs, 518)), vit_of(kwargs, 224)
    axis = (torch.arange(37) + 0.5) / 37
    rows, columns = axis[:, None, None].expand(37, 37, 12), torch.sin(3 * axis)[None, :, None].expand(37, 37, 12)
    table = torch.cat([columns, rows], 2)
    prefix = large.pos_embed.shape[1] - 37 * 37
    large.pos_embed.data[:, prefix:] = table.reshape(1, -1, 24)
    torch.save(to_dinov2(large), tmp_path / "dinov2.pth")
    model = load_features(MODEL, tmp_path / "dinov2.pth", kwargs=kwargs)
    positions = model.backbone.network.pos_embed[0]
    assert positions.shape == small.pos_embed.shape[1:]
    expected = F.interpolate(table.permute(2, 0, 1)[None], (16, 16), mode="bicubic", antialias=True)[0]
    assert torch.allclose(positions[prefix:], expected.flatten(1).T, atol=1e-5)
    if prefix:
        assert torch.equal(positions[:1], large.pos_embed[0, :1])
    assert model(images).shape == (2, 256, 24)


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_files_with_a_classifier_load(tmp_path, wrap):
    vit = randomise(vit_of())
    state = {**vit.state_dict(), "head.weight": torch.zeros(10, 24), "head.bias": torch.zeros(10)}
    torch.save({wrap: state} if wrap else state, tmp_path / "t.pth")
    model = load_features(MODEL, tmp_path / "t.pth", kwargs=PLAIN)
    assert torch.equal(model.backbone.network.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)


def test_blocks_behind_the_layer_need_not_be_in_the_file(tmp_path, images):
    vit = randomise(vit_of())
    state = {name: tensor for name, tensor in vit.state_dict().items() if not name.startswith("blocks.2.")}
    torch.save(state, tmp_path / "t.pth")
    model = load_features(MODEL, tmp_path / "t.pth", layer=-2, kwargs=PLAIN)
    assert len(model.backbone.network.blocks) == 2
    assert torch.allclose(model(images), by_hook(vit, images, 1), atol=1e-4)
    with pytest.raises(WeightsError, match=r"blocks\.2\..*nothing(.|\n)*the file ends at layer -2"):
        load_features(MODEL, tmp_path / "t.pth", kwargs=PLAIN)


@pytest.mark.parametrize(
    ("name", "size", "mean"),
    [
        ("vit_tiny_patch16_224", 256, 0.5),  # class token
        ("vit_base_patch16_siglip_256", 256, 0.5),  # attention pooling instead of a class token
        ("vit_base_patch32_clip_256", 512, 0.48145466),  # a norm before the blocks
        ("vit_base_patch16_224.mae", 256, 0.485),
        ("beit_base_patch16_224", 256, 0.5),  # relative positions
    ],
)
def test_other_families_by_name(tmp_path, images, name, size, mean):
    small = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    torch.save(build_network(name, size, small).state_dict(), tmp_path / "t.pth")
    model = load_features(name, tmp_path / "t.pth", kwargs=small)
    assert (model.image_size, model.grid, model.identity["mean"][0]) == (size, (16, 16), mean)
    assert model(images).shape == (2, 256, 64)
    assert model(images).std(-1).sub(1).abs().max() < 0.1, "the final norm was not applied"


def test_the_grid_decides_the_image_size(tmp_path):
    path = saved(tmp_path, randomise(vit_of()))
    model = load_features(MODEL, path, kwargs=PLAIN, grid=8)
    assert (model.image_size, model.grid, model(torch.rand(1, 3, 64, 64)).shape) == (112, (8, 8), (1, 64, 24))
    assert load_features(MODEL, path, kwargs=PLAIN, image_size=280).grid == (20, 20)


def test_mean_and_std_can_be_stated(tmp_path):
    overlay = {**PLAIN, "pretrained_cfg_overlay": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}
    model = load_features(MODEL, saved(tmp_path, randomise(vit_of())), kwargs=overlay)
    assert model.identity["mean"] == [0.1, 0.2, 0.3] and model.std.flatten().tolist() == [1, 1, 1]


def test_frozen_and_described(tmp_path, images):
    model = load_features(MODEL, saved(tmp_path, randomise(vit_of())), layer=-2, kwargs=PLAIN)
    assert not model.training and not any(tensor.requires_grad for tensor in model.parameters())
    assert not model(images.requires_grad_()).requires_grad
    identity = json.loads(json.dumps(model.identity))
    assert len(identity.pop("sha256")) == 64
    assert identity == {
        "kind": "features",
        "model": MODEL,
        "kwargs": PLAIN,
        "source": "file",
        "layer": -2,
        "norm": "final",
        "image_size": 224,
        "grid": 16,
        "dim": 24,
        "resize": "bicubic antialias",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


def test_autocast_still_gives_float32(tmp_path, images):
    model = load_features(MODEL, saved(tmp_path, randomise(vit_of())), kwargs=PLAIN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model(images)
    assert features.dtype == torch.float32
    assert F.cosine_similarity(features, model(images), dim=-1).min() > 0.9


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        ("vit_smal_patch16_224", {}, ["vit_smal_patch16_224", "vit_small_patch16_224"]),
        ("timm:resnet19", {}, ["resnet19", "resnet18"]),
        (MODEL, {"width": 3}, [MODEL, "width"]),
        (MODEL, {"img_size": 96}, ["features.kwargs.img_size", "features.image_size"]),
        (MODEL, {"checkpoint_path": "x.pth"}, ["features.kwargs.checkpoint_path", "features.weights"]),
        (MODEL, {"pretrained_cfg_overlay": {"file": "x.pth"}}, ["mean and std", "file"]),
    ],
)
def test_wrong_names_and_arguments_are_refused(tmp_path, model, kwargs, message):
    with pytest.raises(WeightsError) as caught:
        load_features(model, tmp_path / "none.pth", kwargs=kwargs)
    assert all(part in str(caught.value) for part in message), caught.value


def test_files_of_another_size_show_both_sides(tmp_path):
    def load(state: torch.nn.Module, **arguments) -> None:
        load_features(MODEL, saved(tmp_path, state), kwargs=PLAIN, **arguments)

    with pytest.raises(WeightsError, match=r"(?s)teacher\.pth.*32.*24"):
        load(vit_of({**PLAIN, "embed_dim": 32}))
    with pytest.raises(WeightsError, match=r"blocks\.3.*nothing"):
        load(vit_of({**PLAIN, "depth": 4}))
    with pytest.raises(WeightsError, match="reg_token"):
        load(vit_of(WITH_REGISTERS))
    with pytest.raises(WeightsError, match=r"3 layers: layer -4"):
        load(vit_of(), layer=-4)
    with pytest.raises(WeightsError, match="layer 0"):
        load(vit_of(), layer=0)
    with pytest.raises(WeightsError, match=r"image_size 230 is no multiple of the stride 14.*need 224"):
        load(vit_of(), image_size=230)
    with pytest.raises(WeightsError, match="does not exist"):
        load_features(MODEL, tmp_path / "none.pth", kwargs=PLAIN)


def test_no_weights_and_no_network():
    code = (
        "from semdict.pipeline.tokenizers import load_features\n"
        "try: load_features('vit_tiny_patch16_224.augreg_in21k_ft_in1k')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "HF_HUB_CACHE": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("WeightsError")
    assert "vit_tiny_patch16_224" in done.stdout and "features.weights" in done.stdout
