"""Learning-rate schedules, functions of the optimiser step, and the ramp of a loss term's weight."""

import math
from collections.abc import Callable

LrSchedule = Callable[[int], float]  # optimiser step, counted from 0 -> learning rate


def scaled_lr(base_lr: float, global_batch: int) -> float:
    """Peak learning rate by the linear rule, base_lr * batch / 256 (Goyal et al., arXiv:1706.02677)."""
    return base_lr * global_batch / 256


def warmup_cosine(peak: float, warmup: int, total: int, floor: float = 0.0) -> LrSchedule:
    """Linear from 0 to `peak` over `warmup` steps, then half a cosine down to `floor` at `total` steps.

    MAE's `adjust_learning_rate`, with the epoch counted in fractions of a step. Constant at `floor` after `total`.
    """
    if not 0 <= warmup <= total:
        raise ValueError(f"warm-up of {warmup} steps does not fit into {total}")

    def lr(step: int) -> float:
        if step < warmup:
            return peak * step / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))

    return lr


def warmup_hold_linear(peak: float, final: float, warmup: int, hold_until: int, total: int) -> LrSchedule:
    """Linear to `peak` over `warmup` steps, constant until `hold_until`, then linear to `final` at `total`.

    VCQ, arXiv:2605.06207 (choice O9). Its tokenizer: 1e-4, 3e-5, 13k, 65k, 1.3M; AR base: 2e-4, 4e-5, 10k, 50k, 1M;
    AR large: 4e-4, 1e-5, 62.5k, no hold, 500k. Constant at `final` after `total`.
    Raises ValueError when the steps are out of order.
    """
    hold_until = max(hold_until, warmup)
    if not 0 <= warmup <= hold_until <= total:
        raise ValueError(f"learning rate: warm-up {warmup}, hold until {hold_until} and total {total} are out of order")

    def lr(step: int) -> float:
        if step < warmup:
            return peak * step / warmup
        if step <= hold_until:
            return peak
        return peak + (final - peak) * min(1.0, (step - hold_until) / (total - hold_until))

    return lr


def ramp(step: int, start: int, over: int = 0) -> float:
    """0 before step `start`, then linear to 1 over `over` steps (at once when 0)."""
    if step < start:
        return 0.0
    return 1.0 if over <= 0 else min(1.0, (step - start) / over)
