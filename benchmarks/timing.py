"""Wall times of several versions taken in turns, so that a busy machine slows all of them alike."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch


def in_turns(versions: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Best wall time in seconds of each version over `repeats` rounds after one of warm-up; a GPU is waited for."""
    best = dict.fromkeys(versions, float("inf"))
    for turn in range(repeats + 1):
        for name, run in versions.items():
            wait(device)
            start = perf_counter()
            run()
            wait(device)
            if turn:
                best[name] = min(best[name], perf_counter() - start)
    return best


def wait(device: str) -> None:
    """Until the GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
