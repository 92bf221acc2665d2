"""Feature maps of timm's models: vision transformers and convolutional networks, from the hub or from a local file."""

import contextlib
import difflib
import hashlib
import io
import os
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.common.hub import is_hub_name
from semdict.pipeline.common.safeload import (
    existing_file,
    load_tensors,
    open_checkpoint,
    refuse_misfit,
    state_dict_of,
)
from semdict.pipeline.tokenizers.dino_checkpoints import published_names

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESERVED = {  # arguments of timm that another parameter decides -> that parameter
    "pretrained": "features.weights",
    "checkpoint_path": "features.weights",
    "pretrained_cfg": "features.weights",
    "img_size": "features.image_size",
    "num_classes": "features.layer",
    "features_only": "features.layer",
}
OVERLAY = {"mean", "std"}  # keys that pretrained_cfg_overlay may have
FINAL_NORMS = ("norm", "fc_norm", "head.norm")  # where families keep the norm behind their last block


class TimmBackbone(nn.Module):
    """One intermediate feature map of a timm model, behind the model's final norm where that fits the map.

    Transformers of one width apply the final norm to inner blocks too, as DINOv2 and DiGIT do; networks of stages have
    it behind the last stage only. Class, register and distillation tokens are removed. What lies behind `layer` is cut
    off, so a file need not hold it. Arguments as in `load_features`.
    """

    def __init__(
        self,
        model: str,
        weights: str | os.PathLike | None,
        layer: int,
        image_size: int | None,
        grid: int,
        kwargs: dict[str, Any],
    ) -> None:
        super().__init__()
        if image_size is None:
            image_size = grid * self.stride_of(model, layer, kwargs)
        network = build_network(model, image_size, kwargs, from_hub=weights is None)
        self.index, stage = _stages(network, model, layer)
        self.image_size, self.stride, self.dim = image_size, stage["reduction"], stage["num_chs"]
        if image_size % self.stride:
            raise WeightsError(
                f"features.image_size {image_size} is no multiple of the stride {self.stride} of {model}; "
                f"{grid}x{grid} cells need {grid * self.stride}"
            )
        norm_name, norm = _final_norm(network, self.index)
        if weights is None:
            source = {"source": "hub", "sha256": _sha256_tensors(network)}
            _cut(network, self.index)
        else:
            _load_file(network, self.index, norm_name, norm, model, weights)
            source = {"source": "file", "sha256": sha256_file(existing_file(weights))}
        self.network, self.norm = network, norm
        config = getattr(network, "pretrained_cfg", None) or {}
        self.mean, self.std = tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))
        self.identity = {"model": model, "layer": layer, "norm": "final" if norm else "none", **source}
        if kwargs:
            self.identity["kwargs"] = kwargs
        if not _isotropic(network):
            self.identity["receptive_field_offset"] = self.eval().receptive_field_offset()

    @staticmethod
    def stride_of(model: str, layer: int, kwargs: dict[str, Any]) -> int:
        """Pixels per cell and side of a layer's map, without building weights."""
        with torch.device("meta"):
            return _stages(build_network(model, kwargs=kwargs), model, layer)[1]["reduction"]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S), mean and std applied -> (B, D, h, w)."""
        (features_BDhw,) = self.network.forward_intermediates(
            images, indices=[self.index], norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        if self.norm is None:
            return features_BDhw
        features_BhwD = features_BDhw.permute(0, 2, 3, 1)
        if isinstance(self.norm, nn.LayerNorm):  # also timm's norm of NCHW maps, which has the same parameters
            norm = self.norm
            features_BhwD = F.layer_norm(features_BhwD, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        else:
            features_BhwD = self.norm(features_BhwD)
        return features_BhwD.permute(0, 3, 1, 2)

    @torch.no_grad()
    def receptive_field_offset(self) -> float:
        """How far the pixels that a cell depends on are centred below and right of it, in cells.

        From the geometry of the strided convolutions and poolings: a kernel of k pixels at stride s with p pixels of
        padding before the first is centred (k - 1) / 2 - p - (s - 1) / 2 of its input's pixels off the s pixels that it
        replaces. Padding on both sides looks to the upper left, padding after the last pixel to the lower right; a
        pyramid of such layers is half a cell off. Patchifying convolutions are centred.
        """
        fixed = (getattr(self.network, "pretrained_cfg", None) or {}).get("fixed_input_size")
        size = self.image_size if fixed else 4 * self.stride
        shifts: dict[int, tuple[int, float]] = {}  # side of the layer's input -> its kernel, its shift in image pixels

        def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            side = inputs[0].shape[-1]
            kernel, stride, padding = _geometry(layer, side)
            if stride > 1 and output.shape[-1] > 1:
                shift = ((kernel - 1) / 2 - padding - (stride - 1) / 2) * size / side
                shifts[side] = max(shifts.get(side, (0, 0.0)), (kernel, shift), key=lambda pair: pair[0])

        layers = [part for part in self.network.modules() if isinstance(part, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)]
        handles = [layer.register_forward_hook(record) for layer in layers]
        self(torch.zeros(1, 3, size, size))
        for handle in handles:
            handle.remove()
        return round(sum(shift for _, shift in shifts.values()) / self.stride, 4)


def _geometry(layer: nn.Module, side: int) -> tuple[int, int, int]:
    """Extent of the kernel, stride, and padding before the first pixel, along one side of `side` pixels."""
    kernel, stride, padding, dilation = (
        value if isinstance(value, int) else value[0]
        for value in (layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1))
    )
    extent = (kernel - 1) * dilation + 1
    if type(layer).__name__.endswith("Same"):  # timm's padding as in TensorFlow, by the size of the input
        padding = max((-(-side // stride) - 1) * stride + extent - side, 0) // 2
    return extent, stride, padding


def build_network(
    model: str, image_size: int | None = None, kwargs: dict[str, Any] | None = None, from_hub: bool = False
) -> nn.Module:
    """The bare timm module without a classifier, randomly initialised or from the hub.

    WeightsError when timm does not know the name, refuses the arguments or has no feature maps of the model.
    """
    import timm

    kwargs = kwargs or {}
    for name in sorted(kwargs.keys() & RESERVED):
        raise WeightsError(f"features.kwargs.{name} is not for timm here: set {RESERVED[name]}")
    if extra := set(kwargs.get("pretrained_cfg_overlay", {})) - OVERLAY:
        raise WeightsError(f"features.kwargs.pretrained_cfg_overlay may hold mean and std, not {', '.join(extra)}")
    name = model.removeprefix("timm/")
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise WeightsError(f"{model} is no model that timm {timm.__version__} knows; near: {', '.join(near) or 'none'}")
    size = {} if image_size is None else {"img_size": image_size}
    try:
        try:
            network = timm.create_model(name, pretrained=from_hub, num_classes=0, **size, **kwargs)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            network = timm.create_model(name, pretrained=from_hub, num_classes=0, **kwargs)  # takes any image size
    except Exception as error:
        if not from_hub or isinstance(error, TypeError | ValueError | AssertionError):
            sized = f" for images of {image_size} pixels" if image_size else ""
            raise WeightsError(f"{model} cannot be built{sized} with {kwargs or 'no arguments'}: {error}") from None
        raise WeightsError(
            f"the weights of {model} cannot be fetched ({type(error).__name__}). Without a network, put its checkpoint "
            "(timm's or the original layout) on this machine and set features.weights to that file"
        ) from None
    if not hasattr(network, "forward_intermediates") or not getattr(network, "feature_info", None):
        raise WeightsError(f"{model} gives no intermediate feature maps in timm {timm.__version__}")
    return network


def _load_file(
    network: nn.Module, index: int, norm_name: str, norm: nn.Module | None, model: str, path: str | os.PathLike
) -> None:
    """Cut the network behind layer `index`; fill it and the norm from a file, which may lack the layers cut off."""
    state = _fitting_state(network, index, norm_name, norm, model, load_tensors(path), path)
    for prefix, part in _parts(network, norm_name, norm).items():
        part.load_state_dict({name: state[prefix + name] for name in part.state_dict()})


def _parts(network: nn.Module, norm_name: str, norm: nn.Module | None) -> dict[str, nn.Module]:
    """The modules to fill, by the prefix of their tensors' names."""
    return {"": network} if norm is None else {"": network, f"{norm_name}.": norm}


