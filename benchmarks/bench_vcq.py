"""VCQ against its baselines in one process: code search, autoregressive decoding, one tokenizer step, one AR step.

python -m benchmarks.bench_vcq [--small] [--device cuda --peak-tflops 790] [--parts search decode]
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import arguments, machine, publish
from benchmarks.timing import alternate
from semdict.train.ar.model import ArConfig, ArModel, preset
from semdict.train.ar.sampler import sample
from semdict.train.engine.guidance import Guidance
from semdict.train.engine.optim import adamw
from semdict.train.vcq.discriminator import PatchGan
from semdict.train.vcq.objective import LossWeights, TokenizerObjective
from semdict.train.vcq.quantizer import full_precision, nearest_codes, search_flops
from semdict.train.vcq.schedule import KINDS, codebook_sizes
from semdict.train.vcq.tokenizer import PRESETS, Tokenizer1d, TokenizerConfig

K = 16384


def timed(versions: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Version -> best seconds: processor time on a CPU, which other processes disturb least, wall time on a GPU."""
    wall, processor = alternate(versions, repeats, device)
    return wall if device.startswith("cuda") else processor


def one_shot(z_BLD: torch.Tensor, codes_KD: torch.Tensor, sizes_L: torch.Tensor | None) -> torch.Tensor:
    """Uniform VQ as usually written: the whole (B L, K) distance matrix, masked beyond `sizes_L`."""
    with full_precision(z_BLD.device):
        scores = torch.addmm(codes_KD.square().sum(1) / 2, z_BLD.flatten(0, 1), codes_KD.T, alpha=-1)
    scores_BLK = scores.view(*z_BLD.shape[:2], -1)
    if sizes_L is not None:
        barred_LK = torch.arange(len(codes_KD), device=z_BLD.device) >= sizes_L[:, None]
        scores_BLK = scores_BLK.masked_fill(barred_LK, torch.inf)
    return scores_BLK.argmin(-1)


def bench_search(device: str, small: bool, repeats: int) -> dict[str, Any]:
    """Seconds per batch of the search, and its ratio to uniform VQ of the same K (at most 0.5 for cosine)."""
    batch, k, dim = (2, 2048, 8) if small else (64 if device.startswith("cuda") else 4, K, 8)
    rng = torch.Generator().manual_seed(0)
    z_BLD = F.normalize(torch.randn(batch, 256, dim, generator=rng), dim=-1).to(device)
    codes_KD = F.normalize(torch.randn(k, dim, generator=rng), dim=-1).to(device)
    sizes = {kind: codebook_sizes(kind, k_max=k).to(device) for kind in KINDS}
    plain = {kind: tuple(s.tolist()) for kind, s in sizes.items()}
    versions: dict[str, Callable] = {"uniform": lambda: one_shot(z_BLD, codes_KD, None)}
    versions["naive_mask_cosine"] = lambda: one_shot(z_BLD, codes_KD, sizes["cosine"])
    for kind in KINDS:
        versions[f"grouped_{kind}"] = lambda kind=kind: nearest_codes(z_BLD, codes_KD, plain[kind])
    times = timed(versions, repeats, device)
    flops = {kind: search_flops(plain[kind], dim) / search_flops(plain["constant"], dim) for kind in KINDS}
    ratios = {name: t / times["uniform"] for name, t in times.items()}
    return {"batch": batch, "k": k, "dim": dim, "seconds": times, "ratio_to_uniform": ratios, "flop_ratio": flops}


def bench_decode(device: str, small: bool, repeats: int) -> dict[str, Any]:
    """Images per second of guided sampling with and without the key-value cache."""
    gpu = device.startswith("cuda")
    length, k, batch = (32, 256, 2) if small else (256, K, 64 if gpu else 2)
    sizes = tuple(codebook_sizes("cosine", length, k_max=k).tolist())
    config = preset("b", sizes) if gpu and not small else ArConfig(4, 256, 4, sizes)
    model = ArModel(config).to(device).eval()
    labels, images = torch.zeros(batch, dtype=torch.int64, device=device), list(range(batch))

    def sample_batch(cache: bool) -> None:
        with torch.autocast(device.split(":", maxsplit=1)[0], torch.bfloat16, enabled=gpu):
            sample(model, labels, images, guidance=Guidance(3.0), cache=cache)

    times = timed({"cached": lambda: sample_batch(True), "uncached": lambda: sample_batch(False)}, repeats, device)
    speeds = {name: batch / t for name, t in times.items()}
    shape = {"depth": config.depth, "width": config.width, "length": length, "codes": k, "batch": batch}
    return {**shape, "images_per_second": speeds, "cached_over_uncached": speeds["cached"] / speeds["uncached"]}


