"""Iterative decoding as in MaskGIT (arXiv:2202.04200), with which MAGE, Sorcen and LEASE sample images.

Every step fills all unknown cells, keeps the most confident codes and hides the other cells again.
Shapes: B images, L cells, K codes, n unknown cells of the batch in row-major order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from semdict.train.engine.rng import Stream, numpy_generator

# logits_at(tokens_BL with the mask id at unknown cells, unknown_BL bool) -> (n, K) logits of the unknown cells
LogitsAt = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Decoding:
    """Parameters of iterative decoding; the published scripts take 20 steps at temperature 6.

    temperature: of the Gumbel noise on log-confidences, falling linearly to 0 with the steps. last: at least one cell
    stays hidden after the last step; it gets the code sampled in that step ("sampled", MAGE's and Sorcen's scripts) or
    the likeliest code of one more forward pass ("argmax", LEASE's).
    """

    steps: int = 20
    temperature: float = 6.0
    last: Literal["argmax", "sampled"] = "argmax"


class ImageRng:
    """Random numbers of each image, a function of (seed, its number): batch size and order change nothing."""

    def __init__(self, seed: int, numbers: Sequence[int]) -> None:
        self.streams = [numpy_generator(seed, Stream.DECODING, n) for n in numbers]

    def uniform(self, cells: int) -> np.ndarray:
        """(B, cells) float64 in [0, 1), the next numbers of every image."""
        return np.stack([stream.random(cells) for stream in self.streams])

    def gumbel(self, cells: int) -> np.ndarray:
        """(B, cells) float64 standard Gumbel noise."""
        return np.stack([stream.gumbel(size=cells) for stream in self.streams])


@torch.no_grad()
def decode_iteratively(logits_at: LogitsAt, context_BL: Tensor, mask: int, rng: ImageRng, cfg: Decoding) -> Tensor:
    """(B, L) int64 codes: cells of `context_BL` with the id `mask` are filled, all others stay as they are.

    After step s of S, cos(pi/2 (s+1)/S) of the cells unknown at the start are hidden again, at least one and at least
    one fewer than before, the least confident first: log p(code) + temperature (1 - (s+1)/S) Gumbel.
    """
    tokens_BL = context_BL.clone()
    begin_B = (tokens_BL == mask).sum(1)
    sampled_BL = tokens_BL
    for step in range(cfg.steps):
        unknown_BL = tokens_BL == mask
        if not unknown_BL.any():
            return tokens_BL
        logits_nK = logits_at(tokens_BL, unknown_BL)
        sampled_BL, probability_BL = sample_unknown(logits_nK, tokens_BL, unknown_BL, rng)
        hidden_B = cells_to_hide(step, cfg.steps, begin_B, unknown_BL.sum(1))
        noise_BL = torch.from_numpy(rng.gumbel(tokens_BL.shape[1])).to(tokens_BL.device)
        temperature = cfg.temperature * (1 - (step + 1) / cfg.steps)
        again_BL = least_confident(confidence(probability_BL, noise_BL, temperature), unknown_BL, hidden_B)
        tokens_BL = sampled_BL.masked_fill(again_BL, mask)
    if cfg.last == "sampled":
        return sampled_BL
    unknown_BL = tokens_BL == mask
    if unknown_BL.any():
        tokens_BL[unknown_BL] = logits_at(tokens_BL, unknown_BL).argmax(-1)
    return tokens_BL


def share_equal_contexts(logits_at: LogitsAt) -> LogitsAt:
    """The same logits, from one image where all images are equal, as in the first step of unconditional sampling.

    Only for a model that depends on nothing but the tokens.
    """

    def at(tokens_BL: Tensor, unknown_BL: Tensor) -> Tensor:
        if len(tokens_BL) > 1 and bool((tokens_BL == tokens_BL[:1]).all()):
            return logits_at(tokens_BL[:1], unknown_BL[:1]).repeat(len(tokens_BL), 1)
        return logits_at(tokens_BL, unknown_BL)

    return at


def sample_unknown(logits_nK: Tensor, tokens_BL: Tensor, unknown_BL: Tensor, rng: ImageRng) -> tuple[Tensor, Tensor]:
    """(B, L) a code from softmax(logits) in every unknown cell, and its probability (B, L) float64 (1 at known cells).

    By the inverse of the distribution function in float64, so that one uniform number decides a cell.
    """
    probabilities_nK = logits_nK.double().softmax(-1)
    uniform_BL = torch.from_numpy(rng.uniform(tokens_BL.shape[1])).to(tokens_BL.device)
    sums_nK = probabilities_nK.cumsum(-1)
    at_n1 = (uniform_BL[unknown_BL][:, None] * sums_nK[:, -1:]).contiguous()
    codes_n1 = torch.searchsorted(sums_nK, at_n1, right=True).clamp_(max=logits_nK.shape[-1] - 1)
    sampled_BL, probability_BL = tokens_BL.clone(), torch.ones_like(uniform_BL)
    sampled_BL[unknown_BL] = codes_n1[:, 0]
    probability_BL[unknown_BL] = probabilities_nK.gather(-1, codes_n1)[:, 0]
    return sampled_BL, probability_BL


def confidence(probability_BL: Tensor, gumbel_BL: Tensor, temperature: float) -> Tensor:
    """(B, L) log p + temperature * Gumbel; p no lower than 1e-12, as published."""
    return probability_BL.clamp(min=1e-12).log() + temperature * gumbel_BL


def cells_to_hide(step: int, steps: int, begin_B: Tensor, unknown_B: Tensor) -> Tensor:
    """(B,) int64 cells that stay hidden after `step` (from 0): floor(begin cos(pi/2 (step+1)/steps)), within
    [1, unknown - 1]; 0 where nothing is unknown.

    The published code counts the unknown cells of the first image for all; where images differ, each has its own count.
    """
    share = math.cos(math.pi / 2 * (step + 1) / steps)
    wanted_B = (begin_B.double() * share).floor().long()
    return torch.minimum(torch.minimum(wanted_B, unknown_B - 1).clamp(min=1), unknown_B)


def least_confident(confidence_BL: Tensor, unknown_BL: Tensor, hidden_B: Tensor) -> Tensor:
    """(B, L) bool: the `hidden_B` unknown cells of lowest confidence; known cells never."""
    rank_BL = confidence_BL.masked_fill(~unknown_BL, math.inf).argsort(1).argsort(1)
    return rank_BL < hidden_B[:, None]
