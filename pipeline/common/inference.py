"""Frozen models made ready for inference in reduced precision: rounded weights, and compiled parts on a GPU."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from semdict.pipeline.common.device import DTYPES

ROUNDED = (nn.Linear, nn.Conv2d)  # autocast rounds the weights of both in every call; of norms and tables it does not


def with_rounded_weights(model: nn.Module, precision: str) -> nn.Module:
    """A copy whose linear and convolutional weights are stored in `precision`.

    Under autocast to that precision it gives the same bits as the model itself, which autocast would round in every
    call. Subclasses of the two layers are left alone: they may compute with their weights in float32 first.
    """
    rounded = copy.deepcopy(model)
    for part in rounded.modules():
        for name, weight in list(part.named_parameters(recurse=False)) if type(part) in ROUNDED else []:
            layout = torch.channels_last if weight.ndim == 4 else torch.preserve_format  # that of the images
            low = weight.detach().to(DTYPES[precision], memory_format=layout)
            setattr(part, name, nn.Parameter(low, requires_grad=False))
    return rounded


def compiled(model: nn.Module, parts: Sequence[str]) -> nn.Module:
    """The model, with `torch.compile` on those of its named parts that it has; they compile at their first call.

    One size of batch compiles once: callers pad the last batch.
    """
    for name in parts:
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            part.compile(dynamic=False)
    return model