def _fitting_state(
    network: nn.Module,
    index: int,
    norm_name: str,
    norm: nn.Module | None,
    model: str,
    tensors: dict[str, Tensor],
    path: str | os.PathLike,
) -> dict[str, Tensor]:
    """Cut the network behind layer `index`; the tensors that it needs, under its names. WeightsError for a misfit."""
    state = fitting_names(tensors, network, model, path)
    beyond, classifiers = _beyond(network)
    _cut(network, index)
    parts = _parts(network, norm_name, norm)
    needed = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()}
    state = {
        name: tensor
        for name, tensor in state.items()
        if name in needed or not (name in beyond or name.startswith(classifiers))
    }
    try:
        refuse_misfit(state, needed, path, model)
    except WeightsError as error:
        raise WeightsError(f"{error}{_hint(state, network, model)}") from None
    return state


def inspect_backbone(
    model: str,
    weights: str | os.PathLike | None,
    layer: int,
    image_size: int | None,
    grid: int,
    kwargs: dict[str, Any],
) -> tuple[int, int]:
    """(cells a side, width) of `TimmBackbone` with these arguments, without weights; a local file is only mapped.

    WeightsError for what TimmBackbone would refuse, but for a hub that cannot be reached.
    """
    image_size = image_size or grid * TimmBackbone.stride_of(model, layer, kwargs)
    with torch.device("meta"):
        network = build_network(model, image_size, kwargs)
    index, stage = _stages(network, model, layer)
    if weights is not None and not is_hub_name(weights):
        norm_name, norm = _final_norm(network, index)
        tensors = state_dict_of(open_checkpoint(weights), weights)
        _fitting_state(network, index, norm_name, norm, model, tensors, weights)
    return image_size // stage["reduction"], stage["num_chs"]


