"""Timing that alternates between versions, so that a busy machine slows all of them equally."""

from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import torch


def alternate(versions: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> tuple[dict, dict]:
    """(best wall seconds, best processor seconds) by version, over `repeats` rounds after one round of warm-up.

    Processor time is the sum over all threads; other processes disturb it least. On a GPU, waits for the kernels.
    """
    wall, processor = (dict.fromkeys(versions, float("inf")) for _ in range(2))
    for round_ in range(repeats + 1):
        for name, run in versions.items():
            wait(device)
            start, spent = perf_counter(), process_time()
            run()
            wait(device)
            if round_:
                wall[name] = min(wall[name], perf_counter() - start)
                processor[name] = min(processor[name], process_time() - spent)
    return wall, processor


def wait(device: str) -> None:
    """Wait until the GPU has finished all kernels."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
