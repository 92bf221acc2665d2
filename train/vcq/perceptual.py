"""Perceptual losses: LPIPS-VGG, logits of a ConvNeXt, or features of any local timm network.

Every loss takes images in [0, 1] and rescales them exactly once, inside. Weights come from files that the user names;
a file that is missing, damaged or has another SHA-256 than stated is an error that names it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.common.safeload import load_tensors

KINDS = ("lpips-vgg", "logits", "features")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VGG_SLICES = (4, 9, 16, 23, 30)  # torchvision's vgg16.features, cut after each last ReLU of a resolution


@dataclass(frozen=True)
class PerceptualSource:
    """A network for a perceptual loss: its kind, the file of its weights and, if stated, the file's SHA-256."""

    kind: str  # of KINDS
    weights: str
    sha256: str | None = None
    model: str = "convnext_small"  # timm name, for logits and features
    kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of timm's model
    layers: int | list[int] = 3  # for features: how many intermediate maps, the last ones, or the maps' numbers from 0
    image_size: int | None = None  # for logits and features: pixels a side; None = as the network was trained


class PerceptualLoss(nn.Module):
    """forward(fake, real): (B, 3, H, W) each in [0, 1] -> scalar float32; the gradient reaches `fake` alone.

    `name`: network and weights file, for the logs. Parameters take no gradient; always in evaluation mode.
    """

    name: str

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stays in evaluation mode whatever the trainer does."""
        return super().train(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps that are compared, from images in [0, 1]."""
        raise TypeError("a perceptual loss is one of KINDS")

    def compare(self, fake: Tensor, real: Tensor, index: int) -> Tensor:
        """Scalar distance of two maps of the same layer."""
        return F.mse_loss(fake.float(), real.float())

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        with torch.no_grad():
            real_maps = self.maps(real)
        pairs = zip(self.maps(fake), real_maps, strict=True)
        return torch.stack([self.compare(a, b, i) for i, (a, b) in enumerate(pairs)]).sum()


