"""Which processes work on one machine: their number, their GPUs and their share of the cores."""

import os


def cores() -> int:
    """Cores that this process may use: fewer than the machine has under Slurm, in a container or after taskset."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def resolve_scheduler(scheduler: str, device: str) -> str:
    """The scheduler that a name stands for: "auto" is "local" on several GPUs, none of them named, else in-process."""
    if scheduler != "auto":
        return scheduler
    return "local" if device in ("auto", "cuda") and len(visible_gpus()) > 1 else "in-process"


def decode_threads(workers: int, scheduler: str) -> int:
    """Threads that decode images in one process: `workers`, or for 0 the process's share of the machine's cores.

    0 where the machines are not known (a scheduler's address): each process then counts its own cores.
    """
    if workers or not scheduler.startswith("local"):
        return workers
    return max(1, cores() // local_processes(scheduler))


def local_processes(scheduler: str) -> int:
    """Processes of "local" (one per visible GPU, at least one) or "local-N"."""
    return int(scheduler.partition("-")[2] or 0) or len(visible_gpus()) or 1


def visible_gpus() -> list[str]:
    """CUDA names of the GPUs that this process may use: entries of an inherited CUDA_VISIBLE_DEVICES, else numbers."""
    import torch

    count = torch.cuda.device_count()
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if inherited is None else [name.strip() for name in inherited.split(",")]
    return names[:count]
