"""Times of several versions taken in turns, so that a busy machine slows all of them alike; wall and processor time."""

from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import torch


def in_turns(versions: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> tuple[dict, dict]:
    """Best wall and best processor time, in seconds by version, over `repeats` rounds after one of warm-up.

    Processor time (all threads added) is what other work on the machine disturbs least. A GPU is waited for.
    """
    wall, processor = (dict.fromkeys(versions, float("inf")) for _ in range(2))
    for turn in range(repeats + 1):
        for name, run in versions.items():
            wait(device)
            start, spent = perf_counter(), process_time()
            run()
            wait(device)
            if turn:
                wall[name] = min(wall[name], perf_counter() - start)
                processor[name] = min(processor[name], process_time() - spent)
    return wall, processor


def wait(device: str) -> None:
    """Until the GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