class LpipsVgg(PerceptualLoss):
    """LPIPS v0.1 (arXiv:1801.03924): VGG-16 from `path` (torchvision layout), linear heads from the `lpips` package."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        tensors = _vgg_slices(path, load_tensors(path))
        self.net = _import_lpips().LPIPS(net="vgg", pnet_rand=True, verbose=False)
        self.net.net.load_state_dict(tensors)
        self.net.requires_grad_(False)
        self.name = f"lpips-vgg:{path.name}"

    def maps(self, images: Tensor) -> list[Tensor]:
        """Five VGG maps of images brought to [-1, 1] here and nowhere else, each of unit length over channels."""
        maps = self.net.net(self.net.scaling_layer(images * 2 - 1))
        return [_unit(x.float()) for x in maps]

    def compare(self, fake: Tensor, real: Tensor, index: int) -> Tensor:
        """Squared difference weighed by the learned head, averaged over space and images."""
        return self.net.lins[index]((fake - real).square()).mean()


class Logits(PerceptualLoss):
    """MSE of the class logits at 224 x 224 (AliTok's use of ConvNeXt-S), any timm classifier."""

    def __init__(self, path: Path, model: str, kwargs: dict[str, Any], size: int | None = None) -> None:
        super().__init__()
        self.net = _timm(path, model, kwargs, classes=True)
        self.name = f"logits-{model}:{path.name}"
        self.prepare = _Prepare(self.net, size)

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, classes) logits."""
        return [self.net(self.prepare(images))]


class Features(PerceptualLoss):
    """LPIPS's distance without learned heads, on intermediate maps of any timm network."""

    def __init__(self, path: Path, model: str, layers: int, kwargs: dict[str, Any], size: int | None = None) -> None:
        super().__init__()
        self.net = _timm(path, model, kwargs, classes=False, layers=layers)
        self.layers = layers
        self.name = f"features-{model}:{path.name}"
        self.prepare = _Prepare(self.net, size)

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, C, h, w) maps of unit length over channels."""
        maps = self.net.forward_intermediates(self.prepare(images), indices=self.layers, intermediates_only=True)
        return [_unit(x.float()) for x in maps]

    def compare(self, fake: Tensor, real: Tensor, index: int) -> Tensor:
        """Squared distance of unit vectors, averaged over space, images and layers."""
        count = self.layers if isinstance(self.layers, int) else len(self.layers)
        return (fake - real).square().sum(1).mean() / count


class _Prepare(nn.Module):
    """Images in [0, 1] -> `size` or the network's input size (bilinear, antialias), its mean and deviation."""

    def __init__(self, net: nn.Module, size: int | None = None) -> None:
        super().__init__()
        cfg = getattr(net, "pretrained_cfg", {})
        self.size = tuple(cfg.get("input_size", (3, 224, 224))[-2:])
        embed = getattr(net, "patch_embed", None)
        self.size = tuple(getattr(embed, "img_size", None) or self.size)
        self.size = (size, size) if size else self.size
        self.register_buffer("mean", torch.tensor(cfg.get("mean", IMAGENET_MEAN)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg.get("std", IMAGENET_STD)).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = F.interpolate(images, size=self.size, mode="bilinear", antialias=True, align_corners=False)
        return (images - self.mean) / self.std


def load_perceptual(source: PerceptualSource, device: str | torch.device = "cpu") -> PerceptualLoss:
    """Build one loss; WeightsError if its file is missing, has another SHA-256 than stated, or does not fit."""
    path = Path(source.weights)
    if source.kind not in KINDS:
        raise WeightsError(f"perceptual loss {source.kind!r} is unknown; known: {', '.join(KINDS)}")
    if not path.is_file():
        raise WeightsError(_missing(source))
    sha256 = sha256_file(path)
    if source.sha256 and sha256 != source.sha256.lower():
        raise WeightsError(f"{path} has SHA-256 {sha256}, expected {source.sha256}; fetch it again")
    loss = _build(source, path)
    loss.name += f"@{sha256[:12]}"
    return loss.to(device).eval()


def choose_perceptual(sources: Sequence[PerceptualSource], device: str | torch.device = "cpu") -> PerceptualLoss:
    """The first of `sources` whose weights are there; WeightsError lists them all when none is."""
    for source in sources:
        if Path(source.weights).is_file():
            return load_perceptual(source, device)
    listed = "\n".join(f"  {_missing(source)}" for source in sources) or "  no source is configured"
    raise WeightsError(
        f"no perceptual loss can be built:\n{listed}\nSet the perceptual weight to 0 to train without one"
    )


def _build(source: PerceptualSource, path: Path) -> PerceptualLoss:
    if source.kind == "lpips-vgg":
        return LpipsVgg(path)
    if source.kind == "logits":
        return Logits(path, source.model, source.kwargs, source.image_size)
    return Features(path, source.model, source.layers, source.kwargs, source.image_size)


def _missing(source: PerceptualSource) -> str:
    wanted = {
        "lpips-vgg": "VGG-16 in torchvision's layout (vgg16-397923af.pth)",
        "logits": f"a timm state dict of {source.model} with its classifier",
        "features": f"a timm state dict of {source.model}",
    }[source.kind]
    return f"{source.kind}: {source.weights} does not exist; it should hold {wanted}"


def _import_lpips():
    """The `lpips` package, which ships the learned heads."""
    try:
        import lpips
    except ImportError:
        raise WeightsError("kind lpips-vgg needs the `lpips` package (its linear heads): pip install lpips") from None
    return lpips


def _vgg_slices(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's `features.N.weight` -> lpips' `sliceS.N.weight`; WeightsError when the layout is another."""
    renamed = {}
    for key, value in tensors.items():
        if key.startswith("features."):
            layer = int(key.split(".")[1])
            renamed[f"slice{1 + sum(layer >= cut for cut in VGG_SLICES)}.{key.removeprefix('features.')}"] = value
    if len(renamed) != 26:
        raise WeightsError(f"{path} is not torchvision's VGG-16: {len(renamed)} tensors under `features.`, expected 26")
    return renamed


def _timm(path: Path, model: str, kwargs: dict[str, Any], classes: bool, layers: int | list[int] = 1) -> nn.Module:
    """A timm network with the weights of `path`; without its classifier where only features are used.

    layers: maps that are used; what lies behind the last of a list of them is cut off, so the file need not hold it.
    """
    import timm

    tensors = load_tensors(path)
    try:
        if classes:
            net = timm.create_model(model, num_classes=_classes(path, tensors), **kwargs)
            net.load_state_dict(tensors)
        else:
            net = _headless(timm, model, kwargs, tensors, layers)
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit timm's {model}: {str(error).splitlines()[1:2] or error}") from None
    return net.requires_grad_(False).eval()


def _headless(
    timm, model: str, kwargs: dict[str, Any], tensors: dict[str, Tensor], layers: int | list[int]
) -> nn.Module:
    """The network at the image size that its position table was trained for, classifier left out."""
    net = timm.create_model(model, num_classes=0, **kwargs)
    if isinstance(layers, list):
        net.prune_intermediate_layers(layers, prune_norm=True, prune_head=True)
    kept = {key: value for key, value in tensors.items() if key in net.state_dict()}
    if "pos_embed" in kept and kept["pos_embed"].shape != net.pos_embed.shape:
        cells = kept["pos_embed"].shape[1] - net.num_prefix_tokens
        size = round(cells**0.5) * net.patch_embed.patch_size[0]
        net = timm.create_model(model, num_classes=0, img_size=size, **kwargs)
    net.load_state_dict(kept)
    return net


def _classes(path: Path, tensors: dict[str, Tensor]) -> int:
    for key in ("head.fc.bias", "head.bias", "fc.bias", "classifier.bias"):
        if key in tensors:
            return len(tensors[key])
    raise WeightsError(f"{path} has no classifier, kind `logits` compares its outputs; use kind `features`")


def _unit(x: Tensor) -> Tensor:
    """Unit length over channels, with LPIPS's epsilon."""
    return x / (x.square().sum(1, keepdim=True).add(1e-20).sqrt() + 1e-10)
