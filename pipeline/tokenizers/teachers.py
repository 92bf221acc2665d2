"""Patch features of a frozen vision transformer: images -> (B, L, D), any timm ViT by name or from a local file."""

import difflib
import hashlib
import os
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.common.safeload import load_tensors, refuse_misfit

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 224  # 16 x 16 cells of 14 pixels
SPEC = "vit:"  # a ViT that has no registered name: vit:patch=14,dim=96,depth=6,heads=3
SPEC_KEYS = {"patch": 14, "dim": 384, "depth": 12, "heads": 6, "reg": 0, "ratio": 4}


class Teacher(nn.Module):
    """Frozen ViT; called on images (B, 3, H, W) in [0, 1] it gives patch tokens (B, L, D) float32, row-major.

    Inside: bicubic antialiased resize to `image_size`, the model's mean and std, the blocks up to `layer` (-1 = last),
    the final norm (DiGIT and DINOv2 apply it to inner layers too), class and register tokens removed.
    `grid` (rows, columns), `dim` D, `identity` for recipes.
    """

    def __init__(self, vit: nn.Module, layer: int, image_size: int, identity: dict) -> None:
        super().__init__()
        config = getattr(vit, "pretrained_cfg", None) or {}
        mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
        self.vit, self.image_size = vit, image_size
        self.norm = _final_norm(vit)
        self.block = len(vit.blocks) + layer
        cells = _grid(vit, image_size)
        self.grid, self.dim = (cells, cells), vit.embed_dim
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.identity = {
            "kind": "features",
            "layer": layer,
            "image_size": image_size,
            "grid": cells,
            "dim": self.dim,
            "norm": "final",
            "resize": "bicubic antialias",
            "mean": list(mean),
            "std": list(std),
            **identity,
        }

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {tuple(images.shape)}, expected (B, 3, H, W) in [0, 1]")
        size = (self.image_size, self.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        tokens = self.vit.forward_intermediates(
            (images - self.mean) / self.std,
            indices=[self.block],
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )[0]
        return self.norm(tokens).float()


def load_features(
    model: str,
    weights: str | os.PathLike | None = None,
    layer: int = -1,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
) -> Teacher:
    """A frozen feature model in evaluation mode, float32.

    `model` is a timm name (`vit_large_patch14_reg4_dinov2.lvd142m`) or, for a ViT without one, a specification such as
    `vit:patch=14,dim=96,depth=6,heads=3,reg=0,ratio=4`. `weights` is a local checkpoint in timm's layout or in DINOv2's
    original one (positions are interpolated to the grid); without it they come from the hub. `layer` counts blocks from
    the end. `image_size` is what the model sees, 224 unless told. WeightsError for an unknown name, an unreachable hub,
    a file of another size (both sides shown), a layer the model lacks.
    """
    image_size = image_size or IMAGE_SIZE
    vit = build_vit(model, image_size, from_hub=weights is None)
    if not -len(vit.blocks) <= layer <= -1:
        raise WeightsError(f"{model} has {len(vit.blocks)} blocks: layer {layer} is not in -{len(vit.blocks)} .. -1")
    if weights is not None:
        _load_file(vit, model, Path(weights))
    source = {"source": "hub", "sha256": _sha256_tensors(vit)}
    if weights is not None:
        source = {"source": "file", "sha256": sha256_file(weights)}
    found = Teacher(vit, layer, image_size, {"model": model, **source})
    return found.requires_grad_(False).eval().to(device)


def build_vit(model: str, image_size: int = IMAGE_SIZE, from_hub: bool = False) -> nn.Module:
    """The bare timm module for a name or specification, without a classifier, randomly initialised or from the hub."""
    if model.startswith(SPEC):
        if from_hub:
            raise WeightsError(f"{model} has no published weights; set features.weights to a local checkpoint")
        vit = _from_spec(model, image_size)
    else:
        vit = _from_name(model, image_size, from_hub)
    if not all(hasattr(vit, part) for part in ("blocks", "patch_embed", "forward_intermediates", "embed_dim")):
        raise WeightsError(f"{model} is not a vision transformer with patch tokens ({type(vit).__name__})")
    _grid(vit, image_size)
    return vit


def _from_spec(model: str, image_size: int) -> nn.Module:
    import timm

    values = dict(SPEC_KEYS)
    for item in model.removeprefix(SPEC).split(","):
        key, _, number = item.partition("=")
        if key not in values or not number.isdigit():
            raise WeightsError(f"{model}: {item} is not understood; give {', '.join(values)} as key=whole number")
        values[key] = int(number)
    return timm.models.VisionTransformer(
        img_size=image_size,
        patch_size=values["patch"],
        embed_dim=values["dim"],
        depth=values["depth"],
        num_heads=values["heads"],
        mlp_ratio=values["ratio"],
        reg_tokens=values["reg"],
        no_embed_class=values["reg"] > 0,  # as in DINOv2: with registers, positions belong to patches alone
        num_classes=0,
    )


def _from_name(model: str, image_size: int, from_hub: bool) -> nn.Module:
    import timm

    name = model.removeprefix("timm/")
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise WeightsError(f"{model} is no model that timm {timm.__version__} knows; near: {', '.join(near) or 'none'}")
    try:
        return timm.create_model(name, pretrained=from_hub, num_classes=0, img_size=image_size)
    except TypeError as error:  # convolutional networks take no image size
        raise WeightsError(f"{model} is not a vision transformer: {error}") from None
    except Exception as error:
        if not from_hub:
            raise WeightsError(f"{model} cannot be built for {image_size} pixel images: {error}") from None
        raise WeightsError(
            f"the weights of {model} cannot be fetched ({type(error).__name__}). Without a network, put its checkpoint "
            "(timm's or the original DINOv2 layout) on this machine and set features.weights to that file"
        ) from None


def _grid(vit: nn.Module, image_size: int) -> int:
    """Cells a side; WeightsError where patches do not tile the image."""
    patch = vit.patch_embed.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    if image_size % patch:
        raise WeightsError(
            f"image_size {image_size} is no multiple of the patch size {patch}; 16 x 16 cells need {16 * patch}"
        )
    return image_size // patch


def _final_norm(vit: nn.Module) -> nn.Module:
    """The norm after the last block; models that pool before it call it fc_norm."""
    for name in ("norm", "fc_norm"):
        norm = getattr(vit, name, None)
        if norm is not None and not isinstance(norm, nn.Identity):
            return norm
    return nn.Identity()


def _load_file(vit: nn.Module, model: str, path: Path) -> None:
    """Fill `vit` from a local checkpoint; timm's own filter renames DINOv2 tensors and interpolates positions."""
    state = _plain_names(load_tensors(path))
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    width = state["cls_token"].shape[-1] if "cls_token" in state else vit.embed_dim
    if convert is not None and width == vit.embed_dim:
        try:
            state = convert(dict(state), vit)
        except Exception as error:
            refuse_misfit(state, vit, path, model)
            raise WeightsError(f"{path} does not fit {model}: {error}") from None
    state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    refuse_misfit(state, vit, path, model)
    vit.load_state_dict(state)


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without DINOv2's training wrappers: `backbone.`, and blocks inside chunks (blocks.1.7 -> blocks.7)."""
    if any(name.startswith("backbone.") for name in state):
        state = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): tensor for name, tensor in state.items()}


def _sha256_tensors(vit: nn.Module) -> str:
    """Hex SHA-256 over names and float32 bytes, the identity of weights that are not one local file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vit.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
