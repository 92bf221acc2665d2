"""How many processor cores there are for this process."""

import os


def cores() -> int:
    """Cores that this process may use: fewer than the machine has under Slurm, in a container or after taskset."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
