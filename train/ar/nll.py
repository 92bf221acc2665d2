"""Held-out negative log-likelihood per position, in bits: the honest companion of the empirical entropy curve."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from semdict.train.ar.model import ArModel


@torch.no_grad()
def nll_bits(model: ArModel, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
    """((L,) float64 mean bits per position, images seen) over (ids (B, L), labels (B,)) batches, in evaluation mode.

    ValueError when there is no batch. Sum over positions = bits per image.
    """
    training = model.training
    model.eval()
    total_L, images = None, 0
    try:
        for ids_BL, labels_B in batches:
            bits_L = model.nll(ids_BL, labels_B).double().sum(0) / math.log(2)
            total_L = bits_L if total_L is None else total_L + bits_L
            images += len(ids_BL)
    finally:
        model.train(training)
    if total_L is None:
        raise ValueError("no tokens to measure the likelihood on")
    return (total_L / images).cpu(), images
