"""Shared by all benchmarks: description of the machine, command-line arguments, child processes, the result file."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from semdict.pipeline.common.files import write_json


def machine(device: str = "cpu") -> dict[str, Any]:
    """Device name, core count and versions, without which no figure can be compared."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_name()
    return {"device": name, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def seconds(run: Callable[[], Any], repeats: int = 3, device: str = "cpu") -> float:
    """Best wall time of `repeats` runs after one warm-up, in seconds; on a GPU, waits for the kernels."""
    times = []
    for round_ in range(repeats + 1):
        start = perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if round_:
            times.append(perf_counter() - start)
    return min(times)


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """A parser with --small (quick run at small sizes) and --out (result file)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help="quick run at small sizes")
    parser.add_argument("--out", type=Path, default=Path("reports/bench") / f"{name}.json")
    return parser


def in_child(module: str, *options: str) -> str:
    """Output of `python -m module options...` in a new process, for clean memory; SystemExit if it fails."""
    done = subprocess.run([sys.executable, "-m", module, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def publish(path: Path, figures: dict[str, Any]) -> None:
    """Print the figures and write them to `path`."""
    print(json.dumps(figures, indent=1))
    write_json(path, figures)