def mfu(run: Callable[[], Any], repeats: int, device: str, batch: int, peak: float) -> dict[str, float]:
    """Images per second, TFLOP per step, and model FLOP utilisation against `peak` TFLOP/s (0 = unknown)."""
    with FlopCounterMode(display=False) as counter:
        run()
    seconds = timed({"step": run}, repeats, device)["step"]
    tflop = counter.get_total_flops() / 1e12
    figures = {"seconds": seconds, "images_per_second": batch / seconds, "tflop_per_step": tflop}
    return figures | ({"mfu": tflop / seconds / peak} if peak else {})


def bench_tokenizer(device: str, small: bool, repeats: int, peak: float) -> dict[str, Any]:
    """One training step of tokenizer and discriminator, without the perceptual loss, whose weights are not shipped."""
    gpu = device.startswith("cuda")
    slim = TokenizerConfig(encoder=(2, 192, 3), decoder=(2, 192, 3))
    config, batch = (PRESETS["tiny"], 2) if small else (PRESETS["base"], 32) if gpu else (slim, 1)
    model, discriminator = Tokenizer1d(config).to(device), PatchGan().to(device)
    objective = TokenizerObjective(LossWeights(perceptual=0.0, start=0), None)
    images = torch.rand(batch, 3, config.image_size, config.image_size, device=device)
    rng = torch.Generator(device).manual_seed(0)
    optimisers = [adamw(part, (0.9, 0.95), 1e-4, decay_tables=False) for part in (model, discriminator)]

    def step() -> None:
        with torch.autocast(device.split(":", maxsplit=1)[0], torch.bfloat16, enabled=gpu):
            out = model(images)
            loss, _ = objective.generator(out, images, discriminator, 5000, rng)
        optimisers[0].zero_grad()
        loss.backward()
        optimisers[0].step()
        with torch.autocast(device.split(":", maxsplit=1)[0], torch.bfloat16, enabled=gpu):
            loss, _ = objective.discriminator(out.images, images, discriminator, 5000, rng)
        optimisers[1].zero_grad()
        loss.backward()
        optimisers[1].step()

    whole = mfu(step, repeats, device, batch, peak)
    z_BLD = model.quantizer.project(torch.randn(batch, config.tokens, config.dim, device=device))
    search = timed({"s": lambda: model.quantizer.search(z_BLD)}, repeats, device)["s"]
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "batch": batch, **whole, "search_share_of_step": search / whole["seconds"]}


def bench_ar_step(device: str, small: bool, repeats: int, peak: float) -> dict[str, Any]:
    """One training step of the AR model, with the grouped head and with full logits."""
    gpu = device.startswith("cuda")
    length, k, batch = (32, 256, 2) if small else (256, K, 64 if gpu else 2)
    sizes = tuple(codebook_sizes("cosine", length, k_max=k).tolist())
    config = preset("b", sizes) if gpu and not small else ArConfig(2, 128, 2, sizes)
    model = ArModel(config).to(device)
    ids_BL = (torch.rand(batch, length) * torch.tensor(sizes)).long().to(device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)

    def step(grouped: bool) -> None:
        with torch.autocast(device.split(":", maxsplit=1)[0], torch.bfloat16, enabled=gpu):
            loss = model.loss(ids_BL, labels) if grouped else F.cross_entropy(model(ids_BL, labels).mT, ids_BL)
        model.zero_grad()
        loss.backward()

    figures = mfu(lambda: step(True), repeats, device, batch, peak)
    times = timed({"grouped": lambda: step(True), "whole_logits": lambda: step(False)}, repeats, device)
    return {"batch": batch, **figures, "grouped_over_whole": times["grouped"] / times["whole_logits"]}


def main() -> None:
    """Run the selected parts."""
    parser = arguments(__doc__, "vcq")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="dense bf16 peak of the GPU, for MFU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=["search", "decode", "tokenizer", "ar_step"])
    args = parser.parse_args()
    common = (args.device, args.small, args.repeats)
    parts: dict[str, Callable[[], Any]] = {
        "search": lambda: bench_search(*common),
        "decode": lambda: bench_decode(*common),
        "tokenizer": lambda: bench_tokenizer(*common, args.peak_tflops),
        "ar_step": lambda: bench_ar_step(*common, args.peak_tflops),
    }
    figures = {name: parts[name]() for name in args.parts}
    publish(args.out, {"machine": machine(args.device), "small": args.small, **figures})


if __name__ == "__main__":
    main()
