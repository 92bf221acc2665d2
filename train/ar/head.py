"""The output layer over growing vocabularies: logits, and the negative log-likelihood without a (B, L, V) tensor.

Positions are cut into groups; a group is multiplied by the first K rows of the head that any of its positions may use.
For a cosine schedule that is 0.394 of the work and of the logits. Shapes: B images, L positions, E width, V codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from semdict.train.vcq.quantizer import position_groups


def masked_logits(hidden_BLE: Tensor, weight_VE: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(B, L, V) float32, -inf where the code does not exist at that position; the plain form."""
    logits_BLV = F.linear(hidden_BLE, weight_VE).float()
    sizes_L = torch.tensor(sizes, device=logits_BLV.device)
    excluded_LV = torch.arange(logits_BLV.shape[-1], device=logits_BLV.device) >= sizes_L[:, None]
    return logits_BLV.masked_fill(excluded_LV, -torch.inf)


def grouped_nll(
    hidden_BLE: Tensor, weight_VE: Tensor, ids_BL: Tensor, sizes: tuple[int, ...], groups: int = 16
) -> Tensor:
    """(B, L) float32 nats: cross-entropy of `masked_logits`, group by group.

    The backward pass makes a group's logits again, so at most one group's logits are alive at any time. An id that its
    position does not have costs inf, as under the plain form.
    """
    if torch.is_autocast_enabled(hidden_BLE.device.type):
        dtype = torch.get_autocast_dtype(hidden_BLE.device.type)
        hidden_BLE, weight_VE = hidden_BLE.to(dtype), weight_VE.to(dtype)
    return _GroupedNll.apply(hidden_BLE, weight_VE, ids_BL, sizes, groups)


def _group_logits(hidden_BSE: Tensor, weight_VE: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(B, S, K) float32 logits over the group's largest codebook, -inf in the strip beyond each position's own."""
    low, high = min(sizes), max(sizes)
    logits_BSK = F.linear(hidden_BSE, weight_VE[:high]).float()
    if low < high:
        limit_S = torch.tensor(sizes, device=logits_BSK.device)
        excluded_SK = torch.arange(low, high, device=logits_BSK.device) >= limit_S[:, None]
        logits_BSK[..., low:].masked_fill_(excluded_SK, -torch.inf)
    return logits_BSK


class _GroupedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_BLE, weight_VE, ids_BL, sizes, groups):
        nll_BL = torch.empty(ids_BL.shape, dtype=torch.float32, device=hidden_BLE.device)
        normaliser_BL = torch.empty_like(nll_BL)
        with torch.autocast(hidden_BLE.device.type, enabled=False):
            for start, stop in position_groups(len(sizes), groups):
                logits_BSK = _group_logits(hidden_BLE[:, start:stop], weight_VE, sizes[start:stop])
                ids_BS1 = ids_BL[:, start:stop, None]
                normaliser_BL[:, start:stop] = logits_BSK.logsumexp(-1)
                inside_BS1 = ids_BS1 < logits_BSK.shape[-1]
                own_logit_BS1 = logits_BSK.gather(-1, ids_BS1.clamp_max(logits_BSK.shape[-1] - 1))
                own_logit_BS = torch.where(inside_BS1, own_logit_BS1, -torch.inf).squeeze(-1)
                nll_BL[:, start:stop] = normaliser_BL[:, start:stop] - own_logit_BS
        ctx.save_for_backward(hidden_BLE, weight_VE, ids_BL, normaliser_BL)
        ctx.sizes, ctx.groups = sizes, groups
        return nll_BL

    @staticmethod
    def backward(ctx, upstream_BL):
        hidden_BLE, weight_VE, ids_BL, normaliser_BL = ctx.saved_tensors
        d_hidden_BLE = torch.empty_like(hidden_BLE)
        d_weight_VE = torch.zeros(weight_VE.shape, dtype=torch.float32, device=weight_VE.device)
        with torch.autocast(hidden_BLE.device.type, enabled=False):
            for start, stop in position_groups(len(ctx.sizes), ctx.groups):
                hidden_BSE = hidden_BLE[:, start:stop]
                d_BSK = _group_logits(hidden_BSE, weight_VE, ctx.sizes[start:stop])
                d_BSK.sub_(normaliser_BL[:, start:stop, None]).exp_()
                d_BSK.scatter_add_(-1, ids_BL[:, start:stop, None], d_BSK.new_full((*d_BSK.shape[:2], 1), -1.0))
                d_BSK = d_BSK.mul_(upstream_BL[:, start:stop, None]).to(hidden_BLE.dtype)
                high = d_BSK.shape[-1]
                d_hidden_BLE[:, start:stop] = d_BSK @ weight_VE[:high]
                d_weight_VE[:high] += d_BSK.flatten(0, 1).T @ hidden_BSE.flatten(0, 1)
        return d_hidden_BLE, d_weight_VE.to(weight_VE.dtype), None, None, None
