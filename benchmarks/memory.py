"""Rise of peak memory while a function runs: resident size on a CPU, allocated bytes on a GPU."""

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SAMPLE_SECONDS = 0.002  # where the kernel does not allow resetting the peak


def extra_bytes(work: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes by which peak memory rises while `work` runs."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = status("VmRSS")
    if reset_peak():
        work()
        return status("VmHWM") - before
    return _sampled(work) - before


def status(field: str) -> int:
    """A memory size of this process in bytes, from Linux: VmRSS (current) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: these benchmarks need Linux")


def reset_peak() -> bool:
    """Reset VmHWM to the current size; False where that is not permitted or has no effect."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return status("VmHWM") <= status("VmRSS") * 1.05


def _sampled(work: Callable[[], Any]) -> int:
    """Highest resident size sampled while `work` runs."""
    highest, done = [status("VmRSS")], threading.Event()

    def sample() -> None:
        while not done.is_set():
            highest.append(max(highest.pop(), status("VmRSS")))
            time.sleep(SAMPLE_SECONDS)

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return highest[0]