def fitting_names(
    state: dict[str, Tensor], network: nn.Module, model: str, path: str | os.PathLike
) -> dict[str, Tensor]:
    """The tensors of a file under timm's names, positions interpolated to the network's grid.

    Takes timm's own layout, the published ones that timm's filters know, and Hugging Face's of DINOv2 and DINOv3.
    """
    state = published_names(state)
    _refuse_lost_biases(state, network, model, path)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    wide = "cls_token" in state and state["cls_token"].shape[-1] != getattr(network, "embed_dim", None)
    if convert is None or wide or all(shapes.get(name) == tensor.shape for name, tensor in state.items()):
        return state
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some filters print the names that they skip
            return convert(dict(state), network)
    except Exception as error:
        refuse_misfit(state, network.state_dict(), path, model)
        raise WeightsError(f"{path} does not fit {model}: {error}") from None


def _refuse_lost_biases(state: dict[str, Tensor], network: nn.Module, model: str, path: str | os.PathLike) -> None:
    """timm drops DINOv3's biases of queries and values where the named model has none; they must be zero then."""
    bias = state.get("blocks.0.attn.qkv.bias")
    if "storage_tokens" not in state or bias is None or network.blocks[0].attn.q_bias is not None:
        return
    query, _, value = bias.chunk(3)
    if query.any() or value.any():
        raise WeightsError(f"{path} has biases of queries and values, {model} has none: use the model named ..._qkvb")


def _stages(network: nn.Module, model: str, layer: int) -> tuple[int, dict[str, Any]]:
    """Index of a layer counted from the end, and timm's description of its map (`num_chs`, `reduction`)."""
    stages = list(network.feature_info)
    if not -len(stages) <= layer <= -1:
        raise WeightsError(f"{model} has {len(stages)} layers: layer {layer} is not in -{len(stages)} .. -1")
    return len(stages) + layer, stages[layer]


def _isotropic(network: nn.Module) -> bool:
    """Whether all layers give maps of one width and stride, as in plain transformers."""
    return len({(stage["num_chs"], stage["reduction"]) for stage in network.feature_info}) == 1


def _final_norm(network: nn.Module, index: int) -> tuple[str, nn.Module | None]:
    """Name and module of the norm behind the last layer, where it applies to layer `index`; ("", None) without one."""
    if index < len(network.feature_info) - 1 and not _isotropic(network):
        return "", None
    for name in FINAL_NORMS:
        norm: Any = network
        for part in name.split("."):
            norm = getattr(norm, part, None)
        scale = getattr(norm, "weight", None)
        if scale is not None and scale.shape == (network.feature_info[index]["num_chs"],):
            return name, norm
    return "", None


def _cut(network: nn.Module, index: int) -> None:
    """Remove the layers behind `index` and the head; a network that timm cannot cut stays whole."""
    if hasattr(network, "prune_intermediate_layers"):
        network.prune_intermediate_layers([index], prune_norm=True, prune_head=True)


def _beyond(network: nn.Module) -> tuple[set[str], tuple[str, ...]]:
    """Names, and beginnings of names, that a file of the whole network may hold beside those of the cut one."""
    classifier = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    named = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return set(network.state_dict()), tuple(f"{name}." for name in (*named, "head"))


def _hint(state: dict[str, Tensor], network: nn.Module, model: str) -> str:
    """What may help a file that does not fit: an inner layer that it holds, or where timm's own file is."""
    if any("embeddings." in name for name in state):
        file = f"hf-hub:timm/{model.removeprefix('timm/')}/model.safetensors"
        return f"\n  its names are those of Hugging Face's transformers; timm's file of the same weights is {file}"
    present = [any(name.startswith(f"{stage['module']}.") for name in state) for stage in network.feature_info]
    if True in present and not present[-1]:
        last = present.index(False) - 1 - len(present)
        return f"\n  the file ends at layer {last}; set features.layer to it or to an inner one"
    return ""


def _sha256_tensors(network: nn.Module) -> str:
    """Hex SHA-256 over names and float32 bytes, the identity of weights that are not one local file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
