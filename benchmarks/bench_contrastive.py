"""Codebook contrast, forward and backward: fused, full logits with the neighbour table, neighbours in each step.

Example: python -m benchmarks.bench_contrastive --out benchmarks/results/contrastive.json    (--small for a quick look)
Times come from one process that alternates between the versions; extra memory is the rise of a separate process's peak
in one step.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import memory
from benchmarks.report import arguments, in_child, machine, publish
from benchmarks.timing import alternate
from semdict.train.masked.losses import codebook_contrastive, neighbour_table

SIZES = {"full": (4096, 16384, 1024), "small": (512, 4096, 256)}
TEMPERATURE, TAU, NEIGHBOURS = 0.1, 0.1, 6
VERSIONS = ("ours", "full_logits", "per_step")


def problem(small: bool, device: str) -> tuple[Tensor, ...]:
    """z (N, D) with gradient, words (N,), centroids (K, D) and their table; unit rows."""
    N, K, D = SIZES["small" if small else "full"]
    rng = torch.Generator().manual_seed(0)
    centroids = F.normalize(torch.randn(K, D, generator=rng), dim=1)
    z = F.normalize(torch.randn(N, D, generator=rng), dim=1)
    words = torch.randint(0, K, (N,), generator=rng)
    # the neighbours' values do not change the time: random ones, since the full table would take minutes to compute
    ids = torch.cat([torch.arange(K)[:, None], torch.randint(0, K, (K, NEIGHBOURS - 1), generator=rng)], dim=1)
    weights = (centroids[:, None] * centroids[ids]).sum(-1).div(TAU).softmax(1) if small else torch.ones(K, 6) / 6
    return tuple(x.to(device) for x in (z, words, centroids, ids, weights))


def ours(z: Tensor, words: Tensor, centroids: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The package's fused loss."""
    return codebook_contrastive(z, words, centroids, ids, weights, TEMPERATURE)


def full_logits(z: Tensor, words: Tensor, centroids: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """All logits in memory, autograd, with a precomputed neighbour table."""
    logits_NK = z @ centroids.T / TEMPERATURE
    positive_N = (logits_NK.gather(1, ids[words]) * weights[words]).sum(dim=1)
    return (logits_NK.logsumexp(dim=1) - positive_N).mean()


def per_step(z: Tensor, words: Tensor, centroids: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """As published: neighbours and weights of every row computed in each step, log-softmax of all logits."""
    unit_KD = F.normalize(centroids, dim=1)
    logp_NK = (F.normalize(z, dim=1) @ unit_KD.T / TEMPERATURE).log_softmax(dim=1)
    with torch.no_grad():
        sims, near = (unit_KD[words] @ unit_KD.T).topk(NEIGHBOURS, dim=1)
        share = (sims / TAU).softmax(dim=1)
    return -(share * logp_NK.gather(1, near)).sum(dim=1).mean()


def step(version: str, inputs: tuple[Tensor, ...]) -> float:
    """Forward and backward once; returns the loss."""
    z = inputs[0].detach().requires_grad_()
    loss = globals()[version](z, *inputs[1:])
    loss.backward()
    return loss.item()


def in_own_process(version: str, small: bool, device: str) -> int:
    """Bytes by which one step raises the peak memory of a separate process."""
    options = ["--child", version, "--device", device, *(["--small"] if small else [])]
    return json.loads(in_child("benchmarks.bench_contrastive", *options))["extra_bytes"]


def child(version: str, small: bool, device: str) -> None:
    """Run one step and print the rise of peak memory."""
    inputs = problem(small, device)
    step(version, tuple(x[:64] if i < 2 else x for i, x in enumerate(inputs)))  # libraries allocate their buffers
    print(json.dumps({"extra_bytes": memory.extra_bytes(lambda: step(version, inputs), device)}))


def measure(small: bool, device: str, repeats: int) -> dict:
    """Time and memory of all versions, and their ratios to ours."""
    inputs = problem(small, device)
    N, K, D = SIZES["small" if small else "full"]
    time, processor = alternate({v: lambda v=v: step(v, inputs) for v in VERSIONS}, repeats, device)
    extra = {v: in_own_process(v, small, device) for v in VERSIONS}
    return {
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "size": {"N": N, "K": K, "D": D},
        "seconds": time,
        "processor_seconds": processor,
        "extra_bytes": extra,
        "times_faster_than": {v: time[v] / time["ours"] for v in VERSIONS[1:]},
        "times_less_processor_time_than": {v: processor[v] / processor["ours"] for v in VERSIONS[1:]},
        "memory_of": {v: extra["ours"] / extra[v] for v in VERSIONS[1:]},
    }


def check_equal() -> None:
    """SystemExit unless all versions give the same loss on a small problem with the true neighbour table."""
    z, words, centroids, *_ = problem(small=True, device="cpu")
    inputs = (z, words, centroids, *neighbour_table(centroids, NEIGHBOURS, TAU))
    values = [step(version, inputs) for version in VERSIONS]
    if max(values) - min(values) > 1e-4:
        raise SystemExit(f"the versions disagree: {dict(zip(VERSIONS, values, strict=True))}")


def main() -> None:
    parser = arguments(__doc__, "contrastive")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--child", choices=VERSIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.small, args.device)
        return
    check_equal()
    publish(args.out, measure(args.small, args.device, args.repeats))


if __name__ == "__main__":
    main()
