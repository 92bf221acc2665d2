"""Frozen models as they run: in float32, or in reduced precision with rounded weights, compiled on a GPU."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.pipeline.common.device import DTYPES

# Crops that go through the models at once, whatever batch and views are: 256 ten-crop images take 282 GiB of GPU memory
# in the VQGAN encoder, and 256 x 128 channels x 256 x 256 pixels are 2^31 elements, past 32-bit indexing.
CROPS = 128
ROUNDED = (nn.Linear, nn.Conv2d)  # autocast rounds the weights of both in every call; of norms and tables it does not


class Precisions:
    """Versions of frozen models on one device, one per precision, made when they are first asked for.

    compiled_parts: names of the parts that `torch.compile` takes, of the models that have them; on a GPU and below
    float32 only, and only if `compile` is set. They compile at their first call, for CROPS images.
    """

    def __init__(
        self, models: dict[str, nn.Module], device: torch.device, compile: bool, compiled_parts: tuple[str, ...]
    ) -> None:
        self._versions = {"float32": models}
        self.compile, self.compiled_parts = compile and device.type == "cuda", compiled_parts

    def at(self, precision: str) -> dict[str, nn.Module]:
        """The models for a precision, to be called inside `reduced_precision`."""
        if precision not in self._versions:
            with torch.inference_mode(False):  # torch.compile wants ordinary tensors
                models = {
                    name: with_rounded_weights(model, precision) for name, model in self._versions["float32"].items()
                }
            if self.compile:
                for model in models.values():
                    compile_parts(model, self.compiled_parts)
            self._versions[precision] = models
        return self._versions[precision]

    def padded(self, images: Tensor, precision: str) -> Tensor:
        """The images, with empty ones up to CROPS where models are compiled: another size would compile anew."""
        missing = -len(images) % CROPS
        if not (self.compile and precision != "float32" and missing):
            return images
        return F.pad(images, (0, 0) * (images.ndim - 1) + (0, missing))


def with_rounded_weights(model: nn.Module, precision: str) -> nn.Module:
    """A copy whose linear and convolutional weights are stored in `precision`.

    Under autocast to that precision it gives the same bits as the model itself, which autocast would round in every
    call. Subclasses of the two layers are left alone: they may compute with their weights in float32 first.
    """
    rounded = copy.deepcopy(model)
    for part in rounded.modules():
        for name, weight in list(part.named_parameters(recurse=False)) if type(part) in ROUNDED else []:
            tiled = weight.ndim == 4 and weight.device.type == "cuda"  # the layout of the images, and of tensor cores
            layout = torch.channels_last if tiled else torch.preserve_format
            low = weight.detach().to(DTYPES[precision], memory_format=layout)
            setattr(part, name, nn.Parameter(low, requires_grad=False))
    return rounded


def compile_parts(model: nn.Module, names: tuple[str, ...], **options: str) -> None:
    """`torch.compile` on those of the named parts that the model has, for one size of batch."""
    for name in names:
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            part.compile(dynamic=False, **options)
