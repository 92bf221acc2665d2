"""Values that move with the step: the paper's learning rate, and the ramps of loss terms."""

from collections.abc import Callable


def warmup_hold_linear(peak: float, final: float, warmup: int, hold_until: int, total: int) -> Callable[[int], float]:
    """Learning rate by step: up to `peak` over `warmup`, `peak` until `hold_until`, linear to `final` at `total`.

    The paper's tokenizer: 1e-4, 3e-5, 13k, 65k, 1.3M; AR base: 2e-4, 4e-5, 10k, 50k, 1M; AR large: 4e-4, 1e-5, 62.5k,
    no hold, 500k (choice O9). Constant at `final` after `total`. ValueError when the steps are out of order.
    """
    hold_until = max(hold_until, warmup)
    if not 0 <= warmup <= hold_until <= total:
        raise ValueError(f"learning rate: warm-up {warmup}, hold until {hold_until} and total {total} are out of order")

    def rate(step: int) -> float:
        if step < warmup:
            return peak * step / warmup
        if step <= hold_until:
            return peak
        return peak + (final - peak) * min(1.0, (step - hold_until) / (total - hold_until))

    return rate


def ramp(step: int, start: int, over: int = 0) -> float:
    """0 before step `start`, then linear to 1 over `over` steps (at once when 0)."""
    if step < start:
        return 0.0
    return 1.0 if over <= 0 else min(1.0, (step - start) / over)
