"""Sorcen's echoes: a second view of an image, conjured from the decoder's own predictions inside a jittered square.

Shapes: B batch, L = grid^2 cells, Q = side^2 cells of the square, K image codes.
"""

import torch
from torch import Tensor

from semdict.train.engine.rng import rand_rows

SMALLEST_SHARE = 0.5  # the square's side is uniform between half of the grid and all of it


def draw_square(batch: int, grid: int, rng: torch.Generator) -> tuple[int, Tensor]:
    """Side of the square, one a batch, uniform on grid/2 .. grid, and its cells (B, Q) int64; a corner per row."""
    low = max(1, int(grid * SMALLEST_SHARE))
    side = int(torch.randint(low, grid + 1, (1,), generator=rng, device=rng.device))
    corner_B2 = (rand_rows(batch, 2, rng=rng).double() * (grid - side + 1)).long()
    return side, square_cells(side, corner_B2, grid)


def square_cells(side: int, corner_B2: Tensor, grid: int) -> Tensor:
    """(B, side^2) int64 row-major cell numbers of the squares with top-left (row, column) `corner_B2`."""
    step = torch.arange(side, device=corner_B2.device)
    row_BS, column_BS = (corner_B2[:, axis, None] + step for axis in (0, 1))
    return (row_BS[:, :, None] * grid + column_BS[:, None, :]).flatten(1)


@torch.no_grad()
def sample_codes(logits_BQK: Tensor, rng: torch.Generator, top: int = 15) -> Tensor:
    """(B, Q) int64 codes drawn from the `top` most likely ones after the most likely is left out, by their probability.

    Drawn as the maximum of logit + Gumbel noise.
    """
    B, Q, K = logits_BQK.shape
    best = logits_BQK.float().topk(min(top + 1, K), dim=-1)
    # in [0, 1): moved off 0, whose double logarithm is infinite
    uniform = rand_rows(B, Q, best.values.shape[-1] - 1, rng=rng).clamp_min(1e-20).to(logits_BQK.device)
    gumbel = -(-uniform.log()).log()
    pick = (best.values[..., 1:] + gumbel).argmax(dim=-1, keepdim=True)
    return best.indices[..., 1:].gather(-1, pick)[..., 0]


def echo_tokens(codes_BQ: Tensor, cells_BQ: Tensor, length: int, mask_id: int) -> Tensor:
    """(B, L) int64: `codes_BQ` at the square's cells, `mask_id` everywhere else."""
    empty_BL = codes_BQ.new_full((codes_BQ.shape[0], length), mask_id)
    return empty_BL.scatter(1, cells_BQ, codes_BQ)
